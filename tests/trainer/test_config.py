"""The strict configuration: schema = base.yaml, every recipe loads, every mistake names its key."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from model.errors import UserError
from trainer.build import micro_batch
from trainer.config import Config, flatten, known_keys, load_config, save_config

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted((CONFIGS / "recipe").glob("*.yaml"))


def test_base_yaml_lists_every_key_with_its_default():
    base = OmegaConf.to_container(OmegaConf.load(CONFIGS / "base.yaml"), resolve=True)
    written = {f"{section}.{key}": value for section, values in base.items() for key, value in values.items()}
    assert list(written) == known_keys()
    assert written == flatten(Config())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_load(recipe):
    config = load_config(recipe)
    assert config.run.dir == f"runs/{config.run.name}"
    assert config.train.total_images % config.train.global_batch_size == 0


def test_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("optimizer: {lr: 0.5}\ndata: {path: x}\n")
    (tmp_path / "b.yaml").write_text("include: a.yaml\nema: {decay: 0.5}\n")
    config = load_config(tmp_path / "b.yaml", ["ema.decay=0.25", "model.overrides={depth: 3}"])
    assert (config.optimizer.lr, config.ema.decay, config.model.overrides) == (0.5, 0.25, {"depth": 3})
    assert config.optimizer.clip == Config().optimizer.clip


def test_saved_config_reads_back_equal(tmp_path):
    config = load_config(CONFIGS / "recipe" / "demo.yaml", ["run.seed=7"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("optimiser.lr=1", ["optimiser", "'optimizer'"]),
        ("lr=1", ["'lr'", "'optimizer.lr'"]),
        ("train.globl_batch_size=8", ["'train.globl_batch_size'", "'train.global_batch_size'"]),
        ("train.global_batch_size=many", ["train.global_batch_size", "many"]),
        ("train.global_batch_size=7", ["train.total_images", "14399"]),
        ("train.global_batch_size=-8", ["train.global_batch_size", "above 0"]),
        ("parallel.engine=fdsp", ["parallel.engine", "'fsdp'"]),
        ("train.tail_drop=[1.0]", ["train.tail_drop"]),
        ("optimizer.lr=nan", ["optimizer.lr", "nan"]),
        ("run.seed=99999999999999999999", ["run.seed"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas"]),
        ("ema.decay=1.0", ["ema.decay"]),
        ("model.target_ratio=1", ["model.target_ratio"]),
        ("optimizer=3", ["optimizer", "section"]),
        ("--epochs", ["--epochs", "key=value"]),
        ("run.dir=${nothing.there}", ["run.dir"]),
    ],
)
def test_bad_arguments_name_the_key_and_the_mend(argument, words):
    with pytest.raises(UserError) as caught:
        load_config(CONFIGS / "recipe" / "demo.yaml", [argument])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_keys_that_do_not_go_together_are_named():
    both = [
        "parallel.engine=deepspeed",
        "parallel.zero_stage=3",
        "parallel.activation_checkpointing=selective",
    ]
    with pytest.raises(UserError, match="activation_checkpointing: selective does not go with zero_stage 3"):
        load_config(CONFIGS / "recipe" / "demo.yaml", both)
    with pytest.raises(UserError, match="parallel.offload: only .*deepspeed"):
        load_config(CONFIGS / "recipe" / "demo.yaml", ["parallel.offload=true"])


def test_missing_key_is_named():
    with pytest.raises(UserError, match="data.path: not set; give it"):
        load_config(CONFIGS / "base.yaml")


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="did you mean .*demo.yaml"):
        load_config(CONFIGS / "recipe" / "dem.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [unclosed\n")
    with pytest.raises(UserError, match=r"broken.yaml: not readable"):
        load_config(broken)
    loop = tmp_path / "loop.yaml"
    loop.write_text("include: loop.yaml\n")
    with pytest.raises(UserError, match="includes itself"):
        load_config(loop)
    unknown = tmp_path / "unknown.yaml"
    unknown.write_text("train: {precison: bf16}\n")
    with pytest.raises(UserError, match=r"unknown.yaml: .*did you mean 'train.precision'"):
        load_config(unknown)


def test_micro_batch_lists_the_valid_choices():
    config = load_config(CONFIGS / "recipe" / "demo.yaml", ["train.global_batch_size=32"])
    assert micro_batch(config, 2) == 16
    with pytest.raises(UserError, match="30 or 33"):
        micro_batch(config, 3)
    config.train.micro_batch_size = 3
    with pytest.raises(UserError, match="1, 2, 4, 8, 16"):
        micro_batch(config, 2)
    config.train.micro_batch_size = 4
    assert micro_batch(config, 2) == 4
    config.parallel.replicate = 3
    with pytest.raises(UserError, match="parallel.replicate"):
        micro_batch(config, 2)
