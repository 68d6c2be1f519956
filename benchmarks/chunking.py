"""The chunking path against the dense formulation, side by side in one process.

Path: select (with tail drop), gather + positions, smoothing, plug-back, gated residual; 25 % retained.
`dense` is the formulation with argsorts, a B x M x M kernel and a B x L x M distance table; `torch` and
`auto` are ours. Runs are interleaved, so that a busy machine slows all alike; the table shows medians in ms.

With --model the whole DC-DiT-S instead, forward and backward, batch 8 at 32x32, calibrated to 25 %: with the
dense formulation in place of our ops, with our PyTorch forms, with ours, and with packing by capacity.

    python benchmarks/chunking.py [--model] [--quick] [--json FILE] [--dtype float32] [--threads N]
"""

import argparse
import contextlib
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from model import DCDiT, chunking, preset
from model.ops import Selection, available, dechunk, gather_tokens, select

SIZES = [  # batch, (H, W), D, sigma
    (8, (32, 32), 384, 1.0),
    (32, (32, 32), 768, 1.0),
    (4, (64, 64), 1152, 2.0),
]
NATURAL, RHO = 0.357, 0.3  # 25 % of the tokens stay


def dense_path(x, pos, prob, rho, residual, grid, sigma):
    """The same result the plain way: padded to the largest image, all pairs written out."""
    B, L, D = x.shape
    H, W = grid
    forced = torch.zeros_like(prob, dtype=torch.bool)
    forced[:, 0] = forced[:, -1] = True
    p = torch.where(forced, torch.ones_like(prob), prob)
    natural = p > 0.5
    order = torch.where(natural, p, torch.inf).argsort(dim=1)
    rank = order.argsort(dim=1)
    retained = natural & (rank >= (natural.sum(1).float() * rho).int()[:, None])

    count = retained.sum(1)
    M = int(count.max())
    place = retained.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :M]
    valid = torch.arange(M) < count[:, None]
    wide = place[..., None].expand(-1, -1, D)
    h = x.gather(1, wide)[valid] + pos[place[valid]]  # the packed sequence, (T, D)

    h_pad = h.new_zeros(B, M, D)
    h_pad[valid] = h
    p_sel = p.gather(1, place).clamp(1e-4, 1 - 1e-4) * valid
    return dense_dechunk(h_pad, p_sel, place, valid, natural, p, residual, grid, sigma)


