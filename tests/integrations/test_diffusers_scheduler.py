"""DSSScheduler by itself: tables, runs, state. Its configs are in test_diffusers_config.py."""

import copy
import math
from dataclasses import replace

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own, of NumPy 2
from dss_fast import VP, DiscreteVP, Flow, Grid, Solver, find_solver, handmade, sample  # noqa: E402
from dss_fast.integrations.diffusers import DSSScheduler  # noqa: E402
from dss_fast.integrations.diffusers.config import adopt, model_schedule  # noqa: E402
from helpers.diffusers_runs import network, noise, run  # noqa: E402

FLOW = diffusers.FlowMatchEulerDiscreteScheduler
DDIM = diffusers.DDIMScheduler
DPM = diffusers.DPMSolverMultistepScheduler


# ---- equality with the stock schedulers


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"shift_terminal": 0.1}, {"use_karras_sigmas": True}])
def test_euler_has_the_bits_of_flow_match_euler(options):
    stock = FLOW(**options)
    ours = DSSScheduler.from_config(stock.config, solver="euler")
    for n in (1, 5, 10)["shift_terminal" in options :]:  # one step to a terminal shift is NaN in the stock
        assert torch.equal(run(stock, n), run(ours, n))
        assert torch.equal(stock.sigmas, ours.sigmas) and torch.equal(stock.timesteps, ours.timesteps)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift_follows_mu(kind):
    stock = FLOW(use_dynamic_shifting=True, time_shift_type=kind)
    ours = DSSScheduler.from_config(stock.config, solver="euler")
    sigmas = [1 - i / 6 for i in range(6)]
    assert torch.equal(run(stock, None, sigmas=sigmas, mu=0.8), run(ours, None, sigmas=sigmas, mu=0.8))
    with pytest.raises(ValueError, match="mu"):
        ours.set_timesteps(6)


SPACINGS = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1},
    {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"prediction_type": "sample"},
]


@pytest.mark.parametrize("options", [*SPACINGS, {"set_alpha_to_one": False, "steps_offset": 1}])
def test_euler_is_ddim(options):
    stock = DDIM(clip_sample=False, **options)
    ours = DSSScheduler.from_config(stock.config, solver="euler")
    for n in (1, 4, 10):
        close(run(stock, n), run(ours, n))


