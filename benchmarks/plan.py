"""`dcdit plan` against what is really held: activations of small models, and the state of every engine.

    python benchmarks/plan.py [--parts example,activations,state] [--markdown FILE]

Example: what `dcdit plan --model XL --gpus 64 --gpu h200` prints.

Activations: bytes of all tensors alive after a forward pass, and the most that ever were, weights left out (every
storage is followed from the operation that makes it until it is freed). State: bytes of distinct storages that an
engine's weights, gradients, optimizer and averages hold on each of two processes, after a step (gradients before it).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402

SMALL = {"hidden_size": 128, "depth": 4, "num_heads": 4, "num_classes": 10}
MODELS = {
    "DC-DiT": {"enc_dec_dim_factor": 2, "input_size": (16, 16)},
    "DC-DiT, capacity": {"enc_dec_dim_factor": 2, "input_size": (16, 16), "packing": "capacity"},
    "DC-DiT, cosine": {"enc_dec_dim_factor": 2, "input_size": (16, 16), "router": "cosine"},
    "DiT/2": {"patch_size": 2, "input_size": (32, 32)},
}
ENGINES = ("fsdp", "ddp", "zero1", "zero2", "zero3")


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations made and nobody has freed: now, and at most so far."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakKeyDictionary()
        self.known = [tensor.untyped_storage() for tensor in known]  # alive as long as this is
        self.seen.update({storage: 0 for storage in self.known})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen[storage] = size = storage.nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, size)
        return out

    def freed(self, size: int) -> None:
        self.now -= size


def activations(name: str, images: int, bf16: bool, mode: str) -> dict[str, int]:
    """Bytes kept by a forward pass and at its backward's peak, measured, and what the plan says of the former: of a
    forward with as many tokens as the router kept."""
    from model import DCDiT, DCDiTConfig, DiT, DiTConfig
    from trainer.parallel.apply import checkpoint_blocks
    from trainer.planning import activation_bytes, retained_tokens, sizes

    torch.manual_seed(0)
    shapes = SMALL | MODELS[name]
    dit = "patch_size" in shapes
    config = (DiTConfig if dit else DCDiTConfig)(**shapes)
    model = (DiT if dit else DCDiT)(config).train()
    data = torch.randn(images, 4, *config.input_size), torch.rand(images) * 1000, torch.arange(images) % 10
    if not dit:
        model.calibrate_router(*data)
    checkpoint_blocks(model, mode)
    with Alive([*model.parameters(), *model.buffers(), *data]) as alive:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = model(*data)
        kept = alive.now
        out.sample.float().square().sum().backward()
    tokens = retained_tokens(config, images) if out.routing is None else len(out.routing.index)
    parts = activation_bytes(config, images, tokens, bf16, mode, gpu=False)
    counted = sizes(config)
    casts = 2 * (counted.cast + (counted.cast_blocks if mode == "none" else 0)) if bf16 else 0
    return {"measured": kept, "planned": sum(parts.values()) + casts, "peak": alive.peak}


def storage_bytes(tensors: Any) -> int:
    """Of the distinct storages under these tensors, DTensors by what is local."""
    found = {}
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = getattr(local, "ds_tensor", local).untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def held(engine: Any, name: str) -> dict[str, int]:
    """What `engine` has of each kind after a step, on this process."""
    parameters = list(engine.model.parameters())
    own = engine.optimizer
    if name == "zero3":
        master = own.fp32_partitioned_groups_flat
    else:
        master = own.single_partition_of_fp32_groups if name.startswith("zero") else []
    inner = own.optimizer if name.startswith("zero") else own
    moments = [
        v for state in inner.state.values() for v in state.values() if torch.is_tensor(v) and v.numel() > 1
    ]
    averages = [p for average in engine.averages.values() for p in average.parameters()]
    return {
        "weights": storage_bytes(parameters),
        "moments": storage_bytes(moments),
        "averages": storage_bytes(averages),
        "master": storage_bytes(master),
    }


def worker(rank: int, processes: int, port: int, name: str, out: str) -> None:
    """One process of a small run by one engine: a step, and then a look at what it holds."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(processes),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from model import DCDiT, DCDiTConfig
    from trainer.config import load_config
    from trainer.ema import ema_copy
    from trainer.parallel import close_world, engine, open_world

    torch.set_num_threads(1)
    kind = [f"parallel.engine={name}"]
    if name.startswith("zero"):
        kind = ["parallel.engine=deepspeed", f"parallel.zero_stage={name[-1]}"]
    config = load_config(None, ["data.path=none", "train.precision=fp32", f"train.global_batch_size={4 * processes}",
                                f"train.total_images={4 * processes}", *kind])  # fmt: skip
    world = open_world(device="cpu")
    torch.manual_seed(0)
    model = DCDiT(DCDiTConfig(**SMALL, **MODELS["DC-DiT"]))
    parameters = sum(p.numel() for p in model.parameters())
    running = engine(config.parallel.engine)(model, [ema_copy(model)], world, config, 4)
    data = torch.randn(4, 4, 16, 16), torch.rand(4) * 1000, torch.arange(4)
    with running.accumulate(last=True):
        running.backward(running.model(*data).sample.square().mean())
    gradients = storage_bytes([p.grad for p in running.model.parameters() if p.grad is not None])
    running.step(1e-4)
    running.update_averages([0.9])
    found = held(running, name) | ({} if name.startswith("zero") else {"gradients": gradients})
    Path(f"{out}.{rank}").write_text(json.dumps(found | {"parameters": parameters}))
    del running
    close_world()


