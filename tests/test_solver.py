"""The table: what it refuses, what it writes and reads, and the published ones against the authors' code."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import torch

from dss_fast import VP, DiscreteVP, Flow, Grid, Solver, find_solver, handmade, sample, solver_names

pytestmark = pytest.mark.fast
PARITY = json.loads((Path(__file__).parent / "data" / "parity.json").read_text())
GOOD = {"timesteps": (0, 0.25, 1), "coeffs": ((1, 0), (-0.5, 1.5)), "schedule": Flow()}


@pytest.mark.parametrize("family, name, end", [(f, n, e) for f in ("flow", "vp") for n, e in PARITY[f]["end"].items()])
def test_published_tables_reach_the_authors_end_states(family, name, end):
    matrix, bias, x, end = (
        torch.tensor(v, dtype=torch.float64) for v in (PARITY["M"], PARITY["b"], PARITY["x_init"], end)
    )

    def field(x, t):
        return 0.8 * torch.tanh(x @ matrix.T + t[:, None] * bias) + 0.2 * x

    schedule = Flow(convention="diffusers", time_scale=1.0) if family == "flow" else VP(time_scale=1.0)
    ours = sample(field, x, name, schedule=schedule)
    assert float((ours - end).norm() / end.norm()) < 1e-6


@pytest.mark.parametrize("name", solver_names())
def test_every_published_table_loads_and_runs(name):
    solver = find_solver(name)
    assert solver.num_steps == int(name.split("/")[1]) and solver.source and solver.schedule in (Flow(), VP())
    x = torch.randn(2, 3, dtype=torch.float64)
    model = (lambda x, t: -x) if solver.family == "flow" else (lambda x, t: x / 2)
    assert sample(model, x, solver).isfinite().all()


def test_published_increments_are_those_of_a_softmax():
    """Lion moved the raws by 0.01, so each log ratio of increments is an even multiple of 0.01 (to print)."""
    for name in (name for name in solver_names() if not name.startswith(("general", "networks"))):
        deltas = torch.tensor(find_solver(name).timedeltas, dtype=torch.float64)
        logs = (deltas / deltas[-1]).log() / 0.02
        rounding = 5e-5 * (1 / deltas + 1 / deltas[-1]) / 0.02
        assert ((logs - logs.round()).abs() <= rounding + 1e-9).all(), name


def test_value_semantics():
    solver = Solver(**GOOD, name="a")
    assert solver == Solver(**GOOD, name="b") and hash(solver) == hash(Solver(**GOOD))
    assert solver != Solver(**{**GOOD, "timesteps": (0, 0.3, 1)}) and solver.num_steps == 2
    assert solver.timedeltas == (0.25, 0.75)
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.schedule = VP()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"timesteps": (0.1, 0.5, 1)}, ("timesteps", "0.1")),
        ({"timesteps": (0, 0.5, 0.9)}, ("timesteps", "0.9")),
        ({"timesteps": (0, 0.5, 0.5, 1)}, ("timesteps", "strictly", "0.5")),
        ({"timesteps": (0, float("nan"), 1)}, ("timesteps[1]", "finite")),
        ({"timesteps": (1,)}, ("timesteps", "at least 2")),
        ({"timesteps": "01"}, ("timesteps", "list of numbers")),
        ({"coeffs": ((1, 0),)}, ("coeffs", "2 rows")),
        ({"coeffs": ((1,), (-0.5, 1.5))}, ("coeffs[0]", "2 numbers")),
        ({"coeffs": ((0.9, 0.1), (-0.5, 1.5))}, ("coeffs[0][1]", "later")),
        ({"coeffs": ((1, 0), (-0.5, 1.4))}, ("coeffs[1]", "sum to 1", "0.89")),
        ({"coeffs": ((1, 0), (float("inf"), 1.5))}, ("coeffs[1][0]", "finite")),
        ({"coeffs": ((1, 0), (True, 0.0))}, ("coeffs[1][0]", "number", "True")),
        ({"coeffs": 3}, ("coeffs", "int")),
        ({"schedule": "ve"}, ("schedule", "ve", "Flow()")),
        ({"name": 3}, ("name", "3")),
        ({"provenance": []}, ("provenance",)),
        ({"noise_coeffs": (1,)}, ("noise_coeffs", "2 numbers")),
        ({"network_timesteps": (0, 1.5)}, ("network_timesteps", "1.5")),
        ({"free_rows": 1}, ("free_rows", "1")),
    ],
)
def test_construction_names_the_field_at_fault(change, words):
    with pytest.raises(ValueError) as error:
        Solver(**{**GOOD, **change})
    assert all(word in str(error.value) for word in words), error.value


def test_from_timedeltas():
    solver = Solver.from_timedeltas([1, 2, 1], [[], [0.5], [-0.25, 0.5]], Flow())
    assert solver.timesteps == (0, 0.25, 0.75, 1)
    assert solver.coeffs == ((1, 0, 0), (0.5, 0.5, 0), (-0.25, 0.5, 0.75))
    with pytest.raises(ValueError, match="timedeltas.*above 0"):
        Solver.from_timedeltas([1, -1], [[], [0]], Flow())
    with pytest.raises(ValueError, match=r"lower\[1\]: need 1 numbers, got 2"):
        Solver.from_timedeltas([1, 1], [[], [0, 0]], Flow())


EXTENDED = Solver(
    (0, 0.3, 1),
    ((0.9, 0), (-0.1, 1.3)),
    VP(t_start=1.0, t_end=1e-4),
    name="extended",
    provenance={"seed": 3},
    noise_coeffs=(0.1, -0.2),
    network_timesteps=(0.01, 0.35),
    free_rows=True,
)


@pytest.mark.parametrize(
    "solver",
    [EXTENDED, handmade("unip3", 7, VP(), spacing="karras"), *map(find_solver, solver_names())],
    ids=lambda s: s.name,
)
def test_json_round_trip_is_bit_exact(solver, tmp_path):
    solver.save(tmp_path / "s.json")
    again = Solver.load(tmp_path / "s.json")
    assert again == solver and again.to_dict() == solver.to_dict()
    assert list(tmp_path.iterdir()) == [tmp_path / "s.json"]


def edited(**changes):
    data = EXTENDED.to_dict()
    for key, value in changes.items():
        if value is None:
            del data[key]
        else:
            data[key] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    "text, words",
    [
        (edited()[:200], ("truncated",)),
        ("", ("truncated",)),
        ("[1, 2]", ("object", "list")),
        ('{"format": "onnx"}', ("format", "onnx")),
        (edited(version=3), ("version=3", "versions 1 and 2")),
        (edited(schedule={"kind": "ve"}), ("schedule.kind", "ve", "discrete_vp")),
        (edited(schedule={"kind": "flow", "shft": 3}), ("schedule.shft", "unknown", "shift")),
        (edited(schedule={"kind": "vp", "beta_min": 9, "beta_max": 2}), ("schedule.beta_min",)),
        (edited(timesteps=None), ("timesteps: missing",)),
        (edited(extra=1), ("extra: unknown",)),
        (edited(num_steps=3), ("num_steps=3", "2 rows")),
        (edited(timesteps=[0, "x", 1]), ("timesteps[1]", "'x'")),
        (edited(coeffs=[[0.9], [1.3]]), ("coeffs[1]", "2 numbers")),
        (edited(coeffs=[[0.9], None]), ("coeffs[1]", "NoneType")),
        (edited(coeffs={"a": 1}), ("coeffs", "dict")),
        (edited(free_rows=False), ("coeffs[0]", "sum to 1")),
        (edited().replace("0.3,", "NaN,"), ("timesteps[1]", "finite")),
        (b"\xff\xfe\x00", ("not text",)),
    ],
)
def test_a_broken_file_is_refused_with_its_name_and_the_field(text, words, tmp_path):
    path = tmp_path / "broken.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        Solver.load(path)
    assert "broken.json" in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "s.json"
    EXTENDED.save(path)
    before = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        handmade("euler", 3).save(path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["sit-xl-2-256/11", "resnet/5"])
def test_unknown_names_list_those_that_exist(name):
    with pytest.raises(ValueError) as error:
        find_solver(name)
    assert name in str(error.value) and "dit-xl-2-256/{5,6,7,8,9,10}" in str(error.value)


VERSION1 = Path(__file__).parent / "data" / "version1"


def quadratic(x, t):
    """A velocity of products and sums alone, which are the same bits on every processor."""
    return 0.5 * x * (t[:, None] - 1.5) + 0.25 * (t * t)[:, None] * x.roll(1, 1)


WRITTEN_BEFORE = {
    "flow-full": (quadratic, Flow()),
    "flow-diffusers-shift3": (lambda x, t: -quadratic(x, 1 - t / 1000), Flow(convention="diffusers", shift=3.0)),
    "vp-full": (lambda x, t: 0.75 * x + (t / 1024)[:, None] * 0.25 * x.roll(1, 1), VP()),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", WRITTEN_BEFORE)
def test_a_table_of_version_1_gives_the_bits_it_gave_when_it_was_written(name, dtype):
    """Files and end points of release 7ab4fe3; the schedule was then given by hand and is now read from the file."""
    model, schedule = WRITTEN_BEFORE[name]
    ends = json.loads((VERSION1 / "ends.json").read_text())[name][str(dtype).split(".")[1]]
    solver = Solver.load(VERSION1 / f"{name}.json")
    assert solver.schedule == schedule
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(3, 4).to(dtype)
    found = sample(model, x, solver, backend="reference")
    assert [[v.hex() for v in row] for row in found.double().tolist()] == ends
    again = Solver.from_dict(json.loads(json.dumps(solver.to_dict())))
    assert torch.equal(sample(model, x, again, schedule=schedule, backend="reference"), found)


def first_version(schedule, family="vp"):
    """A file of version 1 with a schedule as its provenance named it."""
    data = handmade("euler", 2, VP() if family == "vp" else Flow()).to_dict()
    del data["schedule"]
    return {**data, "version": 1, "family": family, "provenance": {"schedule": schedule}}


def test_version_1_names_its_schedule():
    named = {"kind": "discrete_vp", "num": 1000, "final": "sigma_min", "prediction_type": "v_prediction"}
    known = DiscreteVP.scaled_linear(final="sigma_min", prediction_type="v_prediction")
    ends = [known.alphas_cumprod[0], known.alphas_cumprod[-1]]
    found = Solver.from_dict(first_version({**named, "name": "scaled_linear", "ends": ends}))
    assert found.schedule == known
    assert Solver.from_dict(first_version(None, "flow")).schedule == Flow()
    other = first_version({**named, "name": "scaled_linear", "ends": [0.99, 0.1]})
    with pytest.raises(ValueError, match="only names this schedule.*schedule=DiscreteVP"):
        Solver.from_dict(other)
    assert Solver.from_dict(other, DiscreteVP.cosine()).schedule == DiscreteVP.cosine()
    with pytest.raises(ValueError, match="only names this schedule"):
        Solver.from_dict(first_version({"kind": "grid", "family": "vp", "sigmas": [2.0, 1.0, 0.0]}))


def test_the_schedule_is_part_of_the_value():
    plain = handmade("ab2", 4)
    assert dataclasses.replace(plain, schedule=Flow(shift=3.0)) != plain == dataclasses.replace(plain, schedule=Flow())
    assert handmade("euler", 4, VP(t_start=1.0, t_end=1e-4)) != handmade("euler", 4, VP())
    assert plain.on(None) is plain.schedule and plain.family == "flow"


def test_another_interface_runs_and_another_path_is_refused():
    """The first alpha or sigma that differs is named; strict=False goes on."""
    x = torch.randn(3, 4, dtype=torch.float64)
    solver = handmade("ab2", 4, Flow())
    spoken = Flow(convention="diffusers")
    theirs = sample(lambda x, t: -quadratic(x, 1 - t / 1000), x, solver, schedule=spoken)
    torch.testing.assert_close(theirs, sample(quadratic, x, solver))
    bent = Grid.flow([1.0, 0.9, 0.5, 0.25, 0.0], [1000.0, 900.0, 500.0, 250.0])
    with pytest.raises(ValueError, match=r"alpha at u = 0.25 is 0.25 there and 0.1 here.*strict=False"):
        sample(quadratic, x, solver, schedule=bent)
    assert sample(quadratic, x, solver, schedule=bent, strict=False).isfinite().all()
    with pytest.raises(ValueError, match="for flow models, the schedule is vp"):
        sample(quadratic, x, solver, schedule=VP(), strict=False)
    grid = Grid.flow([1.0, 0.75, 0.5, 0.25, 0.0], [1000.0, 750.0, 500.0, 250.0])
    on_grid = sample(lambda x, t: -quadratic(x, 1 - t / 1000), x, solver, schedule=grid)
    torch.testing.assert_close(on_grid, theirs)


def written(path, **changes):
    """A solver's file with some values exchanged, as text, without its checksum."""
    data = Solver(**GOOD, name="mine").to_dict() | changes
    path.write_text(re.sub('"RAW(.*?)RAW"', lambda raw: raw[1].replace('\\"', '"'), json.dumps(data)))
    return path


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"timesteps": [0, 10**400, 1]}, ("timesteps[1]", "float64")),
        ({"timesteps": [0, "RAW1e999RAW", 1]}, ("timesteps[1]", "float64")),
        ({"coeffs": [[1], [2**53 + 1, -(2**53)]]}, ("coeffs[1][0]", "9007199254740993", "no float64")),
        ({"num_steps": 5.0}, ("num_steps=5.0",)),
        ({"num_steps": 2.0}, ("num_steps=2.0", "whole")),
        ({"version": True}, ("version=True",)),
        ({"provenance": "RAW" + '{"a":' * 40 + "1" + "}" * 40 + "RAW"}, ("provenance.a", "deeper")),
        ({"provenance": {"x": float("nan")}}, ("provenance.x", "finite")),
        ({"provenance": {"x": [1, float("-inf")]}}, ("provenance.x[1]", "finite")),
        ({"name": "RAW" + '"a", "name": "b"' + "RAW"}, ("name", "twice")),
        ({"schedule": "RAW" + '{"kind": "flow", "kind": "vp"}' + "RAW"}, ("kind", "twice")),
        ({"source": 7, "name": "x" * 1_000_000}, ("source", "7")),
        ({"name": ["x" * 5_000_000]}, ("name", " ... ")),
        ({"schedule": {"kind": "discrete_vp", "name": {}, "alphas_cumprod": [0.9, 0.5]}}, ("schedule",)),
        ({"schedule": {"kind": "flow", "shift": 1e308 * 10}}, ("schedule.shift", "finite")),
        ({"coeffs": "RAW" + "[" * 100_000 + "]" * 100_000 + "RAW"}, ("deeper",)),
        ({"name": "x" * 9_000_000}, ("larger than 8 MB",)),
    ],
    ids=range(17),
)
def test_a_file_is_a_solver_or_a_short_error_that_names_file_and_field(tmp_path, changes, words):
    path = written(tmp_path / "odd.json", **changes)
    with pytest.raises(ValueError) as caught:
        Solver.load(path)
    text = str(caught.value)
    assert len(text) < 500 and "odd.json" in text and all(word in text for word in words), text


def test_a_file_written_by_hand_needs_no_checksum(tmp_path):
    assert Solver.load(written(tmp_path / "mine.json")) == Solver(**GOOD)
