"""The step, its backward and the pull on the CPU, against the reference, float64 and plain PyTorch."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from step_inputs import DEVICE, EPS, NAN, draw, eager, implementation, in_float64

from dss_fast import step
from dss_fast.step import multistep_pull, multistep_step

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


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def names(case):
    return "-".join(str(c).removeprefix("torch.") for c in case) if isinstance(case, tuple) else None


def worst(actual, truth):
    return float((actual.double() - truth).abs().max()) if truth.numel() else 0.0


@pytest.mark.parametrize("dtypes", DTYPES, ids=names)
@pytest.mark.parametrize("backend, sample", CASES, ids=str)
def test_three_ways(backend, sample, dtypes):
    """Ours against float64 truth may err no more than PyTorch in the state's dtype, plus a rounding."""
    ops, device = implementation(backend)
    reference, _ = implementation("reference")
    steps = 4
    for at, pair, noise in [(0, False, True), (1, True, False), (steps - 1, True, True)]:
        inputs = draw(sample, at=at, pair=pair, noise_slot=noise, steps=steps, dtypes=dtypes, device=device)
        ours = ops.multistep_step(*inputs)
        truth = reference.multistep_step(*in_float64(*inputs))
        torch_way = eager(*inputs)
        for mine, plain, exact in zip(ours, torch_way, truth, strict=True):
            assert mine.dtype is plain.dtype and mine.shape == plain.shape
            # slots to come are copied as they are
            mine, plain, exact = (t.nan_to_num(0.0) for t in (mine, plain, exact))
            assert worst(mine, exact) <= worst(plain, exact) + EPS[mine.dtype] * float(exact.abs().max())


