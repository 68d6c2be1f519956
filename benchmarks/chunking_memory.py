"""Peak memory of the chunking path beyond its inputs, its output and their gradients.

How: a process of its own runs under an allocator that writes down every allocation and release of at least 256
bytes (count_malloc.c through LD_PRELOAD; torch's tensors and the scratch of the C++ kernels alike). The
allocations that turn out to hold the output or a gradient of an input are left out; the peak is the largest sum
of the others that live at one time. One run before it warms up. Linux with glibc and a C compiler only. On a GPU
torch's own record of its allocations takes the place of that allocator.

KINDS: the path run through, and `ops_`: its ops as a model uses them, with other layers between packing and
de-chunking. There the packed rows and their gradient are inputs and outputs too; through the path they are not.
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

from benchmarks.chunking_cases import Size, dense, inputs, ours, run, widened

HERE = Path(__file__).resolve().parent


KINDS = ("forward", "forward_backward", "ops_forward", "ops_forward_backward")


class Event(ctypes.Structure):
    _fields_ = [("at", ctypes.c_size_t), ("bytes", ctypes.c_int64)]


def memory(cases):
    """([{kind: {form: bytes}}] for each (size, dtype name), None), or (None, why it could not be measured)."""
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
            input=json.dumps(
                {"cases": [(list(size), dtype) for size, dtype in cases], "threads": torch.get_num_threads()}
            ),
            env=os.environ | {"LD_PRELOAD": library},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        return None, f"memory: {(done.stderr.strip() or 'the process died').splitlines()[-1]}"
    return json.loads(done.stdout), None


def memory_of_gpu(cases):
    """The same of the current GPU."""
    try:
        return [peaks(Size(*size), dtype, "cuda") for size, dtype in cases], None
    except Exception as error:  # the record is no stable interface of torch: without it the rest still counts
        return None, f"memory: {type(error).__name__}: {error}"


def counted(work):
    """(what work() returns, [(address, bytes, negative where released)]), by the allocator of this process."""
    counter = ctypes.CDLL(None)
    counter.count_stop.restype = counter.count_room.restype = ctypes.c_long
    counter.count_events.restype = ctypes.POINTER(Event)
    counter.count_start()
    result = work()
    count = counter.count_stop()
    if count > counter.count_room():
        raise RuntimeError("more allocations than the counter has room for")
    return result, [(event.at, event.bytes) for event in counter.count_events()[:count]]


def recorded(work):
    """The same by torch's record of the current GPU."""
    torch.cuda.memory._record_memory_history(context=None, max_entries=1_000_000)
    try:
        result = work()
        trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    sign = {"alloc": 1, "free_completed": -1}
    return result, [(e["addr"], sign[e["action"]] * e["size"]) for e in trace if e["action"] in sign]


def peak(form, size, tensors, backward, apart):
    run(form, size, tensors, backward, apart)
    gc.collect()
    record = recorded if tensors[0].is_cuda else counted
    (out, grads), log = record(lambda: run(form, size, tensors, backward, apart))
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


def peaks(size, dtype, device="cpu"):
    """{kind: {form: bytes}}"""
    tensors = inputs(size, getattr(torch, dtype), device)
    forms = {"dense": (dense(), widened(tensors)), "ours": (ours(), tensors)}
    return {
        kind: {
            name: peak(form, size, given, "back" in kind, "ops" in kind)
            for name, (form, given) in forms.items()
        }
        for kind in KINDS
    }


def main():
    spec = json.load(sys.stdin)
    torch.set_num_threads(spec["threads"])
    print(json.dumps([peaks(Size(*size), dtype) for size, dtype in spec["cases"]]))


if __name__ == "__main__":
    main()
