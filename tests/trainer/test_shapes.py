"""Shapes beyond the papers' tables: 512 pixels, pixel space, grids that are not square. Each recipe is run as it
stands, with a small model and a few images: prepare, train, sample, report."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import UserError
from tests.trainer.test_prepare_images import picture, vae  # noqa: F401  (a fixture)
from trainer import cli, prepare, train
from trainer.data import Manifest, open_source, photos, train_loader
from trainer.data.listing import centre_crop
from trainer.data.size import join_sizes, parse_size
from trainer.metrics import read_rows

Image = pytest.importorskip("PIL.Image")
RECIPES = Path(train.__file__).parents[1] / "configs" / "recipe"
TINY = [
    "model.overrides={hidden_size: 64, depth: 1, num_heads: 2, enc_dec_dim_factor: 1}", "train.total_images=6",
    "train.global_batch_size=2", "train.precision=fp32", "train.tail_drop_after=2", "data.num_workers=0",
    "eval.every=6", "eval.count=2", "eval.batch_size=2", "checkpoint.every=6", "log.every=1", "log.tensorboard=false",
]  # fmt: skip

# recipe, `--size`, VAE or pixels, shape the model sees, sigma
SHAPES = [
    ("imagenet512_xl", ["--size", "512", "--no-mirror"], True, (4, 64, 64), 2.0),
    ("imagenet256x384_b", ["--size", "256", "384"], True, (4, 32, 48), 1.0),
    ("imagenet64_pixels_s", ["--size", "64", "--vae", "none"], False, (3, 64, 64), 2.0),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shapes") / "pictures"
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for k in range(3):
            picture(10 * k + len(name), (530 + 60 * k, 520)).save(root / name / f"{k}.png")
    return root


@pytest.mark.parametrize("recipe, size, latents, shape, sigma", SHAPES, ids=[s[0] for s in SHAPES])
def test_recipe_from_images_to_report(recipe, size, latents, shape, sigma, pictures, vae, tmp_path, capsys):  # noqa: F811
    data, run = tmp_path / "data", tmp_path / "run"
    words = [
        "images",
        str(pictures),
        "--to",
        str(data),
        *size,
        "--heldout",
        "2",
        "--workers",
        "1",
        "--device",
        "cpu",
    ]
    assert prepare.main(words + (["--vae", str(vae)] if latents else [])) == 0
    manifest = Manifest.read(data)
    assert manifest.shape == shape and manifest.splits == {"train": 4, "heldout": 2}
    assert manifest.kind == ("latents" if latents else "pixels")

    words = [
        "--device",
        "cpu",
        "--config",
        str(RECIPES / f"{recipe}.yaml"),
        f"data.path={data}",
        f"run.dir={run}",
    ]
    assert train.main([*words, *TINY]) == 0
    rows = read_rows(run)
    losses = [row["loss"] for row in rows if not row.get("eval")]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    (held,) = (row for row in rows if row.get("eval") and row["images"] == 6)
    assert math.isfinite(held["heldout_mse"]) and 0 < held["retained_share"] < 1
    exported = json.loads((run / "checkpoints" / "000000000006" / "ema" / "config.json").read_text())[
        "config"
    ]
    assert (exported["in_channels"], *exported["input_size"]) == shape and exported["dechunk_sigma"] == sigma

    to = tmp_path / "sheet.png"
    assert (
        cli.main(["sample", "--checkpoint", str(run), "--classes", "0", "--steps", "2", "--to", str(to)]) == 0
    )
    assert re.search(r"kept [\d.]+% of the tokens", capsys.readouterr().out)
    assert cli.main(["report", str(run), "--steps", "1", "--quick"]) == 0
    page = (run / "report.html").read_text()
    assert f"{shape[0]}×{shape[1]}×{shape[2]}" in page and "Where the tokens go" in page
    assert "note:" not in capsys.readouterr().out


def test_wide_pictures_are_drawn_wide(tmp_path):
    """One cell of the sheet has the shape of the grid, and the router's map on the report too."""
    from tests.trainer.synthetic_run import export, tiny_model

    export(tmp_path / "wide", tiny_model(size=(8, 12)))
    words = ["--classes", "0", "--steps", "2", "--to", str(tmp_path / "a.png")]
    assert cli.main(["sample", "--checkpoint", str(tmp_path / "wide"), *words]) == 0
    assert Image.open(tmp_path / "a.png").size == (
        12 + 12 * 11 + 12,
        12 + 8 * 11 + 26 + 6,
    )  # enlarged 11 times
    from trainer.drawing import Settings, generate, load_source

    drawn = generate(load_source(tmp_path / "wide", "cpu"), [0, 1], Settings(steps=2))
    assert drawn.images.shape == (2, 3, 8, 12) and np.all((0 < drawn.kept) & (drawn.kept <= 1))


