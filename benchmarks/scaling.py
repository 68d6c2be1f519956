"""The trainer on several processes of one machine: weak scaling, memory by engine, and how long a checkpoint stalls.

    python benchmarks/scaling.py [--parts scaling,memory,stall] [--processes 1,2,4] [--images 8] [--steps 12]
                                 [--preset DC-DiT-S] [--depth N] [--json FILE] [--markdown FILE]

Runs of trainer/train.py under torchrun on 8x8 crops of the embedded photographs, so that what an engine keeps, and not
activations, is what is measured. Scaling: ``--images`` per process and step, float32, one thread each; the median
step after the first three. Memory: resident memory of a process after the last step, over that before the model was
built (torch and its libraries), mean of the processes; beside it the bytes of weights, gradients, moments and average.
Stall: what one save adds to the loop, which is the time inside ``Trainer.save`` and the wait for the copy before the
next update.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ENGINES = {
    "ddp": ["parallel.engine=ddp"],
    "fsdp": ["parallel.engine=fsdp"],
    "ZeRO 1": ["parallel.engine=deepspeed", "parallel.zero_stage=1"],
    "ZeRO 2": ["parallel.engine=deepspeed", "parallel.zero_stage=2"],
    "ZeRO 3": ["parallel.engine=deepspeed", "parallel.zero_stage=3"],
}


def resident() -> float:
    """MB of this process in memory now, without what it has freed and the C library keeps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def worker(out: str, arguments: list[str]) -> int:
    """One process of a run: trainer/train.py, with clocks around the save and the wait for its copy."""
    import trainer.loop
    from trainer import train

    class Timed(trainer.loop.Trainer):
        def __init__(self, *given: Any) -> None:
            before = resident()
            super().__init__(*given)
            self.measured: dict[str, Any] = {
                "before": before,
                "parameters": self.parameters,
                "steps": [],
                "stalls": [],
            }

        def train_step(self, batches: Any) -> None:
            begin = time.perf_counter()
            super().train_step(batches)
            self.measured["steps"].append(time.perf_counter() - begin)
            if self.position == self.config.train.total_images:
                self.measured["after"] = resident()

        def save(self, anyway: bool = True) -> None:
            begin, staged = time.perf_counter(), self.saver.staged
            super().save(anyway)
            stall = time.perf_counter() - begin

            def timed_staged() -> None:
                begin = time.perf_counter()
                staged()
                self.saver.staged = staged
                self.measured["stalls"].append(stall + time.perf_counter() - begin)

            self.saver.staged = timed_staged

        def run(self) -> bool:
            done = super().run()
            Path(f"{out}.{self.world.rank}").write_text(json.dumps(self.measured))
            return done

    trainer.loop.Trainer = Timed
    return train.main(arguments)


