"""ComfyUI's nodes and KSampler entries on a stand-in for ComfyUI; test_comfyui_live.py runs them in its server."""

import asyncio
import os
import socket
import sys
import types
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from test_k_diffusion import dpmpp_2m, linear

from dss_fast import Flow, find_solver, handmade
from dss_fast.integrations import comfyui
from dss_fast.integrations.k_diffusion import sample_dss, sigmas_of


class CONST:
    pass


class FlowNoise(CONST):
    sigma_max = 1.0


class LinearNoise:
    sigma_max = 157.4


class StableDiffusionNoise:
    sigma_max = 14.61


class Port:
    """Stands for every input and output type of comfy_api's io."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


@pytest.fixture
def comfy(monkeypatch, tmp_path):
    """The two nodes, and what ComfyUI's modules hold after its loader asked for them."""
    io = types.SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {}),
        Schema=lambda **fields: types.SimpleNamespace(**fields),
        NodeOutput=lambda *values: types.SimpleNamespace(values=values),
        **{
            kind: types.SimpleNamespace(Input=Port, Output=Port)
            for kind in ("Model", "Int", "Float", "String", "Combo", "Boolean", "Sampler", "Sigmas")
        },
    )
    modules = {
        name: types.ModuleType(name)
        for name in ("comfy", "comfy.samplers", "comfy.k_diffusion", "comfy.k_diffusion.sampling", "folder_paths",
                     "comfy_api", "comfy_api.latest")
    }  # fmt: skip
    samplers = modules["comfy"].samplers = modules["comfy.samplers"]
    samplers.KSAMPLER = lambda function: function
    samplers.calculate_sigmas = lambda noise, scheduler, steps: torch.linspace(float(noise.sigma_max), 0, steps + 1)
    samplers.SchedulerHandler = namedtuple("SchedulerHandler", ["handler", "use_ms"], defaults=[True])
    samplers.SCHEDULER_HANDLERS, samplers.SCHEDULER_NAMES = {}, ["simple"]
    samplers.KSampler = type("KSampler", (), {"SAMPLERS": ["euler"], "SCHEDULERS": samplers.SCHEDULER_NAMES})
    modules["comfy.k_diffusion"].sampling = modules["comfy.k_diffusion.sampling"]
    latest = modules["comfy_api.latest"]
    latest.ComfyExtension, latest.io = type("ComfyExtension", (), {}), io
    modules["folder_paths"].models_dir = str(tmp_path)
    (tmp_path / "dss_fast").mkdir()
    replace(find_solver("sit-xl-2-256/6"), name="mine").save(tmp_path / "dss_fast" / "mine.json")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    async def nodes():
        return await (await comfyui.comfy_entrypoint()).get_node_list()

    return types.SimpleNamespace(
        nodes=asyncio.run(nodes()), samplers=samplers, functions=modules["comfy.k_diffusion.sampling"]
    )


def wrapped(noise):
    """A model as a sampler function sees it, and as a node's MODEL input."""

    class Guided:
        inner_model = types.SimpleNamespace(inner_model=types.SimpleNamespace(model_sampling=noise))

        def __call__(self, x, sigma, **_):
            return linear(x, sigma)

    return Guided(), types.SimpleNamespace(get_model_object=lambda name: noise)


@pytest.mark.parametrize("noise, solver", [(FlowNoise(), "sit-xl-2-256"), (LinearNoise(), "dit-xl-2-256")])
@pytest.mark.parametrize("steps, denoise", [(8, 1.0), (5, 0.5), (4, 0.8)])
def test_the_node_pair(comfy, noise, solver, steps, denoise):
    """Below denoise 1 the last steps of int(steps / denoise), as for ComfyUI's own schedulers and hand-made ones."""
    sampler_node, sigmas_node = comfy.nodes
    assert sampler_node.define_schema().node_id == "DSSSampler" and sigmas_node.define_schema().node_id == "DSSSigmas"
    guided, model = wrapped(noise)
    sampler = sampler_node.execute(solver, steps).values[0]
    sigmas = sigmas_node.execute(model, solver, steps, denoise=denoise).values[0]
    assert torch.equal(sigmas, sigmas_of(f"{solver}/{int(steps / denoise)}")[-(steps + 1) :])
    seen = []
    out = sampler(
        guided, torch.randn(2, 4) * sigmas[0], sigmas, extra_args={"seed": 1}, callback=seen.append, disable=True
    )
    assert out.isfinite().all() and len(seen) == steps
    with pytest.raises(ValueError, match="do not belong"):
        sampler(guided, torch.randn(2, 4), torch.linspace(float(sigmas[0]), 0, 9), disable=True)


