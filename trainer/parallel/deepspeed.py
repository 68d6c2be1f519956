"""DeepSpeed ZeRO 1, 2 and 3. Its JSON is made from our config: there is no second file to keep in step.

ZeRO 1 and 2 keep the weights whole, so their EMA copies are whole too. Under ZeRO 3 an EMA copy is partitioned like the
weights, by an engine of its own without an optimizer; it is updated partition by partition, and nothing is gathered.
With ``ema.device: cpu`` the copies, or their partitions, are in host memory.

The weights are fp32; bf16 is DeepSpeed's own autocast. (DeepSpeed's ``bf16`` section would round the router too.)
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from model.errors import UserError
from trainer.checkpoint import read_state
from trainer.config import Config
from trainer.ema import lent_to
from trainer.optimizers import build_optimizer, set_rates
from trainer.parallel.apply import checkpoint_blocks, compile_blocks
from trainer.parallel.engine import Engine
from trainer.parallel.world import World

FOLDER, TAG = "deepspeed", "state"


def import_deepspeed() -> Any:
    """deepspeed, quiet, and on CPUs without the shared-memory op that it would compile for a minute.

    Raises:
        UserError: not installed.
    """
    try:
        import deepspeed
        from deepspeed.ops import __compatible_ops__
    except ImportError as error:
        raise UserError(
            f"parallel.engine: deepspeed cannot be imported ({error}); pip install deepspeed, or use fsdp"
        ) from None
    if not torch.cuda.is_available():
        __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    return deepspeed


def deepspeed_config(config: Config, world_size: int, micro: int) -> dict[str, Any]:
    """DeepSpeed's configuration for ``config`` on ``world_size`` processes with ``micro`` images each."""
    zero: dict[str, Any] = {"stage": config.parallel.zero_stage, "overlap_comm": torch.cuda.is_available()}
    if config.parallel.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    timers = {}
    if config.parallel.zero_stage < 3:
        # DeepSpeed's own throughput timer waits for the device in every forward; the progress line has ours. Not under
        # ZeRO 3: nothing else was found there that orders an update before the gathering, on another stream, of it.
        timers = {"timers": {"throughput": {"enabled": False}}}
    if config.parallel.zero_stage == 3:
        # Whole copies kept of small weights would go stale in an EMA copy, which is updated by its partitions.
        zero |= {"stage3_param_persistence_threshold": 0}
    result = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.train.global_batch_size // (micro * world_size),
        "gradient_clipping": config.optimizer.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,  # the progress line is ours
        **timers,
    }
    if config.train.precision == "bf16":
        # No module whose weights and gradients travel in bf16: gathered and reduced in fp32.
        result["torch_autocast"] = {
            "enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": [],
        }  # fmt: skip
    return result


