"""docs/data.md: its program runs, and it names every option and key."""

import re
from dataclasses import fields
from pathlib import Path

from trainer.config import DataConfig
from trainer.data import open_source

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_shards_made_as_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(program, {})
    assert capsys.readouterr().out == "100\n" and open_source("mydata", "heldout")[3]["label"] == 1


def test_every_option_and_key_is_named():
    for name in ("size", "vae", "scale", "heldout", "workers", "device", "batch", "max-errors", "no-mirror"):
        assert f"--{name}" in PAGE
    for field in fields(DataConfig):
        if field.name != "label_drop":
            assert f"`data.{field.name}`" in PAGE, field.name
