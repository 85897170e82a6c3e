"""The blocks of docs/models.md give the samples of the library's own sampler, from the same noise at the same times.

Where a library is not installed its sampler is written out here, as the library has it.
"""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dss_fast import handmade, sample, search
from helpers.pages import ROOT, blocks, run

PAGE = "docs/models.md"
N, ROWS = 9, 3


class Net(nn.Module):
    """A network of each library's interface: a smooth field of x, time and class, in (B, C, H, W)."""

    def __init__(self, channels, out=None, classes=1001, scale=1e-3):
        super().__init__()
        self.near = nn.Conv2d(channels, out or channels, 3, padding=1)
        self.told = nn.Embedding(classes, out or channels)
        self.scale = scale

    def field(self, x, t, y=None):
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1, 1, 1) * self.scale
        told = 0 if y is None else self.told(y)[:, :, None, None]
        return torch.tanh(self.near(x * (1 + t)) + told) - 0.3 * t


class TimeFirst(Net):
    def forward(self, t, x):
        return self.field(x, t)


class KeywordsOnly(Net):
    def forward(self, *, x, t):
        return self.field(x, t)


class Timesteps(Net):
    def forward(self, x, timesteps, context=None):
        return self.field(x, timesteps)


class Classes(Net):
    def forward(self, x, t, y):
        return self.field(x, t, y)


class Denoised(Net):
    """D(x, sigma) of EDM: a blend of x and a field, which is x where there is no noise."""

    def forward(self, x, sigma, class_labels=None):
        sigma = sigma.to(x).reshape(-1, 1, 1, 1)
        skip = 0.25 / (sigma**2 + 0.25)
        return skip * x + 0.5 * sigma / (sigma**2 + 0.25).sqrt() * self.field(
            x / (sigma**2 + 0.25).sqrt(), sigma.log() / 4
        )


def code_of(section):
    """The block under a heading; each has one."""
    heads = re.findall(r"^## (.+)$", (ROOT / PAGE).read_text(encoding="utf-8"), re.MULTILINE)
    return blocks(PAGE)[heads.index(section)]


def target_of(section, net, **names):
    torch.manual_seed(0)
    names |= {"__name__": "__main__", "net": net.eval().requires_grad_(False), "device": "cpu"}
    run(PAGE, names, code_of(section))
    return names["target"]


def agree(target, theirs, solver="euler/9", within=3e-5, **options):
    """theirs: noise -> samples of the library's sampler."""
    noise = torch.randn(ROWS, *target.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sample(target, noise, solver, **options), theirs(noise), atol=within, rtol=1e-4)


def euler(velocity, x, steps=N):
    """As torchdyn's NeuralODE, SiT's sample_ode and torchdiffeq do it with "euler" on linspace(0, 1, N + 1)."""
    grid = torch.linspace(0, 1, steps + 1)
    for t, after in zip(grid[:-1], grid[1:], strict=True):
        x = x + (after - t) * velocity(t, x)
    return x


@torch.no_grad()
def ddim(epsilon, x, alphas, times):
    """As DiT's and guided-diffusion's ddim_sample_loop with eta = 0, on the times of ``space_timesteps``."""
    for t, before in zip(times, [*times[1:], -1], strict=True):
        now, then = alphas[t], alphas[before] if before >= 0 else torch.tensor(1.0)
        eps = epsilon(x, torch.full((len(x),), t))
        start = (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = then.sqrt() * start + (1 - then).sqrt() * eps
    return x


def every_111(schedule):
    """DDIM on the times 999, 888, ... 0, which respacing 1000 steps to 10 gives."""
    u = torch.tensor([1 - (n + 1) / 1000 for n in range(999, -1, -111)] + [1.0], dtype=torch.float64)
    return handmade("euler", schedule=schedule, timesteps=u)


def test_torchcfm():
    net = TimeFirst(3, scale=1.0)
    target = target_of("torchcfm", net)
    agree(target, lambda noise: euler(lambda t, x: net(t.expand(len(x)), x), noise))
    assert search(target, 2, budget=300, progress=False).solver.num_steps == 2


def test_flow_matching():
    net = KeywordsOnly(3, scale=1.0)
    try:
        from flow_matching.solver import ODESolver

        def theirs(noise):
            return ODESolver(net).sample(x_init=noise, step_size=1 / N, method="euler")
    except ImportError:

        def theirs(noise):
            return euler(lambda t, x: net(x=x, t=t), noise)

    agree(target_of("flow_matching", net), theirs)


def guided_by(net, labels, scale, channels=3):
    """As ``forward_with_cfg`` of DiT and SiT: both halves in one call, guidance on three channels."""

    def velocity(t, x):
        both = net(torch.cat([x, x]), t.expand(2 * len(x)), torch.cat([labels, torch.full_like(labels, 1000)]))
        cond, uncond = both.chunk(2)
        guided = uncond + scale * (cond - uncond)
        return torch.cat([guided[:, :channels], cond[:, channels:4]], 1)

    return velocity


def test_sit():
    net, labels = Classes(4, scale=1.0), torch.tensor([7, 207, 999])
    target = target_of("SiT", net)
    agree(target, lambda noise: euler(guided_by(net, labels, 1.5), noise), cond={"y": labels})


def test_dit():
    net, labels = Classes(4, out=8), torch.tensor([7, 207, 999])
    target = target_of("DiT", net)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()
    velocity = guided_by(net, labels, 4.0)
    theirs = lambda noise: ddim(lambda x, t: velocity(t[0], x), noise, alphas, list(range(999, -1, -111)))  # noqa: E731
    agree(target, theirs, every_111(target.schedule), cond={"y": labels})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_diffusers(prediction):
    diffusers = pytest.importorskip("diffusers")
    sizes = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, **sizes)
    options = {"beta_schedule": "scaled_linear", "prediction_type": prediction}
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **options)

    @torch.no_grad()
    def theirs(x):
        scheduler.set_timesteps(10)
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t).sample, t, x).prev_sample
        return x

    agree(target_of("A UNet of diffusers", net, scheduler=scheduler), theirs, "euler/10")


def test_monai():
    net = Timesteps(1)
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2  # its scaled_linear_beta
    target = target_of("MONAI", net, scheduler=SimpleNamespace(betas=betas, prediction_type="epsilon"))
    alphas = torch.cumprod(1 - betas, 0)
    times = list(range(999, -1, -111))
    agree(
        target, lambda noise: ddim(lambda x, t: net(x, timesteps=t), noise, alphas, times), every_111(target.schedule)
    )


def test_edm_and_k_diffusion():
    net = Denoised(3, scale=1.0)
    target = target_of("EDM and k-diffusion", net)
    steps = torch.arange(10, dtype=torch.float64) / 9
    sigmas = (80 ** (1 / 7) + steps * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7  # both have these, and 0 after them
    sigmas = torch.cat([sigmas, torch.zeros(1)]).float()

    def theirs(noise):
        """As edm_sampler without its second order and churn, and k-diffusion's sample_euler."""
        x = noise * sigmas[0]
        for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
            d = (x - net(x, now.expand(len(x)))) / now
            x = x + (after - now) * d
        return x

    agree(target, theirs, every_111(target.schedule), within=2e-4)  # 1 / 80^2 of the start is not noise
    assert search(target, 2, budget=300, progress=False).solver.num_steps == 2
