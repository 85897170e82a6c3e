"""A real ComfyUI server: our nodes and KSampler entries through /prompt, beside its own samplers.

Set COMFYUI_TREE to a checkout of ComfyUI and COMFYUI_PYTHON to a Python that has its requirements; skipped otherwise.
test_comfyui.py asks the same of a stand-in. The MODEL is a small random network in ComfyUI's own BaseModel.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from dss_fast import find_solver

TREE = Path(os.environ.get("COMFYUI_TREE", ""))
ROOT = Path(__file__).parents[2]
if not (TREE / "main.py").is_file():
    pytest.skip("set COMFYUI_TREE to a checkout of ComfyUI, COMFYUI_PYTHON to its Python", allow_module_level=True)
load_file = pytest.importorskip("safetensors.torch").load_file

TINY = """
import torch
import comfy.conds, comfy.model_base, comfy.model_patcher, comfy.supported_models_base

class Net(torch.nn.Module):
    dtype = torch.float32
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Conv2d(4, 4, 3, padding=1)
    def forward(self, x, t, context=None, **_):
        return torch.tanh(self.mix(x)) + context.mean() * torch.sin(t.view(-1, 1, 1, 1) / 300) + 0.5 * x

class Tiny:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (["FLOW", "EPS"],)}}
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CONDITIONING", "CONDITIONING"), "make", "test"
    def make(self, kind):
        config = comfy.supported_models_base.BASE({"disable_unet_model_creation": True})
        config.latent_format = comfy.supported_models_base.latent_formats.SD15()
        config.sampling_settings = {"shift": 3.0} if kind == "FLOW" else {}
        class Model(comfy.model_base.BaseModel):
            def extra_conds(self, **kwargs):
                return {"c_crossattn": comfy.conds.CONDRegular(kwargs["cross_attn"])}
        model = Model(config, comfy.model_base.ModelType[kind])
        model.diffusion_model = Net()
        cpu = torch.device("cpu")
        patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
        return patcher, [[torch.full((1, 1, 1), 0.7), {}]], [[torch.full((1, 1, 1), -0.2), {}]]

NODE_CLASS_MAPPINGS = {"Tiny": Tiny}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    for name, code in (
        ("tiny", TINY),
        ("dss_fast", "from dss_fast.integrations.comfyui import comfy_entrypoint\n"),
    ):
        (base / "custom_nodes" / name).mkdir(parents=True)
        (base / "custom_nodes" / name / "__init__.py").write_text(code)
    (base / "models" / "dss_fast").mkdir(parents=True)
    find_solver("sit-xl-2-256/6").save(base / "models" / "dss_fast" / "mine.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), "main.py", "--cpu", "--port", str(port)]
    log = (base / "log").open("w")
    process = subprocess.Popen(
        [*command, "--base-directory", str(base), "--disable-auto-launch"],
        cwd=TREE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=log,
        stderr=subprocess.STDOUT,
    )

    def call(path, data=None):
        body = None if data is None else json.dumps(data).encode()
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{port}{path}", body), timeout=10
        ) as reply:
            return json.loads(reply.read())

    def wait(ready, seconds):
        for _ in range(seconds * 4):
            assert process.poll() is None, (base / "log").read_text()[-2000:]
            try:
                found = ready()
            except OSError:
                found = None
            if found:
                return found
            time.sleep(0.25)
        raise TimeoutError((base / "log").read_text()[-2000:])

    def run(graph):
        """The latents that a graph saves, or the message of the node that failed."""
        name = call("/prompt", {"prompt": graph})["prompt_id"]
        done = wait(lambda: call(f"/history/{name}").get(name), 60)
        for kind, data in done["status"]["messages"]:
            if kind == "execution_error":
                return data["exception_message"]
        file = next(iter(done["outputs"].values()))["latents"][0]
        return load_file(base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]

    try:
        wait(lambda: call("/system_stats"), 180)
        run.info, run.models = call("/object_info"), base / "models" / "dss_fast"
        yield run
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def graph(kind, **sampling):
    return {
        "model": {"class_type": "Tiny", "inputs": {"kind": kind}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 2}},
        **sampling,
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "x"}},
    }


BOTH = {"model": ["model", 0], "positive": ["model", 1], "negative": ["model", 2], "cfg": 3.0}


def ksampler(kind, sampler, scheduler="simple", steps=8, **options):
    inputs = {**BOTH, "seed": 7, "steps": steps, "denoise": 1.0, "latent_image": ["latent", 0]}
    inputs |= {"sampler_name": sampler, "scheduler": scheduler, **options}
    return graph(kind, sample={"class_type": "KSampler", "inputs": inputs})


