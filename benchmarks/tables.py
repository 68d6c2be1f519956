"""What the benchmarks share: tables, the facts of a run, and an allocator that keeps its memory."""

import datetime
import json
import os
import platform
import shlex
import sys
from pathlib import Path

import torch

from model.ops import available

# glibc's allocator, told to keep what is freed: else every large tensor of every form comes as untouched pages, and
# taking those costs several times the arithmetic of any form.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


COLLECT = "--collect"  # only the table of what is there
OUTPUTS = {
    "--json": "the numbers, too",
    "--markdown": "and the table, between its own lines of this file",
    "--svg": "and the chart",
}


def add_outputs(parser, *flags):
    """Flags, of OUTPUTS, that `write_outputs` reads."""
    for flag in flags:
        parser.add_argument(flag, metavar="FILE", help=OUTPUTS[flag])


def write_outputs(args, name, text, numbers=None, svg=None):
    """Write what was asked for: `text` in its place in --markdown, `numbers` as --json, `svg` as --svg."""
    if args.markdown:
        place(args.markdown, name, text)
    if getattr(args, "json", None):
        Path(args.json).write_text(json.dumps(numbers, indent=1) + "\n")
    if getattr(args, "svg", None):
        Path(args.svg).write_text(svg)


def plain_text(cells, left=3):
    """Rows of cells, the header first, as aligned text; the first `left` columns are words."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = [
            c.ljust(w) if k < left else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded))
    return "\n".join(lines)


def markdown(cells, facts, left=3):
    """The same as a markdown table under the command and the machine that made it."""
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("---" if k < left else "---:" for k in range(len(cells[0]))) + "|")
    return f"`{facts['command']}`: {headline(facts)}.\n\n" + "\n".join(lines) + "\n"


def machine():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def command(script):
    """The command line that makes the numbers: without its output files, and whether or not they were there already."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if word == COLLECT:
            continue
        output = word.split("=")[0] in OUTPUTS
        if not skip and not output:
            words.append(word)
        skip = output and "=" not in word
    return shlex.join(["python", script, *words])


def add_device(parser):
    """--device: the GPU where there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=default, help="default: %(default)s here"
    )


def wait(device):
    """Until `device` has done all that it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def facts_of_this_run(script, device="cpu"):
    return {
        "machine": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else machine(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "native": available()["native"],
        "command": command(script),
    }


def headline(facts):
    native = "native ops" if facts["native"] else f"no native ops ({available()['reason']})"
    return (
        f"{facts['machine']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}, {native}"
    )


def keep_memory():
    """Start this process again under KEEP_MEMORY, which the allocator reads only once."""
    if sys.platform == "linux" and not KEEP_MEMORY.items() <= os.environ.items():
        os.environ.update(KEEP_MEMORY)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def place(file, name, text):
    """Write `text` between the lines `<!-- NAME -->` and `<!-- end NAME -->` of `file`, or as the whole of it where it
    has no such lines: tables in docs are made again by their command, never edited."""
    file, begin, end = Path(file), f"<!-- {name} -->\n", f"<!-- end {name} -->"
    before = file.read_text() if file.exists() else ""
    if begin in before and end in before:
        head, _, rest = before.partition(begin)
        text = head + begin + text + end + rest.partition(end)[2]
    file.write_text(text)
