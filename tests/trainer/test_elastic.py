"""Tail drop by image and by timestep, and budgets kept by a trained model."""

import dataclasses
import json
import os
import shutil
import signal
import xml.etree.ElementTree as ElementTree
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model import DCDiT, preset
from model.diffusion import guided, make_process
from model.errors import UserError
from model.flops import flops
from tests.model.test_dydit import scatter_gates
from tests.trainer.synthetic_run import export, mds, tiny_model
from trainer import cli, sweep
from trainer.data import heldout_batches, open_source
from trainer.drawing import Settings, generate, load_source
from trainer.elastic import Budget, Calibration, Cost, TailDrop, call_times, with_budget
from trainer.parallel import close_world, open_world

FEW = ["--heldout", "64", "--batch", "16"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the real trainer on the embedded photographs: 90 steps of 16 at 8 x 8, most of the cost in the
    backbone, as in the models of the paper. What its last evaluation says of the router is its calibration."""
    from trainer.prepare import main as prepare
    from trainer.train import main as train

    folder = tmp_path_factory.mktemp("elastic")
    shards = str(folder / "photos")
    assert prepare(["photos", "--to", shards, "--samples-per-class", "24", "--size", "8"]) == 0
    overrides = [
        f"data.path={shards}", f"run.dir={folder / 'run'}", "model.overrides={hidden_size: 64, depth: 4, num_heads: 2,"
        " enc_dec_dim_factor: 1, mlp_ratio: 24.0}",
        "train.total_images=1440", "train.global_batch_size=16", "train.precision=fp32",
        "train.tail_drop_after=320", "optimizer.lr=2e-3", "optimizer.warmup_images=64", "ema.decay=0.9",
        "eval.every=1440", "eval.count=64", "eval.batch_size=32", "checkpoint.every=1440", "log.every=50",
        "data.num_workers=0", "log.tensorboard=false",
    ]  # fmt: skip
    assert train(["--device", "cpu", "--config", "configs/recipe/demo.yaml", *overrides]) == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("text", "values", "starts"),
    [
        ("0.3", (0.3,), ()),
        ("0,0.25,0.5", (0.0, 0.25, 0.5), ()),
        ("0:0.6,500:0.2", (0.6, 0.2), (0.0, 500.0)),
        ("0:1", (1.0,), (0.0,)),
    ],
)
def test_tail_drop_is_read_and_written(text, values, starts):
    drop = TailDrop.parse(text)
    assert (drop.values, drop.starts) == (values, starts)
    assert TailDrop.parse(str(drop)) == drop


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("half", "is none of"),
        ("0.1,2", "between 0 and 1, not 2"),
        ("500:0.2", "must begin with 0"),
        ("0:0.1,600:0.2,300:0.3", "must begin with 0 and rise"),
        ("0:0.1,0.2", "is none of"),
        ("0:1:2", "is none of"),
        ("", "is none of"),
    ],
)
def test_wrong_tail_drops_are_named(text, said):
    with pytest.raises(UserError, match=said):
        TailDrop.parse(text, "--uncond-tail-drop")


class Listening(torch.nn.Module):
    """Notes the tail drop of every call."""

    def __init__(self):
        super().__init__()
        self.config = tiny_model().config
        self.seen = []

    def forward(self, x, t, y, tail_drop):
        self.seen.append((float(t[0]), [round(float(v), 4) for v in tail_drop]))
        return type("Output", (), {"sample": torch.cat([x, x], 1), "routing": None})()


def test_a_schedule_goes_by_the_time_and_a_list_by_the_image():
    process, model, y = make_process(), Listening(), torch.tensor([0, 1])
    by_time = TailDrop.parse("0:0.6,500:0.2").for_images([0, 1], "cpu")
    model_fn = guided(model, y, 2.0, tail_drop=by_time, uncond_tail_drop=0.9)
    process.sample(model_fn, torch.zeros(2, 3, 4, 4), 5, method="ddim")
    assert model.seen == [
        (t, [rho, rho, 0.9, 0.9]) for t, rho in ((999, 0.2), (749, 0.2), (500, 0.2), (250, 0.6), (0, 0.6))
    ]
    model.seen.clear()
    turns = TailDrop.parse("0,0.5,0.25")
    model_fn = guided(model, y, tail_drop=turns.for_images([4, 5], "cpu"))
    process.sample(model_fn, torch.zeros(2, 3, 4, 4), 1)
    assert model.seen == [(999.0, [0.5, 0.25])]


@pytest.mark.parametrize(
    ("text", "gflops"),
    [("30TFLOPs", 30_000), ("1.5 tflops", 1_500), ("800GFLOPs", 800), ("2pflops", 2e6), ("60%", 60)],
)
def test_budgets_are_read(text, gflops):
    assert Budget.parse(text).gflops(full=100.0) == pytest.approx(gflops)


@pytest.mark.parametrize("text", ["30", "0%", "-3TFLOPs", "many", "3 bananas"])
def test_wrong_budgets_are_named(text):
    with pytest.raises(UserError, match="--budget"):
        Budget.parse(text)


def test_calibration_foresees_the_moments_of_what_stays():
    """Against counts drawn from the distribution itself, floor(rho n) dropped as the ops do it."""
    counts = np.random.default_rng(0).integers(150, 350, 200_000)
    share = counts / 1024
    table = (np.full(4, share.mean()), np.full(4, (share**2).mean()))
    calibration = Calibration(1024, table, table, {})
    for rho in (0.0, 0.13, 0.3, 0.77):
        stay = counts - np.floor(counts * rho)
        mean, square = calibration.tokens(0.4, rho)
        assert mean == pytest.approx(stay.mean(), rel=2e-3) and square == pytest.approx(
            (stay**2.0).mean(), rel=4e-3
        )


def test_calibration_survives_its_file_and_a_broken_one_is_named(tmp_path):
    tables = [(np.linspace(0.2, 0.3, 5), np.linspace(0.05, 0.1, 5)) for _ in range(2)]
    Calibration(64, *tables, {"images": 9}).write(tmp_path)
    back = Calibration.read(tmp_path)
    assert back.length == 64 and back.about == {"images": 9}
    assert np.allclose(back.conditional, tables[0], atol=1e-6)
    (tmp_path / "calibration.json").write_text('{"length": 64}')
    with pytest.raises(UserError, match="is not readable.*dcdit sweep"):
        Calibration.read(tmp_path)


@pytest.mark.parametrize(
    ("kind", "method", "steps", "calls"),
    [("gaussian", "ddpm", 7, 7), ("gaussian", "ddim", 3, 3), ("flow", "euler", 4, 4), ("flow", "heun", 4, 8)],
)
def test_the_cost_knows_every_call(kind, method, steps, calls):
    times = call_times(make_process(kind), steps, method)
    assert len(times) == calls and times[0] == (999 if kind == "gaussian" else 1000)


def test_the_cost_is_that_of_the_flops_where_nothing_varies(tmp_path):
    source = load_source(export(tmp_path, tiny_model()), "cpu")
    share = 16 / 64
    calibration = Calibration(64, (np.full(3, share), np.full(3, share**2)), (np.ones(3), np.ones(3)), {})
    config = source.model.config
    settings = Settings(steps=6, guidance=2.0, guidance_interval=(0.3, 0.7))
    one, null = flops(config, 16)["total"] / 1e9, flops(config, 64)["total"] / 1e9
    assert Cost(source, settings, calibration).gflops() == pytest.approx(6 * one + 2 * null)
    plain = Cost(source, Settings(steps=6), calibration)
    assert plain.gflops(0.0) == pytest.approx(6 * one)
    costs = [plain.gflops(rho) for rho in (0.0, 0.2, 0.5, 0.9)]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize(
    ("budget", "settings"),
    [
        ("75%", Settings(steps=12, batch=19)),
        ("85%", Settings(steps=12, batch=19, method="ddim")),
        ("80%", Settings(steps=12, batch=19, guidance=1.5)),
        (
            "88%",
            Settings(steps=12, batch=19, guidance=1.5, uncond_tail_drop=0.9, guidance_interval=(0.2, 0.8)),
        ),
    ],
)
def test_a_trained_model_keeps_to_its_budget(trained, budget, settings):
    source = load_source(trained, "cpu")
    labels = [k % source.num_classes for k in range(19)]
    chosen, record = with_budget(budget, settings, source)
    assert 0 < chosen.tail_drop < 0.95
    full = generate(source, labels, settings).gflops.mean()
    spent = generate(source, labels, chosen).gflops.mean()
    wanted = Budget.parse(budget).amount * full
    assert record["gflops_at_0"] == pytest.approx(full, rel=0.04)
    assert spent == pytest.approx(wanted, rel=0.04), f"spent {spent:.4g} of {wanted:.4g} GFLOPs"


def test_a_calibration_of_its_own_foresees_the_same(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trainer.sweep.CALIBRATION_IMAGES", 256)
    folder = tmp_path / "copy"
    shutil.copytree(next(trained.glob("checkpoints/*/ema")), folder)
    source, settings = load_source(folder, "cpu"), Settings(steps=12, guidance=1.5, uncond_tail_drop=0.5)
    noted = Calibration.of(source)
    data = str(trained.parent / "photos")
    assert cli.main(["sweep", "--checkpoint", str(folder), "--data", data, "--calibrate", *FEW]) == 0
    assert str(folder / "calibration.json") in capsys.readouterr().out
    measured = Calibration.of(source)
    assert (noted.about["measured_on"], measured.about["measured_on"]) == (
        "the last evaluation in training", "held-out images"
    )  # fmt: skip
    assert measured.about["images"] >= 250 and (measured.conditional[1] > measured.conditional[0] ** 2).all()
    for rho in (0.0, 0.4):
        foreseen = Cost(source, settings, measured).gflops(rho)
        assert Cost(source, settings, noted).gflops(rho) == pytest.approx(foreseen, rel=0.01)


def test_the_calibration_says_which_batch_it_is_at(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "CALIBRATION_IMAGES", 12)  # twice the six there are
    source = load_source(export(tmp_path / "ema", tiny_model()), "cpu")
    data, said = open_source(mds(tmp_path / "data", 6), "heldout"), []
    world = open_world(device="cpu")
    try:
        batches = partial(heldout_batches, data, seed=0, count=6, batch_size=4)
        sweep.measure(source, batches, world, nullcontext, said.append)
    finally:
        close_world()
    assert said == [f"calibration: batch {number} of 4" for number in (1, 2, 3, 4)]


def test_the_gates_of_dydit_are_calibrated_too(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.sweep.CALIBRATION_IMAGES", 256)
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=64, depth=2, num_heads=4, in_channels=3, num_classes=4, input_size=(8, 8), dydit=0.6
    )
    model = scatter_gates(DCDiT(preset("DC-DiT-Ti", enc_dec_dim_factor=1, mlp_ratio=16.0, **sizes)))
    with torch.no_grad():
        model.final_layer.linear.weight.normal_(std=0.1)
    model.calibrate_router(torch.randn(8, 3, 8, 8), torch.arange(8) * 120, torch.arange(8) % 4)
    folder, data = export(tmp_path / "gated", model), mds(tmp_path / "data")
    source, settings = load_source(folder, "cpu"), Settings(steps=10, batch=20)
    with pytest.raises(UserError, match="no calibration"):
        Calibration.of(source)
    words = ["--checkpoint", str(folder), "--data", str(data), "--calibrate", "--heldout", "8"]
    assert cli.main(["sweep", *words]) == 0
    calibration = Calibration.of(source)
    assert calibration.gates.shape == (20, 2, 2) and calibration.gates.min() < 0.9
    spent = generate(source, [k % 4 for k in range(20)], settings).gflops.mean()
    assert Cost(source, settings, calibration).gflops() == pytest.approx(spent, rel=0.02)
    open_gates = dataclasses.replace(calibration, gates=None)
    assert Cost(source, settings, open_gates).gflops() > 1.03 * spent


def test_a_budget_in_flops_reaches_the_command(trained, tmp_path, capsys):
    target = tmp_path / "a.png"
    words = ["sample", "--checkpoint", str(trained), "--classes", "0-7", "--steps", "10", "--to", str(target)]
    assert cli.main(words) == 0
    full = json.loads(target.with_suffix(".json").read_text())["gflops_per_picture"]
    assert cli.main([*words, "--budget", f"{0.8 * full:.4f}GFLOPs"]) == 0
    record = json.loads(target.with_suffix(".json").read_text())
    assert record["gflops_per_picture"] == pytest.approx(0.8 * full, rel=0.03)
    assert record["budget"]["asked"].endswith("GFLOPs") and record["tail_drop"] > 0.1
    assert "GFLOPs per picture foreseen" in capsys.readouterr().out
    assert cli.main([*words, "--budget", "150%", "--steps", "2"]) == 0
    assert "--budget 150%: does not bind: a picture costs" in capsys.readouterr().out


def test_a_budget_out_of_reach_says_what_there_is(trained):
    source = load_source(trained, "cpu")
    with pytest.raises(UserError, match="too little.*at least .* GFLOPs"):
        with_budget("0.001GFLOPs", Settings(steps=5), source)
    with pytest.raises(UserError, match=r"too little.*give at least \d\d?%$") as caught:
        with_budget("1%", Settings(steps=5), source)
    assert with_budget(str(caught.value).split()[-1], Settings(steps=5), source)[0].tail_drop > 0.8
    assert with_budget("3TFLOPs", Settings(steps=5), source)[0].tail_drop == 0.0


def test_a_budget_without_calibration_or_router_says_what_to_do(tmp_path):
    source = load_source(export(tmp_path / "a", tiny_model()), "cpu")
    with pytest.raises(
        UserError, match=r"no calibration of this checkpoint.*`dcdit sweep --checkpoint .* --calibrate`"
    ):
        with_budget("60%", Settings(), source)
    dense = load_source(export(tmp_path / "b", tiny_model(baseline=True)), "cpu")
    with pytest.raises(UserError, match="no router"):
        with_budget("60%", Settings(), dense)


def frechet_again(run, rho: float) -> float:
    """The distance that a sweep of `run` is to find, from the pictures themselves and by the textbook's formula."""
    from trainer.data import open_source
    from trainer.evaluation.features import Offline
    from trainer.pictures import show

    source, data = load_source(run, "cpu"), open_source(run.parent / "photos", "heldout")
    labels = [i % source.num_classes for i in range(24)]
    drawn = generate(source, labels, Settings(steps=6, guidance=1.5, tail_drop=rho)).images
    pictures = (np.stack([data[i]["image"] for i in range(len(data))]), show(drawn).transpose(0, 3, 1, 2))
    a, b = (np.asarray(Offline("cpu").batch(these), np.float64) for these in pictures)
    c, d = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(c @ d).astype(complex)).real.sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c + d) - 2 * root)