# Sizes
WIDE = [(24, 40), (40, 24), (8, 48)]


@pytest.mark.parametrize("text, size", [("256", (256, 256)), ("192x320", (192, 320)), ("24X40", (24, 40))])
def test_sizes_as_typed(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "24x", "x24", "24x40x3", "-8", "24,40"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="--size"):
        parse_size(text)


def test_two_numbers_are_one_size_and_a_folder_is_none():
    assert join_sizes(["images", "--size", "24", "40", "src"]) == ["images", "--size", "24x40", "src"]
    assert join_sizes(["--size", "24", "src", "7"]) == ["--size", "24", "src", "7"]
    assert join_sizes(["--size", "24"]) == ["--size", "24"]


@given(st.integers(9, 400), st.integers(9, 400), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_crop_has_the_shape_asked_for_and_lies_in_the_middle(width, height, rows, columns):
    """A picture that is symmetric left to right and top to bottom stays so, to a pixel of rounding."""
    size = (8 * rows, 8 * columns)
    x, y = np.arange(width), np.arange(height)
    ramp = np.minimum(x, width - 1 - x)[None] + np.minimum(y, height - 1 - y)[:, None]
    grey = (255 * ramp / max(ramp.max(), 1)).astype(np.uint8)
    crop = centre_crop(Image.fromarray(grey), size)
    assert crop.shape == (*size, 3)
    steep = max(int(np.abs(np.diff(crop[..., 0].astype(int), axis=k)).max()) for k in (0, 1))
    for mirrored in (crop[::-1], crop[:, ::-1]):
        assert np.abs(crop.astype(int) - mirrored).max() <= 2 * steep + 2


def test_crop_of_a_picture_of_that_very_shape_is_the_picture():
    original = picture(3, (40, 24))
    assert np.array_equal(centre_crop(original, (24, 40)), np.asarray(original))


@given(
    st.integers(150, 1500),
    st.integers(150, 1500),
    st.sampled_from([(24, 40), (40, 24), (8, 48)]),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_boxes_have_the_shape_and_stay_inside(width, height, shape, seed):
    for region in photos.regions(width, height).values():
        left, top, right, bottom = photos.crop_box(region, np.random.default_rng(seed), shape)
        assert region[0] <= left < right <= region[2] and region[1] <= top < bottom <= region[3]
        assert abs((right - left) * shape[0] - (bottom - top) * shape[1]) < max(shape)


def test_photographs_that_are_not_square(tmp_path, capsys):
    for package in ("skimage", "sklearn"):
        pytest.importorskip(package)
    words = ["photos", "--to", str(tmp_path / "wide"), "--samples-per-class", "2", "--size"]
    assert prepare.main([*words, "16", "24"]) == 0 and "16x24x3" in capsys.readouterr().out
    assert prepare.main([*words, "16x24"]) == 0 and "already there" in capsys.readouterr().out
    assert prepare.main([*words, "24x16"]) == 2 and "--overwrite" in capsys.readouterr().err
    for bad in ("16x64", "4x16", "wide"):
        assert prepare.main([*words, bad]) == 2 and f"--size {bad}" in capsys.readouterr().err
    data = open_source(tmp_path / "wide")
    assert data.manifest.shape == (3, 16, 24) and data[0]["image"].shape == (3, 16, 24)

    loader = train_loader(data, seed=0, global_batch_size=19, end_position=38, label_drop=0.0)
    stored = {data[i]["image"].tobytes(): i for i in range(len(data))}
    turned = 0
    for batch in loader:
        pixels = ((batch["image"] + 1) * 127.5).round().to(torch.uint8).numpy()
        for image in pixels:
            flipped = image.tobytes() not in stored
            assert not flipped or np.ascontiguousarray(image[..., ::-1]).tobytes() in stored
            turned += flipped
    assert 0 < turned < 38
