"""The optimizers of ``optimizer.name``; an optional one that is not really there is an error before the run starts."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import nn

from model.errors import UserError

if TYPE_CHECKING:
    from trainer.config import Config

APEX_SOURCE = "https://github.com/NVIDIA/apex (AMD: https://github.com/ROCm/apex)"


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer ``optimizer.name`` over those parameters of ``model``, wrapped or not, that are trained: one group
    of all, or with ``optimizer.backbone_warmup_images`` the backbone's as a second one (``set_rates``).
    Raises as ``check_optimizer``."""
    check_optimizer(config)
    o, parameters = config.optimizer, parameter_groups(config, model)
    if o.name == "apex_fused_adam":
        from apex.optimizers import FusedAdam

        return FusedAdam(
            parameters,
            lr=o.lr,
            betas=tuple(o.betas),
            eps=o.eps,
            weight_decay=o.weight_decay,
            adam_w_mode=True,
        )
    if o.name == "deepspeed_cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(
            parameters, lr=o.lr, betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay, adamw_mode=True
        )
    return torch.optim.AdamW(
        parameters, lr=o.lr, betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay, fused=True
    )


def parameter_groups(config: Config, model: nn.Module) -> list[dict[str, list[nn.Parameter]]]:
    """What is trained, as an optimizer takes it. A DiT, which has nothing beside its backbone, is one group."""
    named = [(name.split("."), p) for name, p in model.named_parameters() if p.requires_grad]
    beside = any("residual_proj" in path for path, _ in named)
    if not config.optimizer.backbone_warmup_images or not beside:
        return [{"params": [p for _, p in named]}]
    return [
        {"params": [p for path, p in named if ("backbone" in path) == inside]} for inside in (False, True)
    ]


def set_rates(optimizer: torch.optim.Optimizer, lr: float, backbone_lr: float | None = None) -> None:
    """The learning rates of the next update, in the groups of ``parameter_groups``; None: the same for all."""
    rates = (lr, lr if backbone_lr is None else backbone_lr)
    for group, rate in zip(optimizer.param_groups, rates, strict=False):
        group["lr"] = rate


def check_optimizer(config: Config) -> None:
    """Find out, without building anything, whether ``optimizer.name`` can be had.

    Raises:
        UserError: the library is not installed, is another of the same name, or does not fit the engine.
    """
    name = config.optimizer.name
    if name == "apex_fused_adam":
        _check_apex()
        if config.parallel.engine == "fsdp":  # its kernels take addresses, which sharded tensors do not have
            raise UserError(
                "optimizer.name: apex_fused_adam does not know FSDP's sharded tensors; set parallel.engine=ddp or "
                "deepspeed, or use adamw, which is fused too"
            )
    elif name == "deepspeed_cpu_adam":
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError(
                "optimizer.name: deepspeed_cpu_adam needs deepspeed; pip install deepspeed, or use adamw"
            )
        if config.parallel.engine != "deepspeed" or not config.parallel.offload:
            raise UserError(
                "optimizer.name: deepspeed_cpu_adam steps weights that live on the CPU; "
                "set parallel.engine=deepspeed and parallel.offload=true, or use adamw"
            )


def _check_apex() -> None:
    """NVIDIA's and AMD's apex have ``apex.optimizers`` and the compiled ``amp_C``; the package called apex on the
    index is another project."""
    if importlib.util.find_spec("apex") is None:
        raise UserError(
            f"optimizer.name: apex_fused_adam needs apex, which is built from source: {APEX_SOURCE}; or use adamw"
        )
    try:
        genuine = importlib.util.find_spec("apex.optimizers") is not None
    except Exception:  # the other project's package may not even import
        genuine = False
    if not genuine or importlib.util.find_spec("amp_C") is None:
        raise UserError(
            "optimizer.name: apex_fused_adam: the installed apex is not NVIDIA's or AMD's with its CUDA extensions "
            f"(the package of that name on the index is another project); build it from {APEX_SOURCE}, or use adamw"
        )
    if not torch.cuda.is_available():
        raise UserError("optimizer.name: apex_fused_adam runs on GPUs only; use adamw")
