"""Whole loops as CUDA graphs: equal to eager ones, for new noise, conditions and guidance; and no synchronisation.

On a GPU with the real thing; without one, the order of calls, the keys and the memory's owners, by helpers.graph_fakes.
"""

import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

from dss_fast import graph, sample
from dss_fast.graph import forget
from helpers.graph_fakes import FakeDevice

pytestmark = pytest.mark.fast
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
no_fallback = pytest.mark.filterwarnings("error:cuda_graph=True")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(17, 64), nn.SiLU(), nn.Linear(64, 16))

    def forward(self, x, t, y):
        return self.inner(torch.cat([x + y[:, None], t[:, None].to(x)], 1))


@pytest.fixture
def fake(monkeypatch):
    return FakeDevice(monkeypatch)


def test_without_a_gpu_it_runs_and_says_why():
    net, x = Net(), torch.randn(3, 16)
    with pytest.warns(UserWarning, match="eagerly.*cpu") as warned:
        result = sample(net, x, "ab2/4", cond={"y": torch.ones(3)}, cuda_graph=True)
    assert warned[0].filename == __file__
    assert torch.equal(result, sample(net, x, "ab2/4", cond={"y": torch.ones(3)}))


def test_what_needs_the_host_between_steps_is_refused():
    with pytest.raises(ValueError, match="cuda_graph=True.*callback"):
        sample(Net(), torch.randn(3, 16), "ab2/4", cond={"y": torch.ones(3)}, cuda_graph=True, callback=print)


@needs_gpu
@no_fallback
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
    """Neither leaves anything behind."""
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
@no_fallback
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
    with pytest.warns(UserWarning, match=words) as warned:
        result = sample(model, x, "ab2/4", cond={"held": held}, cuda_graph=True)
    assert warned[0].filename == __file__
    assert torch.equal(result, sample(model, x, "ab2/4", cond={"held": held}))


