"""A network of its own field: CSDI (MIT) fills the gaps in records of intensive care. Makes docs/real.md.

    git clone https://github.com/ermongroup/CSDI && pip install linear-attention-transformer pandas requests wget
    (cd CSDI && python download.py physio)
    python -m examples.patients --write docs/real.md

Its network is an ordinary file of its repository, the records are PhysioNet's of 2012, which the last line but one
downloads: 35 measurements over 48 hours of 4,000 stays, each less its mean, over its deviation. A sample is a stay:
(35, 48), given what was measured. CSDI itself takes 50 steps of DDPM.

The measure is the paper's: a tenth of what was measured is hidden, and CRPS says how far the samples are from it. The
stays to measure on are of the paper's first test fold, which the network did not see; a search sees other stays.
"""

from __future__ import annotations

import importlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dss_fast import DiscreteVP, GaussNewton, Solver, Target, sample, search
from examples.page import parser_of, put, table

STEPS, MEASUREMENTS, HOURS = 50, 35, 48
CONFIG = {  # config/base.yaml
    "diffusion": {
        "layers": 4, "channels": 64, "nheads": 8, "diffusion_embedding_dim": 128, "is_linear": False,
        "num_steps": STEPS, "beta_start": 1e-4, "beta_end": 0.5, "schedule": "quad",
    },
    "model": {"is_unconditional": 0, "timeemb": 128, "featureemb": 16, "target_strategy": "random"},
}  # fmt: skip
SEED, HIDDEN, TEST = 1, 0.1, 0.2  # of exe_physio.py: what is hidden, and the share of stays in the first fold
STAYS, SAMPLES = 24, 3  # measured: 72 samples, for a call takes 0.04 s of one thread each
PART = 24  # of them in one call
HANDMADE = {"DPM-Solver++ 2M": "dpmpp_2m", "UniPC": "unip3"}
CALLS, BUDGET = (5, 3), 1_500  # one search for both, in calls of one stay
MARKS = "<!-- patients -->", "<!-- end of patients -->"


def schedule() -> DiscreteVP:
    return DiscreteVP.scaled_linear(STEPS, 1e-4, 0.5)


@dataclass(frozen=True)
class Stays:
    """values: (B, 35, 48), 0 where nothing was measured. told, asked: (B, 35, 48), what the network is told of what was
    measured, and what is hidden from it. test: which of them the network was not trained on."""

    values: Tensor
    told: Tensor
    asked: Tensor
    test: Tensor

    @classmethod
    def read(cls, folder: Path, names: list[str]) -> Stays:
        """The records of a folder, ``RecordID.txt`` each, with the masks and the folds that CSDI's seed 1 draws."""
        files = sorted(folder.glob("[0-9]*.txt"))
        if not files:
            raise ValueError(f"{folder}: holds no record such as 132539.txt; run CSDI's download.py there")
        found = np.full((len(files), HOURS, MEASUREMENTS), np.nan)
        place = {name: i for i, name in enumerate(names)}
        for stay, file in enumerate(files):
            for line in file.read_text(encoding="utf-8").split()[1:]:
                clock, name, value = line.split(",")
                if name in place and int(clock[:2]) < HOURS:
                    found[stay, int(clock[:2]), place[name]] = float(value)  # the last of an hour
        measured = ~np.isnan(found)
        told, random = measured.copy(), np.random.RandomState(SEED)
        for rows in told:
            at = np.flatnonzero(rows)
            rows.reshape(-1)[random.choice(at, int(len(at) * HIDDEN), replace=False)] = False
        flat = found.reshape(-1, MEASUREMENTS)
        values = np.nan_to_num((found - np.nanmean(flat, 0)) / np.nanstd(flat, 0))
        order = np.arange(len(files))
        np.random.RandomState(SEED).shuffle(order)
        turned = [torch.from_numpy(part).transpose(1, 2) for part in (values, told, measured & ~told)]
        return cls(turned[0].float(), turned[1], turned[2], torch.from_numpy(order[: int(TEST * len(files))]))

    def others(self) -> Tensor:
        """The stays that are not of the test fold."""
        return torch.arange(len(self.values))[~torch.isin(torch.arange(len(self.values)), self.test)]

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        others = self.others()
        return {"stay": others[torch.randint(len(others), (n,), generator=generator)]}


class Between(nn.Module):
    """An embedding of the integers 0..T-1 for times between them, interpolated: the network's error there lies between
    those of its neighbours (0.684 at 3.5 where they have 0.736 and 0.673)."""

    def __init__(self, inner: nn.Module, steps: int):
        super().__init__()
        self.inner, self.steps = inner, steps

    def forward(self, t: Tensor) -> Tensor:
        lower = t.detach().floor().clamp(0, self.steps - 2).long()
        share = (t - lower)[:, None].float()
        return self.inner(lower) * (1 - share) + self.inner(lower + 1) * share  # type: ignore[no-any-return]


