"""The integration examples run as they stand."""

from types import SimpleNamespace

import pytest
import torch

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


def test_diffusers_search(tmp_path, monkeypatch):
    """All but the search itself, which has its own tests: keywords, result, the saved table in the pipeline."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from dss_fast import handmade, sample
    from examples import diffusers_search

    def found(model, shape, num_steps, *, schedule, cond, uncond, guidance_scale, decode):
        table = handmade("ab2", num_steps, schedule)
        drawn = cond(2, torch.Generator().manual_seed(0))
        x = sample(
            model, (2, *shape), table, schedule=schedule, cond=drawn, uncond=uncond, guidance_scale=guidance_scale
        )
        assert decode(x).shape[:2] == (2, 3)
        return SimpleNamespace(solver=table)

    monkeypatch.setattr(diffusers_search, "search", found)
    for name in ("flux", "sd3"):
        result = diffusers_search.main(["--pipeline", name, "--steps", "5", "--out", str(tmp_path / f"{name}.json")])
        assert (tmp_path / f"{name}.json").exists() and result.solver.num_steps == 5
