"""Target: one description for sample, search and compare; sources that are not normal; what it refuses."""

import inspect
import subprocess
import sys
import textwrap
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import dss_fast
from dss_fast import VP, Flow, GaussNewton, Target, find_solver, sample, search
from dss_fast.draws import Draws
from dss_fast.names import Name, published_steps, solver_names
from dss_fast.table import StepTable
from dss_fast.trajectory import dense_grid, integrate

F64 = torch.float64
PACKAGE = str(Path(dss_fast.__file__).parent)


def model(x, t, y=None):
    flat = torch.tanh(2 * x) * (1 - t[:, None]) - 0.7 * x
    return flat if y is None else flat + 0.3 * y[:, None]


def draw(n, generator):
    return {"y": torch.randint(0, 3, (n,), generator=generator).to(F64)}


TARGET = Target(model, (4,), Flow(), cond=draw, uncond={"y": 0.0}, guidance_scale=1.5, dtype=F64)


def test_sample_takes_all_from_the_target():
    x = sample(TARGET, 3, "ab2/5", generator=torch.Generator().manual_seed(2))
    drawn = TARGET.draw(3, torch.Generator().manual_seed(2))
    by_hand = sample(
        model, drawn.noise, "ab2/5", schedule=Flow(), cond=drawn.cond, uncond={"y": 0.0}, guidance_scale=1.5
    )
    assert torch.equal(x, by_hand) and x.dtype == F64
    again = sample(TARGET, drawn.noise, "ab2/5", cond=drawn.cond)
    assert torch.equal(x, again)
    plain = sample(TARGET, drawn.noise, "ab2/5", cond=drawn.cond, guidance_scale=1.0)
    assert torch.equal(plain, sample(model, drawn.noise, "ab2/5", cond=drawn.cond))


def test_a_bare_callable_with_fields_is_a_target():
    options = dict(method=GaussNewton(samples=32, batch_size=16, space="plain"), budget=4_000, progress=False)
    given = search(Target(model, (4,), dtype=F64), 3, **options)
    assert search(model, 3, shape=(4,), dtype=F64, **options).solver == given.solver
    with pytest.raises(ValueError, match="shape of one sample is not known.*Target"):
        search(model, 3, **options)
    with pytest.raises(ValueError, match="channels=3: a Target has no such field; it has model, shape"):
        search(model, 3, shape=(4,), channels=3)
    assert len(inspect.signature(search).parameters) <= 13


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model": 3}, ("model", "int", "callable")),
        ({"shape": (0, 3)}, ("shape=(0, 3)",)),
        ({"schedule": "flow"}, ("schedule", "Flow()")),
        ({"guidance_scale": 2.0}, ("guidance_scale=2.0", "uncond")),
        ({"guidance_scale": (3.0, 1.0), "uncond": {}}, ("low and high",)),
        ({"guided_channels": 5}, ("guided_channels=5",)),
        ({"noise": 1}, ("noise", "noise(n, generator)")),
        ({"dtype": torch.int64}, ("int64", "floating")),
    ],
)
def test_what_does_not_fit_is_named(fields, words):
    with pytest.raises(ValueError) as error:
        Target(**{"model": model, "shape": (4,), **fields})
    assert all(word in str(error.value) for word in words), error.value


def test_guidance_without_its_branch_is_refused_everywhere():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="guidance_scale=5.0 needs uncond"):
        sample(model, x, "euler/2", cond={"y": torch.ones(2)}, guidance_scale=5.0)
    with pytest.raises(ValueError, match="guidance_scale=2.0 needs uncond"):
        search(model, 2, shape=(4,), cond=draw, guidance_scale=2.0)
    ranged = Target(model, (4,), cond=draw, uncond={"y": 0.0}, guidance_scale=(1.0, 2.0))
    with pytest.raises(ValueError, match="range.*give the one"):
        sample(ranged, 2, "euler/2")


def test_the_model_says_where_samples_live():
    net = nn.Linear(4, 4)
    assert Target(net).home == torch.device("cpu") and Target(model).home is None
    assert Target(net, device="meta").home == torch.device("meta")
    assert Target(nn.Linear(4, 4, device="meta")).home is None  # parameters that are not there yet do not say
    moved = Target(net, (4,), classify=nn.Linear(4, 2), features=nn.Linear(4, 3).forward).to("meta")
    assert net.weight.is_meta and moved.classify.weight.is_meta and moved.features.__self__.weight.is_meta


def test_noise_of_another_source_is_checked():
    wrong = Target(model, (4,), noise=lambda n, generator: torch.zeros(n, 3))
    with pytest.raises(ValueError, match=r"returned \(2, 3\), not \(2, 4\)"):
        sample(wrong, 2, "euler/2")