def custom(kind, sampler, sigmas, **more):
    inputs = {**BOTH, "add_noise": True, "noise_seed": 7, "latent_image": ["latent", 0]}
    inputs |= {"sampler": ["sampler", 0], "sigmas": ["sigmas", 0]}
    return graph(kind, sampler=sampler, sigmas=sigmas, sample={"class_type": "SamplerCustom", "inputs": inputs}, **more)


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def close(a, b):
    assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor), (a, b)
    assert a.abs().max() > 0.1 and (a - b).abs().max() <= 1e-6 * b.abs().max(), float(
        (a - b).abs().max() / b.abs().max()
    )


@pytest.mark.parametrize("kind", ["FLOW", "EPS"])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_ksampler_entries_equal_the_hosts_own(server, kind, name, denoise):
    theirs = server(ksampler(kind, name, denoise=denoise))
    close(server(ksampler(kind, f"dss_{name}", denoise=denoise)), theirs)


@pytest.mark.parametrize("kind", ["FLOW", "EPS"])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_the_nodes_equal_the_hosts_own(server, kind, name):
    own = server(
        custom(
            kind,
            node("KSamplerSelect", sampler_name=name),
            node("BasicScheduler", model=["model", 0], scheduler="simple", steps=8, denoise=0.7),
        )
    )
    settings = {"solver": name, "steps": 8, "file": ""}
    ours = custom(
        kind,
        node("DSSSampler", **settings, strict=True),
        node("DSSSigmas", model=["model", 0], **settings, denoise=0.7),
    )
    close(server(ours), own)


def test_a_learned_table_by_nodes_by_ksampler_and_in_two_parts(server):
    settings = {"solver": "sit-xl-2-256", "steps": 8, "file": ""}
    sampler = node("DSSSampler", **settings, strict=True)
    sigmas = node("DSSSigmas", model=["model", 0], **settings, denoise=1.0)
    by_nodes = server(custom("FLOW", sampler, sigmas))
    name = "dss_sit-xl-2-256"
    close(server(ksampler("FLOW", name, name)), by_nodes)

    advanced = {**BOTH, "noise_seed": 7, "steps": 8, "sampler_name": name, "scheduler": name}
    high = node("KSamplerAdvanced", **advanced, add_noise="enable", latent_image=["latent", 0], start_at_step=0,
                end_at_step=3, return_with_leftover_noise="enable")  # fmt: skip
    low = node("KSamplerAdvanced", **advanced, add_noise="disable", latent_image=["high", 0], start_at_step=3,
               end_at_step=8, return_with_leftover_noise="disable")  # fmt: skip
    parts = server(graph("FLOW", high=high, sample=low))
    split = {
        "all": sigmas,
        "high": node("SamplerCustom", **{**BOTH, "add_noise": True, "noise_seed": 7, "latent_image": ["latent", 0]},
                     sampler=["sampler", 0], sigmas=["cut", 0]),
        "cut": node("SplitSigmas", sigmas=["all", 0], step=3),
        "sampler": sampler,
        "sample": node("SamplerCustom", **{**BOTH, "add_noise": False, "noise_seed": 7, "latent_image": ["high", 0]},
                       sampler=["sampler", 0], sigmas=["cut", 1]),
    }  # fmt: skip
    close(server(graph("FLOW", **split)), parts)
    assert (parts - by_nodes).abs().max() < 0.5 * by_nodes.abs().max()  # the second part begins without a history


def test_what_does_not_fit_stops_with_the_reason(server):
    name = "dss_sit-xl-2-256"
    assert "do not belong" in server(ksampler("FLOW", name, "simple"))
    assert "for flow models" in server(ksampler("EPS", name, name))
    assert "last 16 of 16, and solver sit-xl-2-256 exists for 5, 6" in server(ksampler("FLOW", name, name, denoise=0.5))
    assert "leftover noise" in server(
        graph(
            "FLOW",
            sample=node(
                "KSamplerAdvanced",
                **BOTH,
                noise_seed=7,
                steps=8,
                sampler_name=name,
                scheduler=name,
                add_noise="enable",
                latent_image=["latent", 0],
                start_at_step=0,
                end_at_step=3,
                return_with_leftover_noise="disable",
            ),
        )  # fmt: skip
    )


def test_denoise_zero_and_files(server):
    settings = {"solver": "mine", "steps": 6, "file": ""}
    sampler = node("DSSSampler", **settings, strict=True)
    nothing = server(custom("FLOW", sampler, node("DSSSigmas", model=["model", 0], **settings, denoise=0.0)))
    assert isinstance(nothing, torch.Tensor) and not nothing.any()  # the empty latent, untouched
    whole = custom("FLOW", sampler, node("DSSSigmas", model=["model", 0], **settings, denoise=1.0))
    before = server(whole)
    close(server(ksampler("FLOW", "dss_mine", "dss_mine", steps=6)), before)
    find_solver("flowdcn-b-2-256/6").save(server.models / "mine.json")
    after = server(whole)  # the same prompt: only the file has changed
    assert (after - before).abs().max() > 1e-4
    assert "dss_ab4" in server.info["KSampler"]["input"]["required"]["sampler_name"][0]