@needs_gpu
@pytest.mark.parametrize("wait", ["t[0].item()", "torch.cuda.synchronize()", "(_ for _ in ()).throw(RuntimeError)"])
def test_a_failed_capture_leaves_none_under_way(wait):
    """In a process of its own, since what one would leave breaks all that follows."""
    code = f"""
import torch, warnings
from dss_fast import sample
calls = []
def waiting(x, t):
    calls.append(1)
    {wait if "throw" not in wait else "torch.cuda.is_current_stream_capturing() and " + wait}
    return torch.sin(x) * t[:, None]
x = torch.randn(64, 4096, device="cuda")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    sample(waiting, x, "ab2/4", cuda_graph=True)
assert any("could not be captured" in str(w.message) for w in caught), caught
torch.cuda.empty_cache()                      # asserts while a capture is under way
torch.randn(8, device="cuda").sum().item()    # the generator is not capturing
torch.empty(8).pin_memory()
free, _ = torch.cuda.mem_get_info()
held = torch.empty(int(free * 0.7), dtype=torch.uint8, device="cuda")
del held                                      # cached; what follows needs it freed
torch.empty(int(free * 0.8), dtype=torch.uint8, device="cuda")
good = lambda x, t: torch.cos(x) * t[:, None]
warnings.simplefilter("error")
torch.testing.assert_close(sample(good, x, "ab2/4", cuda_graph=True), sample(good, x, "ab2/4"))
torch.testing.assert_close(sample(good, -x, "ab2/4", cuda_graph=True), sample(good, -x, "ab2/4"))
print("all is well")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "all is well", done.stderr[-3000:]


@needs_gpu
@no_fallback
def test_autocast_on_a_gpu():
    net, options = Net().cuda(), {"cond": {"y": torch.ones(5, device="cuda")}}
    x = torch.randn(5, 16, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        expected = sample(net, x, "ab2/4", **options)
        sample(net, x, "ab2/4", cuda_graph=True, **options)
    junk = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(8)]  # over what the cache let go
    with torch.autocast("cuda", torch.bfloat16):
        torch.testing.assert_close(sample(net, x, "ab2/4", cuda_graph=True, **options), expected)
    full = sample(net, x, "ab2/4", cuda_graph=True, **options)
    torch.testing.assert_close(full, sample(net, x, "ab2/4", **options), rtol=1e-5, atol=1e-5)
    assert not torch.equal(full, expected) and len(junk) == 8
    forget()


@needs_gpu
@no_fallback
def test_threads_on_streams_of_their_own():
    net, found, failures = Net().cuda(), {}, []
    inputs = [torch.randn(5 + k % 2, 16, device="cuda") for k in range(8)]
    expected = [sample(net, x, "ab2/6", cond={"y": torch.ones(len(x), device="cuda")}) for x in inputs]
    torch.cuda.synchronize()

    def work(k):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    y = torch.ones(len(inputs[k]), device="cuda")
                    found[k] = sample(net, inputs[k], "ab2/6", cond={"y": y}, cuda_graph=True)
                torch.cuda.current_stream().synchronize()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not failures
    for k in range(8):
        torch.testing.assert_close(found[k], expected[k], rtol=1e-5, atol=1e-5)
    forget()


@no_fallback
def test_one_capture_serves_new_noise_conditions_and_solvers(fake):
    net = Net()
    for k in range(3):
        x, y = torch.randn(5, 16), torch.randn(5)
        options = {"cond": {"y": y}, "uncond": {"y": 0.0}, "guidance_scale": 1.5 + k}
        for solver in ("sit-xl-2-256/5", "ab3/5"):
            captured = sample(net, x, solver, cuda_graph=True, **options)
            torch.testing.assert_close(captured, sample(net, x, solver, **options), rtol=1e-6, atol=1e-6)
    assert fake.calls.count("new graph") == 1 and fake.modes == ["thread_local"]


@no_fallback
def test_a_model_in_training_is_another(fake):
    net, x = Net(), torch.randn(2, 16)
    for training in (True, False, True):
        sample(net.train(training), x, "ab2/4", cond={"y": torch.ones(2)}, cuda_graph=True)
    assert fake.calls.count("new graph") == 2


def test_a_failed_capture_is_undone(fake):
    """The pool no longer counts as captured into, is not used again, and the stream and generator are as before."""
    net, calls = Net(), []

    def waiting(x, t, y):
        if calls.append(1) or len(calls) > 4:
            t[0].item()
        return net(x, t, y)

    x, options = torch.randn(3, 16), {"cond": {"y": torch.ones(3)}}
    sample(net, x[:2], "ab2/4", cond={"y": torch.ones(2)}, cuda_graph=True)
    before = fake.current()
    with pytest.warns(UserWarning, match=r"captured \(operation not permitted when stream is capturing\)") as warned:
        result = sample(waiting, x, "ab2/4", cuda_graph=True, **options)
    assert [w.filename for w in warned] == [__file__]
    torch.testing.assert_close(result, sample(net, x, "ab2/4", **options))
    assert fake.current() is before and fake.under_way == [] and fake.users == {(0, 1): 1}
    assert "generator before" in fake.calls and len(graph._abandoned) == 1
    calls.clear()
    sample(waiting, x, "ab2/4", cuda_graph=True, **options)
    assert len(calls) == 4 and fake.calls.count("new graph") == 2  # it was not tried again
    fake.broken = False
    sample(net, x, "ab2/4", cuda_graph=True, **options)
    assert fake.users == {(0, 1): 1, (0, 2): 1}


def test_what_a_model_raises_in_a_capture_frees_the_pool(fake):
    calls = []

    def moody(x, t):
        calls.append(1)
        if len(calls) == 6:
            raise ValueError("no more")
        return x

    with pytest.warns(UserWarning, match=r"captured \(no more\)"):
        sample(moody, torch.randn(3, 4), "ab2/4", cuda_graph=True)
    assert fake.under_way == [] and fake.users == {(0, 1): 0} and not graph._abandoned


@pytest.mark.parametrize("how", ["a warning that is an error", "Ctrl-C"])
def test_what_ends_a_capture_leaves_nothing_that_a_later_one_meets(fake, how):
    net, calls, x = Net(), [], torch.randn(3, 16)
    kept = {"cond": {"y": torch.ones(3)}, "cuda_graph": True}
    sample(net, x, "ab2/4", **kept)

    def interrupted(x, t, y):
        calls.append(1)
        if len(calls) == 6:
            fake.broken = True
            raise KeyboardInterrupt if how == "Ctrl-C" else RuntimeError("no")
        return net(x, t, y)

    with pytest.raises(KeyboardInterrupt if how == "Ctrl-C" else UserWarning), warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(interrupted, x, "ab2/4", **kept)
    fake.broken = False
    other = sample(net, x[:2], "ab2/4", cond={"y": torch.ones(2)}, cuda_graph=True)
    assert fake.under_way == [] and fake.users == {(0, 1): 1, (0, 2): 1}
    torch.testing.assert_close(other, sample(net, x[:2], "ab2/4", cond={"y": torch.ones(2)}))


@no_fallback
def test_what_a_model_raises_comes_through(fake):
    def wrong(x, t):
        raise ValueError("no such class")

    with pytest.raises(ValueError, match="no such class"):
        sample(wrong, torch.randn(3, 4), "ab2/4", cuda_graph=True)
    assert fake.calls.count("new graph") == 0


@no_fallback
def test_autocast_is_part_of_the_key_and_its_cache_stays_out(fake):
    cached, net = [], Net()

    def watched(x, t, y):
        cached.append(torch.is_autocast_cache_enabled())
        return net(x, t, y)

    x, options = torch.randn(3, 16), {"cond": {"y": torch.ones(3)}}
    full = sample(watched, x, "ab2/4", cuda_graph=True, **options)
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            low = sample(watched, x, "ab2/4", cuda_graph=True, **options)
            torch.testing.assert_close(low, sample(net, x, "ab2/4", **options))
            assert torch.is_autocast_cache_enabled() and not torch.equal(low, full)
    assert not any(cached) and fake.calls.count("new graph") == 3


@no_fallback
def test_a_number_in_the_model_is_what_it_was_until_the_capture_is_forgotten(fake):
    """As the docstring says of a LoRA's scale; one that is a condition is part of the key."""

    class Scaled(nn.Module):
        scale = 1.0

        def forward(self, x, t, factor=1.0):
            return self.scale * factor * torch.sin(x)

    net, x = Scaled(), torch.randn(3, 16)
    first = sample(net, x, "ab2/4", cuda_graph=True)
    net.scale = 2.0
    doubled = sample(net, x, "ab2/4")
    assert torch.equal(sample(net, x, "ab2/4", cuda_graph=True), first) and not torch.allclose(first, doubled)
    forget()
    torch.testing.assert_close(sample(net, x, "ab2/4", cuda_graph=True), doubled)
    net.scale = 1.0
    forget()
    for factor in (1.0, 2.0, 1.0):
        captured = sample(net, x, "ab2/4", cond={"factor": factor}, cuda_graph=True)
        torch.testing.assert_close(captured, doubled if factor == 2 else first)


