"""FSDP2 ``fully_shard``: every backbone block, router, encoder and decoder a unit of its own, then the root.

With ``parallel.replicate`` above 1 the mesh is (replicate, shard): sharded inside a group, replicated across.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from trainer.config import ParallelConfig
from trainer.parallel.apply import checkpoint_blocks, compile_blocks
from trainer.parallel.world import World


def wrap(model: nn.Module, world: World, config: ParallelConfig, bf16: bool) -> nn.Module:
    """Activation checkpointing, compile and sharding, in this order, innermost unit first."""
    # FSDP warns of outputs that are views, in case they are changed in place; the models never do that.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    checkpoint_blocks(model, config.activation_checkpointing)
    compile_blocks(model, config.compile)
    mesh = _mesh(world, config.replicate)
    # Autocast casts the inputs where that is right (and nowhere else: a bf16 timestep would lose digits).
    compute = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.backbone.blocks:
        fully_shard(block, mesh=mesh, mp_policy=compute)
    for name in ("router", "residual_proj"):  # fp32 whatever the precision of the rest (DC-DiT v2 §3.3)
        if hasattr(model, name):
            fully_shard(getattr(model, name), mesh=mesh, mp_policy=exact)
    for name in ("encoder", "decoder"):
        if hasattr(model, name):
            fully_shard(getattr(model, name), mesh=mesh, mp_policy=compute)
    # The root, too, is sharded again after a forward: an evaluation has no backward that would do it.
    fully_shard(model, mesh=mesh, mp_policy=compute, reshard_after_forward=True)
    model.to(world.device)  # buffers; parameters went to the mesh's device above
    return model


@contextmanager
def accumulate(wrapped: FSDPModule, last: bool) -> AbstractContextManager:
    wrapped.set_requires_gradient_sync(last)
    yield


def clip(wrapped: nn.Module, max_norm: float) -> torch.Tensor:
    norm = nn.utils.clip_grad_norm_(wrapped.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _mesh(world: World, replicate: int) -> DeviceMesh:
    if replicate == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shape = (replicate, world.size // replicate)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
