"""Every kind of launch on a libcuda that does nothing: what `test_launches.py` reads, as one JSON object.

PYTHONPATH=.:tests python -m helpers.launches FOLDER    # where the stub is built; without TRITON_INTERPRET
"""

import ctypes
import inspect
import itertools
import json
import os
import sys
import warnings
from unittest.mock import patch

from helpers import cuda_stub

os.environ["TRITON_INTERPRET"] = "0"  # which step_inputs then leaves alone

STUB = cuda_stub.activate(sys.argv[1])

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.nvidia.driver import CudaLauncher  # noqa: E402

from dss_fast import sample, step  # noqa: E402
from dss_fast.step import multistep_step  # noqa: E402
from dss_fast.step import triton as step_triton  # noqa: E402
from dss_fast.step.launch import Launch  # noqa: E402
from helpers.step_inputs import draw, listed  # noqa: E402

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [(F32,) * 3, (F32, BF16, BF16), (F16,) * 3, (F64,) * 3]
TRITON = triton.__version__
SAMPLE = 1040  # two blocks, and a number that Triton takes to be a multiple of 16
KERNELS = [step_triton._step_kernel, step_triton._update_kernel, step_triton._update_backward_kernel,
           step_triton._pull_kernel]  # fmt: skip


def compiled():
    return {kernel.__name__: sum(len(caches[0]) for caches in kernel.device_caches.values()) for kernel in KERNELS}


def compilations_and_launches():
    """For each op: the calls, the launches that they made, and the kernels compiled against those there had to be."""
    found = {}

    def count(name, kernel, calls, variants):
        before, launched = compiled()[kernel.__name__], STUB.stub_launches()
        for call in calls:
            call()
        found[name] = {
            "calls": len(calls),
            "launches": STUB.stub_launches() - launched,
            "compiled": compiled()[kernel.__name__] - before,
            "variants": variants,
        }

    steps, calls, pulls, updates, backwards = 10, [], [], [], []
    flags = list(itertools.product(DTYPES, (False, True), (False, True)))
    for dtypes, pair, rows in flags:
        for noise in (False, True):
            x, output, history, weights, index = draw(
                (SAMPLE,), batch=3, steps=steps, at=0, pair=pair, noise_slot=noise, rows=rows, dtypes=dtypes
            )
            for i in range(steps):  # index[i : i + 1] starts at every alignment
                at = torch.arange(steps)[i : i + 3] if rows and i < 8 else torch.full((3 if rows else 1,), i)
                inputs = x, output, history, weights, at
                calls.append(lambda t=inputs: step_triton.multistep_step_(*t, torch.empty_like(t[0])))
                if dtypes[0] is dtypes[2]:
                    adjoints = history[:, :steps]
                    pulls.append(lambda a=adjoints, w=weights, at=at, p=pair: step_triton.multistep_pull(a, w, at, p))
                if i in (1, 9):
                    many = x, output, listed(history, weights, i), weights, i
                    updates.append(lambda t=many: step_triton.multistep_update(*t))
                    backwards.append(lambda t=many: step_triton.multistep_update_backward(t[0], None, *t, (True,) * 4))
    count("step", KERNELS[0], calls, len(flags))
    lengths = 2  # a list of 1 or 2 slots is padded to 4, one of 9 or 10 to 12
    count("update", KERNELS[1], updates, lengths * len(flags))
    count("backward", KERNELS[2], backwards, lengths * len(flags))
    count("pull", KERNELS[3], pulls, len([f for f in flags if f[0][0] is f[0][2]]))
    return found