def measure(
    folder: Path, processes: int, name: str, options: argparse.Namespace, *overrides: str
) -> list[dict]:
    """What every process of one run measured."""
    out, batch = folder / f"{name}.json", options.images * processes
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", __file__,
        "--worker", str(out), "--device", "cpu", "--config", "configs/recipe/demo.yaml",
        f"model.preset={options.preset}", f"data.path={folder / 'photos'}", f"run.dir={folder / name}",
        f"train.global_batch_size={batch}", f"train.total_images={batch * options.steps}", "data.num_workers=0",
        f"eval.every={batch * options.steps}", "eval.count=8", "log.tensorboard=false",
        f"checkpoint.every={batch * options.steps}", "optimizer.warmup_images=0", *overrides,
    ]  # fmt: skip
    if options.depth:
        command.append(f"model.overrides={{depth: {options.depth}}}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(processes)]


def step_seconds(results: list[dict]) -> float:
    return statistics.median(
        max(times) for times in list(zip(*(r["steps"] for r in results), strict=True))[3:]
    )


def scaling(folder: Path, options: argparse.Namespace) -> list[list[str]]:
    rows, first = [["engine", "processes", "ms per step", "images/s", "efficiency"]], {}
    for processes in options.processes:
        for engine in ("ddp", "fsdp", "ZeRO 2"):
            name = f"scaling-{processes}-{engine.replace(' ', '')}"
            seconds = step_seconds(measure(folder, processes, name, options, *ENGINES[engine]))
            first.setdefault(engine, seconds)
            rate, efficiency = options.images * processes / seconds, first[engine] / seconds
            rows.append([engine, str(processes), f"{1000 * seconds:.0f}", f"{rate:.1f}", f"{efficiency:.2f}"])
    return rows


def predicted(engine: str, parameters: int, processes: int) -> float:
    """MB per process of float32 weights, gradients, two moments and one average, by who shares what."""
    from trainer.planning import state_bytes

    return 1e-6 * sum(state_bytes(engine.lower().replace(" ", ""), parameters, processes).values())


def memory(folder: Path, options: argparse.Namespace) -> list[list[str]]:
    rows = [["engine", "processes", "parameters", "MB measured", "MB of state"]]
    processes = max(n for n in options.processes if n <= 2)
    for number, (engine, overrides) in enumerate(ENGINES.items()):
        results = measure(folder, processes, f"memory-{number}", options, *overrides)
        held = statistics.mean(r["after"] - r["before"] for r in results)
        parameters = results[0]["parameters"]
        state = predicted(engine, parameters, processes)
        rows.append([engine, str(processes), f"{parameters / 1e6:.1f} M", f"{held:.0f}", f"{state:.0f}"])
    return rows


def stall(folder: Path, options: argparse.Namespace) -> list[list[str]]:
    rows = [["engine", "processes", "ms asynchronous", "of a step", "ms otherwise", "of a step"]]
    processes = max(n for n in options.processes if n <= 2)
    every = options.images * processes * 4
    for engine in ("fsdp", "ddp", "ZeRO 2", "ZeRO 3"):
        row = [engine, str(processes)]
        for asynchronous in ("true", "false"):
            name = f"stall-{engine.replace(' ', '')}-{asynchronous}"
            settings = [f"checkpoint.every={every}", f"checkpoint.asynchronous={asynchronous}"]
            results = measure(folder, processes, name, options, *ENGINES[engine], *settings)
            seconds = statistics.median(
                max(times) for times in zip(*(r["stalls"] for r in results), strict=True)
            )
            row += [f"{1000 * seconds:.0f}", f"{seconds / step_seconds(results):.2f}"]
        rows.append(row)
    return rows


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2], sys.argv[3:])
    text = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text.add_argument("--parts", type=lambda s: s.split(","), default=["scaling", "memory", "stall"])
    text.add_argument("--processes", type=lambda s: [int(n) for n in s.split(",")], default=[1, 2, 4])
    text.add_argument("--images", type=int, default=8, help="per process and step")
    text.add_argument("--steps", type=int, default=12)
    text.add_argument("--preset", default="DC-DiT-S")
    text.add_argument("--depth", type=int, help="backbone blocks (default: the preset's)")
    text.add_argument("--json", type=Path)
    text.add_argument("--markdown", type=Path)
    options = text.parse_args()
    from benchmarks.tables import facts_of_this_run, headline, markdown, place, plain_text
    from trainer.prepare import main as prepare

    facts = facts_of_this_run("benchmarks/scaling.py") | {"threads": 1}
    print(headline(facts))
    known, found = {"scaling": scaling, "memory": memory, "stall": stall}, {}
    with tempfile.TemporaryDirectory() as folder:
        to = str(Path(folder) / "photos")
        if prepare(["photos", "--to", to, "--samples-per-class", "6", "--size", "8"]):
            return 2
        for part in options.parts:
            found[part] = known[part](Path(folder), options)
            print("\n" + plain_text(found[part], left=1), flush=True)
            if options.markdown:
                place(options.markdown, part, markdown(found[part], facts, left=1))
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, **found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