@no_fallback
def test_replays_wait_for_the_last_one_on_any_stream(fake):
    net, x, options = Net(), torch.randn(3, 16), {"cond": {"y": torch.ones(3)}, "cuda_graph": True}
    sample(net, x, "ab2/4", **options)
    fake.calls.clear()
    for name in ("first", "second"):
        with fake.on(name):
            sample(net, x, "ab2/4", **options)
    each = ["{0} waits for the event", "replay on {0}", "event on {0}"]
    assert fake.calls == [line.format(name) for name in ("first", "second") for line in each]


@no_fallback
def test_threads_take_turns(fake):
    """What one thread enqueues is not torn apart by another, and nobody gets another's samples."""
    net, found = Net(), {}
    inputs = [torch.randn(2 + k % 2, 16) for k in range(6)]

    def work(k):
        with fake.on(f"thread {k}"):
            for _ in range(10):
                found[k] = sample(net, inputs[k], "ab2/4", cond={"y": torch.ones(len(inputs[k]))}, cuda_graph=True)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    for k, x in enumerate(inputs):
        torch.testing.assert_close(found[k], sample(net, x, "ab2/4", cond={"y": torch.ones(len(x))}))
    assert fake.calls.count("new graph") == 2
    replays = [i for i, call in enumerate(fake.calls) if call.startswith("replay on")]
    assert len(replays) == 60
    for i in replays:
        name = fake.calls[i].removeprefix("replay on ")
        assert fake.calls[i - 1] == f"{name} waits for the event" and fake.calls[i + 1] == f"event on {name}"


@no_fallback
def test_so_many_are_kept_in_one_pool(fake):
    """One more ends them all, after the last replay, and takes a new pool."""
    net = Net()

    def run(rows):
        sample(net, torch.randn(rows, 16), "ab2/4", cond={"y": torch.ones(rows)}, cuda_graph=True)

    for rows in range(1, graph.LOOPS + 1):
        run(rows)
    (device,) = graph._devices.values()
    assert len(device.loops) == graph.LOOPS and fake.users == {(0, 1): graph.LOOPS}
    fake.calls.clear()
    run(graph.LOOPS + 1)
    waits = fake.calls[: fake.calls.index("new graph")].count("main waits for the event")
    assert waits == 1 + graph.LOOPS  # for the model's first call, and for the memory of each loop
    assert len(device.loops) == 1 and fake.users == {(0, 1): 0, (0, 2): 1}
    forget()
    assert not device.loops
    run(1)
    assert fake.users == {(0, 1): 0, (0, 2): 0, (0, 3): 1}


@no_fallback
@pytest.mark.parametrize("cleared", ["by PyTorch when a graph goes", "by torch.compile"])
def test_a_captured_gemm_keeps_its_workspace(fake, cleared):
    """Whatever lets go of it meanwhile, for as long as the capture is replayed."""

    def model(x, t):
        fake.gemm()
        return torch.sin(x)

    for _ in range(2):
        for rows in range(1, graph.LOOPS + 2):
            sample(model, torch.randn(rows, 16), "ab2/4", cuda_graph=True)
            if cleared == "by torch.compile":
                fake.workspaces.clear()
            sample(model, torch.randn(rows, 16), "ab2/4", cuda_graph=True)
            sample(model, torch.randn(graph.LOOPS, 16), "ab2/4", cuda_graph=True)


