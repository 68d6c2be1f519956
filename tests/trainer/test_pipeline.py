"""`dcdit export` as a pipeline folder, and `DCDiTPipeline`: the same images as `trainer.drawing`, with diffusers and
without; other schedulers; every wrong argument in one line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model import DCDiT
from model.errors import UserError
from tests.model.conftest import fixture_path
from tests.trainer.synthetic_run import CLASSES, export, manifest, run_folder, tiny_model
from tests.trainer.test_prepare_images import vae  # noqa: F401  (a fixture)
from trainer import cli
from trainer.drawing import Settings, generate, load_source

diffusers = pytest.importorskip("diffusers")
from trainer.pipeline import ByScheduler, DCDiTPipeline  # noqa: E402

ROOT = Path(cli.__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A pixel model's pipeline, made from a run by the command."""
    root = tmp_path_factory.mktemp("pipeline")
    exported = export(root / "weights", tiny_model())
    assert cli.main(["export", str(exported), "--to", str(root / "pipe"), "--pipeline"]) == 0
    return root / "pipe"


@pytest.fixture(scope="module")
def latents(tmp_path_factory, vae) -> Path:  # noqa: F811
    root = tmp_path_factory.mktemp("latents")
    exported = export(root / "weights", tiny_model(4), data=manifest(4, "latents"))
    assert cli.main(["export", str(exported), "--to", str(root / "pipe"), "--vae", str(vae)]) == 0
    return root / "pipe"


def quiet(folder: Path) -> DCDiTPipeline:
    pipe = DCDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """To rounding, which batches of other sizes do otherwise."""
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_folder_is_as_diffusers_lays_it_out(folder, latents):
    index = json.loads((latents / "model_index.json").read_text())
    assert index["_class_name"] == "DCDiTPipeline" and index["transformer"] == ["model", "DCDiT"]
    assert (latents / "vae" / "diffusion_pytorch_model.safetensors").is_file() and not (
        folder / "vae"
    ).exists()
    source = load_source(latents, "cpu")  # `dcdit sample` reads it too
    assert source.latent and source.class_names == CLASSES
    assert isinstance(DCDiT.from_pretrained(folder / "transformer"), DCDiT)
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
    process = load_source(folder, "cpu").process
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), process.schedule.abar, rtol=1e-5, atol=1e-9)
    for steps in (10, 250):
        scheduler.set_timesteps(steps)
        assert tuple(scheduler.timesteps.flip(0).tolist()) == process.schedule.respaced(steps).timesteps


def test_images_are_those_of_drawing(folder):
    pipe = quiet(folder)
    assert isinstance(pipe, diffusers.DiffusionPipeline) and pipe.device.type == "cpu"
    got = pipe(["moon", 0], num_inference_steps=3, guidance_scale=2.0, tail_drop=0.3, uncond_tail_drop=0.9,
               generator=seeded(7), output_type="latent").images  # fmt: skip
    seed = int(torch.randint(2**62, (), generator=seeded(7)))
    settings = Settings(steps=3, guidance=2.0, tail_drop=0.3, uncond_tail_drop=0.9, seed=seed)
    want = generate(load_source(folder, "cpu"), [2, 0], settings).images
    assert torch.equal(got, want)


def test_generators_decide_the_images_and_batches_do_not(folder):
    pipe = quiet(folder)
    draw = lambda labels, **words: pipe(labels, 2, output_type="latent", **words).images  # noqa: E731
    one = draw([0, 1, 2], generator=seeded(1))
    assert torch.equal(one, draw([0, 1, 2], generator=seeded(1)))
    assert_close(draw([0, 1, 2], generator=seeded(1), batch_size=2), one)
    assert not torch.equal(one, draw([0, 1, 2], generator=seeded(2)))
    each = draw([0, 1], generator=[seeded(5), seeded(6)])
    assert_close(each[1], draw([1], generator=[seeded(6)])[0])
    torch.manual_seed(3)
    first = draw(1)
    torch.manual_seed(3)
    assert torch.equal(first, draw(1))


