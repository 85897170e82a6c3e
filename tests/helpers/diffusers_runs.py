"""What the scheduler's tests run: a small network, noise, and the loop of a pipeline."""

import torch


def network(dtype=torch.float32):
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(5)).to(dtype) / 4

    def net(x, t, scale=1.0):
        return torch.tanh(x @ weight * scale + (t.reshape(-1, 1) / 1000 if torch.is_tensor(t) else t / 1000)).to(
            x.dtype
        )

    return net


def noise(rows=3, dtype=torch.float32):
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(scheduler, n, x=None, net=None, start=0, **options):
    scheduler.set_timesteps(n, **options)
    x = noise() if x is None else x
    net = net or network()
    for t in scheduler.timesteps[start:]:
        x = scheduler.step(net(x, t), t, x, return_dict=False)[0]
    return x