@pytest.mark.parametrize(
    "options",
    [
        *SPACINGS,
        {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True},
    ]
    + [{"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}],
)
def test_dpmpp_2m_is_stock(options):
    stock = DPM(**options)
    ours = DSSScheduler.from_config(stock.config, solver="dpmpp_2m")
    for n in (1, 4, 10, 16):
        close(run(stock, n), run(ours, n))


def close(a, b):
    # a random network is no denoiser: epsilon runs grow to hundreds, so the bound is on the scale of the result
    assert (a - b).abs().max() <= 1e-5 * max(1.0, a.abs().max())


@pytest.mark.parametrize("n", [5, 8, 10])
@pytest.mark.parametrize("name", ["sit-xl-2-256", "flowdcn-b-2-256", "dit-xl-2-256"])
def test_published_tables_equal_sample(name, n):
    net = network()
    if name.startswith("dit"):
        scheduler, schedule = DSSScheduler.from_config(DDIM(clip_sample=False).config, solver=name), VP()
        net = lambda x, t: network()(x, t) * 0.01 + x  # noqa: E731  near enough to a noise prediction to stay small
    else:
        scheduler = DSSScheduler.from_config(FLOW(shift=3.0).config, solver=name)
        schedule = Flow(3.0, convention="diffusers")  # which a learned table follows
    ours = run(scheduler, n, net=net)
    theirs = sample(net, noise(), f"{name}/{n}", schedule=schedule)
    assert (ours - theirs).abs().max() <= 1e-6 * max(1, theirs.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    scheduler = DSSScheduler.from_config(DDIM(clip_sample=False).config, solver="dit-xl-2-256")
    net = lambda x, t: (x + 0.01 * network(x.dtype)(x, t)).to(x.dtype)  # noqa: E731
    x = run(scheduler, 8, noise(dtype=dtype), net)
    exact = run(scheduler, 8, noise(dtype=dtype).double(), net)
    assert x.dtype == dtype and x.isfinite().all()
    assert (x.double() - exact).abs().max() <= (1e-10 if dtype == torch.float64 else 0.2)


# ---- choosing and refusing


def test_n_without_a_table_says_which_exist():
    scheduler = DSSScheduler.from_config(FLOW().config, solver="sit-xl-2-256")
    with pytest.raises(ValueError, match=r"no table for 11 steps.*5, 6, 7, 8, 9, 10"):
        scheduler.set_timesteps(11)
    both = DSSScheduler.from_config(FLOW().config, solver=["sit-xl-2-256", "ab2"])
    both.set_timesteps(11)
    assert both.solver.name.startswith("ab2")
    both.set_timesteps(10)
    assert both.solver.name == "sit-xl-2-256/10"


@pytest.mark.parametrize(
    "config, solver, message",
    [
        (FLOW().config, "dit-xl-2-256", "vp models"),
        (DDIM(clip_sample=False).config, "sit-xl-2-256", "flow models"),
        (DDIM(clip_sample=False, beta_schedule="scaled_linear").config, "dit-xl-2-256", "strict=False"),
        (FLOW().config, "sit-xl-2-256/11", "there are"),
        (FLOW().config, "nonsense", "hand-made: euler"),
        (FLOW().config, 3, "give a Solver"),
        (FLOW().config, ["sit-xl-2-256", "flowdcn-b-2-256/8"], "two tables for 8"),
        (DPM(thresholding=True).config, "euler", "thresholding"),
        (diffusers.EDMEulerScheduler().config, "euler", "neither a flow"),
    ],
)
def test_refusals(config, solver, message):
    with pytest.raises(ValueError, match=message):
        DSSScheduler.from_config(config, solver=solver)


def test_not_strict_goes_on():
    config = DDIM(clip_sample=False, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).config
    scheduler = DSSScheduler.from_config(config, solver="dit-xl-2-256", strict=False)
    scheduler.set_timesteps(5)
    assert scheduler.sigmas[0] == pytest.approx(14.6146, rel=1e-4)  # Stable Diffusion's own, not DiT's 157
    with pytest.raises(ValueError, match="vp models"):  # velocities are no x0, strict or not
        DSSScheduler.from_config(FLOW().config, solver="dit-xl-2-256", strict=False)


def test_clip_sample_is_named():
    with pytest.warns(UserWarning, match="clip_sample"):
        DSSScheduler.from_config(DDIM(clip_sample=True).config)


def shifted(shift, sigma):
    return shift * sigma / (1 + (shift - 1) * sigma)


@pytest.mark.parametrize("own", [1.0, 3.0])
def test_a_searched_table_follows_the_shift_from_that_of_its_search(own):
    """Its timesteps stay, and so its sigmas are those that the pipeline's shift makes of them; its rows move."""
    plain = replace(find_solver("sit-xl-2-256/5"), schedule=Flow(shift=own))
    scheduler = DSSScheduler.from_config(FLOW(shift=7.0).config, solver=plain)
    scheduler.set_timesteps(5)
    u = torch.tensor(plain.timesteps)
    torch.testing.assert_close(scheduler.sigmas, shifted(7, 1 - u))
    moved = plain.moved(7 / own, Flow(7.0))
    assert scheduler.solver.coeffs == moved.coeffs != plain.coeffs
    same = DSSScheduler.from_config(FLOW(shift=own).config, solver=plain)
    same.set_timesteps(5)
    assert same.solver == plain
    unsaid = DSSScheduler(solver=plain)  # a config that says no shift
    unsaid.set_timesteps(5)
    torch.testing.assert_close(unsaid.sigmas, shifted(own, 1 - u))


def test_one_table_serves_every_resolution_of_a_pipeline():
    """FLUX at 512, 1,024 and 2,048 pixels: mu grows with the tokens, and one file makes three grids."""
    table = find_solver("general/8")
    scheduler = DSSScheduler.from_config(FLOW(use_dynamic_shifting=True).config, solver=table)
    u, grids = torch.tensor(table.timesteps), []
    for tokens in (1024, 4096, 16384):
        mu = math.log(Flow.dynamic(tokens).shift)
        scheduler.set_timesteps(8, mu=mu)
        torch.testing.assert_close(scheduler.sigmas, shifted(math.exp(mu), 1 - u))
        assert scheduler.solver.coeffs == table.moved(Flow.dynamic(tokens).shift, scheduler.solver.schedule).coeffs
        grids.append(scheduler.sigmas)
    assert bool((grids[0][1:-1] < grids[1][1:-1]).all() and (grids[1][1:-1] < grids[2][1:-1]).all())
    scheduler.set_timesteps(8)  # a pipeline that says no mu: the table as it was searched
    torch.testing.assert_close(scheduler.sigmas, 1 - u)


def test_a_flow_grid_brings_its_sigmas_and_takes_the_pipelines_times():
    grid = Grid.flow([1.0, 0.7, 0.3, 0.0], [1.0, 0.7, 0.3], convention="paper")
    table = handmade("ab2", None, grid, timesteps=grid.timesteps)
    scheduler = DSSScheduler.from_config(FLOW(shift=7.0).config, solver=table)
    scheduler.set_timesteps(3)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.7, 0.3, 0.0]))
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000.0, 700, 300]))
    torch.testing.assert_close(run(scheduler, 3), sample(network(), noise(), table, schedule=scheduler.schedule))


