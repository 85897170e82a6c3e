"""The step, its backward and the pull on the CPU, against the reference, float64 and plain PyTorch."""

import itertools
import math
import subprocess
import sys

import pytest
import torch

from dss_fast import step
from dss_fast.step import multistep_pull, multistep_step, multistep_update
from helpers.step_inputs import DEVICE, EPS, NAN, draw, draw_list, eager, implementation, in_float64, listed, stacked

pytestmark = pytest.mark.fast
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [
    (F32, F32, F32),
    (F32, BF16, BF16),
    (BF16, BF16, BF16),
    (F16, F16, F16),
    (F64, F64, F64),
    (F64, F32, F16),
    (BF16, F32, F32),
]
BACKENDS = ["cpp", "triton"]
ALL = [True] * 4  # gradients
# In: one element, a tail in every block, several blocks and chunks. The interpreter is slow, so it gets fewer.
SAMPLES = {"cpp": [(1,), (3, 7), (1027,), (9, 1024)], "triton": [(3, 7), (1027,)]}
CASES = [(b, s) for b in BACKENDS for s in SAMPLES[b]]


def names(case):
    return "-".join(str(c).removeprefix("torch.") for c in case) if isinstance(case, tuple) else None


def worst(actual, truth):
    return float((actual.double() - truth).abs().max()) if truth.numel() else 0.0


@pytest.mark.parametrize("dtypes", DTYPES, ids=names)
@pytest.mark.parametrize("backend, sample", CASES, ids=str)
def test_three_ways(backend, sample, dtypes):
    """Ours against float64 truth may err no more than PyTorch in the state's dtype, plus a rounding. Both forms."""
    ops, device = implementation(backend)
    reference, _ = implementation("reference")
    steps = 4
    for at, pair, noise, rows in [(0, False, True, False), (1, True, False, True), (steps - 1, True, True, False)]:
        inputs = draw(sample, at=at, pair=pair, noise_slot=noise, steps=steps, rows=rows, dtypes=dtypes, device=device)
        x, output, history, weights, _ = inputs
        many = listed(history, weights, at)
        ours = ops.multistep_update(x, output, many, weights, at)
        truth = reference.multistep_update(*in_float64(x, output, many, weights, at))
        in_torch = eager(x, output, many, weights, at)
        for mine, plain, exact in zip(ours, in_torch, truth, strict=True):
            assert mine.shape == plain.shape and mine.dtype is (x if mine is ours[0] or not many else many[0]).dtype
            assert worst(mine, exact) <= worst(plain, exact) + EPS[mine.dtype] * float(exact.abs().max())
        x_next, after = stacked(ops, *inputs)
        assert torch.equal(x_next, ours[0])
        assert torch.equal(after[:, at], ours[1].to(after.dtype))
        kept = [j for j in range(history.shape[1]) if j != at]
        assert torch.equal(after[:, kept].nan_to_num(7), history[:, kept].nan_to_num(7))


@pytest.mark.parametrize("dtypes", DTYPES, ids=names)
@pytest.mark.parametrize("backend, sample", CASES, ids=str)
def test_backward_three_ways(backend, sample, dtypes):
    """Against float64 truth, no worse than autograd through PyTorch in the state's dtype, plus roundings."""
    ops, device = implementation(backend)
    reference, _ = implementation("reference")
    for at, pair, noise, given in [(0, False, True, "both"), (3, True, True, "x_next"), (2, True, False, "y")]:
        inputs = draw_list(sample=sample, at=at, pair=pair, noise_slot=noise, dtypes=dtypes, device=device)
        x, output, history, weights, _ = inputs
        grads = [torch.randn(x.shape, device=device).to(x), torch.randn(x.shape, device=device).to((history or [x])[0])]
        grads = [g if given in ("both", name) else None for g, name in zip(grads, ("x_next", "y"), strict=True)]
        ours = flat(ops.multistep_update_backward(*grads, *inputs, ALL))
        exact_grads = [None if g is None else g.double() for g in grads]
        truth = flat(reference.multistep_update_backward(*exact_grads, *in_float64(*inputs), ALL))
        leaves = [t.clone().requires_grad_() for t in (x, output, *history)]
        table = weights.expand(len(x), -1, -1).clone().requires_grad_()
        results = eager(leaves[0], leaves[1], leaves[2:], table, at)
        asked = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
        plain = torch.autograd.grad([r for r, _ in asked], [*leaves, table], [g for _, g in asked], allow_unused=True)
        for mine, exact, theirs in zip(ours, truth, [*plain[:-1], plain[-1][:, at]], strict=True):
            theirs = torch.zeros_like(mine) if theirs is None else theirs
            size = math.sqrt(exact[0].numel()) if exact.dim() == 2 else 1
            bound = 2 * EPS[mine.dtype] * size * float(exact.abs().max())
            assert mine.dtype is theirs.dtype and worst(mine, exact) <= worst(theirs, exact) + bound + 1e-30