def test_sweep_writes_the_curve(trained, monkeypatch, capsys):
    monkeypatch.setattr("trainer.sweep.CALIBRATION_IMAGES", 64)
    words = ["--tail-drop", "0,0.3,0.6", "--num", "24", "--steps", "6", "--guidance", "1.5"]
    assert cli.main(["sweep", "--checkpoint", str(trained), *words, *FEW, "--heldout", "99"]) == 0
    curve = json.loads((trained / "elastic.json").read_text())
    assert (curve["steps"], curve["method"], curve["guidance"]) == (6, "ddpm", 1.5)
    assert (curve["features"], curve["metric"]) == ("offline", "frechet")
    rows = curve["rows"]
    assert [row["tail_drop"] for row in rows] == [0, 0.3, 0.6]
    for key, falls in (("gflops_per_image", True), ("retained_share", True)):
        values = [row[key] for row in rows]
        assert values == sorted(values, reverse=falls)
    assert all(row["heldout_mse"] > 0 and row["images_per_s"] > 0 for row in rows)
    for row in rows[::2]:
        assert row["frechet"] == pytest.approx(frechet_again(trained, row["tail_drop"]), rel=1e-3)
    assert curve["data"] == str(trained.parent / "photos") and len(curve["weights"]) == 32
    asked = {"guidance_interval": None, "guidance_channels": None, "autoguidance": None, "eta": 0.0, "teacache": None,
             "clip": True, "vae": None, "uncond_tail_drop": None}  # fmt: skip
    assert {key: curve[key] for key in asked} == asked
    assert all(row["gflops_foreseen"] == pytest.approx(row["gflops_per_image"], rel=0.04) for row in rows)
    printed = capsys.readouterr().out
    assert (trained / "elastic.md").read_text().strip() in printed
    picture = ElementTree.parse(trained / "elastic.svg").getroot()
    assert picture.tag.endswith("svg") and len(picture.findall(".//{*}circle")) == 3


