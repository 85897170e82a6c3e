"""What docs/real.md measures of galaxies, and how their network is read and called, with weights made up here."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dss_fast import Target, sample
from examples import galaxies
from examples.galaxies import BLOCKS, HIDDEN, PATCH, SIZE, Epsilon, Score, Shapes, noise, tsit5

PATCHES = (SIZE // PATCH) ** 2


def arrays(blocks_say=0.1):
    """Random ones of the sizes that the file has."""
    generator = torch.Generator().manual_seed(0)

    def one(*shape, scale=0.2):
        return scale * torch.randn(*shape, generator=generator)

    ends = [one(HIDDEN, 2, PATCH, PATCH), one(HIDDEN, 1, 1), one(1, HIDDEN, PATCH, PATCH), one(1, 1, 1)]
    blocks = []
    for _ in range(BLOCKS):
        for size in (PATCHES, HIDDEN):
            blocks += [one(512, size), one(512), one(size, 512, scale=blocks_say), one(size, scale=blocks_say)]
        blocks += [one(HIDDEN, PATCHES), one(HIDDEN, PATCHES), one(PATCHES, HIDDEN), one(PATCHES, HIDDEN)]
    return [*ends, *blocks, one(HIDDEN, PATCHES), one(HIDDEN, PATCHES), torch.tensor(10.0, dtype=torch.float64)]


def test_a_file_of_numpy_arrays_is_read_as_it_was_written_and_nothing_is_unpickled(tmp_path):
    file = tmp_path / "net.eqx"
    file.write_bytes(b"".join(saved(one.numpy()) for one in arrays()))
    x, t = noise(2, 0), torch.tensor([0.5, 9.0])
    torch.testing.assert_close(Score.load(file)(x, t), Score(arrays())(x, t))
    file.write_bytes(saved(arrays()[0].numpy()))
    with pytest.raises(ValueError, match="1 arrays: this network has 55"):
        Score.load(file)
    file.write_bytes(saved(np.array([object()]), allow_pickle=True))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Score.load(file)


def saved(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def test_patches_go_in_and_out_as_jax_lays_them_which_turns_the_last_kernel_around():
    given = arrays(blocks_say=0.0)  # blocks that add nothing
    x, t = noise(2, 0), torch.tensor([2.0, 7.0])
    told = torch.cat([x, (t / 10).view(2, 1, 1, 1).expand_as(x)], 1)
    cut = F.unfold(told, PATCH, stride=PATCH)  # (B, 2 * 16, 64)
    into = torch.einsum("op,bpn->bon", given[0].flatten(1), cut) + given[1].flatten()[:, None]
    mixed = F.layer_norm(into, (HIDDEN, PATCHES), given[-3], given[-2])
    out = torch.einsum("opq,bon->bpqn", given[2][0].flip(1, 2), mixed) + given[3].item()
    wanted = F.fold(out.flatten(1, 2), (SIZE, SIZE), PATCH, stride=PATCH)
    torch.testing.assert_close(Score(given)(x, t), wanted, atol=1e-4, rtol=1e-4)


def test_the_schedule_is_the_path_and_tells_the_network_its_own_times():
    u = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    alpha, sigma = galaxies.schedule().alpha_sigma(u)
    torch.testing.assert_close(alpha, (-5 * (1 - u)).exp())
    torch.testing.assert_close(sigma**2, 1 - (-10 * (1 - u)).exp())

    asked = []
    model = Epsilon(lambda x, t: asked.append(float(t[0])) or -x)
    sample(Target(model, (1, SIZE, SIZE), galaxies.schedule()), noise(2, 0), "euler/4")
    assert asked == pytest.approx([10, 7.5, 5, 2.5])


def test_two_samplers_of_a_network_that_is_exact_end_at_its_data():
    def score(x, t):  # of data of deviation 0.5
        alpha = (-t / 2).exp().view(-1, 1, 1, 1)
        return -x / (1 - 0.75 * alpha**2)

    x = noise(2, 0)
    spread = 0.5 / math.sqrt(1 - 0.75 * math.exp(-10))  # a linear path only stretches
    torch.testing.assert_close(tsit5(score, x, 40), spread * x, atol=1e-3, rtol=1e-3)
    target = Target(Epsilon(score), (1, SIZE, SIZE), galaxies.schedule())
    found = sample(target, x, "unip3/60@lambda")  # its last call is at t = 0.01, where sigma is a fifth of the data's
    torch.testing.assert_close(found, spread * x, atol=1e-3, rtol=0.03)


def galaxy(rows, columns, sky=0.0):
    """A Gaussian of two deviations, in pixels."""
    at = torch.arange(SIZE) - (SIZE - 1) / 2
    return (torch.exp(-0.5 * ((at[:, None] / rows) ** 2 + (at / columns) ** 2)) + sky)[None, None]


def test_shapes_of_gaussian_galaxies_are_the_known_ones():
    shapes = Shapes.of(torch.cat([galaxy(3, 3), galaxy(2, 4), galaxy(4, 2), galaxy(3, 3, sky=5.0)]))
    assert shapes.radius[0] == pytest.approx(3 * math.sqrt(2 * math.log(2)), abs=0.3)
    torch.testing.assert_close(shapes.axes, torch.tensor([1, 0.5, 0.5, 1]).double(), atol=0.03, rtol=0)
    wanted = 5 * math.log10(math.sqrt(math.log(0.2) / math.log(0.8)))
    assert shapes.concentration[0] == pytest.approx(wanted, abs=0.3)
    assert 0.5 < shapes.gini[0] < 1 and shapes.gini[1] == pytest.approx(float(shapes.gini[2]))
    assert shapes.radius[3] == pytest.approx(float(shapes.radius[0]))  # the sky does not count
    dark = Shapes.of(torch.zeros(1, 1, SIZE, SIZE))
    assert all(one.isfinite().all() for one in vars(dark).values())


def test_the_distance_of_two_distributions_goes_from_0_to_1():
    a, b = torch.arange(4.0), torch.arange(10.0, 14.0)
    assert galaxies._ks(a, a) == 0 and galaxies._ks(a, b) == 1
    assert galaxies._ks(a, torch.tensor([0.0, 1, 10, 11])) == 0.5


def test_the_page_holds_the_table():
    page = (Path(__file__).parents[2] / "docs" / "real.md").read_text(encoding="utf-8")
    begin, end = galaxies.MARKS
    assert page.count(begin) == page.count(end) == 1
    assert "DDIM, 5 calls" in page.split(begin)[1].split(end)[0]