def test_outputs(folder, latents):
    pipe = quiet(folder)
    made = {
        kind: pipe(1, 2, generator=seeded(0), output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert made["pil"][0].size == (8, 8) and made["np"].shape == (1, 8, 8, 3) and made["np"].dtype == np.uint8
    assert np.array_equal(np.asarray(made["pil"][0]), made["np"][0])
    torch.testing.assert_close(made["pt"], (made["latent"].clamp(-1, 1) + 1) / 2, rtol=0, atol=0.51 / 255)
    assert pipe(1, 1, return_dict=False)[0][0].size == (8, 8)

    pipe = quiet(latents)
    raw = pipe([3], 2, generator=seeded(0), output_type="latent").images
    photo = pipe([3], 2, generator=seeded(0), output_type="pt").images
    decoded = pipe.vae.decode(raw / 0.18215).sample
    torch.testing.assert_close(photo, (decoded.clamp(-1, 1) + 1) / 2, rtol=0, atol=0.51 / 255)
    assert photo.shape == (1, 3, 64, 64)


def test_saved_and_loaded_again_is_the_same(latents, tmp_path):
    pipe = quiet(latents)
    pipe.save_pretrained(tmp_path / "again")
    again = quiet(tmp_path / "again")
    first, second = (p([0, 3], 2, generator=seeded(4), output_type="np").images for p in (pipe, again))
    assert np.array_equal(first, second) and again.run["data"]["class_names"] == CLASSES
    half = DCDiTPipeline.from_pretrained(latents, torch_dtype=torch.bfloat16)
    assert half.transformer.dtype == half.vae.dtype == torch.bfloat16
    assert half([0], 1, output_type="np").images.dtype == np.uint8


def test_flow_has_its_own_scheduler(tmp_path):
    exported = export(tmp_path / "flow", tiny_model(learn_sigma=False), kind="flow")
    assert cli.main(["export", str(exported), "--to", str(tmp_path / "pipe"), "--pipeline"]) == 0
    pipe = quiet(tmp_path / "pipe")
    assert isinstance(pipe.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    assert torch.isfinite(pipe([0], 3, method="heun", output_type="latent").images).all()


def test_ddpm_of_diffusers_gives_our_ddpm(folder):
    """The same model function and the same noise under their scheduler and under ours, learned variance and all."""
    pipe, source = quiet(folder), load_source(folder, "cpu")
    theirs = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    model_fn = lambda x, t: source.model(x, t, torch.tensor([1, 2])).sample  # noqa: E731
    noise = torch.randn(2, 3, 8, 8, generator=seeded(0))
    with torch.no_grad():
        got = ByScheduler(source.process, theirs).sample(model_fn, noise, 10)
    own = [seeded(int(first) & 0x7FFFFFFF) for first in noise[:, 0, 0, 0].view(torch.int32)]
    draw = lambda i: torch.stack([torch.randn(3, 8, 8, generator=one) for one in own])  # noqa: E731
    assert_close(got, source.process.sample(model_fn, noise, 10, method="ddpm", step_noise=draw))


@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistepScheduler",
        "DDIMScheduler",
        "EulerAncestralDiscreteScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_other_schedulers_may_take_its_place(latents, name):
    pipe = quiet(latents)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    images = pipe([0, 1], 4, generator=seeded(0), output_type="latent").images
    assert images.shape == (2, 4, 8, 8) and torch.isfinite(images).all()
    assert_close(pipe([0, 1], 4, generator=seeded(0), output_type="latent", batch_size=1).images, images)
    with pytest.raises(UserError, match="method: ddim is not"):
        pipe([0], 4, method="ddim", output_type="latent")


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "DDPMScheduler"]
)
def test_schedulers_of_pixels_and_of_fractional_timesteps(folder, tmp_path, name):
    """Clipping has to know the noise level between two timesteps. One of the same class is another one, and is kept."""
    if name == "LMSDiscreteScheduler":
        pytest.importorskip("scipy", reason="diffusers' LMS integrates with it")
    pipe = quiet(folder)
    own = pipe([0, 1], 4, generator=seeded(0), output_type="latent").images
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, steps_offset=0)
    images = pipe([0, 1], 4, generator=seeded(0), output_type="latent").images
    assert torch.isfinite(images).all() and images.abs().max() < 1.2 and not torch.equal(images, own)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, timestep_spacing="leading")
    images = pipe([0, 1], 4, generator=seeded(0), output_type="latent").images
    pipe.save_pretrained(tmp_path / "saved")
    again = quiet(tmp_path / "saved")
    assert type(again.scheduler) is type(pipe.scheduler)
    assert torch.equal(again([0, 1], 4, generator=seeded(0), output_type="latent").images, images)