def marshalling():
    """What the driver is handed by Triton's own launch, the first of a kind, by ours, those after it, and by Triton's
    where its version is one that nobody has tried."""
    x, output, history, weights, index = draw((SAMPLE,), batch=3, steps=4, at=2, noise_slot=True)
    many = listed(history, weights, 2)
    out = torch.empty_like(x)
    found = {}
    calls = {
        "step": lambda: step_triton.multistep_step_(x, output, history, weights, index, out),
        "update": lambda: step_triton.multistep_update(x, output, many, weights, 2),
        "backward": lambda: step_triton.multistep_update_backward(x, None, x, output, many, weights, 2, (True,) * 4),
        "pull": lambda: step_triton.multistep_pull(history[:, :4], weights, index),
    }
    read = dict.fromkeys(calls, (x, output, weights)) | {"pull": (history, weights, index)}
    pointers = {t.data_ptr() for t in (x, output, history, weights, index, out, *many)}
    for name, call in calls.items():
        expect([])
        Launch.known.clear()
        call()
        (known,) = Launch.known.values()
        types = kinds(known.compiled)
        expect(types)
        Launch.known.clear()
        results, kept = [], []
        for version in (TRITON, TRITON, TRITON, "4.0.0"):
            if version != TRITON:
                Launch.known.clear()
            with patch.object(triton, "__version__", version):
                call()
            kept.append(len(Launch.known))
            grid = [STUB.stub_grid(axis) for axis in range(3)]
            results.append([grid, [STUB.stub_parameter(i) for i in range(len(types))]])
        given = [
            [v if t == "i32" or v in pointers else "new" for t, v in zip(types, parameters, strict=True)]
            for _, parameters in results
        ]
        found[name] = {
            "kept": kept,
            "grids": [grid for grid, _ in results],
            "parameters": given,
            "missing": sorted({t.data_ptr() for t in read[name]} - set(results[-1][1])),
        }
    found["step"]["wanted"] = [
        *(t.data_ptr() for t in (x, output, history, weights, index, out)),
        SAMPLE, history.stride(0), history.stride(1), 3, 2, 4, 5,
    ]  # fmt: skip
    return found


def kinds(compiled):
    """Types of the parameters that the kernel takes, those known when it was compiled left out."""

    def flat(types):
        for kind in types:
            yield from flat(kind) if isinstance(kind, tuple) else [kind]

    return [kind for kind in flat(compiled.src.signature.values()) if kind != "constexpr"]


def expect(types):
    sizes = [8 if kind.startswith("*") or kind == "i64" else 4 for kind in types]
    STUB.stub_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))


def miscounted():
    """What a launch of ours says to one pointer too many and one too few, and how many launches that makes."""
    inputs = draw((SAMPLE,))
    Launch.known.clear()
    step_triton.multistep_step_(*inputs, torch.empty_like(inputs[0]))
    (known,) = Launch.known.values()
    before, said = STUB.stub_launches(), []
    for count in (5, 7):
        try:
            known(*range(count))
        except TypeError as error:
            said.append(str(error))
    return {"said": said, "launches": STUB.stub_launches() - before}


def frames():
    """The package's frames from `sample`, which is not counted, to Triton's launcher, at every step but the first."""
    library = torch.library.Library("dss_fast", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a CPU kernel is replaced
        library.impl("multistep_step_", step._late("multistep_step_", step._on_cuda), "CPU", allow_override=True)
    seen, original = [], CudaLauncher.__call__

    def watching(self, *arguments):
        stack = [f"{f.filename.rpartition('/')[2]}:{f.function}" for f in inspect.stack(0) if "dss_fast/" in f.filename]
        seen.append(list(reversed(stack)))
        return original(self, *arguments)

    CudaLauncher.__call__ = watching
    for _ in range(2):
        seen.clear()
        sample(lambda x, t: x, torch.randn(2, 16), "ab2/4", check_finite=False)
    CudaLauncher.__call__ = original
    launched = STUB.stub_launches()
    multistep_step(*draw((16,)))
    return {"seen": [stack[stack.index("sampling.py:sample") + 1 :] for stack in seen],
            "launches": STUB.stub_launches() - launched}  # fmt: skip


print(
    json.dumps(
        {
            "triton": TRITON,
            "ops": compilations_and_launches(),
            "marshalling": marshalling(),
            "miscounted": miscounted(),
            "frames": frames(),
        }
    )
)
