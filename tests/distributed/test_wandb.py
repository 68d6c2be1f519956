"""log.wandb=offline: the rows are in wandb's own files, and a run that goes on is the same run to wandb."""

import json
import struct

import pytest

pytest.importorskip("wandb", reason="wandb is not installed")


def messages(file):
    """The records of a .wandb file: 7 bytes of heading, then LevelDB's log format (blocks of 32 KB; a piece has a sum,
    length, kind, data; kinds 1 whole, 2 first, 3 middle, 4 last)."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little left of the block for a heading
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def records(folder):
    """(id, history rows) of every session wandb has written under ``folder``, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime):
        found = [Record.FromString(message) for message in messages(file)]
        run = next(r.run.run_id for r in found if r.HasField("run"))
        history = [r.history.item for r in found if r.HasField("history")]
        yield (
            run,
            [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in row} for row in history],
        )


def test_offline_runs_are_written_and_continued(runs):
    settings = ["log.wandb=offline", "run.name=one", "eval.every=16", "checkpoint.every=16"]
    runs.run("tracked", 1, *settings, "train.total_images=16")
    runs.run("tracked", 1, *settings, "train.total_images=32")
    folder = runs.folder / "tracked"
    sessions = list(records(folder))
    assert [run for run, _ in sessions] == [(folder / "wandb_id").read_text()] * 2
    logged = [row for _, rows in sessions for row in rows]
    losses = [row["train/loss"] for row in logged if "train/loss" in row]
    assert losses == pytest.approx(runs.losses("tracked"), rel=1e-5) and len(losses) == 4
    assert [row["_step"] for row in logged if "train/loss" in row] == [8, 16, 24, 32]
    heldout = [row["heldout/heldout_mse"] for row in logged if "heldout/heldout_mse" in row]
    assert heldout == pytest.approx(
        [r["heldout_mse"] for r in runs.rows("tracked", evaluation=True)], rel=1e-5
    )
