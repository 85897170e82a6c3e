"""Few-step solvers for diffusion and flow models: search, fit, sample, compare, show, push.

A model is named module:attribute, or file.py:attribute. The attribute is a Target, or a function without arguments
that returns one; a dict of a Target's fields is taken too. search takes several, for one table over all, and a
pipeline of diffusers, a folder or a hub id, with a file of prompts:

    python -m dss_fast search examples.mnist:flow --steps 5,8 -o out
    python -m dss_fast search ./my_model.py:target --steps 5 --budget 20min -o out
    python -m dss_fast search examples.mnist:flow examples.mixture:digits --steps 5 -o out
    python -m dss_fast search stabilityai/stable-diffusion-3.5-medium --prompts prompts.txt --steps 6,8 -o out
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import __version__, adaptive, hub
from .compare import compare
from .files import check_free, check_writable, sealing, write_tensors, write_text
from .integrations.k_diffusion import sigmas_of
from .loading import load_target, made
from .methods import METHODS as HANDMADE
from .names import find_solver, is_file, printable, solver_names
from .plots import plot_samples, plot_solver
from .sampling import sample
from .schedule import Schedule, default_schedule
from .searching import METHODS, GaussNewton, Method, fit, search
from .searching.processes import take_local_device
from .searching.space import SPACES
from .solver import Solver
from .target import Target

if TYPE_CHECKING:
    from .integrations.diffusers.command import Prompted

COUNT = re.compile(r"(\d{1,3}(?:[,_]\d{3})+|\d+(?:\.\d+)?(?:[eE]\+?\d{1,2})?)([kM]?)", re.ASCII)
COUNTS, LARGEST_COUNT = {"": 1, "k": 1e3, "M": 1e6}, 1e15
INTERRUPTED = 130  # the exit status of Ctrl-C, so that ``search && deploy`` does not deploy half a search


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status. Expected errors are one line on stderr and status 2, Ctrl-C is 130."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        print(f"dss_fast {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        print(printable(f"dss_fast {options.command}: {_in_options(f'{error}{notes}', options)}"), file=sys.stderr)
        return 2


def _in_options(text: str, options: argparse.Namespace) -> str:
    """A message of the package in the words of the command line: what it calls budget=5 is --budget 5 here."""
    text = text.replace("resume=True (--resume)", "--resume")
    for option in vars(options).keys() - {"run", "command", "model", "models", "solver", "solvers"}:
        name, flag = ("num_steps" if option == "steps" else option), f"--{option.replace('_', '-')} "
        text = re.sub(rf"(?<![\w.]){name}=(?=['\w(\[])", flag, text)
    return re.sub(r"(--steps )[(\[]([\d, ]+?),?[)\]]", lambda found: found[1] + found[2].replace(" ", ""), text)


def _search(options: argparse.Namespace) -> int:
    method, out = _method(options), Path(options.out)
    take_local_device()  # the model is built on the current device, so this comes first
    first = int(os.environ.get("RANK", "0")) == 0
    prompted = _prompted(options)
    if prompted is None:
        targets = [load_target(name, options.device) for name in options.models]
    else:
        targets = [prompted.target()]
        if first:
            _say(f"{prompted}, latents {targets[0].shape}, guidance {targets[0].guidance_scale}")
    steps = options.steps or (None if options.calls else [10])
    asked = {key: getattr(options, key) for key in ("calls", "budget", "seed", "resume")} | {"method": method}
    result = search(targets, steps, out=out, progress=not options.quiet, **asked)
    if first:
        _say(result)
        if prompted is not None:
            prompted.show(result, out, options.seed)
        if result.interrupted:
            models = " ".join(options.models)
            _say(
                f"no report was made; python -m dss_fast compare {models} {out}/solver-*.json says what they are worth"
            )
    return INTERRUPTED if result.interrupted else 0


def _fit(options: argparse.Namespace) -> int:
    take_local_device()
    out = Path(options.out)
    target = load_target(options.model, options.device)
    asked = {"budget": options.budget, "seed": options.seed, "progress": not options.quiet}
    result = fit(target, options.steps, out=out, **asked)
    if int(os.environ.get("RANK", "0")) == 0:
        _say(result)
    return INTERRUPTED if result.interrupted else 0


def _prompted(options: argparse.Namespace) -> Prompted | None:
    """The pipeline of diffusers that is to be searched, loaded; None where the models are attributes of modules."""
    name = next((model for model in options.models if ":" not in model), None)
    if name is None:
        for key in ("prompts", "call", "dtype"):
            if getattr(options, key):
                raise ValueError(
                    f"--{key} goes with a pipeline of diffusers, and {options.models[0]!r} is a module's attribute"
                )
        return None
    if len(options.models) > 1:
        raise ValueError(
            f"model {name!r}: a pipeline of diffusers is searched alone; of several models each is "
            "module:attribute, as in examples.mnist:flow"
        )
    if not (Path(name) / "model_index.json").is_file() and name.count("/") != 1:
        raise ValueError(
            f"model {name!r}: write module:attribute, as in examples.mnist:flow, or a pipeline of diffusers: "
            "a folder with a model_index.json or a hub id, as in owner/name"
        )
    if not options.prompts:
        raise ValueError(f"the pipeline {name!r} needs --prompts, a file with one prompt a line")
    check_writable(options.out)
    from .integrations.diffusers.command import Prompted

    return Prompted.load(name, options.prompts, options.call or (), options.dtype, options.device)


def _method(options: argparse.Namespace) -> Method:
    """The settings of the method, those given on the command line put in."""
    kind = METHODS[options.method]
    asked = {key: getattr(options, key) for key in ("space", "generality", "samples")}
    given = {key: value for key, value in asked.items() if value is not None}
    known = [f.name for f in fields(kind)]
    for key in given:
        if key not in known:
            raise ValueError(f"--{key}: the method {options.method} has no such setting; it has {', '.join(known)}")
    return kind(**given)


def _sample(options: argparse.Namespace) -> None:
    target, path = load_target(options.model, options.device), Path(options.out)
    tensors, shape = path.suffix == ".safetensors", target.shape or ()
    _check_suffix(path, ".png", ".safetensors")
    if not tensors and target.decode is None and (len(shape) != 3 or shape[0] not in (1, 3)):
        raise ValueError(f"samples of shape {shape} are no images: give the target a decode, or write .safetensors")
    check_writable(path.parent)
    check_free(path, "sample", options.overwrite)
    asked = dict(options.cond or ())
    number = _number(options.number, asked)
    solver = find_solver(options.solver, target.schedule, options.steps)
    if options.steps not in (None, solver.num_steps):
        raise ValueError(f"--steps {options.steps}: {options.solver} has {solver.num_steps}; leave --steps out")
    drawn = target.draw(number, torch.Generator().manual_seed(options.seed))
    cond = _conditions(drawn.cond, asked, number)
    x = sample(target, drawn.noise, solver, cond=cond, guidance_scale=options.guidance_scale)
    assert isinstance(x, Tensor)
    if tensors:
        about = {"command": "sample", "solver": printable(solver.name), "seed": str(options.seed)}
        check_free(path, "sample", options.overwrite)  # it may have come meanwhile
        write_tensors(path, {"samples": x.cpu()}, about)
    else:
        images = x if target.decode is None else target.decode(x)
        # Blank titles: a number beside a row reads as the class of its samples.
        with sealing(path, "sample", options.overwrite) as file:
            plot_samples({" " * k: part for k, part in enumerate(images.split(8))}, file)
    _say(f"{number} samples of {printable(solver.name or options.solver)} in {printable(path)}")


def _conditions(drawn: Mapping[str, Any], asked: Mapping[str, list[float]], number: int) -> dict[str, Any]:
    """The target's conditions, those asked for in their place, of the same kind of numbers."""
    cond = dict(drawn)
    for key, values in asked.items():
        known = ", ".join(cond) or "none"
        if not isinstance(cond.get(key), Tensor) or cond[key].ndim != 1:
            raise ValueError(
                f"--cond {key}: the target draws no {key!r} of one number a sample; its conditions: {known}"
            )
        wanted = torch.tensor(values * (number if len(values) == 1 else 1), dtype=torch.float64).to(cond[key])
        if wanted.tolist() != values * (number if len(values) == 1 else 1):
            raise ValueError(f"--cond {key}: {values} cannot be {str(cond[key].dtype)[6:]}, as the target draws it")
        cond[key] = wanted
    return cond


