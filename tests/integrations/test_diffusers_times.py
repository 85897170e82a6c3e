"""Times that programs give to a step in their own way, and sigmas and timesteps of their own on a scheduler."""

import copy
import warnings

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from dss_fast.integrations.diffusers import DSSScheduler  # noqa: E402
from helpers.diffusers_runs import network, noise, run  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
FLOW, DDIM = diffusers.FlowMatchEulerDiscreteScheduler, diffusers.DDIMScheduler
DPM, EULER = diffusers.DPMSolverMultistepScheduler, diffusers.EulerDiscreteScheduler
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def close(a, b):
    assert (a - b).abs().max() <= 1e-5 * max(1.0, a.abs().max()), float((a - b).abs().max() / a.abs().max())


def ours(stock, solver="euler", **told):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DSSScheduler.from_config(stock, solver=solver, **told)


# ---- the time of a step


def walked(scheduler, order, given):
    """Steps in an order of their own, also several states at one step, on one scheduler."""
    scheduler.set_timesteps(10)
    x, net = noise(), network()
    for i in order:
        t = scheduler.timesteps[i]
        x = scheduler.step(net(x, t), given(t), x, return_dict=False)[0]
    return x


def in_turns(scheduler, given):
    scheduler.set_timesteps(10)
    states, net = [noise()[:1], noise()[1:]], network()
    for t in scheduler.timesteps:
        states = [scheduler.step(net(x, t), given(t), x, return_dict=False)[0] for x in states]
    return torch.cat(states)


GIVEN = {"element": lambda t: t, "number": lambda t: t.item(), "int": int, "copy": lambda t: t.clone(),
         "batch": lambda t: t.clone().expand(3), "whole": lambda t: t.long()}  # fmt: skip
ORDERS = {
    "skipping": (0, 2, 4, 6, 8, 9),
    "back": (0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9),
    "twice": sorted([*range(10)] * 2),
}


@pytest.mark.parametrize("given", GIVEN)
def test_a_time_means_its_step_however_it_is_given(given):
    stock = DDIM(clip_sample=False, **SD)
    for order in ORDERS.values():
        close(walked(stock, order, lambda t: t), walked(ours(stock), order, GIVEN[given]))
    close(in_turns(stock, lambda t: t), in_turns(ours(stock), GIVEN[given]))


def test_a_time_of_no_step_is_refused_and_a_declared_order_counts():
    scheduler = ours(FLOW(shift=3.0))
    scheduler.set_timesteps(4)
    for wrong in (0.5, 2000, torch.tensor(333.0)):
        with pytest.raises(ValueError, match="none of this run's"):
            scheduler.step(noise(), wrong, noise())
    with pytest.raises(ValueError, match="one time"):
        scheduler.step(noise(), torch.tensor([1000.0, 900.0, 750.0]), noise())
    scheduler.set_begin_index(0)  # as pipelines do that then count, and whose times may be of another unit
    x = noise()
    for t in scheduler.timesteps:
        x = scheduler.step(network()(x, t), float(t) / 1000, x).prev_sample
    assert torch.equal(x, run(scheduler, 4))


def test_equal_times_of_a_run_follow_one_another():
    """Integer times of a Karras spacing repeat at its end."""
    stock = DPM(**SD, use_karras_sigmas=True)
    scheduler = ours(stock, "dpmpp_2m")
    stock.set_timesteps(60)
    assert len(set(stock.timesteps.tolist())) < 60
    scheduler.set_timesteps(60)
    x, net = noise(), network()
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(net(x, t), t, x).prev_sample
    close(run(stock, 60), x)


def test_states_that_take_turns_on_a_multistep_table_are_named():
    scheduler = ours(FLOW(), "ab2")
    scheduler.set_timesteps(4)
    scheduler.step(noise(), scheduler.timesteps[0], noise())
    with pytest.warns(UserWarning, match="images take turns"):
        scheduler.step(noise(), scheduler.timesteps[0], noise())
    with pytest.warns(UserWarning, match="step 3 after step 0"):
        scheduler.step(noise(), scheduler.timesteps[3], noise())
    with warnings.catch_warnings():  # a run that was broken off and starts again is none
        warnings.simplefilter("error")
        for i in (0, 1, 2, 0, 1):
            scheduler.step(noise(), scheduler.timesteps[i], noise())
        copies = [copy.deepcopy(scheduler) for _ in range(2)]
        for one in copies:
            one.step(noise(), one.timesteps[2], noise())


