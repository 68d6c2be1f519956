"""DiT on the shared blocks against a plain forward pass written from the paper."""

import pytest
import torch
import torch.nn.functional as F

from model.dcdit import unpatchify
from model.embeddings import sinusoids
from tests.model.conftest import batch, tiny_dit


def plain_dit(w: dict, x, t, y, patch: int, heads: int, out_channels: int):
    """DiT in the published names, with nothing of ours but the sinusoids."""
    B, _, H, W = x.shape
    D = w["x_embedder.proj.bias"].numel()

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch)
    h = h.flatten(2).transpose(1, 2) + w["pos_embed"]
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", sinusoids(t))))
    c = c + w["y_embedder.embedding_table.weight"][y]

    def modulated(h, shift, scale):
        return F.layer_norm(h, (D,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    n = 0
    while f"blocks.{n}.attn.qkv.weight" in w:
        block = f"blocks.{n}"
        s1, k1, g1, s2, k2, g2 = linear(f"{block}.adaLN_modulation.1", F.silu(c)).chunk(6, 1)
        qkv = linear(f"{block}.attn.qkv", modulated(h, s1, k1)).view(B, -1, 3, heads, D // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = (q @ k.transpose(-1, -2) / (D // heads) ** 0.5).softmax(-1) @ v
        h = h + g1[:, None] * linear(f"{block}.attn.proj", attended.transpose(1, 2).flatten(2))
        inner = F.gelu(linear(f"{block}.mlp.fc1", modulated(h, s2, k2)), approximate="tanh")
        h = h + g2[:, None] * linear(f"{block}.mlp.fc2", inner)
        n += 1
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, 1)
    h = linear("final_layer.linear", modulated(h, shift, scale))
    image = torch.zeros(B, out_channels, H, W, dtype=h.dtype)
    for token in range(h.shape[1]):
        row, column = divmod(token, W // patch)
        values = h[:, token].view(B, patch, patch, out_channels)  # row in patch, column in patch, channel
        image[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = values.permute(
            0, 3, 1, 2
        )
    return image


@pytest.mark.parametrize("patch, size", [(2, (8, 8)), (4, (8, 16)), (8, (16, 16))])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_dit_against_a_plain_forward_pass(patch, size, learn_sigma):
    from model.weights import to_released

    model = tiny_dit(patch_size=patch, input_size=size, learn_sigma=learn_sigma)
    x, t, y = batch(model.config, 3)
    want = plain_dit(to_released(model.state_dict()), x, t, y, patch, 2, model.config.out_channels)
    out = model(x, t, y, tail_drop=0.5)
    assert out.routing is None
    torch.testing.assert_close(out.sample, want, rtol=1e-4, atol=1e-5)


def test_unpatchify_order():
    P, C, H, W = 2, 3, 2, 3
    x = torch.zeros(1, H * W, P * P * C)
    for token in range(H * W):
        for row in range(P):
            for column in range(P):
                for channel in range(C):
                    x[0, token, (row * P + column) * C + channel] = (
                        1000 * token + 100 * row + 10 * column + channel
                    )
    image = unpatchify(x, (H, W), P)
    assert image.shape == (1, C, H * P, W * P)
    for r in range(H * P):
        for c in range(W * P):
            token = (r // P) * W + c // P
            for channel in range(C):
                assert image[0, channel, r, c] == 1000 * token + 100 * (r % P) + 10 * (c % P) + channel


def test_dit_takes_other_grids_and_refuses_what_a_patch_does_not_divide():
    model = tiny_dit(patch_size=4)
    assert model(*batch(model.config, 2, grid=(12, 4))).sample.shape == (2, 6, 12, 4)
    with pytest.raises(ValueError, match="patch_size=4"):
        model(*batch(model.config, 2, grid=(8, 6)))


def test_gradient_reaches_every_parameter_of_dit():
    model = tiny_dit()
    model(*batch(model.config, 6)).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_dit_under_bfloat16_autocast():
    model = tiny_dit()
    data = batch(model.config, 3)
    with torch.no_grad():
        want = model(*data).sample
        with torch.autocast("cpu", torch.bfloat16):
            got = model(*data).sample.float()
    assert (got - want).norm() < 0.05 * want.norm()


def test_dit_and_dcdit_share_the_blocks_names():
    from tests.model.conftest import tiny_dcdit

    dit, dcdit = tiny_dit(), tiny_dcdit()
    ours = {n for n in dcdit.state_dict() if n.startswith(("backbone.blocks.", "t_embedder.", "y_embedder."))}
    assert ours == {n for n in dit.state_dict() if n.startswith(("backbone.", "t_embedder.", "y_embedder."))}
