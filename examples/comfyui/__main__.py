"""What the two nodes do, on the small MNIST flow in place of a MODEL.

With ComfyUI: load FLUX.1-dev or SD3.5 with its own loader and wire DSS Sampler and DSS Sigmas to SamplerCustomAdvanced.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from dss_fast.integrations.comfyui import make_sampler, make_sigmas, read_solver, solver_names

from ..mnist import load_flow


class CONST:
    """ComfyUI's name for flow models."""

    sigma_max = 1.0


def main(solver: str = "sit-xl-2-256", steps: int = 8) -> torch.Tensor:
    network, y = load_flow(), torch.tensor([2, 7])

    class Model:
        inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=CONST()))

        def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **_: Any) -> torch.Tensor:
            return x + sigma.view(-1, 1, 1, 1) * network(x, 1 - sigma, y)

    print("solvers to choose from:", ", ".join(solver_names()))
    tables = read_solver(solver)
    sigmas = make_sigmas(CONST(), tables, steps)
    print("SIGMAS:", [round(v, 4) for v in sigmas.tolist()])
    sampler = make_sampler(tables)
    noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    images = sampler(Model(), noise * sigmas[0], sigmas, disable=True)
    try:
        sampler(Model(), noise, torch.linspace(1, 0, steps + 1), disable=True)
    except ValueError as error:
        print("with another node's sigmas:", error)
    return images


if __name__ == "__main__":
    main()
