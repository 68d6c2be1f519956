"""The run's configuration: schema (these dataclasses) -> YAML -> command line, strict at every step.

The dataclasses below are the only place where a key exists; ``configs/base.yaml`` lists them all with their
defaults and comments (a test keeps the two equal). A YAML file may name others under ``include:`` (read first,
in order, relative to the file). ``key=value`` arguments come last and win.
"""

from __future__ import annotations

import difflib
import io
import math
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from model.errors import UserError


@dataclass
class RunConfig:
    name: str = "run"
    dir: str = "runs/${run.name}"
    seed: int = 0


@dataclass
class ModelConfig:
    preset: str = "DC-DiT-S"
    router: str = "spatial"
    target_ratio: float = 4.0
    dechunk_sigma: float = 1.0
    packing: str = "exact"
    capacity_factor: float = 1.25
    router_start: str = "calibrated"
    backbone_start: str = "quiet"
    dydit: float | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass
class DiffusionConfig:
    kind: str = "gaussian"
    num_timesteps: int = 1000
    learn_sigma: bool = True
    t0_likelihood: str = "image_bins"
    time_sampling: str = "uniform"
    stratify: bool = True


@dataclass
class StreamConfig:
    path: str = "???"
    weight: float = 1.0


@dataclass
class DataConfig:
    format: str = "mds"
    path: str = "???"
    streams: list[StreamConfig] = field(default_factory=list)
    cache: str | None = None
    cache_limit: str | None = None
    max_errors: int = 100
    num_workers: int = 2
    label_drop: float = 0.1


@dataclass
class TrainConfig:
    total_images: int = 102_400_000
    global_batch_size: int = 256
    micro_batch_size: int | None = None
    precision: str = "bf16"
    ratio_weight: float = 0.03
    ratio_group: int = 16
    tail_drop: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    tail_drop_after: int = 1_280_000


@dataclass
class UpcycleConfig:
    teacher: str | None = None
    freeze_embedders: bool = True
    distill: str = "blocks"
    distill_images: int = 1_280_000
    block_weight: float = 1.0
    noise_weight: float = 0.5
    variance_weight: float = 0.05
    diffusion_weight: float = 1.0
    ratio_weight: float = 0.3


@dataclass
class OptimizerConfig:
    name: str = "adamw"
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_images: int = 0
    backbone_warmup_images: int = 0
    clip: float = 1.0


@dataclass
class EmaConfig:
    decay: Any = 0.9999
    device: str = "auto"


@dataclass
class ParallelConfig:
    engine: str = "fsdp"
    replicate: int = 1
    zero_stage: int = 2
    offload: bool = False
    activation_checkpointing: str = "none"
    compile: bool = False
    start_timeout_minutes: float = 60.0
    timeout_minutes: float = 15.0


@dataclass
class BackendConfig:
    backend: str = "auto"


@dataclass
class CheckpointConfig:
    every: int = 1_280_000
    keep_last: int = 3
    keep_every: int | None = None
    asynchronous: bool = True
    resume_from: str | None = None


@dataclass
class EvalConfig:
    every: int = 1_280_000
    count: int = 1024
    batch_size: int = 32
    samples: int = 0
    samples_every: int | None = None
    steps: int = 50
    method: str | None = None
    guidance: float = 1.0
    tail_drop: float = 0.0
    features: str = "offline"
    weights: str | None = None
    reference: str = "train"
    reference_count: int = 10_000
    vae: str | None = None


@dataclass
class HealthConfig:
    max_bad_steps: int = 10
    spike_sigma: float = 8.0
    spike_stop: bool = False
    gc_every: int = 200
    memory_history: bool = False


