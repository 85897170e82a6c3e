"""Requests that share a batch get what they would have got alone."""

import threading
import time

import pytest
import torch

from dss_fast import Flow, handmade, sample
from dss_fast.serving import Batch

pytestmark = pytest.mark.fast
SHAPE = (3, 5)


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
