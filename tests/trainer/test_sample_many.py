"""`dcdit sample --num`: the same pictures from any number of processes and batch size, through kills and signals."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.errors import UserError
from tests.trainer.synthetic_run import SIZE, export, manifest, run_folder, tiny_model
from trainer import cli
from trainer.data import open_source
from trainer.demo import descendants
from trainer.drawing import Settings, generate, in_turn, load_source
from trainer.sampling import bulk
from trainer.sampling.arguments import parser, settings_from
from trainer.sampling.decode import to_pictures
from trainer.sampling.source import as_source, model_hash
from trainer.sampling.store import STATS, Store

ROOT = Path(__file__).resolve().parents[2]
NUM = 22


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("many"))


def command(run, target, *words):
    return ["--checkpoint", str(run), "--number", str(NUM), "--to", str(target), "--steps", "8", *words]


def draw(run, target, *words):
    assert cli.main(["sample", *command(run, target, *words)]) == 0
    return json.loads((target / "sampling.json").read_text())


def pictures(folder):
    files = sorted(folder.glob("*.png"))
    return np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)


@pytest.fixture(scope="module")
def reference(run, tmp_path_factory):
    """One process, batches of 2."""
    folder = tmp_path_factory.mktemp("reference") / "pictures"
    draw(run, folder, "--batch", "2")
    return folder


def torchrun(processes, words):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [sys.executable, *launcher, "trainer/sample.py", *words], cwd=ROOT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_killed_on_two_processes_and_resumed_on_three_gives_the_pictures_of_one(run, reference, tmp_path):
    """Bit for bit: the batches are the same ones, whoever draws them."""
    target = tmp_path / "pictures"
    slow = torchrun(2, command(run, target, "--batch", "2"))
    deadline = time.monotonic() + 120
    while len(list(target.glob(".parts/[0-9]*.npz"))) < 3:
        assert slow.poll() is None and time.monotonic() < deadline, slow.communicate()[0]
        time.sleep(0.005)
    for pid in [slow.pid, *descendants(slow.pid)]:
        os.kill(pid, signal.SIGKILL)
    slow.communicate(timeout=60)
    left = len(list(target.glob(".parts/[0-9]*.npz")))
    assert 3 <= left < NUM // 2 and not (target / "labels.csv").exists()

    (target / ".000000005.png.77.part").write_bytes(b"half a")
    again = torchrun(3, command(run, target, "--batch", "2"))
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    drawn, wanted = pictures(target), pictures(reference)
    assert drawn.shape == wanted.shape == (NUM, SIZE, SIZE, 3)
    assert np.array_equal(drawn, wanted)
    a, b = (json.loads((folder / "sampling.json").read_text()) for folder in (target, reference))
    assert a["complete"] and a["processes"] == 3 and b["processes"] == 1
    assert a["gflops_per_image"] == pytest.approx(b["gflops_per_image"], rel=1e-9)
    assert (target / "labels.csv").read_text() == (reference / "labels.csv").read_text()
    assert not list(target.glob(".*")), "nothing of the killed processes is left"


def test_a_signal_stops_cleanly_and_the_same_command_goes_on(run, reference, tmp_path, monkeypatch, capsys):
    """The signal comes in the middle of a batch of 20 steps: it is given up, not waited for."""
    target, steps = tmp_path / "pictures", []
    say = bulk.Bulk._say

    def interrupting(self, drawn, step):
        steps.append(step)
        if len(steps) == 50:
            os.kill(os.getpid(), signal.SIGTERM)
        say(self, drawn, step)

    monkeypatch.setattr(bulk.Bulk, "_say", interrupting)
    words = [*command(run, target, "--batch", "5"), "--steps", "20"]
    assert cli.main(["sample", *words]) == 75
    assert steps[-1] == 15 and "stopped by SIGTERM" in capsys.readouterr().out
    assert len(list((target / ".parts").glob("*.npz"))) == 2
    assert not json.loads((target / "sampling.json").read_text())["complete"]
    assert cli.main(["sample", *words]) == 0
    whole = tmp_path / "whole"
    assert cli.main(["sample", *command(run, whole, "--batch", "5"), "--steps", "20"]) == 0
    assert np.array_equal(pictures(target), pictures(whole))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_many_are_what_a_sheet_draws(run, reference):
    """Picture i has class i mod 4 and is the (i // 4)-th of it."""
    source = load_source(run, "cpu")
    labels = [i % 4 for i in range(NUM)]
    shots, _ = to_pictures(source, generate(source, labels, Settings(steps=8, batch=2)).images)
    assert np.array_equal(pictures(reference), np.stack(shots))


def test_every_format_holds_the_same_pictures(run, reference, tmp_path):
    wanted = pictures(reference)
    draw(run, tmp_path / "npz", "--batch", "2", "--format", "npz")
    with np.load(tmp_path / "npz" / "samples.npz") as values:
        assert values["arr_0"].dtype == np.uint8 and np.array_equal(values["arr_0"], wanted)
        assert values["arr_1"].tolist() == [i % 4 for i in range(NUM)]
    folder = tmp_path / "tars"
    draw(run, folder / "train", "--batch", "2", "--format", "webdataset", "--shard", "9")
    assert len(list((folder / "train").glob("shard.*.tar"))) == 3
    about = manifest() | {"format": "webdataset", "splits": {"train": NUM}}
    (folder / "manifest.json").write_text(json.dumps(about))
    data = open_source(folder, "train")
    back = [data[i] for i in range(NUM)]
    assert np.array_equal(np.stack([sample["image"] for sample in back]).transpose(0, 2, 3, 1), wanted)
    assert [int(sample["label"]) for sample in back] == [i % 4 for i in range(NUM)]


def test_the_record_says_how_they_were_made(run, reference):
    record = json.loads((reference / "sampling.json").read_text())
    assert (record["method"], record["steps"], record["precision"], record["seed"]) == ("ddpm", 8, "fp32", 0)
    assert record["images_seen"] == 640 and len(record["weights"]) == 32
    assert 0 < record["retained_share"] < 1 and record["retained_share_unconditional"] is None
    assert record["tflops_total"] == pytest.approx(NUM * record["gflops_per_image"] / 1000, abs=1e-3)
    assert record["device_seconds_per_image"] > 0


def test_a_complete_folder_is_left_alone_and_another_setting_refused(run, reference, capsys):
    before = (reference / "000000000.png").stat().st_mtime_ns
    draw(run, reference, "--batch", "5")
    assert "already complete" in capsys.readouterr().out
    assert cli.main(["sample", *command(run, reference), "--guidance", "2"]) == 2
    assert "pictures made with guidance 1.0, now it is 2.0" in capsys.readouterr().err
    assert (reference / "000000000.png").stat().st_mtime_ns == before


def test_every_setting_resumes_from_a_moved_checkpoint_and_other_weights_are_told(run, tmp_path, capsys):
    """JSON has no tuples; and it is the hash of the weights that counts, not their place."""
    here, other = (export(tmp_path / name, tiny_model(seed=k)) for k, name in enumerate(("here", "other")))
    moved = shutil.copytree(here, tmp_path / "moved")
    weak, target = export(tmp_path / "weak", tiny_model(seed=2)), tmp_path / "pictures"
    flags = ["--guidance", "2", "--guidance-interval", "0.1", "0.7", "--guidance-channels", "2", "--eta", "0.5",
             "--method", "ddim", "--autoguidance", str(weak), "--tail-drop", "0:0.6,500:0.2", "--teacache", "0.03",
             "--uncond-tail-drop", "0.5,0.9", "--no-clip", "--classes", "random"]  # fmt: skip
    assert cli.main(["sample", *command(here, target, *flags, "--batch", "8")]) == 0
    record = json.loads((target / "sampling.json").read_text())
    assert None not in [record[key] for key in record if key not in ("vae", "vae_weights", "budget")]
    capsys.readouterr()
    for place in (here, moved, f"{tmp_path}/weak/../moved"):
        assert cli.main(["sample", *command(place, target, *flags)]) == 0
        assert "already complete" in capsys.readouterr().out
    assert cli.main(["sample", *command(other, target, *flags)]) == 2
    assert f"give --checkpoint {here} to go on" in capsys.readouterr().err


def test_holes_of_another_batch_size_are_filled_in_order(run, reference, tmp_path):
    """What is missing need not be in one piece, and the npz is in order all the same. Matrix products of other shapes
    round otherwise, which may move a pixel by a level."""
    target = tmp_path / "npz"
    words = command(run, target, "--batch", "3", "--format", "npz")

    class Enough(Exception):
        pass

    def first_seven(self, *rest, **more):
        if len(list(self.parts.glob("*.npz"))) == 7:
            raise Enough
        return add(self, *rest, **more)

    from trainer.sampling.store import Store

    add = Store.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "add", first_seven)
        with pytest.raises(Enough):
            cli.main(["sample", *words])
    for name in ("000000000", "000000006", "000000015"):
        (target / ".parts" / f"{name}.npz").unlink()
    (target / ".parts" / ".000000003.npz.77").write_bytes(b"half a")
    draw(run, target, "--batch", "5", "--format", "npz")
    with np.load(target / "samples.npz") as values:
        assert np.abs(values["arr_0"].astype(int) - pictures(reference)).max() <= 1


