"""`dcdit evaluate` on a small run: drawn now or before, by one process or two, against data or an ADM file."""

import json
import os
import re
import socket
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.errors import UserError
from tests.trainer.evaluation.test_features import fidelity, inception_file  # noqa: F401  (a fixture)
from tests.trainer.synthetic_run import CLASSES, SIZE, export, mds, run_folder, tiny_model
from trainer import cli, evaluate
from trainer.evaluation import features
from trainer.evaluation.collect import Collector, collect, rounds
from trainer.evaluation.frechet import frechet_distance
from trainer.evaluation.images import Npz, Pictures
from trainer.evaluation.reference import load_reference
from trainer.evaluation.scores import InceptionScore, precision_recall
from trainer.parallel import World, close_world, open_world, world
from trainer.pictures import save_png

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    return run_folder(root, data=mds(root / "data", 24))


@contextmanager
def opened_world():
    try:
        yield open_world(device="cpu")
    finally:
        close_world()


def arguments(run, *more: str) -> list[str]:
    asked = "--number 18 --steps 2 --features offline --device cpu".split()
    return ["--checkpoint", str(run), *asked, *more]


def result(run) -> dict:
    (file,) = (run / "evaluation").glob("*.json")
    record = json.loads(file.read_text())
    file.unlink()
    return record


def numbers(record: dict) -> dict:
    found = {key: value for key, value in record["metrics"].items() if value is not None}
    assert found.keys() >= {"frechet", "precision", "recall"}
    return found


def test_kept_pictures_are_of_one_kind(run, tmp_path, capsys):
    """The same command may keep them again; other settings, or a folder of `dcdit sample`, are left as they are."""
    kept, drawn = tmp_path / "kept", tmp_path / "drawn"
    assert cli.main(["evaluate", *arguments(run, "--keep", str(kept))]) == 0
    assert cli.main(["evaluate", *arguments(run, "--keep", str(kept))]) == 0
    assert (
        cli.main(["sample", "--checkpoint", str(run), "--num", "18", "--steps", "2", "--to", str(drawn)]) == 0
    )
    before = {
        file: file.read_bytes() for folder in (kept, drawn) for file in folder.iterdir() if file.is_file()
    }
    for folder in (kept, drawn):
        assert cli.main(["evaluate", *arguments(run, "--keep", str(folder), "--seed", "7")]) == 2
        assert f"--keep: {folder} holds other pictures" in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in before}


@pytest.mark.parametrize("layout", ["in turn", "one after the other"])
def test_a_part_of_the_pictures_has_every_class(layout):
    """Of 19 classes; in data of classes in turn an even stride of 10 would meet one class alone."""
    labels = np.arange(1900) % 19 if layout == "in turn" else np.arange(1900) // 100
    taken = []

    class Counted(Pictures):
        def read(self, numbers):
            taken.extend(numbers)
            return np.zeros((len(numbers), 3, 16, 16), np.uint8)

    with opened_world() as world:
        collect(Counted(1900, {}), features.load("offline"), world, 190)
        assert len(taken) == len(set(taken)) == 190
        assert np.bincount(labels[taken], minlength=19).min() >= 3
        taken.clear()
        collect(Counted(30, {}), features.load("offline"), world)
        assert sorted(taken) == list(range(30))


def test_drawn_now_is_drawn_before(run, tmp_path, capsys):
    """The same numbers from --checkpoint, from what it keeps, and from `dcdit sample` in each of its forms."""
    assert cli.main(["evaluate", *arguments(run, "--keep", str(tmp_path / "kept"))]) == 0
    shown = capsys.readouterr().out
    drawn = result(run)
    assert (
        drawn["count"] == 18 and drawn["reference"]["count"] == 24 and drawn["reference"]["split"] == "train"
    )
    assert drawn["settings"]["steps"] == 2 and drawn["settings"]["seed"] == 0 and drawn["images_seen"] == 640
    assert 0 < drawn["retained_share"] < 1 and drawn["gflops_per_image"] > 0 and drawn["images_per_s"] > 0
    assert drawn["metrics"]["frechet"] > 0 and 0 <= drawn["metrics"]["recall"] <= 1
    assert f"{drawn['metrics']['frechet']:.4f}" in shown and "compares with itself alone" in shown
    assert len(list((tmp_path / "kept").glob("*.png"))) == 18
    data = str(run.parent / "data")
    for form in ("png", "npz", "webdataset"):
        to = tmp_path / form
        asked = ["--checkpoint", str(run), "--num", "18", "--steps", "2", "--to", str(to), "--format", form]
        assert cli.main(["sample", *asked, "--device", "cpu", "--shard", "7"]) == 0
        assert cli.main(["evaluate", "--samples", str(to), "--reference", data, "--features", "offline"]) == 0
        (file,) = tmp_path.glob(f"{form}-offline-18-*.json")
        before = json.loads(file.read_text())
        assert numbers(before) == pytest.approx(numbers(drawn), rel=1e-5), form
        assert before["sampling"]["retained_share"] == pytest.approx(drawn["retained_share"], abs=1e-5)
    kept = ["--samples", str(tmp_path / "kept"), "--reference", data, "--features", "offline", "--num", "9"]
    assert cli.main(["evaluate", *kept, "--to", str(tmp_path / "half.json")]) == 0
    assert json.loads((tmp_path / "half.json").read_text())["count"] == 9


