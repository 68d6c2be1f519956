"""Wrong input ends in one line that names the key or the file, status 2, before any work; nothing is lost."""

import shutil

import pytest

from trainer.config import load_config
from trainer.train import check, main

RECIPE = "configs/recipe/demo.yaml"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    from trainer.prepare import main as prepare

    folder = tmp_path_factory.mktemp("data") / "photos"
    assert prepare(["photos", "--to", str(folder), "--samples-per-class", "4", "--size", "12"]) == 0
    return folder


def complaint(capsys, *arguments: str) -> str:
    """The one line on stderr of a call that must fail with status 2."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.globl_batch_size=8"], ["train.globl_batch_size", "train.global_batch_size"]),
        (["train.global_batch_size=eight"], ["train.global_batch_size", "eight"]),
        (["model.preset=DC-DiT-M"], ["DC-DiT-M"]),
        (["model.overrides={detph: 3}"], ["detph", "depth"]),
        (["model.overrides={hidden_size: 100}"], ["hidden_size"]),
        (["model.overrides={input_size: 16}"], ["model.overrides.input_size", "(12, 12)"]),
        (["model.overrides={target_ratio: 8}"], ["model.overrides.target_ratio", "model.target_ratio"]),
        (["model.preset=DiT-Ti/8"], ["patch", "12"]),
        (["attention.backend=flash3"], ["flash3"]),
        (["train.micro_batch_size=5"], ["train.micro_batch_size"]),
        (["parallel.replicate=2"], ["parallel.replicate"]),
        (["checkpoint.resume_from=/nowhere"], ["/nowhere"]),
        (["diffusion.num_timesteps=3"], ["num_timesteps"]),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else None,
)
def test_configuration(capsys, shards, tmp_path, overrides, words):
    line = complaint(
        capsys, "--config", RECIPE, f"data.path={shards}", f"run.dir={tmp_path / 'run'}", *overrides
    )
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists(), "nothing is written before the input is right"


def test_batch_that_does_not_divide_over_the_processes(capsys, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("trainer.parallel.world.time.sleep", lambda seconds: None)
    run = f"run.dir={tmp_path / 'run'}"
    line = complaint(capsys, "--config", RECIPE, f"data.path={shards}", run, "train.global_batch_size=32")
    assert "train.global_batch_size" in line and "3 processes" in line and "33" in line


def test_missing_and_damaged_shards(capsys, shards, tmp_path):
    run = f"run.dir={tmp_path / 'run'}"
    line = complaint(capsys, "--config", RECIPE, f"data.path={tmp_path / 'none'}", run)
    assert str(tmp_path / "none") in line and "dcdit prepare" in line
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    shard = next((copy / "train").glob("shard*.zstd"))
    shard.with_suffix("").unlink(missing_ok=True)  # what was unpacked from it would do as well
    shard.write_bytes(shard.read_bytes()[:-20])
    line = complaint(capsys, "--config", RECIPE, f"data.path={copy}", run)
    assert shard.name in line
    shard.unlink()
    line = complaint(capsys, "--config", RECIPE, f"data.path={copy}", run)
    assert shard.name in line
    assert not (tmp_path / "run").exists()


def test_run_dir_that_is_a_file(capsys, shards, tmp_path):
    (tmp_path / "file").write_text("mine")
    line = complaint(capsys, "--config", RECIPE, f"data.path={shards}", f"run.dir={tmp_path / 'file'}")
    assert "run.dir" in line and (tmp_path / "file").read_text() == "mine"


def test_wandb_online_without_a_key(capsys, shards, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    line = complaint(
        capsys, "--config", RECIPE, f"data.path={shards}", f"run.dir={tmp_path / 'run'}", "log.wandb=online"
    )
    assert "log.wandb" in line and "WANDB_API_KEY" in line


def test_a_ratio_loss_over_fewer_images_is_said(capsys, shards, tmp_path):
    words = [
        f"data.path={shards}",
        f"run.dir={tmp_path}",
        "train.global_batch_size=32",
        "train.ratio_group=16",
    ]
    for micro, said in ((4, True), (16, False)):
        check(load_config(RECIPE, [*words, f"train.micro_batch_size={micro}"]), "cpu")
        assert ("train.ratio_group: micro-batches of 4 images" in capsys.readouterr().out) == said
