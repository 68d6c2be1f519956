"""FSDP2 ``fully_shard``: every backbone block, router, encoder and decoder a unit of its own, then the root.

With ``parallel.replicate`` above 1 the mesh is (replicate, shard): sharded inside a group, replicated across.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from trainer.parallel.apply import checkpoint_blocks, compile_blocks
from trainer.parallel.engine import TorchEngine
from trainer.parallel.world import World


class FSDP(TorchEngine):
    def frozen(self, model: nn.Module, host: bool = False) -> FSDPModule:
        # In host memory are shards; a forward pass takes one unit at a time to the device.
        offload = CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda") if host else None
        return self.wrap(model.requires_grad_(False).eval(), offload)

    def wrap(self, model: nn.Module, offload: OffloadPolicy | None = None) -> FSDPModule:
        """Activation checkpointing, compile, sharding and prefetch, in this order, innermost unit first."""
        # FSDP warns of outputs that are views, in case they are changed in place; the models never do that.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        checkpoint_blocks(model, self.config.parallel.activation_checkpointing)
        compile_blocks(model, self.config.parallel.compile)
        if not hasattr(self, "mesh"):  # one for the model and its averages, whose shards then match
            self.mesh = make_mesh(self.world, self.config.parallel.replicate)
        # Autocast casts the inputs where that is right (and nowhere else: a bf16 timestep would lose digits).
        compute = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self.bf16 else None, reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )  # fmt: skip
        exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        options = {"mesh": self.mesh, "offload_policy": offload or OffloadPolicy()}
        for block in model.backbone.blocks:
            fully_shard(block, mp_policy=compute, **options)
        # fp32 whatever the rest is (DC-DiT v2 §3.3)
        for unit in parts(model, "gates", "router", "residual_proj"):
            fully_shard(unit, mp_policy=exact, **options)
        for unit in parts(model, "encoder", "decoder"):
            fully_shard(unit, mp_policy=compute, **options)
        # The root, too, is sharded again after a forward: an evaluation has no backward that would do it.
        # (It moves buffers to the mesh's device, too.)
        fully_shard(model, mp_policy=compute, reshard_after_forward=True, **options)
        prefetch(model)
        return model

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self.model.set_requires_gradient_sync(last)
        yield

    def clip(self, max_norm: float) -> torch.Tensor:
        """As the other engines. Each replica adds up the norm by itself, perhaps in another order, so all take that of
        the first: their weights would drift apart by roundings, and nothing ever brings them together again."""
        parameters = list(self.model.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.mesh.ndim == 2:
            dist.broadcast(norm, group=self.mesh.get_group("replicate"), group_src=0)
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm


def parts(model: nn.Module, *names: str) -> list[nn.Module]:
    """The submodules of these names that the model has and that hold weights."""
    found = [getattr(model, name, None) for name in names]
    return [part for part in found if part is not None and next(part.parameters(), None) is not None]


def prefetch(model: nn.Module) -> None:
    """Each unit asks for the weights of the next one, in the order of the forward pass.

    FSDP's own prefetch relies on a host that runs ahead of the device. Ours waits once, after the router, for the
    packed length: by then the first block's weights must be on their way.
    """
    units = parts(model, "gates", "encoder", "router", "residual_proj")
    units += [*model.backbone.blocks, *parts(model, "decoder")]
    for unit, following in zip(units, units[1:], strict=False):
        unit.set_modules_to_forward_prefetch([following])


def make_mesh(world: World, replicate: int) -> DeviceMesh:
    if replicate == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shape = (replicate, world.size // replicate)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
