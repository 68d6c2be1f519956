"""benchmarks/loader.py runs and writes what it shows."""

import json
import subprocess
import sys
from pathlib import Path

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
        found["machine"] in lines[0] and found["date"] in lines[0] and lines[-1].endswith("mds, webdataset")
    )
