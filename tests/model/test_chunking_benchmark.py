"""benchmarks/chunking.py runs and writes what it shows."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RATIOS = {
    "speedup_forward",
    "speedup_forward_backward",
    "growth",
    "growth_forward",
    "growth_forward_backward",
}


def bench(*words, **options):
    command = [sys.executable, str(ROOT / "benchmarks" / "chunking.py"), *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, **options)


@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler (cc)"
)
def test_a_quick_round(tmp_path):
    files = ["--json", str(tmp_path / "x.json"), "--markdown", str(tmp_path / "x.md")]
    done = bench("--quick", "--sizes", "2x16x16x64", *files, check=True, cwd=tmp_path)
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["machine"] in done.stdout.splitlines()[0] and found["date"] in done.stdout.splitlines()[0]
    assert found["threads"] == 1 and found["torch"] and found["not_measured"] == []
    assert found["command"] == "python benchmarks/chunking.py --quick --sizes 2x16x16x64"
    assert [(row["size"], row["dtype"]) for row in found["rows"]] == [
        ("2x16x16x64", "float32"),
        ("2x16x16x64", "bfloat16"),
    ]
    for row in found["rows"]:
        assert 0.2 <= row["retained"] <= 0.3 and row["tokens"] == pytest.approx(row["retained"] * 512, abs=4)
        assert all(row[name] > 0 for name in RATIOS)
        for name in ("forward", "forward_backward"):
            assert set(row["ms"][name]) == {"dense", "torch", "ours"} and min(row["ms"][name].values()) > 0
            # Not less than the packed rows: the counter sees the tensors.
            assert row["memory_mb"][name]["dense"] * 1e6 > row["tokens"] * 64 * 4
        assert row["memory_ratio"] == pytest.approx(
            row["memory_mb"]["forward_backward"]["ours"] / row["memory_mb"]["forward_backward"]["dense"]
        )
        # What lives beyond the packed rows is less than what lives with them.
        mb, packed = row["memory_mb"], row["tokens"] * 64 * (4 if row["dtype"] == "float32" else 2) / 1e6
        assert mb["ops_forward"]["ours"] <= mb["forward"]["ours"] - 0.9 * packed
        assert 0 < row["memory_ratio_ops"] < row["memory_ratio"] < 1 and 0 < row["memory_ratio_forward"] < 1
    lines = (tmp_path / "x.md").read_text().splitlines()
    assert found["command"] in lines[0] and len([line for line in lines if line.startswith("|")]) == 2 + 4


def test_what_cannot_be_measured_is_refused_by_name():
    for words in (["--sizes", "4x64x64"], ["--dtype", "float8"]):
        done = bench(*words)
        assert done.returncode == 2 and " ".join(words) in done.stderr
