"""The ImageNet example with small random networks: the checkpoint's keys, the arithmetic, the files."""

import argparse
import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dss_fast import find_solver, sample
from examples import imagenet256
from examples.imagenet import images
from examples.imagenet.model import XL, Transformer, load, shape_of

SMALL = {"depth": 2, "width": 32, "heads": 4, "size": 8, "classes": 10}


def small(seed=0) -> Transformer:
    torch.manual_seed(seed)
    network = Transformer(**SMALL).eval()
    for p in network.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    return network.requires_grad_(False)


def published_keys() -> dict[str, tuple[int, ...]]:
    """The layout of DiT-XL-2-256x256.pt and SiT-XL-2-256x256.pt (both with learn_sigma): 339 tensors."""
    d = 1152

    def linear(name, inputs, outputs):
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    keys = {"pos_embed": (1, 256, d), "x_embedder.proj.weight": (d, 4, 2, 2), "x_embedder.proj.bias": (d,)}
    keys |= linear("t_embedder.mlp.0", 256, d) | linear("t_embedder.mlp.2", d, d)
    keys["y_embedder.embedding_table.weight"] = (1001, d)
    for i in range(28):
        keys |= linear(f"blocks.{i}.attn.qkv", d, 3 * d) | linear(f"blocks.{i}.attn.proj", d, d)
        keys |= linear(f"blocks.{i}.mlp.fc1", d, 4 * d) | linear(f"blocks.{i}.mlp.fc2", 4 * d, d)
        keys |= linear(f"blocks.{i}.adaLN_modulation.1", d, 6 * d)
    return keys | linear("final_layer.linear", d, 32) | linear("final_layer.adaLN_modulation.1", d, 2 * d)


def test_keys_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        network = Transformer(**XL)
    assert {k: tuple(v.shape) for k, v in network.state_dict().items()} == published_keys()
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(675e6, rel=0.01)


def test_same_numbers_as_the_diffusers_port():
    """diffusers' DiT with the same weights, renamed as its conversion script does."""
    diffusers = pytest.importorskip("diffusers")
    ours = small()
    theirs = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
        out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=10,
        norm_type="ada_norm_zero", norm_elementwise_affine=False, norm_eps=1e-6,
    ).eval()  # fmt: skip
    state = {"pos_embed.proj.weight": "x_embedder.proj.weight", "pos_embed.proj.bias": "x_embedder.proj.bias"}
    for end in ("weight", "bias"):
        state |= {
            f"proj_out_1.{end}": f"final_layer.adaLN_modulation.1.{end}",
            f"proj_out_2.{end}": f"final_layer.linear.{end}",
        }
        for i in range(2):
            a, b = f"transformer_blocks.{i}", f"blocks.{i}"
            state |= {
                f"{a}.norm1.emb.timestep_embedder.linear_1.{end}": f"t_embedder.mlp.0.{end}",
                f"{a}.norm1.emb.timestep_embedder.linear_2.{end}": f"t_embedder.mlp.2.{end}",
                f"{a}.norm1.emb.class_embedder.embedding_table.weight": "y_embedder.embedding_table.weight",
                f"{a}.norm1.linear.{end}": f"{b}.adaLN_modulation.1.{end}",
                f"{a}.attn1.to_out.0.{end}": f"{b}.attn.proj.{end}",
                f"{a}.ff.net.0.proj.{end}": f"{b}.mlp.fc1.{end}",
                f"{a}.ff.net.2.{end}": f"{b}.mlp.fc2.{end}",
            }
    source = ours.state_dict()
    state = {theirs_key: source[key] for theirs_key, key in state.items()}
    for i in range(2):
        for end in ("weight", "bias"):
            for name, part in zip("qkv", source[f"blocks.{i}.attn.qkv.{end}"].chunk(3), strict=True):
                state[f"transformer_blocks.{i}.attn1.to_{name}.{end}"] = part
    missing, unknown = theirs.load_state_dict(state, strict=False)
    assert not unknown and all("pos_embed" in key for key in missing), (missing, unknown)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = (
            0  # the port spaces the time's sines by 1/127, the original by 1/128
        )
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([3.0, 500.5, 999.0]), torch.tensor([1, 7, 10])
    with torch.no_grad():
        wanted = theirs(x, timestep=t, class_labels=y).sample[:, :4]
        torch.testing.assert_close(ours(x, t, y), wanted, rtol=1e-4, atol=1e-5)


def test_loading(tmp_path):
    network = small()
    torch.save(network.state_dict(), tmp_path / "plain.pt")
    torch.save({"ema": network.state_dict()}, tmp_path / "trained.pt")
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    for name in ("plain.pt", "trained.pt"):
        assert torch.equal(load(tmp_path / name, **SMALL)(x, t, y), network(x, t, y))
    torch.save({"some.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not a DiT or SiT"):
        load(tmp_path / "other.pt", **SMALL)
    with pytest.raises(ValueError, match="heads=16"):
        load(tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"another shape: \['pos_embed'"):
        load(tmp_path / "plain.pt", **{**SMALL, "size": 16})


def test_checkpoints_of_the_training_scripts(tmp_path):
    """With the args that train.py saves beside the weights; anything else is not unpickled."""
    network, x = small(), (torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2]))
    saved = {"model": network.state_dict(), "ema": network.state_dict(), "opt": {"lr": 1e-4}}
    torch.save({**saved, "args": argparse.Namespace(model="DiT-XL/2", image_size=256)}, tmp_path / "0400000.pt")
    assert torch.equal(load(tmp_path / "0400000.pt", heads=4)(*x), network(*x))
    torch.save({**saved, "args": images.chunk_names}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="holds more than weights.*weights_only=False"):
        load(tmp_path / "code.pt", heads=4)


