"""How `dcdit plan` reads: its tables, and what they assume."""

from __future__ import annotations

from typing import Any

from trainer.planning import LINK_SHARE, RESERVE, retained_tokens


def table(rows: list[list[str]]) -> str:
    """Aligned text: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))]
        for r in rows
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f}" if value < 99.5e9 else f"{value / 1e9:.0f}"


def memory_table(plan: dict[str, Any], memory: float) -> str:
    names = [
        "weights",
        "gradients",
        "moments",
        "averages",
        "master",
        "activations",
        "working",
        "transient",
        "total",
    ]
    rows = [["engine", *names, f"of {memory:g}"]]
    for row in plan["engines"]:
        held = row["memory"]
        fits = "fits" if held["fits"] else "TOO MUCH"
        rows.append([row["engine"], *(gigabytes(held[name]) for name in names), fits])
    return table(rows)


def speed_table(plan: dict[str, Any]) -> str:
    rows = [
        [
            "engine",
            "gathered",
            "scattered",
            "all-reduced",
            "ms",
            "ms compute",
            "ms update",
            "images/s",
            "no overlap",
        ]
    ]
    for row in plan["engines"]:
        sent = row["communication"]
        kinds = [gigabytes(sent[kind]) for kind in ("all-gather", "reduce-scatter", "all-reduce")]
        times = [f"{1000 * row[f'{name}_seconds']:.1f}" for name in ("communication", "compute", "optimizer")]
        rates = [f"{row[name]:,.0f}" for name in ("images_per_second", "images_per_second_no_overlap")]
        rows.append([row["engine"], *kinds, *times, *rates])
    return table(rows)


def paper_table(plan: dict[str, Any]) -> str:
    rows = [["run of the paper", "pixels", "GFLOPs per image", "images/s", "days", "GPU days"]]
    for run in plan["paper"]:
        flops = f"{run['training_flops'] / 1e9:,.0f}"
        days, gpu_days = f"{run['days']:.2g}", f"{run['gpu_days']:,.1f}"
        rows.append(
            [run["model"], str(run["pixels"]), flops, f"{run['images_per_second']:,.0f}", days, gpu_days]
        )
    return table(rows)


def render(plan: dict[str, Any], s: Any, notes: list[str]) -> str:
    size, loader = "x".join(map(str, (*s.model.input_size, s.model.in_channels))), plan["loader"]
    nodes, replicas = max(1, s.gpus // s.per_node), [r for r in plan["engines"] if r["engine"] == "hsdp"]
    flops, train_flops = (f"{plan[name] / 1e9:,.1f}" for name in ("forward_flops", "training_flops"))
    lines = [
        f"{s.model.hidden_size} wide, {s.model.depth} blocks, input {size}: {plan['parameters'] / 1e6:,.1f} M "
        f"parameters, {flops} GFLOPs forward, {train_flops} to train on an image",
        f"{s.gpus} {s.gpu.name} on {nodes} node{'s' * (nodes > 1)}, batch {s.batch} = {s.micro} a GPU x "
        f"{s.accumulation}, {'bf16' if s.bf16 else 'fp32'}, activation checkpointing {s.checkpointing}, "
        f"averages: {s.averages}" + (f", hsdp: {s.replicate} replicas" if replicas else ""),
    ]
    fits = "that fits" if any(row["memory"]["fits"] for row in plan["engines"]) else "though none fits"
    tail = [
        f"{plan['total_images'] / s.batch:,.0f} steps of {s.batch}: {plan['days']:.2g} days with the fastest engine "
        f"above {fits}",
        f"loader: {loader['images_per_second_per_node']:,.0f} images/s and "
        f"{loader['bytes_per_second_per_node'] / 1e9:.2g} GB/s per node; "
        f"a checkpoint: {plan['checkpoint_bytes'] / 1e9:.1f} GB",
    ]
    parts = [
        "\n".join(lines),
        "Memory per GPU, GB of 1e9 bytes\n" + memory_table(plan, s.gpu.memory),
        "A step: GB sent by each GPU, the time that takes, and computing\n" + speed_table(plan),
        "\n".join(tail),
        "The paper's runs on these GPUs, computing alone (400K steps of 256)\n" + paper_table(plan),
        "Assumptions\n" + "\n".join(f"- {line}" for line in assumptions(s, notes)),
    ]
    return "\n\n".join(parts)


def assumptions(s: Any, notes: list[str]) -> list[str]:
    share = f"{1 / s.model.target_ratio:.3g}" if hasattr(s.model, "target_ratio") else "all"
    budgets = ", ".join(f"{rho:g}" for rho in s.tail_drop)
    return [
        f"Speed: {s.mfu:.0%} of {s.gpu.tflops:g} dense bf16 TFLOP/s, an assumption (--mfu) and not a measurement: "
        f"nothing here was timed on a GPU. {retained_tokens(s.model, s.micro):,} packed tokens a GPU and forward: with "
        "few thousand, kernels are too small for such a share.",
        "Backward costs two forwards; checkpointing `block` runs the blocks once more.",
        f"FLOPs are the mean over the budgets {budgets} (tail drop), without it in the first {s.single_budget:.2%} of "
        f"the run. Retained share of the tokens: {share}, the same in every image; attention is quadratic in it, so a "
        "spread costs a little more.",
        "images/s: communication behind computing, whichever is longer, then AdamW and averages at the memory's "
        "bandwidth; `no overlap` adds all three. No stalls of loader, evaluation or saves; all GPUs equally loaded.",
        f"Links: {LINK_SHARE:.0%} of {s.gpu.link:g} GB/s within a node of {s.per_node}, of {s.gpu.network:g} GB/s per "
        "GPU between nodes (one way; vendors' data sheets and reference systems; --network). Ring algorithms, no "
        "latency.",
        "Memory is an upper bound: activations are largest when gradients are not yet there. Activations are those of "
        f"a micro-batch at the full budget; `fits` leaves {RESERVE:.0%} of the data sheet's memory for the context, "
        "communicators, workspaces and fragmentation.",
        "working: temporaries of the widest layer, and one block where blocks are run again. transient: gathered "
        "weights and gradients of a unit (fsdp, hsdp); bf16 copies of weights (ddp, zero); DeepSpeed's buckets at its "
        "defaults, 2 x 2 GB (zero1, zero2) or 2 GB and all weights gathered (zero3).",
        "Attention by a variable-length kernel, native fused ops. Weights, moments, averages and reductions in fp32.",
        *notes,
    ]