@pytest.mark.parametrize("dtypes", DTYPES, ids=names)
@pytest.mark.parametrize("backend, sample", CASES, ids=str)
def test_backward_three_ways(backend, sample, dtypes):
    ops, device = implementation(backend)
    reference, _ = implementation("reference")
    for at, pair, noise, with_later in [(0, False, True, True), (3, True, True, False), (2, True, False, True)]:
        inputs = draw(sample, at=at, pair=pair, noise_slot=noise, dtypes=dtypes, device=device)
        gradients = draw(sample, dtypes=dtypes, seed=1, device=device)
        grad = gradients[0]
        later = torch.randn(inputs[2].shape).to(inputs[2]) if with_later else None
        ours = ops.multistep_step_backward(grad, later, *inputs, ALL)
        exact_later = None if later is None else later.double()
        truth = reference.multistep_step_backward(grad.double(), exact_later, *in_float64(*inputs), ALL)
        for mine, exact in zip(ours, truth, strict=True):
            size = math.sqrt(exact[0].numel()) if exact.dim() == 2 else 1
            bound = 4 * size * EPS[mine.dtype] * float(exact.abs().max()) + 1e-30
            bound += 20 * size * EPS[F32 if inputs[0].dtype is not F64 else F64]
            assert worst(mine, exact) <= bound


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
    sample = (7, 90_001)
    for inputs in (
        draw(sample, batch=1, steps=10, at=9, pair=True, noise_slot=True, dtypes=dtypes),
        draw(sample, batch=2, steps=10, at=3, dtypes=dtypes),
    ):
        inputs = inputs[:2] + (inputs[2].nan_to_num(0.5),) + inputs[3:]
        x, output, history, weights, index = inputs
        ours = torch.ops.dss_fast.multistep_step(*inputs)
        theirs = reference.multistep_step(*inputs)
        grads = torch.sin(7 * x), torch.cos(history)
        ours += torch.ops.dss_fast.multistep_step_backward(*grads, *inputs, ALL)
        theirs += reference.multistep_step_backward(*grads, *inputs, ALL)
        own = torch.ops.dss_fast.multistep_step(*inputs)
        torch.ops.dss_fast.multistep_step_(*inputs, x)
        assert torch.equal(x, own[0]) and torch.equal(history, own[1])
        adjoints = history[:, :10].contiguous()
        ours += torch.ops.dss_fast.multistep_pull(adjoints, weights, index, len(output) > len(x))
        theirs += reference.multistep_pull(adjoints, weights, index, len(output) > len(x))
        for mine, other in zip(ours, theirs, strict=True):
            assert worst(mine, other.double()) <= 30 * EPS[mine.dtype] * float(other.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_in_one_launch_are_the_rows_one_by_one(backend):
    """Rows at different steps of different solvers, idle ones among them: the same bits, gradients included."""
    ops, device = implementation(backend)
    at = [2, 0, -1, 3, 9]
    inputs = draw((1029,), batch=5, at=at, pair=True, noise_slot=True, rows=True, device=device)
    x, output, history, weights, index = inputs
    grad = torch.randn(x.shape, device=device)
    together = ops.multistep_step(*inputs), ops.multistep_step_backward(grad, None, *inputs, ALL)
    for row in range(5):
        one = slice(row, row + 1)
        alone = (x[one], torch.cat([output[one], output[5 + row : 6 + row]]), history[one], weights[one], index[one])
        forward, backward = ops.multistep_step(*alone), ops.multistep_step_backward(grad[one], None, *alone, ALL)
        for a, b in zip(forward, together[0], strict=True):
            assert torch.equal(a.nan_to_num(9), b[one].nan_to_num(9))
        for k, (a, b) in enumerate(zip(backward, together[1], strict=True)):
            assert torch.equal(a, torch.cat([b[one], b[5 + row : 6 + row]]) if k == 1 else b[one])
    assert torch.equal(together[0][0][2], x[2]) and torch.equal(together[0][0][4], x[4])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_in_place(backend):
    """x may be overwritten, history's slot i is written and nothing else is touched."""
    ops, device = implementation(backend)
    inputs = draw((5, 5), batch=3, at=[1, 7, 2], noise_slot=True, rows=True, device=device)
    x, output, history, weights, index = (t.clone() for t in inputs)
    x_next, expected = ops.multistep_step(*inputs)
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
    expected = ops.multistep_step(x, output, history, weights, index)
    turned = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (x, output, history)]
    for a, b in zip(ops.multistep_step(*turned, weights, index), expected, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    out = torch.empty(2, 6, 4, device=device).transpose(1, 2)
    ops.multistep_step_(*turned, weights, index, out)
    assert torch.equal(out, expected[0]) and torch.equal(turned[2][:, 2], expected[1][:, 2])
    wide = torch.full((2, 6, 4, 6), NAN, device=device)
    wide[:, :4] = history
    ops.multistep_step_(x, output, wide[:, :4], weights, index, out)
    assert torch.equal(out, expected[0]) and torch.equal(wide[:, 2], expected[1][:, 2]) and wide[:, 4:].isnan().all()
    for sample, batch in [((0, 3), 2), ((3,), 0)]:
        nothing = draw(sample, batch=batch, at=0, device=device)
        assert ops.multistep_step(*nothing)[0].shape == nothing[0].shape
        ops.multistep_step_(*nothing, torch.empty_like(nothing[0]))
        row = ops.multistep_step_backward(nothing[0], None, *nothing, ALL)[3]
        assert row.shape == (batch, 8) and not row.any()
        assert ops.multistep_pull(nothing[2], nothing[3], nothing[4])[1].shape == nothing[0].shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_unwritten_memory_never_leaks(backend, monkeypatch):
    """Every output is written to its last element, whatever the allocator hands out."""
    ops, device = implementation(backend)
    inputs = tuple(t.nan_to_num(0.5) for t in draw((1027,), at=2, pair=True, device=device))
    expected = ops.multistep_step(*inputs), ops.multistep_step_backward(inputs[0], None, *inputs, ALL)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # makes torch.empty hand out NaN
    try:
        assert torch.empty(3).isnan().all()
        again = ops.multistep_step(*inputs), ops.multistep_step_backward(inputs[0], None, *inputs, ALL)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(itertools.chain(*expected), itertools.chain(*again), strict=True):
        assert torch.equal(a, b) and not b.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice_and_on_any_number_of_threads(backend):
    ops, device = implementation(backend)
    sample = (3, 70_001) if backend == "cpp" else (1027,)
    inputs = draw(sample, at=3, pair=True, device=device)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        backward = ops.multistep_step_backward(inputs[0], None, *inputs, ALL)
        results.append((*ops.multistep_step(*inputs), *backward))
    for other in results[1:]:
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(results[0], other, strict=True))


def test_sixteen_bits_round_like_torch():
    """All 65,536 halves widen exactly; floats round to nearest, ties to even, subnormals, infinity and NaN too."""
    weights = torch.zeros(1, 1, 5)
    weights[0, 0, 2] = 1  # y = output
    index = torch.zeros(1, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)

    def stored(output, dtype):
        size = output.shape[1]
        return step._ops.multistep_step(
            torch.zeros(1, size), output, torch.zeros(1, 1, size, dtype=dtype), weights, index
        )[1][:, 0]

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
    for pair, noise, rows in [(True, True, False), (False, False, True)]:
        at = [2, 0, 9] if backend != "triton" else [1, 0, 9]
        x, output, history, weights, index = draw(
            (2, 3), batch=3, at=at, pair=pair, noise_slot=noise, rows=rows, dtypes=(F64,) * 3, device=DEVICE
        )
        inputs = [t.nan_to_num(0.3).requires_grad_() for t in (x, output, history, weights)]
        assert torch.autograd.gradcheck(
            lambda *t: multistep_step(*t, index, backend=backend),  # noqa: B023
            inputs,
            fast_mode=backend == "triton",
        )


