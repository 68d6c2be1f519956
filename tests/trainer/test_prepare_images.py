"""`dcdit prepare images`: crops, latents, splits, skipped images, and going on after a kill."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from model.errors import UserError
from trainer import prepare
from trainer.data import Manifest, encode, images, open_source
from trainer.data.images import Options, prepare_images
from trainer.data.listing import centre_crop, list_images, reader, split_and_order
from trainer.vae import load_vae

Image = pytest.importorskip("PIL.Image")
ROOT = Path(prepare.__file__).parents[1]
PER_CLASS, CLASSES = 14, ("ant", "bee", "cow")
SMALL = dict(size=32, heldout=6, batch=4, workers=1, device="cpu", vae="none", shard_bytes=8 * 3072)


def picture(k: int, size: tuple[int, int] = (50, 41)):
    """Smooth, with its left and right halves unlike."""
    coarse = np.random.default_rng(k).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures") / "src"
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for k in range(PER_CLASS):
            sides = (40 + 7 * k, 90 - 3 * k)
            picture(100 * label + k, sides).save(root / name / f"{k:02d}.{'png' if k % 3 else 'JPEG'}")
    return root


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> Path:
    """A tiny AutoencoderKL of random weights, latent factor 8."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae") / "tiny"
    diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, scaling_factor=0.25,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def options(source: Path, to: Path, **changes) -> Options:
    return Options(source, to, **(SMALL | changes))


def contents(to: Path) -> dict[str, bytes]:
    return {str(p.relative_to(to)): p.read_bytes() for p in to.rglob("*") if p.is_file()}


def everything(to: Path) -> list[dict]:
    """The samples of both splits; read elsewhere, so that nothing is unpacked in `to`."""
    found = []
    for split in ("train", "heldout"):
        data = open_source(to, split, cache=to.parent / "cache")
        found += [data[i] for i in range(len(data))]
    return found


# The crop


@pytest.mark.parametrize(
    "sides", [(32, 32), (65, 200), (300, 64), (33, 47), (20, 31), (129, 128), (128, 257)]
)
def test_crop_is_the_middle_square(sides):
    crop = centre_crop(picture(0, sides), 32)
    assert crop.shape == (32, 32, 3) and crop.dtype == np.uint8


def test_crop_by_hand():
    """Each step of it: a 4 x 2 grid of blocks is halved exactly; the middle of the long side is kept."""
    grid = np.arange(8, dtype=np.uint8).reshape(2, 4) * 30
    big = Image.fromarray(grid.repeat(16, 0).repeat(16, 1))  # 32 x 64: halves to 16 x 32 and 8 x 16
    crop = centre_crop(big, 8)
    assert (crop[..., 0] == grid.repeat(4, 0).repeat(4, 1)[:, 4:12]).all() and (
        crop[..., 0] == crop[..., 2]
    ).all()
    unscaled = picture(1, (9, 8))
    assert (centre_crop(unscaled, 8) == np.asarray(unscaled)[:, :8]).all()  # an odd rest goes to the right
    grey, alpha = picture(2).convert("L"), picture(2).convert("RGBA")
    assert centre_crop(grey, 16).shape == centre_crop(alpha, 16).shape == (16, 16, 3)


# Listing


def test_listing_and_splits(source):
    listing = list_images(source)
    assert listing.class_names == CLASSES and len(listing.items) == 3 * PER_CLASS and not listing.ignored
    assert all(item.label == CLASSES.index(item.name.split("/")[0]) for item in listing.items)
    splits = split_and_order(listing, 6, seed=0)
    names = {split: [item.name for item in items] for split, items in splits.items()}
    assert len(names["heldout"]) == 6 and sorted(names["train"] + names["heldout"]) == [
        i.name for i in listing.items
    ]
    assert names["train"] != sorted(names["train"])
    other = split_and_order(listing, 6, seed=1)
    assert {i.name for i in other["heldout"]} == set(names["heldout"])  # by name, whatever the seed
    assert [i.name for i in other["train"]] != names["train"]
    assert split_and_order(listing, 6 / 42, seed=0) == splits
    assert {i.name for i in split_and_order(listing, 9, 0)["heldout"]} > set(names["heldout"])
    for bad in (0, 22, 0.9, 1e-9):
        with pytest.raises(UserError, match="--heldout"):
            split_and_order(listing, bad, 0)