def flat(gradients):
    x, output, history, row = gradients
    return [x, output, *history, row]


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("backend, sample", CASES, ids=str)
def test_pull_three_ways(backend, sample, dtype):
    ops, device = implementation(backend)
    reference, _ = implementation("reference")
    for at, pair, noise in [(0, True, False), (3, False, True), (2, True, True)]:
        _, _, adjoints, weights, index = draw(sample, at=4, noise_slot=noise, dtypes=(dtype,) * 3, device=device)
        adjoints, index = adjoints[:, :4].contiguous(), index * 0 + at
        adjoints[:, :at] = NAN  # adjoints of earlier states do not exist yet
        adjoints[:, at:] = torch.randn(adjoints[:, at:].shape).to(adjoints)
        ours = ops.multistep_pull(adjoints, weights, index, pair)
        truth = reference.multistep_pull(adjoints.double(), weights.double(), index, pair)
        for mine, exact in zip(ours, truth, strict=True):
            assert mine.dtype is dtype
            assert worst(mine, exact) <= 2 * EPS[dtype] * float(exact.abs().max()) + 20 * EPS[weights.dtype]


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (F32, BF16, BF16)], ids=names)
def test_results_that_are_written_past_the_cache(dtypes):
    """From 12 MB on; slots of an odd size start at any alignment."""
    reference, _ = implementation("reference")
    sample = (12, 90_001)  # more than a million elements: short blocks
    for inputs in (
        draw(sample, batch=1, steps=10, at=9, pair=True, noise_slot=True, dtypes=dtypes),
        draw(sample, batch=2, steps=10, at=3, dtypes=dtypes),
    ):
        x, output, history, weights, index = inputs
        history = history.nan_to_num(0.5)
        many = x, output, listed(history, weights, int(index)), weights, int(index)
        ours = torch.ops.dss_fast.multistep_update(*many)
        theirs = reference.multistep_update(*many)
        grads = torch.sin(7 * x), torch.cos(history[:, 0])
        ours += tuple(flat(torch.ops.dss_fast.multistep_update_backward(*grads, *many, ALL)))
        theirs += tuple(flat(reference.multistep_update_backward(*grads, *many, ALL)))
        torch.ops.dss_fast.multistep_step_(x, output, history, weights, index, x)
        assert torch.equal(x, ours[0]) and torch.equal(history[:, int(index)], ours[1])
        adjoints = history[:, :10].contiguous()
        ours += torch.ops.dss_fast.multistep_pull(adjoints, weights, index, len(output) > len(x))
        theirs += reference.multistep_pull(adjoints, weights, index, len(output) > len(x))
        for mine, other in zip(ours, theirs, strict=True):
            assert worst(mine, other.double()) <= 30 * EPS[mine.dtype] * float(other.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_in_one_launch_are_the_rows_one_by_one(backend):
    """Rows at different steps of different solvers, idle ones among them, and rows of a list: the same bits."""
    ops, device = implementation(backend)
    at = [2, 0, -1, 3, 9]
    inputs = draw((1029,), batch=5, at=at, pair=True, noise_slot=True, rows=True, device=device)
    x, output, history, weights, index = inputs
    together = stacked(ops, *inputs)
    grad = torch.randn(x.shape, device=device)
    many = listed(torch.randn(history.shape).to(history), weights, 3)
    update = ops.multistep_update(x, output, many, weights, 3)
    gradient = flat(ops.multistep_update_backward(grad, None, x, output, many, weights, 3, ALL))
    for row in range(5):
        one, both = slice(row, row + 1), [row, 5 + row]
        alone = x[one], output[both], history[one], weights[one], index[one]
        for a, b in zip(stacked(ops, *alone), together, strict=True):
            assert torch.equal(a.nan_to_num(9), b[one].nan_to_num(9))
        alone = x[one], output[both], [y[one] for y in many], weights[one], 3
        for a, b in zip(ops.multistep_update(*alone), update, strict=True):
            assert torch.equal(a, b[one])
        for a, b in zip(flat(ops.multistep_update_backward(grad[one], None, *alone, ALL)), gradient, strict=True):
            assert torch.equal(a, b[both] if len(b) == 10 else b[one])
    assert torch.equal(together[0][2], x[2]) and torch.equal(together[0][4], x[4])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_in_place(backend):
    """x may be overwritten, history's slot i is written and nothing else is touched."""
    ops, device = implementation(backend)
    inputs = draw((5, 5), batch=3, at=[1, 7, 2], noise_slot=True, rows=True, device=device)
    x, output, history, weights, index = (t.clone() for t in inputs)
    x_next, expected = stacked(ops, *inputs)
    assert ops.multistep_step_(x, output, history, weights, index, x) is None
    assert torch.equal(x, x_next)
    assert torch.equal(history.nan_to_num(7.0), expected.nan_to_num(7.0))
    written = torch.zeros(3, 5, dtype=torch.bool, device=device)
    written[0, 1] = written[2, 2] = True
    assert torch.equal(history[~written].nan_to_num(7.0), inputs[2][~written].nan_to_num(7.0))
    assert history[written].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_strided_and_empty(backend):
    ops, device = implementation(backend)
    x, output, history, weights, index = draw((4, 6), at=2, device=device)
    expected = stacked(ops, x, output, history, weights, index)
    turned = [turn(t) for t in (x, output, history)]
    out = torch.empty(2, 6, 4, device=device).transpose(1, 2)
    ops.multistep_step_(*turned, weights, index, out)
    assert torch.equal(out, expected[0]) and torch.equal(turned[2][:, 2], expected[1][:, 2])
    wide = torch.full((2, 6, 4, 6), NAN, device=device)
    wide[:, :4] = history
    ops.multistep_step_(x, output, wide[:, :4], weights, index, out)
    assert torch.equal(out, expected[0]) and torch.equal(wide[:, 2], expected[1][:, 2]) and wide[:, 4:].isnan().all()

    many = listed(history, weights, 2)
    table = torch.stack([weights, weights], 3)[..., 0]
    strided = turn(x), turn(output), [turn(y) for y in many], table, 2
    assert not table.is_contiguous()
    grad = torch.randn(x.shape, device=device)
    for a, b in zip(
        (*ops.multistep_update(*strided), *flat(ops.multistep_update_backward(turn(grad), grad, *strided, ALL))),
        (
            *ops.multistep_update(x, output, many, weights, 2),
            *flat(ops.multistep_update_backward(grad, grad, x, output, many, weights, 2, ALL)),
        ),
        strict=True,
    ):
        assert torch.equal(a, b) and a.is_contiguous()
    for sample, batch in [((0, 3), 2), ((3,), 0)]:
        nothing = draw(sample, batch=batch, at=1, device=device)
        ops.multistep_step_(*nothing, torch.empty_like(nothing[0]))
        nothing = draw_list(sample=sample, batch=batch, at=1, device=device)
        assert all(t.shape == nothing[0].shape for t in ops.multistep_update(*nothing))
        *gradients, row = flat(ops.multistep_update_backward(nothing[0], None, *nothing, ALL))
        assert row.shape == (batch, 8) and not row.any() and all(g.shape == nothing[0].shape for g in gradients)
        adjoints = torch.empty(batch, 4, *sample, device=device)
        assert ops.multistep_pull(adjoints, nothing[3], index)[1].shape == nothing[0].shape


def turn(t):
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unwritten_memory_never_leaks(backend):
    """Every output is written to its last element, whatever the allocator hands out."""
    ops, device = implementation(backend)
    inputs = draw_list(sample=(1027,), at=2, pair=True, device=device)

    def run():
        gradients = ops.multistep_update_backward(inputs[0], None, *inputs, ALL)
        return *ops.multistep_update(*inputs), *flat(gradients)

    expected = run()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # makes torch.empty hand out NaN
    try:
        assert torch.empty(3).isnan().all()
        again = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(expected, again, strict=True):
        assert torch.equal(a, b) and not b.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice_and_on_any_number_of_threads(backend):
    ops, device = implementation(backend)
    sample = (3, 70_001) if backend == "cpp" else (1027,)
    inputs = draw_list(sample=sample, at=3, pair=True, device=device)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        backward = ops.multistep_update_backward(inputs[0], None, *inputs, ALL)
        results.append((*ops.multistep_update(*inputs), *flat(backward)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_slot_under_a_zero_weight_is_not_read(backend):
    ops, device = implementation(backend)
    x, output, history, weights, _ = draw_list(at=3, device=device)
    weights[:, 3, 4 + 1] = 0
    history[1].fill_(NAN)
    assert all(t.isfinite().all() for t in ops.multistep_update(x, output, history, weights, 3))


def test_sixteen_bits_round_like_torch():
    """All 65,536 halves widen exactly; floats round to nearest, ties to even, subnormals, infinity and NaN too."""
    weights = torch.zeros(1, 1, 5)
    weights[0, 0, 2] = 1  # y = output
    index = torch.zeros(1, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)

    def stored(output, dtype):
        size = output.shape[1]
        history = torch.zeros(1, 1, size, dtype=dtype)
        return multistep_step(torch.zeros(1, size), output, history, weights, index)[1][:, 0]

    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16)[None]
    for dtype in (F16, BF16):
        assert torch.equal(stored(halves.view(dtype), F32).nan_to_num(7), halves.view(dtype).float().nan_to_num(7))
        floats = torch.randn(1, 1 << 16, generator=generator) * 2.0 ** torch.randint(
            -30, 18, (1, 1 << 16), generator=generator
        )
        floats[0, :8] = torch.tensor([65519.0, 65520, math.inf, NAN, -65536, 6e-8, 2.0**-25, 3 * 2.0**-25])
        assert torch.equal(stored(floats, dtype).nan_to_num(7), floats.to(dtype).nan_to_num(7))


@pytest.mark.parametrize("backend", [None, "reference", "triton"])
def test_gradcheck(backend):
    for at, pair, noise, rows in [(2, True, True, False), (1, False, False, True), (0, True, False, False)]:
        x, output, history, weights, i = draw_list(
            sample=(2, 3), batch=3, at=at, pair=pair, noise_slot=noise, rows=rows, dtypes=(F64,) * 3, device=DEVICE
        )
        inputs = [t.requires_grad_() for t in (x, output, weights, *history)]
        assert torch.autograd.gradcheck(
            lambda x, m, w, *y: multistep_update(x, m, y, w, i, backend=backend),  # noqa: B023
            inputs,
            fast_mode=backend == "triton",
        )


@pytest.mark.parametrize("backend", [None, "reference", "triton"])
def test_every_pattern_of_requires_grad(backend):
    x, output, history, weights, i = draw_list(sample=(6,), at=2, pair=True, noise_slot=True, device=DEVICE)
    tensors = [x, output, weights, history[0], history[2]]

    def loss(x, output, weights, first, noise):
        return multistep_update(x, output, [first, history[1], noise], weights, i, backend=backend)[0].square().sum()

    everything = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(loss(*everything), everything)
    for pattern in itertools.product((False, True), repeat=5):
        if not any(pattern):
            continue
        given = [t.clone().requires_grad_(need) for t, need in zip(tensors, pattern, strict=True)]
        asked = [t for t in given if t.requires_grad]
        found = torch.autograd.grad(loss(*given), asked)
        for a, b in zip(found, itertools.compress(expected, pattern), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", [None, "reference", "triton"])
def test_the_stacked_step_with_a_gradient_is_the_list_step(backend):
    for pair, noise, rows in [(True, True, False), (False, False, True)]:
        inputs = draw((2, 3), batch=3, at=2, pair=pair, noise_slot=noise, rows=rows, dtypes=(F64,) * 3, device=DEVICE)
        x, output, history, weights, index = inputs
        given = [t.nan_to_num(0.3).requires_grad_() for t in (x, output, history, weights)]
        assert torch.autograd.gradcheck(lambda *t: multistep_step(*t, index, backend=backend), given, fast_mode=True)  # noqa: B023
        with_gradient = multistep_step(*given, index, backend=backend)
        with torch.no_grad():
            without = multistep_step(x, output, given[2].detach().clone(), weights, index, backend=backend)
        assert all(torch.allclose(a, b) for a, b in zip(with_gradient, without, strict=True))
        with pytest.raises(ValueError, match="multistep_update"):
            multistep_step(*given, index.expand(3), backend=backend)


def opcheck_arguments():
    for pair, needs_grad in [(False, True), (True, True), (True, False)]:
        inputs = draw((3, 5), at=1, pair=pair, noise_slot=pair)
        x, output, history, weights, index = [t.nan_to_num(0.1) for t in inputs]
        many = listed(history, weights, 1)
        tensors = [t.clone().requires_grad_(needs_grad) for t in (x, output, weights, *many)]
        yield "multistep_step_", (x, output, history, weights, index, torch.empty_like(x))
        yield "multistep_update", (*tensors[:2], tensors[3:], tensors[2], 1)
        yield "multistep_update_backward", (x, None, x, output, many, weights, 1, [True, needs_grad, True, needs_grad])
        yield "multistep_pull", (history[:, :4], weights, index, pair)


@pytest.mark.parametrize(
    "op, arguments",
    list(opcheck_arguments()),
    ids=["-".join(p) for p in itertools.product(("grad", "pair", "plain"), ("step", "update", "backward", "pull"))],
)
def test_opcheck(op, arguments):
    torch.library.opcheck(getattr(torch.ops.dss_fast, op).default, arguments)


def rollout(x, weights, steps, model, **options):
    history = []
    for i in range(steps):
        x, y = multistep_update(x, model(x), history, weights, i, **options)
        history.append(y)
    return x


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_users_loop_compiles_whole_with_gradients(backend):
    x, _, _, weights, _ = draw((2, 8), steps=3)
    matrix = torch.eye(8) * 0.9

    def loss(x, weights):
        return rollout(x, weights, 3, lambda x: (x @ matrix).tanh()).square().mean()

    gradients = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        gradients.append(torch.autograd.grad(f(*leaves), leaves))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_users_sampling_loop_compiles_whole():
    x, _, history, weights, _ = draw((2, 8), steps=3)
    index = torch.arange(3)

    def run(x, history):
        for i in range(3):
            x, history = multistep_step(x, x.tanh(), history, weights, index[i : i + 1])
        return x, history

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(x, history.clone()), run(x, history.clone()), strict=True):
            torch.testing.assert_close(a, b)


def test_pull_is_autograd_of_the_loop():
    """With a model that ignores x, the adjoints are known."""
    steps, batch = 4, 3
    x, output, history, weights, _ = draw((5,), batch=batch, steps=steps, at=steps, noise_slot=True, dtypes=(F64,) * 3)
    index = torch.arange(steps)
    leaves = [t.clone().requires_grad_() for t in (x, output, weights)]
    state, slots, models = leaves[0], [], [leaves[1] * (k + 1) for k in range(steps)]
    for m in models:
        m.retain_grad()
    states = []
    for i in range(steps):
        states.append(state)
        state.retain_grad()
        state, y = multistep_update(state, models[i], [*slots, history[:, -1]], leaves[2], i)
        slots.append(y)
    state.retain_grad()
    (state * torch.arange(5.0)).sum().backward()
    adjoints = torch.stack([*(s.grad for s in states[1:]), state.grad], 1)
    for j in range(steps):
        grad_x, grad_output = multistep_pull(adjoints, weights, index[j : j + 1])
        torch.testing.assert_close(grad_x, states[j].grad)
        torch.testing.assert_close(grad_output, models[j].grad)


@pytest.mark.parametrize("named", [None, "reference", "cpp", "triton"])
def test_errors_name_what_is_wrong(named):
    x, output, history, weights, index = draw((3,), batch=4, at=1, device=DEVICE)
    if named is not None and named not in step.backends(DEVICE):
        with pytest.raises(ValueError, match="cannot run"):
            multistep_step(x, output, history, weights, index, backend=named)
        return
    for broken, message in [
        ((x, output[:3], history, weights, index), r"output.*3"),
        ((x, output, history[:, :, :2], weights, index), r"history.*2"),
        ((x, output, history[:, :2], weights, index), r"weights.*slots"),
        ((x, output, history, weights[:, :, :-1], index), r"weights"),
        ((x, output, history, weights.double(), index), r"weights are.*[dD]ouble|float64"),
        ((x, output, history, weights, index.int()), r"index is"),
        ((x, output, history, weights, index.expand(2)), r"index is"),
    ]:
        with pytest.raises(ValueError, match=message):
            multistep_step(*broken, backend=named)
    many = listed(history, weights, 1)
    for broken, message in [
        ((x, output[:3], many, weights, 1), r"output.*3"),
        ((x, output, [], weights, 1), r"history holds 0 tensors.*takes the 1"),
        ((x, output, many, weights, 2), r"history holds 1 tensors.*takes the 2"),
        ((x, output, [many[0][:2]], weights, 1), r"history\[0\].*2, 3"),
        ((x, output, [many[0], many[0].half()], weights, 2), r"history\[1\].*[hH]al|float16"),
        ((x, output, many, weights, 4), r"step is 4.*0 to 3"),
        ((x, output, many, weights, -1), r"step is -1"),
        ((x, output, many, weights[0], 1), r"weights"),
        ((x, output, many, weights[:, :, :-1], 1), r"weights"),
        ((x, output, many, weights.double(), 1), r"weights are.*[dD]ouble|float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            multistep_update(*broken, backend=named)
    with pytest.raises(ValueError, match="out="):
        multistep_step(x.requires_grad_(), output, history, weights, index, out=torch.empty_like(x), backend=named)


def test_a_backend_that_does_not_exist():
    with pytest.raises(ValueError, match="'cuda_graph' cannot run on cpu.*reference"):
        multistep_step(*draw((3,)), backend="cuda_graph")


WITHOUT_TRITON = """
import sys, warnings
sys.modules["triton"] = None  # as where it is not installed
import torch
from dss_fast import step
cuda = torch.device("cuda")
assert step.backends(cuda) == ["reference"]
library = torch.library.Library("dss_fast", "IMPL")
arguments = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 1, 3), torch.ones(1, 1, 5), torch.zeros(1).long()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in ("multistep_step_", "multistep_update"):  # the CPU's tensors stand for CUDA's
        library.impl(name, step._late(name, step._on_cuda), "CPU", allow_override=True)
    for _ in range(2):
        x, history = step.multistep_step(*arguments)
        x, y = step.multistep_update(*arguments[:2], [], arguments[3], 0)
assert [str(w.message).split(",")[0] for w in caught if "dss_fast runs" in str(w.message)] == [
    "dss_fast runs its CUDA step in plain PyTorch"], caught
assert torch.equal(y, arguments[0] + arguments[1]) and torch.equal(history[:, 0], y)
try:
    step._module("triton", cuda)
except ValueError as error:
    assert "'triton' cannot run on cuda; can: ['reference']" in str(error), error
else:
    raise AssertionError("a named backend that cannot run must not fall back")
"""


def test_cuda_without_triton_runs_and_says_so_once():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_transforms_of_torch_func():
    """grad, vmap and jacrev around the step give what a loop and autograd give."""
    x, m, w = torch.randn(3, 5), torch.randn(3, 5), torch.randn(1, 2, 6)
    history = torch.randn(3, 2, 5)

    def update(x, m):
        return multistep_update(x, m, [], w, 0)[0]

    def loss(x):
        return update(x, m).square().sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x), leaf.grad)
    torch.testing.assert_close(torch.func.vmap(lambda x, m: update(x[None], m[None])[0])(x, m), update(x, m))
    index = torch.tensor([1])

    def step(x, m, history):
        return multistep_step(x[None], m[None], history[None], w, index)[0][0]

    wanted = multistep_step(x, m, history.clone(), w, index)[0]
    torch.testing.assert_close(torch.func.vmap(step)(x, m, history), wanted)
    assert torch.func.jacrev(lambda x: step(x, m[0], history[0]))(x[0]).shape == (5, 5)


def test_the_package_is_loaded_anew_in_one_process():
    """importlib.reload, a plug-in host that drops the modules, autoreload: the ops are torch's and are defined once."""
    code = """
import gc, importlib, sys, torch
import dss_fast.step
importlib.reload(dss_fast.step)
for name in [name for name in sys.modules if name.startswith("dss_fast")]:
    del sys.modules[name]
del dss_fast
gc.collect()
import dss_fast.step
gc.collect()
x = torch.ones(2, 3, requires_grad=True)
y, _ = dss_fast.step.multistep_update(x, x, [], torch.ones(1, 1, 5), 0)
y.sum().backward()
print(y[0, 0].item(), x.grad[0, 0].item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3.0", "3.0"]
