"""Requests that share a batch get what they would have got alone."""

import threading
import time
import weakref

import numpy as np
import pytest
import torch

from dss_fast import Flow, handmade, sample
from dss_fast.serving import Batch

pytestmark = pytest.mark.fast
SHAPE = (3, 5)
ONE = torch.ones(1)


def model(x, t):
    return torch.sin(x * 1.5 + t[:, None, None]) - 0.3 * x


@pytest.mark.parametrize("guided", [False, True])
def test_requests_of_different_solvers_equal_sample(guided):
    """Admitted at different ticks, of 5, 8 and 10 steps, more requests than places."""
    torch.manual_seed(0)
    waiting = [(torch.randn(SHAPE), name) for name in ("sit-xl-2-256/5", "ab2/8", "sit-xl-2-256/10", "ab3/5", "ab2/10")]
    scale = 1.5 if guided else 1.0

    def pair(x, t):
        return torch.cat([model(0.5 * x, t), model(x, t)])

    def alone(x, t, half):
        return model(x * half.reshape(-1, 1, 1), t)

    expected = []
    for noise, name in waiting:
        extra = {"uncond": {"half": torch.tensor(0.5)}, "guidance_scale": scale} if guided else {}
        expected.append(sample(alone, noise[None], name, cond={"half": torch.ones(1)}, **extra)[0])

    batch, requests, results = Batch(3, SHAPE, max_steps=10), {}, {}
    queue, tick = list(enumerate(waiting)), 0
    while queue or batch.running:
        if queue and batch.free and tick % 2 == 0:
            number, (noise, name) = queue.pop(0)
            requests[batch.admit(noise, name, guidance_scale=scale)] = number
        output = (pair if guided else model)(batch.x, batch.times())
        for place in batch.step(output):
            results[requests.pop(place)] = batch.retire(place)
        tick += 1
    assert sorted(results) == list(range(5))
    for number, result in results.items():
        torch.testing.assert_close(result, expected[number], rtol=1e-6, atol=1e-6)


def test_company_does_not_change_a_bit():
    """The same request alone in the batch and among others; the model sees rows independently."""
    torch.manual_seed(1)
    noise, others = torch.randn(SHAPE), torch.randn(3, *SHAPE)
    results = []
    for company in (False, True):
        batch = Batch(4, SHAPE, max_steps=10)
        batch.admit(noise, "ab2/8")
        for other in others if company else ():
            batch.admit(other, "sit-xl-2-256/5")
        while batch.running:
            finished = batch.step(model(batch.x, batch.times()))
            results += [batch.retire(place) for place in finished if place == 0]
    assert torch.equal(*results)


def test_a_free_place_may_hold_anything():
    batch = Batch(2, SHAPE, max_steps=5)
    place = batch.admit(torch.ones(SHAPE), "sit-xl-2-256/5")
    other = 1 - place
    batch.x[other] = float("nan")
    while batch.running:
        batch.step(model(batch.x, batch.times()))
    assert batch.retire(place).isfinite().all() and batch.x[other].isnan().all()


def test_a_model_with_parameters_needs_no_context():
    batch, net = Batch(1, SHAPE, max_steps=5), torch.nn.Linear(5, 5)
    place = batch.admit(torch.ones(SHAPE), "ab2/5")
    while batch.running:
        batch.step(net(batch.x))
    assert not batch.retire(place).requires_grad


