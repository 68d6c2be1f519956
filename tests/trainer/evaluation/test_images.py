"""Pictures in every form they come in are the same pictures; what is not one is told in a line."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from model.errors import UserError
from tests.trainer.synthetic_run import SIZE, manifest, mds
from trainer.data import open_source
from trainer.data.mds import import_streaming
from trainer.evaluation.images import Npz, Shards, open_pictures

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 12, 10, 3), np.uint8)
WANTED = IMAGES.transpose(0, 3, 1, 2)


def png(image) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def folder(path):
    for k, image in enumerate(IMAGES):  # two class folders; the order is that of the names
        file = path / "pictures" / f"{k // 4}" / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(image))
    (path / "pictures" / "labels.csv").write_text("file,label\n")
    return path / "pictures"


def tars(path):
    (path / "tars").mkdir()
    for number, part in enumerate((range(4), range(4, 7))):
        with tarfile.open(path / "tars" / f"shard.{number:05d}.tar", "w") as tar:
            for k in part:
                for ending, data in ((".png", png(IMAGES[k])), (".cls", b"1")):
                    info = tarfile.TarInfo(f"{k:04d}{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return path / "tars"


def one_tar(path):
    with tarfile.open(path / "one.tar", "w") as tar:
        tar.add(folder(path), "pictures")
    return path / "one.tar"


def npz(path):
    np.savez(path / "samples.npz", arr_0=IMAGES, arr_1=np.zeros(7))
    return path / "samples.npz"


def npz_folder(path):
    return npz(path).parent


def compressed(path):
    np.savez_compressed(path / "small.npz", arr_0=IMAGES)
    return path / "small.npz"


@pytest.mark.parametrize("form", [folder, tars, one_tar, npz, npz_folder, compressed])
def test_every_form_gives_the_same_pictures(form, tmp_path):
    pictures = open_pictures(form(tmp_path))
    assert len(pictures) == 7
    assert np.array_equal(pictures.read(range(7)), WANTED)
    assert np.array_equal(pictures.read([5, 0]), WANTED[[5, 0]])
    json.dumps(pictures.about)


def test_an_npz_as_numpy_writes_it_is_mapped_not_read(tmp_path):
    assert isinstance(Npz(npz(tmp_path))._array, np.memmap)
    assert not isinstance(Npz(compressed(tmp_path))._array, np.memmap)


def test_prepared_data_by_split(tmp_path):
    data = mds(tmp_path / "data", 6)
    assert np.array_equal(open_pictures(data).read([0]), open_pictures(f"{data}:train").read([0]))
    heldout = open_pictures(f"{data}:heldout")
    assert heldout.about["split"] == "heldout" and heldout.read(range(6)).shape == (6, 3, SIZE, SIZE)
    with pytest.raises(UserError, match="no split 'test'"):
        open_pictures(f"{data}:test")


def test_damaged_samples_give_way_to_the_next_up_to_a_number(tmp_path):
    source = open_source(mds(tmp_path / "data", 6), "train")
    wanted = Shards(source).read([1, 2, 4])
    decode = source._decode

    def damaged(number, place, *rest):
        if place in (1, 3):
            raise ValueError("zeros")
        return decode(number, place, *rest)

    source._decode = damaged
    got = Shards(source, max_errors=2).read([1, 2, 3])
    assert np.array_equal(got, wanted[[1, 1, 2]])
    with pytest.raises(UserError, match="sample 3 .*cannot be read"):
        Shards(source, max_errors=1).read([1, 2, 3])


def test_latents_need_a_decoder(tmp_path, latents):
    with pytest.raises(UserError, match="holds latents.*--vae"):
        open_pictures(latents)
    seen = []

    def decode(mean):
        seen.append(mean)
        return np.zeros((len(mean), 3, 64, 64), np.uint8)

    assert open_pictures(latents, decode).read([0, 2]).shape == (2, 3, 64, 64)
    assert seen[0].shape == (2, 4, SIZE, SIZE) and seen[0].dtype == np.float32


@pytest.fixture
def latents(tmp_path):
    return latent_shards(tmp_path / "latents")


def latent_shards(to):
    """A prepared data set of eight random latents a split."""
    shape = f"ndarray:float16:4,{SIZE},{SIZE}"
    columns = {"mean": shape, "std": shape, "label": "int"}
    random = np.random.default_rng(1)
    for split in ("train", "heldout"):
        with import_streaming().MDSWriter(out=str(to / split), columns=columns) as out:
            for k in range(8):
                mean, std = random.normal(size=(2, 4, SIZE, SIZE)).astype(np.float16)
                out.write({"mean": mean, "std": np.abs(std), "label": k % 4})
    (to / "manifest.json").write_text(json.dumps(manifest(4, "latents")))
    return to


def grey(path):
    Image.fromarray(IMAGES[0, :, :, 0]).save(path / "a.png")
    return path


def test_grey_pictures_are_shown_in_three_equal_channels(tmp_path):
    got = open_pictures(grey(tmp_path)).read([0])
    assert np.array_equal(got[0], np.repeat(IMAGES[0, None, :, :, 0], 3, 0))


def damaged(path):
    (path / "a.png").write_bytes(png(IMAGES[0])[:60])
    return path


def two_sizes(path):
    (path / "a.png").write_bytes(png(IMAGES[0]))
    (path / "b.png").write_bytes(png(IMAGES[0][:6]))
    return path


def floats(path):
    np.savez(path / "a.npz", arr_0=np.zeros((2, 8, 8, 3)))
    return path / "a.npz"


def other_names(path):
    np.savez(path / "a.npz", mu=np.zeros(3))
    return path / "a.npz"


def not_npz(path):
    (path / "a.npz").write_text("no")
    return path / "a.npz"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path / "nothing", "no such file or folder"),
        (lambda path: path, "no pictures in it"),
        (damaged, "a.png cannot be read as a picture"),
        (two_sizes, "b.png is 10x6, others are 10x12"),
        (floats, r"arr_0 is float64 of shape \(2, 8, 8, 3\), not uint8"),
        (other_names, "no arr_0 in it: not an ADM file of pictures; it has mu"),
        (not_npz, "cannot be read as an .npz"),
    ],
)
def test_what_is_no_set_of_pictures_is_one_line(make, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        open_pictures(make(tmp_path)).read([0, 1])
    assert "\n" not in str(caught.value)