def _number(given: int | None, asked: Mapping[str, list[float]]) -> int:
    """How many samples: as many as asked for, or as conditions were given, or 32."""
    counts = {len(values) for values in asked.values() if len(values) > 1}
    number = given if given is not None else max(counts, default=32)
    if counts - {number}:
        raise ValueError(
            f"--cond: give one value, or one for each of {number} samples; got {sorted(counts - {number})[0]}"
        )
    return number


def _push(options: argparse.Namespace) -> None:
    solver = Solver.load(options.solver)
    address = hub.push(options.solver, options.repo, options.name, private=options.private)
    _say(f"{printable(solver.label)} is {address}; whoever has it takes it by that name where a solver is asked for")


def _check_suffix(path: Path, *suffixes: str) -> None:
    if path.suffix not in suffixes:
        raise ValueError(f"{path}: write to a file that ends in {' or '.join(suffixes)}")


def _compare(options: argparse.Namespace) -> None:
    target, out = load_target(options.model, options.device), Path(options.out)
    check_writable(out)
    for path in out.iterdir():
        if re.fullmatch(r"compare(\.txt|\.json|\.png|-samples-\d+\.png)", path.name):
            check_free(path, "compare", options.overwrite)
    result = compare(
        target,
        options.solvers or (*DEFAULT_SOLVERS, *[adaptive.NAME] * (options.budget is None)),
        num_steps=options.steps,
        samples=options.samples,
        budget=options.budget,
        seed=options.seed,
        progress=not options.quiet,
    )
    _say(result)
    files: dict[str, Callable[[Path], object]] = {
        "compare.txt": lambda file: write_text(file, f"{result}\n"),
        "compare.json": result.save,
        "compare.png": result.plot,
    }
    seen = (target.decode is not None or result.points) and not result.unseen
    for n in sorted({row.num_steps for row in result.rows}) if seen else ():
        best = [row.solver for row in (result.best(n), result.best(n, searched=True)) if row is not None]
        files[f"compare-samples-{n}.png"] = partial(result.plot_samples, solvers=best)
    for name, write in files.items():
        with sealing(out / name, "compare", options.overwrite) as file:
            write(file)
    if result.unseen:
        _say(f"no pictures of samples: {printable(result.unseen)}")
    _say(f"\nsaved in {printable(out)}: {', '.join(files)}")


