"""DSSScheduler's configs: saved and loaded, through stock schedulers, from the files of published models."""

import json

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own, of NumPy 2
from dss_fast import Flow, Solver  # noqa: E402
from dss_fast.integrations.diffusers import DSSScheduler  # noqa: E402
from helpers.diffusers_runs import run  # noqa: E402

FLOW = diffusers.FlowMatchEulerDiscreteScheduler


def test_configs_survive_a_round_trip(tmp_path):
    own = Solver.from_timedeltas([0.3, 0.7], [[], [0.2]], Flow(), name="mine/2")
    own.save(tmp_path / "mine.json")
    for solver in (
        own,
        tmp_path / "mine.json",
        str(tmp_path / "mine.json"),
        [own, "ab2"],
        "sit-xl-2-256",
        own.to_dict(),
    ):
        scheduler = DSSScheduler.from_config(FLOW(shift=3.0).config, solver=solver)
        scheduler.save_pretrained(tmp_path / "saved")
        loaded = DSSScheduler.from_pretrained(tmp_path / "saved")
        n = 5 if solver == "sit-xl-2-256" else 2
        assert torch.equal(run(scheduler, n), run(loaded, n))
        assert loaded.solver == scheduler.solver and loaded.solver.name == scheduler.solver.name
        assert loaded.config.shift == 3.0 and loaded.config.family == "flow"
    config = json.loads((tmp_path / "saved" / "scheduler_config.json").read_text())
    assert config["solver"] == [] and config["_solvers"][0]["name"] == "mine/2"


def test_through_a_stock_scheduler_and_back(caplog):
    own = Solver.from_timedeltas([0.3, 0.7], [[], [0.2]], Flow(), name="mine/2")
    scheduler = DSSScheduler.from_config(FLOW(shift=3.0).config, solver=own)
    stock = FLOW.from_config(scheduler.config)
    assert stock.shift == 3.0
    assert "timedeltas" not in caplog.text and "coeffs" not in caplog.text
    back = DSSScheduler.from_config(stock.config)
    assert torch.equal(run(scheduler, 2), run(back, 2))
    replaced = DSSScheduler.from_config(stock.config, solver="ab2")
    assert replaced.config.solver == "ab2" and not replaced.config.get("_solvers")


def test_stock_config_files(tmp_path):
    """The files that published models carry name few keys; the rest is their class's own default."""
    for name, content, check in (
        ("PNDMScheduler", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
                           "steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": False}, "vp"),
        ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": 3.0}, "flow"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True,
                                     "flow_shift": 5.0}, "flow"),
        ("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear", "timestep_spacing": "leading"}, "vp"),
    ):  # fmt: skip
        (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": name, **content}))
        scheduler = DSSScheduler.from_pretrained(tmp_path, solver="dpmpp_2m")
        assert scheduler.config.family == check
        assert run(scheduler, 4).isfinite().all()


def test_public_surface():
    scheduler = DSSScheduler()
    assert scheduler.order == 1 and scheduler.init_noise_sigma == 1.0 and len(scheduler) == 1000
    assert scheduler.scale_model_input(torch.ones(1), 0.0) == 1
    assert all(c is not None for c in scheduler.compatibles)
    import inspect

    assert list(inspect.signature(scheduler.set_timesteps).parameters) == [
        "num_inference_steps", "device", "sigmas", "mu", "timesteps", "shift"
    ]  # fmt: skip
    assert "kwargs" not in inspect.signature(DSSScheduler.__init__).parameters  # of deprecated settings, in diffusers
    assert list(inspect.signature(scheduler.step).parameters)[:3] == ["model_output", "timestep", "sample"]
    trained = DSSScheduler(trained_betas=[0.1, 0.3])
    torch.testing.assert_close(trained.betas, torch.tensor([0.1, 0.3]))
