"""`dcdit sample` and `dcdit sweep` on two processes."""

import json
import shutil

import pytest

from tests.distributed.processes import Processes
from tests.trainer.synthetic_run import mds, run_folder
from trainer import cli


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("sampling")
    return run_folder(root, data=mds(root / "data", count=24))


def test_a_full_disk_of_one_process_is_one_line(run, tmp_path):
    words = [
        "--checkpoint",
        str(run),
        "--number",
        "8",
        "--to",
        str(tmp_path / "to"),
        "--steps",
        "2",
        "--batch",
        "2",
    ]
    process = Processes(2, [*words, "--device", "cpu"], tmp_path / "log", "store", "sample")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    told = [line for line in output.splitlines() if "rror" in line]
    assert told == [
        f"error: --to: cannot write to {tmp_path / 'to'}: No space left on device; mend that and run the same command "
        "again"
    ]
    again = Processes(2, [*words, "--device", "cpu"], tmp_path / "log", "", "sample")
    assert "8 pictures" in again.communicate(timeout=120)[0] and again.returncode == 0


def test_two_processes_sweep_as_one(run, tmp_path, monkeypatch):
    other = shutil.copytree(run, tmp_path / "run")
    words = "--num 10 --batch 4 --steps 2 --guidance 1.5 --tail-drop 0,0.5 --heldout 24 --device cpu".split()
    process = Processes(2, ["--checkpoint", str(other), *words], tmp_path / "log", "", "sweep")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert cli.main(["sweep", "--checkpoint", str(run), *words]) == 0
    one, two = (json.loads((folder / "elastic.json").read_text()) for folder in (run, other))
    assert one["weights"] == two["weights"]
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert b.pop("images_per_s") > 0 and a.pop("images_per_s") > 0
        assert b == pytest.approx(a, rel=1e-4)
    assert one["rows"][0]["frechet"] != one["rows"][1]["frechet"]
    place = "checkpoints/000000000640/ema/calibration.json"
    one, two = (json.loads((folder / place).read_text()) for folder in (run, other))
    assert one["images"] == two["images"]
    for branch in ("conditional", "unconditional"):
        assert two[branch]["mean"] == pytest.approx(one[branch]["mean"], abs=1e-5)