def _show(options: argparse.Namespace) -> None:
    if options.plot:
        _check_suffix(Path(options.plot), ".png")
        check_free(options.plot, "show", options.overwrite)
    if options.solver is None:
        print("published:  " + "  ".join(solver_names()))
        print("hand-made:  " + "  ".join(f"{m}/N[@spacing]" for m in HANDMADE))
        return
    if options.schedule:
        schedule = _schedule(options.schedule)
        solver = (
            Solver.load(options.solver, schedule) if is_file(options.solver) else find_solver(options.solver, schedule)
        )
    else:
        solver = find_solver(options.solver, default_schedule(options.family))
    if options.sigmas:
        _show_sigmas(solver)
        return
    _say(printable(f"{solver.name or options.solver}: {solver.num_steps} steps, {solver.family}; {solver.source}"))
    request = solver.provenance.get("request")
    if isinstance(request, Mapping) and request:
        _say("  searched for " + printable(", ".join(f"{key} {value}" for key, value in request.items())))
    for i, row in enumerate(solver.coeffs):
        cells = " ".join(f"{c:8.4f}" for c in row[: i + 1])
        print(f"  u {solver.timesteps[i]:.5f} -> {solver.timesteps[i + 1]:.5f}   {cells}")
    for key in ("noise_coeffs", "network_timesteps"):
        values = getattr(solver, key)
        if values is not None:
            print(f"  {key}: " + " ".join(f"{v:.5f}" for v in values))
    if solver.guidance_coeffs is not None:
        steps = ", ".join(map(str, solver.guided_steps or ()))
        print(f"  both branches at steps {steps}; their differences are weighed by")
        for i, row in enumerate(solver.guidance_coeffs):
            print("  " + " ".join(f"{c:8.4f}" for c in row[: i + 1]))
    if options.plot:
        with sealing(options.plot, "show", options.overwrite) as file:
            plot_solver(solver, file)
        _say(f"picture in {printable(options.plot)}")


