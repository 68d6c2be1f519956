"""What activation checkpointing runs again in the backward pass, and that gradients stay the same."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import DCDiT
from tests.model.conftest import batch, liven, tiny_config
from trainer.parallel.apply import KEPT, checkpoint_blocks, kept_ops

ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu.default", "by_sequence.default")
PRODUCTS = ("_linear_pointwise.default", "addmm.default", "mm.default")


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func).split(".", 1)[1]] += 1
        return func(*args, **(kwargs or {}))


def step(mode: str, **changes):
    """(operations of the forward, of the backward, gradients) of a model of two blocks."""
    torch.manual_seed(0)
    model = liven(DCDiT(tiny_config(depth=2, **changes)))
    data = batch(model.config, 4, grid=(16, 16))
    checkpoint_blocks(model, mode)
    forward, backward = Calls(), Calls()
    with forward:
        loss = model(*data).sample.square().sum()
    with backward:
        loss.backward()
    return forward.seen, backward.seen, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("changes", [{}, {"packing": "capacity", "capacity_factor": 4.0}])
def test_block_runs_all_again_and_selective_neither_attention_nor_products(changes):
    forward, plain, want = step("none", **changes)
    _, block, of_block = step("block", **changes)
    _, selective, of_selective = step("selective", **changes)
    attention = sum(forward[name] for name in ATTENTION)
    assert attention > 0
    assert sum(plain[name] for name in ATTENTION) == 0
    assert sum(block[name] for name in ATTENTION) == attention
    assert sum(selective[name] for name in ATTENTION) == 0
    products = [sum(seen[name] for name in PRODUCTS) for seen in (plain, block, selective)]
    assert products[1] - products[0] == 2 * 5  # modulation, qkv, proj, fc1 and fc2 of each block
    assert products[2] == products[0]
    assert selective["gelu.default"] == block["gelu.default"] == 2  # the cheap rest is run again
    for mine, theirs, other in zip(want, of_block, of_selective, strict=True):
        assert torch.equal(mine, theirs) and torch.equal(mine, other)


def test_kept_operations_exist_where_their_libraries_do():
    found = {str(op).rsplit(".", 1)[0].replace(".", "::", 1) for op in kept_ops()}
    assert found <= set(KEPT)
    assert {name for name in KEPT if name.startswith(("aten::", "dcdit_attention::"))} <= found
