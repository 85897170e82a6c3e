"""pytest benchmarks/ --benchmark: a group of pytest-benchmark's for each cell, a benchmark for each way.

    pytest benchmarks/ --benchmark                    # the usual shapes, a few minutes; with --full all of them
    pytest benchmarks/ --benchmark -k loop --benchmark-json=loop.json       # and -autosave, -compare, -histogram
    pytest benchmarks/ --benchmark --full --rows      # rows appended under benchmarks/results/, for its README

Without --benchmark they are collected and skipped. Without --rows nothing in the tree changes.
"""

import os

# A thread that waits sleeps, as in the Makefile: where others share the cores spinning made ways of two threads ten
# times slower than they are. OpenMP reads it when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

from benchmarks.turns import measured, timer, turns  # noqa: E402, F401  # fixtures

SHOWN = {"columns": ["min", "median", "iqr", "rounds"], "sort": "min"}  # the least is what others disturb least


def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks and print their tables")
    parser.addoption("--full", action="store_true", help="with --benchmark: all shapes, steps and models")
    parser.addoption("--rows", action="store_true", help="with --benchmark: append rows under benchmarks/results/")


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config):
    config.addinivalue_line("markers", "full: a cell much like another, or one that takes long; --full runs it")
    given = [str(argument) for argument in config.invocation_params.args]
    for name, value in SHOWN.items():
        if not any(argument.startswith(f"--benchmark-{name}") for argument in given):
            setattr(config.option, f"benchmark_{name}", value)


def pytest_collect_file(file_path, parent):
    named = parent.session.isinitpath(file_path)  # pytest collects a file named on the command line by itself
    if file_path.suffix == ".py" and file_path.name.startswith("bench_") and not named:
        return pytest.Module.from_parent(parent, path=file_path)


def pytest_collection_modifyitems(config, items):
    benchmarks = [item for item in items if item.path.name.startswith("bench_")]
    for item in benchmarks:
        item.add_marker(pytest.mark.benchmark(timer=timer))
        if not config.getoption("--benchmark"):
            item.add_marker(pytest.mark.skip(reason="a benchmark; give --benchmark to run it"))
    if config.getoption("--benchmark") and not config.getoption("--full"):
        left = [item for item in benchmarks if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]
