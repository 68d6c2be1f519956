"""Upcycle a pretrained DiT into a DC-DiT (DC-DiT v1 §4.3, v2 §4.4).

    torchrun --nproc_per_node=8 trainer/upcycle.py --config configs/recipe/imagenet256_xl_upcycled.yaml
    dcdit upcycle --config configs/recipe/demo.yaml upcycle.teacher=runs/dit run.dir=runs/upcycled

The teacher is a released `.pt` of facebookresearch/DiT, or a run, checkpoint or export folder of a DiT of ours.
Backbone blocks and the embedders of t and y take its weights, the embedders stay frozen, and for the first
`upcycle.distill_images` the teacher runs beside the model and is followed. After that it is ordinary training. The
same command resumes; `trainer/train.py` with `upcycle.teacher` set is the same. docs/upcycling.md says how and why.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# `python trainer/upcycle.py` puts trainer/ first on the path; the packages are beside it
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn

from model import DCDiT, DCDiTConfig, DiT, DiTConfig, preset
from model.chunking import Routing
from model.config import SIZES
from model.errors import UserError
from model.pretrained import CONFIG, fingerprint, read_config
from model.weights import load_dit, read_dit_config
from trainer import train
from trainer.checkpoint import find_export, read_state
from trainer.config import Config
from trainer.data import Manifest
from trainer.loop import Trainer

EMBEDDERS = ("t_embedder", "y_embedder")
INHERITED = ("backbone.blocks.", *(f"{name}." for name in EMBEDDERS))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (see ``trainer.signals``)."""
    return train.main(argv, train.parser("dcdit upcycle", __doc__), upcycling=True)


def prepare(config: Config) -> None:
    """Complete ``model.overrides`` with what upcycling asks of the model, where the config does not say otherwise:
    ``cond_adaptor: true``, and ``position_stride``, the teacher's patch size, so that its blocks find the positions
    they know.

    Raises:
        UserError: no DC-DiT to upcycle to, or a teacher that cannot be read.
    """
    if config.model.preset.lower().startswith("dit-"):
        raise UserError(
            f"model.preset: {config.model.preset} is a DiT; upcycling makes a DC-DiT, set DC-DiT-..."
        )
    sizes, _ = read_teacher_config(config)
    wanted = {"cond_adaptor": True, "position_stride": sizes.patch_size}
    config.model.overrides = wanted | config.model.overrides


def read_teacher_config(config: Config) -> tuple[DiTConfig, dict[str, Any]]:
    """The teacher's sizes, and its ``run.json`` (diffusion and data it was trained with; {} for a `.pt`). No weight is
    read.

    Raises:
        UserError: naming ``upcycle.teacher``, where it is missing, damaged or no DiT.
    """
    path = Path(config.upcycle.teacher)
    try:
        if not path.is_dir():
            return read_dit_config(path, _heads(config, path)), {}
        folder = find_export(path)
        run = folder / "run.json"
        info = json.loads(run.read_text()) if run.is_file() else {}
        return read_config(DiT, folder / CONFIG), info
    except ValueError as error:  # a UserError, or a run.json that is none
        raise UserError(f"upcycle.teacher: {str(error).removeprefix('--checkpoint: ')}") from None


def load_teacher(config: Config) -> DiT:
    """The teacher in float32 on the CPU: a run's averaged weights. Raises as ``read_teacher_config``."""
    path = Path(config.upcycle.teacher)
    try:
        if not path.is_dir():
            return load_dit(path, _heads(config, path))
        return DiT.from_pretrained(find_export(path))
    except UserError as error:
        raise UserError(f"upcycle.teacher: {error}") from None


def identify(config: Config, teacher: DiT) -> dict[str, str]:
    """``path``, where ``upcycle.teacher`` leads to at present, and ``sha256`` of the weights read from there."""
    path = Path(config.upcycle.teacher)
    path = find_export(path) if path.is_dir() else path
    return {"path": str(path.resolve()), "sha256": fingerprint(teacher)}