@no_fallback
def test_a_models_first_call_waits_for_the_last_replay(fake):
    """On the caller's stream: what a model keeps for itself may be written by both."""

    def model(x, t):
        fake.gemm()
        return torch.sin(x)

    sample(model, torch.randn(2, 16), "ab2/4", cuda_graph=True)
    with fake.on("second"):
        fake.calls.clear()
        sample(model, torch.randn(3, 16), "ab2/4", cuda_graph=True)
    assert fake.calls[:2] == ["second waits for the event", "gemm on second"]


@needs_gpu
@no_fallback
def test_captured_gemms_survive_what_frees_their_workspace():
    """Nine shapes, of which the ninth ends the others; then all that nobody holds is freed and overwritten."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4096, 4096), nn.Tanh()).cuda().half()
    inputs = [torch.randn(rows, 4096, device="cuda").half() for rows in range(1, graph.LOOPS + 2)]

    def model(x, t):
        return net(x)

    def run(x):
        return sample(model, x, "ab2/4", cuda_graph=True)

    expected = [sample(model, x, "ab2/4") for x in inputs]
    for x in inputs:
        run(x)
    for _ in range(2):
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        junk = [torch.full((1 << size,), float("nan"), device="cuda") for size in range(8, 26) for _ in range(4)]
        for x, wanted in list(zip(inputs, expected, strict=True))[1:]:
            torch.testing.assert_close(run(x), wanted, rtol=1e-2, atol=1e-2)
        assert all(t.isnan().all() for t in junk)
    forget()


@no_fallback
def test_a_table_is_copied_once(fake):
    net, x, options = Net(), torch.randn(3, 16), {"cond": {"y": torch.ones(3)}, "cuda_graph": True}
    for solver in ("ab2/4", "ab2/4", "ab3/4", "ab3/4"):
        sample(net, x, solver, **options)
    (loop,) = next(iter(graph._devices.values())).loops.values()
    before = loop.inputs["weights"]._version
    sample(net, x, "ab3/4", **options)
    assert loop.inputs["weights"]._version == before
    sample(net, x, "ab2/4", **options)
    assert loop.inputs["weights"]._version == before + 1


@no_fallback
def test_the_table_of_a_scale_for_every_step_is_kept(fake):
    """Numbers are looked up, not put into a new table at each call; a tensor's values cannot be."""
    net, x = Net(), torch.randn(3, 16)
    options = {"cond": {"y": torch.ones(3)}, "uncond": {"y": 0.0}}
    listed = sample(net, x, "ab2/4", guidance_scale=[1.0, 2.0, 3.0, 1.5], cuda_graph=True, **options)
    (loop,) = next(iter(graph._devices.values())).loops.values()
    before = loop.inputs["weights"]._version
    again = sample(net, x, "ab2/4", guidance_scale=(1.0, 2.0, 3.0, 1.5), cuda_graph=True, **options)
    assert loop.inputs["weights"]._version == before and torch.equal(listed, again)
    tensor = sample(net, x, "ab2/4", guidance_scale=torch.tensor([1.0, 2.0, 3.0, 1.5]), cuda_graph=True, **options)
    assert loop.inputs["weights"]._version == before + 1 and torch.equal(listed, tensor)
    sample(net, x, "ab2/4", guidance_scale=[1.0] * 4, cuda_graph=True, **options)
    assert fake.calls.count("new graph") == 2  # the unconditional branch is not run


@no_fallback
def test_captured_in_inference_mode_and_replayed_outside(fake):
    net, x, options = Net(), torch.randn(3, 16), {"cond": {"y": torch.ones(3)}}
    with torch.inference_mode():
        sample(net, x, "ab2/4", cuda_graph=True, **options)
    result = sample(net, -x, "ab2/4", cuda_graph=True, **options)
    torch.testing.assert_close(result, sample(net, -x, "ab2/4", **options))
    assert not result.requires_grad


@no_fallback
def test_bound_methods_of_one_object_are_one_model(fake):
    net, x = Net(), torch.randn(3, 16)
    for _ in range(2):
        sample(net.forward, x, "ab2/4", cond={"y": torch.ones(3)}, cuda_graph=True)
    assert fake.calls.count("new graph") == 1


@no_fallback
def test_within_a_capture_of_the_callers_the_loop_is_part_of_it(fake, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    net, x, options = Net(), torch.randn(3, 16), {"cond": {"y": torch.ones(3)}}
    result = sample(net, x, "ab2/4", cuda_graph=True, **options)
    assert torch.equal(result, sample(net, x, "ab2/4", **options)) and "new graph" not in fake.calls
