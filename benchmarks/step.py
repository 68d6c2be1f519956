"""A training step of DC-DiT against DiT of the same size, side by side in one process, interleaved.

A step: forward under the precision asked for, diffusion and ratio loss, backward, gradient clipping, AdamW, EMA: what
the trainer does on one device, on images, noise and timesteps that stay the same. The router is started at its
target share, so a DC-DiT keeps L / N tokens. Kinds of a model: `eager` and `compiled` (torch.compile of each block, as
parallel.compile does), each with packing `exact` and, for a DC-DiT, `capacity`.

Columns: ms, median of a step; images/s; over DiT: images/s over those of the first DiT; FLOPs over DiT: the same of an
image's FLOPs (model/flops.py); efficiency: their product, 1 where time goes with FLOPs; MFU, where the peak is known;
GB, peak memory (GPUs).
With --parts also where the time goes: by kind of kernel, from torch's profiler; and by component, forward and backward,
beside the component's share of the FLOPs.

    python benchmarks/step.py [--models DC-DiT-S,DiT-S/2] [--kinds eager,capacity] [--batch 8] [--grid 32]
        [--precision fp32|bf16] [--tail-drop 0.0] [--rounds 5] [--threads N] [--parts] [--json FILE] [--markdown FILE]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
from model import DCDiT, DiT, preset, ratio_loss
from model.diffusion import make_process
from model.errors import UserError
from model.flops import flops
from trainer.gpus import peak_tflops
from trainer.parallel.apply import compile_blocks
from trainer.precision import autocast

KINDS = ("eager", "capacity", "compiled", "compiled_capacity")
PARTS = {
    "attention": ("attention", "flash", "varlen"),
    "convolution": ("conv", "fprop", "dgrad", "wgrad", "cudnn"),
    "matrix products": ("linear", "mm", "gemm", "nvjet", "cutlass"),
    "chunking and adaLN ops": ("dcdit::", "dcdit_", "_modulate", "_add_gated"),
    "norms": ("norm",),
    "optimizer and EMA": ("_foreach", "fused_adam", "multi_tensor", "adam"),
}


COMPONENTS = {  # as in the forward of a DC-DiT, in order, and what model/flops.py calls them
    "before": ("embed",),
    "encoder": ("encoder",),
    "routing and packing": ("routing", "residual"),
    "backbone": ("backbone",),
    "de-chunk": ("dechunk",),
    "decoder": ("decoder",),
    "after": ("head",),
}


class Stopwatch:
    """Seconds by component of one forward and backward. Its marks are the entries and exits of encoder, backbone and
    decoder: calls on the way in, gradients on the way back."""

    def __init__(self, model, device):
        self.device, self.seconds = device, dict.fromkeys(COMPONENTS, 0.0)
        self.handles, self.last = [], None
        # A DiT is a backbone with something before and after.
        names = list(COMPONENTS) if hasattr(model, "encoder") else ["before", "backbone", "after"]
        for behind, name, ahead in zip(names, names[1:], names[2:], strict=False):
            if module := getattr(model, name, None):
                enter, leave = self._mark(behind, name), self._mark(name, ahead)
                self.handles += [
                    module.register_forward_pre_hook(lambda _, inputs, mark=enter: mark(inputs[0])),
                    module.register_forward_hook(lambda _, inputs, output, mark=leave: mark(output)),
                ]

    def _mark(self, before, after):
        """What is done at a tensor on the border: forward comes from `before`, backward from `after`."""

        def mark(tensor):
            self.add(before)
            tensor.register_hook(lambda gradient: self.add(after))

        return mark

    def add(self, name):
        """All time since the last call was `name`'s; None: nobody's."""
        wait(self.device)
        now = time.perf_counter()
        if name:
            self.seconds[name] += now - self.last
        self.last = now

    def remove(self):
        for handle in self.handles:
            handle.remove()


class Step:
    """One model and all that a step of it needs."""

    def __init__(self, name, kind, args, device):
        torch.manual_seed(0)
        routed = not name.startswith("DiT")
        sizes = preset(name, input_size=args.grid, **({"packing": "capacity"} if "capacity" in kind else {}))
        self.name, self.kind, self.sizes, self.args = name, kind, sizes, args
        self.process = make_process(kind="gaussian", learn_sigma=True)
        B, H, W = args.batch, *sizes.input_size
        self.x0, self.noise = (torch.randn(B, 4, H, W, device=device) for _ in range(2))
        self.t = self.process.time((torch.arange(B) + 0.5) / B).to(device)
        self.y = torch.randint(0, sizes.num_classes, (B,), device=device)
        with device:  # a large model takes long to fill on a CPU
            model = (DCDiT if routed else DiT)(sizes)
        if routed:
            model.calibrate_router(self._noisy(), self.process.model_time(self.t), self.y)
        self.model, self.device = model, device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, weight_decay=0.0, fused=True)
        if kind.startswith("compiled"):
            compile_blocks(model, True)
        self.milliseconds, self.kept = [], None

    def _noisy(self):
        return self.process.add_noise(self.x0, self.noise, self.t)

    def run(self, watch=None):
        """The step; `watch` is told when its forward begins and its backward ends."""
        if watch:
            watch.add(None)
        x_t = self._noisy()
        with autocast(self.device, self.args.precision):
            out = self.model(x_t, self.process.model_time(self.t), self.y, tail_drop=self.args.tail_drop)
        loss = self.process.losses(out.sample, self.x0, x_t, self.noise, self.t).total.mean()
        if out.routing is not None:
            routing = out.routing
            loss = loss + 0.03 * ratio_loss(routing.boundary_prob, routing.natural, self.sizes.target_ratio)
        loss.backward()
        if watch:
            watch.add("before")
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1e-4)
        return out.routing

    def timed(self):
        wait(self.device)
        start = time.perf_counter()
        routing = self.run()
        wait(self.device)
        self.milliseconds.append(1e3 * (time.perf_counter() - start))
        if routing is not None:
            self.kept = routing.retained.sum(1).tolist()

    def row(self):
        milliseconds = statistics.median(self.milliseconds)
        images = 1e3 * self.args.batch / milliseconds
        gflops = 3 * flops(self.sizes, self.kept)["total"] / 1e9
        peak = peak_tflops(torch.cuda.get_device_name()) if self.device.type == "cuda" else None
        share = None if self.kept is None else sum(self.kept) / len(self.kept) / self._cells()
        return {
            "model": self.name, "kind": self.kind, "retained": share, "ms": milliseconds,
            "images_per_second": images, "gflops_per_image": gflops,
            "mfu": gflops * images / 1e3 / peak if peak else None,
        }  # fmt: skip

    def _cells(self):
        return self.sizes.input_size[0] * self.sizes.input_size[1]

    def components(self):
        """Of each component its share of the time of forward and backward, and of the FLOPs."""
        watch = Stopwatch(self.model, self.device)
        for _ in range(self.args.rounds):
            self.run(watch)
        watch.remove()
        spent, counted = sum(watch.seconds.values()), flops(self.sizes, self.kept)
        return {
            name: (watch.seconds[name] / spent, sum(counted[key] for key in keys) / counted["total"])
            for name, keys in COMPONENTS.items()
        }

    def parts(self):
        """{kind of kernel: share of the time of all kernels}, and the five largest kernels that are in no kind."""
        from torch.profiler import ProfilerActivity, profile

        cuda = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
            self.timed()
        self.milliseconds.pop()
        total, rest = dict.fromkeys(PARTS, 0.0), {}
        for event in seen.key_averages():
            taken = event.self_device_time_total if cuda else event.self_cpu_time_total
            name = event.key.lower()
            part = next((part for part, words in PARTS.items() if any(word in name for word in words)), None)
            if part is None:
                rest[event.key] = rest.get(event.key, 0.0) + taken
            else:
                total[part] += taken
        everything = sum(total.values()) + sum(rest.values())
        largest = sorted(rest, key=rest.get, reverse=True)[:5]
        shares = {part: taken / everything for part, taken in total.items()}
        shares["elementwise and the rest"] = sum(rest.values()) / everything
        return shares, {name: rest[name] / everything for name in largest}


def measure(args, device):
    steps = [
        Step(name, kind, args, device)
        for name in args.models
        for kind in args.kinds
        if not (name.startswith("DiT") and "capacity" in kind)
    ]
    peaks = [0.0] * len(steps)
    for k in range(args.warm + args.rounds):
        for i, step in enumerate(steps):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            step.timed()
            if device.type == "cuda":  # what the step adds, and its own weights, averages and optimizer
                own = 4 * 4 * sum(p.numel() for p in step.parameters)
                peaks[i] = max(peaks[i], torch.cuda.max_memory_allocated() - before + own)
            if k < args.warm:
                step.milliseconds.clear()
    rows = [step.row() for step in steps]
    base = next((row for row in rows if row["model"].startswith("DiT")), None)
    for row, step, peak in zip(rows, steps, peaks, strict=True):
        row["memory_gb"] = peak / 1e9 if peak else None
        for key in ("images_per_second", "gflops_per_image"):
            row[f"{key}_over_dit"] = row[key] / base[key] if base else None
        row["efficiency"] = base and row["images_per_second_over_dit"] * row["gflops_per_image_over_dit"]
        if args.parts:
            row["parts"], row["largest_of_the_rest"] = step.parts()
            row["components"] = step.components()
    return rows


def table(rows):
    cells = [
        [
            "model",
            "kind",
            "kept",
            "ms",
            "images/s",
            "over DiT",
            "GFLOPs",
            "FLOPs over DiT",
            "efficiency",
            "MFU",
            "GB",
        ]
    ]
    for row in rows:
        cells.append([
            row["model"], row["kind"], form(row["retained"], ".1%"), form(row["ms"], ".1f"),
            form(row["images_per_second"], ".2f"), form(row["images_per_second_over_dit"], ".2f"),
            form(row["gflops_per_image"], ".1f"), form(row["gflops_per_image_over_dit"], ".2f"),
            form(row["efficiency"], ".2f"),
            form(row["mfu"], ".1%"), form(row["memory_gb"], ".1f"),
        ])  # fmt: skip
    return cells


def parts_table(rows):
    cells = [["model", "kind", *rows[0]["parts"], "largest of the rest"]]
    for row in rows:
        name, share = next(iter(row["largest_of_the_rest"].items()), ("-", 0.0))
        shares = [f"{share:.1%}" for share in row["parts"].values()]
        cells.append([row["model"], row["kind"], *shares, f"{name[:40]} {share:.1%}"])
    return cells


def components_table(rows):
    cells = [["model", "kind", "share of", *COMPONENTS]]
    for row in rows:
        for k, of in enumerate(("time", "FLOPs")):
            cells.append(
                [
                    row["model"],
                    row["kind"],
                    of,
                    *(f"{shares[k]:.1%}" for shares in row["components"].values()),
                ]
            )
    return cells


def form(value, spec):
    return "-" if value is None else format(value, spec)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", default="DC-DiT-S,DiT-S/2", help="presets, joined by commas (default: %(default)s)")
    add("--kinds", default="eager,capacity", help=f"of {', '.join(KINDS)} (default: %(default)s)")
    add("--batch", type=int, default=8)
    add("--grid", type=int, default=32, help="height and width of the latents (default: 32)")
    add("--precision", choices=("fp32", "bf16"), help="default: fp32 on a CPU, bf16 on a GPU")
    add("--tail-drop", type=float, default=0.0)
    add("--rounds", type=int, default=5)
    add("--warm", type=int, default=2, help="untimed rounds before them (default: 2)")
    add("--threads", type=int)
    add_device(parser)
    add("--parts", action="store_true", help="also where the time goes")
    add_outputs(parser, "--json", "--markdown")
    args = parser.parse_args()
    args.models, args.kinds = args.models.split(","), args.kinds.split(",")
    args.precision = args.precision or ("fp32" if args.device == "cpu" else "bf16")
    if unknown := [kind for kind in args.kinds if kind not in KINDS]:
        parser.error(f"--kinds {unknown[0]}: expected some of {', '.join(KINDS)}")
    try:
        for name in args.models:
            preset(name)
    except UserError as error:
        parser.error(f"--models: {error}")
    return args


def main():
    args = parse()
    keep_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    facts = facts_of_this_run("benchmarks/step.py", device)
    print(headline(facts), flush=True)
    rows = measure(args, device)
    text = markdown(table(rows), facts, left=2)
    print(plain_text(table(rows), left=2))
    if args.parts:
        for cells, left in ((parts_table(rows), 2), (components_table(rows), 3)):
            text += "\n" + "\n".join(markdown(cells, facts, left=left).splitlines()[2:]) + "\n"
            print("\n" + plain_text(cells, left=left))
    write_outputs(args, "step", text, facts | {"rows": rows})


if __name__ == "__main__":
    main()
