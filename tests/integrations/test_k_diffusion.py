"""sample_dss against sample on the small MNIST networks, and against k-diffusion itself."""

import importlib
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dss_fast import VP, DiscreteVP, Flow, Grid, find_solver, handmade, sample
from dss_fast.integrations.k_diffusion import sample_dss, sigmas_of
from examples.mnist import load_flow, load_vp


def flow_denoiser(net):
    return lambda x, sigma, y: x + sigma.view(-1, 1, 1, 1) * net(x, 1 - sigma, y)


def vp_denoiser(net):
    """x0 at (x / alpha, sigma / alpha): the time from sigma in closed form, for beta(t) = 0.1 + 19.9 t."""

    def denoise(x, sigma, y):
        log_alpha = -0.5 * torch.log1p(sigma.double() ** 2)
        t = (-0.1 + torch.sqrt(0.01 - 4 * 19.9 * log_alpha)) / 19.9
        alpha = log_alpha.exp().to(x.dtype).view(-1, 1, 1, 1)
        eps = net(alpha * x, (1000 * t).to(x.dtype), y)
        return x - sigma.view(-1, 1, 1, 1) * eps

    return denoise


def both_ways(net, name, x, cond, table=None):
    """A solver by sample and by sample_dss."""
    table = table or name
    with torch.no_grad():
        theirs = sample(net, x, table, cond=cond)
        before = after = 1.0
        if not name.startswith("sit"):
            ends = VP().alpha_sigma(torch.tensor([0.0, 1.0]))[0].tolist()
            before, after = 1 / ends[0], ends[1]
        denoise = (flow_denoiser if name.startswith("sit") else vp_denoiser)(net)
        return theirs, sample_dss(denoise, x * before, sigmas_of(table), cond, disable=True, solver=table) * after


@pytest.mark.parametrize("name", ["sit-xl-2-256/5", "dit-xl-2-256/5"])
def test_equals_sample_on_a_trained_network(name):
    """In float64; in float32 sample itself is 8e-6 from it, and the two are 1.3e-5 apart."""
    net = (load_flow() if name.startswith("sit") else load_vp()).double()
    x = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs, ours = both_ways(net, name, x, {"y": torch.tensor([3])})
    assert (ours - theirs).abs().max() <= 3e-6
    theirs, ours = both_ways(net.float(), name, x.float(), {"y": torch.tensor([3])})
    assert (ours - theirs).abs().max() <= 3e-5


