"""FLUX's transformer by hand is diffusers'."""

import pytest
import torch

from examples.flux import Flux

SMALL = {
    "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 12, "pooled_projection_dim": 6, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True,
}  # fmt: skip


def inputs(batch=2, text=3):
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(2.0), indexing="ij")
    return {
        "hidden_states": torch.randn(batch, 8, 8),
        "encoder_hidden_states": torch.randn(batch, text, 12),
        "pooled_projections": torch.randn(batch, 6),
        "timestep": torch.tensor([0.9, 0.3])[:batch],
        "img_ids": torch.stack([torch.zeros(8), rows.flatten(), columns.flatten()], 1),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((batch,), 3.5),
        "return_dict": False,
    }


def test_it_has_flux_parameters():
    """11.9 billion, and the count of each kind, without memory for them."""
    with torch.device("meta"):
        net = Flux()
    assert sum(p.numel() for p in net.parameters()) == 11_901_408_320
    assert len(net.transformer_blocks) == 19 and len(net.single_transformer_blocks) == 38


@pytest.mark.slow
def test_it_is_diffusers_model():
    theirs = pytest.importorskip("diffusers").FluxTransformer2DModel(**SMALL)
    ours = Flux(**SMALL)
    ours.load_state_dict(theirs.state_dict())
    for p in (*theirs.parameters(), *ours.parameters()):
        p.requires_grad_(False)
    given = inputs()
    torch.testing.assert_close(ours(**given)[0], theirs(**given)[0], rtol=1e-5, atol=1e-5)


def test_checkpointing_changes_the_memory_alone():
    torch.manual_seed(0)
    net, found, kept = Flux(**SMALL).requires_grad_(False), [], []
    for again in (False, True):
        given = inputs()
        x, held = given["hidden_states"].requires_grad_(), 0

        def pack(tensor):
            nonlocal held
            held += tensor.nbytes
            return tensor

        if again:
            net.enable_gradient_checkpointing()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = net(**given)[0]
        found.append(torch.autograd.grad(output.square().sum(), x)[0])
        kept.append(held)
    assert torch.equal(*found) and kept[1] < kept[0] / 3
