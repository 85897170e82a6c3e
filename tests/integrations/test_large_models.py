"""FLUX- and Wan-shaped transformers made small, with their real checkpointing: memory stays below the plan."""

import importlib
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

diffusers = pytest.importorskip("diffusers")

from benchmarks.memory import saved  # noqa: E402
from dss_fast import Flow, GaussNewton, Target, plan, search  # noqa: E402
from dss_fast.denoiser import compute_dtype  # noqa: E402
from dss_fast.searching.plan import with_room  # noqa: E402
from dss_fast.unroll.kept import FirstCall  # noqa: E402

METHOD = GaussNewton(samples=2, held_out_samples=0, teacher_evaluations=16, rounds=1)


class Flux(torch.nn.Module):
    """FLUX's blocks, 12 channels a head, for 16 packed latents of 4 channels."""

    shape = (16, 4)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=4, attention_head_dim=12,
            num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 4),
        )  # fmt: skip
        torch.nn.init.normal_(self.network.proj_out.weight, std=0.02)

    def forward(self, x, t):
        rows, real = len(x), x.dtype
        text, pooled = x.new_ones(rows, 3, 8), x.new_ones(rows, 8)
        places, words = torch.zeros(16, 3, dtype=real), torch.zeros(3, 3, dtype=real)
        places[:, 1:] = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
        return self.network(x, text, pooled, 1 - t.to(real), places, words, return_dict=False)[0]


class Wan(torch.nn.Module):
    """Wan's blocks for latents of 3 frames."""

    shape = (4, 3, 4, 4)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=8, freq_dim=16, ffn_dim=96, num_layers=8, rope_max_seq_len=32,
        )  # fmt: skip
        torch.nn.init.normal_(self.network.proj_out.weight, std=0.02)

    def forward(self, x, t):
        text = x.new_ones(len(x), 3, 8)
        return self.network(x, 1000 * (1 - t), text, return_dict=False)[0]


class Held:
    """Counts the bytes of what graphs hold, each storage once, parameters aside; peak: the most at a time. first: the
    search's own count of a call, whose hooks these would hide."""

    def __init__(self, net):
        self.first = None
        self.aside = {p.untyped_storage()._cdata for p in (*net.parameters(), *net.buffers())}
        self.alive, self.peak = {}, 0

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if self.first is not None and self.first.bytes is None:
            self.first._count(tensor)
        if storage._cdata in self.aside:
            return tensor
        held = _Held(tensor, self, storage._cdata)
        count, size = self.alive.get(storage._cdata, (0, storage.nbytes()))
        self.alive[storage._cdata] = count + 1, size
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return held

    @staticmethod
    def unpack(held):
        return held.tensor if isinstance(held, _Held) else held


class _Held:
    def __init__(self, tensor, count, key):
        self.tensor, self.count, self.key = tensor.detach(), count, key

    def __del__(self):
        count, size = self.count.alive.pop(self.key)
        if count > 1:
            self.count.alive[self.key] = count - 1, size


def target(net, model=None):
    return Target(model or net, net.shape, Flow(), key="net")


@pytest.mark.parametrize(
    "kind, sizes",
    [
        (Flux, (12,)),
        (Wan, (24,)),
        *(pytest.param(kind, (80, 24, 12), marks=pytest.mark.slow) for kind in (Flux, Wan)),
    ],
)
def test_what_graphs_hold_is_at_most_what_the_plan_says_whatever_the_memory(kind, sizes, monkeypatch):
    """80, 24 and 12 GB and what FLUX takes at one sample, scaled to what this one takes."""
    whole, found = plan(target(kind().eval()), 3, method=METHOD, budget=500), []
    each = whole.cost.saved
    for cards in (None, *(size / 21.6 for size in sizes)):
        net = kind().eval()
        memory = None if cards is None else int(cards * each)
        monkeypatch.undo()
        said = plan(target(net), 3, method=replace(METHOD, memory=memory), budget=500)
        assert memory is None or said.memory.graphs <= memory
        assert said.cost.recomputed == (cards is not None and cards < 2)
        held = Held(net)

        def watched(x, t, net=net, held=held):
            if not torch.is_grad_enabled():
                return net(x, t)
            with saved_tensors_hooks(held.pack, held.unpack):
                return net(x, t)

        def looked(*asked, held=held, memory=memory):
            assert memory is None or held.peak <= memory  # where the look at a graph that is too large ends
            held.peak, held.first = 0, None
            return with_room(*asked)

        watching = lambda first, x, held=held: nullcontext(setattr(held, "first", first))  # noqa: E731
        monkeypatch.setattr(FirstCall, "watching", watching)
        monkeypatch.setattr(importlib.import_module("dss_fast.searching"), "with_room", looked)
        model = _Around(net, watched)
        found.append(searched(target(net, model), memory).solver)
        states = 4 * said.batch_size * math.prod(net.shape)  # which are there anyway
        assert 0 < held.peak <= said.memory.graphs + states and not net.network.is_gradient_checkpointing
    for solver in found[1:]:
        assert solver.timesteps == pytest.approx(found[0].timesteps, rel=1e-3)
        for mine, first in zip(solver.coeffs, found[0].coeffs, strict=True):
            assert mine == pytest.approx(first, rel=1e-2, abs=1e-3)


def searched(target, memory):
    return search(target, 3, initial="ab2", method=replace(METHOD, memory=memory), budget=500, progress=False)


class _Around(torch.nn.Module):
    def __init__(self, net, call):
        super().__init__()
        self.net, self.call = net, call

    def forward(self, x, t):
        return self.call(x, t)


def test_weights_in_float8_are_searched_in_parts():
    """As FLUX on a card of 24 GB: 12 GB of weights, cast up for each call, and graphs of one sample at a time."""
    net = Flux().eval().to(torch.bfloat16)
    net.network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert compute_dtype(net) == torch.bfloat16
    each = plan(target(net), 3, method=METHOD, budget=500).cost.saved
    said = plan(target(net), 3, method=replace(METHOD, memory=each), budget=500)
    assert said.cost.recomputed and said.cost.saved < each / 2
    assert searched(target(net), memory=each).solver.num_steps == 3


def test_the_benchmark_counts_what_the_plan_measures():
    """It does so on meta tensors, at sizes that no test can have."""
    net = Flux().eval().requires_grad_(False)
    x, t = torch.randn(1, *net.shape).requires_grad_(), torch.full((1,), 0.5).requires_grad_()
    counted, block = saved(net, lambda: net(x, t))
    assert counted == pytest.approx(plan(target(net), 3, method=METHOD).cost.saved, rel=0.02)
    assert counted / 10 < block < counted / 3  # of one double and four single blocks
