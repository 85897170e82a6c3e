"""The code in docstrings runs as printed."""

import inspect
import re

import pytest
import torch

import dss_fast.serving
import dss_fast.target


def code_of(thing):
    """The indented lines of a docstring that are Python, not an equation."""
    blocks = re.findall(r"\n\n((?:    .+\n)+)", inspect.getdoc(thing) + "\n")
    assert blocks, thing
    return inspect.cleandoc("\n" + blocks[0])


def model(x, t, y=None):
    return -x * t.reshape(-1, 1, 1, 1)


def test_target():
    names = {"model": model, "null": 1000, "draw_labels": lambda n, generator: {"y": torch.zeros(n)}}
    exec(code_of(dss_fast.target.Target), found := {"Target": dss_fast.target.Target, **names})
    assert found["target"].shape == (4, 32, 32) and found["target"].guided


def test_batch():
    found = {"Batch": dss_fast.serving.Batch, "torch": torch, "model": model, "noise": torch.randn(4, 32, 32)}
    exec(code_of(dss_fast.serving.Batch), found)
    assert found["image"].shape == (4, 32, 32) and not found["batch"].running


def test_scheduler():
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from dss_fast.integrations.diffusers import DSSScheduler, scheduler
    from examples.tiny_pipelines import build

    pipe, call = build("dit")
    exec(inspect.getdoc(scheduler).splitlines()[-1], {"pipe": pipe, "DSSScheduler": DSSScheduler})
    assert isinstance(pipe.scheduler, DSSScheduler) and pipe(**call, num_inference_steps=5)


def test_pipeline():
    """A search of few evaluations, asked for what the docstring asks."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from dss_fast import GaussNewton, search
    from dss_fast.integrations.diffusers import from_pipeline
    from examples.tiny_pipelines import build

    small = GaussNewton(samples=4, batch_size=4, held_out_samples=4, teacher_evaluations=16, rounds=1)
    pipe, call = build("flux", batch=2)
    rows = {k: call.pop(k) for k in list(call) if "prompt_" in k}

    def of_these(pipe, prompts, **options):
        return from_pipeline(pipe, rows, **{k: v for k, v in call.items() if k != "output_type"})

    found = {
        "from_pipeline": of_these,
        "pipe": pipe,
        "prompts": ["a cat"],
        "search": lambda target, num_steps: search(target, num_steps, method=small, budget=500, progress=False),
    }
    exec(code_of(from_pipeline), found)
    assert found["solver"].num_steps == 8
