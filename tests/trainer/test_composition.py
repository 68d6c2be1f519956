"""DyDiT and TeaCache from the outside: sampling with them, what it costs, gates that begin on the way."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch

from model import DCDiT, preset
from model.errors import UserError
from model.flops import flops
from tests.trainer.synthetic_run import CLASSES, SIZE, export, mds, run_folder, tiny_model
from trainer import cli
from trainer.build import check_resumable
from trainer.config import Config, flatten
from trainer.drawing import Settings, generate, load_source

STEPS, LIMIT = 5, 0.35  # of DDIM steps, some reuse the one before


def draw(source, labels, **settings):
    return generate(source, labels, Settings(**({"steps": STEPS, "method": "ddim"} | settings)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("composition"))


@pytest.fixture(scope="module")
def source(run):
    return load_source(run, "cpu")


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """A model whose gates close what they may, but for noisy timesteps."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "depth": 2, "num_heads": 4, "enc_dec_dim_factor": 1, "in_channels": 3}
    model = DCDiT(preset("Ti", num_classes=len(CLASSES), input_size=SIZE, dydit=0.5, **sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        model.gates.linear.bias.normal_(std=1.0)
    model.calibrate_router(torch.randn(4, 3, SIZE, SIZE), torch.tensor([50, 300, 600, 900]), torch.arange(4))
    return load_source(export(tmp_path_factory.mktemp("gated"), model), "cpu")


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_a_threshold_of_0_draws_the_same_bits(source, method):
    plain = draw(source, [0, 1, 1], method=method, guidance=2.0, uncond_tail_drop=0.9)
    cached = draw(source, [0, 1, 1], method=method, guidance=2.0, uncond_tail_drop=0.9, teacache=0.0)
    assert torch.equal(cached.images, plain.images)
    assert plain.reused is None and (cached.reused == 0).all()
    indicator = 2 * STEPS * 4 * 64**2 / 1e9
    np.testing.assert_allclose(cached.gflops, plain.gflops + indicator)


def test_reused_calls_cost_no_backbone_and_pictures_are_their_own(source):
    cached = draw(source, [0, 1, 2, 3], teacache=LIMIT, batch=4)
    assert (cached.reused > 0).all() and (cached.reused < 1).all()
    alone = draw(source, [2], teacache=LIMIT)
    assert torch.allclose(alone.images[0], cached.images[2], atol=1e-3)
    assert alone.reused[0] == cached.reused[2] and alone.gflops[0] == pytest.approx(cached.gflops[2])
    assert torch.allclose(
        draw(source, [0, 1, 2, 3], teacache=LIMIT, batch=3).images, cached.images, atol=1e-3
    )
    least = draw(source, [0, 1, 2, 3], teacache=float("inf"))
    assert least.reused == pytest.approx((STEPS - 1) / STEPS)
    assert (least.gflops < cached.gflops).all() and (cached.gflops < draw(source, [0, 1, 2, 3]).gflops).all()


def test_closed_gates_are_not_paid_for(gated):
    drawn = generate(gated, [1], Settings(steps=1, method="ddim"))
    config, model = gated.model.config, gated.model
    with torch.no_grad():
        shares = model.gates(model.t_embedder(torch.tensor([999])))[0].mean(-1).tolist()
    kept = round(float(drawn.kept[0]) * SIZE * SIZE)
    assert drawn.gflops[0] == pytest.approx(flops(config, [kept], gates=shares)["total"] / 1e9)
    assert drawn.gflops[0] < flops(config, [kept])["total"] / 1e9


def test_both_together(gated):
    both, gates = draw(gated, [0, 1], teacache=LIMIT), draw(gated, [0, 1])
    assert torch.isfinite(both.images).all() and (both.gflops < gates.gflops).all()
    assert torch.equal(draw(gated, [0, 1], teacache=0.0).images, gates.images)


def test_command_records_the_share_that_was_reused(run, tmp_path, capsys):
    target = tmp_path / "a.png"
    words = ["--checkpoint", str(run), "--classes", "0,moon", "--steps", "4", "--to", str(target)]
    assert cli.main(["sample", *words, "--teacache", "inf"]) == 0
    record = json.loads(target.with_suffix(".json").read_text())
    assert record["reused_share"] == 0.75 and record["teacache"] == float("inf")
    assert "left the backbone out of 75.0% of the calls" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["-0.1", "nan"])
def test_wrong_thresholds_are_one_line(run, value, capsys):
    assert cli.main(["sample", "--checkpoint", str(run), f"--teacache={value}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --teacache: must be") and error.count("\n") == 1


def test_gates_may_begin_on_the_way_but_not_end():
    plain = flatten(Config())
    target = plain | {"model.dydit": 0.7}
    assert check_resumable(plain, target) == ["model.dydit: None -> 0.7"]
    assert check_resumable(target, target | {"model.dydit": 0.6}) == ["model.dydit: 0.7 -> 0.6"]
    old = {key: value for key, value in plain.items() if key != "model.dydit"}
    assert check_resumable(old, plain) == []
    with pytest.raises(UserError, match="model.dydit: None, but"):
        check_resumable(target, plain)
    zero = {"parallel.engine": "deepspeed"}
    with pytest.raises(UserError, match="model.dydit: 0.7, but"):
        check_resumable(plain | zero, target | zero)


def test_a_model_without_gates_is_the_size_it_was():
    assert tiny_model().config.dydit is None and tiny_model(baseline=True).config.dydit is None


def test_benchmark_keeps_its_rows(tmp_path, monkeypatch):
    """The comparison of benchmarks/composition.py on a made-up run: drawn once, read again the next time."""
    from benchmarks import composition

    run = run_folder(tmp_path, data=mds(tmp_path / "data"))
    args = Namespace(run=str(run), to=str(tmp_path), steps=3, samples=6, images=0, batch=4)
    table = composition.Table(args)
    table.measure("DC-DiT", run, [None, float("inf")])
    plain, reused = table.cells()[1:]
    assert plain[0] == "DC-DiT" and plain[6] == "" and reused[7] == "67%" and float(reused[6]) > 0
    assert float(plain[4]) > 0 and plain[5] == "" and table.rows[1]["gflops"] < table.rows[0]["gflops"]
    monkeypatch.setattr(composition, "generate", None)
    again = composition.Table(args)
    again.measure("DC-DiT", run, [None, float("inf")])
    assert again.cells() == table.cells()


def test_benchmark_says_what_is_open_when(gated):
    from benchmarks import composition

    heads, groups, cost = composition.shares_at(gated, [5, 950])
    with torch.no_grad():
        gates = gated.model.gates(gated.model.t_embedder(torch.tensor([5, 950])))
    np.testing.assert_allclose(heads, gates[:, :, 0].mean((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(groups, gates[:, :, 1].mean((1, 2)), rtol=1e-6)
    kept = SIZE * SIZE / gated.model.config.target_ratio
    for share, shares in zip(cost, gates.mean(-1).tolist(), strict=True):
        router = 2 * 64 * 2 * 2 * 3
        part, whole = (flops(gated.model.config, kept, gates=g)["backbone"] - router for g in (shares, None))
        assert share == pytest.approx(part / whole)
    assert composition.gates_by_time({"a": gated})[1][:2] == ["a", "heads"]
