"""benchmarks/loader.py runs and writes what it shows."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import loader
from model import preset
from model.flops import flops

ROOT = Path(__file__).parents[2]


def test_a_small_round(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "loader.py"), "--samples", "32", "--batch", "4"]
    command += [
        "--seconds",
        "0.05",
        "--rounds",
        "1",
        "--workers",
        "0,1",
        "--need",
        "1",
        "--json",
        str(tmp_path / "x"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    found = json.loads((tmp_path / "x").read_text())
    assert set(found["images_per_second"]) == {"mds", "webdataset"}
    assert all(rate > 0 for rates in found["images_per_second"].values() for rate in rates.values())
    lines = done.stdout.splitlines()
    assert (
        found["machine"] in lines[0] and found["date"] in lines[0] and lines[1] == "Need, images/s: --need 1"
    )
    assert [line.split()[0] for line in lines[-2:]] == ["0", "1"] and lines[-1].endswith("--need")


def test_need_falls_with_the_size_of_the_model():
    args = argparse.Namespace(need=None, mfu=0.5, peak=1000.0)
    needs = loader.needs(args)
    assert list(needs) == ["S", "B", "L", "XL"] and sorted(needs.values(), reverse=True) == list(
        needs.values()
    )
    assert needs["S"] == pytest.approx(0.5e15 / (3 * flops(preset("S"))["total"]))
    rates = {"mds": {"2": needs["B"] * 1.01}, "webdataset": {"2": needs["S"]}}
    cells = loader.table({"workers": [2], "need": needs, "images_per_second": rates})
    assert cells[1][-1] == "B, L, XL"