@pytest.mark.parametrize("name", ["sit-xl-2-256/5", "dit-xl-2-256/5"])
def test_network_times_of_their_own_are_kept(name):
    """As the default search makes them: the network sees the state at another sigma, as it does in sample."""
    net = (load_flow() if name.startswith("sit") else load_vp()).double()
    x = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = find_solver(name)
    moved = tuple(max(0.0, u + d) for u, d in zip(plain.timesteps, (0.0, 0.02, -0.03, 0.01, 0.02), strict=False))
    table = replace(plain, network_timesteps=moved)
    theirs, ours = both_ways(net, name, x, {"y": torch.tensor([3])}, table)
    assert (ours - theirs).abs().max() <= 3e-6
    still, _ = both_ways(net, name, x, {"y": torch.tensor([3])}, plain)
    assert (still - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("noise", [None, [0.02, -0.01, 0.03, 0.0, 0.01, 0.02, -0.02, 0.01]])
@pytest.mark.parametrize("name", ["sit-xl-2-256/8", "dit-xl-2-256/8"])
def test_equals_sample_in_float64(name, noise):
    """To the rounding of float32 sigmas, with a weight on the initial noise too."""
    torch.manual_seed(3)
    weight = torch.randn(6, 6, dtype=torch.float64) / 3

    def net(x, t, y):
        return torch.tanh(x @ weight + t.view(-1, 1, 1, 1) / 1000) + y.view(-1, 1, 1, 1)

    table = replace(find_solver(name), noise_coeffs=noise) if noise else None
    x = torch.randn(2, 1, 4, 6, dtype=torch.float64)
    theirs, ours = both_ways(net, name, x, {"y": torch.tensor([0.3, -0.4], dtype=torch.float64)}, table)
    assert (ours - theirs).abs().max() <= 2e-6 * max(1.0, theirs.abs().max())


@pytest.mark.parametrize(
    "schedule",
    [
        Flow(shift=3.0),
        VP(beta_min=0.2, beta_max=15.0),
        DiscreteVP.scaled_linear(),
        DiscreteVP.scaled_linear(final="sigma_min"),
        Grid((0.1, 0.6, 0.9, 1.0), (0.995, 0.8, 0.4, 0.0), (900, 500, 100)),
    ],
    ids=lambda schedule: schedule.kind,
)
@pytest.mark.parametrize("noise", [None, (0.02, -0.01, 0.03)])
def test_every_schedule_brings_its_sigmas(schedule, noise):
    """The state is x / alpha for VP, and the denoiser needs no time: tanh of the state as the network sees it."""
    table = replace(handmade("ab2", 3, schedule), noise_coeffs=noise)
    x = torch.randn(2, 5, dtype=torch.float64)
    u = torch.tensor(table.timesteps, dtype=torch.float64)
    alphas, sigmas = schedule.alpha_sigma(u)
    flow = schedule.family == "flow"
    own = sigmas if flow else sigmas / alphas
    torch.testing.assert_close(sigmas_of(table), own.float())

    def denoise(x, sigma):
        scale = torch.ones_like(sigma) if flow else (1 + sigma**2).rsqrt()
        if isinstance(schedule, Grid):
            scale = alphas[(own - sigma[0]).abs().argmin()].expand(len(x))
        return torch.tanh(scale[:, None] * x)

    wanted = sample(lambda x, t: torch.tanh(x), x, table, schedule=replace(schedule, prediction_type="x0"))
    before, after = (1.0, 1.0) if flow else (float(1 / alphas[0]), float(alphas[-1]))
    got = sample_dss(denoise, x * before, own, solver=table, disable=True) * after
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def linear(x, sigma, **_):
    return x * 0.9 / (1 + sigma.view(-1, 1))


def test_handmade_solvers_take_any_sigmas():
    """Euler in k-diffusion's own words: x + d * (sigma' - sigma)."""
    x, sigmas = torch.randn(3, 5) * 14, torch.tensor([14.0, 7.0, 3.0, 1.0, 0.2, 0.0])
    wanted = x
    for s, s_next in zip(sigmas, sigmas[1:], strict=False):
        wanted = wanted + (wanted - linear(wanted, s.expand(3))) / s * (s_next - s)
    for family in ("flow", "vp"):
        grid = sigmas / 14 if family == "flow" else sigmas
        if family == "vp":
            torch.testing.assert_close(sample_dss(linear, x, grid, solver="euler", family=family, disable=True), wanted)
        assert sample_dss(linear, x, grid, solver="dpmpp_2m", family=family, disable=True).isfinite().all()
    with pytest.raises(ValueError, match="4 steps and 5"):
        sample_dss(linear, x, sigmas, solver="euler/4", disable=True)
    with pytest.raises(ValueError, match="at least 2"):
        sample_dss(linear, x, sigmas[:1], solver="euler", disable=True)


def test_what_does_not_fit_sigmas_is_refused_and_files_are_read(tmp_path):
    x, table = torch.randn(2, 4), handmade("ab2", 3, DiscreteVP.scaled_linear())
    own = sigmas_of(table)
    with pytest.raises(ValueError, match="brings a spacing"):
        sample_dss(linear, x, own, solver="ab2@karras", disable=True)
    with pytest.raises(ValueError, match="weighs the initial noise"):
        sample_dss(linear, x, own[1:], solver=replace(table, noise_coeffs=(0.1, 0.0, 0.1)), disable=True)
    clean = replace(find_solver("sit-xl-2-256/5"), network_timesteps=(0.0, 0.1, 0.3, 0.6, 1.0))
    with pytest.raises(ValueError, match="sigma is 0"):
        sample_dss(linear, x, sigmas_of(clean), solver=clean, disable=True)
    table.save(tmp_path / "mine.json")
    for file in (tmp_path / "mine.json", str(tmp_path / "mine.json")):
        sample_dss(linear, x, own, solver=file, disable=True)


def test_callback_and_progress_bar(capsys):
    seen = []
    x, sigmas = torch.randn(2, 4), sigmas_of("sit-xl-2-256/5")
    sample_dss(linear, x, sigmas, {"seed": 3}, seen.append, True, solver="sit-xl-2-256/5")
    assert [s["i"] for s in seen] == list(range(5))
    assert all(set(s) == {"x", "i", "sigma", "sigma_hat", "denoised"} for s in seen)
    assert torch.equal(seen[0]["x"], x) and seen[2]["sigma"] == seen[2]["sigma_hat"] == sigmas[2]
    assert "5/5" not in capsys.readouterr().err
    pytest.importorskip("tqdm")
    sample_dss(linear, x, sigmas, disable=False, solver="sit-xl-2-256/5")  # None: on a terminal only
    assert "5/5" in capsys.readouterr().err


def test_sigmas_must_belong_to_the_solver():
    x, own = torch.randn(2, 4), sigmas_of("sit-xl-2-256", 6)
    other = torch.linspace(1, 0, 7)
    for sigmas in (other, own * 0.9, torch.linspace(1, 0, 20)):
        with pytest.raises(ValueError, match="do not belong to solver sit-xl-2-256/6"):
            sample_dss(linear, x, sigmas, solver="sit-xl-2-256/6", disable=True)
    with pytest.warns(UserWarning, match="do not belong"):
        sample_dss(linear, x, other, solver="sit-xl-2-256/6", strict=False, disable=True)
    with pytest.raises(ValueError, match="for flow models"):
        sample_dss(linear, x, own, solver="sit-xl-2-256/6", family="vp", disable=True)
    zero_end = sigmas_of("dit-xl-2-256/6")
    assert zero_end[-1] == pytest.approx(0.0105, abs=1e-4)
    zero_end[-1] = 0
    sample_dss(linear, x, zero_end, solver="dit-xl-2-256/6", disable=True)


@pytest.mark.parametrize("name", ["sit-xl-2-256/8", "dit-xl-2-256/8"])
def test_starting_part_way(name):
    """The last steps alone: what the rows owe to earlier predictions goes to the first one."""
    table, x = find_solver(name), torch.randn(2, 4, dtype=torch.float64)
    s, k = sigmas_of(name)[3:].double(), 3
    got = sample_dss(linear, x, s, solver=name, disable=True)
    history = []
    for i in range(5):
        d = linear(x, s[i].expand(2))
        history.append((d - x) / s[i] if name.startswith("sit") else d)
        row = [sum(table.coeffs[i + k][: k + 1]), *table.coeffs[i + k][k + 1 : k + i + 1]]
        mixed = sum(c * y for c, y in zip(row, history, strict=True))
        x = (
            x + (s[i] - s[i + 1]) * mixed
            if name.startswith("sit")
            else s[i + 1] / s[i] * x + (1 - s[i + 1] / s[i]) * mixed
        )
    torch.testing.assert_close(got, x)


def dpmpp_2m(model, x, sigmas):
    """k-diffusion's sample_dpmpp_2m in its own words."""
    old = None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i].expand(len(x)))
        h = sigmas[i].log() - sigmas[i + 1].log()
        mixed = denoised
        if old is not None and sigmas[i + 1] > 0:
            r = (sigmas[i - 1].log() - sigmas[i].log()) / h
            mixed = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old
        x = sigmas[i + 1] / sigmas[i] * x - (-h).expm1() * mixed
        old = denoised
    return x


