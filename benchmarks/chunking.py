"""The chunking path against the dense formulation, side by side in one process.

Path: select (with tail drop), gather + positions, smoothing, plug-back, gated residual; 25 % retained. Forms:
`dense`, with argsorts, a B x M x M kernel and a B x L x M distance table, in float32 whatever the inputs of ours;
`compiled`, that with all but the packing itself under torch.compile; `torch` and `ours`, the forms of model/ops.
Runs are interleaved, so that a busy machine slows all alike; times are medians in ms. Memory: what
chunking_memory.py says. Growth: the time of ours on a grid of twice the height and width over its time on the
grid itself (linear cost is 4).

With --model the whole DC-DiT-S instead (chunking_model.py).

    python benchmarks/chunking.py [--model] [--quick] [--no-compile] [--device cpu|cuda] [--json FILE] [--markdown FILE]
        [--dtype float32,bfloat16] [--sizes BxHxWxD,...] [--rounds N] [--threads N]
"""

import argparse
import signal
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import chunking_model
from benchmarks.chunking_cases import SIZES, Size, dense, inputs, ours, run, tokens, widened
from benchmarks.chunking_memory import KINDS, memory, memory_of_gpu
from benchmarks.tables import (
    add_device,
    add_outputs,
    facts_of_this_run,
    headline,
    keep_memory,
    markdown,
    plain_text,
    wait,
    write_outputs,
)

PASSES = ("forward", "forward_backward")
WARM = 2  # untimed rounds before the timed ones
COMPILE_SECONDS = 180  # for one size; it has usually done after 30


def seconds(path, size, tensors, backward):
    wait(tensors[0].device)
    start = time.perf_counter()
    result = run(path, size, tensors, backward)
    wait(tensors[0].device)
    took = time.perf_counter() - start
    del result  # returning memory to the system is no form's work
    return took


def compiled(size, tensors):
    """(the dense path with its two large parts under torch.compile, warm, None) or (None, why not)."""

    def stop(*_):
        raise TimeoutError(f"not compiled after {COMPILE_SECONDS} s")

    torch._dynamo.reset()
    path = dense(torch.compile)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(COMPILE_SECONDS)
    try:
        for backward in (False, True):
            run(path, size, tensors, backward)
        return path, None
    except Exception as error:  # whatever a compiler may raise: the row then says so and has no such number
        return (
            None,
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
        )
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def time_forms(size, dtype, device, rounds, with_compile, why):
    """{pass: {form: ms}}; what torch.compile says against it goes to `why`."""
    tensors = inputs(size, dtype, device)
    plain = widened(tensors)
    forms = {"dense": (dense(), plain)}
    if with_compile:
        path, reason = compiled(size, plain)
        if path is None:
            why.append(f"torch.compile, {size}: {reason}")
        else:
            forms["compiled"] = (path, plain)
    forms |= {"torch": (ours("torch"), tensors), "ours": (ours(), tensors)}
    loose = 1e-3 if dtype == torch.float32 else 5e-2
    want, *got = (run(path, size, given, False)[0] for path, given in forms.values())
    for out in got:
        torch.testing.assert_close(out, want, rtol=loose, atol=loose)
    del want, got, out
    ms = {}
    for name in PASSES:
        times = {form: [] for form in forms}
        for _ in range(WARM + rounds):
            for form, (path, given) in forms.items():
                times[form].append(seconds(path, size, given, name != "forward"))
        ms[name] = {form: 1e3 * statistics.median(t[WARM:]) for form, t in times.items()}
    return ms


def time_growth(size, dtype, device, rounds):
    """{pass: time of ours with H and W doubled over its time}."""
    pair = [(s, inputs(s, dtype, device)) for s in (size, size.doubled())]
    path, growth = ours(), {}
    for name in PASSES:
        times = [[], []]
        for _ in range(WARM + rounds):
            for (s, tensors), taken in zip(pair, times, strict=True):
                taken.append(seconds(path, s, tensors, name != "forward"))
        small, large = (statistics.median(t[WARM:]) for t in times)
        growth[name] = large / small
    return growth


def measure(size, dtype, args, why):
    rounds = args.rounds or (3 if args.quick else 9)
    kind = getattr(torch, dtype)
    ms = time_forms(size, kind, args.device, rounds, not (args.quick or args.no_compile), why)
    growth = time_growth(size, kind, args.device, rounds)
    T = tokens(size)
    row = {"size": str(size), "dtype": dtype, "sigma": size.sigma, "tokens": T}
    row["retained"] = round(T / (size.batch * size.height * size.width), 2)
    for name in PASSES:
        row[f"speedup_{name}"] = ms[name]["dense"] / ms[name]["ours"]
        if "compiled" in ms[name]:
            row[f"speedup_{name}_over_compiled"] = ms[name]["compiled"] / ms[name]["ours"]
        row[f"growth_{name}"] = growth[name]
    return row | {"growth": growth["forward_backward"], "ms": ms}