# ---- noise of many steps


def test_noise_of_all_steps_at_once_after_the_index_is_set():
    scheduler = ours(FLOW(shift=3.0))
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    x0, eps = torch.zeros(5, 16), torch.ones(5, 16)
    torch.testing.assert_close(scheduler.scale_noise(x0, scheduler.timesteps, eps)[:, 0], scheduler.sigmas[:-1])
    assert scheduler.scale_noise(x0[:1], torch.tensor([1.0]), eps[:1])[0, 0] == scheduler.sigmas[2]
    assert scheduler.scale_noise(x0, torch.full((5,), 1.0), eps)[0, 0] == scheduler.sigmas[2]


# ---- times and sigmas that a program puts in place


def edited(scheduler, change, n=4, at=0):
    scheduler.set_timesteps(n)
    x, net = noise() * getattr(scheduler, "init_noise_sigma", 1.0), network()
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
    i = 0
    while i < len(scheduler.timesteps):
        if i == at:
            change(scheduler)
        t = scheduler.timesteps[i]
        x = scheduler.step(net(scaled(x, t), t), t, x, return_dict=False)[0]
        i += 1
    return x


def own_sigmas(s):
    s.sigmas = torch.tensor([1.0, 0.95, 0.8, 0.4, 0.0])
    s.timesteps = s.sigmas[:-1] * 1000


def more_sigmas(s):
    s.sigmas = torch.linspace(1, 0, 8)
    s.timesteps = s.sigmas[:-1] * 1000


def stops_early(s):
    s.sigmas[-1] = s.sigmas[-2] / 2


def stands_still(s):
    s.sigmas[-1] = s.sigmas[-2]


def other_times(s):
    s.timesteps = s.timesteps + 1


FLOW_EDITS = [own_sigmas, more_sigmas, stops_early, stands_still, other_times]


@pytest.mark.parametrize("change", FLOW_EDITS)
def test_flows_step_along_a_programs_own_sigmas(change):
    stock = FLOW(shift=3.0)
    assert torch.equal(edited(stock, change), edited(ours(stock), change))
    told = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    if change is not more_sigmas:  # for whose number the stock has no history
        close(edited(DPM(**told), change), edited(ours(DPM(**told), "dpmpp_2m"), change))


def test_an_edit_in_the_middle_of_a_run_keeps_the_history():
    told = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    close(edited(DPM(**told), stops_early, 6, at=3), edited(ours(DPM(**told), "dpmpp_2m"), stops_early, 6, at=3))


def test_vp_models_step_along_a_programs_own_times():
    def times(s):
        s.timesteps = torch.tensor([999, 749, 499, 249])

    stock = DDIM(clip_sample=False)
    close(edited(stock, times), edited(ours(stock), times))

    def sigmas(s):
        s.sigmas = torch.cat([s.sigmas[:1], torch.tensor([5.0, 1.0, 0.3, 0.0])])

    def first(s):
        s.sigmas[0] = 14.0

    stock = EULER(**SD)
    with pytest.raises(ValueError, match="init_noise_sigma"):  # sigma times the noise is the stock's state, not ours
        edited(ours(stock), first)
    close(edited(stock, sigmas), edited(ours(stock), sigmas))
    close(edited(DPM(**SD), sigmas), edited(ours(DPM(**SD), "dpmpp_2m"), sigmas))


def test_mochis_rising_sigmas_are_taken_too():
    def change(s):
        s.sigmas = torch.tensor([0.0, 0.1, 0.4, 0.8, 1.0])
        s.timesteps = s.sigmas[:-1] * 1000

    stock = FLOW(invert_sigmas=True)
    assert torch.equal(edited(stock, change), edited(ours(stock), change))


