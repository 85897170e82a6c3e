"""A network of its own field: the galaxies of scarlet2 (MIT), 32 x 32 pixels each. Makes docs/real.md.

    git clone https://github.com/pmelchior/scarlet2
    git -C scarlet2 show 388f691:scarlet2/stored_models/eqx_scorenet32.eqx > scorenet32.eqx
    python -m examples.galaxies --write docs/real.md

A mixer of 0.6 million weights that returns the score along the variance-preserving path alpha = exp(-t / 2), t from 10
to 0, kept as a row of NumPy arrays, which torch reads without JAX. Its authors
sample such networks with 400 steps of Tsit5, 2,400 calls (galaxygrad 0.1.9, `generate.py`).

The measure is the field's: half-light radius, axis ratio, concentration and Gini coefficient of the galaxies, whose
distributions are held beside those of a long run from other noise (Kolmogorov and Smirnov: the largest difference of
the two shares below a value, 0 to 1).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dss_fast import DiscreteVP, GaussNewton, Solver, Target, sample, search
from examples.page import parser_of, put, table

SIZE, PATCH, HIDDEN, BLOCKS = 32, 4, 64, 4
LAST = 10.0  # the time of noise
TABLE = 1_000  # entries of the schedule, whose log alpha is linear between them as the network's own
GALAXIES, PART = 320, 64  # measured, and of them in one call
REFERENCE, LONG = 512, 40  # galaxies of the long run and its calls
CHECKED, THEIR_STEPS, SHORT = 4, 400, 5  # galaxies made by the authors' solver too, its steps, and those of a row
CALLS, BUDGETS, SEEDS = 5, (1_500, 6_000), (0, 1, 2)
HANDMADE = {"DPM-Solver++ 2M": "dpmpp_2m/{}", "UniPC": "unip3/{}", "UniPC, even in log-SNR": "unip3/{}@lambda"}
MARKS = "<!-- galaxies -->", "<!-- end of galaxies -->"
# Tsitouras, Computers and Mathematics with Applications 62, 770 (2011): the rows of the six stages, and the weights.
TSIT5 = (
    (),
    (0.161,),
    (-0.008480655492356989, 0.335480655492357),
    (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
    (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
    (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
    (
        0.09646076681806523, 0.01, 0.4798896504144996,
        1.379008574103742, -3.290069515436081, 2.324710524099774,
    ),
)  # fmt: skip


def schedule() -> DiscreteVP:
    times = LAST * torch.arange(1, TABLE + 1, dtype=torch.float64) / TABLE
    return DiscreteVP(tuple((-times).exp().tolist()), name="galaxies")


class Block(nn.Module):
    """Mixes the patches of each channel, then the channels of each patch."""

    def __init__(self, weights: list[Tensor]):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(one, requires_grad=False) for one in weights)

    def forward(self, x: Tensor) -> Tensor:
        patches, channels, first, second = (self.weights[i:j] for i, j in ((0, 4), (4, 8), (8, 10), (10, 12)))
        x = x + _mlp(F.layer_norm(x, first[0].shape, *first), *patches)
        x = x.transpose(1, 2)
        return (x + _mlp(F.layer_norm(x, second[0].shape, *second), *channels)).transpose(1, 2)


def _mlp(x: Tensor, into: Tensor, bias: Tensor, out: Tensor, last: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, into, bias)), out, last)


class Score(nn.Module):
    """(x, t) -> the score. x: (B, 1, 32, 32). t: (B,), the path's own, 10 noise to 0 data."""

    def __init__(self, arrays: list[Tensor]):
        super().__init__()
        if len(arrays) != 6 + 12 * BLOCKS + 1:
            raise ValueError(f"{len(arrays)} arrays: this network has {6 + 12 * BLOCKS + 1}")
        *arrays, self.last = *arrays[:-1], float(arrays[-1])
        ends = [arrays[0], arrays[1].flatten(), arrays[2].flip(2, 3).transpose(0, 1), arrays[3].flatten()]
        self.ends = nn.ParameterList(nn.Parameter(one, requires_grad=False) for one in (*ends, *arrays[-2:]))
        self.blocks = nn.Sequential(*(Block(arrays[4 + 12 * i : 16 + 12 * i]) for i in range(BLOCKS)))

    @classmethod
    def load(cls, file: Path) -> Score:
        found = []
        with file.open("rb") as stream:
            while stream.peek(1):  # type: ignore[attr-defined]  # of a buffered file
                found.append(torch.from_numpy(np.load(stream, allow_pickle=False)))
        return cls(found)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        into, bias, out, last, scale, shift = self.ends
        told = (t / self.last).to(x).reshape(-1, 1, 1, 1).expand_as(x)
        x = F.conv2d(torch.cat([x, told], 1), into, bias, stride=PATCH)
        mixed = F.layer_norm(self.blocks(x.flatten(2)), scale.shape, scale, shift)
        return F.conv_transpose2d(mixed.view_as(x), out, last, stride=PATCH)