def test_sweep_without_features_has_the_heldout_error_alone(trained, tmp_path):
    words = [
        "--tail-drop",
        "0,0.5",
        "--num",
        "4",
        "--steps",
        "2",
        "--features",
        "none",
        "--to",
        str(tmp_path),
    ]
    assert cli.main(["sweep", "--checkpoint", str(trained), *words, *FEW]) == 0
    curve = json.loads((tmp_path / "elastic.json").read_text())
    assert curve["metric"] == "heldout_mse" and curve["rows"][0]["frechet"] is None
    assert curve["rows"][0]["heldout_mse"] > 0


def test_a_sweep_that_is_stopped_goes_on_with_what_is_missing(trained, tmp_path, monkeypatch, capsys):
    from trainer.evaluation import draw

    monkeypatch.setattr("trainer.sweep.CALIBRATION_IMAGES", 64)
    real, drawn = draw.draw_batch, []

    def counted(source, keys, places, settings, *more):
        drawn.append(settings.tail_drop)
        if settings.tail_drop == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(source, keys, places, settings, *more)

    monkeypatch.setattr(draw, "draw_batch", counted)
    words = ["sweep", "--checkpoint", str(trained), "--num", "4", "--steps", "8", "--to", str(tmp_path), *FEW]

    def rows(*more, status=0):
        drawn.clear()
        assert cli.main([*words, *more]) == status
        return json.loads((tmp_path / "elastic.json").read_text())["rows"]

    stop_at = 0.6
    (first, second) = rows("--tail-drop", "0,0.3,0.6,0.9", status=75)
    assert drawn == [0, 0.3, 0.6] and "stopped by SIGTERM" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    stop_at = None
    every = rows("--tail-drop", "0,0.3,0.6,0.9")
    assert drawn == [0.6, 0.9] and every[:2] == [first, second]
    assert [row["tail_drop"] for row in every] == [0, 0.3, 0.6, 0.9]
    more = rows("--tail-drop", "0.9,0.2,0.3")
    assert drawn == [0.2] and "rho 0, 0.3, 0.6, 0.9" in capsys.readouterr().out
    assert [row["tail_drop"] for row in more] == [0, 0.2, 0.3, 0.6, 0.9] and [more[0], *more[2:]] == every
    (other,) = rows("--tail-drop", "0.3", "--seed", "1")
    assert drawn == [0.3], "other settings are measured anew"
    (aside,) = tmp_path.glob("elastic-*.json")
    assert json.loads(aside.read_text())["rows"] == more and aside.with_suffix(".svg").is_file()
    assert f"is now {aside}" in capsys.readouterr().out and other != every[1]
    assert rows("--tail-drop", "0.3") == more and not drawn, "found again under its other name"
    (aside,) = tmp_path.glob("elastic-*.json")
    assert json.loads(aside.read_text())["rows"] == [other]
    curve = json.loads((tmp_path / "elastic.json").read_text())
    del curve["model"], curve["data_manifest"]  # as an older version wrote it
    (tmp_path / "elastic.json").write_text(json.dumps(curve))
    assert rows("--tail-drop", "0.3") == more and not drawn
    # The same path with other weights in it is another guide.
    guide = shutil.copytree(next(trained.glob("checkpoints/*/ema")), tmp_path / "guide")
    guided = ["--tail-drop", "0.3", "--guidance", "1.5", "--autoguidance", str(guide)]
    rows(*guided)
    weights = load_file(guide / "model.safetensors")
    save_file({name: value * 0.5 for name, value in weights.items()}, guide / "model.safetensors")
    rows(*guided)
    assert drawn == [0.3]