def test_a_learned_table_refuses_other_sigmas_and_takes_its_own_again():
    scheduler = ours(FLOW(), "sit-xl-2-256")
    with pytest.raises(ValueError, match="scheduler.sigmas has been assigned.*searched together"):
        edited(scheduler, stops_early, 5)
    with pytest.raises(ValueError, match="scheduler.timesteps has been assigned"):
        edited(scheduler, other_times, 5)

    def the_same(s):
        s.sigmas, s.timesteps = s.sigmas.clone(), s.timesteps.clone()

    assert torch.equal(edited(scheduler, the_same, 5), run(scheduler, 5))


def test_lists_that_do_not_fit_say_what_is_needed():
    def change(s):
        s.sigmas = torch.tensor([1.0, 0.5, 0.0])

    with pytest.raises(ValueError, match="N timesteps and N \\+ 1 sigmas"):
        edited(ours(FLOW()), change)


# ---- grids that are hard to read


def test_grids_that_used_to_be_unclear_have_the_stock_latents():
    stock = EULER(**SD, interpolation_type="log_linear")
    mine = ours(stock)
    close(edited(stock, lambda s: None, 8), edited(mine, lambda s: None, 8))
    for sigmas in ([1.0], [1.0, 0.5, 0.0], [0.7, 0.2]):
        stock = FLOW(shift=3.0)
        close(run(stock, None, sigmas=sigmas), run(ours(stock), None, sigmas=sigmas))
    still = {"beta_schedule": "squaredcos_cap_v2", "use_beta_sigmas": True, "final_sigmas_type": "sigma_min"}
    assert run(ours(DPM(**still, solver_order=3), "dpmpp_3m"), 20, net=lambda x, t: 0 * x).isfinite().all()


def test_cosmos_sigmas_to_80():
    """Its pipelines write their noise levels into a flow's config, and hand over (x - x0) / sigma."""
    stock = FLOW(use_karras_sigmas=True)
    stock.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type="sigma_min")
    given = torch.linspace(0, 1, 8, dtype=torch.float64)

    def cosmos(scheduler, net):
        scheduler.set_timesteps(sigmas=given)
        scheduler.sigmas[-1] = scheduler.sigmas[-2]
        x = noise() * 80
        for i, t in enumerate(scheduler.timesteps):
            sigma = scheduler.sigmas[i]
            x = scheduler.step((x - net(x / (1 + sigma), sigma)) / sigma, t, x, return_dict=False)[0]
        return x

    close(cosmos(stock, network()), cosmos(ours(stock), network()))
    assert cosmos(ours(stock, "dpmpp_2m"), network()).isfinite().all()
    with pytest.raises(ValueError, match="sigma_max=80"):
        cosmos(ours(stock, "sit-xl-2-256"), network())


def test_align_your_steps_lists_end_with_a_zero_of_their_own():
    sigmas = diffusers.schedulers.AysSchedules["StableDiffusionXLSigmas"]
    stock = EULER(**SD, use_karras_sigmas=False)
    mine = ours(stock)
    for scheduler in (stock, mine):
        scheduler.set_timesteps(sigmas=sigmas)
    assert len(mine.timesteps) == len(sigmas) - 1 == mine.num_inference_steps
    torch.testing.assert_close(mine.sigmas, stock.sigmas)
    torch.testing.assert_close(mine.timesteps, stock.timesteps.float(), rtol=1e-4, atol=1e-2)
    mine.set_timesteps(len(sigmas) - 1, sigmas=sigmas)
    times = diffusers.schedulers.AysSchedules["StableDiffusionXLTimesteps"]
    for scheduler in (stock, mine):
        scheduler.set_timesteps(timesteps=times)
    torch.testing.assert_close(mine.sigmas, stock.sigmas)


def test_epsilon_at_zero_terminal_snr_is_refused():
    for kind in (DDIM, DPM, EULER):
        stock = kind(rescale_betas_zero_snr=True, **({"timestep_spacing": "trailing"} if kind is DDIM else {}))
        with pytest.raises(ValueError, match="rescale_betas_zero_snr=True with prediction_type='epsilon'"):
            ours(stock, "dpmpp_2m" if kind is DPM else "euler", clip_sample=False).set_timesteps(5)
    below = DDIM(rescale_betas_zero_snr=True, timestep_spacing="leading", clip_sample=False)
    close(run(below, 5), run(ours(below), 5))


