"""Evaluation on the way, in one process: what is drawn when, of what, and that nothing else is touched."""

import json
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.diffusion import make_process
from model.errors import UserError
from tests.trainer.evaluation.test_evaluate import opened_world
from tests.trainer.evaluation.test_images import latent_shards
from tests.trainer.synthetic_run import SIZE, mds, tiny_model
from trainer.config import load_config
from trainer.data import open_data
from trainer.evaluation.training import Drawing, check_drawing
from trainer.parallel import World
from trainer.signals import StopFlag


class Stop:
    """A signal that comes after so many looks; never by default."""

    def __init__(self, after: float = float("inf")) -> None:
        self.looks, self.after = 0, after

    def agreed(self, world: World) -> bool:
        self.looks += 1
        return self.looks > self.after

    check = StopFlag.check


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    return mds(tmp_path_factory.mktemp("pixels") / "data", 8)


def config_for(data, folder, *overrides: str):
    settings = ["train.total_images=96", "train.global_batch_size=8", "train.precision=fp32", "eval.every=16",
                "eval.samples=6", "eval.steps=2", "eval.batch_size=4"]  # fmt: skip
    return load_config(None, [*settings, f"data.path={data}", f"run.dir={folder}", *overrides])


def trainer_at(position: int, channels: int = 3, stop: Stop | None = None):
    model = tiny_model(channels).eval().requires_grad_(False)
    return SimpleNamespace(
        position=position, step=position // 8, ema=model, sizes=model.config, stop=stop or Stop()
    )


def drawing(config, world, said=None) -> Drawing:
    process = make_process("gaussian", learn_sigma=True)
    say = (lambda text: None) if said is None else said.append
    return Drawing(config, world, open_data(config.data, "train"), process, say)


