"""What a training run needs, on paper: memory, communication and time, from shapes alone. `dcdit plan` prints it.

Bytes and seconds are of one GPU. Parameter counts are those of the real modules, made without memory; activations
follow what autograd keeps of each layer (tests/trainer/test_plan.py counts it); what an engine holds is checked against
the engines themselves. Speed is an assumption: a share of the peak.

Letters as in model/dcdit.py: L cells of the grid, T tokens of a batch, D and E widths, n processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from model import DCDiT, DiT
from model.chunking import capacity
from model.flops import flops
from model.linear import Float32Linear
from model.router import Float32Conv2d
from trainer.gpus import Gpu

FLOAT = 4  # bytes
ENGINES = ("fsdp", "hsdp", "ddp", "zero1", "zero2", "zero3")
# What every process holds whole; the rest is divided. DeepSpeed keeps fp32 master weights beside its fp32 weights.
WHOLE = {
    "ddp": ("weights", "gradients", "moments", "averages"),
    "zero1": ("weights", "gradients", "averages"),
    "zero2": ("weights", "averages"),
}
# DeepSpeed's defaults, in elements, which our configuration does not change.
REDUCE_BUCKET, MAX_LIVE, PREFETCH_BUCKET = 500_000_000, 1_000_000_000, 50_000_000
PEERS = 7  # other GPUs that one of a mesh has a link to
LINK_SHARE = 0.7  # of a link's data sheet that a collective reaches
RESERVE = 0.1  # of a GPU's memory: context, communicators, workspaces, fragmentation


@dataclass(frozen=True)
class Setting:
    """What is planned. micro: images per GPU and forward; averages: EMA copies (host_averages: in host memory);
    tail_drop: the budgets trained with, after the first `single_budget` (share) of the run."""

    model: Any
    gpu: Gpu
    gpus: int
    per_node: int = 8
    batch: int = 256
    micro: int = 4
    replicate: int = 1
    bf16: bool = True
    checkpointing: str = "none"
    averages: int = 1
    host_averages: bool = False
    tail_drop: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    single_budget: float = 0.0125
    mfu: float = 0.35

    @property
    def accumulation(self) -> int:
        return self.batch // (self.micro * self.gpus)

    @property
    def width(self) -> int:
        """Bytes of a number in what autocast computes."""
        return 2 if self.bf16 else FLOAT

    @cached_property
    def sizes(self) -> Sizes:
        return sizes(self.model)


@dataclass(frozen=True)
class Sizes:
    """Parameters, counted in the modules: of the model, of those kept in fp32 (router, residual branch, gates), of each
    unit that FSDP gathers, of what it gathers at the root, of what autocast casts outside of the blocks and in them;
    and elements of buffers."""

    total: int
    exact: int
    units: tuple[int, ...]
    root: int
    cast: int
    cast_blocks: int
    buffers: int


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def sizes(config: Any) -> Sizes:
    """Of the model of `config`, on the meta device: for a small grid, on which only the position table depends."""
    patch = getattr(config, "patch_size", 1)
    with torch.device("meta"):
        model = (DiT if hasattr(config, "patch_size") else DCDiT)(replace(config, input_size=8 * patch))
    parts = {name: getattr(model, name, None) for name in ("router", "residual_proj", "gates")}
    exact = [count(m) for m in parts.values() if m is not None]
    wide = [count(m) for name in ("encoder", "decoder") if (m := getattr(model, name, None)) is not None]
    units = [count(block) for block in model.backbone.blocks] + wide
    cast = [0, 0]  # outside of the blocks, in them
    for name, m in model.named_modules():
        exactly = isinstance(m, Float32Linear | Float32Conv2d) or name.startswith(("router", "gates"))
        if isinstance(m, nn.Linear | nn.Conv2d) and not exactly:
            cast[name.startswith("backbone.blocks")] += sum(p.numel() for p in m.parameters(recurse=False))
    total = count(model)
    buffers = math.prod(config.input_size) // patch**2 * config.hidden_size
    return Sizes(total, sum(exact), tuple(units), total - sum(units) - sum(exact), *cast, buffers)


def state_bytes(engine: str, parameters: int, processes: int, averages: int = 1) -> dict[str, float]:
    """Bytes of one process by `engine` with its state over `processes`: fp32 weights, gradients, AdamW's two moments,
    averages, and DeepSpeed's master weights."""
    whole = WHOLE.get(engine, ())
    copies = {"weights": 1, "gradients": 1, "moments": 2, "averages": averages}
    held = {name: FLOAT * parameters * n / (1 if name in whole else processes) for name, n in copies.items()}
    return held | {"master": FLOAT * parameters / processes if engine.startswith("zero") else 0.0}


