"""The layers, each against the plain formula."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from model.blocks import ConvBlock, ConvStack, DiTBlock, RMSNorm, add_gated, image_to_tokens, modulate
from model.chunking import Packed, pack_all
from model.embeddings import TimestepEmbedder, grid_positions, position_table, sinusoids
from model.linear import Linear, linear
from tests.model.conftest import liven


def ragged(seqlens, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(seqlens)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    tokens = torch.randn(sum(seqlens), width, generator=generator)
    return Packed(tokens, None, cu_seqlens, 64, tuple(seqlens))


@pytest.mark.parametrize("function", [modulate, add_gated])
def test_spreading_a_vector_over_an_images_tokens(function):
    packed, image = ragged([3, 2, 7], 6), torch.tensor([0, 0, 0, 1, 1, *[2] * 7])
    a, b = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    x, y = packed.tokens.double(), torch.randn(12, 6, dtype=torch.float64)
    if function is modulate:
        args = [x, a, b]
        want = x * (1 + b[image]) + a[image]
    else:
        args = [x, a, y]
        want = x + a[image] * y
    args = [v.clone().requires_grad_() for v in args]
    torch.testing.assert_close(function(*args, packed), want)
    assert torch.autograd.gradcheck(lambda *v: function(*v, packed), args)


def test_uniform_batches_give_what_ragged_ones_give():
    torch.manual_seed(0)
    block, x, c = liven(DiTBlock(16, 2, 4.0)), torch.randn(3, 5, 16), torch.randn(3, 16)
    uniform = pack_all(x, "sdpa")
    same = ragged([5, 5, 5], 16)
    torch.testing.assert_close(block(x.flatten(0, 1), c, uniform), block(x.flatten(0, 1), c, same))


def test_conv_block_against_its_formula():
    torch.manual_seed(0)
    block = liven(ConvBlock(64, 128, 32))
    x, c = torch.randn(2, 64, 5, 4), torch.randn(2, 32)
    h = F.conv2d(
        F.silu(F.group_norm(x, 32, block.norm1.weight, block.norm1.bias)), block.conv1.weight, padding=1
    )
    h = h + block.conv1.bias[:, None, None] + block.condition(F.silu(c))[:, :, None, None]
    h = block.conv2(F.silu(F.group_norm(h, 32, block.norm2.weight, block.norm2.bias)))
    want = (
        h + torch.einsum("oi,bihw->bohw", block.skip.weight[:, :, 0, 0], x) + block.skip.bias[:, None, None]
    )
    torch.testing.assert_close(block(x, c), want, rtol=1e-4, atol=1e-4)
    assert block.conv1.weight.shape == (64, 64, 3, 3)  # the inner width is the smaller one


def test_conv_stack_hands_tokens_through_without_layout_copies():
    torch.manual_seed(0)
    stack = ConvStack((64, 64, 128), 32)
    shapes = []
    for block in stack.blocks:
        block.register_forward_hook(
            lambda m, a, out: shapes.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    out = stack(torch.randn(2, 12, 64), torch.randn(2, 32), (3, 4))
    assert out.shape == (2, 12, 128) and shapes == [True, True]
    torch.testing.assert_close(out.square().mean(-1), torch.ones(2, 12), rtol=1e-3, atol=1e-3)


def test_tokens_are_row_major():
    image = torch.arange(6.0).view(1, 1, 2, 3)
    assert image_to_tokens(image).flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_rms_norm_computes_in_its_weights_type():
    norm = RMSNorm(8)
    x = torch.randn(3, 8)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    assert norm(x.bfloat16()).dtype == torch.float32 and norm.bfloat16()(x).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(300, 24), (2, 200, 24), (7, 24)])
def test_linear_is_torchs_linear(bias, shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(40, 24)
    b = torch.randn(40) if bias else None
    grad = torch.randn(*shape[:-1], 40)
    results = []
    for function in (linear, F.linear):
        args = [a.clone().requires_grad_() for a in (x, weight, b) if a is not None]
        out = function(*args, *(() if bias else (None,)))
        results.append([out, *torch.autograd.grad(out, args, grad)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert got.is_contiguous()


def test_linear_takes_gradients_without_strides():
    x, layer = torch.randn(300, 24, requires_grad=True), Linear(24, 40)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(300, 24))
    torch.testing.assert_close(layer.weight.grad, x.detach().sum(0).expand(40, 24))
    assert torch.equal(layer.bias.grad, torch.full((40,), 300.0))


def test_linear_keeps_to_autocast_and_flop_counts():
    layer = Linear(16, 32)
    x = torch.randn(512, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 512 * 16 * 32  # forward and weights; x needs no gradient


def test_sinusoids_are_cosines_then_sines():
    t = torch.tensor([0, 7, 999])
    code = sinusoids(t)
    assert code.dtype == torch.float32 and code.shape == (3, 256)
    i = torch.arange(128, dtype=torch.float64)
    angle = t[:, None] * 10000 ** (-i / 128)
    want = torch.cat([angle.cos(), angle.sin()], 1).float()
    torch.testing.assert_close(code, want, rtol=0, atol=2e-4)  # float32 angles near 1000
    embed = TimestepEmbedder(32)
    embed.reset()
    torch.testing.assert_close(embed(t), embed(t.float()))


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 7)])
def test_positions_hold_the_column_first(grid):
    H, W = grid
    table = position_table(16, grid).view(H, W, 16)
    omega = 10000 ** (-torch.arange(4, dtype=torch.float64) / 4)
    for row in range(H):
        for column in range(W):
            want = torch.cat([f(n * omega) for n in (column, row) for f in (torch.sin, torch.cos)])
            torch.testing.assert_close(table[row, column], want.float(), rtol=0, atol=1e-6)
    assert torch.equal(grid_positions(16, grid, torch.device("cpu")), table.flatten(0, 1))
