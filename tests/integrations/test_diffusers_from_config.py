"""from_config beside diffusers' own: each scheduler class as the config it starts from, as a user's script has it."""

import inspect
import warnings

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
from dss_fast import sample  # noqa: E402
from dss_fast.integrations.diffusers import DSSScheduler  # noqa: E402
from dss_fast.integrations.diffusers.kinds import OTHER, REFUSED  # noqa: E402
from helpers.diffusers_classes import every_class  # noqa: E402
from helpers.diffusers_runs import network, noise, run  # noqa: E402

DPM, UNIPC, DEIS = (getattr(diffusers, f"{n}MultistepScheduler") for n in ("DPMSolver", "UniPC", "DEIS"))
DDIM, EULER = diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SIGMA_SPACE = (
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "HeunDiscrete",
    "KDPM2Discrete",
    "KDPM2AncestralDiscrete",
    "LMSDiscrete",
)


def made(name, **options):
    """A scheduler of a class, with those options that it knows."""
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    needed = [k for k, p in known.items() if p.default is p.empty and k not in ("self", "kwargs")]
    if needed:
        pytest.skip(f"{name} needs {needed}, and describes no flow or VP model")
    try:
        return kind(**{key: value for key, value in options.items() if key in known})
    except ValueError as error:
        pytest.skip(str(error))


