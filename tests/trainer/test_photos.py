"""The photographs: really photographs' pixels, disjoint splits, the same bytes for the same arguments."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import UserError
from trainer.data import open_source, photos

for package in ("skimage", "sklearn"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "data"
    manifest, new = photos.write_photos(folder, samples_per_class=25, size=16, seed=3)
    assert new
    return folder, manifest


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".mds" and p.name != ".lock")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_at_least_sixteen_colour_or_grey_photographs():
    assert len(photos.PHOTOS) >= 16
    assert len({photo.name for photo in photos.PHOTOS}) == len(photos.PHOTOS)
    for photo in photos.PHOTOS:
        image = photos.load_photo(photo)
        assert image.mode == "RGB" and min(image.size) >= 160
        assert len(np.unique(np.asarray(image))) > 64  # not a drawing or a mask


@given(st.integers(150, 1500), st.integers(150, 1500), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_crops_stay_in_their_region_and_regions_do_not_touch(width, height, seed):
    regions = photos.regions(width, height)
    assert regions["train"][2] <= regions["heldout"][0]
    assert regions["train"][2] >= 0.77 * width and regions["heldout"][0] <= 0.81 * width
    for region in regions.values():
        left, top, right, bottom = photos.crop_box(region, np.random.default_rng(seed))
        assert region[0] <= left < right <= region[2] and region[1] <= top < bottom <= region[3]
        assert right - left == bottom - top <= 160


def test_samples_are_area_means_of_their_boxes(written):
    """From the stored box alone, the crop is found again in the photograph."""
    folder, manifest = written
    for split in manifest.splits:
        source = open_source(folder, split)
        for index in range(0, len(source), 37):
            sample = source[index]
            photo = photos.load_photo(photos.PHOTOS[sample["label"]])
            left, top, right, bottom = sample["box"].tolist()
            region = photos.regions(*photo.size)[split]
            assert region[0] <= left and right <= region[2]
            crop = np.asarray(photo)[top:bottom, left:right].astype(np.float64)
            assert sample["image"].shape == (3, 16, 16) and sample["image"].dtype == np.uint8
            means = sample["image"].reshape(3, -1).mean(1)
            assert np.abs(means - crop.reshape(-1, 3).mean(0)).max() < 4


def test_splits_share_no_pixel(written):
    folder, manifest = written
    boxes = {}
    for split in manifest.splits:
        source = open_source(folder, split)
        for i in range(len(source)):
            boxes.setdefault((split, source[i]["label"]), []).append(source[i]["box"])
    for label in range(manifest.num_classes):
        assert max(b[2] for b in boxes["train", label]) <= min(b[0] for b in boxes["heldout", label])


def test_grey_photographs_stay_grey_and_crops_differ(written):
    folder, manifest = written
    source = open_source(folder)
    images = [source[i]["image"] for i in range(len(source))]
    grey = manifest.class_names.index("gravel")
    chosen = [x for x, i in zip(images, range(len(source)), strict=True) if source[i]["label"] == grey]
    assert all((x[0] == x[1]).all() and (x[0] == x[2]).all() for x in chosen)
    assert len({x.tobytes() for x in images}) > 0.98 * len(images)


def test_lettering_is_never_mirrored(written):
    manifest = written[1]
    mirrored = {manifest.class_names[k] for k in manifest.flip}
    assert not mirrored & {"printed page", "handwriting", "coins", "astronaut"}
    assert {"cat", "grass", "dahlia"} <= mirrored


def test_same_arguments_same_bytes_and_another_seed_other_crops(written, tmp_path):
    folder, _ = written
    photos.write_photos(tmp_path / "again", 25, 16, seed=3)
    assert digest(tmp_path / "again") == digest(folder)
    photos.write_photos(tmp_path / "other", 25, 16, seed=4)
    other, first = digest(tmp_path / "other"), digest(folder)
    assert all(other[name] != first[name] for name in first)


def test_more_samples_keep_the_first_ones():
    few, more = (list(photos.crops(0, "train", 2, count, 16)) for count in (3, 5))
    assert all((a["image"] == b["image"]).all() for a, b in zip(few, more, strict=False))


def test_missing_package_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(photos, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"scikit-image.*dcdit\[demo\]"):
        photos.load_photo(photos.PHOTOS[0])