def test_a_prompt_of_before_the_cfg_of_each_step_is_still_valid(comfy):
    """ComfyUI's server answers 400 to a prompt that lacks an input which is not optional, whatever its default."""
    inputs = {port.args[0]: port.kwargs for port in comfy.nodes[0].define_schema().inputs}
    assert {name for name, told in inputs.items() if not told.get("optional")} == {"solver", "steps", "file", "strict"}


def test_denoise(comfy):
    sampler_node, sigmas_node = comfy.nodes
    model = wrapped(FlowNoise())[1]
    for solver in ("sit-xl-2-256", "dpmpp_2m"):
        assert len(sigmas_node.execute(model, solver, 8, denoise=0.0).values[0]) == 0  # nothing to do, as in ComfyUI
    with pytest.raises(ValueError, match="last 8 of 16.*exists for 5, 6, 7, 8, 9, 10"):
        sigmas_node.execute(model, "sit-xl-2-256", 8, denoise=0.5)
    made = sigmas_node.execute(model, "dpmpp_2m", 8, denoise=0.5).values[0]
    assert len(made) == 9 and made[0] == pytest.approx(0.5)


@pytest.mark.parametrize("cut", [2, 5])
def test_split_sigmas(comfy, cut):
    """Wan 2.2's two networks: each samples its part, the sigmas cut in two."""
    sampler_node, sigmas_node = comfy.nodes
    guided, model = wrapped(FlowNoise())
    sigmas = sigmas_node.execute(model, "sit-xl-2-256", 8).values[0]
    sampler = sampler_node.execute("sit-xl-2-256", 8).values[0]
    states, x = [], torch.randn(2, 4)
    sampler(guided, x, sigmas, callback=lambda info: states.append(info["x"]), disable=True)
    high = sampler(guided, x, sigmas[: cut + 1], disable=True)
    torch.testing.assert_close(high, states[cut])
    assert sampler(guided, high, sigmas[cut:], disable=True).isfinite().all()


def test_nodes_refuse_another_kind_of_model(comfy):
    sampler_node, sigmas_node = comfy.nodes
    with pytest.raises(ValueError, match="for vp models"):
        sigmas_node.execute(wrapped(FlowNoise())[1], "dit-xl-2-256", 8)
    with pytest.raises(ValueError, match="noise up to 15"):
        sigmas_node.execute(wrapped(StableDiffusionNoise())[1], "dit-xl-2-256", 8)
    with pytest.raises(ValueError, match="exists for"):
        sigmas_node.execute(wrapped(LinearNoise())[1], "dit-xl-2-256", 11)
    weighted = replace(find_solver("sit-xl-2-256/8"), noise_coeffs=(0.1,) * 8)
    with pytest.raises(ValueError, match="set denoise to 1"):
        comfyui.make_sigmas(FlowNoise(), {8: weighted}, 4, 0.5)


def test_nodes_with_handmade_methods_and_files(comfy, tmp_path):
    sampler_node, sigmas_node = comfy.nodes
    guided, model = wrapped(StableDiffusionNoise())
    sigmas = sigmas_node.execute(model, "dpmpp_2m", 8, denoise=0.5).values[0]
    assert len(sigmas) == 9 and sigmas[0] == pytest.approx(14.61 / 2, rel=1e-3)
    sampler = sampler_node.execute("dpmpp_2m", 8).values[0]
    assert sampler(guided, torch.randn(2, 4), sigmas, disable=True).isfinite().all()
    path = tmp_path / "elsewhere.json"
    find_solver("sit-xl-2-256/6").save(path)
    guided, model = wrapped(FlowNoise())
    for solver, file in (("euler", str(path)), ("mine", "")):
        sampler = sampler_node.execute(solver, 6, file).values[0]
        sigmas = sigmas_node.execute(model, solver, 6, file).values[0]
        assert sampler(guided, torch.randn(2, 4), sigmas, disable=True).isfinite().all()
        with pytest.raises(ValueError, match="exists for 6 steps"):
            sigmas_node.execute(model, solver, 8, file)


