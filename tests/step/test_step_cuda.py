"""What only a GPU can show: capture and replay, no synchronisation, one launch a step."""

import pytest
import torch

from dss_fast.step import multistep_step
from dss_fast.step import reference as step_reference
from helpers.step_inputs import draw

pytestmark = [pytest.mark.fast, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def loop(x, history, weights, index, model):
    for i in range(weights.shape[1]):
        multistep_step(x, model(x), history, weights, index[i : i + 1], out=x)
    return x


def trivial(x):
    return torch.sin(x)


def setting(steps=10, sample=(4, 32, 32), batch=2):
    x, _, history, weights, _ = draw(sample, batch=batch, steps=steps, device="cuda")
    weights[:, :, 0], weights[:, :, 4:] = 1, weights[:, :, 4:] * 0.05
    return x, torch.full_like(history, float("nan")), weights, torch.arange(steps, device="cuda")


def test_one_graph_replays_every_step():
    x, history, weights, index = setting()
    expected, slots = x.clone(), history.clone()
    for i in range(10):
        step_reference.multistep_step_(expected, trivial(expected), slots, weights, index[i : i + 1], expected)
    static = x.clone()
    loop(static, history, weights, index, trivial)  # compiles outside the capture
    static.copy_(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop(static, history, weights, index, trivial)
    for _ in range(2):
        static.copy_(x)
        history.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(static, expected, rtol=1e-5, atol=1e-5)


def test_the_index_on_the_device_serves_one_captured_step():
    """A graph of a single step, with the index bumped on the device, is every step."""
    x, history, weights, index = setting()
    expected = loop(x.clone(), history.clone(), weights, index, trivial)
    static, at = x.clone(), index[:1].clone()
    multistep_step(static.clone(), trivial(static), history.clone(), weights, at)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        multistep_step(static, trivial(static), history, weights, at, out=static)
        at += 1
    static.copy_(x), at.zero_()
    for _ in range(12):  # two more than there are steps: those change nothing
        graph.replay()
    assert torch.equal(static, expected)


def test_no_synchronisation_and_one_launch_a_step():
    x, history, weights, index = setting()
    outputs = torch.randn(10, *x.shape, device="cuda")

    def run():
        for i in range(10):
            multistep_step(x, outputs[i], history, weights, index[i : i + 1], out=x)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [e for e in device if "Sync" not in e.name]  # the profiler's own, when it stops
    assert len([e for e in kernels if "_step_kernel" in e.name]) == len(kernels) == 10


def test_both_ways_to_launch_give_the_same_bits(monkeypatch):
    """Straight to the compiled kernel, and Triton's own, as with a version whose launcher nobody has tried."""
    triton = pytest.importorskip("triton")
    from dss_fast.step import launch

    found = []
    for version in (triton.__version__, "0.0.0"):
        monkeypatch.setattr(triton, "__version__", version)
        launch.Launch.known.clear()
        for _ in range(2):
            x, history, weights, index = setting()
            history.zero_()
            found.append(loop(x, history, weights, index, trivial))
        assert bool(launch.Launch.known) == launch.tried()
    assert all(torch.equal(found[0], other) for other in found[1:]) and found[0].isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_its_tensors_are():
    inputs = [t.to("cuda:1") for t in draw((4, 32, 32), batch=2, steps=5)]
    with torch.cuda.device(0):
        x_next, _ = multistep_step(*inputs)
    expected, _ = multistep_step(*(t.cpu() for t in draw((4, 32, 32), batch=2, steps=5)), backend="reference")
    torch.testing.assert_close(x_next.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_beyond_31_bits():
    """Offsets are 64-bit: a history of 2^31 elements and more."""
    free, _ = torch.cuda.mem_get_info()
    size = (1 << 31) // 8 + 1024
    if free < 12 * 2 * size:
        pytest.skip("needs 7 GB of free memory")
    x = torch.randn(1, size, device="cuda", dtype=torch.bfloat16)
    history = torch.zeros(1, 8, size, device="cuda", dtype=torch.bfloat16)
    history[:, 6, -5:] = 1
    weights = torch.zeros(1, 8, 12, device="cuda")
    weights[0, 7, 0], weights[0, 7, 2], weights[0, 7, 4 + 6] = 1, 1, 2
    index = torch.tensor([7], device="cuda")
    x_next, _ = multistep_step(x, x, history, weights, index)
    assert torch.equal(x_next[:, -5:], x[:, -5:] + 2) and torch.equal(x_next[:, :-5], x[:, :-5])
    assert torch.equal(history[:, 7], x)
