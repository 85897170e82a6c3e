"""pytest benchmarks/ --benchmark runs them; without the flag they are collected and skipped."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks and append to benchmarks/results/")


def pytest_collect_file(file_path, parent):
    named = parent.session.isinitpath(file_path)  # pytest collects a file named on the command line by itself
    if file_path.suffix == ".py" and file_path.name.startswith("bench_") and not named:
        return pytest.Module.from_parent(parent, path=file_path)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--benchmark"):
        for item in items:
            if item.path.name.startswith("bench_"):
                item.add_marker(pytest.mark.skip(reason="a benchmark; give --benchmark to run it"))
