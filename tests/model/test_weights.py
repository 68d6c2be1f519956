"""Published checkpoints: read exactly, named both ways, and never trusted."""

import os
import pickle
import sys
import types
import warnings

import pytest
import torch

from model import DCDiT, DiT
from model.errors import UserError
from model.weights import from_released, load_dit, load_released, released_name, to_released
from tests.model.conftest import Reference, batch, fixture_path, tiny_dcdit, tiny_dit


@pytest.fixture
def released_file(tmp_path):
    """A checkpoint in the released layout, made from a model of ours; gives (path, model, write)."""
    model = tiny_dcdit(enc_dec_dim_factor=2, hidden_size=128, input_size=(8, 8))
    path = tmp_path / "0000003.pt"

    def write(drop=(), config=None, **changes):
        raw = {name: value.clone() for name, value in to_released(model.state_dict()).items()}
        ema = {name: value + 0.5 for name, value in raw.items()} | changes
        for name in drop:
            del ema[name]
        content = {"model": raw, "ema": ema, "opt": {"state": {}, "param_groups": []}}
        torch.save(content if config is None else content | {"config": config}, path)
        return path

    write()
    return path, model, write


HNET = {"model": {"hnet": {"num_heads": [4, 4], "dechunk_kernel_sigma": 2.0}}}


def test_names_translate_both_ways():
    for model in (tiny_dcdit(hidden_size=128, enc_dec_dim_factor=2), tiny_dcdit(router="cosine"), tiny_dit()):
        state = model.state_dict()
        theirs = to_released(state)
        assert len(theirs) == len(state) and from_released(theirs) == state
        kind = type(model).__name__
        assert [released_name(name, kind) for name in state] == list(theirs)


def test_names_are_those_of_the_release():
    reference = Reference("tiny16")
    model = DCDiT(reference.config())
    theirs = {name: tuple(value.shape) for name, value in to_released(model.state_dict()).items()}
    assert theirs == {name: tuple(value.shape) for name, value in reference.parameters().items()}


@pytest.mark.parametrize("which", ["ema", "model"])
def test_the_released_file_loads_and_goes_out_again(which):
    path = fixture_path("tiny_official_layout_0000003.pt")
    with pytest.warns(UserWarning, match="32 wide"):  # the file's own encoder is that narrow
        model = load_released(path, which=which)
    c = model.config
    assert (c.hidden_size, c.depth, c.num_heads, c.encoder_size) == (64, 2, 4, 32)
    assert (c.in_channels, c.num_classes, c.input_size, c.learn_sigma) == (4, 10, (16, 16), True)
    assert (c.dechunk_sigma, c.mlp_ratio, c.router, c.target_ratio) == (1.0, 4.0, "spatial", 4.0)
    import model.weights as weights

    stored = weights._read(path)[which]
    exported = to_released(model.state_dict())
    assert set(exported) == set(stored)
    assert all(torch.equal(exported[name], stored[name]) for name in stored)
    assert model(*batch(c, 2)).sample.shape == (2, 8, 16, 16)