def test_a_file_changed_on_disk_is_noticed(comfy, tmp_path):
    path = tmp_path / "dss_fast" / "mine.json"
    for node in comfy.nodes:
        find_solver("sit-xl-2-256/6").save(path)
        by_name, by_path = {"solver": "mine", "steps": 6}, {"solver": "euler", "steps": 6, "file": str(path)}
        before = [node.fingerprint_inputs(**inputs) for inputs in (by_name, by_path)]
        find_solver("flowdcn-b-2-256/6").save(path)
        after = [node.fingerprint_inputs(**inputs) for inputs in (by_name, by_path)]
        assert all(before) and all(a != b for a, b in zip(before, after, strict=True))
        assert node.fingerprint_inputs(solver="sit-xl-2-256", steps=6) == ""


class Shifted(FlowNoise):
    """ComfyUI's flows say sigma at a share of the time."""

    def __init__(self, shift):
        self.shift = shift

    def percent_to_sigma(self, percent):
        left = 1 - percent
        return self.shift * left / (1 + (self.shift - 1) * left)


def test_a_learned_table_follows_the_models_shift():
    tables = {8: find_solver("sit-xl-2-256/8")}
    plain, u = comfyui.make_sigmas(Shifted(1.0), tables, 8), torch.tensor(tables[8].timesteps)
    sigmas = comfyui.make_sigmas(Shifted(3.0), tables, 8)
    torch.testing.assert_close(plain, 1 - u)
    torch.testing.assert_close(sigmas, 3 * (1 - u) / (1 + 2 * (1 - u)))
    guided, _ = wrapped(Shifted(3.0))
    x = torch.randn(2, 4, dtype=torch.float64)
    ours = comfyui.make_sampler(tables)(guided, x, sigmas, disable=True)
    moved = tables[8].moved(3.0, Flow(3.0))
    torch.testing.assert_close(ours, sample_dss(guided, x, sigmas, solver=moved, family="flow", disable=True))
    assert (ours - sample_dss(guided, x, plain, solver=tables[8], family="flow", disable=True)).abs().max() > 1e-4


def test_names_mean_what_they_mean_in_the_host():
    """On a flow ComfyUI's dpmpp_2m extrapolates in -log sigma; its deis is another method, so ours is named apart."""
    names = comfyui.solver_names()
    assert {"dpmpp_2m", "unipc"} <= set(names) and not {"deis", "heun"} & set(names)
    assert {"dpmpp_2m_logsnr", "deis_logrho"} <= set(names)
    guided, _ = wrapped(FlowNoise())
    x, sigmas = torch.randn(2, 4, dtype=torch.float64), torch.linspace(1, 0, 9, dtype=torch.float64)
    wanted = dpmpp_2m(linear, x, sigmas)
    theirs = comfyui.make_sampler("dpmpp_2m")(guided, x, sigmas, disable=True)
    torch.testing.assert_close(theirs, wanted)
    other = comfyui.make_sampler("dpmpp_2m_logsnr")(guided, x, sigmas, disable=True)
    assert (other - wanted).abs().max() > 1e-3
    assert comfyui.make_sampler("deis_logrho")(guided, x, sigmas, disable=True).isfinite().all()


def test_the_ksamplers_own_lists(comfy, tmp_path):
    samplers, functions = comfy.samplers, comfy.functions
    assert {"dss_sit-xl-2-256", "dss_mine", "dss_ab2"} <= set(samplers.KSampler.SAMPLERS)
    assert set(samplers.SCHEDULER_NAMES) == {"simple", "dss_mine"} | {
        f"dss_{name}" for name in ("sit-xl-2-256", "flowdcn-b-2-256", "dit-xl-2-256", "general", "networks")
    }
    before = list(samplers.KSampler.SAMPLERS), list(samplers.SCHEDULER_NAMES)
    comfyui.add_to_ksampler(samplers, functions, tmp_path / "dss_fast")  # a reload adds nothing twice
    assert before == (samplers.KSampler.SAMPLERS, samplers.SCHEDULER_NAMES)
    guided, _ = wrapped(FlowNoise())
    for name, steps in (("dss_sit-xl-2-256", 7), ("dss_mine", 6)):
        sigmas = samplers.SCHEDULER_HANDLERS[name].handler(FlowNoise(), steps)
        sampler = getattr(functions, f"sample_{name}")
        x = torch.randn(2, 4)
        out = sampler(guided, x, sigmas, extra_args={}, callback=None, disable=True)
        assert out.isfinite().all()
        assert sampler(guided, x, sigmas[3:], disable=True).isfinite().all()
        with pytest.raises(ValueError, match="the scheduler of the same name"):
            sampler(guided, x, torch.linspace(1, 0, steps + 1), disable=True)
    assert functions.sample_dss_ab2(guided, x, torch.linspace(1, 0, 9), disable=True).isfinite().all()