@pytest.mark.parametrize("letter, depth, width, heads", [("S", 12, 384, 6), ("B", 12, 768, 12), ("XL", 28, 1152, 16)])
@pytest.mark.parametrize("patch, size", [(2, 32), (2, 64), (8, 32)])
def test_every_published_shape_is_read_off_the_weights(letter, depth, width, heads, patch, size):
    with torch.device("meta"):
        made = Transformer(depth=depth, width=width, heads=heads, patch=patch, size=size)
    shape = {"depth": depth, "width": width, "heads": heads, "patch": patch, "size": size, "channels": 4}
    assert shape_of(made.state_dict()) == {**shape, "classes": 1000, "variances": True}


def official(tree):
    """models.py of a checkout of facebookresearch/DiT or willisma/SiT, under a name of its own."""
    pytest.importorskip("timm")
    path = Path(os.environ[tree]) / "models.py"
    spec = importlib.util.spec_from_file_location(f"official_{tree.lower()}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["DiT", "SiT"])
@pytest.mark.parametrize("size", [32, 64])
def test_beside_the_official_network(kind, size, tmp_path):
    """Its own training checkpoint, read here, gives its own numbers; DIT_TREE and SIT_TREE are checkouts of the two."""
    tree = f"{kind.upper()}_TREE"
    if not (Path(os.environ.get(tree, "")) / "models.py").is_file():
        pytest.skip(
            f"set {tree} to a checkout of {'facebookresearch' if kind == 'DiT' else 'willisma'}/{kind}, with timm"
        )
    torch.manual_seed(0)
    theirs = getattr(official(tree), f"{kind}_models")[f"{kind}-S/8"](input_size=size, num_classes=10).eval()
    for p in theirs.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.05)
    args = argparse.Namespace(model=f"{kind}-S/8", image_size=8 * size)
    torch.save({"ema": theirs.state_dict(), "opt": {}, "args": args}, tmp_path / "train.pt")
    ours = load(tmp_path / "train.pt")
    x, y = torch.randn(2, 4, size, size), torch.tensor([3, 10])
    for t in ([0.2, 0.9], [700.0, 31.0]):
        with torch.no_grad():
            wanted = theirs(x, torch.tensor(t), y)[:, :4]
            torch.testing.assert_close(ours(x, torch.tensor(t), y), wanted, rtol=1e-5, atol=1e-5)
    target = imagenet256.target(kind.lower(), ours)
    assert target.shape == (4, size, size) and sample(target, 1, f"{kind.lower()}-xl-2-256/5").isfinite().all()


@pytest.mark.parametrize("kind", ["sit", "dit"])
def test_targets_sample(kind):
    scale, channels = imagenet256.GUIDANCE[kind]
    target = imagenet256.target(kind, small(), scale, channels)
    x = sample(target, 3, f"{kind}-xl-2-256/5", generator=torch.Generator().manual_seed(0))
    assert x.shape == (3, 4, 8, 8) and x.isfinite().all()


def picture(first, count, seed=0):
    noise, labels = images.draw(first, count, (4, 8, 8), 10, seed)
    return imagenet256.to_bytes(noise[:, :3] / 3 + labels.view(-1, 1, 1, 1) / 20)


def test_images_do_not_depend_on_chunks_or_processes(tmp_path):
    for name, chunk, world in (("a", 5, 1), ("b", 4, 3)):
        for rank in reversed(range(world)):
            images.write_chunks(tmp_path / name, 13, chunk, picture, rank, world)
        images.merge(tmp_path / name, 13, chunk, tmp_path / f"{name}.npz")
    a, b = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in "ab")
    assert a.dtype == np.uint8 and a.shape == (13, 8, 8, 3)
    assert np.array_equal(a, b) and np.array_equal(a, picture(0, 13).numpy())


def test_an_interrupted_run_goes_on(tmp_path):
    made = []

    def make(first, count, fail_at=None):
        made.append(first)
        if first == fail_at:
            raise KeyboardInterrupt
        return picture(first, count)

    with pytest.raises(KeyboardInterrupt):
        images.write_chunks(tmp_path / "c", 12, 3, partial(make, fail_at=6))
    with pytest.raises(ValueError, match="chunk-00002.npy is missing"):
        images.merge(tmp_path / "c", 12, 3, tmp_path / "c.npz")
    images.write_chunks(tmp_path / "c", 12, 3, make)
    assert made == [0, 3, 6, 6, 9]
    images.merge(tmp_path / "c", 12, 3, tmp_path / "c.npz")
    assert np.array_equal(np.load(tmp_path / "c.npz")["arr_0"], picture(0, 12).numpy())
    with pytest.raises(ValueError, match="hold 12 images"):
        images.merge(tmp_path / "c", 11, 3, tmp_path / "d.npz")


def test_sampling_end_to_end(tmp_path):
    target = imagenet256.target("sit", small(), 1.375)
    solver = find_solver("sit-xl-2-256/5")
    decode = lambda z: imagenet256.to_bytes(z[:, :3])  # noqa: E731
    sizes = {"total": 5, "chunk": 2, "batch": 2, "seed": 1}
    done = imagenet256.run_sampling(target, solver, decode, tmp_path / "run", **sizes)
    whole = imagenet256.make_images(0, 5, target=target, solver=solver, decode=decode, batch=5, seed=1)
    saved = np.load(done)["arr_0"]
    # batches of another size may differ in the last bit of a matrix product, a rounding step of a byte
    assert saved.shape == (5, 8, 8, 3) and np.abs(saved.astype(int) - whole.numpy()).max() <= 1


def test_help_names_what_is_needed():
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-m", "examples.imagenet256", "sample"], cwd=root, capture_output=True, text=True
    )
    assert result.returncode == 2 and "--checkpoint" in result.stderr