def test_a_narrow_published_model_survives_save_and_load(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_released(fixture_path("tiny_official_layout_0000003.pt"))
    model.save_pretrained(tmp_path)
    assert DCDiT.from_pretrained(tmp_path).config == model.config


def test_sizes_come_from_shapes_and_the_rest_from_arguments(released_file):
    path, model, _ = released_file
    raw = load_released(path, which="model", heads=4, dechunk_sigma=1.5)
    assert raw.config.dechunk_sigma == 1.5 and raw.config.num_heads == 4
    assert raw.config.enc_dec_dim_factor == 2 and raw.config.in_channels == 3
    assert all(torch.equal(raw.state_dict()[k], v) for k, v in model.state_dict().items())
    ema = load_released(path, heads=4, dechunk_sigma=1.0)
    assert torch.equal(ema.pos_embed, model.pos_embed + 0.5)  # drifted positions are kept
    data = batch(model.config, 2)
    again = load_released(path, which="model", heads=4, dechunk_sigma=1.0)
    with torch.no_grad():
        torch.testing.assert_close(again(*data).sample, model(*data).sample)


def test_what_the_file_does_not_say_is_asked_for(released_file):
    path, _, write = released_file
    with pytest.raises(UserError, match="give heads="):
        load_released(path)
    with pytest.raises(UserError, match="give dechunk_sigma="):
        load_released(path, heads=4)
    write(config=HNET)
    assert load_released(path).config.dechunk_sigma == 2.0
    with pytest.raises(UserError, match="says heads=4, not 8"):
        load_released(path, heads=8)
    with pytest.raises(UserError, match="num_heads=5"):
        write()
        load_released(path, heads=5, dechunk_sigma=1.0)
    with pytest.raises(UserError, match="which='best'"):
        load_released(path, which="best")


@pytest.mark.parametrize(
    "changes",
    [
        {"router": "cosine"},
        {"learn_sigma": False},
        {"enc_dec_dim_factor": 1},
        {"position_stride": 2, "cond_adaptor": True},
        {"position_stride": 4},
    ],
)
def test_every_kind_of_model_is_recognised(changes, tmp_path):
    model = tiny_dcdit(**({"hidden_size": 64} | changes))
    torch.save({"ema": to_released(model.state_dict())}, tmp_path / "x.pt")
    assert load_released(tmp_path / "x.pt", heads=4, dechunk_sigma=1.0).config == model.config


def test_tensors_that_do_not_fit_are_named(released_file):
    path, _, write = released_file
    name = "hnet.encoder.layers.1.conv2.weight"

    def complaint(**kwargs):
        write(config=HNET, **kwargs)
        with pytest.raises(UserError, match=str(path)) as caught:
            load_released(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert name in complaint(drop=[name]) and "missing" in complaint(drop=[name])
    assert "(3, 3)" in complaint(**{name: torch.zeros(3, 3)})
    assert "unknown tensor 'extra'" in complaint(extra=torch.zeros(1))
    assert "pos_embed" in complaint(drop=["pos_embed"])
    assert "square" in complaint(pos_embed=torch.zeros(1, 60, 128))
    assert "final_layer.linear.weight" in complaint(**{"final_layer.linear.weight": torch.zeros(5, 64)})
    assert "layers.0" in complaint(
        drop=[n for n in to_released(tiny_dcdit().state_dict()) if ".main_network.layers.0." in n]
    )
    assert "expected a tensor" in complaint(extra=[1, 2])


def test_damaged_files_are_named(released_file, tmp_path):
    path, _, _ = released_file
    with pytest.raises(UserError, match="nowhere.pt does not exist"):
        load_released(tmp_path / "nowhere.pt")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:100], b"", b"not a checkpoint", whole[:-30]):
        path.write_bytes(damaged)
        for load in (load_released, load_dit):
            with pytest.raises(UserError, match=str(path)) as caught:
                load(path)
            assert "\n" not in str(caught.value)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds a list"):
        load_released(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(UserError, match="no state dict under 'ema'; the file has: epoch"):
        load_released(path)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_never_run(released_file, tmp_path, legacy):
    path, model, _ = released_file
    proof = tmp_path / "exploded"
    content = {"ema": to_released(model.state_dict()), "config": Bomb(str(proof))}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    for load in (load_released, load_dit):
        with pytest.raises(UserError, match="mkdir.*nothing was run"):
            load(path, heads=4)
    path.write_bytes(pickle.dumps(Bomb(str(proof))))
    with pytest.raises(UserError, match=str(path)):
        load_released(path, heads=4)
    assert not proof.exists()


def test_the_stand_ins_for_the_config_run_nothing_either(released_file, tmp_path, monkeypatch):
    """The allowed class names carry data only: their real code, were it there, is not called."""
    path, model, _ = released_file
    module = types.ModuleType("config")
    for name in ("Config", "ModelConfig", "HNetConfig"):
        cls = type(name, (), {"__setstate__": lambda self, state: os.mkdir(tmp_path / "ran")})
        cls.__module__ = "config"
        setattr(module, name, cls)
    monkeypatch.setitem(sys.modules, "config", module)
    hnet, middle, config = module.HNetConfig(), module.ModelConfig(), module.Config()
    hnet.__dict__.update(num_heads=[4, 4], dechunk_kernel_sigma=1.0)
    middle.__dict__.update(hnet=hnet)
    config.__dict__.update(model=middle)
    torch.save({"ema": to_released(model.state_dict()), "config": config}, path)
    assert load_released(path).config.num_heads == 4
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("patch, sigma", [(2, True), (4, False), (8, True)])
def test_dit_files_load(tmp_path, patch, sigma):
    model = tiny_dit(patch_size=patch, learn_sigma=sigma, input_size=(16, 16))
    for content in (to_released(model.state_dict()), {"ema": to_released(model.state_dict())}):
        for new in (True, False):
            torch.save(content, tmp_path / "dit.pt", _use_new_zipfile_serialization=new)
            again = load_dit(tmp_path / "dit.pt", heads=2)
            assert again.config == model.config
            assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match="give heads="):
        load_dit(tmp_path / "dit.pt")


def test_published_dit_sizes_need_no_heads(tmp_path):
    from model import preset

    torch.manual_seed(0)
    model = DiT(preset("DiT-S/8", num_classes=3, input_size=16))
    torch.save(to_released(model.state_dict()), tmp_path / "dit.pt")
    assert load_dit(tmp_path / "dit.pt").config == model.config


def test_the_wrong_kind_of_checkpoint_is_told_apart(tmp_path):
    torch.save(to_released(tiny_dit().state_dict()), tmp_path / "dit.pt")
    torch.save(to_released(tiny_dcdit().state_dict()), tmp_path / "dcdit.pt")
    with pytest.raises(UserError, match="load_dit"):
        load_released(tmp_path / "dit.pt", heads=2, dechunk_sigma=1.0)
    with pytest.raises(UserError, match="load_released"):
        load_dit(tmp_path / "dcdit.pt", heads=2)


def test_half_precision_files_become_float32(released_file):
    path, model, _ = released_file
    halves = {name: value.bfloat16() for name, value in to_released(model.state_dict()).items()}
    torch.save({"ema": halves, "config": HNET}, path)
    loaded = load_released(path)
    assert all(value.dtype == torch.float32 for value in loaded.state_dict().values())
