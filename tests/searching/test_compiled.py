"""Networks under torch.compile: a search goes back through them several times, whatever ran before it."""

import pytest
import torch

from dss_fast import Target, search


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.eye(16) * 0.5)

    def forward(self, x, t):
        return (torch.tanh(x.flatten(1) @ self.w) * (1 - t[:, None]) - 0.7 * x.flatten(1)).reshape(x.shape)


@pytest.fixture
def compiled():
    torch.compiler.reset()
    yield torch.compile(Net().eval(), backend="aot_eager")
    torch.compiler.reset()


@pytest.mark.parametrize("before", ["nothing", "forward", "backward", "training"])
def test_a_compiled_network_is_searched_as_the_network_itself(compiled, before):
    x, t = torch.randn(2, 1, 4, 4), torch.full((2,), 0.5)
    if before == "forward":
        with torch.no_grad():
            compiled(x, t)
    elif before == "backward":
        for rows in (2, 3, 4):
            compiled(torch.randn(rows, 1, 4, 4, requires_grad=True), torch.full((rows,), 0.5)).sum().backward()
    elif before == "training":
        compiled.train()
        compiled(x, t).square().sum().backward()
        compiled.eval()
    options = dict(budget=1_000, progress=False)
    mine = search(Target(compiled, (1, 4, 4), key="net"), 3, **options).solver
    plain = search(Target(compiled._orig_mod, (1, 4, 4), key="net"), 3, **options).solver
    assert mine.timesteps == pytest.approx(plain.timesteps, abs=1e-4)