def _heads(config: Config, path: Path) -> int:
    """A `.pt` does not say how many heads there are, and none of its shapes does. Known sizes have their number; of
    others, the model's own is taken: it has to be the same, so width and depth have to be."""
    teacher = read_dit_config(path, heads=1)
    size = (teacher.hidden_size, teacher.depth)
    known = {(width, depth): heads for width, depth, heads in SIZES.values()}
    if size in known:
        return known[size]
    own = preset(config.model.preset, **config.model.overrides)
    if size != (own.hidden_size, own.depth):
        raise UserError(
            f"{path} has width {size[0]} and depth {size[1]}, the model (model.preset={config.model.preset}) width "
            f"{own.hidden_size} and depth {own.depth}; set hidden_size, depth and num_heads in model.overrides"
        )
    return own.num_heads


def check_teacher(config: Config, sizes: DCDiTConfig, manifest: Manifest) -> None:
    """The teacher's weights fit the model, and it was trained on data and with a process like this run's.

    Raises:
        UserError: the first thing that does not fit, and what to set.
    """
    teacher, info = read_teacher_config(config)
    where = f"upcycle.teacher: {config.upcycle.teacher}"
    _check_blocks(config, where, sizes, teacher)
    data = (
        ("channels", "in_channels"),
        ("grid of (rows, columns)", "input_size"),
        ("classes", "num_classes"),
    )
    for what, key in data:
        theirs, ours = getattr(teacher, key), getattr(sizes, key)
        if theirs != ours:
            raise UserError(
                f"{where} was made for {what}: {theirs}, but the shards in data.path have {ours}; "
                "take a teacher that was trained on such data"
            )
    if sizes.position_stride not in (1, teacher.patch_size):
        raise UserError(
            f"model.overrides.position_stride: {sizes.position_stride}, but the teacher's patches are of "
            f"{teacher.patch_size} pixels; leave it out"
        )
    hybrid = config.upcycle.distill in ("hybrid", "both") and config.upcycle.variance_weight
    if hybrid and sizes.learn_sigma and not teacher.learn_sigma:
        raise UserError(f"{where} has no variance to learn from; set upcycle.variance_weight=0")
    _check_origin(config, where, info, manifest.to_dict())


def _check_blocks(config: Config, where: str, sizes: DCDiTConfig, teacher: DiTConfig) -> None:
    ours, theirs = ((c.hidden_size, c.depth, c.num_heads) for c in (sizes, teacher))
    if ours != theirs:
        name = next((name for name, size in SIZES.items() if size == theirs), None)
        mend = f"set model.preset=DC-DiT-{name}" if name else "set them in model.overrides"
        words = "width {}, depth {} and {} heads"
        raise UserError(
            f"{where} has {words.format(*theirs)}, the model (model.preset={config.model.preset}) "
            f"{words.format(*ours)}; {mend}"
        )
    ours, theirs = (int(c.hidden_size * c.mlp_ratio) for c in (sizes, teacher))
    if ours != theirs:
        raise UserError(
            f"{where} has an MLP {theirs} wide, the model {ours}; set model.overrides.mlp_ratio={teacher.mlp_ratio:g}"
        )


def _check_origin(config: Config, where: str, info: dict[str, Any], data: dict[str, Any]) -> None:
    """What a run of ours says about its training; a `.pt` says nothing."""
    for key in ("kind", "num_timesteps"):
        theirs, ours = info.get("diffusion", {}).get(key), getattr(config.diffusion, key)
        if theirs not in (None, ours):
            raise UserError(f"{where} was trained with diffusion.{key}={theirs}, not {ours}; set it alike")
    other = "take a teacher that was trained on such data"
    for key in ("kind", "scale", "vae"):
        theirs, ours = info.get("data", {}).get(key), data.get(key)
        if theirs and ours and theirs != ours:
            raise UserError(
                f"{where} was trained on data whose {key} is {theirs}, that in data.path has {ours}; {other}"
            )
    names = zip(info.get("data", {}).get("class_names", ()), data["class_names"], strict=False)
    for number, (theirs, ours) in enumerate(names):
        if theirs != ours:
            raise UserError(
                f"{where} calls class {number} {theirs!r}, the data in data.path {ours!r}; {other}"
            )


@torch.no_grad()
def transplant(teacher: DiT, model: DCDiT) -> list[str]:
    """Copy the teacher's blocks and the embedders of t and y into ``model``; returns the names of what was copied.

    The tensors correspond one to one. What only ``model`` has in a block keeps its own start.
    """
    own, copied = model.state_dict(), []
    for name, value in teacher.state_dict().items():
        if name.startswith(INHERITED):
            own[name].copy_(value)
            copied.append(name)
    return copied