def test_errors():
    batch = Batch(2, SHAPE, max_steps=5)
    batch.admit(torch.zeros(SHAPE), "ab2/5")  # the first one says what model this is
    with pytest.raises(ValueError, match="for vp models, the schedule is flow"):
        batch.admit(torch.zeros(SHAPE), "dit-xl-2-256/5")
    with pytest.raises(ValueError, match="another noise schedule: alpha at u = 0.25"):
        batch.admit(torch.zeros(SHAPE), handmade("ab2", 4, Flow(shift=3.0)))
    batch = Batch(1, SHAPE, max_steps=5)
    with pytest.raises(ValueError, match="takes 10 steps.*5"):
        batch.admit(torch.zeros(SHAPE), "ab2/10")
    with pytest.raises(ValueError, match=r"noise has shape \(3,\)"):
        batch.admit(torch.zeros(3), "ab2/5")
    with pytest.raises(ValueError, match="place 0 holds no request"):
        batch.retire(0)
    batch.admit(torch.zeros(SHAPE), "ab2/5")
    with pytest.raises(RuntimeError, match="all 1 places"):
        batch.admit(torch.zeros(SHAPE), "ab2/5")


def labelled(x, t, y):
    return torch.sin(x * 1.5 + t[:, None, None]) - 0.3 * x * y[:, None, None]


def test_conditions_go_with_their_places():
    torch.manual_seed(2)
    batch = Batch(3, SHAPE, max_steps=8, cond={"y": torch.zeros(3)})
    noises, wanted, results = torch.randn(7, *SHAPE), {}, {}
    queue = list(range(7))
    while queue or batch.running:
        while queue and batch.free:
            number = queue.pop()
            wanted[batch.admit(noises[number], f"ab2/{4 + number % 5}", cond={"y": number / 7})] = number
        for place in batch.tick(labelled):
            results[wanted[place]] = batch.retire(place)
    for number, result in results.items():
        y = torch.tensor([number / 7])
        alone = sample(labelled, noises[number : number + 1], f"ab2/{4 + number % 5}", cond={"y": y})[0]
        assert torch.equal(result, alone)
    for cond, words in (({}, "rows of"), ({"z": 1.0}, "rows of"), ({"y": torch.ones(2)}, r"shape \(2,\), not \(\)")):
        with pytest.raises(ValueError, match=words):
            batch.admit(noises[0], "ab2/4", cond=cond)
    with pytest.raises(ValueError, match="a row for each of 3 places"):
        Batch(3, SHAPE, max_steps=8, cond={"y": torch.zeros(2)})


def test_a_model_that_fails_has_changed_nothing():
    batch = Batch(2, SHAPE, max_steps=5)
    place = batch.admit(torch.ones(SHAPE), "ab2/5")

    def fails(x, t):
        raise RuntimeError("out of memory")

    while batch.running:
        before = batch.x.clone(), batch.index.clone()
        with pytest.raises(RuntimeError, match="out of memory"):
            batch.tick(fails)
        assert torch.equal(batch.x, before[0]) and torch.equal(batch.index, before[1])
        batch.tick(model)
    assert torch.equal(batch.retire(place), sample(model, torch.ones(1, *SHAPE), "ab2/5")[0])
    batch.admit(torch.ones(SHAPE), "ab2/5")
    with pytest.raises(ValueError, match="writes into x"):
        batch.tick(lambda x, t: x.mul_(2))


@pytest.mark.parametrize("what", ["cond", "noise", "the batch's own"])
def test_a_request_with_a_graph_leaves_none_in_the_batch(what):
    own = torch.zeros(2, 4, requires_grad=what == "the batch's own")
    batch, gone = Batch(2, SHAPE, max_steps=3, cond={"e": own * 1}), []
    for _ in range(6):
        weight = torch.ones(4, requires_grad=True)
        row, noise = torch.zeros(4), torch.randn(SHAPE)
        row, noise = (weight * 2 if what == "cond" else row), (noise * weight[0] if what == "noise" else noise)
        gone.append(weakref.ref(weight))
        place = batch.admit(noise, "ab2/3", cond={"e": row})
        del weight, row, noise
        while batch.running:
            batch.tick(lambda x, t, e: x + e.sum(1)[:, None, None])
        assert not batch.retire(place).requires_grad
    tensors = (batch.x, batch.history, batch.weights, *batch.cond.values())
    assert all(t.grad_fn is None and not t.requires_grad for t in tensors)
    assert not [weight for weight in gone if weight() is not None]