def test_a_broken_file_stops_its_own_runs_only(comfy, tmp_path):
    (tmp_path / "dss_fast" / "broken.json").write_text("{")
    names = comfyui.add_to_ksampler(comfy.samplers, comfy.functions, tmp_path / "dss_fast")
    assert {"dss_broken", "dss_ab2"} <= set(names)
    with pytest.raises(ValueError, match="broken.json"):
        comfy.samplers.SCHEDULER_HANDLERS["dss_broken"].handler(FlowNoise(), 6)


@pytest.mark.parametrize("solver", ["../outside", "sub/../../outside", "../dss_fast/../outside", "absolute"])
def test_a_name_does_not_leave_the_folder(tmp_path, solver):
    folder = tmp_path / "dss_fast"
    folder.mkdir()
    find_solver("sit-xl-2-256/6").save(tmp_path / "outside.json")
    solver = str(tmp_path / "outside") if solver == "absolute" else solver
    for ask in (comfyui.fingerprint, comfyui.read_solver):
        with pytest.raises(ValueError, match="is no name of a file in .*dss_fast; give its path as file"):
            ask(solver, folder=folder)
    assert comfyui.fingerprint("euler", str(tmp_path / "outside.json"), folder) != ""  # a path is taken as it is


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes that are files")
@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling", "/dev/zero", "/dev/tty", "socket"])
def test_what_is_no_file_is_neither_offered_nor_opened(tmp_path, kind, monkeypatch):
    path = tmp_path / "odd.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # the name of a socket may not be long
        socket.socket(socket.AF_UNIX).bind("odd.json")
    else:
        path.symlink_to(tmp_path / "gone.json" if kind == "dangling" else kind)
    assert "odd" not in comfyui.solver_names(tmp_path)
    assert comfyui.fingerprint("odd", folder=tmp_path) == comfyui.fingerprint("odd", str(path), tmp_path) == ""
    with pytest.raises(ValueError, match="no solver is called 'odd'"):
        comfyui.read_solver("odd", folder=tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=r"odd\.json"):
        comfyui.read_solver("euler", str(path), tmp_path)


def test_a_file_too_large_for_a_solver_is_not_read_whole(tmp_path):
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of nothing
    for settings in (("huge", ""), ("euler", str(path))):
        for ask in (comfyui.fingerprint, comfyui.read_solver):
            with pytest.raises(ValueError, match=r"huge\.json: larger than 8 MB"):
                ask(*settings, tmp_path)


def test_import_needs_no_comfyui():
    assert "comfy" not in sys.modules and "comfy_api" not in sys.modules


def test_a_file_called_like_a_method_is_a_scheduler_too(comfy, tmp_path):
    replace(find_solver("sit-xl-2-256/6"), name="mine").save(tmp_path / "dss_fast" / "euler.json")
    assert "dss_euler" in comfyui.add_to_ksampler(comfy.samplers, comfy.functions, tmp_path / "dss_fast")
    sigmas = comfy.samplers.SCHEDULER_HANDLERS["dss_euler"].handler(FlowNoise(), 6)
    assert torch.equal(sigmas, sigmas_of("sit-xl-2-256/6")) and "dss_euler" in comfy.samplers.SCHEDULER_NAMES
    comfy.functions.sample_dss_euler(wrapped(FlowNoise())[0], torch.randn(2, 4), sigmas, disable=True)


def test_steps_say_which_table_a_part_of_the_sigmas_belongs_to(comfy):
    """Two tables may share a part of their sigmas, as SplitSigmas leaves it."""
    own = find_solver("sit-xl-2-256/6")
    grid = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    short, long = (handmade("ab2", None, Flow(), timesteps=1 - torch.cat([grid[:n], grid[-1:]])) for n in (3, 5))
    for steps in (3, 5):
        sampler = comfyui.make_sampler({3: short, 5: long, 6: own}, steps=steps)
        state = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
        out = sampler(wrapped(FlowNoise())[0], state, grid[:3], disable=True)
        wanted = sample_dss(linear, state, grid[:3], disable=True, solver={3: short, 5: long}[steps])
        assert torch.equal(out, wanted)
