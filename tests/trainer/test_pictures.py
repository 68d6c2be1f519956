"""Pictures: value ranges, layouts and files."""

import base64
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainer import pictures


def test_model_space_maps_to_bytes_with_clipping():
    image = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).expand(3, 1, 5)
    assert pictures.to_uint8(image)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_grey_becomes_three_equal_channels_and_bf16_is_taken():
    out = pictures.to_uint8(torch.rand(1, 4, 4).bfloat16())
    assert out.shape == (4, 4, 3) and (out[..., 0] == out[..., 2]).all()


def test_latents_are_refused_as_photographs_and_shown_in_false_colours():
    latents = torch.randn(5, 4, 8, 8)
    with pytest.raises(ValueError, match="false_colour"):
        pictures.to_uint8(latents[0])
    out = pictures.show(latents)
    assert out.shape == (5, 8, 8, 3) and out.dtype == np.uint8
    assert out.min() == 0 and out.max() == 255


@pytest.mark.parametrize("channels", [2, 4, 16])
def test_false_colours_of_constant_latents_do_not_divide_by_zero(channels):
    assert pictures.false_colour(np.zeros((1, channels, 4, 4))).shape == (1, 4, 4, 3)


@given(st.floats(-2, 3, allow_nan=False), st.floats(-2, 3, allow_nan=False))
def test_heat_gets_lighter_with_the_value(a, b):
    low, high = sorted((a, b))
    dark, light = (pictures.heat(np.full((1, 1), v)).astype(int).sum() for v in (low, high))
    assert dark <= light


def test_heat_scale_ends_where_it_is_told():
    values = np.array([[0.4, 0.45, 0.5]])
    assert (pictures.heat(values, 0.4, 0.5)[0, [0, 2]] == pictures.heat(np.array([[0.0, 1.0]]))[0]).all()
    assert pictures.heat(np.array([[np.nan]])).shape == (1, 1, 3)


def test_mask_keeps_pixels_exactly_and_hides_the_rest():
    picture = np.full((2, 2, 3), 200, np.uint8)
    out = pictures.masked(picture, torch.tensor([[True, False], [False, True]]))
    assert (out[0, 0] == 200).all() and (out[1, 1] == 200).all()
    assert (out[0, 1] == out[1, 0]).all() and (out[0, 1] != 200).all()


@given(st.integers(1, 60))
def test_grid_is_wide_rather_than_tall_and_holds_every_picture(count):
    columns = pictures._columns(count)
    rows = -(-count // columns)
    assert columns * rows >= count > columns * (rows - 1) and columns >= rows


def test_grid_enlarges_without_smoothing_and_fits_labels():
    shots = [np.full((8, 8, 3), value, np.uint8) for value in (10, 90, 170)]
    sheet = pictures.grid(shots, ["cat", "a name far too long for its cell", ""], columns=3, cell=40)
    pixels = np.asarray(sheet)
    assert {10, 90, 170} <= set(np.unique(pixels[12:50]))  # flat fields stay flat: no other value but paper
    assert set(np.unique(pixels[14:50, 14:50])) == {10}
    assert sheet.width < 3 * 40 + 4 * 12 + 2


def test_png_and_data_uri_hold_the_picture(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    pictures.save_png(picture, tmp_path / "new" / "a.png")
    assert (np.asarray(Image.open(tmp_path / "new" / "a.png")) == picture).all()
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["a.png"]
    head, _, body = pictures.data_uri(picture).partition(",")
    assert head == "data:image/png;base64"
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(body)))) == picture).all()
