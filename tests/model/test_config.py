"""Configs refuse shapes that do not fit, in one line that names the key; presets carry the paper's sizes."""

import dataclasses
import json

import pytest
import torch

from model import DCDiT, DCDiTConfig, DiT, DiTConfig, preset
from model.config import PRESETS
from model.errors import UserError

# Totals with the frozen position table, and tensors of the state dict (input 32, C = 4, K = 1000).
TOTALS = {
    "S": (34_760_457, 191),
    "B": (137_129_481, 191),
    "L": (469_612_553, 311),
    "XL": (689_589_513, 351),
}


@pytest.mark.parametrize("size", TOTALS)
def test_parameter_totals_are_those_of_the_release(size):
    with torch.device("meta"):
        model = DCDiT(preset(size))
    assert (model.num_parameters(), len(model.state_dict())) == TOTALS[size]


def test_every_preset_makes_a_model():
    for name in PRESETS:
        with torch.device("meta"):
            model = (DiT if name.startswith("DiT") else DCDiT)(preset(name))
        assert model.num_parameters() > 1_000_000


def test_ti_is_the_small_preset():
    config = preset("DC-DiT-Ti", in_channels=3)
    assert (config.hidden_size, config.depth, config.num_heads, config.encoder_size) == (128, 4, 4, 64)
    assert preset("Ti", in_channels=3) == config


def test_dit_xl_2_has_the_published_size():
    with torch.device("meta"):
        model = DiT(preset("DiT-XL/2"))
    assert round(model.num_parameters() / 1e6) == 675


def test_integer_input_size_means_square():
    assert DCDiTConfig(input_size=16).input_size == (16, 16)
    assert DiTConfig(input_size=[16, 32]).input_size == (16, 32)


@pytest.mark.parametrize("config", [preset("B", router="cosine"), preset("DiT-S/4", learn_sigma=False)])
def test_configs_survive_json(config):
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("S").depth = 3


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"hidden_size": 100}, "hidden_size"),
        ({"hidden_size": 128, "num_heads": 4}, "32"),  # factor 4: E = 32
        ({"hidden_size": 192}, "enc_dec_dim_factor"),  # E = 48
        ({"enc_dec_dim_factor": 5}, "enc_dec_dim_factor"),
        ({"enc_dec_dim_factor": 0}, "enc_dec_dim_factor"),
        ({"num_heads": 7}, "num_heads"),
        ({"depth": 0}, "depth"),
        ({"depth": 2.5}, "depth"),
        ({"in_channels": True}, "in_channels"),
        ({"num_classes": -1}, "num_classes"),
        ({"input_size": (32,)}, "input_size"),
        ({"input_size": "32"}, "input_size"),
        ({"input_size": 0}, "input_size"),
        ({"learn_sigma": 1}, "learn_sigma"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
        ({"router": "entropy"}, "router"),
        ({"target_ratio": 1.0}, "target_ratio"),
        ({"dechunk_sigma": 0.0}, "dechunk_sigma"),
        ({"attention_backend": "xformers"}, "attention_backend"),
        ({"ops_backend": "cuda"}, "ops_backend"),
    ],
)
def test_bad_dcdit_shapes_are_refused_by_name(changes, named):
    with pytest.raises(UserError, match=named) as caught:
        DCDiTConfig(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"patch_size": 3}, "patch_size"),
        ({"input_size": 30, "patch_size": 4}, "patch_size"),
        ({"num_heads": 5}, "num_heads"),
    ],
)
def test_bad_dit_shapes_are_refused_by_name(changes, named):
    with pytest.raises(UserError, match=named):
        DiTConfig(**changes)


def test_narrow_encoder_needs_consent():
    assert (
        DCDiTConfig(hidden_size=64, num_heads=4, enc_dec_dim_factor=2, allow_narrow_encoder=True).encoder_size
        == 32
    )


@pytest.mark.parametrize(
    "name, offered", [("DC-DiT-XXL", "DC-DiT-XL"), ("DiT-S2", "DiT-S/2"), ("dit-b/4", "DiT-B/4")]
)
def test_unknown_preset_offers_the_nearest(name, offered):
    with pytest.raises(UserError, match=f"did you mean '{offered}'"):
        preset(name)


def test_unknown_override_offers_the_nearest():
    with pytest.raises(UserError, match="did you mean 'hidden_size'"):
        preset("S", hiden_size=128)
    with pytest.raises(UserError, match="patch_size"):
        preset("S", patch_size=2)
