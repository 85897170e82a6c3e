"""The command line, as a user types it."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch

from dss_fast import SearchResult, Solver, compare, find_solver, progress, sample
from dss_fast.__main__ import _parser, load_target, main
from dss_fast.files import read_tensors

TARGET = """
import torch
from dss_fast import VP, Target

def velocity(x, t, y):
    return torch.tanh(y[:, None] - x * (1 + t[:, None]))

def draw(n, generator):
    return {"y": torch.randint(0, 2, (n,), generator=generator).float()}

constant = Target(velocity, (6,), cond=draw)

def target():
    return constant

def twin():
    return Target(lambda x, t, y: velocity(1.2 * x, t, y), (6,), cond=draw)

def noisy():
    return Target(velocity, (6,), VP(), cond=draw)

def pictures():
    return {"model": velocity, "shape": (6,), "cond": draw, "decode": lambda x: x.sigmoid().reshape(-1, 1, 2, 3)}

def empty():
    return Target(velocity, cond=draw)

def number():
    return 5

def takes(size):
    return target

net = torch.nn.Linear(6, 6)
"""


def saved(folder):
    find_solver("ab2/3").save(folder / "plain.json")
    return folder / "plain.json"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mymodel.py").write_text(TARGET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mymodel", None)
    return tmp_path


def test_search_sample_compare_show(folder, capsys):
    pytest.importorskip("matplotlib", reason="the plots extra, in requirements.txt")
    arguments = "search mymodel:target --steps 3,4 --method lion --samples 320 -o runs"
    assert main(arguments.split()) == 0
    solver = Solver.load(folder / "runs" / "solver-3.json")
    assert solver.num_steps == 3 and solver.provenance["method"] == "lion"
    assert main("compare mymodel:constant runs/solver-3.json euler ab2 --steps 3 --samples 32 -o cmp".split()) == 0
    saved = json.loads((folder / "cmp" / "compare.json").read_text())
    (verdict,), said = saved["verdicts"], capsys.readouterr().out
    names = {row["solver"] for row in saved["rows"]}
    assert names == {"searched/3", "euler/3", "ab2/3", verdict["best"]} and (folder / "cmp" / "compare.png").exists()
    assert f"searched/3 against {verdict['best']}, the best of all {verdict['known']} hand-made names" in said
    assert said.split("\n\nsaved")[0].endswith((folder / "cmp" / "compare.txt").read_text().rpartition("\nseal ")[0])
    kept = (folder / "runs" / "report.html").read_bytes()
    assert main("compare mymodel:pictures runs/solver-3.json ab2 --steps 3 --budget 2000 -o runs".split()) == 0
    assert (folder / "runs" / "compare-samples-3.png").stat().st_size > 2000 and not list(folder.glob("cmp/*samples*"))
    assert (folder / "runs" / "report.html").read_bytes() == kept
    assert "tried of 112 hand-made" in capsys.readouterr().out
    assert main("sample mymodel:pictures --solver runs/solver-3.json -n 8 -o digits.png".split()) == 0
    assert main("sample mymodel:target --solver ab2 --steps 6 -n 8 -o x.safetensors --seed 4".split()) == 0
    image = pytest.importorskip("matplotlib.image").imread(folder / "digits.png")[..., :3]
    assert image.std() > 0.1 and image.shape[1] > 4 * image.shape[0]  # eight pictures in a row, no blank page
    x, about = read_tensors(folder / "x.safetensors")
    assert x["samples"].shape == (8, 6) and about["solver"] == "ab2/6"
    assert main("show runs/solver-3.json --plot table.png".split()) == 0
    out = capsys.readouterr().out
    assert "3 steps, flow" in out and (folder / "table.png").exists()
    assert main(["show"]) == 0 and "sit-xl-2-256/10" in capsys.readouterr().out


WRITERS = {
    "compare": (
        "compare mymodel:pictures ab2 --steps 3 --samples 4 -o to",
        "compare.txt compare.json compare.png compare-samples-3.png",
    ),
    "sample": ("sample mymodel:pictures --solver ab2/3 -n 2 -o to/x.png", "x.png"),
    "tensors": ("sample mymodel:target --solver ab2/3 -n 2 -o to/x.safetensors", "x.safetensors"),
    "show": ("show ab2/3 --plot to/t.png", "t.png"),
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_command_writes_over_its_own_files_alone(folder, capsys, command, monkeypatch):
    pytest.importorskip("matplotlib", reason="the plots extra, in requirements.txt")
    line, names = WRITERS[command]
    once = cache(lambda: compare(load_target("mymodel:pictures"), ["ab2/3"], samples=4, progress=False))
    monkeypatch.setattr("dss_fast.__main__.compare", lambda *given, **options: once())
    (folder / "to").mkdir()
    assert main(line.split()) == 0 and main(line.split()) == 0  # what it wrote itself
    for name in names.split():
        path = folder / "to" / name
        own = path.read_bytes()
        changed = own[:40] + bytes([own[40] ^ 1]) + own[41:]
        for content in (b"mine", b"", changed, own + b"\n"):
            path.write_bytes(content)
            assert main(line.split()) == 2 and f"{name} is there" in capsys.readouterr().err
            assert path.read_bytes() == content
        for target in (folder / "elsewhere", folder / "nowhere"):
            (folder / "elsewhere").write_bytes(own)
            path.unlink()
            path.symlink_to(target)
            for more in ([], ["--overwrite"]):
                assert main([*line.split(), *more]) == 2 and "is a link" in capsys.readouterr().err
            assert path.is_symlink() and (folder / "elsewhere").read_bytes() == own
            assert not (folder / "nowhere").exists()
        path.unlink()
        path.mkdir()
        assert main([*line.split(), "--overwrite"]) == 2 and "is no file" in capsys.readouterr().err
        path.rmdir()
        path.write_bytes(own)
    path.write_bytes(b"mine")
    assert main([*line.split(), "--overwrite"]) == 0 and main(line.split()) == 0


def test_the_file_of_one_command_is_not_the_others(folder, capsys):
    pytest.importorskip("matplotlib", reason="the plots extra, in requirements.txt")
    assert main("show ab2/3 --plot x.png".split()) == 0
    assert main("sample mymodel:pictures --solver ab2/3 -n 2 -o x.png".split()) == 2
    assert "not as sample wrote it" in capsys.readouterr().err
    matplotlib = pytest.importorskip("matplotlib.image")
    assert matplotlib.imread(folder / "x.png").ndim == 3  # the seal is a part of the picture that readers pass over


def test_one_table_for_several_models(folder, capsys):
    assert main("search mymodel:constant mymodel:twin --steps 3 --budget 6000 --samples 32 -o both".split()) == 0
    provenance = Solver.load(folder / "both" / "solver-3.json").provenance
    assert [one["shape"] for one in provenance["targets"][1:]] == [
        [6]
    ] and "searched+searched/3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("search mymodel --steps 3", ("mymodel", "module:attribute")),
        ("search nothere:x --steps 3", ("nothere", "No module")),
        ("search mymodel:gone --steps 3", ("gone", "target", "draw")),
        ("search mymodel:empty --steps 3", ("shape",)),
        ("search mymodel:target mymodel:gone --steps 3", ("gone", "target", "draw")),
        ("search mymodel:target mymodel:noisy --steps 3", ("schedule", "Flow", "VP", "needs the same")),
        ("search mymodel:target owner/name --prompts p.txt", ("'owner/name'", "pipeline", "alone")),
        ("search owner/a owner/b --prompts p.txt", ("'owner/a'", "pipeline", "alone")),
        ("search mymodel:target mymodel:target --prompts p.txt", ("--prompts", "pipeline", "'mymodel:target'")),
        ("search mymodel:target mymodel:twin --method lion", ("lion", "one target", "gauss_newton")),
        ("search mymodel:number --steps 3", ("int", "not a Target")),
        ("search mymodel:target --steps 3 --space wide", ("wide", "noise+times")),
        ("search mymodel:target --steps 3 --method lion --space full", ("--space", "lion", "samples")),
        ("sample mymodel:target --solver ab2/3 -o x.png", ("no images", "decode")),
        ("compare mymodel:target sit-xl-2-256 --steps 99", ("sit-xl-2-256", "99")),
        ("compare mymodel:target rk4 --steps 3", ("rk4", "heun", "dpmpp_2m")),
        ("sample mymodel:pictures --solver gone.json", ("gone.json",)),
        ("search mymodel:net --steps 3", ("Linear", "Target(model, shape)")),
        ("search mymodel:takes --steps 3", ("without arguments", "size")),
        ("sample mymodel:pictures --solver ab2/3 -o e.xyz", ("e.xyz", ".png or .safetensors")),
        ("sample mymodel:pictures --solver ab2/3 --steps 5 -o e.png", ("--steps 5", "ab2/3 has 3")),
        ("show ab2/3 --plot e.xyz", ("e.xyz", ".png")),
        ("show sit-xl-2-256/99", ("sit-xl-2-256/99", "dit-xl-2-256")),
    ],
)
def test_mistakes_are_one_line_and_status_2(folder, capsys, arguments, words):
    assert main(arguments.split()) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and all(word in text for word in words), text
    assert not list(folder.glob("out/*"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("sample mymodel:target --solver ab2/3 -n 0", ("'0'", "from 1")),
        ("sample mymodel:target --solver ab2/3 -n=-3", ("'-3'", "from 1")),
        ("sample mymodel:target --solver ab2 --steps 0", ("'0'", "from 1")),
        ("sample mymodel:target --solver ab2/3 --device foo", ("'foo'", "cannot be used here")),
        ("search mymodel:target --samples 0", ("'0'", "from 1")),
        ("search mymodel:target --budget 0", ("'0'", "from 1")),
        pytest.param("search mymodel:target --device cuda", ("'cuda'",), marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="there is one")),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_by_the_parser(folder, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    text = capsys.readouterr().err
    assert stop.value.code == 2 and all(word in text for word in words), text


def test_as_many_samples_are_drawn_as_asked_for(folder, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr("dss_fast.plots.write_figure", lambda figure, path: drawn.append(figure))
    assert main("sample mymodel:pictures --solver ab2/3 -n 10 -o digits.png".split()) == 0
    (figure,) = drawn
    assert sum(len(axes.images) for axes in figure.axes) == 10
    assert not any(axes.get_title() or axes.texts for axes in figure.axes)  # a number reads as a class


@pytest.mark.parametrize(
    "command, words", [("sample", ("samples to draw", "of noise")), ("compare", ("to measure on",))]
)
def test_help_says_what_each_option_is(capsys, command, words):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in words) and "examples.mnist:flow" in text


def test_the_device_is_the_models_unless_given(folder):
    assert load_target("mymodel:target").device is None
    assert load_target("mymodel:pictures", "cpu").home == torch.device("cpu")


@pytest.mark.parametrize("arguments", ["search mymodel:target --steps 0", "search mymodel:target --steps five"])
def test_steps_must_be_numbers(folder, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2 and "numbers of steps" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="needs a file where a folder should be")
@pytest.mark.parametrize(
    "command", ["search mymodel:target --steps 3 -o taken/run", "compare mymodel:target -o taken/run"]
)
def test_unwritable_folder_before_the_work(folder, capsys, command):
    (folder / "taken").write_text("a file")
    assert main(command.split()) == 2
    assert "taken" in capsys.readouterr().err


def test_module_entry_point(folder):
    run = subprocess.run([sys.executable, "-m", "dss_fast", "--version"], capture_output=True, text=True, check=True)
    import dss_fast

    assert run.stdout == f"{dss_fast.__version__}\n" and run.stderr == ""


@pytest.mark.parametrize(
    "name, meant",
    [
        (".mods:x", "mods:x"), ("./my_model.py:target", "my_model:target"), ("my_model.py:target", "my_model:target"),
        ("sub/my_model.py:target", "sub.my_model:target"), ("sub/my_model:target", "sub.my_model:target"),
        ("..up:x", "up:x"), ("a..b:x", "a.b:x"), ("a.:x", "a:x"), ("../up.py:x", "up:x"), ("/abs/m.py:x", "abs.m:x"),
        ("sub\\m.py:x", "sub.m:x"), (".:x", "module:x"), ("./:x", "module:x"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["search", "sample --solver ab2/3", "compare"])
def test_a_path_is_no_modules_name(folder, capsys, command, name, meant):
    command, *options = command.split()
    assert main([command, name, *options]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and repr(name) in said and f"as in {meant}, and it is looked for" in said


ODD = "$\\frac$\x1b]0;title\x07\x1b[31mred\r\nnext\u202e\x9b1m\udc80"


def test_nothing_that_is_printed_is_for_the_terminal_to_obey(folder, capsys):
    request = {"checkpoint": ODD, ODD: [ODD], "nested": {ODD: 1}}
    table = replace(Solver.load(saved(folder)), name=f"{ODD}/3", source=ODD, provenance={"request": request})
    (folder / "odd\x1b[2J\n").mkdir()
    path = folder / "odd\x1b[2J\n" / "solver.json"
    table.save(path)
    pictures = ["--plot", f"{path.parent}/p.png"] if pytest.importorskip("matplotlib") else []
    assert main(["show", str(path), *pictures]) == 0
    assert (
        main(["sample", "mymodel:target", "--solver", str(path), "-n", "2", "-o", f"{path.parent}/x.safetensors"]) == 0
    )
    arguments = ["--steps", "3", "--samples", "32", "-o", f"{path.parent}/out"]
    assert main(["compare", "mymodel:target", str(path), "euler", *arguments]) == 0
    path.write_text("{")
    assert main(["show", str(path)]) == 2 and main(["show", "\x1b[2J"]) == 2 and main(["show", f"{ODD}.json"]) == 2
    said = capsys.readouterr()
    assert (
        r"\x1b]0;title\x07\x1b[31mred\r\nnext\u202e\x9b1m\udc80" in said.out and r"odd\x1b[2J\n" in said.out + said.err
    )
    for line in [*said.out.split("\n"), *said.err.split("\n")]:
        assert line.rsplit("\r")[-1].isprintable(), repr(line)  # a progress bar goes back to the line's beginning
    assert said.err.count("\n") == 3 and (folder / path.parent / "out" / "compare.txt").read_text().isascii()


@pytest.mark.parametrize("request_", ["text", [1, 2], 7, {}, None])
def test_a_request_of_another_kind_is_no_matter(folder, capsys, request_):
    replace(Solver.load(saved(folder)), provenance={"request": request_}).save(folder / "r.json")
    assert main(["show", "r.json"]) == 0 and "searched for" not in capsys.readouterr().out


def test_a_file_is_a_model_too(folder, capsys, monkeypatch):
    (folder / "sub").mkdir()
    (folder / "sub" / "beside.py").write_text("WIDTH = 6\n")
    (folder / "sub" / "own_net.py").write_text(TARGET + "\nfrom beside import WIDTH\n")
    assert main("sample ./sub/own_net.py:target --solver ab2/3 -n 2 -o x.safetensors".split()) == 0
    assert main("sample sub/own_net.py:gone --solver ab2/3 -n 2 -o y.safetensors".split()) == 2
    assert "sub/own_net.py has no 'gone'" in capsys.readouterr().err
    assert load_target(f"{folder}/sub/own_net.py:target").shape == (6,)


def test_conditions_and_guidance_of_samples(folder, capsys):
    (folder / "guided.py").write_text(
        TARGET
        + '\ndef guided():\n    return Target(velocity, (6,), cond=draw, uncond={"y": 0.5}, guidance_scale=3.0)\n'
    )
    line = "sample guided.py:guided --solver ab2/3 --overwrite -o x.safetensors"

    def drawn(*more):
        assert main([*line.split(), *more]) == 0, capsys.readouterr().err
        return read_tensors(folder / "x.safetensors")[0]["samples"]

    target = load_target("guided.py:guided")
    noise = target.draw(3, torch.Generator().manual_seed(0)).noise
    for more, scale in (((), 3.0), (("--guidance-scale", "1.5"), 1.5), (("--guidance-scale", "1"), 1.0)):
        y = torch.tensor([1.0, 0.0, 1.0])
        wanted = sample(target, noise, "ab2/3", cond={"y": y}, guidance_scale=scale)
        assert torch.equal(drawn("--cond", "y=1,0,1", *more), wanted)
    assert torch.equal(drawn("--cond", "y=1", "-n", "3"), sample(target, noise, "ab2/3", cond={"y": torch.ones(3)}))
    mistakes = {
        "--cond y=1,0 -n 3": "one for each of 3 samples; got 2",
        "--cond z=1": "conditions: y",
        "--guidance-scale nan": "nan",
    }
    for more, words in mistakes.items():
        assert main([*line.split(), *more.split()]) == 2 and words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*line.split(), "--cond", "y"])
    assert "as in y=3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words, no_words",
    [
        ("compare mymodel:target sit-xl-2-256 --steps 98,99", ("of --steps 98,99;",), "num_steps"),
        ("search mymodel:target --budget 20parsecs", ("--budget '20parsecs': give",), "budget="),
        ("search mymodel:target --space wide", ("--space 'wide': choose",), "space="),
        ("search mymodel:target --steps 5,5", ("--steps 5,5: give",), "num_steps"),
        ("show uni_pc/5", ("(do you mean unipc, unipc3",), "="),
        ("show dpmpp2m", ("do you mean dpmpp_2m",), "="),
        ("show sit-xl", ("do you mean sit-xl-2-256?",), "="),
        ("show DPM++", ("do you mean dpmpp_2m",), "="),
    ],
)
def test_mistakes_are_told_in_the_words_of_the_command_line(folder, capsys, arguments, words, no_words):
    assert main(arguments.split()) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words) and no_words not in said, said


@pytest.mark.parametrize(
    "text, number", [("10000", 10_000), ("10,000", 10_000), ("1e4", 10_000), ("10k", 10_000), ("1.5M", 1_500_000)]
)
def test_evaluations_are_written_as_people_write_them(text, number):
    for command in ("search a:b", "fit a:b", "compare a:b"):
        assert _parser().parse_args([*command.split(), "--budget", text]).budget == number
    assert _parser().parse_args(["search", "a:b", "--budget", "20m"]).budget == "20m"


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "10,00", "1e99", "k"])
def test_what_is_no_number_of_evaluations_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        main(["compare", "a:b", "--budget", text])
    assert "10,000, 1e4 or 10k" in capsys.readouterr().err or text == "-3"


def test_a_folder_that_is_taken_is_gone_on_with_by_the_option(folder, capsys):
    line = "search mymodel:target --steps 3 --budget 300 -o run -q".split()
    assert main(line) == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out.startswith("searched/3") and "N = 3" not in said.out  # no plan and no bar
    assert main(line) == 2 and "go on with it by --resume or" in capsys.readouterr().err
    assert main([*line[:-1], "--resume"]) == 0


def test_a_log_has_no_bar_and_a_terminal_has_one(monkeypatch):
    class Stream(io.StringIO):
        terminal = False

        def isatty(self):
            return self.terminal

    for terminal in (False, True):
        stream = Stream()
        stream.terminal = terminal
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.bar(total=3) as bar:
            bar.update(3)
        assert bool(stream.getvalue()) == terminal


OWN = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from dss_fast import Target
from dss_fast.schedule import Schedule

@dataclass(frozen=True)
class Trig(Schedule):
    prediction_type: str = "epsilon"
    kind: ClassVar = "trig"
    family: ClassVar = "vp"
    convention: ClassVar = "paper"

    def alpha_sigma(self, u):
        angle = torch.pi / 2 * (0.001 + 0.998 * u.double())
        return angle.sin(), angle.cos()

    def time(self, u):
        return 1 - u.double()

def target():
    return Target(torch.tanh, (4,), Trig())
"""


