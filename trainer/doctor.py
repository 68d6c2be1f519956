"""`dcdit doctor`: what is here, what will be used and why, and what to install for the better thing."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # as a script, sys.path[0] is trainer/: put the root there instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import textwrap
from dataclasses import dataclass

OK, MISSING, NOTE = "ok", "--", "!!"


@dataclass(frozen=True)
class Row:
    """One line of the answer: a mark, a name, what was found, and optionally what would mend it."""

    mark: str
    name: str
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Package:
    module: str
    distributions: tuple[str, ...]
    purpose: str
    mend: str
    needs_gpu: bool = False


PACKAGES = (
    Package("streaming", ("mosaicml-streaming",), "MosaicML shards: needed to train",
            'pip install -e ".[streaming]"'),
    Package("webdataset", ("webdataset",), "tar shards as input", 'pip install -e ".[webdataset]"'),
    Package("deepspeed", ("deepspeed",), "ZeRO engines", 'pip install -e ".[deepspeed]"'),
    Package("diffusers", ("diffusers",), "the VAE between images and latents", 'pip install -e ".[vae]"'),
    Package("torch_fidelity", ("torch-fidelity",), "the Inception network of FID",
            "pip install --no-deps torch-fidelity"),
    Package("transformers", ("transformers",), "DINOv2 features from a folder", "pip install transformers"),
    Package("wandb", ("wandb",), "run tracking", 'pip install -e ".[wandb]"'),
    Package("tensorboard", ("tensorboard",), "curves while it runs", "pip install tensorboard"),
    Package("skimage", ("scikit-image",), "photographs of the demo", 'pip install -e ".[demo]"'),
    Package("sklearn", ("scikit-learn",), "photographs of the demo", 'pip install -e ".[demo]"'),
    Package("triton", ("triton", "pytorch-triton", "pytorch-triton-rocm"),
            "GPU kernels in Python; torch.compile on a GPU",
            'pip install -e ".[triton]"', True),
    Package("flash_attn", ("flash-attn", "flash_attn"), "FlashAttention 2 on ragged batches",
            'pip install --no-build-isolation -e ".[flash]"', True),
    Package("flash_attn_interface", ("flash-attn-3", "flash_attn_3", "flash-attn-interface"),
            "FlashAttention 3 (Hopper)", "build hopper/ of github.com/Dao-AILab/flash-attention", True),
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Print everything; exit status 0 whatever is missing, because nothing optional is an error."""
    parser = argparse.ArgumentParser(
        prog="dcdit doctor",
        description="What is installed, which attention backend and ops will be used and why, and what to "
        "install for a better one. Changes nothing.",
    )
    parser.parse_args(argv)
    sections = {
        "machine": machine(),
        "torch": torch_rows(),
        "ops": ops_rows(),
        "attention": attention_rows(),
        "optional packages": package_rows(),
    }
    print(layout(sections, min(shutil.get_terminal_size((110, 24)).columns, 130)))
    return 0


def layout(sections: dict[str, list[Row]], width: int = 110) -> str:
    """Aligned text: marks and names in columns, long findings wrapped under themselves."""
    column = max(len(row.name) for rows in sections.values() for row in rows)
    lead, out, better = 6 + column + 2, [], 0
    for title, rows in sections.items():
        out += ["", title]
        for row in rows:
            text = textwrap.wrap(row.found, max(30, width - lead), break_long_words=False) or [""]
            out.append(f"  {row.mark:<2}  {row.name:<{column}}  {text[0]}")
            out += [" " * lead + line for line in text[1:]]
            if row.mend:
                better += 1
                mend = textwrap.wrap(row.mend, max(30, width - lead - 3), break_long_words=False)
                out.append(" " * lead + "-> " + mend[0])
                out += [" " * (lead + 3) + line for line in mend[1:]]
    if better:
        things = "one thing" if better == 1 else f"{better} things"
        out += ["", f"{things} would make this installation better: the lines that start with ->"]
    else:
        out += ["", "nothing that this machine could use is missing"]
    return "\n".join(out).strip("\n")


def machine() -> list[Row]:
    rows = [
        Row(OK, "python", f"{platform.python_version()} at {sys.executable}"),
        Row(OK, "system", f"{platform.system()} {platform.machine()}, {_cores()} cores, {_memory()} memory"),
    ]
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    mend = "" if found else "install g++ 9 or newer, then pip install --no-build-isolation -e ."
    text = found or "none: the extension cannot be built"
    rows.append(Row(OK if found else MISSING, "C++ compiler", text, mend))
    return rows + [_shared_memory()]