def add_memory(rows, device, why):
    """Into the rows: MB of each form, and the ratios; null where they cannot be had."""
    cases = [(Size.parse(row["size"]), row["dtype"]) for row in rows]
    found, reason = (memory_of_gpu if device == "cuda" else memory)(cases)
    if reason:
        why.append(reason)
    for row, peaks in zip(rows, found or [None] * len(rows), strict=True):
        ratio = {kind: peaks[kind]["ours"] / peaks[kind]["dense"] if peaks else None for kind in KINDS}
        row |= {"memory_ratio": ratio["forward_backward"], "memory_ratio_ops": ratio["ops_forward_backward"]}
        row |= {f"memory_ratio_{kind}": ratio[kind] for kind in KINDS}
        row["memory_mb"] = peaks and {
            kind: {form: b / 1e6 for form, b in peaks[kind].items()} for kind in KINDS
        }


def table(rows):
    """Rows of text cells, the header first."""
    forms = [
        form
        for form in ("dense", "compiled", "torch", "ours")
        if any(form in r["ms"][p] for r in rows for p in PASSES)
    ]
    head = ["size", "dtype", "pass", *(f"{form} ms" for form in forms)]
    cells = [[*head, "speedup", "MB dense", "MB ours", "memory", "memory (ops)", "growth"]]
    for row in rows:
        for name in PASSES:
            ms, space = row["ms"][name], ["-"] * 4
            if row["memory_mb"]:
                mb = row["memory_mb"][name]
                ratios = row[f"memory_ratio_{name}"], row[f"memory_ratio_ops_{name}"]
                space = [f"{mb['dense']:.1f}", f"{mb['ours']:.1f}", *(f"{ratio:.3f}" for ratio in ratios)]
            times = [f"{ms[form]:.2f}" if form in ms else "-" for form in forms]
            speedup, growth = row[f"speedup_{name}"], row[f"growth_{name}"]
            line = [row["size"], row["dtype"], name.replace("_", " + ")]
            cells.append([*line, *times, f"{speedup:.1f}x", *space, f"{growth:.2f}"])
    return cells


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="store_true", help="the whole DC-DiT-S")
    parser.add_argument(
        "--quick", action="store_true", help="a quarter of the batch, 3 rounds, no torch.compile"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="without the dense form under torch.compile"
    )
    add_device(parser)
    add_outputs(parser, "--json", "--markdown")
    parser.add_argument(
        "--dtype", help="of the inputs, one or more (default float32,bfloat16; --model: float32)"
    )
    parser.add_argument("--sizes", help="BxHxWxD, one or more, instead of the three of the project")
    parser.add_argument("--rounds", type=int, help="timed runs of each form (default 9; --quick: 3)")
    parser.add_argument("--threads", type=int, help="default: what torch chooses")
    args = parser.parse_args()
    args.dtype = (args.dtype or ("float32" if args.model else "float32,bfloat16")).split(",")
    for dtype in args.dtype:
        if dtype not in ("float32", "bfloat16", "float16"):
            parser.error(f"--dtype {dtype}: expected float32, bfloat16 or float16")
    try:
        given = args.sizes and [Size.parse(size) for size in args.sizes.split(",")]
    except (IndexError, TypeError, ValueError):
        parser.error(f"--sizes {args.sizes}: expected BxHxWxD, as 4x64x64x1152")
    args.sizes = given or [s._replace(batch=max(1, s.batch // 4)) if args.quick else s for s in SIZES]
    return args


def main():
    args = parse()
    keep_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    facts, why = facts_of_this_run("benchmarks/chunking.py", args.device), []
    print(headline(facts), flush=True)
    if args.model:
        rounds = args.rounds or (1 if args.quick else 5)
        rows = [
            chunking_model.measure(rounds, getattr(torch, d), args.device) | {"dtype": d} for d in args.dtype
        ]
        name, cells = "chunking-model", chunking_model.table(rows)
    else:
        rows = [measure(size, dtype, args, why) for dtype in args.dtype for size in args.sizes]
        add_memory(rows, args.device, why)
        name, cells = "chunking", table(rows)
    print(plain_text(cells), *why, sep="\n")
    write_outputs(args, name, markdown(cells, facts), facts | {"rows": rows, "not_measured": why})


if __name__ == "__main__":
    main()