class Filled(nn.Module):
    """CSDI's network as model(x, t, stay) -> epsilon. x: (B, 35, 48); what is told ends at 0. t: (B,), the index of the
    schedule, which is the network's time."""

    def __init__(self, net: nn.Module, stays: Stays):
        super().__init__()
        self.net, self.stays, self.noise = net, stays, schedule()
        net.diffmodel.diffusion_embedding = Between(net.diffmodel.diffusion_embedding, STEPS)  # type: ignore[union-attr]

    def given(self, stay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """values and told of some stays, and what the network makes of hours, names and told."""
        net: Any = self.net
        told = self.stays.told[stay].float()
        hours = torch.arange(HOURS).float().expand(len(stay), -1)
        return self.stays.values[stay], told, net.get_side_info(hours, told)

    def forward(self, x: Tensor, t: Tensor, stay: Tensor) -> Tensor:
        net: Any = self.net
        values, told, side = self.given(stay)
        found = net.diffmodel(net.set_input_to_diffmodel(x, values, told), side, t)
        _, sigma = self.noise.alpha_sigma(1 - (t.double() + 1) / STEPS)
        return torch.where(told.bool(), x / sigma.to(x).reshape(-1, 1, 1), found)


def target(folder: Path = Path("CSDI")) -> Target:
    """The network and the records of a clone of CSDI in which download.py has been run."""
    if not (folder / "save/pretrained/model.pth").is_file():
        raise ValueError(f"{folder}: is no clone of github.com/ermongroup/CSDI; it has no save/pretrained/model.pth")
    sys.path.insert(0, str(folder))
    try:
        main_model, records = importlib.import_module("main_model"), importlib.import_module("dataset_physio")
    finally:
        sys.path.remove(str(folder))
    net = main_model.CSDI_Physio(CONFIG, "cpu")
    net.load_state_dict(torch.load(folder / "save/pretrained/model.pth", map_location="cpu", weights_only=True))
    stays = Stays.read(folder / "data/physio/set-a", records.attributes)
    return Target(
        Filled(net.eval(), stays), (MEASUREMENTS, HOURS), schedule(), cond=stays.draw, name="csdi", key="csdi"
    )


def crps(x: Tensor, values: Tensor, asked: Tensor) -> float:
    """The mean over hidden values of E|X - value| - E|X - X'| / 2, over the mean of |value|, as the paper divides.

    x: (B, S, 35, 48), S >= 2 samples a stay. Its estimate from S samples has no bias (Ferro, QJRMS 140, 1917, 2014).
    """
    x, values = x.double(), values.double()
    count = x.shape[1]
    far = (x - values[:, None]).abs().mean(1)
    apart = (x[:, :, None] - x[:, None]).abs().sum((1, 2)) / (2 * count * (count - 1))
    return float((far - apart)[asked].sum() / values[asked].abs().sum())


def measured(about: Target) -> Tensor:
    """The stays to measure on, (72,): each three times."""
    return about.model.stays.test[:STAYS].repeat_interleave(SAMPLES)  # type: ignore[no-any-return, attr-defined]


def sampled(about: Target, solver: Solver | str, seed: int = 1) -> Tensor:
    rows = measured(about)
    noise = torch.randn(len(rows), MEASUREMENTS, HOURS, generator=torch.Generator().manual_seed(seed))
    parts = zip(noise.split(PART), rows.split(PART), strict=True)
    return torch.cat([sample(about, x, solver, cond={"stay": which}) for x, which in parts])


@torch.no_grad()
def their_own(about: Target, seed: int = 1) -> Tensor:
    """The same by CSDI's sampler as it is: 50 steps of DDPM."""
    model: Any = about.model
    torch.manual_seed(seed)
    found = []
    for rows in measured(about).split(PART):
        values, told, side = model.given(rows)
        inner = model.net.diffmodel.diffusion_embedding
        model.net.diffmodel.diffusion_embedding = inner.inner  # its sampler tells whole times, all rows the same
        try:
            found.append(model.net.impute(values, told, side, 1)[:, 0])
        finally:
            model.net.diffmodel.diffusion_embedding = inner
    return torch.cat(found)


def crps_of(about: Target, solver: Solver | str | None) -> float:
    """None: CSDI's own sampler."""
    x = their_own(about) if solver is None else sampled(about, solver)
    stays, rows = about.model.stays, about.model.stays.test[:STAYS]  # type: ignore[attr-defined]
    return crps(x.unflatten(0, (-1, SAMPLES)), stays.values[rows], stays.asked[rows])


def measure(folder: Path, seed: int = 0) -> str:
    """The page's table, and the line that says what the search took."""
    about = target(folder)
    ways: dict[str, tuple[int, Solver | str | None]] = {"CSDI's own DDPM": (STEPS, None)}
    ways |= {f"DDIM, {n} calls": (n, f"euler/{n}") for n in (20, 10, *CALLS)}
    ways |= {f"{title}, 5 calls": (5, f"{name}/5") for title, name in HANDMADE.items()}
    ways["DPM-Solver++ 2M, 3 calls"] = 3, "dpmpp_2m/3"  # UniPC's table, too
    begin = time.perf_counter()
    found = search(about, CALLS, method=GaussNewton(batch_size=8), budget=BUDGET, seed=seed, progress=False)
    said = f"The search took {found.evaluations:,} evaluations, {time.perf_counter() - begin:.0f} s on one thread."
    ways |= {f"**searched, {n} calls**": (n, found.solvers[n]) for n in CALLS}
    print(said, flush=True)
    rows = ([title, str(calls), f"{crps_of(about, solver):.3f}"] for title, (calls, solver) in ways.items())
    lines = table(("sampler", "calls", "CRPS of what was hidden"), rows)
    hidden = int(about.model.stays.asked[about.model.stays.test[:STAYS]].sum())  # type: ignore[attr-defined]
    return "\n".join([*lines, "", f"{hidden} hidden values of {STAYS} stays, {SAMPLES} samples of each. {said}"])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--csdi", type=Path, default=Path("CSDI"), metavar="FOLDER", help="the clone of CSDI")
    options = parser.parse_args()
    torch.set_num_threads(1)
    put(lambda: measure(options.csdi), options.write, MARKS)


if __name__ == "__main__":
    main()