HIGH_HALF, WHOLE = [14.6, 9.0, 5.5, 3.0, 1.5], [14.6, 7.0, 3.0, 1.0, 0.2, 0.0]


@pytest.mark.parametrize("sigmas", [HIGH_HALF, WHOLE, [*torch.linspace(5, 0.1, 20).tolist(), 0.0]])
def test_the_last_step_is_lowered_where_sigma_reaches_zero_only(sigmas):
    sigmas = torch.tensor(sigmas, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64) * sigmas[0]
    wanted = dpmpp_2m(linear, x, sigmas)
    torch.testing.assert_close(sample_dss(linear, x, sigmas, solver="dpmpp_2m", disable=True), wanted)


@pytest.mark.skipif(
    not (Path(os.environ.get("K_DIFFUSION_TREE", "")) / "k_diffusion" / "sampling.py").is_file(),
    reason="set K_DIFFUSION_TREE to a checkout of crowsonkb/k-diffusion, with torchdiffeq and torchsde installed",
)
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("sigmas", [HIGH_HALF, WHOLE])
def test_beside_k_diffusion_itself(name, sigmas):
    """Its sampling.py alone: the package's __init__ imports training code and wandb."""
    package = types.ModuleType("k_diffusion")
    package.__path__ = [str(Path(os.environ["K_DIFFUSION_TREE"]) / "k_diffusion")]
    utils = types.ModuleType("k_diffusion.utils")
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    package.utils = utils
    theirs = getattr(importlib.import_module("k_diffusion.sampling"), f"sample_{name}")
    sigmas = torch.tensor(sigmas, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64) * sigmas[0]
    wanted = theirs(linear, x, sigmas, disable=True)
    torch.testing.assert_close(sample_dss(linear, x, sigmas, solver=name, disable=True), wanted)