def test_a_folder_that_is_called_like_a_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "euler").mkdir()
    scheduler = ours(FLOW())
    scheduler.set_timesteps(4)
    assert scheduler.solver.name == "euler/4"


@pytest.mark.parametrize("given", [lambda t: t.to(torch.bfloat16), lambda t: t.half(), int, lambda t: t.long()])
@pytest.mark.parametrize("n", [50, 200, 500])
def test_a_time_of_less_precision_means_the_next_of_those_it_may_be(n, given):
    """bfloat16 holds every fourth number from 512 on, and times of 500 steps under a shift lie .7 apart."""
    scheduler = ours(FLOW(shift=3.0))
    wanted = run(scheduler, n)
    scheduler.set_timesteps(n)
    x, net = noise(), network()
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), given(t), x).prev_sample
    assert torch.equal(x, wanted)


def test_an_index_that_a_program_assigns_goes_before_the_time():
    """As in stock schedulers, whose step reads _step_index."""
    stock, net = FLOW(shift=3.0), network()
    outs = []
    for scheduler in (stock, ours(stock)):
        scheduler.set_timesteps(6)
        x = noise()
        t = scheduler.timesteps[0]
        x = scheduler.step(net(x, t), t, x).prev_sample
        scheduler._step_index = 4
        outs.append(scheduler.step(net(x, t), t, x).prev_sample)
    close(*outs)
    scheduler._step_index = 9
    with pytest.raises(ValueError, match="_step_index = 9: this run has steps 0 to 5"):
        scheduler.step(x, t, x)


@pytest.mark.parametrize("index", [-1, 6, 9])
def test_a_begin_outside_the_run_is_refused(index):
    scheduler = ours(FLOW(shift=3.0))
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=f"begin_index={index}: this run has steps 0 to 4"):
        scheduler.set_begin_index(index)
    scheduler.set_begin_index(5)  # of a strength that leaves no step, which the pipelines then say


def test_times_and_numbers_of_steps_that_cannot_be():
    flow, vp = ours(FLOW(shift=3.0)), DSSScheduler.from_config(DPM(**SD).config, solver="dpmpp_2m")
    for scheduler in (flow, vp):
        for times, told in (([1500.0, 800.0, 100.0], "1500"), ([900.0, 400.0, -20.0], "-20")):
            with pytest.raises(ValueError, match=f"timesteps hold {told}: the model's times go from 0 to 1000"):
                scheduler.set_timesteps(timesteps=times)
        for n in (5.7, True, "5"):
            with pytest.raises(ValueError, match="num_inference_steps=.*whole number"):
                scheduler.set_timesteps(n)
        x = noise(1)
        for t in (1200, -1):
            with pytest.raises(ValueError, match="model's times go from 0 to 1000"):
                scheduler.add_noise(x, x, torch.tensor([t]))
        scheduler.set_timesteps(5)
        with pytest.raises(ValueError, match="timestep nan is none of this run's"):
            scheduler.step(x, float("nan"), x)
    for shift in (float("inf"), float("nan"), -1.0):
        with pytest.raises(ValueError, match="must be above 0, and finite"):
            flow.set_shift(shift)
    vp.set_timesteps(timesteps=torch.tensor([901, 333, 4]).numpy())


def test_noise_of_a_training_time_beside_one_of_the_run_is_its_own():
    """A run's time that is one training step away is another level."""
    stock = DDIM(clip_sample=False, **SD)
    mine, x = ours(stock), noise(1)
    for scheduler in (stock, mine):
        scheduler.set_timesteps(5)
    for t in (stock.timesteps[2:3] + 1, stock.timesteps[2:3], torch.tensor([333])):
        torch.testing.assert_close(mine.add_noise(x, 2 * x, t), stock.add_noise(x, 2 * x, t), rtol=1e-6, atol=1e-7)


def test_a_scheduler_that_was_made_without_the_pipelines_config_says_so_in_a_flow_pipeline():
    with pytest.raises(ValueError, match="flow pipeline's, and this scheduler is of a VP model.*from_config"):
        DSSScheduler(solver="euler").set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
