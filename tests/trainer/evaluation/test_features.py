"""Feature sets: the offline one separates what is worse from what is bad, and is the same everywhere; the networks'
wiring is that of their papers, with random weights in the place of the published ones."""

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.errors import UserError
from trainer.data.photos import PHOTOS, crops
from trainer.evaluation import features, inception, offline
from trainer.evaluation.frechet import Moments, frechet_distance

PER_CLASS = 16


@pytest.fixture(scope="module")
def photos():
    """(reference images, other images, labels of the other ones): disjoint crops of the same photographs."""
    kept = [list(crops(0, "train", k, 2 * PER_CLASS, 32)) for k in range(len(PHOTOS))]
    reference = np.stack([s["image"] for of_class in kept for s in of_class[:PER_CLASS]])
    other = np.stack([s["image"] for of_class in kept for s in of_class[PER_CLASS:]])
    return reference, other, np.repeat(np.arange(len(PHOTOS)), PER_CLASS)


def moments(images) -> Moments:
    found = Moments(offline.DIM)
    found.add(features.load("offline").batch(images))
    return found


def distances(reference, versions) -> list[float]:
    one, others = moments(reference), [moments(v) for v in versions]
    return [frechet_distance(one.mean, one.cov, m.mean, m.cov) for m in others]


def blurred(images, sigma: float):
    reach = int(3 * sigma) + 1
    line = torch.exp(-torch.arange(-reach, reach + 1).float().square() / (2 * sigma**2))
    line = (line / line.sum()).view(1, 1, 1, -1)
    x = torch.from_numpy(images).float().flatten(0, 1)[:, None]
    x = F.conv2d(F.conv2d(F.pad(x, (reach,) * 4, mode="reflect"), line), line.transpose(2, 3))
    return x.round().clamp(0, 255).byte().numpy().reshape(images.shape)


def noised(images, deviation: float):
    noise = np.random.default_rng(0).normal(0, deviation, images.shape)
    return np.clip(images + noise, 0, 255).round().astype(np.uint8)


def rising(values, first_step: float) -> bool:
    return all(b > a for a, b in zip(values, values[1:], strict=False)) and values[1] > first_step * values[0]


def test_more_blur_and_more_noise_are_farther_away(photos):
    reference, other, _ = photos
    blur = distances(reference, [other, *(blurred(other, s) for s in (0.6, 1.0, 2.0, 4.0))])
    assert rising(blur, 1.2) and blur[-1] > 8 * blur[0], blur
    noise = distances(reference, [other, *(noised(other, s) for s in (4, 8, 16, 32, 64))])
    assert rising(noise, 1.2) and noise[-1] > 20 * noise[0], noise


