"""SGLang and vLLM-Omni: what their loaders and registries do with a folder of ours.

Set SGLANG_TREE to a folder that holds sglang/multimodal_gen (its wheel, unpacked) to drive SGLang's own registry and
scheduler loader, and VLLM_OMNI_TREE to one that holds vllm_omni for its plug-in loader and scheduler class; the modules
around these, which want a GPU, are stood in for.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from dss_fast import find_solver  # noqa: E402
from dss_fast.integrations.diffusers import DSSScheduler  # noqa: E402
from helpers.diffusers_runs import run  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
ROOT = Path(__file__).parents[2]
SGLANG = Path(os.environ.get("SGLANG_TREE", "")) / "sglang" / "multimodal_gen" / "runtime"
OMNI = Path(os.environ.get("VLLM_OMNI_TREE", "")) / "vllm_omni"
FLOW, UNIPC = diffusers.FlowMatchEulerDiscreteScheduler, diffusers.UniPCMultistepScheduler
CONFIGS = {
    "shift_terminal": FLOW(shift=3.0, shift_terminal=0.02, use_dynamic_shifting=True),
    "shift": FLOW(shift=3.0, max_image_seq_len=8192),
    "flow_shift": UNIPC(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0),
}


def entry_point(group):
    with (ROOT / "pyproject.toml").open("rb") as file:
        points = tomllib.load(file)["project"]["entry-points"][group]
    return importlib.metadata.EntryPoint("dss", points["dss"], group).load()


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    """The scheduler of a model's folder, with a table in it and a method for other numbers of steps."""
    table = find_solver("sit-xl-2-256/7")
    DSSScheduler.from_config(CONFIGS[request.param], solver=[table, "dpmpp_2m"]).save_pretrained(tmp_path / "scheduler")
    return tmp_path


def same(one, two):
    mu = {"mu": 0.7} if two.config.use_dynamic_shifting else {}
    for n in (7, 5):
        assert torch.equal(run(one, n, **mu), run(two, n, **mu))
    assert one.solver.name == two.solver.name and one.config.get("shift_terminal") == two.config.get("shift_terminal")


def test_the_class_is_made_of_a_whole_config(folder):
    """As SGLang makes it: cls(**config), tables, shift_terminal and all."""
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    config.pop("_class_name")
    same(DSSScheduler(**config), DSSScheduler.from_pretrained(folder / "scheduler"))
    with pytest.raises(TypeError, match="shft=3: no scheduler"):
        DSSScheduler(shft=3)


@pytest.fixture
def plugin():
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    before = SchedulerMixin.__dict__["from_pretrained"]
    register = entry_point("vllm_omni.general_plugins")
    yield register
    SchedulerMixin.from_pretrained = before


def test_vllm_omnis_native_pipelines_load_what_the_folder_names(folder, plugin, tmp_path):
    """They say FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")."""
    for _ in range(2):  # plug-ins may be loaded more than once
        plugin()
    loaded = FLOW.from_pretrained(str(folder), subfolder="scheduler", local_files_only=True)
    assert type(loaded) is DSSScheduler
    same(loaded, DSSScheduler.from_pretrained(folder / "scheduler"))
    FLOW(shift=2.0).save_pretrained(tmp_path / "stock")
    stock = FLOW.from_pretrained(tmp_path / "stock")
    assert type(stock) is FLOW and stock.config.shift == 2.0
    for kind, where in ((DSSScheduler, folder / "scheduler"), (FLOW, tmp_path / "stock")):
        loaded, unused = FLOW.from_pretrained(where, return_unused_kwargs=True, foo=3)
        assert type(loaded) is kind and unused["foo"] == 3


