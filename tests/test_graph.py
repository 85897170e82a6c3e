"""Whole loops as CUDA graphs: equal to eager ones, for new noise, conditions and guidance; and no synchronisation."""

import pytest
import torch
from torch import nn

from dss_fast import sample
from dss_fast.graph import forget

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(17, 64), nn.SiLU(), nn.Linear(64, 16))

    def forward(self, x, t, y):
        return self.inner(torch.cat([x + y[:, None], t[:, None].to(x)], 1))


def test_without_a_gpu_it_runs_and_says_why():
    net, x = Net(), torch.randn(3, 16)
    with pytest.warns(UserWarning, match="eagerly.*cpu"):
        result = sample(net, x, "ab2/4", cond={"y": torch.ones(3)}, cuda_graph=True)
    assert torch.equal(result, sample(net, x, "ab2/4", cond={"y": torch.ones(3)}))


def test_what_needs_the_host_between_steps_is_refused():
    with pytest.raises(ValueError, match="cuda_graph=True.*callback"):
        sample(Net(), torch.randn(3, 16), "ab2/4", cond={"y": torch.ones(3)}, cuda_graph=True, callback=print)


@needs_gpu
def test_replays_new_noise_conditions_and_guidance():
    net = Net().cuda()
    for k in range(4):
        x, y = torch.randn(5, 16, device="cuda"), torch.randn(5, device="cuda")
        options = {"cond": {"y": y}, "uncond": {"y": 0.0}, "guidance_scale": 1.5 + k}
        for solver in ("sit-xl-2-256/5", "ab3/5"):
            captured = sample(net, x, solver, cuda_graph=True, **options)
            torch.testing.assert_close(captured, sample(net, x, solver, **options), rtol=1e-5, atol=1e-5)
    forget()


@needs_gpu
@pytest.mark.parametrize("wait", [lambda t: t[0].item(), lambda t: torch.cuda.synchronize()])
def test_a_model_that_cannot_be_captured_runs_eagerly(wait):
    """The first is found before the capture, the second breaks it; neither leaves anything behind."""
    net, calls = Net().cuda(), []

    def waiting(x, t, y):
        calls.append(wait(t))
        return net(x, t, y)

    x, y = torch.randn(5, 16, device="cuda"), torch.randn(5, device="cuda")
    stream = torch.cuda.current_stream()
    expected = sample(waiting, x, "ab2/4", cond={"y": y})
    with pytest.warns(UserWarning, match="could not be captured"):
        torch.testing.assert_close(sample(waiting, x, "ab2/4", cond={"y": y}, cuda_graph=True), expected)
    assert torch.cuda.current_stream() == stream and torch.randn(3, device="cuda").isfinite().all()
    calls.clear()
    torch.testing.assert_close(sample(waiting, x, "ab2/4", cond={"y": y}, cuda_graph=True), expected)
    assert len(calls) == 4  # it was not tried again
    forget()


@needs_gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_sampling_never_synchronises(cuda_graph):
    net = Net().cuda()
    x, y, null = (
        torch.randn(5, 16, device="cuda"),
        torch.ones(5, device="cuda"),
        torch.zeros(5, device="cuda"),
    )
    scale = torch.full((5,), 2.0, device="cuda")
    options = {"cond": {"y": y}, "uncond": {"y": null}, "guidance_scale": scale, "cuda_graph": cuda_graph}
    sample(net, x, "dit-xl-2-256/10", **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(net, x, "dit-xl-2-256/10", **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    forget()


@pytest.mark.parametrize("held, words", [([1, 2], "not on a GPU"), ({"a": torch.ones(1)}, "a tensor inside a dict")])
def test_conditions_that_are_dicts_and_lists(held, words):
    """The first is a key like any other; a replay could not change the second, so the loop runs eagerly."""
    x, model = torch.randn(3, 4), lambda x, t, held: x * len(held) / 3
    with pytest.warns(UserWarning, match=words):
        result = sample(model, x, "ab2/4", cond={"held": held}, cuda_graph=True)
    assert torch.equal(result, sample(model, x, "ab2/4", cond={"held": held}))