# ---- eight gaussians to two moons, exactly


def moons(count=32):
    angle = torch.linspace(0, torch.pi, count, dtype=F64)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    return torch.cat([upper, torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)]) * 2 - 1


ANGLES = torch.arange(8, dtype=F64) * torch.pi / 4
SOURCE, DATA = 5 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1), moons()
SPREAD, WIDTH = 0.3, 0.3


def velocity(x, t):
    """E[x1 - x0 | x_t = x] between both mixtures, coupled independently: every pair of centres is a gaussian."""
    t = t.to(F64)[:, None, None]
    first, last = SOURCE[:, None].expand(-1, len(DATA), -1).reshape(-1, 2), DATA.repeat(len(SOURCE), 1)
    variance = (1 - t) ** 2 * SPREAD**2 + t**2 * WIDTH**2
    offset = x[:, None] - (1 - t) * first - t * last
    weight = torch.softmax(-offset.square().sum(-1) / (2 * variance[..., 0]), 1)
    slope = (t * WIDTH**2 - (1 - t) * SPREAD**2) / variance
    return (weight[..., None] * (last - first + slope * offset)).sum(1).to(x.dtype)


def source(n, generator):
    corner = SOURCE[torch.randint(8, (n,), generator=generator)]
    return corner + SPREAD * torch.randn(n, 2, generator=generator, dtype=F64)


def test_a_search_from_eight_gaussians_to_two_moons():
    """With normal noise it would learn a region that no sample visits, where the field is no flow: it is refused."""
    target = Target(velocity, (2,), noise=source, dtype=F64)
    options = dict(method=GaussNewton(samples=192, batch_size=64), budget=30_000, progress=False)
    solvers = {
        "searched": search(target, 5, **options).solver,
        **{name: name for name in ("euler/5", "ab2/5")},
    }
    fresh = Draws.of(target, 99).batch("fresh", 0, 256)
    truth = integrate(fresh.predictor(), fresh.noise, dense_grid(Flow(), 160)).last
    error = {
        label: float((sample(target, fresh.noise, solver) - truth).square().sum(1).mean().sqrt())
        for label, solver in solvers.items()
    }
    assert error["searched"] < 0.8 * min(error["euler/5"], error["ab2/5"]), error
    with pytest.raises(ValueError, match=r"24 calls do not converge: .*, its noise or its schedule"):
        search(replace(target, noise=None), 5, **options)
    assert fresh.noise.norm(dim=1).min() > 3  # the ring of gaussians, and no normal noise


# ---- names and tables


def test_one_grammar_for_names():
    assert Name.parse("sit-xl-2-256/10") == Name("sit-xl-2-256", 10)
    assert Name.parse("dpmpp_2m@karras") == Name("dpmpp_2m", None, "karras") and Name.parse("ab2/3").handmade
    for text, words in (
        ("rk4/4", ("rk4/4", "dit-xl-2-256/{5,6,7,8,9,10}", "dpmpp_2m/N", ".json")),
        ("ab2/x", ("'x' is no number", "ab2/10")),
        ("ab2/0", ("'0' is no number",)),
        ("ab2/4@cosine", ("cosine", "karras", "shift<number>")),
        ("sit-xl-2-256/5@karras", ("own timesteps", "@karras")),
        ("sit-xl-2-256/11", ("sit-xl-2-256/11", "{5,6,7,8,9,10")),
        ("sit-xl-2-256", ("of how many steps", "5, 6, 7, 8, 9, 10", "sit-xl-2-256/10")),
        ("general@shift2", ("of how many steps", "general/12")),
    ):
        with pytest.raises(ValueError) as error:
            find_solver(text)
        assert all(word in str(error.value) for word in words), error.value
    assert len(solver_names()) == 19 + 10 + len(published_steps("networks"))
    assert find_solver("ab2", num_steps=4) is find_solver("ab2/4")


def test_a_table_is_made_once():
    first = StepTable.of(find_solver("ab2/10"), guidance=1.5)
    assert StepTable.of(find_solver("ab2/10"), guidance=1.5) is first
    assert StepTable.of(find_solver("ab2/10"), guidance=2.0) is not first
    assert StepTable.of(find_solver("ab2/10"), guidance=1.5, dtype=F64).weights.dtype == F64
    assert not first.weights.is_inference()


# ---- how far it is from a call to the work


def own_frames():
    """The package's frames between the public call and here."""
    names, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            names.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")
        frame = frame.f_back
    return names[-2::-1]