def _schedule(name: str) -> Schedule:
    """A schedule, its class, or a Target or a function that has one."""
    found = made(name)
    schedule: Schedule | None = found.schedule if isinstance(found, Target) else found
    if schedule is None or not hasattr(schedule, "alpha_sigma"):
        raise ValueError(f"--schedule {name}: is {type(found).__name__}, and no schedule")
    return schedule


def _show_sigmas(solver: Solver) -> None:
    """One line that a field for sigmas takes, and on the other stream what it is and is worth."""
    print(", ".join(f"{sigma:.6g}" for sigma in sigmas_of(solver).tolist()))
    kind = "sigma of a flow, from 1" if solver.family == "flow" else "sigma / alpha, as in k-diffusion"
    print(
        f"{printable(solver.label)}: {kind}. Switch the program's own shift off.\nThis is the spacing alone: the "
        "table's coefficients are not in it, and without them nothing of its gain is sure to be left "
        "(docs/integrations.md, Fields for sigmas).",
        file=sys.stderr,
    )


def _say(text: object) -> None:
    """Prints a text, several lines perhaps, nothing of which is for the terminal to obey."""
    print(printable(text, keep="\n"), flush=True)


# These are what a user would otherwise run, each on the spacings it is used with.
DEFAULT_SOLVERS = (
    *("euler", "ab2", "ab2@shift3", "ab4", "dpmpp_2m", "dpmpp_2m@lambda", "unip3", "unip3@lambda", "deis"),
    *("unipc", "unipc@lambda", "heun"),
)


def _steps(text: str) -> list[int]:
    try:
        steps = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers of steps, as in 5,8,10") from None
    if not steps or min(steps) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers of steps start at 1")
    return steps


def _budget(text: str) -> int | str:
    """Evaluations, or a time, which the search reads."""
    return _evaluations(text) if COUNT.fullmatch(text) else text


def _evaluations(text: str) -> int:
    """A number of evaluations as people write it: 10000, 10,000, 1e4, 10k, 1.5M."""
    found = COUNT.fullmatch(text)
    number = float(found[1].replace(",", "").replace("_", "")) * COUNTS[found[2]] if found else 0.0
    if not 1 <= number <= LARGEST_COUNT or number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1, as in 10000, 10,000, 1e4 or 10k")
    return int(number)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1")
    return int(text)