def dense_dechunk(h_pad, p_sel, place, valid, natural, p, residual, grid, sigma):
    """From the padded tokens (B, M, D) at `place` (B, M) onto the grid."""
    B, L, D = residual.shape
    W = grid[1]
    u = torch.stack([place // W, place % W], -1).float()
    kernel = torch.exp(-(u[:, :, None] - u[:, None]).pow(2).sum(-1) / (2 * sigma**2)) * p_sel[:, None, :]
    s = torch.bmm(kernel, h_pad) / (kernel.sum(-1, keepdim=True) + 1e-8)
    out = p_sel[..., None] * h_pad + (1 - p_sel[..., None]) * s

    i = torch.arange(L)
    everywhere = torch.stack([i // W, i % W], -1).float()
    d2 = (everywhere[None, :, None] - u[:, None]).pow(2).sum(-1).masked_fill(~valid[:, None], torch.inf)
    plug = out.gather(1, d2.argmin(-1)[..., None].expand(-1, -1, D))
    q = torch.where(natural, p, 1 - p)[..., None]
    return plug * (1 + q - q.detach()) + residual


def our_path(backend):
    def path(x, pos, prob, rho, residual, grid, sigma):
        s = select(prob, rho, backend=backend)
        index = s.index[: int(s.cu_seqlens[-1])]
        h = gather_tokens(x, pos, index, s.slot, backend=backend)
        maps = (s.natural, index, s.slot, s.cu_seqlens)
        return dechunk(h, prob, *maps, residual, grid, sigma, backend=backend)

    return path


PATHS = {"dense": dense_path, "torch": our_path("torch"), "auto": our_path("auto")}


def inputs(size, dtype):
    B, (H, W), D, _ = size
    g = torch.Generator().manual_seed(0)
    u = torch.rand(B, H * W, generator=g)
    prob = torch.where(u < NATURAL, 0.5 + u / (2 * NATURAL), u * 0.5)
    x, residual = (torch.randn(B, H * W, D, generator=g).to(dtype) for _ in range(2))
    pos = torch.randn(H * W, D, generator=g)
    grad = torch.randn(B, H * W, D, generator=g)
    return x, pos, prob, torch.full((B,), RHO), residual, grad


def once(path, size, tensors, backward):
    """Seconds of one run. The gradient's leaves are fresh, so that nothing accumulates."""
    x, pos, prob, rho, residual, grad = tensors
    leaves = [t.detach().requires_grad_(backward) for t in (x, prob, residual)]
    start = time.perf_counter()
    out = path(leaves[0], pos, leaves[1], rho, leaves[2], size[1], size[3])
    if backward:
        torch.autograd.grad(out, leaves, grad)
    return time.perf_counter() - start


def measure(size, dtype, rounds):
    tensors = inputs(size, dtype)
    # The dense form has no narrow arithmetic worth comparing with: it gets the same numbers in float32.
    plain = tuple(t.float() for t in tensors)
    row = {"batch": size[0], "grid": list(size[1]), "channels": size[2], "sigma": size[3]}
    for what in ("forward", "forward+backward"):
        times = {name: [] for name in PATHS}
        for _ in range(rounds + 1):
            for name, path in PATHS.items():
                given = plain if name == "dense" else tensors
                times[name].append(once(path, size, given, what != "forward"))
        row[what] = {name: 1e3 * statistics.median(t[1:]) for name, t in times.items()}
        row[what]["speedup"] = row[what]["dense"] / row[what]["auto"]
    return row


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
        index = torch.full((B * L,), -1)
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
        valid = torch.arange(int(count.max())) < count[:, None]
        h_pad = h.new_zeros(*valid.shape, D, dtype=torch.float32)
        h_pad[valid] = h.float()
        place_pad = place.new_zeros(valid.shape)
        place_pad[valid] = place
        forced = torch.arange(L) % (L - 1) == 0
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


def measure_model(rounds, dtype):
    """Milliseconds of one forward and backward pass of DC-DiT-S, by kind of ops."""
    torch.manual_seed(0)
    x, t, y = torch.randn(8, 4, 32, 32), torch.randint(0, 1000, (8,)), torch.randint(0, 1000, (8,))
    model = DCDiT(preset("S"))
    model.calibrate_router(x, t, y)
    kinds = {"dense": {}, "torch": {"ops_backend": "torch"}, "auto": {}, "capacity": {"packing": "capacity"}}
    models = {}
    for kind, changes in kinds.items():
        models[kind] = DCDiT(preset("S", **changes))
        models[kind].load_state_dict(model.state_dict())
    times, outs = {kind: [] for kind in kinds}, {}
    for _ in range(rounds + 1):
        for kind, model in models.items():
            model.zero_grad()
            with dense_ops() if kind == "dense" else contextlib.nullcontext():
                start = time.perf_counter()
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    out = model(x, t, y)
                out.sample.square().mean().backward()
                times[kind].append(1e3 * (time.perf_counter() - start))
            outs[kind] = out
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    for out in outs.values():
        torch.testing.assert_close(out.sample, outs["dense"].sample, rtol=tolerance, atol=tolerance)
    share = outs["auto"].routing.retained.float().mean().item()
    return {kind: statistics.median(t[1:]) for kind, t in times.items()} | {"retained": share}


def machine():
    name = platform.processor() or platform.machine()
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
        name = next(
            line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")
        )
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="store_true", help="the whole DC-DiT-S")
    parser.add_argument("--quick", action="store_true", help="a quarter of the batch, 3 rounds instead of 15")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, help="default: what torch chooses")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    print(f"{machine()}, {args.dtype}, native ops {'loaded' if available()['native'] else 'not built'}; ms")
    rows = show_model(args) if args.model else show_path(args)
    if args.json:
        report = {"machine": machine(), "dtype": args.dtype, "native": available()["native"], "rows": rows}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


def show_model(args):
    row = measure_model(1 if args.quick else 5, getattr(torch, args.dtype))
    print(f"DC-DiT-S, batch 8 x 32x32, forward+backward, {row['retained']:.0%} retained")
    for kind in ("dense", "torch", "auto", "capacity"):
        print(f"{kind:10}{row[kind]:10.0f}{row['dense'] / row[kind]:8.2f}x")
    return [row]


def show_path(args):
    print(f"{'size':26}{'pass':18}" + "".join(f"{name:>10}" for name in PATHS) + f"{'dense/auto':>12}")
    rows = []
    for size in SIZES:
        if args.quick:
            size = (max(1, size[0] // 4), *size[1:])
        row = measure(size, getattr(torch, args.dtype), 3 if args.quick else 15)
        rows.append(row)
        label = f"{size[0]} x {size[1][0]}x{size[1][1]} x {size[2]} (s={size[3]:g})"
        for what in ("forward", "forward+backward"):
            cells = "".join(f"{row[what][name]:10.2f}" for name in PATHS)
            print(f"{label:26}{what:18}{cells}{row[what]['speedup']:11.1f}x", flush=True)
    return rows


if __name__ == "__main__":
    main()
