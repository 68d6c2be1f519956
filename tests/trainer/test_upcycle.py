"""Upcycling: the weights that pass over, the losses that follow the teacher, and teachers that do not fit."""

import dataclasses
import json

import pytest
import torch

from model import DCDiT, DiT, DiTConfig, chunking
from model.errors import UserError
from model.weights import to_released
from tests.model.conftest import batch, liven, tiny_config, tiny_dcdit, tiny_dit
from tests.trainer.synthetic_run import export, manifest
from trainer.build import check_resumable
from trainer.config import Config, flatten
from trainer.data import Manifest
from trainer.upcycle import (
    BlockOutputs,
    block_loss,
    check_teacher,
    freeze_embedders,
    hybrid_losses,
    load_teacher,
    prepare,
    transplant,
)

CLASSES = ("a", "b", "c", "d", "e")


def teacher_and_student(**changes) -> tuple[DiT, DCDiT]:
    teacher = tiny_dit(seed=7, hidden_size=64, num_heads=4)
    student = tiny_dcdit(cond_adaptor=True, position_stride=2, **changes)
    transplant(teacher, student)
    return teacher, student


def test_what_passes_over_is_the_teachers_and_nothing_else_changes():
    teacher = tiny_dit(seed=7, hidden_size=64, num_heads=4)
    student = tiny_dcdit(cond_adaptor=True)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    copied = transplant(teacher, student)
    theirs, after = teacher.state_dict(), student.state_dict()
    assert len(copied) == 2 * 10 + 4 + 1  # ten tensors a block, the two embedders
    assert {name for name in theirs if name not in copied} == {
        "pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias", "final_layer.linear.weight",
        "final_layer.linear.bias", "final_layer.modulation.weight", "final_layer.modulation.bias",
    }  # fmt: skip
    for name, value in after.items():
        assert torch.equal(value, theirs[name] if name in copied else before[name]), name
    assert any(not torch.equal(before[name], after[name]) for name in copied)
    with torch.no_grad():  # a copy: the teacher does not move with the student
        student.backbone.blocks[0].mlp.fc1.weight.zero_()
    assert teacher.backbone.blocks[0].mlp.fc1.weight.any()


def routing_of(kept: torch.Tensor) -> chunking.Routing:
    """The routing that retains exactly the True places of kept (B, H, W)."""
    p = torch.where(kept.flatten(1), 0.9, 0.1)
    return chunking.finish(p, chunking.select(p, 0.0, "torch"), tuple(kept.shape[1:]))