def test_two_processes_give_the_numbers_of_one(run, tmp_path):
    assert cli.main(["evaluate", *arguments(run, "--batch", "4")]) == 0
    one = result(run)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, "trainer/evaluate.py", *arguments(run, "--batch", "5")], cwd=ROOT, text=True,
        capture_output=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    two = result(run)
    assert two["processes"] == 2 and two["count"] == one["count"]
    assert numbers(two) == pytest.approx(numbers(one), rel=1e-4)
    for key in ("retained_share", "gflops_per_image"):
        assert two[key] == pytest.approx(one[key], rel=1e-6)


def _evaluate(rank: int, port: int, argv: list[str], folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world.time.sleep = lambda seconds: None  # of a rank that lets rank 0 speak first
    with open(f"{folder}/{rank}.txt", "w") as said, redirect_stderr(said):
        status = cli.main(["evaluate", *argv])
        print(status, file=said)


@pytest.mark.parametrize("problem", ["picture", "keep"])
def test_what_fails_for_one_process_is_one_line_on_all(run, tmp_path, monkeypatch, problem):
    if problem == "picture":  # the last of four is rank 1's
        (tmp_path / "some").mkdir()
        for k in range(4):
            save_png(np.full((SIZE, SIZE, 3), 50 * k, np.uint8), tmp_path / "some" / f"{k}.png")
        (tmp_path / "some" / "3.png").write_bytes(b"no picture")
        argv = [
            "--samples",
            str(tmp_path / "some"),
            "--reference",
            str(run.parent / "data"),
            "--features",
            "offline",
        ]
        words = "3.png cannot be read as a picture"
    else:
        (tmp_path / "kept" / "000000003.png").mkdir(parents=True)  # its place is taken
        argv = [*arguments(run, "--number", "4"), "--keep", str(tmp_path / "kept")]
        words = "--keep: cannot write to .*kept"
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    torch.multiprocessing.start_processes(
        _evaluate, (port, argv, str(tmp_path)), nprocs=2, start_method="fork"
    )
    for rank in range(2):
        line, status = (tmp_path / f"{rank}.txt").read_text().splitlines()
        assert re.search(words, line) and status == "2"


@pytest.mark.parametrize(
    ("count", "batch", "size"), [(10, 4, 1), (10, 4, 3), (7, 100, 2), (1, 1, 4), (12, 3, 2)]
)
def test_every_process_has_as_many_batches_of_one_size_and_each_picture_counts_once(count, batch, size):
    each = [list(rounds(count, batch, World(rank, size, 0, None))) for rank in range(size)]
    assert len({len(part) for part in each}) == 1
    assert len({len(numbers) for part in each for numbers, _ in part}) == 1
    counted = [k for part in each for numbers, real in part for k in numbers[:real].tolist()]
    assert sorted(counted) == list(range(count))


@fidelity
def test_adm_files_with_inception(run, inception_file, tmp_path, monkeypatch):  # noqa: F811
    """FID from the statistics of an ADM file, precision and recall from its pictures; the inception score."""
    random = np.random.default_rng(0)
    real, drawn = (random.integers(0, 256, (6, 16, 16, 3), np.uint8) for _ in range(2))
    np.savez(tmp_path / "real.npz", arr_0=real)
    np.savez(tmp_path / "drawn.npz", arr_0=drawn)
    network = features.load("inception", inception_file)
    found = [Collector(network, 6) for _ in range(2)]
    for one, images in zip(found, (real, drawn), strict=True):
        one.add(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), np.arange(6))
    statistics = dict(mu=found[0].moments.mean.numpy(), sigma=found[0].moments.cov.numpy() * 1.25)
    np.savez(tmp_path / "adm.npz", arr_0=real, **statistics)
    spatial = dict(mu_s=found[0].spatial.mean.numpy(), sigma_s=found[0].spatial.cov.numpy())
    np.savez(tmp_path / "bare.npz", **statistics, **spatial)
    asked = ["--samples", str(tmp_path / "drawn.npz"), "--features-path", str(inception_file), "--to",
             str(tmp_path / "out.json"), "--batch", "6"]  # fmt: skip

    assert cli.main(["evaluate", *asked, "--reference", str(tmp_path / "adm.npz")]) == 0
    adm = json.loads((tmp_path / "out.json").read_text())
    mean, cov = statistics["mu"], statistics["sigma"]
    # The same distance in the few directions that twelve pictures span.
    kept = [network.batch(images.transpose(0, 3, 1, 2)).double().numpy() for images in (real, drawn)]
    span = np.linalg.qr(np.concatenate(kept).T)[0]
    small = (
        [(features @ span).mean(0) for features in kept],
        [np.cov((features @ span).T) for features in kept],
    )
    wanted = frechet_distance(small[0][0], 1.25 * small[1][0], small[0][1], small[1][1])
    assert adm["metrics"]["frechet"] == pytest.approx(wanted, rel=1e-4), (
        "from mu and sigma, not from the pictures"
    )
    assert adm["metrics"]["sfid"] is None and adm["metrics"]["inception_score"] > 1
    assert adm["metrics"]["precision"] is not None and adm["reference"]["kind"] == "ADM statistics"

    with opened_world() as world:
        bare = load_reference(tmp_path / "bare.npz", network, world, None, keep=True)
        assert bare.kept is None and np.array_equal(bare.cov, cov)
        assert all(np.array_equal(a, b) for a, b in zip(bare.spatial, spatial.values(), strict=True))
        pictures = load_reference(
            tmp_path / "real.npz", network, world, lambda: Npz(tmp_path / "real.npz"), keep=True
        )
    np.testing.assert_allclose(pictures.mean, mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(pictures.cov * 1.25, cov, rtol=1e-3, atol=1e-7)
    assert pictures.kept.shape == (6, 2048) and pictures.about["count"] == 6


class Quadrants(features.FeatureSet):
    """A small set with everything Inception's has: mean colours, red quadrants, and colours as logits."""

    name, dim, spatial_dim, classes = "inception", 3, 4, 3

    def _extract(self, images):
        mean = images.float().mean((2, 3)) / 255
        corners = torch.nn.functional.adaptive_avg_pool2d(images[:, 0].float() / 255, 2).flatten(1)
        return features.Extracted(mean, corners, 4 * mean)


def test_every_number_is_of_its_own_outputs(tmp_path):
    random = np.random.default_rng(1)
    real, drawn = (random.integers(low, 256, (30, 8, 8, 3), np.uint8) for low in (0, 40))
    np.savez(tmp_path / "real.npz", arr_0=real)
    network = Quadrants({})
    outputs = [network.extract(images.transpose(0, 3, 1, 2)) for images in (real, drawn)]
    with opened_world() as world:
        path = tmp_path / "real.npz"
        reference = load_reference(path, network, world, lambda: Npz(path), batch=7, keep=True)
        found = Collector(network, 30, keep=True)
        for part in np.array_split(random.permutation(30), 4):
            found.add(np.ascontiguousarray(drawn[part].transpose(0, 3, 1, 2)), part)
        found.reduce(world)
        got = reference.compare(found)
    for key, name in (("frechet", "features"), ("sfid", "spatial")):
        a, b = (getattr(out, name).double() for out in outputs)
        assert got[key] == pytest.approx(
            frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()), rel=1e-9
        ), key
    score = InceptionScore(3, 30)
    score.add(outputs[1].logits, range(30))
    assert (got["inception_score"], got["inception_score_std"]) == pytest.approx(score.value(), rel=1e-9)
    wanted = precision_recall(outputs[0].features, outputs[1].features)
    assert (got["precision"], got["recall"]) == pytest.approx(wanted)