class Epsilon(nn.Module):
    """The score as model(x, t) -> epsilon = -sigma score. t: (B,), the index n of the schedule: 10 (n + 1) / 1,000."""

    def __init__(self, score: Score):
        super().__init__()
        self.score = score

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = LAST * (t + 1) / TABLE
        return -(-torch.expm1(-time)).sqrt().to(x).reshape(-1, 1, 1, 1) * self.score(x, time)


def target(file: Path = Path("scorenet32.eqx")) -> Target:
    """The network of a file that git show has written."""
    return Target(Epsilon(Score.load(file).eval()), (1, SIZE, SIZE), schedule(), name="galaxies", key="galaxies")


@dataclass(frozen=True)
class Shapes:
    """Of each galaxy, (B,): the radius with half its light, in pixels; the axis ratio of its second moments; 5 log10 of
    the radii with 80 % and 20 % of its light; the Gini coefficient of its pixels."""

    radius: Tensor
    axes: Tensor
    concentration: Tensor
    gini: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Shapes:
        """x: (B, 1, 32, 32). Light is what is above the sky, the median of the border, by three of its deviations."""
        x = x.double().flatten(0, 1)
        border = torch.cat([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], 1)
        sky = border.median(1, keepdim=True)[0]
        noise = 1.4826 * (border - sky).abs().median(1, keepdim=True)[0]
        light = (x - sky[..., None]) * (x > (sky + 3 * noise)[..., None])
        light[:, SIZE // 2, SIZE // 2] += 1e-9  # a galaxy without light has a place nevertheless
        light = light / light.sum((1, 2), keepdim=True)
        at = torch.arange(SIZE, dtype=torch.float64)
        rows, columns = at[:, None] - (light.sum(2) @ at)[:, None, None], at - (light.sum(1) @ at)[:, None, None]
        yy, xx, xy = ((light * a * b).sum((1, 2)) for a, b in ((rows, rows), (columns, columns), (rows, columns)))
        spread = ((yy - xx) ** 2 + 4 * xy**2).sqrt()
        axes = ((yy + xx - spread).clamp_min(0) / (yy + xx + spread).clamp_min(1e-12)).sqrt()
        radii, order = (rows**2 + columns**2).sqrt().flatten(1).sort(1)
        within = light.flatten(1).gather(1, order).cumsum(1)
        fifth, half, most = (radii.gather(1, (within < part).sum(1, keepdim=True))[:, 0] for part in (0.2, 0.5, 0.8))
        bright = light.flatten(1).sort(1)[0]
        n = bright.shape[1]
        gini = ((2 * torch.arange(1, n + 1) - n - 1) * bright).sum(1) / (bright.mean(1) * n * (n - 1))
        return cls(half, axes, 5 * (most.clamp_min(0.5) / fifth.clamp_min(0.5)).log10(), gini)  # half a pixel at least

    def far(self, other: Shapes) -> dict[str, float]:
        """Kolmogorov and Smirnov's distance of the two distributions of each shape."""
        return {name: _ks(mine, getattr(other, name)) for name, mine in vars(self).items()}


def _ks(a: Tensor, b: Tensor) -> float:
    at = torch.cat([a, b]).sort()[0]
    shares = [torch.searchsorted(one.sort()[0], at, right=True) / len(one) for one in (a, b)]
    return float((shares[0] - shares[1]).abs().max())


def _off(x: Tensor, long: Tensor) -> float:
    return float((x - long).square().mean().sqrt() / long.std())


def noise(count: int, seed: int) -> Tensor:
    return torch.randn(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def sampled(about: Target, solver: Solver | str, x: Tensor) -> Tensor:
    return torch.cat([sample(about, part, solver) for part in x.split(PART)])


@torch.no_grad()
def tsit5(score: Score, x: Tensor, steps: int) -> Tensor:
    """dx/dt = -(x + score) / 2 from t = 10 to 0 in equal steps of six calls, as the network's authors do it."""
    step = -LAST / steps
    stages = [sum(row) for row in TSIT5[:-1]]
    for i in range(steps):
        slopes: list[Tensor] = []
        for row, stage in zip(TSIT5[:-1], stages, strict=True):
            y = x + step * sum((a * k for a, k in zip(row, slopes, strict=True)), torch.zeros(()))
            t = max(LAST + step * (i + stage), 0.0)
            slopes.append(-0.5 * (y + score(y, torch.full((len(x),), t))))
        x = x + step * sum((b * k for b, k in zip(TSIT5[-1], slopes, strict=True)), torch.zeros(()))
    return x


def measure(file: Path) -> str:
    """The page's table, and the lines that say what the searches took and how long the long run is."""
    about, score = target(file), Score.load(file)
    ways: dict[str, tuple[int, list[Solver | str | int]]] = {f"UniPC, {LONG} calls": (LONG, [f"unip3/{LONG}@lambda"])}
    ways |= {f"Tsit5, {SHORT} steps": (6 * SHORT, [SHORT])}
    ways |= {f"DDIM, {n} calls": (n, [f"euler/{n}"]) for n in (20, 10, CALLS)}
    ways |= {f"{title}, {n} calls": (n, [name.format(n)]) for n in (10, CALLS) for title, name in HANDMADE.items()}
    said = []
    for budget in BUDGETS:
        begin = time.perf_counter()
        found = [search(about, CALLS, method=GaussNewton(), budget=budget, seed=k, progress=False) for k in SEEDS]
        took, calls = (time.perf_counter() - begin) / len(SEEDS), sum(one.evaluations for one in found) // len(SEEDS)
        said.append(f"{took:.0f} s for {calls:,} calls")
        title = f"**searched with {calls:,} calls of one galaxy, {CALLS} calls**, mean of {len(SEEDS)} searches"
        ways[title] = CALLS, [one.solver for one in found]
        print(said[-1], flush=True)
    there = Shapes.of(sampled(about, f"unip3/{LONG}@lambda", noise(REFERENCE, seed=3)))
    x = noise(GALAXIES, seed=1)
    long = sampled(about, f"unip3/{LONG}@lambda", x)

    def figures(way: Solver | str | int) -> list[float]:
        made = (tsit5(score, x, way) if isinstance(way, int) else sampled(about, way, x)).nan_to_num(0, 0, 0)
        return [*Shapes.of(made).far(there).values(), _off(made, long)]

    def cells(of: list[Solver | str | int]) -> list[str]:
        return [f"{value:.2f}" for value in np.mean([figures(way) for way in of], 0)]

    rows = ([title, str(calls), *cells(of)] for title, (calls, of) in ways.items())
    head = ("sampler", "calls", "half-light radius", "axis ratio", "concentration", "Gini", "off the long run")
    lines = table(head, rows)
    few = noise(CHECKED, seed=4)
    off = _off(tsit5(score, few, THEIR_STEPS), sampled(about, f"unip3/{LONG}@lambda", few))
    return "\n".join([
        *lines, "",
        f"A search took {' or '.join(said)}, on one thread of a busy machine. The first row says how far {GALAXIES} "
        f"galaxies are from {REFERENCE} of the same sampler by chance; the last column is the pixels' rms distance "
        f"from it, from the same noise, over their deviation. The {6 * THEIR_STEPS:,} calls of Tsit5 that the authors "
        f"take, too many for the table, end {off:.2f} away from it ({CHECKED} galaxies).",
    ])  # fmt: skip


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--weights", type=Path, default=Path("scorenet32.eqx"), metavar="FILE", help="the network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    put(lambda: measure(options.weights), options.write, MARKS)


if __name__ == "__main__":
    main()