class DeepSpeed(Engine):
    def __init__(
        self, model: nn.Module, averages: list[nn.Module], world: World, config: Config, micro: int
    ) -> None:
        super().__init__(config, world)
        os.environ.setdefault(
            "LOCAL_RANK", str(world.local_rank)
        )  # DeepSpeed insists, also without a launcher
        self.library, self.stage = import_deepspeed(), config.parallel.zero_stage
        self.settings = deepspeed_config(config, world.size, micro)
        self._prepare(model)
        # Names and shapes before ZeRO 3 takes the parameters apart.
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        optimizer = build_optimizer(config, model)
        self.model, self.optimizer = self._initialize(model, optimizer)
        self.model.checkpoint_engine = self._writer()
        if self.stage == 3:
            kind = world.device.type if self.host is None else "cpu"
            self.mesh = init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
        self._wrap_averages(averages)

    def _initialize(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, host: bool = False
    ) -> tuple[Any, Any]:
        settings = dict(self.settings)
        if host:
            pinned = {"device": "cpu", "pin_memory": self.world.device.type == "cuda"}
            settings["zero_optimization"] = settings["zero_optimization"] | {"offload_param": pinned}
        engine, wrapped, *_ = self.library.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        return engine, wrapped

    def _prepare(self, model: nn.Module, host: bool = False) -> None:
        if not host:
            model.to(self.world.device)
        checkpoint_blocks(model, self.config.parallel.activation_checkpointing)
        compile_blocks(model, self.config.parallel.compile)

    def frozen(self, model: nn.Module, host: bool = False) -> nn.Module:
        self._prepare(model.requires_grad_(False).eval(), host)
        return self._initialize(model, None, host)[0] if self.stage == 3 else model

    def release(self, model: nn.Module) -> None:
        """Under ZeRO 3 the library keeps references to an engine for ever: its partitions go by hand."""
        for p in model.parameters():
            if hasattr(p, "ds_tensor"):
                p.ds_tensor.data = p.ds_tensor.data.new_empty(0)

    def _writer(self) -> Any:
        from trainer.parallel.deepspeed_writer import BackgroundWriter

        return BackgroundWriter(self.model._config)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        yield
        if not last:
            self.model.step()  # only counts the micro-batch

    def _backward(self, loss: torch.Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float, backbone_lr: float | None = None) -> torch.Tensor:
        """DeepSpeed clips, and leaves a step out by itself where the norm is not finite (it reads it on the host)."""
        set_rates(self.optimizer, lr, backbone_lr)
        self.model.step()
        norm = self.model.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.world.device).detach().clone()

    def shards(self, wrapped: nn.Module) -> list[torch.Tensor]:
        return [getattr(p, "ds_tensor", p).data for p in wrapped.parameters()]

    def state(self) -> dict[str, Any]:
        """The averages; the rest is in DeepSpeed's own files. Under ZeRO 3 every parameter is one flat tensor,
        split over the processes as DTensor splits, so that any number of them can read it."""
        self.settle()
        return {name: self._average_state(average) for name, average in self.averages.items()}

    def _average_state(self, average: nn.Module) -> dict[str, torch.Tensor]:
        if self.stage < 3:
            return {plain_name(name): value for name, value in average.state_dict().items()}
        module, state = average.module, {}
        for name, p in module.named_parameters():
            length, begin = self.shapes[name].numel(), self.world.rank * p.ds_tensor.numel()
            local = p.ds_tensor.data[: max(0, min(p.ds_tensor.numel(), length - begin))]
            state[plain_name(name)] = DTensor.from_local(
                local, self.mesh, [Shard(0)], run_check=False, shape=(length,), stride=(1,)
            )
        return state | {plain_name(name): value for name, value in module.named_buffers()}

    @contextmanager
    def evaluating(self, name: str) -> Iterator[nn.Module]:
        with super().evaluating(name) as average:
            if self.stage == 3:  # gathers what it needs on the device by itself
                yield average
            else:
                with lent_to(self.world.device, average):
                    yield average

    def save_own(self, folder: Path) -> Future:
        """Weights and optimizer as ``zero_to_fp32.py``, put beside them by DeepSpeed, reads them."""
        self.model.save_checkpoint(str(folder / FOLDER), tag=TAG)
        return self.model.checkpoint_engine.collect()

    def _load(self, checkpoint: Path, group: dist.ProcessGroup | None) -> None:
        if read_state(checkpoint)["world_size"] == self.world.size:
            self._load_own(checkpoint / FOLDER)
        else:
            self._load_resharded(checkpoint)
        state = self.state()
        dcp.load(
            state, checkpoint_id=str(checkpoint), process_group=group
        )  # in place: tensors are the averages'

    def _load_own(self, folder: Path) -> None:
        path, _ = self.model.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise UserError(f"checkpoint {folder.parent}: DeepSpeed found nothing to load in it")

    def _load_resharded(self, checkpoint: Path) -> None:
        """DeepSpeed reads another number of processes only from its universal format: rank 0 converts, all load."""
        wrote = read_state(checkpoint)["world_size"]
        if self.stage == 3 and len(self.optimizer.param_groups) > 1:
            # What DeepSpeed 0.19 converts from several groups loads without a word and trains to other losses.
            raise UserError(
                f"checkpoint {checkpoint}: written by {wrote} processes; under ZeRO 3 with "
                f"optimizer.backbone_warmup_images it goes on with {wrote} only (parallel.engine=fsdp with any number)"
            )
        target = Path(self.config.run.dir) / "checkpoints" / f".universal-{checkpoint.name}"
        problem = self.world.broadcast(self._convert(checkpoint, target) if self.world.main else None)
        if problem:
            raise UserError(
                f"checkpoint {checkpoint}: DeepSpeed cannot convert it to {self.world.size} processes: {problem}; "
                f"go on with the {wrote} that wrote it"
            )
        settings = self.model._config
        settings.load_universal_checkpoint = True
        try:
            self._load_own(target)
        finally:
            settings.load_universal_checkpoint = False
        self.world.barrier()
        if self.world.main:
            shutil.rmtree(target, ignore_errors=True)

    def _convert(self, checkpoint: Path, target: Path) -> str | None:
        """The last line of what DeepSpeed's converter says where it fails."""
        shutil.rmtree(target, ignore_errors=True)
        # Stages 1 and 2 do not write all that the converter looks for; stage 3 does, and refuses the flag.
        extra = [] if self.stage == 3 else ["--inject_missing_state"]
        command = [
            sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *extra,
            "--input_folder", str(checkpoint / FOLDER / TAG), "--output_folder", str(target / TAG),
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode == 0:
            return None
        return (done.stdout.strip().splitlines() or ["no output"])[-1]


def plain_name(name: str) -> str:
    """A parameter's name without what activation checkpointing and compilation put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