def test_every_pattern_of_requires_grad():
    inputs = draw((6,), at=2, pair=True, noise_slot=True)
    index, tensors = inputs[4], [t.nan_to_num(0.1) for t in inputs[:4]]
    everything = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(multistep_step(*everything, index)[0].square().sum(), everything)
    for pattern in itertools.product((False, True), repeat=4):
        if not any(pattern):
            continue
        given = [t.clone().requires_grad_(need) for t, need in zip(tensors, pattern, strict=True)]
        asked = [t for t in given if t.requires_grad]
        found = torch.autograd.grad(multistep_step(*given, index)[0].square().sum(), asked)
        for a, b in zip(found, itertools.compress(expected, pattern), strict=True):
            assert torch.equal(a, b)


def opcheck_arguments():
    for pair, needs_grad in [(False, True), (True, True), (True, False)]:
        inputs = draw((3, 5), at=1, pair=pair, noise_slot=pair)
        detached = [t.nan_to_num(0.1) for t in inputs]
        tensors = [t.clone().requires_grad_(needs_grad and t.is_floating_point()) for t in detached]
        yield "multistep_step", tuple(tensors)
        yield "multistep_step_", (*detached, torch.empty_like(inputs[0]))
        yield "multistep_step_backward", (detached[0], None, *detached, [True, needs_grad, True, needs_grad])
        yield "multistep_pull", (detached[2][:, :4], *detached[3:], pair)


@pytest.mark.parametrize(
    "op, arguments",
    list(opcheck_arguments()),
    ids=["-".join(p) for p in itertools.product(("grad", "pair", "plain"), "fipb")],
)
def test_opcheck(op, arguments):
    torch.library.opcheck(getattr(torch.ops.dss_fast, op).default, arguments)


def rollout(x, weights, steps, model, **options):
    history = x.new_zeros(len(x), steps, *x.shape[1:])
    index = torch.arange(steps)
    for i in range(steps):
        x, history = multistep_step(x, model(x), history, weights, index[i : i + 1], **options)
    return x


def test_users_loop_compiles_whole_with_gradients():
    x, _, _, weights, _ = draw((2, 8), steps=2)
    matrix = torch.eye(8) * 0.9

    def loss(x, weights):
        return rollout(x, weights, 2, lambda x: (x @ matrix).tanh()).square().mean()

    gradients = []
    for f in (loss, torch.compile(loss, fullgraph=True)):
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        gradients.append(torch.autograd.grad(f(*leaves), leaves))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, weights), loss(x, weights))


def test_pull_is_autograd_of_the_loop():
    """With a model that ignores x, the adjoints are known."""
    steps, batch = 4, 3
    x, output, history, weights, _ = draw((5,), batch=batch, steps=steps, at=steps, noise_slot=True, dtypes=(F64,) * 3)
    index = torch.arange(steps)
    leaves = [t.clone().requires_grad_() for t in (x, output, weights)]
    state, slots, models = leaves[0], history.clone(), [leaves[1] * (k + 1) for k in range(steps)]
    for m in models:
        m.retain_grad()
    states = []
    for i in range(steps):
        states.append(state)
        state.retain_grad()
        state, slots = multistep_step(state, models[i], slots, leaves[2], index[i : i + 1])
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
    with pytest.raises(ValueError, match="out="):
        multistep_step(x.requires_grad_(), output, history, weights, index, out=torch.empty_like(x), backend=named)


def test_a_backend_that_does_not_exist():
    with pytest.raises(ValueError, match="'cuda_graph' cannot run on cpu.*reference"):
        multistep_step(*draw((3,)), backend="cuda_graph")


WITHOUT_EXTENSION = """
import sys, warnings
import torch
from dss_fast import step
assert not {"triton", "dss_fast.step.triton", "dss_fast._C"} & set(sys.modules), "importing should load neither"
assert step.backends(torch.device("cpu")) == ["reference"]
arguments = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 1, 3), torch.ones(1, 1, 5), torch.zeros(1).long()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        x, history = step.multistep_step(*arguments)
assert [str(w.message).split(",")[0] for w in caught if "dss_fast" in str(w.message)] == [
    "dss_fast runs its CPU step in plain PyTorch"], caught
assert torch.equal(history[:, 0], arguments[0] + arguments[1])
try:
    step.multistep_step(*arguments, backend="cpp")
except ValueError as error:
    assert "DSS_FAST_NO_EXTENSION" in str(error)
else:
    raise AssertionError("a named backend that cannot run must not fall back")
"""


def test_without_the_extension_it_runs_and_says_so_once():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"DSS_FAST_NO_EXTENSION": "1"}
    run = subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
