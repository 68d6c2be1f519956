"""A run folder as training leaves it, made in a second: for tests of what looks at runs."""

import json
import math
from pathlib import Path

import numpy as np
import torch

from model import DCDiT, DiT, DiTConfig, preset

CLASSES = ["cat", "gravel", "moon", "printed page"]
SIZE = 8


def manifest(channels: int = 3, kind: str = "pixels") -> dict:
    return {
        "kind": kind, "channels": channels, "height": SIZE, "width": SIZE, "class_names": CLASSES,
        "num_classes": len(CLASSES), "splits": {"train": 8, "heldout": 8},
        "scale": 0.18215 if kind == "latents" else 1.0, "source": "made up for a test",
    }  # fmt: skip


def tiny_model(
    channels: int = 3, baseline: bool = False, learn_sigma: bool = True, seed: int = 0, size=(SIZE, SIZE)
):
    """Random weights that do something: the zero start of the last layer would give pictures of nothing."""
    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=64, depth=1, num_heads=2, in_channels=channels, num_classes=len(CLASSES),
        input_size=size, learn_sigma=learn_sigma,
    )  # fmt: skip
    if baseline:
        return _stir(DiT(DiTConfig(patch_size=2, **sizes)))
    model = _stir(DCDiT(preset("DC-DiT-Ti", enc_dec_dim_factor=1, **sizes)))
    x, t, y = torch.randn(4, channels, *size), torch.tensor([50, 300, 600, 900]), torch.arange(4)
    model.calibrate_router(x, t, y)
    return model


def _stir(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def export(folder: Path, model, kind: str = "gaussian", data: dict | None = None) -> Path:
    """model.safetensors, config.json and run.json in `folder`."""
    model.save_pretrained(folder)
    info = {
        "diffusion": {"kind": kind, "learn_sigma": model.config.learn_sigma},
        "data": data or manifest(model.config.in_channels),
        "images": 640, "step": 20, "precision": "fp32", "seed": 3, "global_batch_size": 32,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(info))
    return folder


def metrics(folder: Path, steps: int = 20, evals: bool = True) -> None:
    """A plausible metrics.jsonl; its last line is cut short, as a kill leaves it."""
    noise, lines = np.random.default_rng(0), []
    for step in range(1, steps + 1):
        if evals and step % 5 == 0:
            lines.append({
                "eval": True, "step": step, "images": 32 * step, "heldout_loss": 1.1 / step,
                "heldout_mse": 1 / step, "heldout_mse_raw": 0.9 / step, "retained_share": 0.25,
                "share_by_time": [0.4 - 0.03 * i for i in range(10)], "share_by_class": [0.2, 0.35, 0.1, 0.3],
            })  # fmt: skip
        loss = math.exp(-step / 10) + 0.05 * noise.random()
        lines.append({
            "step": step, "images": 32 * step, "loss": loss, "loss_diffusion": loss, "loss_ratio": 1.0,
            "compression": 4 + noise.standard_normal() / 4, "tokens": 512, "images_per_second": 40.0,
            "grad_norm": "nan" if step == 7 else 1.0 + noise.random(), "lr": 1e-4, "tail_drop": 0.0,
            "imbalance": 1.0, "seconds_data": 0.01,
        })  # fmt: skip
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "metrics.jsonl").write_text(text + ('\n{"step": 21, "ima' if lines else ""))


def mds(folder: Path, count: int = 8, channels: int = 3) -> Path:
    """A prepared data set of smooth random pictures, both splits alike."""
    from trainer.data.mds import import_streaming

    writer = import_streaming().MDSWriter
    noise = np.random.default_rng(1)
    columns = {"image": f"ndarray:uint8:{channels},{SIZE},{SIZE}", "label": "int"}
    for split in ("train", "heldout"):
        with writer(out=str(folder / split), columns=columns, hashes=["xxh64"]) as out:
            for i in range(count):
                image = noise.integers(0, 256, (channels, SIZE, SIZE), dtype=np.uint8)
                out.write({"image": image, "label": i % len(CLASSES)})
    splits = {"train": count, "heldout": count}
    (folder / "manifest.json").write_text(json.dumps(manifest(channels) | {"splits": splits}))
    return folder


def run_folder(root: Path, model=None, data: Path | None = None, steps: int = 20, **kwargs) -> Path:
    """A whole run: config.yaml, metrics.jsonl and one finished checkpoint (its export alone)."""
    run = root / "run"
    checkpoint = run / "checkpoints" / "000000000640"
    export(checkpoint / "ema", model or tiny_model(), **kwargs)
    files = [f for f in checkpoint.rglob("*") if f.is_file()]
    sizes = {str(f.relative_to(checkpoint)): f.stat().st_size for f in files}
    (checkpoint / "COMPLETE").write_text(json.dumps(sizes))
    (run / "checkpoints" / "latest").write_text(checkpoint.name + "\n")
    config = [
        "run:",
        "  name: small & <odd>",
        "model:",
        "  preset: DC-DiT-Ti",
        "train:",
        "  total_images: 1280",
    ]
    if data is not None:
        config += ["data:", f"  path: {data}"]
    (run / "config.yaml").write_text("\n".join(config) + "\n")
    metrics(run, steps)
    return run


def elastic_curve(run: Path, better: float = 0.0) -> None:
    """elastic.json as `dcdit sweep` leaves it; the distances are lower by `better`."""
    rows = [
        {"tail_drop": rho, "retained_share": 0.25 * (1 - rho), "gflops_per_image": 12 - 8 * rho,
         "images_per_s": 2 + rho, "frechet": 20 + 10 * rho**2 - better, "heldout_mse": 0.031 + 0.01 * rho}
        for rho in (0.0, 0.2, 0.4, 0.6)
    ]  # fmt: skip
    about = {"checkpoint": str(run), "steps": 10, "method": "ddpm", "guidance": 1.5, "features": "offline"}
    (run / "elastic.json").write_text(json.dumps(about | {"metric": "frechet", "rows": rows}))