@pytest.mark.parametrize(
    "words, match",
    [
        ({"precision": "fp16"}, "precision: 'fp16' is not one of fp32, bf16"),
        ({"class_labels": [4]}, "class_labels: 4 is no class.*0 to 3"),
        ({"class_labels": "dog"}, "class_labels: 'dog'"),
        ({"class_labels": []}, "at least one class"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"tail_drop": 1.5}, "tail_drop"),
        ({"output_type": "jpg"}, "output_type"),
        ({"method": "euler"}, "method"),
        ({"generator": [torch.Generator()] * 3}, "3 of them for 1 labels"),
    ],
)  # fmt: skip
def test_wrong_arguments(folder, words, match):
    with pytest.raises(UserError, match=match):
        quiet(folder)(**({"class_labels": [0], "num_inference_steps": 1} | words))


def test_latents_without_a_vae(tmp_path):
    exported = export(tmp_path / "weights", tiny_model(4), data=manifest(4, "latents"))
    assert cli.main(["export", str(exported), "--to", str(tmp_path / "pipe"), "--pipeline"]) == 0
    with pytest.raises(UserError, match="no VAE"):
        quiet(tmp_path / "pipe")([0], 1)


def test_wrong_folders(folder, tmp_path, vae, capsys):  # noqa: F811
    with pytest.raises(UserError, match="model_index.json does not exist"):
        DCDiTPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    with pytest.raises(UserError, match="not of a DCDiTPipeline"):
        DCDiTPipeline.from_pretrained(tmp_path)
    words = ["export", str(folder), "--to", str(tmp_path / "x"), "--vae", str(vae)]
    assert cli.main(words) == 2 and "the model makes pixels" in capsys.readouterr().err
    assert cli.main(["export", str(folder), "--to", str(folder), "--pipeline"]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_released_checkpoint_becomes_a_pipeline(tmp_path):
    words = [
        str(fixture_path("tiny_official_layout_0000003.pt")),
        "--to",
        str(tmp_path / "pipe"),
        "--pipeline",
    ]
    assert cli.main(["export", *words]) == 0
    pipe = quiet(tmp_path / "pipe")
    images = pipe([0], 1, output_type="latent").images
    assert (
        pipe.run["data"]["kind"] == "latents" and images.shape[1] == pipe.transformer.config.in_channels == 4
    )


def test_a_run_becomes_a_pipeline_without_diffusers(tmp_path):
    """In a process where diffusers cannot be imported: pixels are drawn all the same."""
    exported = export(tmp_path / "weights", tiny_model(seed=5))
    program = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from trainer import cli\n"
        f"assert cli.main(['export', {str(exported)!r}, '--to', {str(tmp_path / 'pipe')!r}, '--pipeline']) == 0\n"
        "from trainer.pipeline import DCDiTPipeline\n"
        f"pipe = DCDiTPipeline.from_pretrained({str(tmp_path / 'pipe')!r}).to('cpu')\n"
        "pipe.set_progress_bar_config(disable=True)\n"
        "assert pipe.scheduler is None and pipe([1, 2], 2).images[1].size == (8, 8)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wrong_flags(tmp_path, capsys):
    run = str(run_folder(tmp_path))
    for words, said in [
        ([], "nothing to write"),
        (["--pipeline"], "--to DIR"),
        (["--to", str(tmp_path / "x"), "--capacity", "0.5"], "belong to --torch-export"),
        (["--torch-export", str(tmp_path / "x.pt")], "should end in .pt2"),
        (
            ["--to", run, "--torch-export", "x.pt2", "--capacity", "3", "--overwrite"],
            "--capacity: 3.0 is not above 0",
        ),
        (["--torch-export", "x.pt2", "--batch", "0"], "--batch: must be at least 1"),
    ]:
        assert cli.main(["export", run, *words]) == 2
        assert said in capsys.readouterr().err


def test_what_cannot_be_exported_replaces_nothing(tmp_path, capsys):
    from model import preset

    gated = DCDiT(preset("DC-DiT-Ti", hidden_size=64, depth=1, num_heads=2, enc_dec_dim_factor=1, in_channels=3,
                         num_classes=4, input_size=(8, 8), dydit=0.7))  # fmt: skip
    source, to = export(tmp_path / "gated", gated), export(tmp_path / "to", tiny_model())
    before = (to / "model.safetensors").read_bytes()
    words = ["export", str(source), "--to", str(to), "--overwrite", "--torch-export"]
    for file, said in ((tmp_path / "x.pt2", "DyDiT decides"), ("/proc/x/x.pt2", "cannot write to /proc/x")):
        assert cli.main([*words, str(file)]) == 2
        assert said in capsys.readouterr().err
        words[1] = str(export(tmp_path / "plain", tiny_model(seed=1)))
    assert (to / "model.safetensors").read_bytes() == before