def ours(config, solver, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return DSSScheduler.from_config(config, solver=solver, strict=False, **options)


NEITHER = {*REFUSED, *OTHER}  # no VP model at discrete times, and no flow between 1 and 0


@pytest.mark.parametrize("options", [{}, SD, {"timestep_spacing": "trailing"}], ids=["defaults", "sd", "trailing"])
@pytest.mark.parametrize("name", list(every_class()))
def test_every_class_has_the_grids_of_its_own_from_config(name, options):
    stock = made(name, **options)
    named = {**stock.config, "_class_name": name}  # as of a pipeline that was loaded
    if name in NEITHER:
        for config in (named, stock, stock.config):
            with pytest.raises(ValueError, match="(neither a flow|one path|give the scheduler itself)"):
                DSSScheduler.from_config(config, solver="euler")
        with pytest.raises(ValueError, match=name):
            DSSScheduler.from_config(stock, solver="euler")
        return
    if ours(named, "euler").config.family == "flow":
        pairs = [("euler", FLOW, {}), ("dpmpp_2m", DPM, FLOW_SIGMAS), ("unip2", UNIPC, FLOW_SIGMAS)]
    else:
        euler = EULER if name.removesuffix("Scheduler") in SIGMA_SPACE else DDIM
        euler = diffusers.CogVideoXDDIMScheduler if name.startswith("CogVideoX") else euler
        pairs = [("euler", euler, {}), ("dpmpp_2m", DPM, {}), ("unip2", UNIPC, {}), ("deis", DEIS, {})]
    for solver, kind, told in pairs:
        theirs = kind.from_config(named, **told)
        # of one made in the script, which does not name its class; FlowMatchHeun's could be FlowMapEuler's
        live = [] if options else [stock if name == "FlowMatchHeunDiscreteScheduler" else stock.config]
        for config in (named, *live):
            mine = ours(config, solver, **told)
            for n in (10, 6)[: 1 + len(live)]:
                mu = {"mu": 0.7} if mine.config.use_dynamic_shifting else {}
                theirs.set_timesteps(n, **mu)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    mine.set_timesteps(n, **mu)
                assert torch.equal(theirs.timesteps.float(), mine.timesteps), (solver, n)
                # the noise that snr_shift_scale moves is known to CogVideoX's schedulers alone: there the model's
                if "DDIM" not in kind.__name__ and not name.startswith("CogVideoX"):
                    assert torch.equal(theirs.sigmas, mine.sigmas), (solver, n)


def close(a, b, bound=1e-5):
    # a random network is no denoiser: epsilon runs grow to hundreds, so the bound is on the scale of the result
    assert (a - b).abs().max() <= bound * max(1.0, a.abs().max()), float((a - b).abs().max() / a.abs().max())


def saved(scheduler, tmp_path):
    """The config as a pipeline's folder carries it: every value explicit."""
    scheduler.save_pretrained(tmp_path)
    return type(scheduler).load_config(tmp_path)


SD15 = {  # stable-diffusion-v1-5/scheduler/scheduler_config.json
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip


@pytest.mark.parametrize("name", ["PNDMScheduler", "DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("n", [6, 10, 20])
def test_published_configs_run_as_stock_dpm_runs_them(name, n):
    """Stable Diffusion 1.5's own config, and the same as DDIM's and DDPM's: a default spacing stays a default."""
    own = getattr(diffusers, name).from_config({**SD15, "_class_name": name})
    stock = DPM.from_config(own.config)
    mine = ours(own.config, "dpmpp_2m")
    close(run(stock, n), run(mine, n))
    back = DPM.from_config(mine.config)  # and a user who goes back to stock gets what stock would have given
    assert torch.equal(run(stock, n), run(back, n))
    again = DSSScheduler.from_config(mine.config)
    assert torch.equal(run(mine, n), run(again, n))


def test_a_saved_scheduler_walks_the_same_grid(tmp_path):
    mine = ours(SD15, "dpmpp_2m")
    mine.save_pretrained(tmp_path)
    assert torch.equal(run(mine, 10), run(DSSScheduler.from_pretrained(tmp_path), 10))
    ours(SD15, "dpmpp_2m", timestep_spacing="trailing").save_pretrained(tmp_path)
    close(run(DPM.from_config(SD15, timestep_spacing="trailing"), 10), run(DSSScheduler.from_pretrained(tmp_path), 10))


def test_settings_of_the_stock_are_taken_and_others_refused():
    for told in ({"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}, {"final_sigmas_type": "sigma_min"}):
        close(run(DPM.from_config(SD15, **told), 10), run(ours(SD15, "dpmpp_2m", **told), 10))
    with pytest.raises(ValueError, match="use_karass_sigmas=True: no scheduler"):
        ours(SD15, "dpmpp_2m", use_karass_sigmas=True)


@pytest.mark.parametrize("name", ["DEISMultistepScheduler", "SASolverScheduler", "UniPCMultistepScheduler"])
def test_saved_configs_of_other_multistep_solvers(name, tmp_path):
    config = saved(getattr(diffusers, name)(**SD), tmp_path)
    theirs = {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}  # what DPM++ refuses of DEIS and SASolver
    close(run(DPM.from_config(config, **theirs), 10), run(ours(config, "dpmpp_2m"), 10))


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("sigmas", [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {}])
def test_a_last_step_that_stands_still(sigmas, final):
    stock = DPM(**SD, final_sigmas_type=final, **sigmas)
    for n in (1, 6, 10, 20):
        close(run(stock, n), run(ours(stock.config, "dpmpp_2m"), n))
    stock = DDIM(clip_sample=False, set_alpha_to_one=False, **SD)  # at time 0 already: its last step goes nowhere
    for n in (1, 6, 10):
        close(run(stock, n), run(ours(stock.config, "euler"), n))


@pytest.mark.parametrize("told", [{}, {"lower_order_final": False}])
@pytest.mark.parametrize("n", [6, 10, 20])
def test_flow_configs_of_unipc_as_wan_has_them(n, told):
    config = {"_class_name": "UniPCMultistepScheduler", **FLOW_SIGMAS, "solver_order": 2, **told}
    for solver, kind in (("unip2", UNIPC), ("dpmpp_2m", DPM)):
        # unip2 is the predictor alone; unipc, below, has the corrector
        stock = kind.from_config(config, **({"disable_corrector": list(range(n))} if kind is UNIPC else {}))
        close(run(stock, n), run(ours(config, solver), n))
    for solver, order in (("unipc", 2), ("unipc3", 3))[: 1 if told else 2]:  # whose third order stock cannot end with
        close(run(UNIPC.from_config({**config, "solver_order": order}), n), run(ours(config, solver), n))
    mine = ours(config, "euler")
    mine.set_timesteps(n)
    stock = UNIPC.from_config(config)
    stock.set_timesteps(n)
    assert torch.equal(mine.sigmas, stock.sigmas) and torch.equal(mine.timesteps, stock.timesteps.float())


@pytest.mark.parametrize("told", [{}, {"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}], ids=str)
@pytest.mark.parametrize("n", [2, 6, 10, 20])
def test_unipc_is_the_stock_class_with_its_corrector(n, told):
    """As a pipeline that was loaded has it: UniPC(...) corrects after every step unless it is told not to."""
    for solver, order in (("unipc", 2), ("unipc3", 3)):
        stock = UNIPC(**SD, solver_order=order, **told)
        close(run(stock, n), run(ours(stock.config, solver), n))


def test_what_unipc_and_heun_cannot_do_is_said():
    config = UNIPC(**SD, disable_corrector=[0]).config
    for solver, words in (("unipc3", "corrects after every step, and unip3 after none"), ("unip2", "'unipc' and 'uni")):
        mine = DSSScheduler.from_config(config, solver=solver)
        with pytest.warns(UserWarning, match=rf"disable_corrector=\[0\].*not applied.*{words}"):
            mine.set_timesteps(6)
    net = network()
    for config in (UNIPC(**SD).config, FLOW(shift=3.0).config):
        with pytest.raises(ValueError, match="'heun' takes two calls a step.*'heun@uniform'"):
            ours(config, "heun").set_timesteps(9)
        mine = ours(config, "heun@shift2")  # the calls are the pipeline's steps
        with pytest.raises(ValueError, match="num_steps=10.*odd.*9 or 11"):
            mine.set_timesteps(10)
        x = run(mine, 9, net=net)
        close(x, sample(lambda x, t: net(x, t[0]), noise(), mine.solver, schedule=mine.schedule))


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_euler_of_sigma_space_is_the_stock_euler(spacing):
    """SDXL's own scheduler: the first state is sigma times the noise, or the noise itself under leading."""
    stock = EULER(**SD, timestep_spacing=spacing, steps_offset=1)
    mine = ours({**stock.config, "_class_name": "EulerDiscreteScheduler"}, "euler")
    from helpers.diffusers_runs import network

    for n in (6, 10):
        stock.set_timesteps(n)
        mine.set_timesteps(n)
        x, net = noise() * stock.init_noise_sigma, network()
        for t in stock.timesteps:
            x = stock.step(net(stock.scale_model_input(x, t), t), t, x).prev_sample
        close(x, run(mine, n, x=noise() * mine.init_noise_sigma))


def test_defaults_that_diffusers_drops_are_named():
    """LCM's betas are the defaults of its class, and stock's from_config gives another class its own."""
    stock = diffusers.LCMScheduler()
    mine = ours({**stock.config, "_class_name": "LCMScheduler"}, "dpmpp_2m")
    with pytest.warns(UserWarning, match="betas of LCMScheduler are its defaults"):
        mine.set_timesteps(8)
    with pytest.warns(UserWarning, match="steps from time to time"):
        ours(SD15, "euler", timestep_spacing="trailing").set_timesteps(7)


@pytest.mark.parametrize("shift", [{"shift": 3.0}, {"use_dynamic_shifting": True}, {"shift_terminal": 0.1}])
def test_custom_times_of_flows_are_shifted_as_stock_shifts_them(shift):
    """FLUX, SD3 and Qwen hand a user's sigmas on; CogView4 sends sigmas and timesteps together, unasked."""
    stock, mu = FLOW(**shift), {"mu": 0.8} if "use_dynamic_shifting" in shift else {}
    mine = ours(stock.config, "euler")
    for given in (
        {"sigmas": [1.0, 0.75, 0.5, 0.2]},
        {"sigmas": [1.0, 0.5, 0.001], "timesteps": [1000.0, 500.0, 1.0]},
        {"timesteps": [1000.0, 800.0, 300.0]},
    ):
        assert torch.equal(run(stock, None, **given, **mu), run(mine, None, **given, **mu))
        assert torch.equal(stock.sigmas, mine.sigmas) and torch.equal(stock.timesteps, mine.timesteps)


def pipelines_times(n):
    import numpy as np
    from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule as parabola
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule as mochi

    whole = np.linspace(1000, 1, n).astype(np.int64).astype(np.float32)
    yield {"sigmas": np.linspace(1.0, 1 / n, n)}
    yield {"sigmas": np.linspace(1.0, 0.0, n + 1)[:-1]}
    yield {"sigmas": whole / 1000, "timesteps": whole}
    yield {"timesteps": parabola(n) * 1000}
    yield {"sigmas": np.array(mochi(n, 0.025))}


@pytest.mark.parametrize("n", [5, 8])
def test_learned_tables_run_where_pipelines_pass_times_unasked(n):
    mine = ours(FLOW().config, "sit-xl-2-256")
    mine.set_timesteps(n)
    own = mine.sigmas
    for given in pipelines_times(n):
        mine.set_timesteps(**given, mu=1.0)
        assert torch.equal(mine.sigmas, own)
    with pytest.raises(ValueError, match="searched together"):
        mine.set_timesteps(sigmas=[1 - (i / n) ** 2 for i in range(n)])


def test_one_step_to_a_terminal_shift_says_what_is_wrong():
    with pytest.raises(ValueError, match="take 2 steps or more"):
        ours(FLOW(shift_terminal=0.1).config, "euler").set_timesteps(1)


def test_mochi_counts_upwards():
    stock = FLOW(invert_sigmas=True)
    mine = ours(stock.config, "euler")
    sigmas = [1.0, 0.8, 0.5, 0.2]
    assert torch.equal(run(stock, None, sigmas=sigmas), run(mine, None, sigmas=sigmas))
    assert torch.equal(stock.sigmas, mine.sigmas) and torch.equal(stock.timesteps, mine.timesteps)
    learned = ours(stock.config, "sit-xl-2-256")
    learned.set_timesteps(5)
    assert learned.timesteps[0] == 0 and bool((learned.sigmas.diff() > 0).all())
    plain, net = ours(FLOW().config, "sit-xl-2-256"), lambda x, t: torch.tanh(x + t / 1000)
    upwards = run(learned, 5, net=lambda x, t: -net(x, 1000 - t))
    torch.testing.assert_close(upwards, run(plain, 5, net=net))


def test_tokens_of_another_time_stand_still():
    """LTXCondition: the given frames keep time 0, and its stock scheduler leaves them alone."""
    x, times = torch.randn(2, 6, 4), torch.tensor([0.0, 0, 1000, 1000, 1000, 1000]).repeat(2, 1)
    for solver in ("euler", "sit-xl-2-256"):
        stock, mine = FLOW(), ours(FLOW().config, solver)
        a = b = x
        for scheduler in (stock, mine):
            scheduler.set_timesteps(5)
        for t, mt in zip(stock.timesteps, mine.timesteps, strict=True):
            a = stock.step(torch.tanh(a), t, a, per_token_timesteps=times.clamp_max(float(t)), return_dict=False)[0]
            b = mine.step(torch.tanh(b), mt, b, per_token_timesteps=times.clamp_max(float(mt)), return_dict=False)[0]
        assert torch.equal(b[:, :2], x[:, :2]) and not torch.equal(b[:, 2:], x[:, 2:])
        if solver == "euler":
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    mine.set_timesteps(5)
    with pytest.raises(ValueError, match="strength"):
        mine.step(x, mine.timesteps[0], x, per_token_timesteps=times.clamp_min(300))


def test_a_last_step_of_order_one_from_fifteen_steps_on_is_named():
    told = {"euler_at_final": True, "final_sigmas_type": "sigma_min", **SD}
    stock = DPM(**told)
    mine = ours(stock.config, "dpmpp_2m")
    close(run(stock, 10), run(mine, 10))
    with pytest.warns(UserWarning, match="euler_at_final"):
        mine.set_timesteps(20)


def test_betas_that_the_stock_does_not_know():
    config = {
        **diffusers.DDPMScheduler(beta_schedule="sigmoid", clip_sample=False).config,
        "_class_name": "DDPMScheduler",
    }
    with pytest.raises(ValueError, match="DDIMScheduler cannot take.*sigmoid"):
        ours(config, "euler").set_timesteps(5)


def test_a_flow_that_is_told():
    """Stock schedulers of VP models run flows when they are told to; so is the family."""
    told = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 5.0}
    stock = DPM.from_config(DPM().config, **told)
    mine = ours(DPM().config, "dpmpp_2m", **told)
    assert mine.config.family == "flow"
    close(run(stock, 8), run(mine, 8))
    for nothing in ({"num_inference_steps": 0}, {"sigmas": []}):
        with pytest.raises(ValueError, match="at least 1"):
            mine.set_timesteps(**nothing)


def test_a_shift_under_the_other_name_is_refused():
    flows = UNIPC(**FLOW_SIGMAS)
    with pytest.raises(ValueError, match=r"shift=7.0: the grid .*use_flow_sigmas=True.* give flow_shift=7.0"):
        DSSScheduler.from_config(flows, solver="unip2", shift=7.0)
    with pytest.raises(ValueError, match=r"flow_shift=7.0: the grid .*use_flow_sigmas=False.* give shift=7.0"):
        DSSScheduler.from_config(FLOW(shift=3.0), solver="dpmpp_2m", flow_shift=7.0)
    with pytest.raises(ValueError, match="shift=7.0: this config is that of a VP model"):
        DSSScheduler.from_config(DPM(**SD), solver="dpmpp_2m", shift=7.0)
    assert DSSScheduler.from_config(flows, solver="unip2", flow_shift=7.0).shift == 7.0


def test_settings_that_are_told_for_nothing_are_named():
    with pytest.warns(UserWarning, match="solver_order=3 not applied: the order is the method's, 2 of dpmpp_2m"):
        DSSScheduler.from_config(DPM(**SD), solver="dpmpp_2m", solver_order=3)
    with pytest.warns(UserWarning, match="use_karras_sigmas=True not applied: a learned table"):
        DSSScheduler.from_config(FLOW(shift=3.0), solver="sit-xl-2-256", use_karras_sigmas=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        DSSScheduler.from_config(DPM(**SD), solver="dpmpp_2m", solver_order=2)
        DSSScheduler.from_config(FLOW(shift=3.0), solver=["sit-xl-2-256", "euler"], use_karras_sigmas=True)
        DSSScheduler.from_config(DPM(**SD, use_karras_sigmas=True), solver="dpmpp_2m")


def test_a_learned_table_follows_what_a_program_writes_into_the_config():
    """Stock schedulers read their config at each step."""
    late = DSSScheduler.from_config(DDIM(clip_sample=False), solver="dit-xl-2-256")
    late.register_to_config(prediction_type="v_prediction")
    early = DSSScheduler.from_config(DDIM(clip_sample=False, prediction_type="v_prediction"), solver="dit-xl-2-256")
    assert torch.equal(run(late, 6), run(early, 6))
