"""`dcdit prepare`: write the shards that training reads.

dcdit prepare images IMAGES --to data/imagenet256
dcdit prepare photos --to data/photos
"""

import argparse
import math
import sys
import time
from pathlib import Path

from tqdm import tqdm

if __name__ == "__main__":  # `python trainer/prepare.py` puts trainer/ first on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from model.errors import UserError
from trainer.data.manifest import FORMATS, Manifest
from trainer.data.open import open_source
from trainer.data.photos import CROP_PIXELS, PHOTOS, write_photos
from trainer.data.size import join_sizes, parse_size


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dcdit prepare", description="Write the shards and the manifest.json that training reads."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _photos_parser(commands)
    _images_parser(commands)
    return parser


def _photos_parser(commands) -> None:
    about = (
        f"Random crops of {len(PHOTOS)} photographs that ship inside scikit-image and scikit-learn, one class "
        "per photograph, reduced to small RGB pictures. Training crops come from the left 78 % of "
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
        default="32",
        metavar="PX",
        help=f"side in pixels, 8 to {CROP_PIXELS[0]}, or height and width: 24x40 or 24 40 (default: 32)",
    )
    add("--seed", type=int, default=0, help="another seed, other crops (default: 0)")
    add("--overwrite", action="store_true", help="replace photographs made with other arguments")
    photos.set_defaults(run=_photos)


def _images_parser(commands) -> None:
    about = (
        "Images to shards: centre crop as in ADM and DiT, then the mean and standard deviation of a VAE's latents, "
        "of the image and of its mirror image (training draws one of them anew at every step), or the pixels. "
        "May be stopped or killed at any time: finished parts are kept and the same command goes on."
    )
    images = commands.add_parser(
        "images", help="your own images: a folder or tar with one folder per class", description=about
    )
    add = images.add_argument
    add("source", type=Path, metavar="SRC", help="folder of class folders, or a tar with CLASS/NAME.jpg")
    add("--to", type=Path, required=True, metavar="DIR", help="folder to write")
    add(
        "--size",
        default="256",
        metavar="PX",
        help="side after the crop, or height and width: 256x384 or 256 384; multiples of 8 (default: 256)",
    )
    add(
        "--vae",
        default=None,
        metavar="NAME",
        help="diffusers AutoencoderKL: a folder, a name on the hub, or none to keep pixels "
        "(default: stabilityai/sd-vae-ft-ema)",
    )
    add("--scale", type=float, help="factor on latents (default: from the VAE's config, else 0.18215)")
    add("--no-mirror", action="store_true", help="no mirror images, for lettering and the like")
    add(
        "--heldout",
        type=float,
        metavar="N",
        help="images kept from training, or a fraction below 1 (default: 1024, at most a twentieth)",
    )
    add("--format", choices=FORMATS, default="mds", help="of the shards (default: mds)")
    add("--shard-mb", type=float, default=64, metavar="MB", help="size of a shard, unpacked (default: 64)")
    add("--seed", type=int, default=0, help="of the order in the shards (default: 0)")
    add("--workers", type=int, metavar="N", help="processes (default: one per GPU, or per CPU without any)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto, all GPUs)")
    add("--batch", type=int, default=16, metavar="N", help="images encoded at once (default: 16)")
    add(
        "--max-errors",
        type=int,
        default=100,
        metavar="N",
        help="images that may be skipped as unreadable; listed in DIR/skipped.txt (default: 100)",
    )
    add("--overwrite", action="store_true", help="replace what was made in DIR with other arguments")
    images.set_defaults(run=_images)


class _Progress:
    """A bar on a terminal; in a job's log, a line now and then."""

    SECONDS = 30.0

    def __init__(self, unit: str):
        self.unit, self.begin = unit, time.monotonic()
        self.told, self.first = self.begin, None
        self.bar = tqdm(
            total=0, desc=f"{unit}s", unit=unit, file=sys.stderr, leave=False, delay=0.3, disable=None
        )

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def __call__(self, done: int, total: int, skipped: int = 0) -> None:
        note, now = f", {skipped} skipped" if skipped else "", time.monotonic()
        if not self.bar.disable:
            self.bar.total = total
            self.bar.set_postfix_str(note.removeprefix(", "), refresh=False)
            self.bar.update(done - self.bar.n)
        elif now - self.told >= self.SECONDS:
            if self.first is None:  # what a former run did is not this one's speed
                self.first = done, now
            made, seconds = done - self.first[0], now - self.first[1]
            speed = f", {made / seconds:.0f} per second" if made else ""
            print(f"{self.unit}s: {done} of {total}{speed}{note}", file=sys.stderr, flush=True)
            self.told = now


def _photos(args: argparse.Namespace) -> None:
    with _Progress("crop") as progress:
        manifest, written = write_photos(
            args.to, args.samples_per_class, parse_size(args.size), args.seed, args.overwrite, progress
        )
    _report(args.to, manifest, written)


def _images(args: argparse.Namespace) -> None:
    from trainer.data.encode import DEFAULT_VAE
    from trainer.data.images import SKIPPED, Options, prepare_images

    for name in ("scale", "heldout", "shard_mb"):
        value = getattr(args, name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"--{name.replace('_', '-')} {value}: a finite number")
    options = Options(
        args.source.expanduser(),
        args.to.expanduser(),
        size=parse_size(args.size),
        vae=args.vae or DEFAULT_VAE,
        scale=args.scale,
        mirror=not args.no_mirror,
        heldout=args.heldout,
        format=args.format,
        shard_bytes=int(args.shard_mb * (1 << 20)),
        seed=args.seed,
        workers=args.workers,
        device=args.device,
        batch=args.batch,
        max_errors=args.max_errors,
        overwrite=args.overwrite,
    )
    try:
        with _Progress("image") as progress:
            manifest, written, skipped = prepare_images(options, progress)
    except KeyboardInterrupt:
        print("interrupted: finished parts are kept, the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    if skipped:
        print(f"skipped {skipped} images that cannot be read: {args.to / SKIPPED}", file=sys.stderr)
    _report(args.to, manifest, written)


def _report(to: Path, manifest: Manifest, written: bool) -> None:
    splits = " and ".join(f"{count} {name}" for name, count in manifest.splits.items())
    shards = sum(len(open_source(to, name).shard_sizes) for name in manifest.splits)
    shape = f"{manifest.height}x{manifest.width}x{manifest.channels}"
    verb = "wrote" if written else "already there:"
    print(f"{verb} {splits} samples of {manifest.num_classes} classes, {shape}, {shards} shards: {to}")


def main(argv: list[str] | None = None) -> int:
    """Run `dcdit prepare` with `argv` (default: the command line); the exit status."""
    try:
        args = _parser().parse_args(join_sizes(sys.argv[1:] if argv is None else argv))
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