def test_a_table_with_a_schedule_of_ones_own_is_shown(folder, capsys):
    (folder / "own.py").write_text(OWN)
    schedule = load_target("own.py:target").schedule
    find_solver("ab2/3", schedule).save(folder / "trig.json")
    assert main(["show", "trig.json"]) == 2
    assert "--schedule module:attribute" in capsys.readouterr().err
    for name in ("own.py:Trig", "own:target"):
        assert main(["show", "trig.json", "--schedule", name]) == 0 and "ab2/3: 3 steps, vp" in capsys.readouterr().out
    for name, words in {"mymodel:draw": "without arguments", "mymodel:number": "no schedule"}.items():
        assert main(["show", "trig.json", "--schedule", name]) == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "search", "fit", "sample", "compare", "show", "push"])
def test_help_is_plain_text_with_its_defaults(capsys, command):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "``" not in said and ":class:" not in said
    told = {"search": ("--steps STEPS numbers of steps, as in 5,8,10 (default: 10, or", "(default: gauss_newton)",
                       "(default: noise+start)", "(default: out)", "(default: 0)"),
            "compare": ("(default: 20000)", "(default: 5,10)"), "show": ("(default: flow)",)}  # fmt: skip
    told = told.get(command, ())
    assert all(text in said for text in told), said


def test_an_interrupted_search_ends_with_130_and_says_what_is_missing(folder, capsys, monkeypatch):
    def halted(targets, steps, *, out, **options):
        return SearchResult({3: find_solver("ab2/3")}, [], 7, interrupted=True, out=out)

    monkeypatch.setattr("dss_fast.__main__.search", halted)
    assert main("search mymodel:target --steps 3 -o runs".split()) == 130
    said = capsys.readouterr().out
    assert "no report was made; python -m dss_fast compare mymodel:target runs/solver-*.json says" in said


def test_sigmas_for_a_programs_field(capsys):
    from dss_fast.integrations.k_diffusion import sigmas_of

    assert main(["show", "sit-xl-2-256/6", "--sigmas"]) == 0
    out, said = capsys.readouterr()
    assert len(out.splitlines()) == 1 and "spacing alone" in said
    torch.testing.assert_close(torch.tensor(list(map(float, out.split(",")))), sigmas_of("sit-xl-2-256/6"))
