"""The command line: ``python -m dss_fast {search,sample,compare,show}``.

A model is named ``module:attribute``. The attribute is a Target, or a function without arguments that returns one.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from . import __version__
from .compare import compare
from .files import check_writable, write_tensors, write_text
from .methods import METHODS
from .names import find_solver, solver_names
from .plots import plot_samples, plot_solver
from .sampling import sample
from .schedule import default_schedule
from .search import METHODS as SEARCHES
from .search import search
from .search.draws import take_local_device
from .target import Target


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status. Expected errors are one line on stderr and status 2."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        print(f"dss_fast {options.command}: {error}{notes}", file=sys.stderr)
        return 2


def load_target(name: str, device: str | None = None) -> Target:
    """The Target behind ``module:attribute``, moved to a device. Raises ValueError saying which part does not exist."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"model {name!r}: write module:attribute, as in examples.mnist:flow")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"model {name!r}: {error}; it is looked for in {os.getcwd()} and on the path") from error
    if not hasattr(found, attribute):
        public = ", ".join(k for k, v in vars(found).items() if not k.startswith("_") and callable(v))
        raise ValueError(f"model {name!r}: {module} has no {attribute!r}; it has: {public}")
    target = getattr(found, attribute)
    target = target() if callable(target) and not isinstance(target, Target) else target
    target = Target(**target) if isinstance(target, Mapping) else target
    if not isinstance(target, Target) or target.shape is None:
        got = "a Target without a shape" if isinstance(target, Target) else type(target).__name__
        raise ValueError(f"model {name!r} is {got}; it must be a Target with a shape, or a function that returns one")
    return target if device is None else target.to(device)


def _search(options: argparse.Namespace) -> None:
    take_local_device()  # before the model is built
    target = load_target(options.model, options.device)
    method = SEARCHES[options.method]
    given = {k: v for k, v in (("space", options.space), ("samples", options.samples)) if v is not None}
    known = [f.name for f in fields(method)]
    for key in given:
        if key not in known:
            raise ValueError(f"--{key}: method {options.method!r} has no such setting; it has {', '.join(known)}")
    result = search(
        target, options.steps, method=method(**given), budget=options.budget, seed=options.seed or 0,
        out=options.out, resume=options.resume,
    )  # fmt: skip
    if int(os.environ.get("RANK", "0")) == 0:
        print(result)


def _sample(options: argparse.Namespace) -> None:
    target, path = load_target(options.model, options.device), Path(options.out)
    check_writable(path.parent)
    solver = find_solver(options.solver, target.schedule, options.steps)
    x = sample(target, options.number, solver, generator=torch.Generator().manual_seed(options.seed))
    assert isinstance(x, Tensor)
    if path.suffix == ".safetensors":
        write_tensors(path, {"samples": x.cpu()}, {})
    else:
        images = x if target.decode is None else target.decode(x)
        columns = min(8, len(images))
        plot_samples({f"{c}": images[c::columns] for c in range(columns)}, path, rows=len(images) // columns)
    print(f"{options.number} samples of {solver.name or options.solver} in {path}")


def _compare(options: argparse.Namespace) -> None:
    target, out = load_target(options.model, options.device), Path(options.out)
    check_writable(out)
    given = {k: getattr(options, k) for k in ("samples", "seed") if getattr(options, k) is not None}
    result = compare(target, options.solvers or list(DEFAULT_SOLVERS), num_steps=options.steps, **given)
    print(result)
    write_text(out / "compare.txt", f"{result}\n")
    result.save(out / "compare.json")
    result.plot(out / "compare.png")
    print(f"\nsaved in {out}: compare.txt, compare.json, compare.png")


def _show(options: argparse.Namespace) -> None:
    if options.solver is None:
        print("published:  " + "  ".join(solver_names()))
        print("hand-made:  " + "  ".join(f"{m}/N[@spacing]" for m in METHODS))
        return
    solver = find_solver(options.solver, default_schedule(options.family))
    print(f"{solver.name or options.solver}: {solver.num_steps} steps, {solver.schedule}; {solver.source}")
    for i, row in enumerate(solver.coeffs):
        cells = " ".join(f"{c:8.4f}" for c in row[: i + 1])
        print(f"  u {solver.timesteps[i]:.5f} -> {solver.timesteps[i + 1]:.5f}   {cells}")
    for key in ("noise_coeffs", "network_timesteps"):
        if getattr(solver, key) is not None:
            print(f"  {key}: " + " ".join(f"{v:.5f}" for v in getattr(solver, key)))
    if options.plot:
        print(f"picture in {plot_solver(solver, options.plot)}")


# What a user would otherwise run, each on the spacings it is used with.
DEFAULT_SOLVERS = ("euler", "ab2", "ab4", "dpmpp_2m", "dpmpp_2m@lambda", "unip3", "unip3@lambda", "deis")


def _steps(text: str) -> list[int]:
    try:
        steps = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers of steps, as in 5,8,10") from None
    if not steps or min(steps) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers of steps start at 1")
    return steps


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dss_fast", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], None], text: str, out: str | None = None
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if out:
            sub.add_argument("model", help="module:attribute, for example examples.mnist:flow")
            sub.add_argument("-o", "--out", default=out, help=f"where results go (default {out})")
            sub.add_argument("--seed", type=int, default=None)
            sub.add_argument("--device", default=None, help="move the model to cpu, cuda, ... (default: where it is)")
        return sub

    sub = command("search", _search, "search a solver for a model", "out")
    sub.add_argument("--steps", type=_steps, default=[10], help="numbers of steps, as in 5,8,10")
    sub.add_argument("--method", choices=tuple(SEARCHES), default="two_stage", help="lion is the paper's recipe")
    sub.add_argument("--space", default=None, help="plain, rows, rows+noise, rows+times or full (default)")
    sub.add_argument("--samples", type=int, default=None, help="samples to search on")
    sub.add_argument("--budget", type=int, default=None, help="most model evaluations to spend")
    sub.add_argument("--resume", action="store_true", help="go on with the run in the output folder")

    sub = command("sample", _sample, "sample with a solver", "samples.png")
    sub.add_argument("--solver", required=True, help="name/N, name/N@spacing or a JSON file")
    sub.add_argument("--steps", type=int, default=None, help="N, when the name has none")
    sub.add_argument("-n", "--number", type=int, default=32)
    sub.set_defaults(seed=0)

    sub = command("compare", _compare, "solvers side by side on a model", "out")
    sub.add_argument("solvers", nargs="*", help="names or JSON files; by default the usual hand-made ones")
    sub.add_argument("--steps", type=_steps, default=[5, 10], help="for names without /N (default 5,10)")
    sub.add_argument("--samples", type=int, default=None)

    sub = command("show", _show, "print a solver, or list those that exist")
    sub.add_argument("solver", nargs="?")
    sub.add_argument("--family", choices=("flow", "vp"), default="flow", help="for hand-made names")
    sub.add_argument("--plot", help="also draw it here (PNG)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