def test_a_vp_table_keeps_its_ends_and_takes_the_pipelines_interface():
    table = handmade("ab2", 4, VP(t_start=0.99, t_end=0.01))
    config = DDIM(clip_sample=False, prediction_type="v_prediction").config
    scheduler = DSSScheduler.from_config(config, solver=table)
    scheduler.set_timesteps(4)
    assert scheduler.schedule == VP(prediction_type="v_prediction", t_start=0.99, t_end=0.01)
    assert scheduler.timesteps[0] == 990


@pytest.mark.parametrize(
    "options",
    [{"beta_schedule": "scaled_linear"}, {"rescale_betas_zero_snr": True}, {"trained_betas": [0.0001, 0.0001, 0.98]}],
)
def test_refusals_name_the_first_scalar_that_differs(options):
    stock = DDIM(clip_sample=False, num_train_timesteps=3 if "trained_betas" in options else 1000, **options)
    here = max(float(stock.alphas_cumprod[-1]) ** 0.5, 2.0**-12)
    with pytest.raises(ValueError, match=f"alpha at u = 0 is 0.0066376 there and {here:.6g} here"):
        DSSScheduler.from_config(stock.config, solver="dit-xl-2-256")


@pytest.mark.parametrize("stock", [DDIM, DPM, diffusers.EulerDiscreteScheduler])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
def test_a_table_searched_at_zero_terminal_snr_runs_where_it_was_searched(stock, betas, tmp_path):
    """alpha^2 is 0 in the pipeline and 2^-24 in the schedule, at its last training steps even in several places."""
    options = {"beta_schedule": betas, "prediction_type": "v_prediction"}
    config = {**stock(rescale_betas_zero_snr=True, **options).config, "clip_sample": False}
    schedule = model_schedule(adopt(config))
    assert isinstance(schedule, DiscreteVP) and min(schedule.alphas_cumprod) == 2.0**-24
    table = handmade("ab2", 6, schedule)
    assert Solver.from_dict(table.to_dict()) == table
    scheduler = DSSScheduler.from_config(config, solver=table)
    scheduler.set_timesteps(6)
    assert scheduler.schedule == schedule
    torch.testing.assert_close(run(scheduler, 6), sample(network(), noise(), table))
    scheduler.save_pretrained(tmp_path)
    assert torch.equal(run(scheduler, 6), run(DSSScheduler.from_pretrained(tmp_path), 6))
    with pytest.raises(ValueError, match="alpha at u = 0 is 0.000244141 there"):
        DSSScheduler.from_config(stock(**options).config, solver=table, clip_sample=False)


def test_custom_grids_are_honoured_or_refused():
    learned = DSSScheduler.from_config(FLOW(shift=3.0).config, solver="sit-xl-2-256")
    default = [1 - i / 5 for i in range(5)]
    learned.set_timesteps(sigmas=default, mu=1.15)
    own = learned.sigmas.clone()
    learned.set_timesteps(sigmas=own[:-1].tolist())
    assert torch.equal(own, learned.sigmas)
    for custom in ({"sigmas": [1.0, 0.9, 0.5, 0.2, 0.1]}, {"timesteps": [1000, 900, 500, 200, 100]}):
        with pytest.raises(ValueError, match="searched together with its own"):
            learned.set_timesteps(**custom)
    with pytest.raises(ValueError, match="5 custom times"):
        learned.set_timesteps(6, sigmas=default)

    made = DSSScheduler.from_config(FLOW(shift=3.0).config, solver="dpmpp_2m")
    made.set_timesteps(sigmas=[1.0, 0.9, 0.5, 0.2, 0.1])
    u = torch.tensor([1.0, 0.9, 0.5, 0.2, 0.1, 0.0])
    torch.testing.assert_close(made.sigmas, 3 * u / (1 + 2 * u))  # under the pipeline's shift, as stock does
    stock = FLOW(shift=3.0)  # which shifts given timesteps up to release 0.40, and leaves them alone from 0.41 on
    for scheduler in (stock, made):
        scheduler.set_timesteps(timesteps=[1000, 900, 500])
    torch.testing.assert_close(made.timesteps, stock.timesteps)
    made.set_timesteps(sigmas=default)  # the pipelines' unasked grid gets the stock shift
    assert made.sigmas[1] == pytest.approx(3 * 0.8 / (1 + 2 * 0.8))
    with pytest.raises(ValueError, match="must fall"):
        made.set_timesteps(sigmas=[1.0, 0.5, 0.6])

    stock = DPM()
    vp = DSSScheduler.from_config(stock.config, solver="dpmpp_2m")
    times = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    close(run(stock, None, timesteps=times), run(vp, None, timesteps=times))
    vp.set_timesteps(sigmas=[14.0, 5.0, 1.0, 0.3])
    torch.testing.assert_close(vp.sigmas, torch.tensor([14.0, 5.0, 1.0, 0.3, 0.0]))
    assert vp.timesteps[0] > vp.timesteps[1] > 400


