"""`dcdit prepare`: what it writes, what it leaves alone, what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import prepare
from trainer.data import photos
from trainer.data.manifest import Manifest

for package in ("skimage", "sklearn"):
    pytest.importorskip(package)

SMALL = ["--samples-per-class", "4", "--size", "8"]


def run(*args: str) -> int:
    return prepare.main(["photos", *args])


@pytest.fixture
def to(tmp_path):
    assert run("--to", str(tmp_path / "data"), *SMALL) == 0
    return tmp_path / "data"


def stamp(folder: Path):
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*.zstd")}


def test_writes_both_splits_and_a_manifest(tmp_path, capsys):
    to = tmp_path / "deeper" / "data"
    assert run("--to", str(to), *SMALL) == 0
    manifest = Manifest.read(to)
    classes = len(photos.PHOTOS)
    assert (manifest.kind, manifest.shape, manifest.num_classes) == ("pixels", (3, 8, 8), classes)
    assert manifest.splits == {"train": 4 * classes, "heldout": classes} and manifest.samples == 5 * classes
    assert f"wrote {4 * classes} train and {classes} heldout" in capsys.readouterr().out
    assert [p.name for p in to.parent.iterdir()] == ["data"]  # nothing of the work is left beside it


def test_does_nothing_the_second_time(to, capsys):
    before = stamp(to)
    assert run("--to", str(to), *SMALL) == 0
    assert stamp(to) == before and "already there" in capsys.readouterr().out


def test_mends_a_damaged_data_set(to):
    shard = next((to / "train").glob("*.zstd"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    assert run("--to", str(to), *SMALL) == 0
    assert shard.read_bytes() == whole


def test_other_arguments_need_overwrite(to, capsys):
    before = stamp(to)
    assert run("--to", str(to), *SMALL, "--seed", "5") == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ")
        and error.count("\n") == 1
        and "seed 0" in error
        and "--overwrite" in error
    )
    assert stamp(to) == before
    assert run("--to", str(to), *SMALL, "--seed", "5", "--overwrite") == 0
    assert Manifest.read(to).recipe["seed"] == 5
    assert [p.name for p in to.parent.iterdir()] == ["data"]


@pytest.mark.parametrize("what", ["file", "other folder", "other manifest", "broken manifest"])
def test_never_overwrites_something_else(tmp_path, capsys, what):
    to = tmp_path / "data"
    if what == "file":
        to.write_text("mine")
    else:
        to.mkdir()
        (to / "thesis.tex").write_text("mine")
    if what == "other manifest":
        Manifest("pixels", 3, 8, 8, ("a",), {"train": 1}).write(to)
    if what == "broken manifest":
        (to / "manifest.json").write_text("{")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    assert run("--to", str(to), *SMALL, "--overwrite") == 2
    assert "not overwritten" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("bad", [("--size", "4"), ("--size", "64"), ("--samples-per-class", "0")])
def test_numbers_out_of_range(tmp_path, capsys, bad):
    assert run("--to", str(tmp_path / "x"), *bad) == 2
    assert bad[0] in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_an_interrupted_run_leaves_nothing_half_done(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        yield from list(original(*args))[:2]
        raise KeyboardInterrupt

    original = photos.crops
    monkeypatch.setattr(photos, "crops", interrupted)
    assert run("--to", str(tmp_path / "x"), *SMALL) == 130
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert run("--to", str(tmp_path / "x"), *SMALL) == 0


def test_leftovers_of_a_killed_run_are_cleared(tmp_path):
    part = tmp_path / ".x.part"
    (part / "train").mkdir(parents=True)
    (part / "train" / "shard.00000.mds.zstd").write_bytes(b"half")
    assert run("--to", str(tmp_path / "x"), *SMALL) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_as_a_script_with_help():
    """The file itself can be run, and its help names every option."""
    path = Path(prepare.__file__)
    environment = {**os.environ, "PYTHONPATH": str(path.parents[1])}
    done = subprocess.run(
        [sys.executable, str(path), "photos", "--help"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0
    for option in ("--to", "--samples-per-class", "--size", "--seed", "--overwrite"):
        assert option in done.stdout
    assert "TypeError" not in done.stderr and "%%" not in done.stdout
