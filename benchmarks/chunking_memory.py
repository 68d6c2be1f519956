"""Peak memory of the chunking path beyond its inputs, its output and their gradients.

How: a process of its own runs under an allocator that writes down every allocation and release of at least 256
bytes (count_malloc.c through LD_PRELOAD; torch's tensors and the scratch of the C++ kernels alike). The
allocations that turn out to hold the output or a gradient of an input are left out; the peak is the largest sum
of the others that live at one time. One run before it warms up. Linux with glibc and a C compiler only.
"""

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.chunking_cases import Size, dense, inputs, our_path, run, widened

HERE = Path(__file__).resolve().parent


class Event(ctypes.Structure):
    _fields_ = [("at", ctypes.c_size_t), ("bytes", ctypes.c_int64)]


def memory(cases, threads):
    """([{pass: {form: bytes}}] for each (size, dtype name), None), or (None, why it could not be measured)."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or not compiler:
        return None, "memory: needs Linux with glibc and a C compiler (cc)"
    with tempfile.TemporaryDirectory() as folder:
        library = os.path.join(folder, "count_malloc.so")
        build = [*compiler.split(), "-O1", "-fPIC", "-shared", str(HERE / "count_malloc.c"), "-o", library]
        built = subprocess.run(build, capture_output=True, text=True)
        if built.returncode:
            return None, f"memory: {built.stderr.strip().splitlines()[-1]}"
        done = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps({"cases": [(list(size), dtype) for size, dtype in cases], "threads": threads}),
            env=os.environ | {"LD_PRELOAD": library},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        return None, f"memory: {(done.stderr.strip() or 'the process died').splitlines()[-1]}"
    return json.loads(done.stdout), None


def peak(path, size, tensors, backward):
    """Bytes, by the allocator that this process was started under."""
    counter = ctypes.CDLL(None)
    counter.count_stop.restype = counter.count_room.restype = ctypes.c_long
    counter.count_events.restype = ctypes.POINTER(Event)
    run(path, size, tensors, backward)
    gc.collect()
    counter.count_start()
    out, grads = run(path, size, tensors, backward)
    count = counter.count_stop()
    if count > counter.count_room():
        raise RuntimeError("more allocations than the counter has room for")
    log = [(event.at, event.bytes) for event in counter.count_events()[:count]]
    wanted = {t.untyped_storage().data_ptr() for t in (out, *grads)}
    # The last allocation at a wanted address is the one that is still there.
    kept = {at: k for k, (at, size) in enumerate(log) if size > 0 and at in wanted}
    live, total, most = {}, 0, 0
    for k, (at, size) in enumerate(log):
        if size > 0 and kept.get(at) != k:
            live[at] = size
            total += size
            most = max(most, total)
        elif size < 0:
            total -= live.pop(at, 0)
    return most


def main():
    spec = json.load(sys.stdin)
    torch.set_num_threads(spec["threads"])
    forms = {"dense": dense(), "ours": our_path("auto")}
    rows = []
    for size, dtype in spec["cases"]:
        size, row = Size(*size), {}
        tensors = inputs(size, getattr(torch, dtype))
        for name in ("forward", "forward_backward"):
            backward = name != "forward"
            row[name] = {
                form: peak(path, size, widened(tensors) if form == "dense" else tensors, backward)
                for form, path in forms.items()
            }
        rows.append(row)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
