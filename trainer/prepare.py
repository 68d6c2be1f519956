"""`dcdit prepare`: write the MDS shards that training reads.

dcdit prepare photos --to data/photos
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

if __name__ == "__main__":  # `python trainer/prepare.py` puts trainer/ first on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from model.errors import UserError
from trainer.data.open import open_source
from trainer.data.photos import CROP_PIXELS, PHOTOS, write_photos


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dcdit prepare", description="Write the MDS shards and the manifest.json that training reads."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = (
        f"Random square crops of {len(PHOTOS)} photographs that ship inside scikit-image and scikit-learn, "
        "one class per photograph, reduced to small RGB squares. Training crops come from the left 78 % of "
        "each photograph, held-out crops (a fifth as many) from the right 20 %. Nothing is downloaded; the "
        "same arguments write the same bytes, and a data set that is there already is left as it is."
    )
    photos = commands.add_parser(
        "photos", help="a small set of real photographs, from packages that are installed", description=about
    )
    add = photos.add_argument
    add("--to", type=Path, required=True, metavar="DIR", help="folder to write")
    add(
        "--samples-per-class",
        type=int,
        default=300,
        metavar="N",
        help="crops to train on, of each (default: 300)",
    )
    add(
        "--size",
        type=int,
        default=32,
        metavar="PX",
        help=f"side in pixels, 8 to {CROP_PIXELS[0]} (default: 32)",
    )
    add("--seed", type=int, default=0, help="another seed, other crops (default: 0)")
    add("--overwrite", action="store_true", help="replace photographs made with other arguments")
    photos.set_defaults(run=_photos)
    return parser


def _photos(args: argparse.Namespace) -> None:
    with tqdm(total=0, desc="photographs", unit="crop", file=sys.stderr, leave=False, delay=0.3) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        manifest, written = write_photos(
            args.to, args.samples_per_class, args.size, args.seed, args.overwrite, progress
        )
    splits = " and ".join(f"{count} {name}" for name, count in manifest.splits.items())
    shards = sum(len(open_source(args.to, name).shard_sizes) for name in manifest.splits)
    shape = f"{manifest.height}x{manifest.width}x{manifest.channels}"
    verb = "wrote" if written else "already there:"
    print(f"{verb} {splits} samples of {manifest.num_classes} classes, {shape}, {shards} shards: {args.to}")


def main(argv: list[str] | None = None) -> int:
    """Run `dcdit prepare` with `argv` (default: the command line); the exit status."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
