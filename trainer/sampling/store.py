"""The folder that many pictures are drawn into.

    DIR/sampling.json            settings, and when complete what they cost
    DIR/000000000.png ...        --format png, with labels.csv
    DIR/shard.00000.tar ...      --format webdataset: NAME.png and NAME.cls, with index.json
    DIR/samples.npz              --format npz, as ADM writes it: arr_0 (N, H, W, 3) uint8, arr_1 (N,) labels
    DIR/.parts/                  finished batches of a run that is not complete

A finished batch is one small file, written beside its place and moved there, that says which pictures it holds. So
a kill costs the batches it interrupts and nothing else, and what is missing is a matter of looking.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import UserError

RECORD = "sampling.json"
PARTS = ".parts"
STATS = ("gflops", "kept", "kept_uncond", "seconds")  # one number per picture, the last three may be NaN
# May change between attempts: hashes of the weights speak for the places that they lie at.
FREE = ("batch", "vae_batch", "device", "processes", "torch", "budget", "checkpoint", "vae")


class Store:
    """`folder` for `num` pictures in `format`; see the module."""

    def __init__(self, folder: Path, format: str, num: int, shard: int) -> None:
        self.folder, self.format, self.num, self.shard = folder, format, num, shard
        self.parts = folder / PARTS

    def begin(self, record: dict[str, Any]) -> bool:
        """Make the folder, or find what an earlier attempt left. True when everything is there already.

        Raises UserError for a folder with other things in it, or of other settings.
        """
        file = self.folder / RECORD
        record = json.loads(json.dumps(record))  # as it is read again: tuples become lists
        if file.is_file():
            before = _read(file)
            if before.get("complete") or any(self.parts.glob("*.npz")):
                self._check(record, before)
            if before.get("complete"):
                return True
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise UserError(f"--to: {self.folder} is not empty and has no {RECORD}; take another folder")
        self.parts.mkdir(parents=True, exist_ok=True)
        for left in (*self.parts.glob(".*"), *self.folder.glob(".*.part")):  # of killed processes
            left.unlink()
        for left in self.folder.glob(".part.*"):
            shutil.rmtree(left, ignore_errors=True)
        _write_json(file, record | {"complete": False})
        return False

    def _check(self, record: dict[str, Any], before: dict[str, Any]) -> None:
        """Raises UserError where the pictures that are there were made with other settings."""
        other = "take another folder, or delete that one"
        if before.get("weights") != record["weights"]:
            raise UserError(
                f"--to: {self.folder} holds pictures of the weights of {before.get('checkpoint')}, and those of "
                f"{record['checkpoint']} are others; give --checkpoint {before.get('checkpoint')} to go on, {other}"
            )
        for key, value in record.items():  # what an older version did not note cannot be compared
            if key not in FREE and key in before and before[key] != value:
                raise UserError(
                    f"--to: {self.folder} holds pictures made with {key} {before.get(key)!r}, now it is {value!r}; "
                    f"{other}"
                )

    def missing(self, labels: np.ndarray) -> np.ndarray:
        """The numbers of the pictures that no finished batch has, ascending. Rank 0 alone: batches that a crash of the
        node left unreadable are removed, to be drawn again. Raises UserError where they are not of the classes
        `labels`: an older version may have chosen others."""
        todo = np.ones(self.num, bool)
        for part in self.parts.glob("*.npz"):
            try:
                with np.load(part) as values:
                    for name in values.files:  # a node that crashed may have left any part of it
                        values[name]
                    places, drawn = values["places"], values["labels"]
                if (labels[places] != drawn).any():
                    raise UserError(
                        f"--to: {self.folder} holds pictures of other classes; take another folder"
                    )
                todo[places] = False
            except UserError:
                raise
            except (EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile, zlib.error):
                part.unlink()
        return np.flatnonzero(todo)

    def add(self, places: Sequence[int], labels: Sequence[int], shots: np.ndarray, stats: dict) -> None:
        """A finished batch. shots (n, H, W, 3) uint8; stats: (n,) for each of `STATS`."""
        from trainer.pictures import save_png

        values = {"places": np.asarray(places), "labels": np.asarray(labels), **stats}
        if self.format == "png":
            for place, shot in zip(places, shots, strict=True):
                save_png(shot, self.folder / f"{place:09d}.png")
        else:
            values["images"] = shots
        name = f"{places[0]:09d}.npz"
        beside = self.parts / f".{name}.{os.getpid()}"
        with beside.open("wb") as handle:
            np.savez(handle, **values)
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(self.parts / name)

    def table(self) -> dict[str, np.ndarray]:
        """labels and `STATS` of all pictures, in order."""
        columns = {name: np.full(self.num, np.nan) for name in STATS} | {
            "labels": np.zeros(self.num, np.int64)
        }
        for part in self.parts.glob("*.npz"):
            with np.load(part) as values:
                for name, column in columns.items():
                    column[values["places"]] = values[name]
        return columns

    def assemble(
        self, labels: np.ndarray, names: Sequence[str], rank: int, size: int, stopped: Callable[[], bool]
    ) -> list:
        """Bring the finished batches into their format; every process calls it. Returns this one's index entries,
        for `seal`. Ends early where `stopped()` holds: then it is to be done again."""
        if self.format == "webdataset":
            return self._tars(labels, rank, size, stopped)
        if rank == 0:
            if self.format == "npz":
                self._npz(labels, stopped)
            else:
                with (self.folder / "labels.csv").open("w", newline="") as handle:
                    rows = csv.writer(handle)
                    rows.writerow(("file", "label", "class"))
                    rows.writerows((f"{i:09d}.png", k, names[k]) for i, k in enumerate(labels.tolist()))
        return []

    def seal(self, entries: list, record: dict[str, Any]) -> None:
        """Rank 0, when every process has assembled: index, record, and the finished batches go."""
        if self.format == "webdataset":
            from trainer.data.shards import write_index

            write_index(self.folder, sorted(entries, key=lambda entry: entry["url"]), "webdataset")
        _write_json(self.folder / RECORD, record | {"complete": True})
        shutil.rmtree(self.parts, ignore_errors=True)

    def _tars(self, labels: np.ndarray, rank: int, size: int, stopped: Callable[[], bool]) -> list:
        from trainer.data.shards import write_shard

        entries, shards, where = [], -(-self.num // self.shard), self._index()
        for number in range(rank, shards, size):
            if stopped():
                break
            places = range(number * self.shard, min((number + 1) * self.shard, self.num))
            samples = [
                {"image": shot.transpose(2, 0, 1), "label": int(labels[place])}
                for place, shot in zip(places, self._pictures(places, where), strict=True)
            ]
            entries.append(write_shard(self.folder, number, samples, "webdataset"))
        return entries

    def _npz(self, labels: np.ndarray, stopped: Callable[[], bool]) -> None:
        beside = self.folder / ".samples.npz.part"
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as out:
                for place, shot in enumerate(self._pictures(range(self.num), self._index())):
                    if place == 0:
                        header = {"descr": "|u1", "fortran_order": False, "shape": (self.num, *shot.shape)}
                        np.lib.format.write_array_header_1_0(out, header)
                    if place % 256 == 0 and stopped():
                        return
                    out.write(shot.tobytes())
            with archive.open("arr_1.npy", "w", force_zip64=True) as out:
                np.lib.format.write_array(out, labels.astype(np.int64))
        beside.replace(self.folder / "samples.npz")

    def _index(self) -> dict[int, tuple[Path, int]]:
        """The finished batch and the row in it of every picture."""
        where: dict[int, tuple[Path, int]] = {}
        for part in self.parts.glob("*.npz"):
            with np.load(part) as values:
                where |= {place: (part, row) for row, place in enumerate(values["places"].tolist())}
        return where

    def _pictures(self, places: Sequence[int], where: dict[int, tuple[Path, int]]) -> Iterator[np.ndarray]:
        """The pictures of these numbers, in this order, one finished batch in memory at a time (a few where an
        attempt with another batch size left holes between them)."""
        held: dict[Path, np.ndarray] = {}
        for place in places:
            part, row = where[place]
            if part not in held:
                if len(held) >= 4:
                    held.pop(next(iter(held)))
                with np.load(part) as values:
                    held[part] = values["images"]
            yield held[part][row]


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError:
        raise UserError(f"--to: {file} is not readable; take another folder, or delete that one") from None


def _write_json(file: Path, values: dict[str, Any]) -> None:
    beside = file.with_name(f".{file.name}.part")
    beside.write_text(json.dumps(values, indent=1) + "\n")
    beside.replace(file)