def test_a_search_is_seven_frames_from_its_model(monkeypatch):
    """But for the look at its description, once before it."""
    monkeypatch.setattr(import_module("dss_fast.searching"), "doubt", lambda *what: (0, ""))
    seen = set()

    def watching(x, t):
        seen.add(tuple(own_frames()))
        return model(x, t)

    target = Target(watching, (4,), dtype=F64)
    search(target, [2, 3], method=GaussNewton(samples=32, batch_size=16), budget=8_000, progress=False)
    longest = max(seen, key=len)
    assert 3 < len(longest) <= 7, longest


@pytest.mark.parametrize("backend", ["reference", None])
def test_a_step_of_sample_is_four_frames_from_its_launch(backend, monkeypatch):
    """None is C++ where it is built: then the op's own frame is the last one in Python."""
    from dss_fast import step
    from dss_fast.step import reference as step_reference

    seen = []
    if backend == "reference":
        original = step_reference.multistep_step_
        monkeypatch.setattr(step_reference, "multistep_step_", lambda *a: (seen.append(own_frames()), original(*a))[1])
    else:
        original = step._step_inplace
        monkeypatch.setattr(step, "_step_inplace", lambda *a: (seen.append(own_frames()), original(*a))[1])
    sample(model, torch.randn(2, 4), "ab2/3", backend=backend)
    assert len(seen) == 3 and max(map(len, seen)) <= 4, seen


# ---- what is needed


def test_sample_search_and_compare_need_no_picture_kernel_or_pipeline():
    """An environment without matplotlib, Triton, diffusers and, for the default search, lion-pytorch."""
    code = """
        import sys, warnings
        gone = {"matplotlib", "lion_pytorch", "triton", "diffusers", "jinja2"}

        class Gone:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in gone:
                    raise ModuleNotFoundError(f"{name} is not installed")

        sys.meta_path.insert(0, Gone())
        warnings.simplefilter("ignore")
        import torch
        from dss_fast import Target, compare, sample, search

        target = Target(lambda x, t: torch.tanh(2 * x) - x * t[:, None], (4,))
        result = search(target, 3, budget=9000)
        assert sample(target, 2, result.solver).shape == (2, 4)
        print(compare(target, [result.solver, "ab2/3"], samples=8))
        assert not gone & set(sys.modules), gone & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_table_of_a_shifted_pipeline_needs_no_schedule():
    schedule = Flow(convention="diffusers", shift=3.0)
    target = Target(lambda x, t: -model(x, 1 - t / 1000), (4,), schedule, dtype=F64)
    method = GaussNewton(samples=32, batch_size=16)
    solver = search(target, 4, method=method, budget=6_000, progress=False).solver
    x = torch.randn(3, 4, dtype=F64)
    assert torch.equal(sample(target.model, x, solver), sample(target.model, x, solver, schedule=schedule))
    assert solver.schedule == schedule and VP() != schedule


def test_reprs_are_short():
    net = nn.Linear(4, 4)
    target = Target(net, (4,), Flow(), cond=lambda n, g: {}, uncond={"y": torch.zeros(1000)}, guidance_scale=2.0)
    assert repr(target).startswith("Target(Linear, shape=(4,), schedule=Flow(") and "uncond={y}" in repr(target)
    assert "guidance_scale=2.0" in repr(target) and "noise" not in repr(target) and len(repr(target)) < 250
    for name in ("sit-xl-2-256/10", "ab2/100", "dit-xl-2-256/8"):
        solver = find_solver(name)
        assert name in repr(solver) and "steps" in repr(solver) and len(repr(solver)) < 200
    grid = dss_fast.Grid.flow([1.0, 0.6, 0.0], [1000.0, 600.0])
    assert "0.6" not in repr(grid) and len(repr(grid)) < 100


@pytest.mark.parametrize("way", ["model", "sequential", "group"])
def test_samples_of_an_offloaded_model_live_where_it_runs(way):
    """Its weights wait on the CPU, or nowhere; the meta device stands in for a GPU."""

    class Hook:
        execution_device, hooks = torch.device("meta"), ()

    class Chain:
        hooks = (object(), Hook())

    class Group:
        onload_device = torch.device("meta")

    class Registry:
        def get_hook(self, name):
            return type("Grouped", (), {"group": Group})() if name == "group_offloading" else None

    inner = nn.Linear(4, 4)
    hook = {"model": Hook, "sequential": Chain, "group": Registry}[way]()
    setattr(inner, "_diffusers_hook" if way == "group" else "_hf_hook", hook)
    assert Target(nn.Sequential(inner)).home == torch.device("meta")
    assert Target(nn.Sequential(inner), device="cpu").home == torch.device("cpu")
