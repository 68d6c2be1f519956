"""The benchmarks that are not tested beside what they measure: what they share, scenes, evidence, a step, imbalance."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import backbone_start, evidence, imbalance, router_texture, scenes
from benchmarks.tables import add_outputs, command, markdown, place, plain_text, write_outputs
from model import DCDiT, preset
from trainer.data.manifest import Manifest

ROOT = Path(__file__).parents[1]


def test_a_table_takes_its_place_and_nothing_else(tmp_path):
    file = tmp_path / "doc.md"
    file.write_text(
        "before\n<!-- one -->\nold\n<!-- end one -->\nbetween\n<!-- two -->\n<!-- end two -->\nafter\n"
    )
    place(file, "one", "new\n")
    place(file, "two", "2\n")
    want = "before\n<!-- one -->\nnew\n<!-- end one -->\nbetween\n<!-- two -->\n2\n<!-- end two -->\nafter\n"
    assert file.read_text() == want
    place(file, "one", "newer\n")
    assert file.read_text() == want.replace("new\n", "newer\n")
    place(tmp_path / "alone.md", "one", "text\n")
    assert (tmp_path / "alone.md").read_text() == "text\n"


def test_tables_have_a_line_for_every_row():
    cells, facts = (
        [["a", "b"], ["x", "1"], ["long", "22"]],
        {"command": "python x", "machine": "m", "threads": 1},
    )
    facts |= {"torch": "2", "date": "d", "native": True}
    assert plain_text(cells, left=1).splitlines() == ["a      b", "x      1", "long  22"]
    assert markdown(cells, facts, left=1).splitlines()[2:] == [
        "| a | b |",
        "|---|---:|",
        "| x | 1 |",
        "| long | 22 |",
    ]


def test_outputs_are_written_where_asked_and_left_out_of_the_command(tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds")
    add_outputs(parser, "--json", "--markdown", "--svg")
    words = ["--json", str(tmp_path / "n.json"), "--rounds", "5", f"--svg={tmp_path / 'c.svg'}"]
    write_outputs(parser.parse_args(words), "one", "text\n", {"rows": [1]}, "<svg/>")
    assert json.loads((tmp_path / "n.json").read_text()) == {"rows": [1]}
    assert (tmp_path / "c.svg").read_text() == "<svg/>" and len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(sys, "argv", ["x", *words])
    assert command("benchmarks/step.py") == "python benchmarks/step.py --rounds 5"


def test_scenes_are_a_function_of_their_arguments_and_differ_by_class(tmp_path):
    one = scenes.scene(0, 5, 3, 32)
    assert one.shape == (32, 32, 3) and one.dtype == np.uint8
    assert np.array_equal(one, scenes.scene(0, 5, 3, 32))
    for other in (scenes.scene(1, 5, 3, 32), scenes.scene(0, 6, 3, 32), scenes.scene(0, 5, 4, 32)):
        assert not np.array_equal(one, other)
    assert len(scenes.CLASSES) == len(set(scenes.CLASSES)) == 64

    def rough(label):
        pictures = np.stack([scenes.scene(0, label, n, 32) for n in range(8)]).astype(float)
        return np.abs(np.diff(pictures, axis=2)).mean()

    by_fill = {fill: rough(k) for k, fill in enumerate(scenes.FILLS)}
    assert (
        by_fill["graded", "flat"] < 0.3 * by_fill["flat", "grain"]
    )  # there are flat pictures and textured ones
    scenes.write(tmp_path, 1, 16, 0)
    assert len(list(tmp_path.glob("*/*.png"))) == 64


@pytest.fixture
def plan():
    names = tuple(scenes.CLASSES)
    manifest = Manifest(
        kind="pixels", channels=3, height=32, width=32, class_names=names, splits={"train": 640, "heldout": 64},
        flip=None, source="scenes", recipe={},
    )  # fmt: skip
    return argparse.Namespace(
        preset="DC-DiT-XS", data="x", set=[], images=12800, batch=32, multi_budget_after=0.25
    ), manifest


def test_every_run_of_the_evidence_costs_the_same(plan):
    args, manifest = plan
    budget = evidence.cost("dcdit", args.images, args, manifest)
    for name in evidence.RUNS:
        images = evidence.images_of(name, args, manifest)
        step = evidence.per_image(name, args, manifest)[1] * args.batch
        assert images % args.batch == 0 and abs(evidence.cost(name, images, args, manifest) - budget) <= step
    assert evidence.images_of("dcdit", args, manifest) == 12800
    assert evidence.images_of("dit4", args, manifest) > evidence.images_of("n16", args, manifest) > 12800
    assert evidence.images_of("dit2", args, manifest) == pytest.approx(12800, rel=0.05)
    args.multi_budget_after = 1.0  # dearer images
    assert evidence.images_of("dit2", args, manifest) > 1.15 * 12800


def test_evidence_is_collected_with_its_spread_over_seeds(plan, tmp_path):
    """One seed of DiT/2 and a run that is not there; of DC-DiT two seeds at two rhos."""
    args, manifest = plan
    args.only, args.seeds, args.to = ["dcdit", "dit2", "cosine"], [0, 1, 2], tmp_path
    points = {"dcdit-0": (0.04, 0.05), "dcdit-1": (0.02, 0.03), "dit2-0": (0.05,)}
    for folder, errors in points.items():
        (tmp_path / folder).mkdir()
        found = [
            {
                "tail_drop": rho,
                "retained_share": 0.25,
                "gflops_per_image": 10 - k,
                "heldout_mse": e,
                "frechet": 2 * e,
            }
            for k, (rho, e) in enumerate(zip((0.0, 0.3), errors, strict=False))
        ]
        (tmp_path / folder / "elastic.json").write_text(json.dumps({"rows": found}))
    rows = evidence.collect(args, manifest)
    assert [(row["run"], row["tail_drop"], row["seeds"]) for row in rows] == [
        ("dcdit", 0.0, [0, 1]), ("dcdit", 0.3, [0, 1]), ("dit2", 0.0, [0]),
    ]  # fmt: skip
    assert [row["heldout_mse"] for row in rows] == pytest.approx([0.03, 0.04, 0.05])
    assert [row["frechet_spread"] for row in rows] == pytest.approx([0.02, 0.02, 0])
    cells = evidence.table(rows)
    assert len(cells) == 4 and all(len(line) == len(cells[0]) for line in cells)
    assert cells[1][-4] == "0.0300 ± 0.0100" and cells[3][-4] == "0.0500"
    evals = [{"eval": True, "images": n, "heldout_mse": 1 / (n + 1)} for n in (0, 3200, 12800)]
    lines = [json.dumps(row) for row in [*evals, {"step": 1, "images": 32, "loss": 1.0}]]
    (tmp_path / "dcdit-0" / "metrics.jsonl").write_text("\n".join(lines))
    spent = [x for x, _ in evidence.learning("dcdit", args, manifest)]
    assert spent == pytest.approx([rows[0]["training_tflops"] * share for share in (spent[0] / spent[1], 1)])
    assert 0.25 < spent[0] / spent[1] < 0.35  # a quarter of the images, before multi-budget
    assert evidence.plot(rows, args, manifest).count("DC-DiT, N = 4") == 2


def test_evidence_makes_its_photographs_once(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "PHOTOS_PER_CLASS", 5)
    for _ in range(2):
        args = argparse.Namespace(photos=True, data=None, to=tmp_path / "runs", size=8)
        manifest = evidence.prepare(args)
        assert manifest.splits == {"train": 95, "heldout": 19} and args.data == str(tmp_path / "photos-8")


@pytest.fixture(scope="module")
def small_scenes(tmp_path_factory):
    return scenes.prepared(tmp_path_factory.mktemp("scenes"), 16, per_class=4)


def test_evidence_trains_measures_and_then_finds_its_work_done(small_scenes, tmp_path):
    words = ["--only", "dcdit,dit2", "--seeds", "0", "--images", "32", "--pictures", "4", "--steps", "2",
             "--heldout", "8", "--rhos", "0,0.5", "--data", small_scenes, "--to", str(tmp_path / "runs")]  # fmt: skip
    command = [sys.executable, str(ROOT / "benchmarks/evidence.py"), *words, "--at-once", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(*more):
        return subprocess.run(
            [*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    first = run("--json", str(tmp_path / "x.json"))
    assert first.returncode == 0, first.stderr
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [(row["run"], row["tail_drop"]) for row in rows] == [("dcdit", 0), ("dcdit", 0.5), ("dit2", 0)]
    assert 0 < rows[0]["differ"] <= 1 and rows[2]["differ"] is None
    assert rows[1]["gflops_per_image"] < rows[0]["gflops_per_image"]
    before = (tmp_path / "runs/dcdit-0/metrics.jsonl").read_bytes()
    again = run()
    assert again.returncode == 0 and "images" not in again.stdout.split("model")[0], again.stdout
    assert (tmp_path / "runs/dcdit-0/metrics.jsonl").read_bytes() == before
    doc = tmp_path / "doc.md"
    doc.write_text("<!-- own -->\n<!-- end own -->\n<!-- evidence -->\nkept\n<!-- end evidence -->\n")
    assert run("--collect", "--name", "own", "--markdown", str(doc)).returncode == 0
    own, rest = doc.read_text().split("<!-- end own -->")
    assert (
        "| DiT/2 |" in own
        and "--collect" not in own
        and rest == "\n<!-- evidence -->\nkept\n<!-- end evidence -->\n"
    )
    failed = run("--set", "optimizer.lr=-1")
    assert failed.returncode == 2 and failed.stderr.startswith("error: optimizer.lr: must be above 0")
    failed = run("--set", "ops.backend=triton", "--to", str(tmp_path / "other"))
    assert failed.returncode == 1 and "ops_backend=triton" in failed.stderr and "-0.log" in failed.stderr


def test_what_the_backbone_says_is_seen_while_it_learns(small_scenes):
    args = argparse.Namespace(data=small_scenes, seed=0, preset="DC-DiT-Ti")
    rows = backbone_start.trace("quiet", args, [1, 2])
    assert len(rows) == 2 and set(rows[0]) == set(backbone_start.TIMES)
    for seen in rows[-1].values():
        assert 0 < seen["differ"] < 1 and seen["mse"] > 0.5 and 0.2 < seen["kept"] < 0.3
    cells = backbone_start.table({"quiet": rows}, [1, 2])
    assert len(cells) == 1 + 2 * 3 and all(len(line) == len(cells[0]) for line in cells)


def test_evaluations_of_a_run_as_a_table(tmp_path):
    routed = {"retained_share": 0.25, "share_by_time": [0.4, 0.2, 0.1], "backbone_variation": 0.031}
    rows = [
        {"eval": True, "images": n, "heldout_mse": 1 / (n + 1), "heldout_mse_raw": 0.5}
        for n in range(0, 50, 10)
    ]
    rows[1:] = [row | routed for row in rows[1:]]
    lines = [json.dumps(row) for row in [*rows, {"step": 1, "images": 32, "loss": 1.0}]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    script = [sys.executable, str(ROOT / "benchmarks/evaluations.py"), str(tmp_path), "--most", "3"]
    out = tmp_path / "x.md"
    subprocess.run([*script, "--markdown", str(out)], check=True, capture_output=True)
    cells = [line.split("|")[1:-1] for line in out.read_text().splitlines() if line.startswith("|")]
    assert [line[0].strip() for line in cells[2:]] == ["0", "20", "40"]
    assert [cell.strip() for cell in cells[3][3:]] == ["0.250", "0.400", "0.100", "3.1e-02"]
    assert not cells[2][3].strip()
    wrong = subprocess.run([*script[:2], str(tmp_path / "none")], capture_output=True, text=True)
    assert wrong.returncode == 2 and "no evaluation" in wrong.stderr


def test_imbalance_grows_with_ranks_and_less_when_stratified():
    u = np.linspace(0, 1, 4000, endpoint=False)
    recorded = u, 300.0 - 200 * u
    alone = [imbalance.simulate(recorded, ranks, 4, "alone", 30) for ranks in (4, 64)]
    spread = [imbalance.simulate(recorded, ranks, 4, "stratified", 30) for ranks in (4, 64)]
    best = imbalance.simulate(recorded, 64, 4, "best", 30)
    assert 1 < alone[0] < alone[1] and 1 <= best < spread[1] < alone[1] and spread[0] < alone[0]


def test_what_the_backbone_says_is_told_from_what_it_disturbs():
    same, two = torch.full((6, 4), 3.0), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    assert router_texture.variation(same).item() == pytest.approx(0, abs=1e-6)
    assert router_texture.variation(two).item() == pytest.approx(0.5)

    torch.manual_seed(0)
    config = preset("DC-DiT-Ti", depth=1, in_channels=3, input_size=8, num_classes=2)
    model = DCDiT(config).eval().requires_grad_(False)
    model.final_layer.linear.weight.normal_()
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([10, 900]), torch.tensor([0, 1])
    whole = model(x, t, y).sample
    with router_texture.averaged(model.backbone) as had:
        alone = model(x, t, y).sample
    assert len(had) == 1 and had[0] > 0.1 and not torch.allclose(whole, alone, atol=1e-3)
    assert torch.equal(model(x, t, y).sample, whole)  # the backbone is itself again

    # A backbone whose tokens are all one vector is worth nothing, and that is what the table then says.
    model.backbone.norm.weight.zero_()
    with router_texture.averaged(model.backbone):
        alone = model(x, t, y).sample
    assert torch.equal(model(x, t, y).sample, alone)


def test_a_step_is_measured_and_its_parts_add_up(tmp_path):
    words = ["--models", "DC-DiT-Ti,DiT-Ti/2", "--batch", "2", "--grid", "8", "--rounds", "1", "--warm", "1"]
    command = [sys.executable, str(ROOT / "benchmarks/step.py"), *words, "--parts", "--threads", "1"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "x.json")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [(row["model"], row["kind"]) for row in rows] == [
        ("DC-DiT-Ti", "eager"), ("DC-DiT-Ti", "capacity"), ("DiT-Ti/2", "eager"),
    ]  # fmt: skip
    for row in rows:
        assert sum(row["parts"].values()) == pytest.approx(1) and row["parts"]["matrix products"] > 0
        assert row["images_per_second"] == pytest.approx(2000 / row["ms"])
        assert row["efficiency"] == pytest.approx(
            row["images_per_second_over_dit"] * row["gflops_per_image_over_dit"]
        )
    assert rows[2]["efficiency"] == 1 and 0.2 < rows[0]["retained"] < 0.3
    assert "DC-DiT-Ti" in done.stdout


def test_a_gpu_needs_only_torch_for_its_benchmarks():
    """A machine lent for minutes may have torch and numpy, and nothing of what the trainer wants besides."""
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(('omegaconf', 'deepspeed', 'rich', 'streaming')))\n"
    )
    modules = (
        "benchmarks.chunking, benchmarks.step, tests.model.test_cuda_ops, tests.model.test_cuda_capacity"
    )
    subprocess.run([sys.executable, "-c", f"{blocked}import {modules}"], cwd=ROOT, check=True)


def test_the_gpu_command_goes_on_after_what_has_no_time_and_says_so(tmp_path):
    command = [str(ROOT / "benchmarks/gpu.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, env=os.environ | {"LIMIT": "0"}, capture_output=True, text=True)
    summary = (tmp_path / "out/summary.txt").read_text()
    assert done.returncode == 1 and summary in done.stdout
    lines = [line for line in summary.splitlines() if "left out: no time" in line]
    assert len(lines) == 15 and lines[0].startswith("machine") and lines[1].startswith("build")
    assert subprocess.run(command[:1], capture_output=True).returncode == 2
