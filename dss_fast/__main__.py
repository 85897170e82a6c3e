"""The command line: ``python -m dss_fast {search,sample,compare,show}``.

A model is named ``module:attribute``. The attribute is a dict, or a function without arguments that
returns one, of what ``search``, ``sample`` and ``compare`` take: model, shape, schedule, cond, uncond,
guidance_scale, and optionally features, classify, labels and decode.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from . import __version__
from .compare import compare
from .handmade import METHODS
from .plots import plot_samples, plot_solver
from .sampling import find_solver, sample
from .schedule import default_schedule
from .search import search
from .solver import Solver


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status. Expected errors are one line on stderr and status 2."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        print(f"dss_fast {options.command}: {error}{notes}", file=sys.stderr)
        return 2


def load_target(name: str) -> dict:
    """The dict behind ``module:attribute``. Raises ValueError saying which part does not exist."""
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
    target = target() if callable(target) else target
    missing = {"model", "shape"} - set(target) if isinstance(target, dict) else {"a dict"}
    if missing:
        raise ValueError(f"model {name!r}: lacks {', '.join(sorted(missing))}; see python -m dss_fast --help")
    return target


def _search(options: argparse.Namespace) -> None:
    target = load_target(options.model)
    settings = {
        key: getattr(options, key)
        for key in ("method", "space", "samples", "budget", "seed", "device")
        if getattr(options, key) is not None
    }
    result = search(
        **_accepted(search, target),
        **settings,
        num_steps=options.steps,
        out=options.out,
        resume=options.resume,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        print(result)


def _sample(options: argparse.Namespace) -> None:
    target = load_target(options.model)
    path = Path(options.out)
    _check_folder(path.parent)
    schedule = target.get("schedule")
    solver = find_solver(options.solver, schedule, options.steps)
    generator = torch.Generator().manual_seed(options.seed)
    noise = torch.randn(options.number, *target["shape"], generator=generator)
    cond = target.get("cond")
    cond = cond(options.number, generator) if callable(cond) else cond
    x = sample(
        target["model"], noise.to(options.device or "cpu"), solver, cond=cond,
        **{k: target[k] for k in ("schedule", "uncond", "guidance_scale", "guided_channels") if k in target},
    )  # fmt: skip
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({"samples": x.cpu().contiguous()}, path)
    else:
        images = target["decode"](x) if "decode" in target else x
        columns = min(8, len(images))
        plot_samples({f"{c}": images[c::columns] for c in range(columns)}, path, rows=len(images) // columns)
    print(f"{options.number} samples of {solver.name or options.solver} in {path}")


def _compare(options: argparse.Namespace) -> None:
    target = load_target(options.model)
    out = Path(options.out)
    _check_folder(out)
    arguments = {k: getattr(options, k) for k in ("samples", "seed", "device") if getattr(options, k) is not None}
    result = compare(
        solvers=options.solvers or list(DEFAULT_SOLVERS), num_steps=options.steps,
        **_accepted(compare, target), **arguments,
    )  # fmt: skip
    print(result)
    (out / "compare.txt").write_text(str(result) + "\n")
    result.save(out / "compare.json")
    result.plot(out / "compare.png")
    print(f"\nsaved in {out}: compare.txt, compare.json, compare.png")


def _show(options: argparse.Namespace) -> None:
    if options.solver is None:
        print("published:  " + "  ".join(Solver.names()))
        print("hand-made:  " + "  ".join(f"{m}/N[@spacing]" for m in METHODS))
        return
    schedule = default_schedule(options.family)
    solver = find_solver(options.solver, schedule)
    print(f"{solver.name or options.solver}: {solver.num_steps} steps, {solver.family}; {solver.source}")
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


def _accepted(function: Callable, target: dict) -> dict:
    """The part of a target that a function takes."""
    return {k: v for k, v in target.items() if k in inspect.signature(function).parameters}


def _check_folder(folder: Path) -> None:
    """Raises OSError before any work when results could not be written."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe.{os.getpid()}"
    probe.touch()
    probe.unlink()


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

    def command(name: str, run: Callable, text: str, out: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if out:
            sub.add_argument("model", help="module:attribute, for example examples.mnist:flow")
            sub.add_argument("-o", "--out", default=out, help=f"where results go (default {out})")
            sub.add_argument("--seed", type=int, default=None)
            sub.add_argument("--device", default=None, help="cpu, cuda, ... (default cpu)")
        return sub

    sub = command("search", _search, "search a solver for a model", "out")
    sub.add_argument("--steps", type=_steps, default=[10], help="numbers of steps, as in 5,8,10")
    sub.add_argument("--method", default=None, help="gauss_newton (default) or lion, the paper's")
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
