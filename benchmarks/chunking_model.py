"""DC-DiT-S forward and backward, batch 8 at 32x32, calibrated to 25 %: with the dense formulation in place of
our ops, with our PyTorch forms, with ours, and with packing by capacity. benchmarks/chunking.py --model runs it.
"""

import contextlib
import statistics
import time

import torch

from benchmarks.chunking_cases import dense_dechunk
from benchmarks.tables import wait
from model import DCDiT, chunking, preset
from model.ops import Selection

WARM = 1  # untimed rounds before the timed ones


class DenseOps:
    """The dense formulation behind the calls that model.chunking makes."""

    @staticmethod
    def select(prob, rho, *, backend):
        B, L = prob.shape
        forced = torch.zeros_like(prob, dtype=torch.bool)
        forced[:, 0] = forced[:, -1] = True
        natural = (prob > 0.5) | forced
        rank = torch.where(natural, prob.masked_fill(forced, 1), torch.inf).argsort(dim=1).argsort(dim=1)
        retained = natural & (rank >= (natural.sum(1).float() * rho).int()[:, None])
        index = torch.full((B * L,), -1, device=prob.device)
        places = retained.flatten().nonzero()[:, 0]
        index[: len(places)] = places
        cu_seqlens = torch.nn.functional.pad(retained.sum(1).cumsum(0), (1, 0)).int()
        return Selection(natural, retained, retained.flatten().int(), index, cu_seqlens)

    @staticmethod
    def gather_tokens(x, pos, index, slot, *, backend):
        return (x.flatten(0, 1)[index] + pos[index % x.shape[1]]).to(x.dtype)

    @staticmethod
    def dechunk(h, prob, natural, index, slot, cu_seqlens, residual, grid, sigma, *, backend):
        B, L, D = residual.shape
        place, count = index % L, cu_seqlens.diff()
        valid = torch.arange(int(count.max()), device=h.device) < count[:, None]
        h_pad = h.new_zeros(*valid.shape, D, dtype=torch.float32)
        h_pad[valid] = h.float()
        place_pad = place.new_zeros(valid.shape)
        place_pad[valid] = place
        forced = torch.arange(L, device=h.device) % (L - 1) == 0
        p = prob.masked_fill(forced, 1.0)
        p_sel = p.gather(1, place_pad).clamp(1e-4, 1 - 1e-4) * valid
        return dense_dechunk(h_pad, p_sel, place_pad, valid, natural, p, residual, grid, sigma)


@contextlib.contextmanager
def dense_ops():
    before, chunking.ops = chunking.ops, DenseOps
    try:
        yield
    finally:
        chunking.ops = before


def measure(rounds, dtype, device="cpu"):
    """Milliseconds of one forward and backward pass of DC-DiT-S, by kind of ops."""
    torch.manual_seed(0)
    batch = torch.randn(8, 4, 32, 32), torch.randint(0, 1000, (8,)), torch.randint(0, 1000, (8,))
    x, t, y = (v.to(device) for v in batch)
    model = DCDiT(preset("S")).to(device)
    model.calibrate_router(x, t, y)
    kinds = {"dense": {}, "torch": {"ops_backend": "torch"}, "auto": {}, "capacity": {"packing": "capacity"}}
    models = {}
    for kind, changes in kinds.items():
        models[kind] = DCDiT(preset("S", **changes)).to(device)
        models[kind].load_state_dict(model.state_dict())
    times, outs = {kind: [] for kind in kinds}, {}
    for _ in range(WARM + rounds):
        for kind, model in models.items():
            model.zero_grad()
            with dense_ops() if kind == "dense" else contextlib.nullcontext():
                wait(device)
                start = time.perf_counter()
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    out = model(x, t, y)
                out.sample.square().mean().backward()
                wait(device)
                times[kind].append(1e3 * (time.perf_counter() - start))
            outs[kind] = out
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    for out in outs.values():
        torch.testing.assert_close(out.sample, outs["dense"].sample, rtol=tolerance, atol=tolerance)
    share = outs["auto"].routing.retained.float().mean().item()
    return {kind: statistics.median(t[WARM:]) for kind, t in times.items()} | {"retained": share}


def table(rows):
    """Rows of text cells, the header first."""
    cells = [["ops", "dtype", "kept", "ms", "over dense"]]
    for row in rows:
        for kind in ("dense", "torch", "auto", "capacity"):
            speedup = f"{row['dense'] / row[kind]:.2f}x"
            cells.append(
                [
                    kind,
                    row["dtype"],
                    f"{row['retained']:.0%}",
                    f"{row[kind]:.{0 if row[kind] >= 100 else 1}f}",
                    speedup,
                ]
            )
    return cells
