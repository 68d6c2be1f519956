"""What the training loop sees of an engine, and what DDP and FSDP have in common."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from trainer.checkpoint import read_state
from trainer.ema import HostUpdate, ema_names
from trainer.optimizers import build_optimizer, set_rates
from trainer.parallel.world import World

if TYPE_CHECKING:
    from trainer.config import Config

SETTINGS = ("betas", "eps", "weight_decay")  # of an optimizer's group; every step sets the learning rate


class Engine:
    """The model that trains, its averages and its optimizer, spread over the processes one way or another.

    ``model`` is what the step calls; ``averages`` maps the names of ``trainer.ema.ema_names`` to the EMA copies,
    wrapped so that they can be called like the model.
    """

    model: nn.Module
    averages: dict[str, nn.Module]
    optimizer: Any

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.bf16 = config.train.precision == "bf16"
        self.names = ema_names(config.ema.decay)
        self.host = HostUpdate() if config.ema.device == "cpu" else None

    def accumulate(self, last: bool) -> AbstractContextManager:
        """Around the forward and backward of one micro-batch; gradients are reduced on the last one."""
        raise TypeError(f"{type(self).__name__} is no engine")

    def backward(self, loss: torch.Tensor) -> None:
        """The gradient of ``loss`` (a scalar, already divided by the accumulation).

        A loss that is not finite makes every gradient of this process NaN, and so the gradient norm of all of
        them: one number then tells every process the same, without a collective of its own. For a finite loss
        the factor is exactly 1.
        """
        self._backward(loss * (1.0 + 0.0 * loss.detach()))

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, lr: float, backbone_lr: float | None = None) -> torch.Tensor:
        """Clip to ``optimizer.clip``, update by the rates of ``set_rates``, clear the gradients. An update with a norm
        that is not finite is left out, on the device. Returns the norm before clipping, the same float32 scalar on
        every process."""
        raise TypeError(f"{type(self).__name__} is no engine")

    @torch.no_grad()
    def update_averages(self, decays: list[float]) -> None:
        """ema <- decay * ema + (1 - decay) * model, in one fused call per copy and device. Averages in host memory
        (``ema.device: cpu``) are up to date after ``settle`` only."""
        now, averages = self.shards(self.model), [self.shards(a) for a in self.averages.values()]
        if self.host is not None:
            self.host.start(now, averages, decays)
            return
        for average, decay in zip(averages, decays, strict=True):
            torch._foreach_lerp_(average, now, 1.0 - decay)

    def settle(self) -> None:
        """Wait until the averages take in the last update."""
        if self.host is not None:
            self.host.wait()

    @contextmanager
    def evaluating(self, name: str) -> Iterator[nn.Module]:
        """The average called ``name``, up to date and callable on the device."""
        self.settle()
        yield self.averages[name]

    def shards(self, wrapped: nn.Module) -> list[torch.Tensor]:
        """This process's part of every parameter, in an order all copies share."""
        return list(wrapped.parameters())

    def frozen(self, model: nn.Module, host: bool = False) -> nn.Module:
        """A further model that is only run (an average, a teacher), spread over the processes as the weights are, or
        where they are whole, whole; with ``host`` in host memory."""
        raise TypeError(f"{type(self).__name__} is no engine")

    def release(self, model: nn.Module) -> None:
        """Give back what a model from ``frozen`` holds and collecting garbage would not; every process calls it. The
        caller then drops the model and collects: wrapped models are in reference cycles."""

    def _wrap_averages(self, averages: list[nn.Module]) -> None:
        wrapped = [self.frozen(average, host=self.host is not None) for average in averages]
        self.averages = dict(zip(self.names, wrapped, strict=True))

    def state(self) -> dict[str, Any]:
        """What torch.distributed.checkpoint writes and reads for this engine."""
        raise TypeError(f"{type(self).__name__} is no engine")

    def save_own(self, folder: Path) -> Future | None:
        """Copy what the engine keeps in a format of its own, and begin to write it into ``folder``; every process
        calls it. Returns when that is written, None where there is nothing of the kind."""

    def load(self, checkpoint: Path, group: dist.ProcessGroup | None) -> None:
        """Read ``checkpoint`` in place; every process calls it. The optimizer's moments are the checkpoint's, its
        settings the config's, which may have changed since."""
        settings = [{key: own[key] for key in SETTINGS} for own in self.optimizer.param_groups]
        self._load(checkpoint, group)
        for own, kept in zip(self.optimizer.param_groups, settings, strict=True):
            own.update(kept)

    def _load(self, checkpoint: Path, group: dist.ProcessGroup | None) -> None:
        raise TypeError(f"{type(self).__name__} is no engine")


class TorchEngine(Engine):
    """DDP and FSDP: torch's modules, torch's optimizer, one checkpoint format for both."""

    def __init__(
        self, model: nn.Module, averages: list[nn.Module], world: World, config: Config, micro: int = 0
    ) -> None:
        super().__init__(config, world)
        self.model = self.wrap(model)
        self._wrap_averages(averages)
        self.optimizer = build_optimizer(config, self.model)

    def wrap(self, model: nn.Module) -> nn.Module:
        raise TypeError(f"{type(self).__name__} is no engine")

    def clip(self, max_norm: float) -> torch.Tensor:
        return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def step(self, lr: float, backbone_lr: float | None = None) -> torch.Tensor:
        norm = self.clip(self.config.optimizer.clip).detach()
        set_rates(self.optimizer, lr, backbone_lr)
        if self.optimizer.defaults.get("fused"):
            # torch's fused AdamW looks at this flag on the device (gradient scalers use it): no read by the host.
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()
            self.optimizer.step()
        elif torch.isfinite(norm):  # other optimizers have no such flag: one read per step
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Any]:
        self.settle()
        averages = {name: get_model_state_dict(average) for name, average in self.averages.items()}
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            **averages,
        }

    def _load(self, checkpoint: Path, group: dist.ProcessGroup | None) -> None:
        state = self.state()
        names = [group["params"] for group in state["optimizer"]["param_groups"]]
        # Gates may begin on the way: what the checkpoint knows nothing of stays as it starts.
        had = read_state(checkpoint)["config"].get("model.dydit") is not None
        planner = DefaultLoadPlanner(allow_partial_load=self.config.model.dydit is not None and not had)
        dcp.load(state, checkpoint_id=str(checkpoint), planner=planner, process_group=group)
        for group, own in zip(state["optimizer"]["param_groups"], names, strict=True):
            group["params"] = own
        set_model_state_dict(self.model, state["model"])
        for name, average in self.averages.items():
            set_model_state_dict(average, state[name])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
