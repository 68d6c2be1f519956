"""The processes that turn images into shards for `dcdit prepare images`.

One process decodes, crops and encodes a whole part, then takes the next; with one worker that is this process.
Workers are started afresh, not forked (GPUs), and notice by themselves when the process that started them dies.
"""

import errno
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from model.errors import UserError
from trainer.data import encode
from trainer.data.images import Done, Options
from trainer.data.listing import Item, centre_crop, parts_of, reader
from trainer.data.shards import write_shard
from trainer.vae import load_vae

Work = dict[tuple[str, int], list[Item]]


def cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Maker:
    """Makes parts: one VAE on one device, and threads that decode the next batch meanwhile."""

    def __init__(self, options: Options, device: str, threads: int):
        if find_spec("PIL") is None:
            raise UserError("`dcdit prepare images` needs the package pillow: pip install pillow")
        self.options, self.device = options, device
        self.read = reader(options.source)
        self.threads = ThreadPoolExecutor(max(1, threads))
        self.encoder: Any = encode.Pixels()
        if options.vae != "none":
            self.encoder = encode.Latents(load_vae(options.vae, device), options.mirror)

    def _decode(self, item: Item) -> np.ndarray | str:
        """The cropped image, or why there is none."""
        import io

        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.read(item))) as picture:
                return centre_crop(picture, self.options.size)
        except MemoryError:
            raise
        except Exception as error:  # what PIL's decoders raise on bad bytes is not a short list
            return " ".join(str(error).split()) or type(error).__name__

    def make(self, split: str, number: int, items: list[Item]) -> Iterator[int | Done]:
        """Decode, encode and write one part: the number of images seen as they are, at last the part.

        With more skipped than --max-errors it is not written, and not worth more work. Raises UserError.
        """
        samples: list[dict[str, Any]] = []
        skipped: list[tuple[str, str]] = []
        batches = parts_of(items, self.options.batch)
        with encode.one_thread(self.device):
            ahead = [self.threads.submit(self._decode, item) for item in batches[0]]
            for k, batch in enumerate(batches):
                images = [future.result() for future in ahead]
                ahead = [
                    self.threads.submit(self._decode, item) for item in (batches[k + 1 : k + 2] or [[]])[0]
                ]
                self._encode(batch, images, samples, skipped)
                yield len(batch)
                if len(skipped) > self.options.max_errors:
                    yield Done(split, number, 0, None, skipped)
                    return
        yield self._write(split, number, samples, skipped)

    def _encode(self, batch: list[Item], images: list, samples: list, skipped: list) -> None:
        good = [image for image in images if not isinstance(image, str)]
        encoded = iter(self.encoder(good) if good else ())
        for item, image in zip(batch, images, strict=True):
            columns = image if isinstance(image, str) else next(encoded)
            if isinstance(columns, str):
                skipped.append((item.name, columns))
            else:
                samples.append({**columns, "label": item.label})

    def _write(self, split: str, number: int, samples: list, skipped: list) -> Done:
        to = self.options.to
        try:
            entry = write_shard(to / split, number, samples, self.options.format) if samples else None
            done = Done(split, number, len(samples), entry, skipped)
            done.write(to)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise
            raise UserError(f"--to {to}: {error.strerror}: make room; the same command goes on") from error
        return done


def _worker(pipe: Connection, options: Options, device: str, threads: int) -> None:
    """Body of a worker process: parts in, what `Maker.make` yields or an error's text out, until the other end
    closes, be it by a kill."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the main process decides
    try:
        maker = Maker(options, device, threads)
        while True:
            for message in maker.make(*pipe.recv()):
                pipe.send(message)
    except (EOFError, BrokenPipeError):
        pass
    except UserError as error:
        pipe.send(str(error))


def make_parts(options: Options, devices: list[str], work: Work) -> Iterator[int | Done]:
    """Make the parts of `work`, in any order, on --workers processes over `devices`; yields as `Maker.make`."""
    if not work:
        return
    gpus = not devices[0].startswith("cpu")
    workers = min(options.workers or (len(devices) if gpus and options.vae != "none" else cpus()), len(work))
    threads = max(1, min(16, cpus() // workers)) if gpus else 1
    if workers == 1:
        maker = Maker(options, devices[0], threads)
        for (split, number), items in work.items():
            yield from maker.make(split, number, items)
        return
    yield from _in_processes(options, devices, work, workers, threads)


def _in_processes(
    options: Options, devices: list[str], work: Work, workers: int, threads: int
) -> Iterator[int | Done]:
    context = multiprocessing.get_context("spawn")
    processes = {}
    rest = iter(work.items())

    def give(pipe: Connection) -> bool:
        for (split, number), items in rest:
            pipe.send((split, number, items))
            return True
        pipe.close()
        return False

    try:
        for k in range(workers):
            ours, theirs = context.Pipe()
            target = (theirs, options, devices[k % len(devices)], threads)
            process = context.Process(target=_worker, args=target, daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
        busy = [pipe for pipe in processes if give(pipe)]
        while busy:
            for pipe in wait(busy):
                message = _receive(pipe, processes[pipe])
                yield message
                if isinstance(message, Done) and not give(pipe):
                    busy.remove(pipe)
        for process in processes.values():
            process.join()
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join()


def _receive(pipe: Connection, process: Any) -> int | Done:
    try:
        answer = pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        raise UserError(
            f"a worker of `dcdit prepare` died (exit status {process.exitcode}): if memory ran out, lower "
            "--workers or --batch; finished parts are kept and the same command goes on"
        ) from None
    if isinstance(answer, str):
        raise UserError(answer)
    return answer
