"""The blocks of docs/stack.md run as printed, one after the other, and do what the text beside them says."""

import re
import shutil

import pytest
import torch

from dss_fast import sample
from dss_fast.__main__ import _parser
from helpers.pages import ROOT, blocks, run

PAGE = "docs/stack.md"
NEEDS = {"integrations.diffusers": ("diffusers", "transformers"), "examples.mnist": ("safetensors",)}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def test_the_blocks_run_in_order(tmp_path, monkeypatch):
    for package in sorted({name for names in NEEDS.values() for name in names}):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names, seen = {"__name__": "__main__"}, []
    for code in blocks(PAGE):
        if "torch.compile" in code and shutil.which("c++") is None and shutil.which("g++") is None:
            continue
        with torch.random.fork_rng():
            run(PAGE, names, code)
        for mark, check in CHECKS.items():
            if mark in code:
                check(names)
                seen.append(mark)
    assert len(seen) >= len(CHECKS) - 1


def from_pipeline(names):
    assert names["mine"].provenance["request"]["guidance_scale"] == 4.0
    assert names["pipe"].scheduler.solver.num_steps == 4 and len(names["images"]) == 1


def k_diffusion(names):
    own = sample(names["target"], names["noise"], "sit-xl-2-256/8", cond=names["asked"])
    assert torch.allclose(names["x"], own, atol=1e-4)


def batch(names):
    assert sorted(label for label, _ in names["done"]) == [0, 2, 5, 7, 9]
    assert all(x.shape == (1, 28, 28) and x.isfinite().all() for _, x in names["done"])


def loop(names):
    asked = {"cond": names["asked"], "uncond": {"y": 10}, "guidance_scale": 2.0}
    assert torch.equal(names["x"], sample(names["model"], names["noise"], "sit-xl-2-256/8", **asked))


def update(names):
    own = sample(names["target"], names["noise"], "ab2/2", cond=names["asked"])
    assert torch.allclose(names["rollout"](names["noise"], names["asked"]["y"]), own, atol=1e-6)
    assert names["start"].grad.abs().sum() > 0


def compiled(names):
    own = names["rollout"](names["noise"], names["asked"]["y"])
    assert torch.allclose(names["x"], own, atol=1e-4)


def graph(names):
    own = sample(names["target"], names["noise"], "sit-xl-2-256/10", cond=names["asked"])
    assert torch.allclose(names["x"], own, atol=1e-5)


CHECKS = {
    "from_pipeline(": from_pipeline,
    "sample_dss(": k_diffusion,
    "Batch(": batch,
    "guidance_table(": loop,
    "def rollout": update,
    "torch.compile(": compiled,
    "cuda_graph=True": graph,
}


def test_the_commands_are_understood():
    lines = re.findall(r"^(?:torchrun .*?|python )-m dss_fast (.*)$", (ROOT / PAGE).read_text(), re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        assert callable(_parser().parse_args(line.split()).run)