def test_statistics_of_other_features_are_refused_and_pictures_of_an_adm_file_used(run, tmp_path, capsys):
    np.savez(tmp_path / "bare.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    asked = [
        "--samples",
        str(run.parent / "data"),
        "--reference",
        str(tmp_path / "bare.npz"),
        "--features",
        "offline",
    ]
    assert cli.main(["evaluate", *asked]) == 2
    assert "statistics of 2048 Inception features" in capsys.readouterr().err
    images = np.random.default_rng(0).integers(0, 256, (9, SIZE, SIZE, 3), np.uint8)
    np.savez(tmp_path / "bare.npz", mu=np.zeros(2048), sigma=np.eye(2048), arr_0=images)
    assert cli.main(["evaluate", *asked, "--to", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["reference"]["count"] == 9


def test_pictures_of_two_sizes_do_not_compare_offline(run, tmp_path, capsys):
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((4, 2 * SIZE, SIZE, 3), np.uint8))
    asked = [
        "--samples",
        str(tmp_path / "large.npz"),
        "--reference",
        str(run.parent / "data"),
        "--features",
        "offline",
    ]
    assert cli.main(["evaluate", *asked]) == 2
    assert f"its pictures are {SIZE}x{SIZE}, the samples {SIZE}x{2 * SIZE}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "--samples, --checkpoint: give one of them"),
        ("--samples RUN --checkpoint RUN", "give one of them"),
        ("--samples RUN", "--reference: say what"),
        ("--checkpoint RUN", "--number: how many"),
        ("--checkpoint RUN --num 0", "must be at least 1"),
        ("--checkpoint RUN --num 1", "--number: at least 2, not 1"),
        ("--samples ONE --reference DATA --features offline", "--samples: at least 2 are needed, but .* has 1"),
        ("--samples DATA --reference DATA --steps 9", "--steps: goes with --checkpoint"),
        ("--samples DATA --reference DATA --no-clip", "--clip: goes with --checkpoint"),
        ("--checkpoint RUN --num 4 --features offline --to /proc/x/e.json", "--to: cannot write to /proc/x"),
        ("--checkpoint RUN --num 4 --features offline --keep /proc/x", "--keep: cannot write to /proc/x"),
        ("--checkpoint RUN --num 4 --features offline --keep OTHERS", "pictures without a kept.json .* 000000004.png"),
        ("--checkpoint RUN --num 4 --features offline --vae x/y", "--vae: the model makes pixels"),
        ("--checkpoint nowhere --num 4", "no such file or folder nowhere"),
        ("--samples RUN --reference RUN --keep x", "--keep"),
        ("--checkpoint RUN --num 4 --to x.txt", "should end in .json"),
        ("--checkpoint RUN --num 4 --reference-num 1", "--reference-num: at least 2"),
        ("--checkpoint RUN --num 4 --features offline --classes dog", "no class is called 'dog'"),
        ("--checkpoint RUN --num 4 --features dinov2", "dinov2 needs weights"),
        ("--checkpoint RUN --num 4 --features-path no.pth", "no such file of Inception weights|needs torch-fidelity"),
        ("--checkpoint RUN --num 4 --features offline --reference nowhere", "nowhere: no such file"),
        ("--samples DATA --reference DATA --num 99 --features offline", "--number: 99, but"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_anything_is_drawn(run, argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.evaluation.draw.draw", None)
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, SIZE, SIZE, 3), np.uint8))
    (tmp_path / "000000004.png").touch()
    named = {
        "RUN": str(run),
        "DATA": str(run.parent / "data"),
        "ONE": str(tmp_path / "one.npz"),
        "OTHERS": str(tmp_path),
    }
    assert cli.main(["evaluate", *(named.get(word, word) for word in argv.split())]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and error.strip().count("\n") == 0, error


def test_samples_still_being_drawn_are_measured_only_when_their_number_is_said(run, tmp_path, capsys):
    samples = tmp_path / "samples"
    asked = ["--checkpoint", str(run), "--num", "6", "--steps", "1", "--to", str(samples), "--device", "cpu"]
    assert cli.main(["sample", *asked]) == 0
    record = json.loads((samples / "sampling.json").read_text())
    (samples / "sampling.json").write_text(json.dumps(record | {"complete": False}))  # as a kill leaves it
    (samples / "000000005.png").unlink()
    capsys.readouterr()
    asked = ["--samples", str(samples), "--reference", str(run.parent / "data"), "--features", "offline"]
    assert cli.main(["evaluate", *asked]) == 2
    assert re.search("--samples: .*is not complete: .*6 pictures; run it again", capsys.readouterr().err)
    assert cli.main(["evaluate", *asked, "--number", "5", "--to", str(tmp_path / "five.json")]) == 0
    assert json.loads((tmp_path / "five.json").read_text())["count"] == 5


def test_other_settings_have_another_default_name(run, tmp_path):
    def target(*argv: str) -> Path:
        args = evaluate.parser().parse_args([*argv, "--features", "offline", "--device", "cpu"])
        evaluate.check_flags(args)
        with opened_world() as world:
            return evaluate.Evaluation(args, world, "cpu").target()

    drawn = ["--checkpoint", str(run), "--num", "4", "--steps", "2"]
    others = ["", "--method ddim", "--method ddim --eta 0.5", "--precision bf16", "--no-clip", "--classes 1",
              "--seed 1", "--guidance 2", "--guidance 2 --uncond-tail-drop 0.9",
              "--guidance 2 --guidance-interval 0 0.5",
              f"--guidance 2 --autoguidance {run}", f"--reference {run.parent / 'data'}:heldout"]  # fmt: skip
    names = [target(*drawn, *other.split()) for other in others]
    assert len(set(names)) == len(names) and {name.parent for name in names} == {run / "evaluation"}
    assert target(*drawn, "--batch", "3") == names[0], "which is of no consequence"
    samples = ["--samples", str(run.parent / "data"), "--reference"]
    assert target(*samples, str(run)) != target(*samples, str(run.parent))
    folders = [export(tmp_path / name, tiny_model()) for name in "ab"]
    names = [target("--checkpoint", str(folder), "--num", "4").name for folder in folders]
    assert [name[:2] for name in names] == ["a-", "b-"]


@pytest.mark.parametrize("command", ["evaluate", "sweep", "sample"])
def test_one_numbered_device_is_not_for_several_processes(run, tmp_path, monkeypatch, capsys, command):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    to = str(tmp_path / ("e.json" if command == "evaluate" else "folder"))
    asked = ["--checkpoint", str(run), "--num", "4", "--device", "cpu:0", "--to", to]
    assert cli.main([command, *asked]) == 2
    assert "--device: cpu:0 is one device, but there are 2 processes; use cpu" in capsys.readouterr().err


def test_data_that_moved_away_says_what_to_give(run, tmp_path, capsys):
    moved = run_folder(tmp_path, data=tmp_path / "gone")
    assert cli.main(["evaluate", *arguments(moved)]) == 2
    assert "or say with --reference what to compare with" in capsys.readouterr().err


def test_latents_without_a_vae_and_a_checkpoint_outside_a_run_say_what_to_give(tmp_path, capsys):
    from tests.trainer.synthetic_run import manifest

    folder = export(tmp_path / "latents", tiny_model(4), data=manifest(4, "latents"))
    asked = ["--num", "4", "--steps", "1", "--features", "offline", "--device", "cpu"]
    assert cli.main(["evaluate", "--checkpoint", str(folder), *asked]) == 2
    assert "--vae: this model draws latents" in capsys.readouterr().err
    folder = export(tmp_path / "pixels", tiny_model(3))
    assert cli.main(["evaluate", "--checkpoint", str(folder), *asked]) == 2
    assert "--reference:" in capsys.readouterr().err


def test_classes_are_drawn_in_turn_and_the_table_names_what_it_shows(run):
    from trainer.drawing import load_source
    from trainer.sampling.bulk import choose_labels

    labels = choose_labels("all", 10, load_source(run, "cpu"), 0)
    assert np.bincount(labels, minlength=len(CLASSES)).tolist() == [3, 3, 2, 2]
    record = {
        "metrics": {"frechet": 2.0, "sfid": None, "inception_score": 9.0, "precision": 0.5, "recall": None}, "count": 4,
        "features": {"name": "inception"}, "reference": {"count": None, "path": "a.npz"}, "samples": {"path": "b"},
        "sampling": {"retained_share": 0.25},
    }  # fmt: skip
    text = evaluate.table(record)
    assert "FID  " in text and "2.0000" in text and "25.0%" in text and "statistics of a.npz" in text
    assert "sFID" not in text and "recall" not in text


def test_the_reference_of_a_run_is_the_data_it_trains_on(run):
    found = evaluate.run_data(SimpleNamespace(path=run / "checkpoints" / "x" / "ema"))
    assert Path(found.path) == run.parent / "data"
    with pytest.raises(UserError, match="--reference"):
        evaluate.run_data(SimpleNamespace(path=run.parent))
