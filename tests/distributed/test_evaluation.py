"""Pictures drawn and measured on the way, through a signal and a resume, without a trace in the weights. Under FSDP; in
test_resume.py DDP and ZeRO 3 draw too."""

import contextlib
import io
import json
import signal

import pytest

from tests.distributed.conftest import assert_same_bits

DRAWN = ["eval.samples=12", "eval.steps=6", "eval.method=ddim", "eval.batch_size=4", "eval.tail_drop=0.2"]
COLUMNS = ("frechet_offline", "drawn_images", "drawn_retained_share", "drawn_gflops_per_image")


def measured(runs, name: str) -> dict[int, dict]:
    """The drawn numbers by position; wall-clock columns left out."""
    rows = runs.rows(name, evaluation=True)
    return {row["images"]: {key: row[key] for key in COLUMNS} for row in rows if "frechet_offline" in row}


@pytest.fixture(scope="module")
def stopped(runs):
    """A run with drawing that a signal stopped in the middle of the first drawing, not yet started again."""
    slow = [word.replace("eval.steps=6", "eval.steps=1000") for word in DRAWN]
    process = runs.start("drawn", 2, *slow)
    runs.until(process, lambda: "drawing 12 pictures" in process.output())
    process.send_signal(signal.SIGTERM)  # thousands of model calls would follow
    process.communicate(timeout=120)
    assert process.returncode != 0
    return "drawn"


@pytest.fixture(scope="module")
def drawn(runs, stopped):
    assert runs.latest(stopped) == 48 == runs.images(stopped), "saved where the signal came"
    assert [row["images"] for row in runs.rows(stopped, evaluation=True)] == [0]
    runs.run(stopped, 2, *DRAWN)
    return stopped


def test_a_signal_while_drawing_saves_and_stops_and_the_evaluation_is_made_up_for(runs, drawn):
    found = measured(runs, drawn)
    assert list(found) == [48, 96], "at every evaluation but the first"
    assert [row["images"] for row in runs.rows(drawn, evaluation=True)] == [0, 48, 96]
    for row in found.values():
        assert row["drawn_images"] == 12 and row["frechet_offline"] > 0
        assert 0 < row["drawn_retained_share"] < 1 and row["drawn_gflops_per_image"] > 0
    assert found[48]["frechet_offline"] != found[96]["frechet_offline"]


def test_drawing_stopping_and_resuming_leave_no_trace_in_the_training(runs, drawn):
    runs.run("without", 2)
    assert not measured(runs, "without")
    assert_same_bits(runs.state(drawn), runs.state("without"))
    assert runs.losses(drawn) == runs.losses("without")
    heldout = [
        [row["heldout_mse"] for row in runs.rows(name, evaluation=True)] for name in (drawn, "without")
    ]
    assert heldout[0] == heldout[1]


def test_a_sheet_and_a_record_lie_beside_the_rows(runs, drawn):
    folder = runs.folder / drawn / "samples"
    assert sorted(f.name for f in folder.iterdir()) == [
        f"{images:012d}-evaluation.{ending}" for images in (48, 96) for ending in ("json", "png")
    ]
    record = json.loads((folder / "000000000096-evaluation.json").read_text())
    assert record["tail_drop"] == 0.2 and record["steps"] == 6 and record["features"]["name"] == "offline"
    assert record["frechet_offline"] == pytest.approx(measured(runs, drawn)[96]["frechet_offline"], rel=1e-5)
    assert record["reference"]["count"] == 114 and record["reference"]["split"] == "train"


def test_one_process_and_dcdit_evaluate_measure_the_same(runs, drawn):
    from trainer import cli

    asked = "--num 12 --steps 6 --method ddim --tail-drop 0.2 --features offline --device cpu".split()
    records = []
    for name in ("first", "again"):
        to = runs.folder / f"{name}.json"
        assert cli.main(["evaluate", "--checkpoint", str(runs.folder / drawn), *asked, "--to", str(to)]) == 0
        records.append(json.loads(to.read_text()))
    assert records[0]["metrics"] == records[1]["metrics"], "the same number, to the last bit"
    row = measured(runs, drawn)[96]
    assert records[0]["metrics"]["frechet"] == pytest.approx(row["frechet_offline"], rel=1e-3)
    assert records[0]["retained_share"] == pytest.approx(row["drawn_retained_share"], abs=1e-3)
    assert records[0]["gflops_per_image"] == pytest.approx(row["drawn_gflops_per_image"], rel=1e-3)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("eval.features=fid", "eval.features: 'fid' is not one of"),
        ("eval.features=dinov2", "eval.features, eval.weights: dinov2 needs weights"),
        ("eval.weights=w.pth", "eval.features, eval.weights: offline has no weights"),
        ("eval.method=euler", "eval.method: euler does not fit gaussian"),
        ("eval.reference=nowhere", "eval.reference: nowhere: no such file"),
        ("eval.vae=some", "eval.vae: the data are pixels"),
        ("eval.samples=1", "eval.samples: a distance needs at least 2"),
        ("eval.tail_drop=1.5", "eval.tail_drop: a fraction"),
        ("eval.samples_every=50", "eval.samples_every: 50 is not a multiple of eval.every 48"),
    ],
)
def test_bad_keys_are_one_line_before_anything_runs(runs, override, words):
    from trainer.train import main

    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(runs.arguments("bad", *DRAWN, override)) == 2
    assert words in said.getvalue() and said.getvalue().count("\n") == 1
    assert not (runs.folder / "bad").exists()
