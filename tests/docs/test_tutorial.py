"""The tutorial runs as printed, block after block, and what it says about the result is so."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from dss_fast import sample
from dss_fast.__main__ import _parser
from examples.mnist import flow
from helpers.pages import ROOT, blocks, run

PAGE = "docs/tutorial.md"


def test_the_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    pytest.importorskip("matplotlib", reason="the plots extra")
    monkeypatch.chdir(tmp_path)
    threads, names = torch.get_num_threads(), {"__name__": "__main__"}
    try:
        for code in blocks(PAGE):
            run(PAGE, names, code)
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    for n in (5, 10):
        (verdict,) = [verdict for verdict in names["table"].verdicts if verdict.num_steps == n]
        assert verdict.word == "Yes" and verdict.ratio < 0.7 and verdict.tried == 112, said
    assert "model evaluations, in out/digits" in said and "of 40 digits are read as what was asked for" in said
    kept = {path.name for path in (tmp_path / "out" / "digits").iterdir()}
    assert {"solver-5.json", "solver-10.json", "report.md", "stages.png", "log.jsonl", "compare.png"} <= kept
    assert names["mine"] == names["result"].solvers[5]


def test_the_guidance_that_the_page_names_runs():
    given = re.findall(r"`(uncond=.+?)`", (ROOT / PAGE).read_text(encoding="utf-8").replace("\n", " "))
    assert given
    for text in given:
        target = replace(flow(), **eval(f"dict({text})"))
        assert target.guided and sample(target, 2, "euler/2").isfinite().all()


def test_the_commands_are_understood():
    lines = [line for block in blocks(PAGE, "") for line in block.splitlines() if "-m dss_fast" in line]
    assert len(lines) == 3
    for line in lines:
        assert callable(_parser().parse_args(line.split()[3:]).run)


def test_the_module_of_the_shell_commands_is_the_first_two_blocks(tmp_path):
    """Compiled and imported up to its training, which the other test runs."""
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    source = "\n".join(blocks(PAGE)[:2]).replace("steps = DigitFlow(), 1500", "steps = DigitFlow(), 5")
    (tmp_path / "my_flow.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "dss_fast", "sample", "my_flow:target", "--solver", "ab2/4", "-n", "4"]
    found = subprocess.run(
        [*command, "-o", "digits.safetensors"], cwd=tmp_path, env=_environment(), capture_output=True
    )
    assert found.returncode == 0, found.stderr.decode()
    assert (tmp_path / "digits.safetensors").exists()


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}
