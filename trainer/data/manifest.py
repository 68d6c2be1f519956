"""manifest.json: what a prepared data set holds, in words a trainer and a person can read.

    DATA/manifest.json
    DATA/train/index.json, shard.00000.mds.zstd, ...     one folder of shards per split (.tar for webdataset)
    DATA/heldout/index.json, ...

The index knows shards and bytes; the manifest knows what they mean: pixels or latents, the shape, the
classes, the scale.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from model.errors import UserError

NAME = "manifest.json"
VERSION = 1
PREPARE = "make it with `dcdit prepare`"
FORMATS = ("mds", "webdataset")


def checksum(path: str | Path) -> str:
    """What stands in `Manifest.checksums` for the index file of a split: "sha256:..."."""
    return f"sha256:{sha256(Path(path).read_bytes()).hexdigest()}"


@dataclass(frozen=True)
class Manifest:
    """A prepared data set.

    kind: "pixels" (uint8 RGB or grey, seen by the model in [-1, 1]) or "latents" (mean and std of a VAE).
    channels, height, width: what the model sees.
    splits: name -> number of samples. scale: latents are multiplied by it.
    flip: the classes whose images may be mirrored; None means all of them.
    format: of the shards, "mds" or "webdataset". checksums: split -> `checksum` of its index.json, which holds
    those of the shards; splits may be missing. vae: name or folder of the VAE that made latents.
    source: where it came from, one line. recipe: the arguments that made it, so that the same command finds
    its work done.
    """

    kind: str
    channels: int
    height: int
    width: int
    class_names: tuple[str, ...]
    splits: dict[str, int]
    scale: float = 1.0
    flip: tuple[int, ...] | None = None
    source: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    format: str = "mds"
    checksums: dict[str, str] = field(default_factory=dict)
    vae: str = ""
    version: int = VERSION

    @property
    def num_classes(self) -> int:
        """Number of classes; also the label of the null class."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample as the model sees it."""
        return self.channels, self.height, self.width

    @property
    def samples(self) -> int:
        """Samples of all splits together."""
        return sum(self.splits.values())

    def to_dict(self) -> dict[str, Any]:
        """As written to JSON, with num_classes and samples spelled out."""
        return {**asdict(self), "num_classes": self.num_classes, "samples": self.samples}

    @classmethod
    def from_dict(cls, values: Any, where: str = NAME) -> "Manifest":
        """Check and take over a dict read from JSON. Raises UserError that names `where` and the field."""
        if not isinstance(values, dict):
            raise UserError(f"{where}: not a manifest: {PREPARE}")
        known = {f.name: f for f in fields(cls)}
        needed = ("kind", "channels", "height", "width", "class_names", "splits")
        missing = [name for name in needed if name not in values]
        if missing:
            raise UserError(f"{where}: no {missing[0]!r} in it: not a manifest of this program; {PREPARE}")
        if values.get("version", VERSION) != VERSION:
            raise UserError(f"{where}: version {values['version']}, this program reads {VERSION}: {PREPARE}")
        kept = {name: value for name, value in values.items() if name in known}
        kept["class_names"] = tuple(kept["class_names"])
        if kept.get("flip") is not None:
            kept["flip"] = tuple(kept["flip"])
        manifest = cls(**kept)
        manifest._check(where)
        return manifest

    def _check(self, where: str) -> None:
        if self.kind not in ("pixels", "latents"):
            raise UserError(f"{where}: kind is {self.kind!r}, not 'pixels' or 'latents': {PREPARE}")
        if self.format not in FORMATS:
            raise UserError(f"{where}: format is {self.format!r}, not one of {', '.join(FORMATS)}: {PREPARE}")
        for name in ("channels", "height", "width"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{where}: {name} is {value!r}, not a whole number above 0: {PREPARE}")
        if not self.class_names:
            raise UserError(f"{where}: class_names is empty: {PREPARE}")
        bad = [k for k in self.flip or () if not 0 <= k < self.num_classes]
        if bad:
            raise UserError(f"{where}: flip names class {bad[0]}, of {self.num_classes} classes: {PREPARE}")

    @classmethod
    def parse(cls, text: str, where: str = NAME) -> "Manifest":
        """Read JSON text. Raises UserError that names `where`."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg}, line {error.lineno}): {PREPARE}") from None
        return cls.from_dict(values, where)

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """Read folder/manifest.json. Raises UserError if the folder or the file is missing or damaged."""
        folder = Path(folder)
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "no such folder"
            raise UserError(f"data {folder}: {what}: give the folder that `dcdit prepare` wrote")
        path = folder / NAME
        try:
            return cls.parse(path.read_text(), str(path))
        except FileNotFoundError:
            raise UserError(f"data {folder}: no {NAME} in it: {PREPARE}, or give the folder above") from None

    def write(self, folder: str | Path) -> None:
        """Write folder/manifest.json, all of it or nothing."""
        beside = Path(folder) / f".{NAME}.part"
        beside.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        beside.replace(Path(folder) / NAME)
