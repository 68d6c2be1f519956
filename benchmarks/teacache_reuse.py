"""What TeaCache should reuse in a DC-DiT: the error of a reused call's prediction, three ways, on the demo's model.

    make demo
    python benchmarks/teacache_reuse.py runs/demo [--gap 20] [--markdown docs/composition.md]

Held-out photographs are noised to t and, with the same noise, to t - gap. The first call is computed, the second
reuses. `blocks`: what the blocks added, by place, as model/teacache.py does it. `de-chunked`: the plug-back of the
first call. `change`: that plug-back plus what the dense tokens changed since. Columns: relative L2 distance of the
predicted noise to the computed one; `stale` is that of the first call's own prediction; `input`, the relative L1
change that TeaCache would have seen.
"""

import argparse
import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.tables import facts_of_this_run, markdown, place, plain_text
from model import chunking
from model.teacache import TeaCache
from trainer.config import load_config
from trainer.data import heldout_batches, open_source
from trainer.drawing import load_source

HEADER = ("t", "input", "blocks", "de-chunked", "change", "stale")


@contextmanager
def replaced_dechunk(replacement):
    """The model's de-chunk is `replacement(original, h, routing, residual, sigma, backend)` meanwhile."""
    original = chunking.dechunk
    chunking.dechunk = lambda *args: replacement(original, *args)
    try:
        yield
    finally:
        chunking.dechunk = original


def predictions(model, first: tuple, second: tuple, channels: int) -> tuple[dict[str, torch.Tensor], float]:
    """What the second call predicts in each way, and the change of the input."""
    plug, dense = [], []

    def keep(original, h, routing, residual, *rest):
        out = original(h, routing, residual, *rest)
        plug.append(out - residual)
        return out

    hook = model.encoder.register_forward_hook(lambda module, args, out: dense.append(out))
    with replaced_dechunk(keep):
        found = {"stale": model(*first).sample, "computed": model(*second).sample}
    with replaced_dechunk(lambda original, h, routing, residual, *rest: plug[0] + residual):
        found["de-chunked"] = model(*second).sample
    with replaced_dechunk(
        lambda original, h, routing, residual, *rest: plug[0] + dense[1] - dense[0] + residual
    ):
        found["change"] = model(*second).sample
    hook.remove()
    cache = TeaCache(model, float("inf"))
    cache(*first)
    found["blocks"] = cache(*second).sample
    return {name: value[:, :channels] for name, value in found.items()}, cache.change.mean().item()


def main() -> None:
    text = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text.add_argument("run", help="the demo's run")
    text.add_argument("--gap", type=int, default=20, help="timesteps between the calls; 20: 50 steps of 1000")
    text.add_argument("--markdown", metavar="FILE")
    args = text.parse_args()
    source = load_source(args.run, "cpu")
    data = open_source(load_config(Path(args.run) / "config.yaml").data.path, "heldout")
    batch = next(iter(heldout_batches(data, seed=0, count=19, batch_size=19)))
    x0, noise, y, process = batch["image"], batch["noise"], batch["label"], source.process
    cells = [list(HEADER)]
    for t in (40, 100, 200, 400, 600, 800, 950):
        times = [torch.full((len(y),), t - gap) for gap in (0, args.gap)]
        calls = [(process.add_noise(x0, noise, at), at, y) for at in times]
        with torch.no_grad():
            found, change = predictions(source.model, *calls, x0.shape[1])
        want = found["computed"]
        errors = [((found[name] - want).norm() / want.norm()).item() for name in HEADER[2:]]
        cells.append([str(t), f"{change:.3f}", *(f"{error:.4f}" for error in errors)])
    print(plain_text(cells, left=1))
    if args.markdown:
        facts = facts_of_this_run("benchmarks/teacache_reuse.py")
        place(args.markdown, "teacache-reuse", markdown(cells, facts, left=1))


if __name__ == "__main__":
    main()
