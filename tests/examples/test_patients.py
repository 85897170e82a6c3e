"""What docs/real.md measures of records of intensive care, and how the network is called, with a stand-in of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dss_fast import Target, sample
from examples import patients
from examples.patients import HOURS, MEASUREMENTS, STEPS, Between, Filled, Stays, crps


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:Degrees of freedom")  # of names not measured
def test_the_last_value_of_an_hour_counts_and_each_measurement_has_mean_0_and_deviation_1(tmp_path):
    for stay in range(10):
        lines = ["Time,Parameter,Value", f"00:00,RecordID,{stay}", "00:10,HR,50", f"00:50,HR,{stay}", "01:00,HR,4"]
        lines += [f"{hour:02}:30,Temp,{hour + stay}" for hour in range(20)] + ["48:00,Temp,1000"]
        (tmp_path / f"{stay:06}.txt").write_text("\n".join(lines))
    stays = Stays.read(tmp_path, ["HR", "Temp", *"abc"] + ["unseen"] * (MEASUREMENTS - 5))
    assert stays.values.shape == (10, MEASUREMENTS, HOURS)
    measured = stays.told | stays.asked
    assert not (stays.told & stays.asked).any() and measured.sum() == 10 * 22 and measured[:, :2].sum() == 10 * 22
    assert stays.asked.sum(dim=(1, 2)).tolist() == [2] * 10  # a tenth of 22
    for name in (0, 1):
        values = stays.values[:, name][measured[:, name]]
        assert abs(values.mean()) < 1e-5 and values.std(unbiased=False) == pytest.approx(1, abs=1e-5)
    heart = stays.values[:, 0, 0]  # 0 to 9, not the 50 of earlier in the hour
    torch.testing.assert_close(heart.diff(), heart.diff()[:1].expand(9))
    assert len(stays.test) == 2 and not set(stays.test.tolist()) & set(stays.others().tolist())
    drawn = stays.draw(100, torch.Generator().manual_seed(0))["stay"]
    assert set(drawn.tolist()) <= set(stays.others().tolist())


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no record such as 132539.txt; run CSDI's download.py"):
        Stays.read(tmp_path, [])
    with pytest.raises(ValueError, match="is no clone of github.com/ermongroup/CSDI"):
        patients.target(tmp_path)


def test_crps_is_that_of_the_distribution_however_few_the_samples():
    asked = torch.ones(20_000, 1, 1, dtype=torch.bool)
    value = torch.full((20_000, 1, 1), 0.5)
    # Of a standard normal at y = .5: y (2 Phi(y) - 1) + 2 phi(y) - 1 / sqrt(pi) = 0.3314, over |y|.
    for count in (2, 6):
        x = torch.randn(20_000, count, 1, 1, generator=torch.Generator().manual_seed(count))
        assert crps(x, value, asked) == pytest.approx(0.3314 / 0.5, rel=0.03)
    exact = value[:, None].expand(-1, 3, -1, -1)
    assert crps(exact, value, asked) == 0
    wrong = exact.clone()
    wrong[0] = 1e9
    asked[0] = False
    assert crps(wrong, value, asked) == 0  # what was not hidden does not count


def test_an_embedding_of_integers_is_interpolated_and_exact_at_them():
    inner = nn.Embedding(5, 3)
    between = Between(inner, 5)
    torch.testing.assert_close(between(torch.arange(5.0)), inner.weight)
    torch.testing.assert_close(between(torch.tensor([2.25])), (0.75 * inner.weight[2] + 0.25 * inner.weight[3])[None])
    t = torch.tensor([2.25], requires_grad=True)
    between(t).sum().backward()
    torch.testing.assert_close(t.grad, (inner.weight[3] - inner.weight[2]).sum()[None])


class Oracle(nn.Module):
    """A network of CSDI's interface that knows the stays."""

    def __init__(self, values):
        super().__init__()
        self.asked, self.values = [], values
        self.diffmodel = SimpleNamespace(diffusion_embedding=nn.Identity())
        self.diffmodel = Inner(self)

    def get_side_info(self, hours, told):
        assert hours[0].tolist() == list(range(HOURS))
        return told

    def set_input_to_diffmodel(self, x, values, told):
        return torch.stack([told * values, (1 - told) * x], 1)


class Inner(nn.Module):
    def __init__(self, oracle):
        super().__init__()
        self.oracle, self.diffusion_embedding = [oracle], nn.Identity()

    def forward(self, given, told, t):
        oracle = self.oracle[0]
        oracle.asked.append(t.tolist())
        alpha, sigma = patients.schedule().alpha_sigma(1 - (t.double() + 1) / STEPS)
        away = given[:, 1] - alpha.float()[:, None, None] * oracle.values[: len(t)]
        return away / sigma.float()[:, None, None]


def test_hidden_values_come_where_the_network_puts_them_and_told_ones_end_at_0():
    values = torch.randn(3, MEASUREMENTS, HOURS, generator=torch.Generator().manual_seed(0))
    told = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    net = Oracle(values)
    model = Filled(net, Stays(values, told, ~told, torch.tensor([0])))
    target = Target(model, (MEASUREMENTS, HOURS), patients.schedule(), cond=model.stays.draw)
    x = sample(target, torch.randn_like(values), "euler/5", cond={"stay": torch.arange(3)})
    torch.testing.assert_close(x, torch.where(told, 0, values), atol=5e-4, rtol=1e-3)
    assert [asked[0] for asked in net.asked] == pytest.approx([49, 39, 29, 19, 9])  # the network's own times
    assert all(len(set(asked)) == 1 for asked in net.asked)


def test_the_page_holds_the_table():
    page = (Path(__file__).parents[2] / "docs" / "real.md").read_text(encoding="utf-8")
    begin, end = patients.MARKS
    assert page.count(begin) == page.count(end) == 1
    assert "CSDI's own DDPM" in page.split(begin)[1].split(end)[0]