def torch_rows() -> list[Row]:
    """Version, devices and process-group backends. Never missing: the program itself needs torch."""
    import torch
    import torch.distributed as dist

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else None
    built = f"ROCm {torch.version.hip}" if torch.version.hip else built
    rows = [Row(OK, "torch", f"{torch.__version__} ({built or 'CPU'} build)")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            arch = getattr(p, "gcnArchName", "") if torch.version.hip else f"sm_{p.major}{p.minor}"
            rows.append(Row(OK, f"gpu {index}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, {arch}"))
    else:
        vendor = _vendor()
        mend = ""
        if vendor and not built:
            mend = f"a {vendor} driver is here but torch is a CPU build: install its torch from pytorch.org"
        elif vendor:
            mend = f"torch is built for {built} but finds no device: check the driver, *_VISIBLE_DEVICES"
        rows.append(Row(NOTE if mend else OK, "gpu", "none; everything runs on the CPU", mend))
    if not dist.is_available():
        return rows + [Row(NOTE, "distributed", "not in this build of torch", "use an official build")]
    have = [n for n in ("gloo", "nccl", "mpi") if getattr(dist, f"is_{n}_available")()]
    rccl = " (RCCL)" if torch.version.hip and "nccl" in have else ""
    return rows + [Row(OK, "distributed", ", ".join(have) + rccl)]


def ops_rows() -> list[Row]:
    """The extension and, per op and device, the form that `ops.backend=auto` takes."""
    import torch

    from model import ops

    state = ops.available()
    if state["native"]:
        rows = [Row(OK, "extension", str(state["library"]))]
    else:
        reason, _, mend = str(state["reason"] or "not built").partition("; ")
        mend = mend or "run `pip install --no-build-isolation -e .`"
        rows = [Row(MISSING, "extension", f"{reason}; the plain PyTorch ops serve instead, slower", mend)]
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for name in state["serves"]:
        used = [f"{'gpu' if d == 'cuda' else d}: {ops.resolve('auto', d, name)}" for d in devices]
        rows.append(Row(OK, name, ", ".join(used)))
    return rows


def attention_rows() -> list[Row]:
    """What `attention.backend=auto` takes and why; for the ones before it, why they cannot run."""
    import torch

    from model.attention import INSTALL, survey

    gpu = torch.cuda.is_available()
    device, dtype, where = ("cuda", torch.bfloat16, "gpu, bf16") if gpu else ("cpu", torch.float32, "cpu")
    rows, used = [], None
    for choice in survey(device, dtype, head_dim=64):
        if choice.usable and used is None:
            used = choice
            rows.append(Row(OK, choice.name, f"used ({where}): {choice.why}"))
            continue
        note = f"could be used: {choice.why}" if choice.usable else choice.why
        better = gpu and used is None and "import" in choice.why and choice.name in INSTALL
        rows.append(Row(MISSING, choice.name, note, INSTALL[choice.name] if better else ""))
    return rows


def package_rows() -> list[Row]:
    """Optional packages with versions; those for GPUs are only recommended where there is one."""
    import torch

    gpu, rows = torch.cuda.is_available(), []
    for package in PACKAGES:
        version = _version(package)
        name = package.distributions[0]
        if version:
            rows.append(Row(OK, name, f"{version}: {package.purpose}"))
        elif package.needs_gpu and not gpu:
            rows.append(Row(MISSING, name, f"not here; only for GPUs: {package.purpose}"))
        else:
            rows.append(Row(MISSING, name, f"not here: {package.purpose}", package.mend))
    return rows + [apex_row(gpu)]


def apex_row(gpu: bool) -> Row:
    """NVIDIA's (or AMD's) apex is known by its fused optimizers; the index has a namesake without."""
    spec = importlib.util.find_spec("apex")
    where = "https://github.com/NVIDIA/apex, or https://github.com/ROCm/apex for AMD: build it from there"
    purpose = "fused optimizers"
    if spec is None:
        note = "" if gpu else "only for GPUs: "
        return Row(MISSING, "apex", f"not here; {note}{purpose}", where if gpu else "")
    roots = [Path(p) for p in spec.submodule_search_locations or ()]
    if any((root / "optimizers" / "fused_adam.py").is_file() for root in roots):
        return Row(OK, "apex", f"{_distribution('apex') or 'unknown version'}: {purpose}")
    return Row(
        NOTE, "apex", "a package of that name is here, but it is not NVIDIA's or AMD's; it is left alone",
        f"pip uninstall apex{'; ' + where if gpu else ''}",
    )  # fmt: skip


def _version(package: Package) -> str | None:
    """The version, without importing: some of these take seconds or touch the GPU."""
    try:
        if importlib.util.find_spec(package.module) is None:
            return None
    except (ImportError, ValueError):  # a half-removed package has no spec
        return None
    for name in package.distributions:
        if found := _distribution(name):
            return found
    return "version unknown"


def _distribution(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _vendor() -> str | None:
    if Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia").exists():
        return "NVIDIA"
    return "AMD" if Path("/dev/kfd").exists() else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown"


def _shared_memory() -> Row:
    """Loader workers and streaming pass batches through it; containers often give 64 MiB."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Row(NOTE, "/dev/shm", "not there; set data.num_workers=0 if loader workers fail")
    usage = shutil.disk_usage(path)
    text = f"{usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.1f} GiB"
    if usage.free < 2**28:
        mend = "start the container with --shm-size=8g or --ipc=host, or set data.num_workers=0"
        return Row(NOTE, "/dev/shm", text, mend)
    return Row(OK, "/dev/shm", text)


if __name__ == "__main__":
    from trainer.cli import main as dispatch

    raise SystemExit(dispatch(["doctor", *sys.argv[1:]]))
