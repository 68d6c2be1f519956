"""FLOPs of whole sampling runs beside the published ones, and of attention on a ragged batch beside torch's counter."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.sampling_flops import rows
from model import DCDiT, preset
from model.flops import flops


def test_published_costs_imply_one_share_of_tokens_per_model():
    """The papers do not say what their routers kept. At whatever rho and with Lite-CFG, the counter arrives at the
    published cost at one share for each model, and that is a little under the 1/4 it was trained for."""
    shares: dict[str, list[float]] = {}
    for name, _, ours, published, share in rows():
        if share is not None:
            shares.setdefault(name, []).append(share)
            assert published <= ours <= 1.05 * published
        elif published is not None:
            assert ours == pytest.approx(published, rel=0.007), name
    assert {name: len(found) for name, found in shares.items()} == {
        "DC-DiT-S": 4, "DC-DiT-B": 3, "DC-DiT-L": 3, "DC-DiT-XL": 4
    }  # fmt: skip
    for found in shares.values():
        assert 0.235 < min(found) and max(found) < 0.25 and max(found) - min(found) < 0.004


def test_all_products_of_a_ragged_batch_agree_with_the_counter_of_torch():
    """Attention included: torch counts its two products, 4 M^2 head_dim a head, and not the softmax."""
    torch.manual_seed(0)
    config = preset("Ti", num_classes=10, attention_backend="sdpa", ops_backend="torch")
    model = DCDiT(config).eval()
    x, t, y = torch.randn(3, 4, 32, 32), torch.tensor([10, 500, 900]), torch.tensor([1, 2, 3])
    model.calibrate_router(x, t, y)
    rho = torch.tensor([0.0, 0.4, 0.9])
    # The products of attention are seen one by one in this backend alone.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        routing = model(x, t, y, tail_drop=rho).routing
    counts = routing.retained.sum(1).tolist()
    assert len(set(counts)) == 3
    softmax = 3 * config.depth * config.num_heads * sum(m * m for m in counts)
    counted = counter.get_flop_counts()["DCDiT.backbone"]
    want = 3 * flops(config, counts)["backbone"] - softmax
    assert math.isclose(sum(counted.values()), want, rel_tol=1e-9), counted