def freeze_embedders(model: DCDiT) -> None:
    for name in EMBEDDERS:
        getattr(model, name).requires_grad_(False)


class BlockOutputs:
    """Hands out what the blocks of a model's backbone return, for the forward passes inside ``collect``.

    ``model`` may be wrapped by any engine. The hooks stay from the start: what is compiled must know them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._outputs: list[Tensor] | None = None
        blocks = getattr(model, "module", model).backbone.blocks
        self._handles = [block.register_forward_hook(self._keep) for block in blocks]

    def _keep(self, block: nn.Module, inputs: Any, output: Tensor) -> None:
        if self._outputs is not None:
            self._outputs.append(output)

    @contextmanager
    def collect(self, on: bool = True) -> Iterator[list[Tensor]]:
        """A list that fills up, one tensor per block, in order; where not ``on``, it stays empty."""
        outputs: list[Tensor] = []
        self._outputs = outputs if on else None
        try:
            yield outputs
        finally:
            self._outputs = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def block_loss(outputs: list[Tensor], targets: list[Tensor], routing: Routing, patch: int) -> Tensor:
    """Squared error of the student's block outputs, each token against the teacher's token that covers its place.

    Args:
        outputs: per block (T, D), the student's packed tokens.
        targets: per block (B*K, D), the teacher's tokens, K = H*W / patch**2 per image in row-major order.
        patch: the teacher's patch size in pixels, P.

    Returns:
        A float32 scalar: the mean over images and blocks of (mean over the image's retained tokens and channels of the
        squared error) / (mean square of the teacher's tokens of that image and block). 0 where the student's tokens
        equal the teacher's, 1 for a student that says 0. Relative, because the residual stream of a DiT grows
        by orders of magnitude from the first block to the last; per image, so that the loss of a global batch does
        not depend on how it is spread over processes.
    """
    height, width = routing.grid
    images = routing.cu_seqlens.shape[0] - 1
    owned = routing.index >= 0  # packing by capacity ends in rows that no image owns
    place = routing.index.long().clamp(min=0)
    image, row, column = place // (height * width), place // width % height, place % width
    per_row = width // patch
    token = (image * (height // patch) + row // patch) * per_row + column // patch  # of the teacher
    share = owned / (routing.cu_seqlens.diff()[image] * images)  # of each packed row in the mean
    total = torch.zeros((), device=share.device)
    for output, target in zip(outputs, targets, strict=True):
        target = target.detach().float()
        size = target.unflatten(0, (images, -1)).square().mean(dim=(1, 2))
        error = (output.float() - target[token]).square().mean(dim=1)
        total = total + (error * share / size[image]).sum()
    return total / len(outputs)


def hybrid_losses(student: Tensor, teacher: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Mean squared distance of two models' outputs (B, C or 2C, H, W): of the noise (first C channels; velocity under
    flow matching) and of the variance channels, None where one of the models has none (LiT, hybrid distillation)."""
    student, teacher = student.float(), teacher.detach().float()
    error = (student[:, :channels] - teacher[:, :channels]).square().mean()
    if student.shape[1] == channels or teacher.shape[1] == channels:
        return error, None
    return error, (student[:, channels:] - teacher[:, channels:]).square().mean()


class UpcycleTrainer(Trainer):
    """A run that starts from a DiT and follows it for ``upcycle.distill_images``.

    The stage is a function of the position alone, and the teacher of its file: a run that is resumed on either side of
    the boundary goes on with the same bits.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.patch = self._pretrained.config.patch_size
        self.stats.teacher = self._pretrained.config
        self.teacher: nn.Module | None = None
        if self.distilling:
            self.teacher = self.engine.frozen(self._pretrained)
            self.blocks, self.teacher_blocks = BlockOutputs(self.model), BlockOutputs(self.teacher)
        del self._pretrained

    def _build_model(self) -> DCDiT:
        model = super()._build_model()
        self._pretrained = load_teacher(self.config)
        self.identity = self.world.broadcast(
            identify(self.config, self._pretrained) if self.world.main else None
        )
        transplant(self._pretrained, model)
        if self.config.upcycle.freeze_embedders:
            freeze_embedders(model)
        return model

    @property
    def distilling(self) -> bool:
        """The present step is one of the distillation stage."""
        return self._in_stage(self.position)

    def _in_stage(self, position: int) -> bool:
        options = self.config.upcycle
        return options.distill != "none" and position < options.distill_images

    def _more_state(self) -> dict[str, Any]:
        return {"teacher": self.identity}

    def _restore(self) -> dict[str, Any]:
        self.changed: str | None = None
        if self.resume is not None:
            self._compare_teacher(read_state(self.resume))
        return super()._restore()

    def _compare_teacher(self, state: dict[str, Any]) -> None:
        """A run follows one teacher: a folder whose newest checkpoint has moved on is another.

        Raises:
            UserError: in the distillation stage; after it there is a line in ``_announce``.
        """
        before, now = state.get("teacher"), self.identity
        if before is None or before["sha256"] == now["sha256"]:
            return
        was = before["path"]
        text = f"upcycle.teacher: {now['path']} has other weights than the teacher this run began with, {was}"
        if self._in_stage(state["images"]):
            there = was != now["path"] and Path(was).exists()
            mend = f"set upcycle.teacher={was}" if there else "put that one back"
            raise UserError(f"{text}; {mend}, or start another run with another run.dir")
        self.changed, self.identity = text, before

    def _recent_losses(self, since: int = 0) -> list[float]:
        """After the stage without the losses of the stage, which are sums of other things."""
        over = self.config.upcycle.distill != "none" and not self.distilling
        return super()._recent_losses(self.config.upcycle.distill_images if over else since)

    def forward_backward(self, batch: dict[str, Tensor], tail_drop: float, scale: float) -> dict[str, Tensor]:
        """As ``Trainer.forward_backward``; in the distillation stage with the teacher's part in the loss.

        The diffusion loss stays in the loss even at weight 0: every parameter then has a gradient in every step, as DDP
        and ZeRO expect.
        """
        if not self.distilling:
            self._release_teacher()
            return super().forward_backward(batch, tail_drop, scale)
        follow = self.config.upcycle.distill in ("blocks", "both")
        with torch.no_grad(), self.teacher_blocks.collect(follow) as targets:
            wanted, _, _ = self.predict(self.teacher, batch, 0.0)
        with self.blocks.collect(follow) as outputs:
            out, terms, _ = self.predict(self.model, batch, tail_drop)
        options = self.config.upcycle
        loss, parts = self.objective(out, terms, options.diffusion_weight, options.ratio_weight)
        for weight, name, value in self._distill(out, wanted, outputs, targets):
            loss = loss + weight * value
            parts[name] = value
        self.engine.backward(loss * scale)
        return {"loss": loss.detach(), **{k: v.detach() for k, v in parts.items()}}

    def _distill(
        self, out: Any, wanted: Any, outputs: list[Tensor], targets: list[Tensor]
    ) -> list[tuple[float, str, Tensor]]:
        """(weight, name in the log, loss) of what ``upcycle.distill`` asks for."""
        options, losses = self.config.upcycle, []
        if outputs:
            value = block_loss(outputs, targets, out.routing, self.patch)
            losses.append((options.block_weight, "loss_blocks", value))
        if options.distill in ("hybrid", "both"):
            noise, variance = hybrid_losses(out.sample, wanted.sample, self.data.manifest.channels)
            losses.append((options.noise_weight, "loss_teacher_noise", noise))
            if variance is not None:
                losses.append((options.variance_weight, "loss_teacher_variance", variance))
        return losses

    def _release_teacher(self) -> None:
        if self.teacher is None:
            return
        for outputs in (self.blocks, self.teacher_blocks):
            outputs.remove()
        self.engine.release(self.teacher)
        self.teacher = self.blocks = self.teacher_blocks = None
        gc.collect()  # all generations, here and on every process at this step: `health.collect` has the young alone
        self.spikes.recent.clear()  # another loss begins
        self._say(f"image {self.position}: distillation is over, ordinary training goes on")

    def _announce(self) -> None:
        super()._announce()
        options, frozen = self.config.upcycle, ""
        if self.changed is not None:
            self._say(f"warning: {self.changed}; no distillation (any more), so the run goes on")
        if options.freeze_embedders:
            frozen = ", embedders of t and y frozen"
        stage = f"distillation ({options.distill}) up to image {options.distill_images}"
        self._say(
            f"upcycled from {options.teacher}{frozen}; {stage if self.distilling else 'no distillation (any more)'}"
        )


if __name__ == "__main__":
    sys.exit(main())
