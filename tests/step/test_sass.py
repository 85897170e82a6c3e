"""The machine code of the kernels for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import trees

pytestmark = pytest.mark.xdist_group("sass")  # one process compiles the kernels, which takes half a minute
ROOT = Path(__file__).parents[2]
# A Python that has another version of Triton, 3.6 say, and any torch that goes with it.
OTHER = os.environ.get("DSS_FAST_TRITON_PYTHON")


def rows_of(python):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment |= {"DSS_FAST_NO_EXTENSION": "1"}  # which is built for this torch alone
    run = subprocess.run([python, "-m", "helpers.sass"], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module", params=["installed", "other"])
def rows(request):
    if not sys.platform.startswith("linux"):
        pytest.skip("triton ships its assembler for Linux")
    if request.param == "installed":
        pytest.importorskip("triton")
        return rows_of(sys.executable)
    if OTHER is None:
        pytest.skip("DSS_FAST_TRITON_PYTHON names no Python with another version of Triton")
    found = rows_of(OTHER)
    print("triton", found[0]["triton"])
    return found


def test_every_kernel_is_there(rows):
    assert {r["arch"] for r in rows} == {"sm_80", "sm_90"}
    assert {r["kernel"] for r in rows} == {"step", "update", "backward", "pull"}


def test_no_spills_and_few_registers(rows):
    for row in rows:
        assert row["spills"] == row["stack"] == row["local"] == 0, row
        # 128 threads a block and 65,536 registers: at 128 each, four blocks still fit a multiprocessor.
        assert row["registers"] <= (row["limit"] or (168 if "fp64" in row["dtypes"] else 96)), row


def test_every_access_is_wide(rows):
    for row in rows:
        for count in ("loads_128", "stores_128"):
            assert row[count] == row["expected"][count], (count, row)


def test_the_same_sums_in_every_variant(rows):
    """The assembler fuses what the compiler wrote as fused, and nothing else."""
    for row in rows:
        for count in ("fused", "products", "sums"):
            assert row[count] == row["expected"].get(count, row[count]), (count, row)


def test_the_same_products_are_fused_in_every_variant(rows):
    """In every element that is stored: the step and its list form, alone and in a batch, give the same bits."""
    for row in rows:
        found = {name: set(elements) for name, elements in row["stored"].items()}
        assert found == formulas(row["kernel"], row["flags"].split()), (row["kernel"], row["arch"], row["dtypes"])


def formulas(kernel, flags):
    """What the elements of each result are, as `helpers.trees` writes it: factors in the alphabet's order."""
    difference = "sub(output, output)"
    m = fused("g", difference, "output") if "PAIR" in flags else "output"

    def outputs(grad):
        return {product("g", grad), product(grad, "sub(1, g)")} if "PAIR" in flags else {grad}

    y = fused(m, "q", "mul(p, x)")
    if kernel in ("step", "update"):
        total = fused("history", "w", fused(y, "w", "mul(a, x)"))
        return {"out": {total, "x"}, "history": {y}} if kernel == "step" else {"next": {total}, "y": {y}}
    if kernel == "pull":
        pulled = fused("adjoints", "w", product("adjoints", "w"))
        return {"dx": {fused(pulled, "p", "mul(a, adjoints)")}, "doutput": outputs(product(pulled, "q"))}
    own = fused("grad", "w", "grad_y") if "OWN" in flags else "mul(grad, w)"
    sums = {product(one, two) for one, two in (("x", "grad"), ("x", own), (m, own), (y, "grad"), ("history", "grad"))}
    if "PAIR" in flags:
        sums.add(product(product(difference, own), "q"))
    dx = fused(own, "p", "mul(a, grad)")
    return {"dx": {dx}, "doutput": outputs(product(own, "q")), "dhistory": {"mul(grad, w)"}, "sums": sums}


def product(one, two):
    return trees.written("mul", one, two)


def fused(one, two, rest):
    return trees.written("fma", one, two, rest)


def test_the_slots_of_a_trip_are_under_way_together(rows):
    """In program order: ptxas has not put the use of one slot's load before the load of the next.

    For sm_80 Triton 3.9 spends registers on addresses and gets five to eight of the nine slots under way.
    """
    for row in rows:
        if "fp64" not in row["dtypes"]:
            wanted = row["expected"]["at_least_under_way"]
            assert row["under_way"] >= (wanted if row["arch"] == "sm_90" else wanted * 5 / 9), row