def test_spacing_of_our_own():
    scheduler = DSSScheduler.from_config(DDIM(clip_sample=False).config, solver="dpmpp_2m@lambda")
    scheduler.set_timesteps(7)
    assert scheduler.solver.name == "dpmpp_2m/7@lambda"
    steps = (scheduler.sigmas[:-1].log().diff())[1:]
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=1e-3, atol=1e-3)


# ---- runs


def test_an_aborted_run_leaks_nothing_and_batches_may_change():
    scheduler = DSSScheduler.from_config(FLOW().config, solver="sit-xl-2-256")
    clean = run(scheduler, 8)
    scheduler.set_timesteps(8)
    for t in scheduler.timesteps[:5]:
        scheduler.step(torch.full((7, 16), torch.nan), t, noise(7))
    assert torch.equal(clean, run(scheduler, 8))
    x, net = noise(), network()
    for t in scheduler.timesteps[:3]:  # broken off, then started again without set_timesteps
        scheduler.step(torch.full((3, 16), torch.nan), t, x)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x).prev_sample
    assert torch.equal(clean, x)
    assert run(scheduler, 8, noise(1)).shape == (1, 16)


def test_a_sample_that_changes_shape_mid_run_is_named():
    scheduler = DSSScheduler.from_config(FLOW().config, solver="ab2")
    scheduler.set_timesteps(4)
    scheduler.step(noise(), scheduler.timesteps[0], noise())
    with pytest.raises(ValueError):
        scheduler.step(noise(2), scheduler.timesteps[1], noise(2))
    with pytest.raises(ValueError, match="model_output has shape"):
        scheduler.step(noise(2), scheduler.timesteps[0], noise(3))
    with pytest.raises(ValueError, match="set_timesteps"):
        DSSScheduler.from_config(FLOW().config).step(noise(), 1.0, noise())


def test_two_instances_and_copies_do_not_share_history():
    first = DSSScheduler.from_config(FLOW().config, solver="sit-xl-2-256")
    first.set_timesteps(6)
    second, net = copy.deepcopy(first), network()
    a, b = noise(), noise() * 0.5
    for t, s in zip(first.timesteps, second.timesteps, strict=True):
        a, b = first.step(net(a, t), t, a).prev_sample, second.step(net(b, s), s, b).prev_sample
    assert torch.equal(a, run(first, 6)) and torch.equal(b, run(second, 6, noise() * 0.5))


def test_steps_are_found_without_reading_the_device():
    scheduler = DSSScheduler.from_config(DDIM(clip_sample=False).config, solver="dit-xl-2-256")
    scheduler.set_timesteps(6)
    x = noise()
    reads = []
    scheduler.index_for_timestep = lambda *a: reads.append(a) or 0
    for t in scheduler.timesteps:
        x = scheduler.step(x, t[None].expand(3)[0], x).prev_sample
    assert not reads
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(0)
    for t in scheduler.timesteps.to("meta"):  # a copy on a device, in the order that was declared
        x = scheduler.step(x, t, x).prev_sample
    assert not reads


def test_no_step_syncs():
    """On the meta device a value cannot be read at all, so a step that runs there reads none."""
    scheduler = DSSScheduler.from_config(FLOW().config, solver="sit-xl-2-256")
    scheduler.set_timesteps(5, device="meta")
    scheduler.set_begin_index(0)
    x = torch.empty(2, 16, device="meta")
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x, return_dict=False)[0]
    assert x.shape == (2, 16)