@pytest.mark.parametrize("name", ["sit-xl-2-256/8", "dit-xl-2-256/8"])
@pytest.mark.parametrize("noise", [None, [0.02, -0.01, 0.03, 0.0, 0.01, 0.02, -0.02, 0.01]])
def test_the_first_steps_alone(name, noise):
    """A prefix of the table's own sigmas is the whole run stopped there: what the first of two networks does."""
    table = replace(find_solver(name), noise_coeffs=noise)
    own, x, states = sigmas_of(table).double(), torch.randn(2, 4, dtype=torch.float64), []
    sample_dss(linear, x, own, callback=lambda info: states.append(info["x"]), solver=table, disable=True)
    for k in (1, 3, 7):
        torch.testing.assert_close(sample_dss(linear, x, own[: k + 1], solver=table, disable=True), states[k])
    if noise is None:
        sample_dss(linear, states[2], own[2:6], solver=table, disable=True)
    cut = own[:4].clone()
    cut[-1] = 0
    with pytest.raises(ValueError, match="leftover noise"):
        sample_dss(linear, x, cut, solver=table, disable=True)


class NoFloat64(torch.Tensor):
    """A tensor on a device without float64, as Apple's are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.double or any(a is torch.float64 for a in (*args, kwargs.get("dtype"))):
            raise TypeError("this device has no float64")
        out = super().__torch_function__(func, types, args, kwargs)
        return out.as_subclass(torch.Tensor) if func is torch.Tensor.cpu else out


@pytest.mark.parametrize("solver, family", [("sit-xl-2-256/8", None), ("dpmpp_2m", "flow")])
def test_sigmas_on_a_device_without_float64(solver, family):
    x, sigmas = torch.randn(2, 4), sigmas_of("sit-xl-2-256/8")
    told = {"disable": True, "solver": solver, "family": family}
    wanted = sample_dss(lambda x, s: x / 2, x, sigmas, **told)
    assert torch.equal(sample_dss(lambda x, s: x / 2, x, sigmas.as_subclass(NoFloat64), **told), wanted)


@pytest.mark.parametrize("schedule", [Flow(), DiscreteVP.scaled_linear()], ids=lambda schedule: schedule.kind)
def test_heun_is_refused_whose_steps_float32_does_not_tell_apart(schedule):
    table = handmade("heun", 9, schedule)
    with pytest.raises(ValueError, match="heun/9: its step 1 goes.*too short.*sample_heun"):
        sample_dss(lambda x, sigma: x, torch.randn(2, 4), sigmas_of(table), solver=table, disable=True)
    with pytest.raises(ValueError, match="'heun' takes two calls a step"):
        sample_dss(lambda x, sigma: x, torch.randn(2, 4), torch.linspace(1, 0, 9), solver="heun", disable=True)


def test_unipc_is_the_stock_one_on_given_sigmas():
    """Diffusers' UniPC on the same sigmas, in the variables of k-diffusion: z = x / alpha."""
    diffusers = pytest.importorskip("diffusers", reason="a test dependency, in requirements.txt")
    stock = diffusers.UniPCMultistepScheduler(
        solver_order=3, prediction_type="sample", lower_order_final=False, final_sigmas_type="sigma_min"
    )
    stock.set_timesteps(8)
    stock.sigmas = sigmas = stock.sigmas.double()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = x / (1 + sigmas[0] ** 2).rsqrt()
    for i, t in enumerate(stock.timesteps):
        x = stock.step(torch.tanh(x / (1 + sigmas[i] ** 2).rsqrt() / (1 + sigmas[i])), t, x, return_dict=False)[0]
    ours = sample_dss(lambda z, s: torch.tanh(z / (1 + s[:, None])), z, sigmas, solver="unipc3", disable=True)
    assert (ours - x * (1 + sigmas[-1] ** 2).sqrt()).abs().max() < 1e-6