def _place(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty name; '.' is the current folder")
    return text


def _condition(text: str) -> tuple[str, list[float]]:
    name, equals, values = text.partition("=")
    try:
        numbers = [int(part) if part.strip().lstrip("+-").isdecimal() else float(part) for part in values.split(",")]
    except ValueError:
        numbers = []
    if not (name and equals and numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: write a name and numbers, as in y=3 or y=3,1,4")
    return name, numbers


def _device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dss_fast", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int | None], text: str, out: str | None = None
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if out:
            model = "module:attribute or file.py:attribute, for example examples.mnist:flow"
            if name == "search":
                also = "several for one table over all; or a pipeline of diffusers, its folder or hub id"
                sub.add_argument("models", nargs="+", metavar="model", help=f"{model}; {also}")
            else:
                sub.add_argument("model", help=model)
            sub.add_argument("-o", "--out", type=_place, default=out, help=f"where results go (default: {out})")
            seed = 20_000 if name == "compare" else 0
            sub.add_argument("--seed", type=int, default=seed, help=f"of noise and conditions (default: {seed})")
            sub.add_argument("--device", type=_device, default=None, help="cpu, cuda, ... (default: the model's)")
        return sub

    def quiet(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("-q", "--quiet", action="store_true", help="no plan and no progress bar, only what came out")

    def overwrites(sub: argparse.ArgumentParser) -> None:
        text = "write over files of these names that this command did not write, or that were changed since"
        sub.add_argument("--overwrite", action="store_true", help=text)

    sub = command("search", _search, "search a solver for a model", "out")
    sub.add_argument("--steps", type=_steps, help="numbers of steps, as in 5,8,10 (default: 10, or what --calls takes)")
    sub.add_argument("--calls", type=_count, help="most calls a sample, with guidance; alone it finds the steps too")
    method = "how to search; lion is the paper's (default: gauss_newton)"
    sub.add_argument("--method", choices=METHODS, default="gauss_newton", help=method)
    space = f"what it may move: {', '.join(SPACES)} (default: {GaussNewton().space}); gauss_newton only"
    sub.add_argument("--space", default=None, help=space)
    generality = "0.1 for a table to use on other models too (default: 0); gauss_newton only"
    sub.add_argument("--generality", type=float, default=None, help=generality)
    samples = "samples to search on (default: what the budget allows)"
    sub.add_argument("--samples", type=_count, default=None, help=samples)
    budget = "most model evaluations, 10k, or a time: 20min (default: 1000 (100 + 3 N) for each N)"
    sub.add_argument("--budget", type=_budget, default=None, help=budget)
    sub.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    sub.add_argument("--prompts", help="of a pipeline: a file with one prompt a line")
    sub.add_argument("--call", nargs="+", help="of a pipeline's call: height=512 width=512 guidance_scale=3.5 ...")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of a pipeline's weights")
    quiet(sub)

    sub = command("fit", _fit, "choose a table for a model in a few hundred calls, none backward", "out")
    sub.add_argument("--steps", type=_steps, default=[10], help="numbers of steps, as in 5,8,10 (default: 10)")
    sub.add_argument("--budget", type=_budget, default=500, help="most model evaluations, or a time (default: 500)")
    quiet(sub)

    sub = command("sample", _sample, "sample with a solver", "samples.png")
    sub.add_argument("--solver", required=True, help="name/N, name/N@spacing, a JSON file or hf://owner/repo/f.json")
    sub.add_argument("--steps", type=_count, default=None, help="N, when the name has none")
    number = "samples to draw (default: as many as conditions are given, or 32)"
    sub.add_argument("-n", "--number", type=_count, default=None, help=number)
    cond = "a condition in place of what the target draws: y=3 for all samples, y=3,1,4 for three"
    sub.add_argument("--cond", type=_condition, action="append", metavar="NAME=VALUES", help=cond)
    scale = "of guidance, where the target has unconditional arguments (default: the target's)"
    sub.add_argument("--guidance-scale", type=float, default=None, help=scale)

    overwrites(sub)

    solvers = "names or JSON files, and rk45, by the calls it takes; by default the usual hand-made ones and rk45"
    sub = command("compare", _compare, "solvers side by side on a model", "out")
    sub.add_argument("solvers", nargs="*", help=solvers)
    sub.add_argument("--steps", type=_steps, default=[5, 10], help="for names without /N (default: 5,10)")
    sub.add_argument("--samples", type=_count, default=None, help="to measure on (default: 256, or by --budget)")
    sub.add_argument("--budget", type=_evaluations, default=None, help="most model evaluations, of the rivals too")
    quiet(sub)
    overwrites(sub)

    sub = command("show", _show, "print a solver, or list those that exist")
    sub.add_argument("solver", nargs="?")
    sub.add_argument("--family", choices=("flow", "vp"), default="flow", help="for hand-made names (default: flow)")
    schedule = "module:attribute, for a table with a schedule of your own: the schedule, its class, or a Target of it"
    sub.add_argument("--schedule", default=None, help=schedule)
    sub.add_argument("--plot", help="also draw it here (PNG)")
    sub.add_argument("--sigmas", action="store_true", help="print its sigmas alone, for a program's field of them")
    overwrites(sub)

    sub = command("push", _push, "upload a table to the Hugging Face hub, by huggingface_hub and its login")
    sub.add_argument("solver", help="a solver's JSON file; what it says of its search goes along")
    sub.add_argument("repo", help="owner/repo, a repository of models; made where there is none")
    sub.add_argument("--name", default=None, help="of the file there (default: its own)")
    sub.add_argument("--private", action="store_true", help="where the repository is made")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
