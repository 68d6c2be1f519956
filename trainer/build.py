"""From config and data to the parts of a run: model, process, optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from model import DCDiT, DCDiTConfig, DiT, DiTConfig, preset
from model.diffusion import make_process
from model.errors import UserError
from trainer.config import Config, flatten
from trainer.data import Manifest, check_batch
from trainer.ema import ema_names

# Fields of the model's config that the trainer's config names elsewhere, and reads there too.
OWN_KEYS = {
    "router": "model.router", "target_ratio": "model.target_ratio", "dechunk_sigma": "model.dechunk_sigma",
    "packing": "model.packing", "capacity_factor": "model.capacity_factor", "ops_backend": "ops.backend",
    "attention_backend": "attention.backend", "learn_sigma": "diffusion.learn_sigma", "dydit": "model.dydit",
}  # fmt: skip


def model_config(config: Config, manifest: Manifest) -> DCDiTConfig | DiTConfig:
    """The model's own config: the preset, sized for the data, with ``model.overrides`` on top.

    Raises:
        UserError: unknown preset or override, sizes that do not go together, or that are not the data's.
    """
    from_data: dict[str, Any] = {
        "in_channels": manifest.channels,
        "input_size": (manifest.height, manifest.width),
        "num_classes": manifest.num_classes,
    }
    for key, value in config.model.overrides.items():
        if key in OWN_KEYS:
            raise UserError(f"model.overrides.{key}: has a key of its own; set {OWN_KEYS[key]} instead")
        if key in from_data and value not in (from_data[key], list(np.atleast_1d(from_data[key]))):
            raise UserError(
                f"model.overrides.{key}: {value}, but the shards in data.path have {from_data[key]}; leave it out"
            )
    sizes = from_data | {
        "learn_sigma": config.diffusion.kind == "gaussian" and config.diffusion.learn_sigma,
        "attention_backend": config.attention.backend,
        "dydit": config.model.dydit,
    }
    if not _is_baseline(config):
        sizes |= {
            "router": config.model.router,
            "target_ratio": config.model.target_ratio,
            "dechunk_sigma": config.model.dechunk_sigma,
            "packing": config.model.packing,
            "capacity_factor": config.model.capacity_factor,
            "ops_backend": config.ops.backend,
        }
    return preset(config.model.preset, **(sizes | config.model.overrides))


def build_model(config: Config, manifest: Manifest) -> DCDiT | DiT:
    """The model of ``config``, initialised from ``run.seed`` alone: on the CPU, whole, so the same seed gives the
    same weights under every engine and on every number of processes. Raises as ``model_config``."""
    sizes = model_config(config, manifest)
    torch.manual_seed(config.run.seed)
    if _is_baseline(config):
        return DiT(sizes)
    model = DCDiT(sizes)
    # A pretrained backbone has something to say from the start, and is distilled at full volume.
    if config.model.backbone_start == "quiet" and config.upcycle.teacher is None:
        model.quiet_backbone()
    return model


def _is_baseline(config: Config) -> bool:
    return config.model.preset.lower().startswith("dit-")


def micro_batch(config: Config, world_size: int) -> int:
    """Images per process per forward pass; checks that everything divides over ``world_size`` processes.

    Raises:
        UserError: lists the valid choices.
    """
    micro = check_batch(config.train.global_batch_size, config.train.micro_batch_size, world_size)
    if world_size % config.parallel.replicate:
        raise UserError(
            f"parallel.replicate={config.parallel.replicate} does not divide the {world_size} processes"
        )
    return micro


def build_process(config: Config) -> Any:
    return make_process(**process_kwargs(config))


def process_kwargs(config: Config) -> dict[str, Any]:
    """What ``make_process`` takes; stored beside exported weights so that sampling needs no config."""
    kind = config.diffusion.kind
    return {
        "kind": kind,
        "num_timesteps": config.diffusion.num_timesteps,
        "learn_sigma": kind == "gaussian" and config.diffusion.learn_sigma,
        "t0_likelihood": config.diffusion.t0_likelihood,
        "time_sampling": config.diffusion.time_sampling,
    }


def learning_rate(config: Config, images: int) -> float:
    """Linear warm-up, then constant (DC-DiT v2 §4.1); a function of the position alone.

    Args:
        images: images seen after the step that uses this rate.
    """
    warmup = config.optimizer.warmup_images
    return config.optimizer.lr * (min(1.0, images / warmup) if warmup else 1.0)


def backbone_share(config: Config, images: int) -> float:
    """The backbone's learning rate over that of the rest: its own linear warm-up, a function of the position alone."""
    warmup = config.optimizer.backbone_warmup_images
    return min(1.0, images / warmup) if warmup else 1.0


def check_resumable(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Compare the flat config of a checkpoint with the present one.

    Returns:
        ``key: old -> new`` of every change that may be made on the way.

    Raises:
        UserError: a change that the saved state cannot go on with.
    """
    before = flatten(Config()) | before  # keys that came after the checkpoint have their defaults
    teachers = [flat.get("upcycle.teacher") for flat in (before, now)]
    if (teachers[0] is None) != (teachers[1] is None):
        raise UserError(
            f"upcycle.teacher: {teachers[1]}, but the checkpoint was made with {teachers[0]}; "
            "set it back, or start another run with another run.dir"
        )
    fixed = ("model.", "diffusion.", "train.global_batch_size", "run.seed", "upcycle.freeze_embedders")
    free = (
        "model.router_start",
        "model.backbone_start",
        "model.packing",
        "model.capacity_factor",
        "diffusion.time_sampling",
        "diffusion.stratify",
    )
    changed = [k for k in now if k in before and before[k] != now[k]]
    if now["model.dydit"] is not None and "deepspeed" not in (
        before["parallel.engine"],
        now["parallel.engine"],
    ):
        free += ("model.dydit",)  # gates may begin on the way (all open), or get another target
    for key in changed:
        if key.startswith(fixed) and key not in free:
            raise UserError(
                f"{key}: {now[key]!r}, but the checkpoint was made with {before[key]!r}; "
                "set it back, or start another run with another run.dir"
            )
    key = "optimizer.backbone_warmup_images"
    if bool(before[key]) != bool(now[key]):  # the optimizer's state is in other groups
        raise UserError(
            f"{key}: {now[key]}, but the checkpoint was made with {before[key]}; set it back, or start another run "
            "with another run.dir"
        )
    had, wanted = ema_names(before.get("ema.decay")), ema_names(now["ema.decay"])
    if not set(wanted) <= set(had):
        raise UserError(
            f"ema.decay: {now['ema.decay']}, but the checkpoint was made with {before['ema.decay']}; an average "
            "cannot begin on the way: set it back, or leave out what is new"
        )
    _check_engine(before, now)
    return [f"{k}: {before[k]} -> {now[k]}" for k in changed if not k.startswith("run.")]


def _check_engine(before: dict[str, Any], now: dict[str, Any]) -> None:
    """FSDP and DDP read each other's checkpoints, DeepSpeed its own of the same ZeRO stage."""
    had, wanted = before.get("parallel.engine"), now["parallel.engine"]
    if had != wanted and "deepspeed" in (had, wanted):
        raise UserError(
            f"parallel.engine: {wanted}, but the checkpoint is {had}'s, in another format; set parallel.engine={had}"
        )
    key = "parallel.zero_stage"
    if wanted == "deepspeed" and before[key] != now[key]:
        raise UserError(
            f"{key}: {now[key]}, but the checkpoint was made with {before[key]}; set {key}={before[key]}"
        )