@dataclass
class LogConfig:
    every: int = 20
    profile_from: int | None = None
    profile_steps: int = 3
    tensorboard: bool = True
    wandb: str = "disabled"
    wandb_project: str = "dcdit"
    wandb_entity: str | None = None


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    ops: BackendConfig = field(default_factory=BackendConfig)
    attention: BackendConfig = field(default_factory=BackendConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    log: LogConfig = field(default_factory=LogConfig)


CHOICES = {
    "model.router": ("spatial", "cosine", "random"),
    "model.packing": ("exact", "capacity"),
    "model.router_start": ("calibrated", "released"),
    "model.backbone_start": ("quiet", "published"),
    "diffusion.kind": ("gaussian", "flow"),
    "diffusion.t0_likelihood": ("image_bins", "gaussian"),
    "diffusion.time_sampling": ("uniform", "logit_normal"),
    "data.format": ("mds", "webdataset"),
    "train.precision": ("bf16", "fp32"),
    "upcycle.distill": ("blocks", "hybrid", "both", "none"),
    "optimizer.name": ("adamw", "apex_fused_adam", "deepspeed_cpu_adam"),
    "ema.device": ("auto", "cpu"),
    "parallel.engine": ("fsdp", "ddp", "deepspeed"),
    "parallel.zero_stage": (1, 2, 3),
    "parallel.activation_checkpointing": ("none", "block", "selective"),
    "ops.backend": ("auto", "native", "triton", "torch"),
    "attention.backend": ("auto", "flash3", "flash2", "torch_varlen", "sdpa"),
    "eval.features": ("offline", "inception", "dinov2"),
    "log.wandb": ("online", "offline", "disabled"),
}
POSITIVE = (
    "diffusion.num_timesteps", "train.total_images", "train.global_batch_size", "train.micro_batch_size",
    "train.ratio_group", "optimizer.lr", "optimizer.eps", "optimizer.clip", "parallel.replicate",
    "parallel.timeout_minutes", "parallel.start_timeout_minutes", "checkpoint.every", "checkpoint.keep_last",
    "checkpoint.keep_every", "eval.every", "eval.count", "eval.batch_size",
    "eval.samples_every", "eval.steps", "eval.reference_count", "health.max_bad_steps",
    "health.spike_sigma", "health.gc_every", "log.every", "log.profile_steps", "model.dechunk_sigma",
    "model.capacity_factor",
)  # fmt: skip
NOT_NEGATIVE = (
    "data.num_workers", "data.max_errors", "train.ratio_weight", "train.tail_drop_after", "optimizer.weight_decay",
    "optimizer.warmup_images", "optimizer.backbone_warmup_images", "run.seed", "eval.samples",
    "upcycle.distill_images", "upcycle.block_weight", "upcycle.noise_weight", "upcycle.variance_weight",
    "upcycle.diffusion_weight", "upcycle.ratio_weight",
)  # fmt: skip


def known_keys(schema: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, sections left out; ``model.overrides`` stands for what is below it."""
    instance = schema() if isinstance(schema, type) else schema
    keys = []
    for name, value in vars(instance).items():
        keys += known_keys(value, f"{prefix}{name}.") if is_dataclass(value) else [prefix + name]
    return keys


def load_config(file: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Schema, then ``file`` (with what it includes), then ``key=value`` strings; checked as a whole.

    Raises:
        UserError: missing or unreadable file, unknown key (with the nearest real one), wrong type, a value
            out of range or not among the choices. The message names the key and where it was set.
    """
    merged = OmegaConf.structured(Config)
    if file is not None:
        merged = _merge(merged, _read_yaml(Path(file), ()), str(file))
    for text in overrides:
        merged = _merge(merged, _parse_override(text), f"argument {text!r}")
    try:
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise UserError(f"{key}: not set; give it in the YAML file or as {key}=VALUE")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"{getattr(error, 'full_key', None) or '?'}: {_first_line(error)}") from None
    check_config(config)
    return config


def save_config(config: Config, file: Path) -> None:
    """Write the resolved config as YAML; ``load_config`` reads it back to an equal config."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(to_yaml(config))
    temporary.replace(file)


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> value, for comparing two configs and for loggers."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    flat: dict[str, Any] = {}
    for section, values in plain.items():
        flat.update({f"{section}.{name}": value for name, value in values.items()})
    return flat


def check_config(config: Config) -> None:
    """Ranges and choices that the types cannot say.

    Raises:
        UserError: the message names the key.
    """
    flat = flatten(config)
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            words = [str(choice) for choice in choices]
            near = difflib.get_close_matches(str(flat[key]), words, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{key}: {flat[key]!r} is not one of {', '.join(words)}{hint}")
    for key, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}: {value} is not a number to train with")
    for key in POSITIVE:
        if flat[key] is not None and flat[key] <= 0:
            raise UserError(f"{key}: must be above 0, got {flat[key]}")
    for key in NOT_NEGATIVE:
        if flat[key] < 0:
            raise UserError(f"{key}: must not be negative, got {flat[key]}")
    if config.run.seed >= 2**63:
        raise UserError(f"run.seed: must be below 2**63, got {config.run.seed}")
    if config.model.target_ratio <= 1:
        raise UserError(f"model.target_ratio: must be above 1, got {config.model.target_ratio}")
    if not config.train.tail_drop or any(not 0 <= rho < 1 for rho in config.train.tail_drop):
        raise UserError(f"train.tail_drop: a list of fractions in [0, 1), got {config.train.tail_drop}")
    if not 0 <= config.data.label_drop <= 1:
        raise UserError(f"data.label_drop: a fraction in [0, 1], got {config.data.label_drop}")
    _check_decay(config.ema.decay)
    _check_parallel(config)
    _check_drawing(config.eval)
    if len(config.optimizer.betas) != 2 or any(not 0 <= b < 1 for b in config.optimizer.betas):
        raise UserError(f"optimizer.betas: two numbers in [0, 1), got {config.optimizer.betas}")
    if config.train.total_images % config.train.global_batch_size:
        steps = max(1, round(config.train.total_images / config.train.global_batch_size))
        raise UserError(
            f"train.total_images: {config.train.total_images} is not a whole number of steps of "
            f"train.global_batch_size {config.train.global_batch_size}; "
            f"use {steps * config.train.global_batch_size}"
        )


def _check_decay(decay: Any) -> None:
    decays = decay if isinstance(decay, list) else [decay]
    numbers = all(isinstance(d, int | float) and not isinstance(d, bool) for d in decays)
    if not decays or not numbers or any(not 0 <= d < 1 for d in decays):
        raise UserError(f"ema.decay: must be in [0, 1), one number or a list of them, got {decay}")
    if len({f"{d:g}" for d in decays}) < len(decays):
        raise UserError(f"ema.decay: names the same decay twice: {decay}")


def _check_drawing(options: EvalConfig) -> None:
    if options.samples == 1 or (options.samples and options.reference_count < 2):
        key = "eval.samples" if options.samples == 1 else "eval.reference_count"
        raise UserError(f"{key}: a distance needs at least 2 pictures, got 1")
    if not 0 <= options.tail_drop <= 1:
        raise UserError(f"eval.tail_drop: a fraction in [0, 1], got {options.tail_drop}")
    every, drawn = options.every, options.samples_every
    if drawn is not None and drawn % every:
        raise UserError(
            f"eval.samples_every: {drawn} is not a multiple of eval.every {every}; "
            f"use {max(1, round(drawn / every)) * every}"
        )


def _check_parallel(config: Config) -> None:
    parallel, every, keep = config.parallel, config.checkpoint.every, config.checkpoint.keep_every
    if parallel.offload and parallel.engine != "deepspeed":
        raise UserError(f"parallel.offload: only parallel.engine=deepspeed offloads, not {parallel.engine}")
    if (parallel.engine, parallel.zero_stage, parallel.activation_checkpointing) == (
        "deepspeed",
        3,
        "selective",
    ):
        # ZeRO 3 gathers weights in hooks that the recomputation of single operations does not call.
        raise UserError(
            "parallel.activation_checkpointing: selective does not go with zero_stage 3; use block, or zero_stage 2"
        )
    if parallel.replicate > 1 and parallel.engine != "fsdp":
        raise UserError(f"parallel.replicate: only parallel.engine=fsdp has replicas, not {parallel.engine}")
    if keep is not None and keep % every:
        raise UserError(
            f"checkpoint.keep_every: {keep} is not a multiple of checkpoint.every {every}; "
            f"use {max(1, round(keep / every)) * every}"
        )


def _read_yaml(file: Path, chain: tuple[Path, ...]) -> DictConfig:
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [f.name for f in file.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {file.parent / near[0]}?" if near else ""
        raise UserError(f"--config: no such file {file}{hint}")
    if file.resolve() in chain:
        raise UserError(f"{file}: includes itself")
    try:
        loaded = OmegaConf.load(io.StringIO(file.read_text()))
    except Exception as error:  # the YAML reader raises many kinds, all meaning "not YAML"
        raise UserError(f"{file}: not readable as YAML: {_first_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{file}: expected `section:` entries at the top level")
    includes = loaded.pop("include", None) or []
    includes = [includes] if isinstance(includes, str) else list(includes)
    merged = OmegaConf.create({})
    for name in includes:
        part = _read_yaml(file.parent / name, (*chain, file.resolve()))
        merged = OmegaConf.merge(merged, part)
    _reject_unknown(loaded, str(file))
    return OmegaConf.merge(merged, loaded)


def _parse_override(text: str) -> DictConfig:
    if "=" not in text or text.startswith("-"):
        raise UserError(f"argument {text!r}: expected key=value, for example train.global_batch_size=256")
    try:
        return OmegaConf.from_dotlist([text])
    except Exception as error:
        raise UserError(f"argument {text!r}: {_first_line(error)}") from None


def _merge(base: DictConfig, extra: DictConfig, where: str) -> DictConfig:
    _reject_unknown(extra, where)
    try:
        return OmegaConf.merge(base, extra)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise UserError(f"{where}: {key}: {_first_line(error)}") from None


def _reject_unknown(extra: DictConfig, where: str) -> None:
    keys = known_keys()
    sections = sorted({key.split(".")[0] for key in keys})
    for section, values in extra.items():
        if section not in sections:
            raise UserError(f"{where}: unknown key {section!r}{_nearest(str(section), sections + keys)}")
        if not isinstance(values, DictConfig):
            raise UserError(
                f"{where}: {section}: is a section; set one of its keys, as in {section}.KEY=VALUE"
            )
        for name in values:
            if f"{section}.{name}" not in keys:
                raise UserError(
                    f"{where}: unknown key '{section}.{name}'{_nearest(f'{section}.{name}', keys)}"
                )


def _nearest(key: str, keys: list[str]) -> str:
    near = difflib.get_close_matches(key, keys, 1, 0.5)
    if not near:  # the right name in another section, as in `lr=1e-4`
        last = key.rsplit(".", 1)[-1]
        near = [k for k in keys if k.rsplit(".", 1)[-1] == last] or difflib.get_close_matches(
            last, [k.rsplit(".", 1)[-1] for k in keys], 1, 0.6
        )
    return f"; did you mean {near[0]!r}?" if near else "; configs/base.yaml lists every key"


def _first_line(error: Exception) -> str:
    return " ".join(str(error).strip().split("\n")[:1]) or type(error).__name__
