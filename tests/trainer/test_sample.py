"""`dcdit sample`: the pictures depend on seed and class alone, and wrong arguments are told at once."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.diffusion import make_process
from model.errors import UserError
from model.flops import flops
from model.weights import to_released
from tests.trainer.synthetic_run import CLASSES, SIZE, export, manifest, run_folder, tiny_model
from trainer import cli, sample
from trainer.drawing import Settings, Source, clipped, generate, load_source
from trainer.sampling.sheet import sheet_target
from trainer.sampling.source import weights_hash

RELEASED = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "tiny_official_layout_0000003.pt"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="module")
def source(run):
    return load_source(run, "cpu")


def draw(source: Source, labels, **settings):
    return generate(source, labels, Settings(steps=4, **settings))


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_batch_size_and_company_do_not_change_a_picture(source, method):
    together = draw(source, [0, 1, 1, 2, 3], batch=5, method=method).images
    assert torch.allclose(draw(source, [0, 1, 1, 2, 3], batch=2, method=method).images, together, atol=1e-4)
    assert torch.allclose(draw(source, [3, 1], method=method).images, together[[4, 1]], atol=1e-4)
    assert not torch.allclose(together[1], together[2], atol=0.1), "two of one class must differ"


def test_seed_changes_the_picture_and_repeats_it(source):
    first, again, other = (draw(source, [2], seed=seed).images for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=0.1)


def test_global_random_state_is_neither_read_nor_moved(source):
    torch.manual_seed(0)
    first = draw(source, [1], method="ddpm").images
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(draw(source, [1], method="ddpm").images, first)
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_tail_drop_keeps_fewer_and_costs_less(source):
    full, half = draw(source, [0, 1]), draw(source, [0, 1], tail_drop=0.5)
    assert (half.kept < full.kept).all() and (half.gflops < full.gflops).all()
    assert full.kept_uncond is None


def test_cost_is_the_ragged_exact_sum(source):
    drawn = generate(source, [1], Settings(steps=1, method="ddim"))
    kept = round(float(drawn.kept[0]) * SIZE * SIZE)
    assert drawn.gflops[0] == pytest.approx(flops(source.model.config, [kept])["total"] / 1e9)


def test_guidance_counts_both_branches_apart(source):
    plain = draw(source, [0, 1, 2])
    lite = draw(source, [0, 1, 2], guidance=2.0, uncond_tail_drop=0.9)
    assert lite.kept_uncond.mean() < 0.5 * lite.kept.mean()
    assert (lite.gflops > plain.gflops).all()


def test_baseline_has_no_share_but_a_cost(tmp_path):
    folder = export(tmp_path / "dit", tiny_model(baseline=True))
    drawn = draw(load_source(folder, "cpu"), [0, 1])
    assert drawn.kept is None and drawn.images.shape == (2, 3, SIZE, SIZE) and (drawn.gflops > 0).all()


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_flow_models(tmp_path, method):
    folder = export(tmp_path / "flow", tiny_model(learn_sigma=False), kind="flow")
    drawn = draw(load_source(folder, "cpu"), [0, 3], method=method)
    assert torch.isfinite(drawn.images).all()


@pytest.mark.parametrize("kind", ["gaussian", "flow"])
def test_clipping_moves_the_foreseen_clean_image_into_range_and_nothing_else(kind):
    process = make_process(kind)
    x, t = torch.randn(4, 3, 5, 5), process.time(torch.tensor([0.05, 0.4, 0.6, 0.999]))
    model_t = process.model_time(t)

    def clean(prediction):
        if kind == "flow":
            return x - t.view(-1, 1, 1, 1) * prediction
        signal = process.add_noise(torch.ones_like(x), torch.zeros_like(x), t)
        return (x - process.add_noise(torch.zeros_like(x), torch.ones_like(x), t) * prediction) / signal

    raw = torch.randn(4, 6, 5, 5)
    out = clipped(process, lambda x, t: raw)(x, model_t)
    assert torch.equal(out[:, 3:], raw[:, 3:])
    assert torch.allclose(clean(out[:, :3]), clean(raw[:, :3]).clamp(-1, 1), atol=1e-4)
    assert clean(raw[:, :3]).abs().max() > 1.5, "the test must have something to clip"


def test_pixels_are_clipped_by_default_and_latents_are_not(source, tmp_path):
    assert draw(source, [0, 1]).images.abs().max() <= 1.001
    assert draw(source, [0, 1], clip=False).images.abs().max() > 1.001
    latent = load_source(export(tmp_path / "latent", tiny_model(4), data=manifest(4, "latents")), "cpu")
    assert torch.equal(draw(latent, [0]).images, draw(latent, [0], clip=False).images)


def test_command_writes_a_sheet_and_its_settings(run, tmp_path, capsys):
    target = tmp_path / "out" / "a.png"
    words = [
        "--checkpoint",
        str(run),
        "--classes",
        "0,moon",
        "--per-class",
        "2",
        "--steps",
        "3",
        "--to",
        str(target),
    ]
    assert cli.main(["sample", *words, "--tail-drop", "0.3", "--precision", "bf16"]) == 0
    assert str(target) in capsys.readouterr().out
    assert Image.open(target).size[0] > 2 * 128
    record = json.loads(target.with_suffix(".json").read_text())
    assert record["classes"] == [0, 0, 2, 2] and record["class_names"] == ["cat", "cat", "moon", "moon"]
    assert (record["steps"], record["tail_drop"], record["precision"]) == (3, 0.3, "bf16")
    assert 0 < record["retained_share"] < 1 and len(record["retained_share_each"]) == 4
    assert record["weights"] == weights_hash(load_source(run, "cpu")) and len(record["weights"]) == 32


def test_default_place_is_in_the_run(run, capsys):
    assert cli.main(["sample", "--checkpoint", str(run), "--steps", "2"]) == 0
    assert (run / "samples" / "000000000640-2steps-drop0-seed0.png").is_file()


def test_other_settings_have_another_default_place(run):
    source, plain = load_source(run, "cpu"), Settings(steps=2, method="ddpm")
    others = [{}, {"method": "ddim"}, {"eta": 0.5}, {"precision": "bf16"}, {"clip": False}, {"seed": 1},
              {"teacache": 0.1}, {"guidance": 2.0}, {"guidance": 2.0, "uncond_tail_drop": 0.9},
              {"guidance_interval": (0, 0.5)}]  # fmt: skip
    names = [sheet_target(None, source, dataclasses.replace(plain, **other), {}) for other in others]
    given = [{"classes": [1]}, {"classes": [2]}, {"autoguidance": "weak"}, {"vae": "folder"}]
    names += [sheet_target(None, source, plain, other) for other in given]
    assert len(set(names)) == len(names)
    assert (
        sheet_target(None, source, dataclasses.replace(plain, batch=3), {"vae": None, "per_class": 0})
        == names[0]
    )


def test_latents_without_a_vae_are_called_what_they_are(tmp_path, capsys):
    folder = export(tmp_path / "latent", tiny_model(4), data=manifest(4, "latents"))
    target = tmp_path / "l.png"
    words = ["--checkpoint", str(folder), "--steps", "2", "--to", str(target)]
    assert cli.main(["sample", *words]) == 0
    assert "false colours" in capsys.readouterr().out
    assert "false colours" in json.loads(target.with_suffix(".json").read_text())["picture"]


def test_latents_through_a_vae(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="the VAE comes from diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    vae.save_pretrained(tmp_path / "vae")
    folder = export(tmp_path / "latent", tiny_model(4), data=manifest(4, "latents"))
    target = tmp_path / "v.png"
    words = ["--checkpoint", str(folder), "--steps", "2", "--vae", str(tmp_path / "vae"), "--to", str(target)]
    assert cli.main(["sample", *words]) == 0
    assert (
        json.loads(target.with_suffix(".json").read_text())["picture"] == "photographs decoded from latents"
    )


def test_a_vae_of_other_latents_is_refused_before_anything_is_drawn(tmp_path, monkeypatch, capsys):
    diffusers = pytest.importorskip("diffusers", reason="the VAE comes from diffusers")
    diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=8).save_pretrained(
        tmp_path / "pipeline" / "vae"
    )
    folder = export(tmp_path / "latent", tiny_model(4), data=manifest(4, "latents"))
    monkeypatch.setattr("trainer.drawing.generate", None)
    words = ["sample", "--checkpoint", str(folder), "--to", str(tmp_path / "a.png"), "--vae"]
    assert cli.main([*words, str(tmp_path / "pipeline")]) == 2
    assert "--vae: its latents have 8 channels, the model's 4" in capsys.readouterr().err
    for place in ("/nowhere/vae", "nowhere", f"{tmp_path.name}/x/y", "tests/vae"):
        assert cli.main([*words, place]) == 2
        assert f"--vae: {place}: no such folder" in capsys.readouterr().err


def test_released_checkpoint(tmp_path):
    if not RELEASED.is_file():
        pytest.skip("the fixture of the released layout is not beside the repository")
    target = tmp_path / "r.png"
    words = ["--checkpoint", str(RELEASED), "--classes", "0", "--steps", "2", "--to", str(target)]
    assert cli.main(["sample", *words]) == 0
    assert json.loads(target.with_suffix(".json").read_text())["picture"].startswith("false colours")
    assert cli.main(["sample", *words, "--heads", "3"]) == 2


def test_published_dit_is_told_apart_and_its_missing_heads_named_as_a_flag(tmp_path, capsys):
    model = tiny_model(4, baseline=True)
    torch.save(to_released(model.state_dict()), tmp_path / "dit.pt")
    words = ["--checkpoint", str(tmp_path / "dit.pt"), "--steps", "1", "--to", str(tmp_path / "d.png")]
    assert cli.main(["sample", *words]) == 2
    assert "give --heads" in capsys.readouterr().err
    assert cli.main(["sample", *words, "--heads", "2"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--classes", "4"], "4 is out of range; this model has classes 0 to 3"),
        (["--classes", "-1"], "-1 is out of range"),
        (["--classes", "mooon"], "did you mean 'moon'?"),
        (["--classes", "7-9"], "7 is out of range"),
        (["--classes", "0-999999999999"], "4 is out of range"),
        (["--classes", "3-1,0"], "3-1 runs backwards; give 1-3"),
        (["--classes", ","], "nothing asked for"),
        (["--steps", "0"], "--steps: must be at least 1"),
        (["--steps", "1001"], "steps"),
        (["--per-class", "0"], "--per-class: must be at least 1"),
        (["--tail-drop", "1.5"], "--tail-drop: must be between 0 and 1"),
        (["--uncond-tail-drop", "-0.1"], "--uncond-tail-drop: must be between 0 and 1"),
        (["--method", "heun"], "does not fit a model of gaussian diffusion"),
        (["--seed", "-3"], "--seed"),
        (["--to", "a.jpg"], "should end in .png"),
        (["--to", "pictures/"], "--to: pictures/ is a folder; a sheet is a file: pictures/sheet.png"),
        (["--to", "tests"], "--to: tests is a folder"),
        (["--device", "cuda:77"], "--device: cuda:77 is not available here"),
        (["--device", "toaster"], "--device: toaster is not available here"),
        (["--vae", "/nowhere"], "--vae: the model makes pixels"),
        (["--to", "/proc/nowhere/a.png"], "--to: cannot write to /proc/nowhere"),
        (["--guidance", "nan"], "guidance"),
    ],
)
def test_wrong_arguments_are_one_line(run, words, said, capsys):
    assert cli.main(["sample", "--checkpoint", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


@pytest.mark.parametrize("path", ["nowhere", "nowhere.pt", "."])
def test_wrong_checkpoints_are_one_line(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", "--checkpoint", path]) == 2
    assert capsys.readouterr().err.startswith("error: --checkpoint: ")


def test_truncated_weights_are_one_line(tmp_path, capsys):
    folder = export(tmp_path / "cut", tiny_model())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert cli.main(["sample", "--checkpoint", str(folder)]) == 2
    assert str(weights) in capsys.readouterr().err


def test_a_large_sheet_is_told_of_before_it_is_drawn(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "MANY", 3)
    words = ["--checkpoint", str(run), "--steps", "1", "--to", str(tmp_path / "a.png")]
    assert cli.main(["sample", *words]) == 0
    assert capsys.readouterr().err == "note: a sheet of 4 pictures; --classes 0-9 draws ten\n"
    assert cli.main(["sample", *words, "--classes", "0-2"]) == 0
    assert capsys.readouterr().err == ""


def test_classes_by_number_range_and_name():
    assert sample.parse_classes("all", CLASSES) == [0, 1, 2, 3]
    assert sample.parse_classes("3, 0-2,CAT,printed page", CLASSES) == [3, 0, 1, 2, 0, 3]
    assert sample.parse_classes("tench, Tinca", ["goldfish", "tench, Tinca"]) == [1]
    with pytest.raises(UserError):
        sample.parse_classes("2-9", CLASSES)


def test_progress_reaches_the_end_and_clears_its_line(source):
    said = []
    generate(source, [0, 1, 2], Settings(steps=2, batch=2), said.append)
    assert "1-2 of 3" in said[0] and "100%" in said[-2] and said[-1] == ""


def test_shares_are_means_over_the_steps(source):
    each = draw(source, [0, 1, 2, 3], batch=4).kept
    assert each.shape == (4,) and np.all((each > 0) & (each <= 1))
    assert np.allclose(draw(source, [0, 1, 2, 3], batch=1).kept, each, atol=1 / 64)