def state(name: str, processes: int, folder: Path, context: Any = None) -> dict[str, dict[str, float]]:
    """Bytes of one process (the mean) by kind: {"measured": ..., "planned": ...}. context: of multiprocessing."""
    from trainer.planning import state_bytes

    context = context or multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = str(folder / name)
    started = [
        context.Process(target=worker, args=(rank, processes, port, name, out)) for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        raise RuntimeError(f"{name}: processes ended with {[p.exitcode for p in started]}")
    rows = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(processes)]
    parameters = rows[0].pop("parameters")
    measured = {kind: sum(row[kind] for row in rows) / processes for kind in rows[0]}
    planned = state_bytes(name, parameters, processes)
    return {"measured": measured, "planned": {kind: planned[kind] for kind in measured}}


def activation_table() -> list[list[str]]:
    rows = [["model", "precision", "recomputation", "MB kept", "MB planned", "off", "MB at the peak"]]
    for name in MODELS:
        for bf16 in (False, True):
            for mode in ("none", "block", "selective") if name == "DC-DiT" else ("none",):
                found = activations(name, 4, bf16, mode)
                off = found["planned"] / found["measured"] - 1
                sizes = [f"{found[key] / 1e6:.2f}" for key in ("measured", "planned")]
                peak = f"{found['peak'] / 1e6:.2f}"
                rows.append([name, "bf16" if bf16 else "fp32", mode, *sizes, f"{off:+.1%}", peak])
    return rows


def state_table(processes: int = 2) -> list[list[str]]:
    kinds = ("weights", "gradients", "moments", "averages", "master")
    rows = [["engine", "processes", *(f"{kind}: MB, planned" for kind in kinds), "off"]]
    with tempfile.TemporaryDirectory() as folder:
        for name in ENGINES:
            found = state(name, processes, Path(folder))
            pairs = [(found["measured"].get(kind), found["planned"].get(kind)) for kind in kinds]
            cells = ["" if a is None else f"{a / 1e6:.2f}, {b / 1e6:.2f}" for a, b in pairs]
            off = sum(b for _, b in pairs if b) / sum(a for a, _ in pairs if a) - 1
            rows.append([name, str(processes), *cells, f"{off:+.1%}"])
    return rows


def example() -> str:
    """A plan as it is printed, under its command, as a block of markdown."""
    from trainer.plan import main as plan

    words = ["--model", "XL", "--gpus", "64", "--gpu", "h200"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        plan(words)
    return f"```\n$ dcdit plan {' '.join(words)}\n{printed.getvalue()}```\n"


def main() -> int:
    text = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text.add_argument("--parts", type=lambda s: s.split(","), default=["example", "activations", "state"])
    text.add_argument("--markdown", type=Path)
    options = text.parse_args()
    from benchmarks.tables import facts_of_this_run, headline, markdown, place, plain_text

    facts = facts_of_this_run("benchmarks/plan.py")
    print(headline(facts))
    for part in options.parts:
        if part == "example":
            print("\n" + example())
            if options.markdown:
                place(options.markdown, part, example())
            continue
        rows = {"activations": activation_table, "state": state_table}[part]()
        left = 3 if part == "activations" else 1
        print("\n" + plain_text(rows, left=left), flush=True)
        if options.markdown:
            place(options.markdown, part, markdown(rows, facts, left=left))
    return 0


if __name__ == "__main__":
    sys.exit(main())