def test_data_of_more_classes_than_the_model_has_is_one_line(trained, tmp_path, capsys):
    """A label one above the last would be read as "no class"."""
    data = mds(tmp_path / "data")
    names = {"class_names": [f"class {k}" for k in range(20)], "num_classes": 20}
    file = data / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | names))
    words = ["--num", "2", "--steps", "2", "--to", str(tmp_path), "--data", str(data), *FEW]
    assert cli.main(["sweep", "--checkpoint", str(trained), *words]) == 2
    assert "has 20 classes, the model only 19" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tail-drop", "0:0.5"], "a sweep takes a list of numbers"),
        (["--num", "0"], "--num: must be at least 1"),
        (["--num", "1"], "--num: must be at least 2, not 1: a Frechet distance needs as many"),
        (["--heldout", "1"], "--heldout: must be at least 2, not 1"),
        (["--heldout", "0", "--calibrate"], "--heldout: must be at least 1, not 0"),
        (["--to", "/proc/nowhere"], "--to: cannot write to /proc/nowhere"),
        (["--vae", "x/y"], "--vae: the model makes pixels"),
        (["--features", "dinov2"], "dinov2 needs weights"),
        (["--method", "heun"], "does not fit a model of gaussian diffusion"),
        (["--data", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_arguments_of_a_sweep_are_one_line_before_anything_is_measured(
    trained, words, said, capsys, monkeypatch
):
    monkeypatch.setattr("trainer.sweep.measure", None)
    assert cli.main(["sweep", "--checkpoint", str(trained), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_a_curve_needs_no_calibration_that_cannot_be_written(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trainer.sweep.CALIBRATION_IMAGES", 64)
    folder = shutil.copytree(next(trained.glob("checkpoints/*/ema")), tmp_path / "copy")
    (folder / "calibration.json").unlink(missing_ok=True)
    (folder / ".calibration.json.part").mkdir()  # in the place of what is to be written
    words = ["sweep", "--checkpoint", str(folder), "--data", str(trained.parent / "photos"), *FEW]
    assert cli.main([*words, "--calibrate"]) == 2
    assert "error: --checkpoint: cannot write to" in capsys.readouterr().err
    few = ["--tail-drop", "0", "--num", "2", "--steps", "2", "--features", "none", "--to", str(tmp_path)]
    assert cli.main([*words, *few]) == 0
    assert "note: no calibration for --budget: --checkpoint: cannot write to" in capsys.readouterr().err
    (row,) = json.loads((tmp_path / "elastic.json").read_text())["rows"]
    assert row["gflops_foreseen"] > 0


def test_a_calibration_goes_with_the_weights_it_was_measured_on(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (ema,) = run.glob("checkpoints/*/ema")
    Calibration(64, *[(np.full(5, 0.25), np.full(5, 0.07))] * 2, {"measured_on": "a test"}).write(ema)
    words = ["--overwrite", "--to", str(tmp_path / "to")]

    def exported(source, *more):
        assert cli.main(["export", str(source), *words, *more]) == 0
        return Calibration.of(load_source(tmp_path / "to", "cpu")).about["measured_on"]

    assert exported(run) == "a test"
    once_more = shutil.copytree(tmp_path / "to", tmp_path / "once more")
    assert exported(once_more) == "a test"
    with pytest.raises(UserError, match="no calibration"):
        exported(run, "--which", "model")
    assert cli.main(["export", str(run), "--pipeline", "--to", str(tmp_path / "pipe")]) == 0
    assert with_budget("80%", Settings(steps=4), load_source(tmp_path / "pipe", "cpu"))[0].tail_drop > 0


def test_a_sweep_needs_data_and_a_router(tmp_path, capsys):
    folder = export(tmp_path / "a", tiny_model())
    assert cli.main(["sweep", "--checkpoint", str(folder), "--calibrate"]) == 2
    assert "--data: " in capsys.readouterr().err
    folder = export(tmp_path / "b", tiny_model(baseline=True))
    assert cli.main(["sweep", "--checkpoint", str(folder), "--calibrate"]) == 2
    assert "no router" in capsys.readouterr().err