def test_the_same_position_gives_the_same_numbers_and_no_random_state_moves(pixels, tmp_path):
    said = []
    with opened_world() as world:
        part, twice = drawing(config_for(pixels, tmp_path), world, said), [trainer_at(16) for _ in range(2)]
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        first = part.run(twice[0])
        again = drawing(config_for(pixels, tmp_path), world).run(twice[1])
        assert torch.equal(before[0], torch.random.get_rng_state()) and before[2] == random.getstate()
        assert np.array_equal(before[1], np.random.get_state()[1])
    assert {k: v for k, v in first.items() if k.endswith(("offline", "share", "image"))} == {
        k: v for k, v in again.items() if k.endswith(("offline", "share", "image"))
    }
    assert first["frechet_offline"] > 0 and first["drawn_images"] == 6 and first["drawn_retained_share"] > 0
    assert said == ["step 2: drawing 6 pictures to measure"]
    record = json.loads((tmp_path / "samples" / "000000000016-evaluation.json").read_text())
    assert record["frechet_offline"] == first["frechet_offline"] and record["classes"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], [16, 32, 48, 64, 80, 96]),
        (["eval.samples_every=32"], [32, 64, 96]),
        (["eval.samples_every=64"], [64, 96]),  # the last one always
        (["eval.samples=0"], []),
        (["eval.every=20"], [24, 40, 64, 80, 96]),  # the first step that reaches a multiple
    ],
)
def test_when_it_draws(pixels, tmp_path, overrides, wanted):
    config = config_for(pixels, tmp_path, *overrides)
    with opened_world() as world:
        part = drawing(config, world)
        every = config.eval.every
        evaluated = [0, *(p for p in range(8, 97, 8) if p == 96 or p // every > (p - 8) // every)]
        assert [p for p in evaluated if part.due(SimpleNamespace(position=p))] == wanted
        if not wanted:
            assert part.run(trainer_at(16)) == {}


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_signal_ends_it_at_the_next_look_and_leaves_nothing(pixels, tmp_path, after):
    """In the reference (two batches), then while drawing."""
    stop = Stop(after)
    with opened_world() as world:
        assert drawing(config_for(pixels, tmp_path), world).run(trainer_at(16, stop=stop)) is None
    assert stop.looks == after + 1 and not (tmp_path / "samples").exists()


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("vae") / "tiny"
    torch.manual_seed(0)
    kind = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **kind
    ).save_pretrained(folder)
    return folder


def test_latents_are_decoded_on_both_sides(vae, tmp_path):
    data = latent_shards(tmp_path / "latents")
    config = config_for(data, tmp_path / "run", f"eval.vae={vae}")
    with opened_world() as world:
        part = drawing(config, world)
        row = part.run(trainer_at(16, channels=4))
        assert part._reference.about["size"] == [2 * SIZE, 2 * SIZE] and row["frechet_offline"] > 0
    check_drawing(config, open_data(config.data), make_process("gaussian"))
    with pytest.raises(UserError, match="eval.vae: the data are latents and do not say of which VAE"):
        check_drawing(config_for(data, tmp_path), open_data(config.data), make_process("gaussian"))
    with pytest.raises(UserError, match="eval.vae: .*does not load as an AutoencoderKL"):
        other = config_for(data, tmp_path, f"eval.vae={tmp_path}")
        check_drawing(other, open_data(config.data), make_process("gaussian"))


@pytest.mark.parametrize("reference", ["heldout", "npz", "folder"])
def test_what_the_reference_may_be(pixels, tmp_path, reference):
    images = np.random.default_rng(0).integers(0, 256, (9, SIZE, SIZE, 3), np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=images)
    names = {"heldout": "heldout", "npz": str(tmp_path / "a.npz"), "folder": str(pixels)}
    config = config_for(pixels, tmp_path, f"eval.reference={names[reference]}", "eval.reference_count=5")
    check_drawing(config, open_data(config.data), make_process("gaussian"))
    with opened_world() as world:
        part = drawing(config, world)
        assert part.run(trainer_at(16))["frechet_offline"] > 0
        assert part._reference.about["count"] == 5
        assert part._reference.about.get("split") == {"heldout": "heldout", "folder": "train"}.get(reference)


@pytest.mark.parametrize(
    ("kind", "overrides", "words"),
    [
        ("gaussian", ["eval.steps=1001"], "eval.steps: .*from 1 to 1000, got 1001"),
        ("gaussian", ["eval.method=dpmpp2m", "eval.steps=1000"], "eval.steps: .*below 1000 with dpmpp2m"),
        ("flow", ["eval.method=dpmpp2m"], "eval.method: .*dpmpp2m needs diffusers"),
        ("flow", ["eval.method=ddpm"], "eval.method: ddpm does not fit flow"),
    ],
)
def test_what_the_sampler_would_refuse_is_one_line_before_anything_runs(
    pixels, tmp_path, monkeypatch, kind, overrides, words
):
    if "needs diffusers" in words:
        for name in ("diffusers", "diffusers.schedulers"):
            monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    elif "dpmpp2m" in words:
        pytest.importorskip("diffusers")
    config = config_for(pixels, tmp_path, *overrides)
    with pytest.raises(UserError, match=words):
        check_drawing(config, open_data(config.data), make_process(kind))


class Sharded(torch.nn.Module):
    """Its weights lie elsewhere than where it computes, as FSDP's do with averages in host memory."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.there = torch.nn.Parameter(torch.empty(1, device="meta"), requires_grad=False)
        self.__dict__["whole"] = model  # no submodule: parameters() does not find it

    def forward(self, *args, **kwargs):
        return self.whole(*args, **kwargs)


def test_weights_that_lie_elsewhere_draw_on_the_process_s_device(pixels, tmp_path):
    with opened_world() as world:
        plain, away = trainer_at(16), trainer_at(16)
        away.ema = Sharded(away.ema)
        rows = [drawing(config_for(pixels, tmp_path), world).run(trainer) for trainer in (plain, away)]
    assert rows[0]["frechet_offline"] == rows[1]["frechet_offline"]


def test_a_reference_of_another_size_is_one_line_before_anything_runs(pixels, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((4, 2 * SIZE, SIZE, 3), np.uint8))
    config = config_for(pixels, tmp_path, f"eval.reference={tmp_path / 'a.npz'}")
    with pytest.raises(UserError, match="eval.reference: its pictures are 8x16, the run's 8x8"):
        check_drawing(config, open_data(config.data), make_process("gaussian"))
    with opened_world() as world, pytest.raises(UserError, match="pictures of one size"):
        drawing(config, world).run(trainer_at(16))