def test_a_batch_made_in_inference_mode_runs_outside_it():
    with torch.inference_mode():
        batch = Batch(1, SHAPE, max_steps=4, cond={"y": torch.zeros(1)})
        place = batch.admit(torch.ones(SHAPE), "ab2/4", cond={"y": torch.tensor(0.5)})
        batch.tick(labelled)
    while batch.running:
        batch.tick(labelled)
    assert torch.equal(batch.retire(place), sample(labelled, torch.ones(1, *SHAPE), "ab2/4", cond={"y": 0.5 * ONE})[0])


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("write", [
    lambda y: y.mul_(2), lambda y: y.__setitem__(0, 7), lambda y: y[1:].zero_(), lambda y: torch.add(y, 1, out=y),
])  # fmt: skip
def test_a_model_that_writes_into_a_condition_is_noticed(write, inference):
    def model(x, t, y):
        write(y)
        return x

    batch = Batch(2, SHAPE, max_steps=4, cond={"y": torch.zeros(2)})
    batch.admit(torch.ones(SHAPE), "ab2/4", cond={"y": 1.0})
    with torch.inference_mode(inference), pytest.raises(ValueError, match=r"writes into y.*y\.clone\(\)"):
        batch.tick(model)


@pytest.mark.parametrize("scale", [1.5, 0, (2.0, 1.0, 1.0), [0.5, 1, 1], torch.tensor([3.0, 1.0, 1.0])])
def test_a_guidance_scale_needs_a_pair(scale):
    batch = Batch(2, SHAPE, max_steps=5)
    other = batch.admit(torch.zeros(SHAPE), "ab2/5")
    place = batch.admit(torch.ones(SHAPE), "ab2/3", guidance_scale=scale)
    before = batch.x.clone()
    with pytest.raises(ValueError, match=r"returned 2 rows.*guided pair, 4 rows"):
        batch.tick(model)
    assert torch.equal(batch.x, before) and batch.running == [other, place]
    while place in batch.running:
        batch.tick(lambda x, t: torch.cat([model(0.5 * x, t), model(x, t)]))
    while batch.running:
        batch.tick(model)  # the guided one is finished
    guided = {"cond": {"half": ONE}, "uncond": {"half": torch.tensor(0.5)}, "guidance_scale": scale}
    alone = sample(lambda x, t, half: model(x * half.reshape(-1, 1, 1), t), torch.ones(1, *SHAPE), "ab2/3", **guided)
    torch.testing.assert_close(batch.retire(place), alone[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), (1.0, float("-inf"), 1.0)])
def test_an_infinite_guidance_scale_is_refused(scale):
    batch = Batch(1, SHAPE, max_steps=3)
    with pytest.raises(ValueError, match="guidance_scale=.*finite"):
        batch.admit(torch.ones(SHAPE), "ab2/3", guidance_scale=scale)
    assert batch.free == [0]