# Activations: bytes that autograd keeps from the forward for the backward pass.


def _conv_block(cells: int, inside: int, outside: int, width: int) -> int:
    """Group norms in fp32 (input, output), the convolutions' inputs, the skip's where it is a convolution."""
    inner = min(inside, outside)
    kept = cells * (inside + inner) * (2 * FLOAT + width)
    if inside != outside and width < FLOAT:
        kept += cells * inside * width
    return kept + 4 * 32 * FLOAT


def _conv_stack(cells: int, widths: tuple[int, ...], width: int, cond: int) -> int:
    kept = sum(_conv_block(cells, a, b, width) for a, b in pairwise(widths))
    return (
        kept + (len(widths) - 1) * cond * width + cells * (2 * widths[-1] + 1) * FLOAT
    )  # adaLN's SiLU, RMSNorm


def _router(config: Any, cells: int) -> int:
    if config.router == "random":
        return 0
    values = (
        5 * config.hidden_size + 6 if config.router == "cosine" else 5 * (config.hidden_size // 4)
    )  # fp32
    return cells * (values + 1) * FLOAT


def _head(config: Any, rows: int, channels: int, images: int, width: int, gpu: bool) -> int:
    """Norm (input, output, statistics), the linear layer's input, adaLN."""
    norm = _narrow(config, width, gpu)[1]
    kept = rows * (channels * (2 * norm + width) + 2 * norm)
    return kept + images * (config.hidden_size + channels) * width


def _narrow(config: Any, width: int, gpu: bool = True) -> tuple[int, int]:
    """Bytes of a number in the residual stream and in what norms keep. DC-DiT's stream is fp32; DiT's is what its
    embedder gives, which autocast's norms make fp32 on a GPU."""
    if not hasattr(config, "patch_size"):
        return FLOAT, FLOAT
    return width, FLOAT if gpu else width


def block_bytes(
    config: Any, tokens: int, images: int, width: int, mode: str = "none", gpu: bool = True
) -> int:
    """One transformer block on T = `tokens` rows. mode: activation checkpointing; what it runs again is not kept."""
    D, F = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    number, norm = _narrow(config, width, gpu)
    stream = tokens * D * number
    if mode == "block":
        return stream
    lse = tokens * config.num_heads * FLOAT
    if mode == "selective":  # outputs of qkv, attention, proj, fc1, fc2 and of adaLN
        return stream + tokens * (6 * D + F) * width + lse + images * 6 * D * width
    # Both norms: input, output, statistics. Inputs of qkv, attention (3), proj, gate, fc1, GELU, fc2, gate.
    kept = 4 * tokens * (D + 1) * norm + tokens * (8 * D + 2 * F) * width + lse
    return kept + images * 7 * D * width


def retained_tokens(config: Any, images: int) -> int:
    """Rows of a packed batch of `images`: at the target ratio, or as many as fit."""
    cells = math.prod(config.input_size)
    if hasattr(config, "patch_size"):
        return images * cells // config.patch_size**2
    if config.packing == "capacity":
        return capacity(config.capacity_share, images, cells)
    return math.ceil(images * cells / config.target_ratio)


def activation_bytes(
    config: Any, images: int, tokens: int, bf16: bool = True, mode: str = "none", gpu: bool = True
) -> dict[str, int]:
    """Bytes kept from a forward of `images` with T = `tokens` rows in the backbone, by part. gpu: by the kernels of a
    GPU, which keep the de-chunk's smoothed rows; attention on a CPU keeps its output twice (by image, joined) instead.
    """
    cells, D = math.prod(config.input_size), config.hidden_size
    w = 2 if bf16 else FLOAT
    blocks = config.depth * block_bytes(config, tokens, images, w, mode, gpu)
    embed = images * (cells * config.in_channels + 256 + 3 * D) * w + images * D * FLOAT
    if hasattr(config, "patch_size"):
        blocks += 0 if mode == "block" else config.depth * images * 2 * D * w  # 1 + scale, twice
        return {"embed": embed, "backbone": blocks, "head": _head(config, tokens, D, images, w, gpu)}
    if not gpu and mode == "none" and config.packing == "exact":
        blocks += config.depth * tokens * D * w
    E = config.encoder_size
    return {
        "embed": embed,
        "encoder": images * (_conv_stack(cells, (E, E, D), w, D) + cells * D * FLOAT),  # and what it returns
        "router": images * _router(config, cells),
        "backbone": blocks + tokens * (2 * D + 1) * FLOAT,
        "dechunk": (2 if gpu else 1) * tokens * D * FLOAT + images * cells * 13 + tokens * FLOAT,
        "decoder": images * _conv_stack(cells, (D, E, E), w, D),
        "head": _head(config, images * cells, E, images, w, gpu),
    }


# What comes and goes.


def working_bytes(s: Setting, tokens: int) -> int:
    """Beside what is kept: gradients and temporaries of the widest layer, and of the block that is run again."""
    config, cells = s.model, math.prod(s.model.input_size)
    rows = s.micro * cells if not hasattr(config, "patch_size") else tokens
    channels = getattr(config, "encoder_size", config.hidden_size)
    working = 4 * rows * channels * FLOAT + 24 * s.micro * cells * config.in_channels * FLOAT
    if s.checkpointing != "none":
        full, kept = (block_bytes(config, tokens, s.micro, s.width, m) for m in ("none", s.checkpointing))
        working += full - kept
    return working


def transient_bytes(s: Setting, engine: str) -> float:
    """Gathered weights, buckets of gradients, and bf16 copies of weights."""
    sizes = s.sizes
    if engine in ("fsdp", "hsdp"):
        largest = max(sizes.units)
        gathered = (sizes.root + 2 * largest) * s.width + sizes.exact * FLOAT
        return gathered + largest * (s.width + FLOAT)  # one unit's gradients, and the same in fp32 to reduce
    casts = 2 * (sizes.cast + sizes.cast_blocks) if s.bf16 else 0  # kept by autocast and by autograd
    if engine == "ddp":
        return casts
    if engine == "zero3":
        live = min(sizes.total, MAX_LIVE) + min(sizes.total, PREFETCH_BUCKET)
        return casts + FLOAT * (live + REDUCE_BUCKET)
    return casts + 2 * FLOAT * REDUCE_BUCKET  # two, for the overlap


def shard_processes(s: Setting, engine: str) -> int:
    return s.gpus // s.replicate if engine == "hsdp" else s.gpus


def memory(s: Setting, engine: str) -> dict[str, Any]:
    """Bytes per GPU by kind, their sum, and whether that fits. The sum is an upper bound: activations are largest
    before the gradients are there."""
    tokens = retained_tokens(s.model, s.micro)
    held = state_bytes(engine, s.sizes.total, shard_processes(s, engine), s.averages)
    buffers = FLOAT * s.sizes.buffers
    held["weights"] += buffers
    held["averages"] = 0.0 if s.host_averages else held["averages"] + buffers * s.averages
    if engine in ("fsdp", "hsdp") and s.accumulation > 1:  # whole until the last micro-batch reduces them
        held["gradients"] += FLOAT * s.sizes.total
    kept = activation_bytes(s.model, s.micro, tokens, s.bf16, s.checkpointing)
    held["activations"] = sum(kept.values())
    held["working"] = working_bytes(s, tokens)
    held["transient"] = transient_bytes(s, engine)
    total = sum(held.values())
    return held | {"total": total, "fits": total <= (1 - RESERVE) * s.gpu.memory * 1e9}


# Communication and time.


def bus(s: Setting, members: int, per_node: int) -> float:
    """Bytes/s of a ring over `members` processes, `per_node` of them in each node: the node's link, or where it leaves
    the node, the network of those GPUs. Fewer than eight of a mesh have that many fewer links among them."""
    near, speed = min(members, per_node), s.gpu.link
    if s.gpu.mesh:
        speed *= min(max(near - 1, 1), PEERS) / PEERS
    if members > per_node:
        speed = min(speed, per_node * s.gpu.network)
    return LINK_SHARE * speed * 1e9


def communication(s: Setting, engine: str) -> dict[str, float]:
    """Bytes that a GPU sends in a step, by operation, and the seconds they take. Rings: an all-gather or reduce-scatter
    of V bytes over n sends V (n-1)/n, an all-reduce twice that."""
    n, P = shard_processes(s, engine), FLOAT * s.sizes.total
    share = (n - 1) / n
    sent = {"all-gather": 0.0, "reduce-scatter": 0.0, "all-reduce": 0.0}
    if engine in ("fsdp", "hsdp"):
        gathered = (s.sizes.total - s.sizes.exact) * s.width + s.sizes.exact * FLOAT
        sent["all-gather"] = 2 * s.accumulation * share * gathered
        sent["reduce-scatter"] = share * P
    elif engine == "ddp":
        sent["all-reduce"] = 2 * share * P
    elif engine == "zero3":
        sent["all-gather"] = 2 * s.accumulation * share * P
        sent["reduce-scatter"] = s.accumulation * share * P
    else:  # DeepSpeed all-reduces buckets that belong to several processes, stage 2 at every micro-batch
        sent["all-reduce"] = 2 * share * P * (s.accumulation if engine == "zero2" else 1)
        sent["all-gather"] = share * P
    seconds = sum(sent.values()) / bus(s, n, min(n, s.per_node))
    if engine == "hsdp" and s.replicate > 1:
        between = 2 * (s.replicate - 1) / s.replicate * P / n
        sent["all-reduce"] = between
        seconds += between / bus(s, s.replicate, max(1, s.per_node // n))
    return sent | {"total": sum(sent.values()), "seconds": seconds}


def forward_flops(model: Any, tail_drop: float = 0.0) -> dict[str, float]:
    """Of one image that retains L / N tokens less the tail drop."""
    if hasattr(model, "patch_size"):
        return flops(model)
    cells = math.prod(model.input_size)
    return flops(model, max(2.0, cells / model.target_ratio * (1 - tail_drop)))


def training_flops(s: Setting) -> float:
    """Per image, the mean over the run's budgets: forward and backward are three forwards, and what activation
    checkpointing runs again (`block`) a share of another."""

    def of(rho: float) -> float:
        parts = forward_flops(s.model, rho)
        return 3 * parts["total"] + (parts["backbone"] if s.checkpointing == "block" else 0.0)

    budgets = sum(map(of, s.tail_drop)) / len(s.tail_drop)
    return s.single_budget * of(0.0) + (1 - s.single_budget) * budgets


def optimizer_seconds(s: Setting, engine: str) -> float:
    """AdamW reads four values and writes three, an average two and one; bound by the memory's bandwidth."""
    held = state_bytes(engine, s.sizes.total, shard_processes(s, engine), s.averages)
    moved = 7 * held["moments"] / 2 + (0 if s.host_averages else 3 * held["averages"])
    return moved / (s.gpu.bandwidth * 1e9)


def rate(s: Setting) -> float:
    """Images/s of all GPUs at the assumed share of the peak."""
    return s.gpus * s.gpu.tflops * 1e12 * s.mfu / training_flops(s)


def speed(s: Setting, engine: str) -> dict[str, float]:
    """Seconds of a step and images/s, with communication behind the computation, and with none of it hidden."""
    compute, update = s.batch / rate(s), optimizer_seconds(s, engine)
    sent = communication(s, engine)["seconds"]
    hidden, exposed = max(compute, sent) + update, compute + sent + update
    return {
        "compute_seconds": compute,
        "communication_seconds": sent,
        "optimizer_seconds": update,
        "step_seconds": hidden,
        "images_per_second": s.batch / hidden,
        "images_per_second_no_overlap": s.batch / exposed,
    }


def checkpoint_bytes(s: Setting) -> int:
    """Weights, moments, averages, and each average once more as safetensors."""
    return FLOAT * s.sizes.total * (3 + 2 * s.averages)


def latent_bytes(model: Any) -> int:
    """A sample of the shards: mean and deviation of the image and of its mirror image, float16 (docs/data.md); pixels
    are one byte."""
    values = math.prod(model.input_size) * model.in_channels
    return values if model.in_channels in (1, 3) else 4 * 2 * values
