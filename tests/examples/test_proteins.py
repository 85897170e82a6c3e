"""What docs/real.md measures, and how the network of another package is called, with stand-ins of its interface."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dss_fast import Target, sample
from examples import proteins
from examples.proteins import ATOMS, STEPS, Bonds, Placed, Residues


def residue(mirrored=False):
    """N, C, O and C-beta around a C-alpha at 0, at their ideal lengths and angles of 110 degrees or so."""
    x = torch.zeros(ATOMS, 3)
    x[0], x[1] = torch.tensor([1.458, 0, 0]), 1.525 * torch.tensor([-0.36, 0.933, 0])
    x[1] *= 1.525 / x[1].norm()
    x[2] = x[1] + torch.tensor([0, 1.231, 0])
    beta = torch.tensor([-0.5, -0.7, 0.9 * (1 - 2 * mirrored)])
    x[3] = 1.530 * beta / beta.norm()
    return x


def test_bonds_are_measured_in_angstrom_and_hands_are_told():
    counts = torch.tensor([4, 4, 3])
    ideal = torch.stack([residue(), residue(), residue()])
    assert Bonds.of(ideal, counts).error < 1e-6 and Bonds.of(ideal, counts).mirrored == 0
    ideal[2, 3] = 99  # glycine has no C-beta, whatever stands in its row
    assert Bonds.of(ideal, counts).error < 1e-6
    assert Bonds.of(torch.stack([residue(), residue(True), residue()]), counts).mirrored == 0.5
    longer = ideal.clone()
    longer[:, 0] *= (1.458 + 0.2) / 1.458  # one bond of 4, 4 and 3
    assert Bonds.of(longer, counts).error == pytest.approx((3 * 0.2**2 / 11) ** 0.5, rel=1e-5)


class Graph:
    """A network of cgback's interface that knows where the atoms belong, from a feature of each."""

    def __init__(self, places, asked):
        self.places, self.asked = places, asked

    def features_embedding(self, told):
        self.asked.append(told[:, -1])
        return told

    def egnn(self, told, x, edges):
        alpha, sigma = proteins.schedule().alpha_sigma(1 - told[:, -1:].double())
        return told, ((x - alpha * self.places[told[:, 0].long()]) / sigma).float()


@pytest.fixture
def placed(monkeypatch):
    package, loader = ModuleType("cgback"), ModuleType("cgback.dataloader")

    def collate_fn(graphs):
        mask = torch.cat([torch.cat([torch.ones(g.n), torch.zeros(2)]) for g in graphs])[:, None]
        return SimpleNamespace(
            hu=torch.cat([g.hu for g in graphs]), xw=torch.zeros(len(mask), 3), e=None, mask=mask,
            num_h=torch.tensor([g.n for g in graphs], dtype=torch.uint8),
            num_u=torch.full([len(graphs)], 2, dtype=torch.uint8),
        )  # fmt: skip

    loader.collate_fn = collate_fn
    monkeypatch.setitem(sys.modules, "cgback", package)
    monkeypatch.setitem(sys.modules, "cgback.dataloader", loader)
    places, asked = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), []
    graphs = [
        SimpleNamespace(n=4, hu=torch.arange(6.0)[:, None]),  # four atoms to place, two others
        SimpleNamespace(n=3, hu=torch.tensor([6.0, 7, 8, 4, 5])[:, None]),
    ]
    monkeypatch.setattr(proteins, "network", lambda layers: Graph(places, asked))
    return Placed(Residues(tuple(graphs), torch.tensor([4, 3]))), places, asked


def test_each_atom_comes_where_its_network_puts_it_and_the_rows_beyond_end_at_0(placed):
    model, places, asked = placed
    target = Target(model, (ATOMS, 3), proteins.schedule(), cond=model.residues.draw)
    x = sample(target, torch.randn(3, ATOMS, 3), "euler/4", cond={"residue": torch.tensor([0, 1, 0])})
    wanted = torch.zeros(3, ATOMS, 3)
    wanted[0, :4], wanted[1, :3], wanted[2, :4] = places[:4], places[6:9], places[:4]
    torch.testing.assert_close(x, wanted, atol=2e-4, rtol=1e-4)
    assert [float(told[0]) for told in asked] == pytest.approx([1.0, 0.75, 0.5, 0.25])  # (n + 1) / 20, as it counts
    assert STEPS == 20


def test_the_page_holds_the_table():
    page = (Path(__file__).parents[2] / "docs" / "real.md").read_text(encoding="utf-8")
    begin, end = proteins.MARKS
    assert page.count(begin) == page.count(end) == 1
    assert "cgback's own DDPM" in page.split(begin)[1].split(end)[0]
