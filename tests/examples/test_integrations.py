"""The integration examples run as they stand."""

import pytest

from dss_fast import Solver
from examples import k_diffusion
from examples.comfyui import __main__ as comfyui


def test_k_diffusion(capsys):
    digits = k_diffusion.main(5)
    assert digits.shape == (4, 1, 28, 28) and 0.02 < digits.mean() < 0.4
    assert "step 5: sigma" in capsys.readouterr().out


def test_comfyui(capsys):
    assert comfyui.main(steps=5).shape == (2, 1, 28, 28)
    assert "do not belong to solver" in capsys.readouterr().out


def test_diffusers_sample():
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from examples import diffusers_sample

    for name in ("dit", "flux", "sdxl"):
        assert diffusers_sample.main(["--pipeline", name, "--steps", "5"]).isfinite().all()


def test_diffusers_search(tmp_path):
    """A pipeline's own network, a small search, and the saved table in the pipeline."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from dss_fast import GaussNewton
    from examples import diffusers_search

    small = GaussNewton(samples=16, batch_size=8, held_out_samples=8, teacher_evaluations=16, rounds=2)
    for name in ("flux", "sd3"):
        out = tmp_path / f"{name}.json"
        result = diffusers_search.main(["--pipeline", name, "--out", str(out)], method=small, progress=False)
        assert result.solver.num_steps == 5 and result.solver.schedule.convention == "diffusers"
        assert Solver.load(out) == result.solver


def test_diffusers_folder(tmp_path, capsys):
    """What a server loads runs the table, on the source's own weights, which are not copied."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    import torch

    from examples import diffusers_folder
    from examples.tiny_pipelines import build

    diffusers_folder.main([])
    assert "FluxPipeline with sit-xl-2-256/8" in capsys.readouterr().out
    pipe, call = build("sd3")
    pipe.save_pretrained(tmp_path / "own")
    diffusers_folder.main([str(tmp_path / "own"), "sit-xl-2-256", str(tmp_path / "table")])
    assert (tmp_path / "table" / "transformer").is_symlink()
    absent = {key: None for key, part in pipe.components.items() if part is None}
    served = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "table", **absent)
    pipe.scheduler = diffusers_folder.DSSScheduler.from_config(pipe.scheduler.config, solver="sit-xl-2-256")
    ours, theirs = (
        p(**call, num_inference_steps=6, generator=torch.Generator().manual_seed(0))[0] for p in (served, pipe)
    )
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="vp models"):
        diffusers_folder.main([str(tmp_path / "own"), "dit-xl-2-256", str(tmp_path / "other")])