@pytest.mark.parametrize("solver", ["ab2/4", "sit-xl-2-256/5"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_request_whose_output_is_no_number_fails_alone(value, at, solver):
    torch.manual_seed(3)
    noises, ticks = torch.randn(3, *SHAPE), []
    batch = Batch(2, SHAPE, max_steps=6)
    sound, ill = batch.admit(noises[0], "ab2/6"), batch.admit(noises[1], solver)

    def unwell(x, t):
        output = model(x, t)
        if len(ticks) == at:
            output[ill, 0, 0] = value
        ticks.append(1)
        return output

    finished = [batch.tick(unwell) for _ in range(at + 1)]
    assert finished == [[]] * at + [[ill]] and batch.running == [sound]
    with pytest.raises(FloatingPointError, match=rf"place {ill} has failed.*NaN or Inf after step {at} of"):
        batch.retire(ill)
    again = batch.admit(noises[2], "sit-xl-2-256/6")  # its history was full of NaN
    assert again == ill
    while batch.running:
        batch.tick(model)
    for place, noise, name in ((sound, noises[0], "ab2/6"), (again, noises[2], "sit-xl-2-256/6")):
        assert torch.equal(batch.retire(place), sample(model, noise[None], name)[0])


def test_numbers_are_looked_at_only_where_asked():
    batch = Batch(1, SHAPE, max_steps=3, check_finite=False)
    place = batch.admit(torch.full(SHAPE, float("nan")), "ab2/3")
    while batch.running:
        batch.tick(model)
    assert batch.retire(place).isnan().all()
    batch = Batch(1, SHAPE, max_steps=3)
    place = batch.admit(torch.full(SHAPE, float("nan")), "ab2/3")
    assert batch.step(model(batch.x, batch.times())) == [place]
    with pytest.raises(ValueError, match="dtype torch.int64"):
        Batch(1, SHAPE, max_steps=3).admit(torch.zeros(SHAPE, dtype=torch.long), "ab2/3")


LOSSES = [
    (torch.long, 207.9), (torch.long, torch.tensor(207.9)), (torch.long, np.float32(0.5)), (torch.long, float("nan")),
    (torch.bool, 2), (torch.uint8, 300), (torch.uint8, -1), (torch.float32, 2**24 + 1), (torch.bfloat16, 257),
    (torch.float32, torch.tensor(2**40 + 1)), (torch.float16, torch.tensor(0.1)), (torch.int32, 2**40),
    (torch.float32, torch.tensor(0.1, dtype=torch.float64)), (torch.float32, np.array(0.1)),
    (torch.float32, torch.tensor(1 + 2j)), (torch.long, "cat"), (torch.long, 2**70), (torch.long, None),
]  # fmt: skip


@pytest.mark.parametrize("dtype, value", LOSSES)
def test_a_condition_that_the_batch_cannot_hold_is_refused(dtype, value):
    batch = Batch(1, SHAPE, max_steps=3, cond={"y": torch.zeros(1, dtype=dtype)})
    with pytest.raises(ValueError, match=r"cond\['y'\]"):
        batch.admit(torch.ones(SHAPE), "ab2/3", cond={"y": value})
    assert batch.free == [0] and not batch.cond["y"].any()


HELD = [
    (torch.long, 207), (torch.long, 207.0), (torch.long, torch.tensor(207.0)), (torch.long, True),
    (torch.long, torch.tensor(7, dtype=torch.int32)), (torch.bool, 1), (torch.bool, torch.tensor(True)),
    (torch.float32, 0.1), (torch.float64, 0.1), (torch.float16, 0.1), (torch.float32, 2**24), (torch.float32, 3),
    (torch.float64, torch.tensor(0.1)), (torch.float32, float("nan")), (torch.float64, torch.tensor(float("nan"))),
    (torch.bfloat16, torch.tensor(256)),
]  # fmt: skip


@pytest.mark.parametrize("dtype, value", HELD)
def test_a_condition_that_the_batch_can_hold_is_exact(dtype, value):
    batch = Batch(1, SHAPE, max_steps=3, cond={"y": torch.zeros(1, dtype=dtype)})
    batch.admit(torch.ones(SHAPE), "ab2/3", cond={"y": value})
    torch.testing.assert_close(batch.cond["y"][0], torch.as_tensor(value, dtype=dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_tick_is_compiled_once(whole):
    import torch._dynamo

    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    batch = Batch(3, SHAPE, max_steps=6)
    if whole:
        tick = torch.compile(lambda: batch.step(model(batch.x, batch.times())), backend=backend)
    else:
        part = torch.compile(lambda: batch.advance(model(batch.x, batch.times())), backend=backend, fullgraph=True)
        tick = lambda: (part(), batch.count())[1]  # noqa: E731
    noises, found, after_two = torch.randn(5, *SHAPE), {}, None
    for number in range(16):
        if number in (0, 1, 3, 7, 9):
            where = batch.admit(noises[len(found)], f"ab2/{3 + len(found) % 3}")
            found[len(found)] = where
        for place in tick():
            batch.retire(place)
        after_two = len(graphs) if number == 1 else after_two
    assert len(graphs) == after_two <= 2 and not batch.running


def test_requests_come_from_several_threads():
    batch, wanted, lock = Batch(4, SHAPE, max_steps=6), {}, threading.Lock()
    noises, results, stop = torch.randn(4, 10, *SHAPE), {}, threading.Event()

    def client(number):
        for k in range(10):
            while True:
                try:
                    with lock:
                        wanted[batch.admit(noises[number, k], "ab2/6")] = number, k
                    break
                except RuntimeError:
                    time.sleep(0.001)

    def server():
        while not stop.is_set() or batch.running:
            for place in batch.tick(model):
                with lock:
                    results[wanted.pop(place)] = batch.retire(place)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(4)]
    serving = threading.Thread(target=server)
    for thread in (serving, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    stop.set()
    serving.join(60)
    assert len(results) == 40
    for (number, k), result in results.items():
        assert torch.equal(result, sample(model, noises[number, k][None], "ab2/6")[0])


def writes(x, t, y):
    x.mul_(2)
    return model(x, t)


def by_data(x, t, y):
    y.data.mul_(2)
    return model(x, t)


def writes_and_fails(x, t, y):
    x.mul_(2)
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("bad, name", [(writes, "x"), (by_data, "y"), (writes_and_fails, "x")])
def test_a_state_that_a_model_has_spoiled_is_not_gone_on_from(bad, name):
    """Its requests fail by name, whether the model raised or was refused, and the next one at their place is right."""
    batch, noise = Batch(2, SHAPE, 6, cond={"y": torch.zeros(2)}), torch.randn(SHAPE)
    place = batch.admit(noise, "ab2/4", cond={"y": 1.0})
    with pytest.raises(ValueError, match=f"writes into {name}"):
        batch.tick(bad)
    assert not batch.running and batch.free == [1]
    with pytest.raises(FloatingPointError, match=f"place {place} has failed: the model writes into {name}"):
        batch.retire(place)
    place = batch.admit(noise, "ab2/4", cond={"y": 1.0})
    while batch.running:
        batch.tick(lambda x, t, y: (model(x, t), "more"))  # the first of a tuple, as everywhere
    torch.testing.assert_close(batch.retire(place), sample(model, noise[None], "ab2/4")[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("returned", [None, [1], (), "x", torch.ones(2, 4), torch.ones(2, 3, 5).long(), torch.ones(())])
def test_an_output_that_is_none_changes_nothing_and_is_named(returned):
    batch = Batch(2, SHAPE, 6)
    batch.admit(torch.randn(SHAPE), "ab2/4")
    before = batch.x.clone()
    with pytest.raises(ValueError, match=r"the model returned .*must return floats of shape \(2, 3, 5\)"):
        batch.tick(lambda x, t: returned)
    assert torch.equal(batch.x, before) and batch.running == [0]


@pytest.mark.parametrize("scale", ["2", None, {}, [1.0, "2", 1.0, 1.0]])
def test_a_guidance_scale_that_is_no_number_is_named(scale):
    with pytest.raises(ValueError, match=r"guidance_scale=.*give a number"):
        Batch(2, SHAPE, 6).admit(torch.randn(SHAPE), "ab2/4", guidance_scale=scale)


def test_a_float_that_the_rows_cannot_hold_is_refused():
    batch = Batch(2, SHAPE, 6, cond={"y": torch.zeros(2, dtype=torch.float16)})
    with pytest.raises(ValueError, match=r"cond\['y'\]=70000.0 is more than .*float16 hold, 65504"):
        batch.admit(torch.randn(SHAPE), "ab2/4", cond={"y": 70000.0})
    assert not batch.running
    assert batch.admit(torch.randn(SHAPE), "ab2/4", cond={"y": float("inf")}) == 0  # as asked