@pytest.mark.parametrize("inside", ["", "./", "src/"])
def test_a_tar_lists_as_its_folder_does(source, tmp_path, inside):
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(source, arcname=inside or ".") if inside != "src/" else tar.add(source, arcname="src")
    folder, packed = list_images(source), list_images(path)
    assert [i.name for i in packed.items] == [i.name for i in folder.items]
    assert packed.class_names == folder.class_names
    one, other = reader(source), reader(path)
    assert all(one(a) == other(b) for a, b in zip(folder.items, packed.items, strict=True))


def test_what_is_no_image_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder or tar"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images in it"):
        list_images(tmp_path)
    picture(0).save(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="a.jpg is in no class folder"):
        list_images(tmp_path)
    (tmp_path / "a.jpg").unlink()
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    picture(0).save(tmp_path / "x" / "0.jpg")
    (tmp_path / "x" / ".0.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="class folder y has no images"):
        list_images(tmp_path)
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b not a tar")
    with pytest.raises(UserError, match="unpacked first"):
        list_images(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "outer.tar", "w") as tar:
        tar.add(tmp_path / "x.tar", arcname="n01440764.tar")
    with pytest.raises(UserError, match="tar of tars"):
        list_images(tmp_path / "outer.tar")


# What is written


@pytest.mark.parametrize("format", ["mds", "webdataset"])
def test_pixels_in_either_format(source, tmp_path, format):
    manifest, written, skipped = prepare_images(options(source, tmp_path / "out", format=format))
    assert written and not skipped and manifest == Manifest.read(tmp_path / "out")
    assert (manifest.kind, manifest.shape, manifest.format) == ("pixels", (3, 32, 32), format)
    assert manifest.splits == {"train": 36, "heldout": 6} and manifest.class_names == CLASSES
    assert len(open_source(tmp_path / "out").shard_sizes) == 5
    assert set(os.listdir(tmp_path / "out")) == {"manifest.json", "train", "heldout"}
    wanted = {}
    for item in list_images(source).items:
        with Image.open(source / item.name) as image:
            wanted[centre_crop(image, 32).tobytes()] = item.label
    rows = everything(tmp_path / "out")
    assert {r["image"].transpose(1, 2, 0).tobytes(): r["label"] for r in rows} == wanted


def test_latents_of_both_orientations(source, vae, tmp_path):
    """mean and std are the VAE's of the crop and of its mirror image; the mean decodes to a picture."""
    manifest, _, _ = prepare_images(options(source, tmp_path / "out", vae=str(vae), shard_bytes=8 * 512))
    assert (manifest.kind, manifest.shape, manifest.scale) == ("latents", (4, 4, 4), 0.25)
    assert (
        manifest.vae == str(vae) and manifest.flip is None and set(manifest.checksums) == {"train", "heldout"}
    )
    data = open_source(tmp_path / "out")
    first = split_and_order(list_images(source), 6, 0)["train"][0]
    model = load_vae(str(vae))
    with Image.open(source / first.name) as image:
        crop = centre_crop(image, 32)
    x = torch.from_numpy(crop.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    for flipped, ending in ((x, ""), (x.flip(3), "_flip")):
        latents = model.encode(flipped).latent_dist
        for name, value in (("mean", latents.mean), ("std", latents.std)):
            stored = data[0][name + ending]
            assert stored.dtype == np.float16 and np.allclose(stored, value[0].numpy(), rtol=2e-3, atol=2e-3)
    assert not np.allclose(data[0]["mean_flip"], data[0]["mean"][..., ::-1], atol=1e-3)
    decoded = model.decode(torch.from_numpy(data[0]["mean"].astype(np.float32))[None]).sample
    assert decoded.shape == (1, 3, 32, 32) and decoded.isfinite().all()


def test_scale_and_no_mirror(source, vae, tmp_path):
    manifest, _, _ = prepare_images(options(source, tmp_path / "out", vae=str(vae), scale=0.5, mirror=False))
    assert manifest.scale == 0.5 and manifest.flip == ()
    assert set(open_source(tmp_path / "out")[0]) == {"mean", "std", "label"}


def test_training_on_latents(source, vae, tmp_path, capsys):
    """Two steps of the real trainer, on either format; the same samples give the same losses."""
    from tests.distributed.conftest import SMALL as RUN
    from trainer.metrics import read_rows
    from trainer.train import main

    losses = []
    for format in ("mds", "webdataset"):
        to, run = tmp_path / format, tmp_path / f"run-{format}"
        prepare_images(options(source, to, vae=str(vae), size=64, format=format))
        config = ["--device", "cpu", "--config", str(ROOT / "configs/recipe/demo.yaml"), *RUN]
        config += [f"data.path={to}", f"run.dir={run}", f"data.format={format}", "train.total_images=16"]
        assert main([*config, "parallel.engine=ddp"]) == 0, capsys.readouterr().err
        losses.append([row["loss"] for row in read_rows(run) if "loss" in row])
    assert len(losses[0]) == 2 and losses[0] == losses[1] and np.isfinite(losses).all()


# Images that cannot be used


@pytest.fixture
def flawed(source, tmp_path) -> Path:
    """The images, two of them broken."""
    root = tmp_path / "flawed"
    for path in source.rglob("*.*"):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        (root / path.parent.name / path.name).write_bytes(path.read_bytes())
    (root / "ant" / "00.JPEG").write_bytes((root / "ant" / "00.JPEG").read_bytes()[:300])
    (root / "cow" / "05.png").write_bytes(b"this is a web page")
    return root


def test_broken_images_are_skipped_and_listed(flawed, tmp_path, capsys):
    arguments = ["images", str(flawed), "--to", str(tmp_path / "out"), "--size", "32", "--vae", "none"]
    arguments += ["--heldout", "6", "--workers", "1", "--shard-mb", "0.02"]
    assert prepare.main([*arguments, "--max-errors", "1"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --max-errors 1: 2 images of") and message.count("\n") == 1
    listed = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in listed) == ["ant/00.JPEG", "cow/05.png"]
    assert prepare.main(arguments) == 0  # goes on from there
    output = capsys.readouterr()
    assert "skipped 2 images" in output.err and "40" in str(Manifest.read(tmp_path / "out").samples)
    assert len(everything(tmp_path / "out")) == 40
    assert prepare.main(arguments) == 0 and "already there" in capsys.readouterr().out


def test_latents_that_are_not_finite_are_skipped(source, vae, tmp_path, monkeypatch):
    model = load_vae(str(vae))
    model.encoder.conv_in.weight.data[0] = float("nan")
    made = encode.Latents(model)([np.zeros((32, 32, 3), np.uint8)] * 2)
    assert made == ["its latents are not finite"] * 2


# Killed, resumed, refused


def command(source: Path, to: Path, vae: str, *more: str) -> list[str]:
    return [
        sys.executable, str(ROOT / "trainer" / "prepare.py"), "images", str(source), "--to", str(to), "--size", "64",
        "--vae", vae, "--heldout", "6", "--batch", "2", "--device", "cpu", "--shard-mb", "0.008", *more,
    ]  # fmt: skip


def gone(group: int) -> None:
    """Wait for the end of every process of the group: workers whose main process was killed."""
    deadline = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_started_again_gives_the_same_bytes(source, vae, tmp_path, workers):
    """Also with workers that still run when the work goes on, in one process."""
    whole = options(
        source, tmp_path / "whole", vae=str(vae), size=64, batch=2, shard_bytes=int(0.008 * (1 << 20))
    )
    prepare_images(whole)
    # On a busy machine the kill can come too late: then once more, elsewhere.
    attempts = (killed_midway(source, tmp_path / f"killed-{n}", vae, workers) for n in range(5))
    to, pid, kept = next(filter(None, attempts))
    assert (to / "progress.json").is_file() and not (to / "manifest.json").exists()
    with pytest.raises(UserError, match="no manifest.json"):
        open_source(to)
    prepare_images(options(source, to, vae=str(vae), size=64, batch=2, shard_bytes=int(0.008 * (1 << 20))))
    gone(pid)
    assert contents(to) == contents(tmp_path / "whole")
    if workers == 1:
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in list(kept.items())[:2])


def killed_midway(source, to, vae, workers):
    """(folder, process id, finished shards with their times) of a preparation killed after some of its 12 shards, or
    None if it was through before."""
    process = subprocess.Popen(
        command(source, to, str(vae), "--workers", str(workers)),
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list(to.rglob(".shard.*.json"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()  # only it: its workers find out by themselves
    assert process.wait() in (0, -signal.SIGKILL)
    kept = {path: path.stat().st_mtime_ns for path in to.rglob("shard.*.zstd")}
    return (to, process.pid, kept) if 3 <= len(kept) < 12 and not (to / "manifest.json").exists() else None


@pytest.mark.parametrize("point", ["write_index", "Manifest.write", "_tidy"])
def test_killed_while_finishing(source, tmp_path, monkeypatch, point):
    prepare_images(options(source, tmp_path / "whole"))
    owner, name = (images, point) if "." not in point else (Manifest, "write")

    def dies(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(KeyboardInterrupt):
            prepare_images(options(source, tmp_path / "out"))
    prepare_images(options(source, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_part_that_was_damaged_is_made_again(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(images, "write_index", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_images(options(source, tmp_path / "out"))
    shard = tmp_path / "out" / "train" / "shard.00001.mds.zstd"
    shard.write_bytes(shard.read_bytes()[:50])
    prepare_images(options(source, tmp_path / "out"))
    assert len(everything(tmp_path / "out")) == 42


def test_other_arguments_or_images_need_overwrite(source, flawed, tmp_path):
    to = tmp_path / "out"
    prepare_images(options(source, to))
    before = contents(to)
    with pytest.raises(UserError, match=r"size 32 \(now 16\).*--overwrite"):
        prepare_images(options(source, to, size=16))
    with pytest.raises(UserError, match="complete with source"):
        prepare_images(options(flawed, to))
    assert contents(to) == before and not prepare_images(options(source, to, batch=3, workers=2))[1]
    assert prepare_images(options(source, to, size=16, overwrite=True))[0].height == 16
    (to / "train" / "shard.00000.mds.zstd").unlink()
    with pytest.raises(UserError, match="shard.00000.mds.*missing.*--overwrite"):
        prepare_images(options(source, to, size=16))
    assert prepare_images(options(source, to, size=16, overwrite=True))[1]


def test_interrupted_while_replacing(source, tmp_path, monkeypatch):
    """The folder is still known as ours, and can be replaced."""
    to = tmp_path / "out"
    prepare_images(options(source, to))
    with monkeypatch.context() as patch:
        patch.setattr(
            images.shutil, "rmtree", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            prepare_images(options(source, to, size=16, overwrite=True))
    assert prepare_images(options(source, to, size=16, overwrite=True))[0].height == 16
    assert open_source(to)[0]["image"].shape == (3, 16, 16)


def test_changed_source_is_noticed(flawed, tmp_path):
    prepare_images(options(flawed, tmp_path / "out"))
    picture(1).save(flawed / "bee" / "new.png")
    with pytest.raises(UserError, match="images 42 .now 43."):
        prepare_images(options(flawed, tmp_path / "out"))


def test_never_overwrites_something_else(source, tmp_path):
    to = tmp_path / "thesis"
    to.mkdir()
    (to / "thesis.tex").write_text("mine")
    for content in (None, '{"recipe": {"command": "photos"}}', "{"):
        if content:
            (to / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="something else, not overwritten"):
            prepare_images(options(source, to, overwrite=True))
    assert (to / "thesis.tex").read_text() == "mine"
    with pytest.raises(UserError, match="is a file"):
        prepare_images(options(source, to / "thesis.tex"))
    with pytest.raises(UserError, match="lies inside"):
        prepare_images(options(source, source / "out"))


def test_two_at_once(source, tmp_path):
    with images.claimed(tmp_path / "out"), pytest.raises(UserError, match="another `dcdit prepare`"):
        prepare_images(options(source, tmp_path / "out"))


@pytest.mark.parametrize(
    "change, match",
    [
        ({"size": 30}, "--size 30: a multiple of 8"),
        ({"batch": 0}, "--batch 0"),
        ({"workers": 0}, "--workers 0"),
        ({"shard_bytes": 0}, "--shard-mb 0"),
        ({"max_errors": -1}, "--max-errors"),
        ({"scale": 0.5}, "--scale 0.5.*latents only"),
        ({"device": "cuda:99", "vae": "none"}, "--device cuda:99: cannot be used"),
        ({"vae": "./nowhere"}, "--vae: ./nowhere: no such folder.*--vae none"),
        ({"vae": str(ROOT)}, "does not load as an AutoencoderKL.*--vae none"),
    ],
)
def test_bad_options(source, tmp_path, change, match):
    with pytest.raises(UserError, match=match) as caught:
        prepare_images(options(source, tmp_path / "out", **change))
    assert "\n" not in str(caught.value) and not list((tmp_path).rglob("*.zstd"))


@pytest.mark.parametrize("flag", ["--scale", "--heldout", "--shard-mb"])
def test_a_number_that_is_none(source, tmp_path, flag, capsys):
    for word in ("nan", "inf"):
        assert prepare.main(["images", str(source), "--to", str(tmp_path / "out"), flag, word]) == 2
        assert capsys.readouterr().err == f"error: {flag} {word}: a finite number\n"


def test_a_size_the_vae_does_not_divide(vae):
    model = load_vae(str(vae))
    assert encode.latent_shape(model, 40) == (4, 5, 5)
    with pytest.raises(UserError, match="--size 44: this VAE needs a multiple of 8: 40"):
        encode.latent_shape(model, 44)


def test_a_hub_that_cannot_be_reached(source, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")

    def offline(name, **kwargs):
        raise OSError(f"We couldn't connect to the hub to load {name}.\nmore\nlines")

    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", offline)
    with pytest.raises(
        UserError, match="stabilityai/sd-vae-ft-ema.*couldn't connect.*local folder"
    ) as caught:
        prepare_images(options(source, tmp_path / "out", vae=encode.DEFAULT_VAE))
    assert "\n" not in str(caught.value)


def test_no_room_is_one_clear_line(source, tmp_path, monkeypatch):
    import errno

    from trainer.data import workforce

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(workforce, "write_shard", full)
    with pytest.raises(UserError, match="No space left on device: make room; the same command goes on"):
        prepare_images(options(source, tmp_path / "out"))
    monkeypatch.undo()
    assert prepare_images(options(source, tmp_path / "out"))[1]


def test_progress_in_a_log(capsys, monkeypatch):
    monkeypatch.setattr(prepare._Progress, "SECONDS", 0.0)
    with prepare._Progress("image") as progress:
        progress(40, 100)
        progress(60, 100, 2)
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[0] == "images: 40 of 100"
        and lines[1].startswith("images: 60 of 100, ")
        and "2 skipped" in lines[1]
    )


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        prepare.main(["images", "--help"])
    text = capsys.readouterr().out
    names = (
        "to size vae scale no-mirror heldout format shard-mb seed workers device batch max-errors overwrite"
    )
    assert all(f"--{name}" in text for name in names.split())


def test_the_manifest_in_progress_names_the_work(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(images.Ledger, "add", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert_interrupted(source, tmp_path / "out")
    progress = json.loads((tmp_path / "out" / "progress.json").read_text())
    assert progress["recipe"]["command"] == "images" and progress["parts"] == 6


def assert_interrupted(source: Path, to: Path) -> None:
    arguments = ["images", str(source), "--to", str(to), "--size", "32", "--vae", "none", "--heldout", "6"]
    with pytest.raises(SystemExit) as caught:
        prepare.main([*arguments, "--workers", "1", "--shard-mb", "0.0235"])
    assert caught.value.code == 130
