"""The evaluations of a run, from its metrics.jsonl, as a table.

    python benchmarks/evaluations.py runs/demo [--most 6] [--markdown FILE] [--name demo]

Held-out error with the averaged and the raw weights, share of tokens kept in all and at clean (t < 100) and noisy
(t >= 900) timesteps, and how much of the backbone's output differs from token to token (trainer/heldout.py).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import add_outputs, facts_of_this_run, headline, markdown, plain_text, write_outputs
from trainer.metrics import read_rows


def table(rows):
    """A row per evaluation; a DiT has no router, so its last four cells are empty."""
    cells = [["images seen", "held-out mse", "raw weights", "kept", "t < 100", "t >= 900", "tokens differ"]]
    for row in rows:
        line = [f"{row['images']:,}", f"{row['heldout_mse']:.4f}", f"{row['heldout_mse_raw']:.4f}"]
        if "retained_share" in row:
            shares = (row["retained_share"], row["share_by_time"][0], row["share_by_time"][-1])
            line += [*(f"{share:.3f}" for share in shares), f"{row['backbone_variation']:.1e}"]
        cells.append(line + [""] * (len(cells[0]) - len(line)))
    return cells


def spread(rows, most):
    """At most `most` of the rows: the first, the last, and evenly between."""
    if len(rows) <= most:
        return rows
    return [rows[round(k * (len(rows) - 1) / (most - 1))] for k in range(most)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="DIR")
    parser.add_argument("--most", type=int, default=6, help="rows (default: 6)")
    parser.add_argument("--name", default="demo", help="of the table's place in --markdown (default: demo)")
    add_outputs(parser, "--markdown")
    args = parser.parse_args()
    rows = [row for row in read_rows(Path(args.run)) if row.get("eval")]
    if not rows or args.most < 2:
        parser.error(
            "--most must be at least 2" if rows else f"{args.run}: no evaluation in a metrics.jsonl there"
        )
    facts, cells = facts_of_this_run("benchmarks/evaluations.py"), table(spread(rows, args.most))
    print(f"{headline(facts)}\n{plain_text(cells, left=0)}")
    write_outputs(args, args.name, markdown(cells, facts, left=0))


if __name__ == "__main__":
    main()