def covering(targets: torch.Tensor, routing: chunking.Routing, patch: int) -> torch.Tensor:
    """The teacher's tokens (B, K, D) at every retained place, by way of a picture that is blown up."""
    height, width = routing.grid
    picture = targets.unflatten(1, (height // patch, width // patch))
    picture = picture.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return picture.flatten(1, 2)[routing.retained]


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_block_loss_is_0_for_the_covering_tokens_and_1_for_zeros(patch):
    torch.manual_seed(0)
    kept = torch.rand(3, 4, 8) < 0.4
    routing = routing_of(kept)
    targets = [torch.randn(3, 32 // patch**2, 5) * scale for scale in (1.0, 100.0)]
    flat = [target.flatten(0, 1) for target in targets]
    equal = [covering(target, routing, patch) for target in targets]
    assert block_loss(equal, flat, routing, patch).item() == 0
    everywhere = routing_of(torch.ones(3, 4, 8, dtype=torch.bool))
    zeros = [torch.zeros(3 * 32, 5)] * 2
    torch.testing.assert_close(block_loss(zeros, flat, everywhere, patch), torch.tensor(1.0))


def test_block_loss_is_the_mean_over_images_whatever_their_lengths():
    """By its definition, image by image; so it does not depend on which images share a batch."""
    torch.manual_seed(0)
    kept = torch.rand(3, 4, 4) < torch.tensor([0.1, 0.5, 0.9])[:, None, None]
    routing, targets = routing_of(kept), torch.randn(2, 3, 4, 6)
    outputs = torch.randn(2, routing.index.shape[0], 6)
    value = block_loss(list(outputs), [t.flatten(0, 1) for t in targets], routing, 2)
    expected, parts = [], outputs.split(list(routing.seqlens), dim=1)
    for i in range(3):
        alone = routing_of(kept[i : i + 1])
        for block in range(2):
            target = targets[block, i : i + 1]
            error = (parts[i][block] - covering(target, alone, 2)).square().mean()
            expected.append(error / target.square().mean())
        one = block_loss(list(parts[i]), list(targets[:, i]), alone, 2)
        torch.testing.assert_close(one, torch.stack(expected[-2:]).mean())
    torch.testing.assert_close(value, torch.stack(expected).mean())


def test_rows_of_padding_count_for_nothing():
    torch.manual_seed(0)
    routing = routing_of(torch.rand(2, 4, 4) < 0.4)
    target, output = torch.randn(2 * 4, 6), torch.randn(routing.index.shape[0], 6)
    padded = routing._replace(index=torch.cat([routing.index, torch.full((5,), -1, dtype=torch.int32)]))
    longer = torch.cat([output, torch.full((5, 6), 1e6)]).requires_grad_()
    loss = block_loss([longer], [target], padded, 2)
    torch.testing.assert_close(loss, block_loss([output], [target], routing, 2))
    loss.backward()
    assert not longer.grad[-5:].any() and longer.grad[:-5].any()


def test_equal_tokens_under_equal_weights_have_no_loss():
    """One retained token per patch, fed the teacher's own: every block of the student then says what the teacher's
    says, through packing, hooks and comparison."""
    teacher, student = teacher_and_student()
    x, t, y = batch(teacher.config, 3)
    seen, followed = BlockOutputs(teacher), BlockOutputs(student)
    with torch.no_grad():
        with seen.collect() as targets:
            teacher(x, t, y)
        kept = torch.zeros(3, 8, 8, dtype=torch.bool)
        kept[:, ::2, ::2] = True
        kept[:, 6, 6], kept[:, 7, 7] = False, True  # the last place is forced, and in the last patch
        routing = routing_of(kept)
        assert set(routing.seqlens) == {16}
        tokens = teacher.x_embedder(x) + teacher.pos_embed
        packed = chunking.pack_all(tokens, "sdpa")
        c = student.t_embedder(t) + student.y_embedder(y)
        with followed.collect() as outputs:
            student.backbone(packed.tokens, c, packed)
    assert len(outputs) == len(targets) == 2
    assert block_loss(outputs, targets, routing, 2).item() == 0
    with torch.no_grad():
        student.backbone.blocks[1].mlp.fc2.bias.add_(1.0)
        with followed.collect() as outputs:
            student.backbone(packed.tokens, c, packed)
    assert block_loss(outputs, targets, routing, 2).item() > 1e-4


def test_collecting_ends_with_its_block_and_with_remove():
    model = tiny_dit()
    outputs, data = BlockOutputs(model), batch(model.config, 1)
    model(*data)
    with outputs.collect() as first:
        model(*data)
    model(*data)
    with outputs.collect(on=False) as none:
        model(*data)
    assert (len(first), len(none)) == (2, 0)
    outputs.remove()
    with outputs.collect() as none:
        model(*data)
    assert not none


@pytest.mark.parametrize("packing", ["exact", "capacity"])
def test_the_block_loss_reaches_the_encoder_and_the_ratio_loss_the_router(packing):
    teacher, student = teacher_and_student(packing=packing, capacity_factor=1.0)
    freeze_embedders(student)
    x, t, y = batch(student.config, 3)
    seen, followed = BlockOutputs(teacher), BlockOutputs(student)
    with torch.no_grad(), seen.collect() as targets:
        teacher(x, t, y)
    with followed.collect() as outputs:
        out = student.train()(x, t, y)
    block_loss(outputs, targets, out.routing, 2).backward(retain_graph=True)
    reached = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    for part in (
        "x_embedder.",
        "cond_adaptor.",
        "encoder.blocks.1.",
        "backbone.blocks.0.",
        "backbone.blocks.1.",
    ):
        assert any(name.startswith(part) for name in reached), part
    # The blocks run before the gate: the router learns from the ratio loss and the diffusion loss.
    assert not any(name.startswith(("router.", "decoder.", "final_layer.")) for name in reached)
    out.sample.square().mean().backward()
    for name, parameter in student.named_parameters():
        frozen = name.startswith(("t_embedder.", "y_embedder."))
        assert (parameter.grad is None) == frozen, name
    assert student.router.scorer[3].weight.grad.any()


def test_hybrid_losses_take_noise_and_variance_apart():
    student, teacher = torch.zeros(2, 6, 4, 4, requires_grad=True), torch.zeros(2, 6, 4, 4)
    teacher[:, :3], teacher[:, 3:] = 2.0, 3.0
    noise, variance = hybrid_losses(student, teacher, 3)
    assert (noise.item(), variance.item()) == (4.0, 9.0)
    assert hybrid_losses(student[:, :3], teacher, 3)[1] is None
    noise, variance = hybrid_losses(student, student.detach(), 3)
    assert noise.item() == variance.item() == 0


def settings(teacher, **upcycle) -> Config:
    config = Config()
    config.model.preset = "DC-DiT-Ti"
    config.model.overrides = {"hidden_size": 64, "depth": 2, "num_heads": 4, "enc_dec_dim_factor": 1}
    config.upcycle = dataclasses.replace(config.upcycle, teacher=str(teacher), **upcycle)
    return config


def data_like(config: DiTConfig, **changes) -> Manifest:
    height, width = config.input_size
    values = {"kind": "pixels", "channels": config.in_channels, "height": height, "width": width}
    return Manifest(**(values | {"class_names": CLASSES, "splits": {"train": 8, "heldout": 8}} | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export of a teacher that fits `settings` and `tiny_config`, and its `.pt`."""
    teacher = tiny_dit(seed=7, hidden_size=64, num_heads=4)
    root = tmp_path_factory.mktemp("teacher")
    export(root / "ema", teacher, data=manifest() | {"class_names": list(CLASSES)})
    torch.save({"ema": to_released(teacher.state_dict())}, root / "dit.pt")
    return root


def check(config: Config, **changes) -> None:
    prepare(config)
    values = {k: v for k, v in config.model.overrides.items() if k in ("cond_adaptor", "position_stride")}
    check_teacher(config, tiny_config(**(values | changes)), data_like(tiny_dit(hidden_size=64).config))


@pytest.mark.parametrize("name", ["ema", "dit.pt", ""])
def test_teachers_of_every_kind(folder, name):
    config = settings(folder / name)
    check(config)
    assert config.model.overrides["cond_adaptor"] and config.model.overrides["position_stride"] == 2
    loaded, expected = (
        load_teacher(config).state_dict(),
        tiny_dit(seed=7, hidden_size=64, num_heads=4).state_dict(),
    )
    assert all(torch.equal(value, expected[key]) for key, value in loaded.items())


def test_what_the_config_says_stays():
    config = settings("nowhere")
    config.model.overrides |= {"cond_adaptor": False}
    with pytest.raises(UserError, match="upcycle.teacher: nowhere does not exist"):
        prepare(config)
    config.model.preset = "DiT-Ti/2"
    with pytest.raises(UserError, match="model.preset: DiT-Ti/2 is a DiT"):
        prepare(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"hidden_size": 128},
            ["width 64, depth 2 and 4 heads", "width 128, depth 2 and 4 heads", "model.overrides"],
        ),
        ({"depth": 3}, ["depth 2", "depth 3"]),
        ({"num_heads": 8}, ["4 heads", "8 heads"]),
        ({"mlp_ratio": 2.0}, ["MLP 256 wide, the model 128", "model.overrides.mlp_ratio=4"]),
        ({"num_classes": 6}, ["made for classes: 5", "have 6"]),
        ({"in_channels": 4}, ["made for channels: 3", "have 4"]),
        ({"input_size": (16, 16)}, ["(8, 8)", "(16, 16)", "data.path"]),
        ({"position_stride": 4}, ["model.overrides.position_stride: 4", "patches are of 2 pixels"]),
    ],
)
def test_a_teacher_that_does_not_fit_is_one_line_with_a_way_out(folder, change, words):
    with pytest.raises(UserError) as caught:
        check(settings(folder), **change)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_known_size_is_offered_as_a_preset(folder):
    config = settings(folder)
    teacher = tiny_dit(hidden_size=128, depth=4, num_heads=4)
    teacher.save_pretrained(folder / "known")
    config.upcycle.teacher = str(folder / "known")
    with pytest.raises(UserError, match="set model.preset=DC-DiT-Ti"):
        check(config)


def test_a_file_of_no_known_size_has_to_have_the_models_width_and_depth(tmp_path):
    """Its number of heads is not in it, so the model's is taken, which need not divide another width."""
    for changes in ({"hidden_size": 120, "num_heads": 3}, {"hidden_size": 64, "num_heads": 4, "depth": 3}):
        torch.save(to_released(tiny_dit(**changes).state_dict()), tmp_path / "dit.pt")
        with pytest.raises(UserError) as caught:
            check(settings(tmp_path / "dit.pt"))
        message = str(caught.value)
        assert message.startswith(
            f"upcycle.teacher: {tmp_path / 'dit.pt'} has width {changes['hidden_size']} and"
        )
        assert "width 64 and depth 2" in message and "model.overrides" in message and "divide" not in message


def test_a_teacher_of_other_data_or_another_process_is_refused(folder, tmp_path):
    for name, change, words in (
        ("flow", {"diffusion": {"kind": "flow", "num_timesteps": 1000}}, "diffusion.kind=flow, not gaussian"),
        ("steps", {"diffusion": {"kind": "gaussian", "num_timesteps": 500}}, "num_timesteps=500, not 1000"),
        ("names", {"data": {"class_names": ["a", "d", "c", "b", "e"]}}, "calls class 1 'd'"),
        ("latents", {"data": {"kind": "latents"}}, "kind is latents"),
    ):
        place = tmp_path / name
        export(place, tiny_dit(seed=7, hidden_size=64, num_heads=4))
        run = json.loads((place / "run.json").read_text())
        (place / "run.json").write_text(json.dumps(run | change))
        with pytest.raises(UserError, match=words):
            check(settings(place))


def test_a_teacher_without_variance_cannot_teach_it(folder, tmp_path):
    tiny_dit(hidden_size=64, num_heads=4, learn_sigma=False).save_pretrained(tmp_path)
    check(settings(tmp_path))
    with pytest.raises(UserError, match="set upcycle.variance_weight=0"):
        check(settings(tmp_path, distill="hybrid"))
    check(settings(tmp_path, distill="both", variance_weight=0.0))


def test_files_that_are_no_teacher(folder, tmp_path):
    liven(tiny_dcdit()).save_pretrained(tmp_path / "dcdit")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"ema": to_released(tiny_dcdit().state_dict())}, tmp_path / "dcdit.pt")
    state = to_released(tiny_dit(hidden_size=64, num_heads=4).state_dict())
    del state["blocks.1.mlp.fc1.weight"]
    torch.save(state, tmp_path / "cut.pt")
    for name, words in (
        ("dcdit", "holds a DCDiT, not a DiT"),
        ("empty", "neither a run with a finished checkpoint nor a folder"),
        ("text.pt", "truncated, corrupt or no torch checkpoint"),
        ("dcdit.pt", "no DiT checkpoint"),
        ("cut.pt", "'blocks.1.mlp.fc1.weight' is missing"),
    ):
        with pytest.raises(UserError) as caught:
            prepare(settings(tmp_path / name))
        message = str(caught.value)
        assert message.startswith("upcycle.teacher: ") and words in message and "--checkpoint" not in message


def test_an_upcycled_run_goes_on_as_one_and_as_nothing_else():
    plain, upcycled, thawed = (
        flatten(Config()),
        flatten(settings("a")),
        flatten(settings("a", freeze_embedders=False)),
    )
    moved, longer = flatten(settings("b")), flatten(settings("a", distill_images=8))
    same = {"model.preset": plain["model.preset"], "model.overrides": {}}
    for before, now in ((plain, upcycled), (upcycled, plain), (upcycled, thawed)):
        with pytest.raises(UserError, match="upcycle"):
            check_resumable(before | same, now | same)
    assert check_resumable(upcycled, moved) == ["upcycle.teacher: a -> b"]
    assert check_resumable(upcycled, longer) == ["upcycle.distill_images: 1280000 -> 8"]