@pytest.mark.skipif(
    not (OMNI / "plugins" / "__init__.py").is_file(), reason="set VLLM_OMNI_TREE to a folder that holds vllm_omni"
)
def test_vllm_omnis_own_plugin_loader_and_scheduler_class(monkeypatch, folder, plugin):
    vllm = {"vllm": {}, "vllm.envs": {"VLLM_PLUGINS": None}, "vllm.plugins": {"load_general_plugins": lambda: None}}
    for name, attributes in vllm.items():
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[name].__dict__.update(attributes)
    sys.modules["vllm"].envs = sys.modules["vllm.envs"]
    at = OMNI / "diffusion" / "models" / "schedulers" / "scheduling_flow_match_euler_discrete.py"
    theirs = loaded_from(monkeypatch, "omni_flow_match", at).FlowMatchEulerDiscreteScheduler
    plugins = loaded_from(monkeypatch, "omni_plugins", OMNI / "plugins" / "__init__.py")
    group = plugins.OMNI_DEFAULT_PLUGINS_GROUP
    points = [importlib.metadata.EntryPoint("dss", f"{plugin.__module__}:register", group)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == points[0].group else [])
    plugins.load_omni_general_plugins()
    for kind in (theirs, FLOW):
        loaded = kind.from_pretrained(str(folder), subfolder="scheduler", local_files_only=True)
        same(loaded, DSSScheduler.from_pretrained(folder / "scheduler"))
    theirs(shift=2.0).save_pretrained(folder / "stock")
    assert type(theirs.from_pretrained(folder / "stock")) is theirs


class Registry:
    """What the entry point asks of SGLang's registry."""

    registered_models: dict = {}

    @classmethod
    def register_model(cls, name, model):
        cls.registered_models[name] = model


def test_sglangs_registry_is_told_once(monkeypatch):
    module = types.ModuleType("sglang.multimodal_gen.runtime.models.registry")
    module.ModelRegistry = Registry
    for name in (
        "sglang",
        "sglang.multimodal_gen",
        "sglang.multimodal_gen.runtime",
        "sglang.multimodal_gen.runtime.models",
    ):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    register = entry_point("sglang.multimodal_gen.plugins")
    register()
    register()
    package, _, name = Registry.registered_models["DSSScheduler"].partition(":")
    assert getattr(importlib.import_module(package), name) is DSSScheduler


def loaded_from_sglang(monkeypatch, name, path, **around):
    """A module of SGLang's, with others in place of those it imports."""
    for other, attributes in around.items():
        module = types.ModuleType(other.replace("__", "."))
        module.__dict__.update(attributes)
        parts = module.__name__.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[:i]) not in sys.modules:
                monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return loaded_from(monkeypatch, name, path)


def loaded_from(monkeypatch, name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not SGLANG.is_dir(), reason="set SGLANG_TREE to a folder that holds sglang/multimodal_gen")
def test_sglangs_own_registry_and_loader_load_the_folder(monkeypatch, folder):
    base, said = "sglang__multimodal_gen__runtime__", types.SimpleNamespace(warning=print, info=print, debug=print)
    logging = {f"{base}utils__logging_utils": {"init_logger": lambda name: said}}
    registry = loaded_from_sglang(
        monkeypatch, "sglang.multimodal_gen.runtime.models.registry", SGLANG / "models" / "registry.py",
        **{f"{base}platforms": {"current_platform": types.SimpleNamespace(verify_model_arch=lambda arch: None)}},
        **{f"{base}utils__external_model_package": {"load_external_model_package": lambda: None}}, **logging,
    )  # fmt: skip
    entry_point("sglang.multimodal_gen.plugins")()
    assert "DSSScheduler" in registry.ModelRegistry.registered_models

    def config_of(component_path):
        return json.loads((Path(component_path) / "scheduler_config.json").read_text())

    loader = loaded_from_sglang(
        monkeypatch, "sglang_scheduler_loader", SGLANG / "loader" / "component_loaders" / "scheduler_loader.py",
        **{
            f"{base}loader__component_loaders__component_loader": {"ComponentLoader": object},
            f"{base}server_args": {"ServerArgs": object},
            f"{base}utils__hf_diffusers_utils": {"get_diffusers_component_config": config_of},
        },
        **logging,
    )  # fmt: skip
    told = types.SimpleNamespace(pipeline_config=types.SimpleNamespace(flow_shift=None, scheduler_class_override=None))
    scheduler = loader.SchedulerLoader().load_customized(str(folder / "scheduler"), told)
    same(scheduler, DSSScheduler.from_pretrained(folder / "scheduler"))
    told.pipeline_config.flow_shift = 7.0
    assert loader.SchedulerLoader().load_customized(str(folder / "scheduler"), told).shift == 7.0
