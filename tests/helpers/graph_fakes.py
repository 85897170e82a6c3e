"""A CUDA device for tests on a CPU: what dss_fast.graph calls, with the order of the calls written down.

A capture records every operator, and a replay runs them again into the tensors of the capture, so that new values
arrive exactly by what was copied into those, as on a GPU.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dss_fast import graph


class Recorder(TorchDispatchMode):
    """Runs operators and remembers them. Refuses what a capture does."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = function(*args, **kwargs)
        self.operators.append((function, args, kwargs, result))
        return result

    def run(self):
        def write(old, new):
            if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)

        for function, args, kwargs, result in self.operators:
            again = function(*args, **kwargs)
            if isinstance(result, torch.Tensor):
                write(result, again)
            elif isinstance(result, list | tuple):
                for old, new in zip(result, again, strict=True):
                    write(old, new)


class Stream:
    def __init__(self, device=None, name="side", log=None):
        self.device, self.name, self.log = torch.device("cpu", 0), name, log

    def wait_stream(self, other):
        self.log(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log(f"{self.name} waits for the event")


class FakeDevice:
    """What the calls did, in ``calls``; which pools PyTorch thinks are captured into, in ``under_way``.

    workspaces: for each stream the pool that holds what cuBLAS keeps for it, None outside of all; PyTorch lets go of it
    when a graph of the stream goes. A model calls `gemm` where it would multiply.
    """

    def __init__(self, monkeypatch):
        self.calls, self.under_way, self.users = [], [], {}
        self.local, self.pools, self.modes = threading.local(), 0, []
        self.workspaces = {}
        self.broken = False  # whether the end of a capture raises, as after an operation it does not permit
        fake = self

        class Graph:
            def __init__(self):
                fake.calls.append("new graph")
                self.recorder, self.pool, self.stream = None, None, None
                self.workspaces = []  # that the captured calls use: pairs of stream and pool

            def replay(self):
                fake.calls.append(f"replay on {fake.current().name}")
                for stream, pool in self.workspaces:
                    held = fake.users[pool] if pool else stream in fake.workspaces
                    assert held, "the graph writes into a workspace that is freed"
                self.recorder.run()

            def reset(self):
                fake.calls.append("reset")
                if self.pool is not None:
                    fake.workspaces.pop(self.stream, None)
                    fake.users[self.pool] -= 1
                    self.pool = None

            def __del__(self):
                self.reset()

        @contextmanager
        def capturing(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
            fake.modes.append(capture_error_mode)
            fake.local.stream = stream
            if pool in fake.under_way:
                raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
            fake.under_way.append(pool)
            fake.users[pool] = fake.users.get(pool, 0) + 1
            fake.calls.append(f"begin in pool {pool[1]}")
            cuda_graph.recorder, cuda_graph.stream = Recorder(), stream
            fake.local.capture = cuda_graph, pool
            try:
                with cuda_graph.recorder:
                    yield
            except RuntimeError as error:
                fake.broken = fake.broken or "not permitted" in str(error)
                raise
            finally:
                fake.local.capture = None
                if fake.broken:  # as PyTorch: before the allocator hears of it, the stream still current
                    fake.calls.append("end raises")
                    raise RuntimeError("operation failed due to a previous error during capture")
                fake.under_way.remove(pool)
                cuda_graph.pool = pool
                fake.calls.append("end")

        @contextmanager
        def on(stream):
            before = fake.current()
            fake.local.stream = stream
            try:
                yield
            finally:
                fake.local.stream = before

        class Event:
            def record(self, stream):
                fake.calls.append(f"event on {stream.name}")

        def new_pool():
            fake.pools += 1
            return 0, fake.pools

        def end(device, pool):
            if pool not in fake.under_way:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            fake.under_way.remove(pool)

        def release(device, pool):
            fake.users[pool] -= 1

        class Generator:
            def clone_state(self):
                return "before"

            def graphsafe_set_state(self, state):
                fake.calls.append(f"generator {state}")

        cuda = {
            "Stream": lambda device=None: Stream(log=fake.calls.append),
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capturing,
            "stream": on,
            "current_stream": lambda device=None: fake.current(),
            "device": lambda device: on(fake.current()),
            "graph_pool_handle": new_pool,
            "default_generators": (Generator(),),
            "is_current_stream_capturing": lambda: False,
        }
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
        monkeypatch.setattr(graph, "CAPTURES", "cpu")
        monkeypatch.setattr(graph, "_devices", {})
        monkeypatch.setattr(graph, "_abandoned", [])

    def current(self):
        if not hasattr(self.local, "stream"):
            self.local.stream = self.stream("main")
        return self.local.stream

    def gemm(self):
        stream = self.current()
        graph, pool = getattr(self.local, "capture", None) or (None, None)
        held_in = self.workspaces.setdefault(stream, pool)
        if graph is not None:
            graph.workspaces.append((stream, held_in))
        self.calls.append(f"gemm on {stream.name}")

    def stream(self, name):
        return Stream(name=name, log=self.calls.append)

    @contextmanager
    def on(self, name):
        before, self.local.stream = self.current(), self.stream(name)
        try:
            yield
        finally:
            self.local.stream = before