def test_a_batch_that_a_crash_cut_short_is_drawn_again(tmp_path):
    store = Store(tmp_path / "s", "npz", 6, 100)
    store.begin({"weights": "w"})
    for first in (0, 2, 4):
        stats = {name: np.zeros(2) for name in STATS}
        store.add([first, first + 1], [0, 0], np.full((2, 4, 4, 3), first, np.uint8), stats)
    (second, third) = sorted(store.parts.glob("*.npz"))[1:]
    second.write_bytes(b"")
    third.write_bytes(third.read_bytes()[:-200])
    assert store.missing(np.zeros(6, int)).tolist() == [2, 3, 4, 5] and not second.exists()


def test_pictures_that_are_not_finite_are_no_black_ones(tmp_path, capsys):
    model = tiny_model()
    with torch.no_grad():
        model.final_layer.linear.bias[0] = torch.nan
    weights = export(tmp_path / "weights", model)
    words = ["--num", "4", "--steps", "2", "--to", str(tmp_path / "to")]
    assert cli.main(["sample", "--checkpoint", str(weights), *words]) == 2
    error = capsys.readouterr().err
    assert "4 of 4 pictures have values that are not finite, the first is number 0" in error
    assert not list((tmp_path / "to").glob("*.png"))


def test_what_the_model_makes_of_its_weights_is_part_of_what_they_are():
    """`--heads` of a released file changes every picture and not one weight; how it computes changes nothing."""
    model = tiny_model()
    config, before = model.config, model_hash(as_source(model, {}))
    model.config = dataclasses.replace(config, num_heads=4)
    assert model_hash(as_source(model, {})) != before
    model.config = dataclasses.replace(config, ops_backend="torch")
    assert model_hash(as_source(model, {})) == before


