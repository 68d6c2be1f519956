"""An optimizer that is asked for is there, or the run says why not before it starts."""

import sys

import pytest
import torch
from torch import nn

from model import DCDiT, DiT, preset
from model.errors import UserError
from trainer import optimizers
from trainer.build import backbone_share
from trainer.config import Config, load_config
from trainer.optimizers import build_optimizer, check_optimizer, parameter_groups, set_rates


def asked(name: str, **parallel) -> Config:
    config = Config()
    config.optimizer.name = name
    for key, value in parallel.items():
        setattr(config.parallel, key, value)
    return config


def test_adamw_is_torchs_fused_one():
    optimizer = build_optimizer(asked("adamw"), nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]


def test_a_backbone_that_warms_up_by_itself_is_a_group_by_itself():
    config = asked("adamw")
    model, baseline = DCDiT(preset("DC-DiT-Ti", depth=1)), DiT(preset("DiT-Ti/2", depth=1))
    assert len(parameter_groups(config, model)) == 1
    config.optimizer.warmup_images, config.optimizer.backbone_warmup_images = 0, 100
    model.t_embedder.requires_grad_(False)
    optimizer = build_optimizer(config, nn.ModuleDict({"module": model}))  # as DDP names it
    rest, backbone = (group["params"] for group in optimizer.param_groups)
    assert {id(p) for p in backbone} == {id(p) for p in model.backbone.parameters()}
    assert len(rest) + len(backbone) == sum(p.requires_grad for p in model.parameters())
    for images, share in ((0, 0.0), (25, 0.25), (100, 1.0), (999, 1.0)):
        assert backbone_share(config, images) == share
    set_rates(optimizer, 0.5, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.125]
    optimizer = build_optimizer(config, baseline)  # nothing beside its backbone: it follows the learning rate
    set_rates(optimizer, 0.5, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]


def test_apex_and_sharded_tensors_do_not_go_together(monkeypatch):
    monkeypatch.setattr(optimizers, "_check_apex", lambda: None)
    with pytest.raises(UserError, match="optimizer.name: apex_fused_adam .*parallel.engine=ddp"):
        check_optimizer(asked("apex_fused_adam", engine="fsdp"))
    check_optimizer(asked("apex_fused_adam", engine="ddp"))


def test_the_namesake_of_apex_is_not_taken_for_apex(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise ImportError('pyramid is missing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    with pytest.raises(UserError, match="optimizer.name: .*not NVIDIA's or AMD's"):
        check_optimizer(asked("apex_fused_adam"))


def test_apex_that_is_not_there_is_named_with_its_source(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match="optimizer.name: .*apex"):
        check_optimizer(asked("apex_fused_adam"))


def test_cpu_adam_needs_weights_on_the_cpu():
    pytest.importorskip("deepspeed")
    with pytest.raises(UserError, match="optimizer.name: .*parallel.offload=true"):
        check_optimizer(asked("deepspeed_cpu_adam", engine="deepspeed"))
    check_optimizer(asked("deepspeed_cpu_adam", engine="deepspeed", offload=True))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["ema.decay=[0.9,1.5]"], "ema.decay"),
        (["ema.decay=[0.9,0.9]"], "twice"),
        (["ema.decay=soon"], "ema.decay"),
        (["parallel.offload=true"], "parallel.offload"),
        (["parallel.engine=ddp", "parallel.replicate=2"], "parallel.replicate"),
        (["checkpoint.every=3", "checkpoint.keep_every=10"], "use 9"),
        (["parallel.zero_stage=4"], "parallel.zero_stage"),
    ],
)
def test_what_does_not_go_together_is_named(overrides, words):
    with pytest.raises(UserError, match=words):
        load_config(None, ["data.path=x", *overrides])
