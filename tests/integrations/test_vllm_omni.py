"""vLLM-Omni's contract for an injected scheduler, as its registry states it, asked of the entry point's class.

Set VLLM_OMNI_TREE to a checkout that has vllm_omni/diffusion/models/schedulers/registry.py to let the registry itself
find and build it.
"""

import copy
import importlib.metadata
import importlib.util
import inspect
import os
import tomllib
import types
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:use_dynamic_shifting")
from dss_fast import find_solver  # noqa: E402
from dss_fast.integrations.diffusers import DSSScheduler  # noqa: E402
from helpers.diffusers_runs import network, noise, run  # noqa: E402

GROUP = "vllm_omni.schedulers"
ROOT = Path(__file__).parents[2]
REGISTRY = (
    Path(os.environ.get("VLLM_OMNI_TREE", "")) / "vllm_omni" / "diffusion" / "models" / "schedulers" / "registry.py"
)
CONFIGS = {
    "FLUX": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    "SD3": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "Wan 2.2": diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0
    ),
}


@pytest.fixture(params=CONFIGS)
def model(request, tmp_path):
    """A model's folder, with the scheduler that it was published with."""
    CONFIGS[request.param].save_pretrained(tmp_path / "scheduler")
    return tmp_path


def entry_point():
    """The class that the package advertises, read off its metadata's source, which an old install may lack."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        points = tomllib.load(file)["project"]["entry-points"][GROUP]
    assert list(points) == ["dss"]
    return importlib.metadata.EntryPoint("dss", points["dss"], GROUP).load()


def built(model, solver="sit-xl-2-256", **told):
    """As the registry builds an injected class: constructor overrides beside what the pipeline has resolved."""
    return entry_point().from_pretrained(
        str(model), subfolder="scheduler", local_files_only=True, revision=None, solver=solver, **told
    )


def test_it_is_built_from_a_models_folder(model, tmp_path):
    assert entry_point() is DSSScheduler
    find_solver("sit-xl-2-256/7").save(tmp_path / "mine.json")
    for solver, n in (("sit-xl-2-256", 8), (str(tmp_path / "mine.json"), 7)):
        scheduler = built(model, solver)
        assert scheduler.config.num_train_timesteps == 1000
        scheduler.set_timesteps(n, device="cpu")
        own = find_solver(f"sit-xl-2-256/{n}")  # which follows the shift of the folder
        shift = scheduler.schedule.shift
        followed = own if shift == 1 else own.moved(shift, scheduler.schedule)
        assert scheduler.solver.coeffs == followed.coeffs and len(scheduler.timesteps) == n


def test_the_contract(model):
    scheduler = built(model)
    parameters = inspect.signature(scheduler.set_timesteps).parameters
    assert {"num_inference_steps", "device", "sigmas", "timesteps"} <= set(parameters)
    assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values())
    scheduler.set_timesteps(
        sigmas=[1 - i / 8 for i in range(8)], device="cpu", mu=0.9
    )  # what retrieve_timesteps passes
    scheduler.set_begin_index(0)
    x, net = noise(), network()
    for t in scheduler.timesteps:
        stepped = scheduler.step(net(x, t), t, x, return_dict=False)
        assert isinstance(stepped, tuple) and stepped[0].shape == x.shape
        x = stepped[0]
    assert torch.equal(x, run(built(model), 8, mu=0.9))
    generator = torch.Generator().manual_seed(0)
    assert isinstance(scheduler.step(x, scheduler.timesteps[0], x, return_dict=False, generator=generator), tuple)


def test_requests_step_by_step_on_copies_of_one_scheduler(model):
    """Step-wise execution copies the scheduler for each request, also one under way, and mixes their steps."""
    shared = built(model)
    starts, net = [noise(), 0.5 * noise(), -noise()], network()
    copies = [copy.deepcopy(shared) for _ in starts]
    for n, scheduler in zip((5, 8, 5), copies, strict=True):
        scheduler.set_timesteps(n)
    states = list(starts)
    for i in range(8):
        if i == 3:
            copies = copy.deepcopy(copies)
        for k, scheduler in enumerate(copies):
            if i < len(scheduler.timesteps):
                t = scheduler.timesteps[i]
                states[k] = scheduler.step(net(states[k], t), t, states[k], return_dict=False)[0]
    for x, n, start in zip(states, (5, 8, 5), starts, strict=True):
        assert torch.equal(x, run(built(model), n, start))


def test_a_slice_of_the_timesteps_starts_at_its_index(model):
    """Pipeline-parallel ranks begin part-way."""
    scheduler, net = built(model), network()
    wanted = run(built(model), 8, start=3)
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(3)
    x = noise()
    for t in scheduler.timesteps[3:].clone():
        x = scheduler.step(net(x, t), t, x, return_dict=False)[0]
    assert torch.equal(x, wanted)


@pytest.mark.skipif(not REGISTRY.is_file(), reason="set VLLM_OMNI_TREE to a checkout of vllm-project/vllm-omni")
def test_its_own_registry_builds_it(model, monkeypatch):
    spec = importlib.util.spec_from_file_location("vllm_omni_registry", REGISTRY)
    registry = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(registry)
    point = types.SimpleNamespace(name="dss", load=entry_point)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == GROUP else [])
    config = types.SimpleNamespace(model=str(model), scheduler="dss", scheduler_kwargs={"solver": "sit-xl-2-256"})
    scheduler = registry.build_pipeline_scheduler(config)
    assert torch.equal(run(scheduler, 8), run(built(model), 8))
    config.scheduler = "dss_fast.integrations.diffusers.DSSScheduler"
    assert type(registry.build_pipeline_scheduler(config)) is DSSScheduler
