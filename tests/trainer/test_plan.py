"""`dcdit plan`: its bytes against models and engines that hold them, its traffic against closed forms, its words."""

import dataclasses
import json

import pytest

from benchmarks.plan import ENGINES, activations, state
from model import DCDiT, DiT, preset
from model.flops import flops
from tests.distributed.processes import CONTEXT, begin_server
from trainer import planning
from trainer.cli import run
from trainer.gpus import GPUS, peak_tflops
from trainer.planning import Setting

H100 = GPUS["h100"]


def setting(**changes) -> Setting:
    values = {"model": preset("XL"), "gpu": H100, "gpus": 64, "replicate": 8}
    return Setting(**(values | changes))


@pytest.mark.parametrize("name", ["Ti", "XS", "DiT-Ti/2"])
def test_parameters_are_those_of_the_model(name):
    config = preset(name)
    model = (DiT if name.startswith("DiT") else DCDiT)(config)
    counted = planning.sizes(config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.total == sum(counted.units) + counted.root + counted.exact
    assert counted.buffers == model.pos_embed.numel()


@pytest.mark.parametrize(
    ("name", "bf16", "mode"),
    [("DC-DiT", False, "none"), ("DC-DiT", True, "none"), ("DC-DiT", True, "block"), ("DC-DiT", True, "selective"),
     ("DC-DiT, capacity", True, "none"), ("DC-DiT, cosine", False, "none"), ("DiT/2", True, "none")],
)  # fmt: skip
def test_activations_are_what_a_forward_pass_leaves_alive(name, bf16, mode):
    found = activations(name, 4, bf16, mode)
    assert found["planned"] == pytest.approx(found["measured"], rel=0.02)
    assert found["peak"] < found["planned"] * 1.35  # what comes on top is small, or one block


def test_activations_follow_batch_tokens_and_recomputation():
    model = preset("B")
    one, two = (sum(planning.activation_bytes(model, n, 256 * n).values()) for n in (4, 8))
    assert two == pytest.approx(2 * one)
    kept = [
        planning.activation_bytes(model, 4, 1024, mode=mode)["backbone"]
        for mode in ("none", "selective", "block")
    ]
    assert kept == sorted(kept, reverse=True) and kept[2] < kept[0] / 8
    fewer = planning.activation_bytes(model, 4, 512)
    assert fewer["backbone"] * 2 == pytest.approx(
        planning.activation_bytes(model, 4, 1024)["backbone"], rel=0.02
    )
    assert fewer["decoder"] == planning.activation_bytes(model, 4, 1024)["decoder"]


@pytest.mark.parametrize("name", ENGINES)
def test_state_is_what_the_engine_holds(name, tmp_path):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    begin_server()
    found = state(name, 2, tmp_path, CONTEXT)
    assert set(found["measured"]) >= {"weights", "moments", "averages", "master"}
    for kind, measured in found["measured"].items():
        assert found["planned"][kind] == pytest.approx(measured, rel=0.02), kind


def test_traffic_of_each_engine():
    s, P = setting(), 4 * planning.sizes(preset("XL")).total
    sent = {name: planning.communication(s, name) for name in planning.ENGINES}
    assert sent["ddp"]["all-reduce"] == pytest.approx(2 * 63 / 64 * P)
    assert sent["fsdp"]["reduce-scatter"] == pytest.approx(63 / 64 * P)
    # bf16 weights twice: as many bytes as fp32 once, and a little more for the router's fp32.
    assert 63 / 64 * P < sent["fsdp"]["all-gather"] < 1.02 * 63 / 64 * P
    assert sent["hsdp"]["all-reduce"] == pytest.approx(2 * 7 / 8 * P / 8)
    assert sent["zero3"]["all-gather"] == pytest.approx(2 * 63 / 64 * P)
    twice = dataclasses.replace(s, micro=2)
    assert twice.accumulation == 2
    assert planning.communication(twice, "fsdp")["all-gather"] == 2 * sent["fsdp"]["all-gather"]
    for name in ("ddp", "zero1"):
        assert planning.communication(twice, name) == sent[name]
    alone = planning.communication(setting(gpus=1, replicate=1, batch=4), "fsdp")
    assert alone["total"] == alone["seconds"] == 0
    # Eight GPUs of one node do not need the network.
    slow = dataclasses.replace(H100, network=1e-3)
    assert planning.communication(setting(gpu=slow, gpus=8, replicate=1, micro=32), "fsdp")["seconds"] < 0.1


def test_a_mesh_has_the_links_of_those_who_take_part():
    """Measured all-reduces of eight MI300X are 6.5 times as fast as of two, which have one link of seven."""
    node, pair = (setting(gpu=GPUS["mi300x"], gpus=n, replicate=1, batch=n * 4) for n in (8, 2))
    assert planning.bus(node, 8, 8) == pytest.approx(7 * planning.bus(pair, 2, 2))
    assert planning.bus(setting(), 2, 2) == planning.bus(setting(), 8, 8)  # behind a switch
    assert planning.bus(setting(gpu=GPUS["mi300x"]), 8, 1) == pytest.approx(planning.LINK_SHARE * 50e9)
    alone = setting(gpu=GPUS["mi300x"], gpus=1, replicate=1, batch=4)
    assert planning.communication(alone, "ddp")["seconds"] == 0


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("AMD Instinct MI250X / MI250", 191.5),
        ("AMD Instinct MI300X", 1307),
        ("AMD Instinct MI355X", 2517),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_device_is_known_by_its_name_or_has_no_mfu(device, peak):
    assert peak_tflops(device) == peak


def test_accumulation_keeps_whole_gradients_under_fsdp():
    s = setting()
    before, after = (planning.memory(x, "fsdp")["gradients"] for x in (s, dataclasses.replace(s, micro=2)))
    assert after - before == 4 * s.sizes.total


def test_speed_is_flops_over_the_assumed_peak():
    s = setting(tail_drop=(0.0,), mfu=0.5)
    per_image = 3 * flops(s.model)["total"]
    assert planning.rate(s) == pytest.approx(64 * H100.tflops * 1e12 * 0.5 / per_image)
    assert (
        planning.training_flops(setting())
        < per_image
        < planning.training_flops(dataclasses.replace(s, checkpointing="block"))
    )
    found = planning.speed(s, "fsdp")
    assert found["images_per_second_no_overlap"] < found["images_per_second"] <= planning.rate(s)


def test_tables_for_people_and_numbers_for_programs(capsys):
    assert run("plan", ["--model", "XL", "--gpus", "64", "--gpu", "h200"]) == 0
    text = capsys.readouterr().out
    for word in (
        "fsdp",
        "hsdp",
        "zero3",
        "TFLOP/s, an assumption",
        "DC-DiT-XL",
        "loader:",
        "64 h200 on 8 nodes",
    ):
        assert word in text
    assert run("plan", ["--model", "XL", "--gpus", "64", "--gpu", "h200", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == planning.sizes(preset("XL")).total
    assert [row["engine"] for row in plan["engines"]] == list(planning.ENGINES)
    for row in plan["engines"]:
        held = {k: v for k, v in row["memory"].items() if k not in ("total", "fits")}
        assert sum(held.values()) == pytest.approx(row["memory"]["total"])
    assert [run["pixels"] for run in plan["paper"]] == [256, 256, 256, 256, 512]


def test_a_recipe_with_overrides_and_what_does_not_fit(capsys):
    words = [
        "--config",
        "configs/recipe/imagenet512_xl.yaml",
        "--size",
        "512",
        "--gpus",
        "2",
        "--engine",
        "fsdp",
    ]
    assert run("plan", [*words, "ema.decay=[0.9999,0.999]"]) == 0
    text = capsys.readouterr().out
    assert "input 64x64x4" in text and "checkpointing block, averages: 2" in text and "ddp " not in text
    assert run("plan", [*words, "--checkpointing", "none"]) == 0
    text = capsys.readouterr().out
    assert "TOO MUCH" in text and "though none fits" in text


def test_days_are_of_an_engine_that_fits(capsys):
    """Twenty averages in whole are too much for a small device; sharded, every micro-batch has to wait for weights."""
    words = "--model XL --gpus 64 --gpu mi250x --batch 8192 --micro 4 --averages 20 --json".split()
    assert run("plan", words) == 0
    plan = json.loads(capsys.readouterr().out)
    rates = {fits: [row["images_per_second"] for row in plan["engines"] if row["memory"]["fits"] is fits]
             for fits in (True, False)}  # fmt: skip
    assert max(rates[False]) > max(rates[True])
    assert plan["days"] == pytest.approx(plan["total_images"] / max(rates[True]) / 86400)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "XL", "--gpu", "h20"], "--gpu: 'h20' is not known; did you mean 'h200'?"),
        (["--model", "XXL"], "preset 'XXL' does not exist"),
        (["--model", "XL", "--gpus", "7"], "train.global_batch_size=256 does not divide over 7"),
        (["--model", "XL", "--micro", "5"], "train.micro_batch_size=5 does not divide"),
        (["--model", "XL", "--gpus", "12"], "--gpus: 12 is not a whole number of nodes"),
        (["--model", "XL", "--replicate", "3"], "--replicate: 3 does not divide the 8 GPUs"),
        (["--model", "XL", "--mfu", "35"], "--mfu: a share in (0, 1], got 35"),
        (["--model", "XL", "--size", "250"], "--size: 250 is not a multiple of 8"),
        (["--model", "XL", "--grid", "32x"], "--grid: '32x' is not H, HxW or HxWxC"),
        (["--model", "XL", "--grid", "99999"], "--grid: 99999 has more than 4096 cells on a side"),
        (["--model", "XL", "--engine", "hsdp"], "--replicate: hsdp on one node needs"),
        (
            ["--model", "XL", "--engine", "zero3", "--checkpointing", "selective"],
            "--checkpointing: selective does not",
        ),
        (["--model", "XL", "train.mirco_batch_size=4"], "did you mean 'train.micro_batch_size'?"),
        (["--config", "configs/recipe/imagenet512_xl.yaml"], "--size: not given"),
        ([], "--model: not given"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert run("plan", words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