def test_one_launch_a_step(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls: list = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls.append(str(func))
            return func(*args, **(kwargs or {}))

    for learned_variance in (False, True):
        scheduler = DSSScheduler.from_config(FLOW().config, solver="sit-xl-2-256")
        scheduler.set_timesteps(5)
        x = torch.randn(2, 4, 8, 8)
        output = torch.randn(2, 8 if learned_variance else 4, 8, 8)
        x = scheduler.step(output, scheduler.timesteps[0], x).prev_sample
        t = scheduler.timesteps[1]
        with Count() as count:
            count.calls.clear()
            scheduler.step(output, t, x)
        launches = [c for c in count.calls if not any(v in c for v in ("empty", "slice", "view", "detach"))]
        assert launches == ["dss_fast.multistep_step_.default"], launches


@pytest.mark.parametrize("name", ["euler", "ab3", "sit-xl-2-256"])
def test_starting_part_way(name):
    """Rows give what they owe to missing predictions to the first one there is."""
    scheduler = DSSScheduler.from_config(FLOW().config, solver=name)
    net, k, n = network(), 3, 8
    x = run(scheduler, n, start=k)
    u, c = torch.tensor(scheduler.solver.timesteps), torch.tensor(scheduler.solver.coeffs)
    y, reference = [], noise()
    for i in range(k, n):
        y.append(-net(reference, scheduler.timesteps[i]))
        row = torch.cat([c[i, : k + 1].sum()[None], c[i, k + 1 : i + 1]])
        b = scheduler.sigmas[i] - scheduler.sigmas[i + 1]
        reference = reference + b * sum(w * v for w, v in zip(row, y, strict=True))
    assert len(u) == n + 1
    torch.testing.assert_close(x, reference, rtol=1e-5, atol=1e-5)
    scheduler.set_timesteps(n)
    scheduler.set_begin_index(k)
    x = noise()
    for t in scheduler.timesteps[k:].clone():
        x = scheduler.step(net(x, t), t, x).prev_sample
    torch.testing.assert_close(x, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["flow", "vp"])
def test_starting_part_way_with_a_weight_on_the_noise(family):
    """With the exact network of a single point, the implied noise is the true one."""
    name, schedule = ("sit-xl-2-256/6", Flow(convention="diffusers")) if family == "flow" else ("dit-xl-2-256/6", VP())
    plain = find_solver(name)
    weighted = replace(plain, noise_coeffs=(0.01, -0.02, 0.03, 0.01, 0.02, -0.01))
    config = (FLOW() if family == "flow" else DDIM(clip_sample=False)).config
    scheduler = DSSScheduler.from_config(config, solver=weighted)
    scheduler.set_timesteps(6)
    data, start = torch.full((3, 16), 0.3), noise()
    alpha, sigma = schedule.alpha_sigma(torch.tensor(plain.timesteps, dtype=torch.float64))
    x = (alpha[2] * data + sigma[2] * start).float()
    for i in range(2, 6):
        implied = (x - alpha[i].float() * data) / sigma[i].float()
        t = scheduler.timesteps[i]
        x = scheduler.step(implied - data if family == "flow" else implied, t, x).prev_sample
        if i == 2:
            torch.testing.assert_close(scheduler._history[:, -1], start, rtol=1e-3, atol=1e-3)
    assert x.isfinite().all()


def test_previews():
    scheduler = DSSScheduler.from_config(FLOW().config, solver="ab2")
    scheduler.set_timesteps(4)
    x, net = noise(), network()
    with pytest.raises(ValueError, match="needs a step"):
        scheduler.predict_x0(x)
    for i, t in enumerate(scheduler.timesteps):
        v = net(x, t)
        x = scheduler.step(v, t, x).prev_sample
        torch.testing.assert_close(scheduler.predict_x0(x), x - scheduler.sigmas[i + 1] * v)


def test_noise_levels():
    flow = DSSScheduler.from_config(FLOW(shift=3.0).config, solver="sit-xl-2-256")
    x0, eps = torch.zeros(2, 16), torch.ones(2, 16)
    torch.testing.assert_close(flow.scale_noise(x0, torch.tensor([250.0, 900.0]), eps)[:, 0], torch.tensor([0.25, 0.9]))
    flow.set_timesteps(8)
    assert flow.scale_noise(x0, flow.timesteps[3:4].repeat(2), eps)[0, 0] == flow.sigmas[3]
    flow.set_begin_index(2)
    assert flow.scale_noise(x0, torch.tensor([1.0]), eps)[0, 0] == flow.sigmas[2]
    flow.step(x0, flow.timesteps[2], x0)
    assert flow.scale_noise(x0, torch.tensor([1.0]), eps)[0, 0] == flow.sigmas[3]
    stock = DDIM(clip_sample=False)
    vp = DSSScheduler.from_config(stock.config, solver="dit-xl-2-256")
    t = torch.tensor([10, 700])
    torch.testing.assert_close(vp.add_noise(x0, eps, t), stock.add_noise(x0, eps, t))
