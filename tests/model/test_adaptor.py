"""What upcycling adds to the model: off, it is the plain model; on, it does what it says and nothing else."""

import pytest
import torch
from torch import nn

from model import DCDiT
from model.embeddings import position_table
from model.errors import UserError
from model.flops import flops
from model.weights import load_released, to_released
from tests.model.conftest import batch, liven, tiny_config, tiny_dcdit


def test_off_is_the_plain_model_bit_for_bit():
    torch.manual_seed(0)
    plain = DCDiT(tiny_config())
    torch.manual_seed(0)
    adapted = DCDiT(tiny_config(cond_adaptor=True))
    names = set(adapted.state_dict()) - set(plain.state_dict())
    assert names == {"cond_adaptor.weight", "cond_adaptor.bias"}
    for name, value in plain.state_dict().items():  # the adaptor draws no random numbers
        assert torch.equal(value, adapted.state_dict()[name]), name
    liven(plain)
    adapted.load_state_dict(plain.state_dict(), strict=False)
    data = batch(plain.config, 3)
    with torch.no_grad():
        ours = adapted(*data).sample
        adapted.cond_adaptor = nn.Identity()
        theirs, expected = adapted(*data).sample, plain(*data).sample
    assert torch.equal(theirs, expected) and not torch.allclose(ours, expected)


def test_positions_in_pixels_are_the_whole_numbers_and_in_patches_their_mean_is_the_patch():
    omega = 10000.0 ** (-torch.arange(16, dtype=torch.float64) / 16)
    code = lambda place: torch.cat([(place * omega).sin(), (place * omega).cos()])  # noqa: E731
    pixels, patches = position_table(64, (4, 6)), position_table(64, (4, 6), stride=2)
    for row in range(4):
        for column in range(6):
            whole = torch.cat([code(column), code(row)]).float()
            assert torch.equal(pixels[row * 6 + column], whole)
            part = torch.cat([code(column / 2 - 0.25), code(row / 2 - 0.25)]).float()
            torch.testing.assert_close(patches[row * 6 + column], part)
    places = (torch.arange(6) + 0.5) / 2 - 0.5
    assert places.view(3, 2).mean(1).tolist() == [0, 1, 2]


def test_positions_of_any_grid_follow_the_stride():
    model = DCDiT(tiny_config(position_stride=2))
    assert torch.equal(model.pos_embed[0], position_table(64, (8, 8), 2))
    assert torch.equal(model._positions((4, 6)), position_table(64, (4, 6), 2))


def test_the_adaptor_is_read_by_encoder_and_decoder_alone():
    model = tiny_dcdit(cond_adaptor=True, hidden_size=128, enc_dec_dim_factor=2)
    model.cond_adaptor.reset_parameters()
    seen = {}
    for name in ("encoder", "backbone", "decoder", "final_layer"):
        module = getattr(model, name)
        module.register_forward_pre_hook(lambda m, inputs, name=name: seen.update({name: inputs[1]}))
    data = batch(model.config, 3)
    model(*data).sample.square().sum().backward()
    c = model.t_embedder(data[1]) + model.y_embedder(data[2])
    normed = torch.nn.functional.layer_norm(c, (128,), eps=1e-6)
    assert torch.equal(seen["backbone"], c) and torch.equal(seen["final_layer"], c)
    for name in ("encoder", "decoder"):
        torch.testing.assert_close(seen[name], normed)
    for parameter in model.cond_adaptor.parameters():
        assert parameter.grad.abs().max() > 0


def test_parameters_and_flops():
    plain, config = tiny_config(), tiny_config(cond_adaptor=True)
    assert DCDiT(config).num_parameters() - DCDiT(plain).num_parameters() == 2 * 64
    assert flops(config, 16) == flops(plain, 16)  # the released counter leaves out norms
    more = {
        key: value - flops(plain, 16, extras=True)[key]
        for key, value in flops(config, 16, extras=True).items()
    }
    assert more["embed"] == more["total"] == 64 * (5 + 2)  # once per image: normalise, scale and shift
    assert not any(value for key, value in more.items() if key not in ("embed", "total"))


def test_saved_models_come_back_with_adaptor_and_positions(tmp_path):
    model = liven(tiny_dcdit(cond_adaptor=True, position_stride=2))
    model.save_pretrained(tmp_path / "ours")
    torch.save({"ema": to_released(model.state_dict())}, tmp_path / "theirs.pt")
    data = batch(model.config, 2)
    for loaded in (
        DCDiT.from_pretrained(tmp_path / "ours"),
        load_released(tmp_path / "theirs.pt", heads=4, dechunk_sigma=1.0),
    ):
        assert loaded.config.cond_adaptor
        with torch.no_grad():
            assert torch.equal(loaded(*data).sample, model(*data).sample)


@pytest.mark.parametrize("change", [{"cond_adaptor": 1}, {"position_stride": 0}, {"position_stride": 1.5}])
def test_bad_values(change):
    with pytest.raises(UserError, match=next(iter(change))):
        tiny_config(**change)