def test_a_folder_of_an_older_version_goes_on_unless_its_classes_were_others(
    run, reference, tmp_path, capsys
):
    """Its record has fewer entries."""
    target = shutil.copytree(reference, tmp_path / "older")
    record = json.loads((target / "sampling.json").read_text())
    del record["model"]
    (target / "sampling.json").write_text(json.dumps(record))
    draw(run, target, "--batch", "2")
    assert "already complete" in capsys.readouterr().out
    store = Store(tmp_path / "part", "npz", 4, 100)
    store.begin({"weights": "w"})
    store.add([0, 1], [0, 1], np.zeros((2, 4, 4, 3), np.uint8), {name: np.zeros(2) for name in STATS})
    assert store.missing(np.array([0, 1, 2, 3])).tolist() == [2, 3]
    with pytest.raises(UserError, match="holds pictures of other classes"):
        store.missing(np.array([0, 2, 4, 6]))


@pytest.mark.parametrize(
    ("count", "classes"), [(3, [0, 3, 6]), (10, list(range(10))), (12, [*range(10), 0, 1])]
)
def test_fewer_pictures_than_classes_are_spread_over_them(count, classes):
    assert in_turn(range(10), count) == classes


def test_classes_can_be_chosen_or_drawn(run, tmp_path):
    source = load_source(run, "cpu")
    assert bulk.choose_labels("moon,0", 5, source, 0).tolist() == [2, 0, 2, 0, 2]
    drawn = bulk.choose_labels("random", 4000, source, 3)
    assert np.array_equal(drawn[:10], bulk.choose_labels("random", 10, source, 3))
    assert np.abs(np.bincount(drawn, minlength=4) - 1000).max() < 120