def test_a_wrong_share_of_classes_is_farther_away_the_wronger_it_is(photos):
    reference, other, labels = photos
    right, wrong = other[labels < 9], other[labels >= 10]
    mixed = [np.concatenate([right[k:], wrong[:k]]) for k in range(0, len(right) + 1, len(right) // 4)]
    got = distances(reference[labels < 9], mixed)
    assert rising(got, 1.05) and got[-1] > 3 * got[0], got


def test_shuffled_patches_colours_and_layout_are_seen(photos):
    reference, other, _ = photos
    blocks = (
        other.reshape(len(other), 3, 4, 8, 4, 8).transpose(0, 2, 4, 1, 3, 5).reshape(len(other), 16, 3, 8, 8)
    )
    order = np.random.default_rng(1).permutation(16)
    blocks = blocks[:, order].reshape(len(other), 4, 4, 3, 8, 8).transpose(0, 3, 1, 4, 2, 5)
    versions = [other, blocks.reshape(other.shape), other[:, [2, 0, 1]], other[:, :, ::-1], 255 - other]
    got = distances(reference, versions)
    assert min(got[1:]) > 1.15 * got[0], got


def test_offline_features_are_these_numbers():
    """A picture made of whole numbers; the values were written down once and hold on every machine to rounding."""
    y, x = np.mgrid[:40, :52]
    image = np.stack([(5 * x + 3 * y) % 256, (x * y) % 251, (7 * (x // 4) + 40 * (y // 8)) % 256]).astype(
        np.uint8
    )
    got = features.load("offline").batch(image[None])[0]
    assert got.shape == (offline.DIM,) and got.dtype == torch.float32
    places = [0, 3, 30, 50, 70, 86, 93, 100, 142]
    values = [-3.32168, -3.13295, -3.40142, -3.95335, -4.3413, -2.65902, -1.60645, 1.38805, -0.75222]
    assert got[places].tolist() == pytest.approx(values, abs=2e-4)


def test_offline_features_of_flat_and_small_pictures():
    bank = features.load("offline")
    flat = bank.batch(np.full((1, 3, 32, 48), 77, np.uint8))[0]
    edges = 2 * offline.BANDS + len(offline.PAIRS) * offline.ORIENTATIONS + 2 * offline.OCTAVES + 3
    torch.testing.assert_close(flat[:edges].exp(), torch.full((edges,), offline.FLOOR), atol=2e-5, rtol=0)
    torch.testing.assert_close(flat[edges : edges + 16], torch.full((16,), offline.LAYOUT * 77 / 255))
    small = np.random.default_rng(2).integers(0, 256, (2, 3, 8, 8), np.uint8)
    repeated = small.repeat(4, 2).repeat(4, 3)
    assert torch.equal(bank.batch(small), bank.batch(repeated))
    one_by_one = torch.cat([bank.batch(small[:1]), bank.batch(small[1:])])
    torch.testing.assert_close(one_by_one, bank.batch(small), atol=1e-5, rtol=1e-5)


def test_the_precision_of_the_caller_is_not_felt():
    images = np.random.default_rng(6).integers(0, 256, (2, 3, 32, 32), np.uint8)
    bank = features.load("offline")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = bank.batch(images)
    assert got.dtype == torch.float32 and torch.equal(got, bank.batch(images))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_features():
    images = np.random.default_rng(7).integers(0, 256, (8, 3, 64, 48), np.uint8)
    got = features.load("offline", device="cuda").batch(images)
    torch.testing.assert_close(got, features.load("offline").batch(images), atol=2e-4, rtol=1e-4)


def test_gabor_filters_answer_to_their_own_wave():
    filters = offline.gabor_filters()[:, 0].double()
    assert filters.sum((1, 2)).abs().max() < 1e-6
    y, x = np.mgrid[:31, :31] - 15.0
    for k in range(offline.ORIENTATIONS):
        angle = np.pi * k / offline.ORIENTATIONS
        wave = torch.from_numpy(np.cos((x * np.cos(angle) + y * np.sin(angle)) * np.pi / 2)).float()
        level = offline.GaborBank().moduli(0.5 + wave[None, None])[0, :, 8:-8, 8:-8].mean((1, 2))
        assert int(level.argmax()) == k and float(level[k]) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("images", "words"),
    [(np.zeros((3, 32, 32), np.uint8), "shape"), (np.zeros((1, 3, 32, 32), np.float32), "float32")],
)
def test_what_is_no_batch_of_pictures_is_refused(images, words):
    with pytest.raises(ValueError, match=words):
        features.load("offline").batch(images)


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("fid", None, "not one of inception, dinov2, offline"),
        ("offline", "weights.pth", "no weights"),
        ("dinov2", None, "needs weights"),
    ],
)
def test_bad_names_and_paths_are_one_line(name, path, words):
    with pytest.raises(UserError, match=words):
        features.load(name, path)


fidelity = pytest.mark.skipif(
    find_spec("torch_fidelity") is None, reason=f"torch-fidelity is not installed ({inception.INSTALL})"
)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights under the names of the published file."""
    module = inception.import_network()

    class Empty(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            """Nothing to load: the weights stay as drawn."""

    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, file)
    torch.manual_seed(0)
    network = Empty("random", ["2048"], feature_extractor_weights_path=str(file))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):  # pictures must still differ at the end of forty layers
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), file)
    return file


@fidelity
def test_inception_features_are_torch_fidelitys(inception_file):
    state = torch.random.get_rng_state()
    ours = features.load("inception", inception_file)
    assert torch.equal(torch.random.get_rng_state(), state), "random state moved while loading"
    assert not [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]
    images = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (2, 3, 40, 24), np.uint8))
    module = inception.import_network()
    theirs = module.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_file))
    pool, logits = theirs(images)
    got = ours.extract(images)
    torch.testing.assert_close(got.features, pool, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.logits, logits, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.logits, pool @ theirs.fc.weight.T, rtol=1e-4, atol=1e-6)
    assert (got.features.shape, got.spatial.shape, got.logits.shape) == ((2, 2048), (2, 2023), (2, 1008))


@fidelity
def test_spatial_features_are_seven_channels_of_the_first_branch_after_its_relu(inception_file):
    ours = features.load("inception", inception_file)
    seen = []
    ours._network.Mixed_6d.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = np.random.default_rng(4).integers(0, 256, (2, 3, 32, 32), np.uint8)
    got = ours.extract(images).spatial
    block = seen[0]  # branch1x1 comes first among the channels of the block
    assert torch.equal(got.view(2, 17, 17, 7)[1, 3, 5], block[1, :7, 3, 5]) and (got >= 0).all()


@fidelity
def test_inception_weights_that_are_not_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file"):
        features.load("inception", tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(UserError, match="plain tensors"):
        features.load("inception", tmp_path / "text.pth")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold torch-fidelity's Inception weights"):
        features.load("inception", tmp_path / "other.pth")
    torch.save(np.random.default_rng, tmp_path / "code.pth")
    with pytest.raises(UserError, match="plain tensors"):
        features.load("inception", tmp_path / "code.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no route"))
    )
    with pytest.raises(UserError, match="cannot be downloaded .no route.* or use offline"):
        features.load("inception")


def test_inception_without_torch_fidelity_says_what_to_install(monkeypatch):
    monkeypatch.setattr(inception, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps torch-fidelity"):
        features.load("inception", "weights.pth")


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_dinov2_features_are_the_normed_class_token(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=14)
    network = Dinov2Model(Dinov2Config(**sizes)).eval()
    network.save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    ours = features.load("dinov2", tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state) and ours.dim == 48 and ours.about["layers"] == 2
    images = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (3, 3, 224, 224), np.uint8))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        token = network(pixel_values=(images / 255.0 - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(ours.batch(images), token, rtol=1e-4, atol=1e-5)
    assert ours.batch(images[:, :, :50, :70]).shape == (3, 48)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json"):
        features.load("dinov2", tmp_path)


def test_dinov2_says_why_torch_hub_gave_nothing(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(torch.hub, "load", refuse)
    with pytest.raises(
        UserError, match="torch.hub cannot give facebookresearch/dinov2: no route; give a local folder"
    ):
        features.load("dinov2", "hub")


def test_networks_see_no_tf32_whatever_training_has_chosen():
    products = torch.backends.cuda.matmul
    before, products.allow_tf32 = products.allow_tf32, True
    try:
        with features._exact():
            assert not products.allow_tf32 and not torch.backends.cudnn.allow_tf32
        assert products.allow_tf32
    finally:
        products.allow_tf32 = before
