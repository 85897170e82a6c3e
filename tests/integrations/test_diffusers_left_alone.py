"""from_pipeline leaves a pipeline as it was, however a call ends, and whoever else runs it meanwhile."""

import sys
import threading

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from dss_fast.integrations.diffusers import from_pipeline, pipeline, recording  # noqa: E402
from examples.tiny_pipelines import build  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def split(name, batch=3):
    pipe, arguments = build(name, batch=batch)
    del arguments["output_type"]
    rows = {k: v for k, v in arguments.items() if isinstance(v, list | torch.Tensor) and "image" not in k}
    return pipe, rows, {k: v for k, v in arguments.items() if k not in rows}


def state_of(pipe):
    """All that a pipeline holds: attributes by identity, its config, its networks' hooks, modes and gradients.

    Without the empty registry that any run of some networks makes for hooks of diffusers' own.
    """
    modules = [m for part in pipe.components.values() if isinstance(part, torch.nn.Module) for m in part.modules()]
    parameters = [p.requires_grad for m in modules for p in m.parameters(recurse=False)]
    names = [sorted(vars(m).keys() - {"_diffusers_hook"}) for m in modules]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in modules], names
    return {k: id(v) for k, v in vars(pipe).items()}, dict(pipe.config), parameters, hooks


@pytest.mark.parametrize("name", ["sd3", "flux", "sd", "dit", "wan"])
def test_a_call_that_returns_freezes_the_network_and_changes_nothing_else(name):
    pipe, rows, arguments = split(name)
    attributes, config, _, hooks = state_of(pipe)
    from_pipeline(pipe, rows, **arguments)
    after = state_of(pipe)
    assert (after[0], after[1], after[3]) == (attributes, config, hooks)
    network = getattr(pipe, "transformer", None) or pipe.unet
    assert not any(p.requires_grad for p in network.parameters())


def network_raises(pipe, monkeypatch, error, at=2):
    calls, network = [], getattr(pipe, "transformer", None) or pipe.unet
    forward = network.forward

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise error("in the network")
        return forward(*args, **kwargs)

    failing.__signature__ = recording.inspect.signature(forward)
    monkeypatch.setattr(network, "forward", failing)


def part_raises(owner, name):
    def arrange(pipe, monkeypatch, error):
        def failing(*args, **kwargs):
            raise error(f"in {name}")

        monkeypatch.setattr(owner, name, failing)

    return arrange


ENDS = {
    "network": network_raises,
    "network, later": lambda *given: network_raises(*given, at=9),
    "scheduler's step": part_raises(recording.NoteTaker, "step"),
    "scheduler's times": part_raises(recording.NoteTaker, "set_timesteps"),
    "check": part_raises(pipeline, "_check"),
    "schedule": part_raises(pipeline, "model_schedule"),
    "decoder": part_raises(pipeline, "_decoder"),
    "request": part_raises(pipeline, "request_of"),
    "hook": part_raises(recording, "tensor_of"),
}


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("end", ENDS)
def test_a_call_that_raises_changes_nothing(monkeypatch, end, error):
    pipe, rows, arguments = split("sd3")
    ENDS[end](pipe, monkeypatch, error)
    before = state_of(pipe)
    with pytest.raises(error, match="^in "):
        from_pipeline(pipe, rows, batch_size=1, **arguments)
    assert state_of(pipe) == before


def test_two_threads_on_one_pipeline_and_a_third_that_runs_it():
    """Each gets what it would have got alone, and the pipeline keeps its scheduler."""
    pipe, rows, arguments = split("sd3")
    generate = {**rows, **arguments, "output_type": "latent", "num_inference_steps": 3}
    alone = pipe(**generate, generator=torch.Generator().manual_seed(0)).images
    wanted = from_pipeline(pipe, rows, **arguments)
    before, found, errors = state_of(pipe), [], []
    own, interval = pipe.scheduler, sys.getswitchinterval()

    def searching():
        for _ in range(4):
            found.append(from_pipeline(pipe, rows, batch_size=1, **arguments))

    def running():
        for _ in range(6):
            images = pipe(**generate, generator=torch.Generator().manual_seed(0)).images
            assert torch.equal(images, alone) and pipe.scheduler is own

    def noted(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=noted, args=(work,)) for work in (searching, searching, running)]
    sys.setswitchinterval(1e-5)  # threads take turns a thousand times as often
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    finally:
        sys.setswitchinterval(interval)
    assert not errors and len(found) == 8
    for target in found:
        assert target.shape == wanted.shape and target.guidance_scale == wanted.guidance_scale
        for key, value in wanted.cond.conditions.items():
            torch.testing.assert_close(target.cond.conditions[key], value)
    assert pipe.scheduler is own and state_of(pipe)[1:] == before[1:]


def test_a_method_that_the_user_has_put_in_place_is_the_twins():
    pipe, rows, arguments = split("sd3")
    encode, seen = type(pipe).encode_prompt, []

    def encode_prompt(self, *args, **kwargs):
        seen.append(self)
        return encode(self, *args, **kwargs)

    pipe.encode_prompt = encode_prompt.__get__(pipe)
    from_pipeline(pipe, rows, **arguments)
    assert seen and all(one is not pipe and type(one.scheduler) is recording.NoteTaker for one in seen)
    assert pipe.encode_prompt.__self__ is pipe