def test_guidance_by_a_weaker_checkpoint(run, tmp_path):
    weak = export(tmp_path / "weak", tiny_model(seed=1))
    flags = ["--batch", "11", "--guidance", "2", "--autoguidance", str(weak), "--uncond-tail-drop", "0.5"]
    record = draw(run, tmp_path / "auto", *flags)
    assert record["autoguidance"] and record["retained_share_unconditional"] < record["retained_share"]
    plain = draw(run, tmp_path / "cfg", "--batch", "11", "--guidance", "2", "--uncond-tail-drop", "0.5")
    assert plain["autoguidance"] is None
    assert np.abs(pictures(tmp_path / "auto") - pictures(tmp_path / "cfg")).max() > 10


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers", reason="the VAE comes from diffusers")
    torch.manual_seed(0)
    made = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    made.save_pretrained(folder := tmp_path_factory.mktemp("vae"))
    return str(folder)


def test_a_vae_that_moved_is_the_same_one(vae, tmp_path, capsys):
    folder = export(tmp_path / "latent", tiny_model(4), data=manifest(4, "latents"))
    shutil.copytree(vae, tmp_path / "copy" / "vae")
    draw(folder, tmp_path / "to", "--vae", vae, "--batch", "11", "--steps", "1")
    draw(folder, tmp_path / "to", "--vae", str(tmp_path / "copy"), "--steps", "1")
    assert "already complete" in capsys.readouterr().out


def test_latents_are_decoded_in_batches_or_refused(vae, tmp_path, capsys):
    folder = export(tmp_path / "latent", tiny_model(4), data=manifest(4, "latents"))
    assert cli.main(["sample", *command(folder, tmp_path / "no")]) == 2
    assert "--vae: this model draws latents" in capsys.readouterr().err
    for name, batch in (("one", "1"), ("four", "4")):
        draw(folder, tmp_path / name, "--vae", vae, "--vae-batch", batch, "--batch", "11")
    assert np.abs(pictures(tmp_path / "one") - pictures(tmp_path / "four")).max() <= 1


def test_a_model_without_router_has_a_cost_and_no_share(tmp_path):
    record = draw(export(tmp_path / "dit", tiny_model(baseline=True)), tmp_path / "pictures")
    assert record["retained_share"] is None and record["gflops_per_image"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num", "0"], "--num: must be at least 1"),
        (["--num", "4"], "--to: give the folder"),
        (["--num", "4", "--to", "a.png"], "with --num it is a folder"),
        (["--num", "4", "--to", "{full}"], "is not empty"),
        (["--num", "4", "--to", "{new}", "--per-class", "2"], "--per-class"),
        (["--num", "4", "--to", "{new}", "--batch", "0"], "--batch"),
        (["--num", "4", "--to", "{new}", "--budget", "60%"], "dcdit sweep"),
        (["--num", "4", "--to", "{new}", "--vae", "x"], "--vae: the model makes pixels"),
        (["--num", "4", "--to", "/proc/nowhere"], "--to: cannot write to /proc/nowhere"),
        (["--format", "npz"], "--format: is for many pictures"),
        (["--classes", "random"], "--classes: random goes with --num"),
        (["--budget", "60%", "--tail-drop", "0.2"], "--budget: chooses the rho"),
        (["--autoguidance", "x"], "--autoguidance: does nothing at --guidance 1"),
        (["--autoguidance", "nowhere", "--guidance", "2"], "--autoguidance: no such file or folder nowhere"),
        (["--guidance", "2", "--guidance-interval", "0.8", "0.1"], "guidance interval"),
        (["--guidance", "2", "--guidance-channels", "4"], "--guidance-channels: 4, the model has 3"),
        (["--num", "4", "--to", "{new}", "--eta", "0.5"], "eta is for the method ddim"),
        (["--tail-drop", "0.5:1"], "--tail-drop: timesteps must begin with 0"),
    ],
)
def test_wrong_arguments_are_one_line(run, words, said, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    places = {"full": tmp_path / "full", "new": tmp_path / "new"}
    words = [word.format(**places) for word in words]
    assert cli.main(["sample", "--checkpoint", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert (tmp_path / "full" / "thesis.tex").exists() and not (tmp_path / "new").exists()


def test_a_sheet_is_not_drawn_by_several_processes(run, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["sample", "--checkpoint", str(run)]) == 2
    assert "--num: a sheet is drawn by one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["--num", "9"], 250),
        (["--num", "9", "--method", "ddim"], 50),
        ([], 50),
        (["--num", "9", "--steps", "7"], 7),
    ],
)
def test_many_take_the_published_number_of_steps(run, words, steps):
    args = parser().parse_args(["--checkpoint", str(run), *words])
    assert settings_from(args, load_source(run, "cpu")).steps == steps
