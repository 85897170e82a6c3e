"""Solvers in k-diffusion's terms: any model(x, sigma) -> denoised, and any slot for a sample_*(model, x, sigmas).

python -m examples.k_diffusion                      # digits from the small MNIST flow
"""

from __future__ import annotations

import torch
from torch import Tensor

from dss_fast.integrations.k_diffusion import sample_dss, sigmas_of

from .mnist import decode, load_flow


def main(num_steps: int = 8) -> Tensor:
    network = load_flow()

    # With k-diffusion: model = K.external.CompVisDenoiser(ldm), sigmas = model.get_sigmas(20), solver = "dpmpp_2m".
    def model(x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        """The clean image of a flow x = (1 - sigma) x0 + sigma eps."""
        return x + sigma.view(-1, 1, 1, 1) * network(x, 1 - sigma, y)

    solver = f"sit-xl-2-256/{num_steps}"
    sigmas = sigmas_of(solver)  # a learned solver brings its own; hand-made ones take any
    noise = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * sigmas[0]

    def callback(info: dict) -> None:
        print(
            f"step {info['i'] + 1}: sigma {float(info['sigma']):.3f}, denoised std {float(info['denoised'].std()):.3f}"
        )

    digits = decode(sample_dss(model, noise, sigmas, {"y": torch.tensor([3, 1, 4, 1])}, callback, solver=solver))
    for row in digits[0, 0, ::2]:
        print("".join(" .:*#"[int(4 * float(v) + 0.5)] for v in row))
    return digits


if __name__ == "__main__":
    main()
