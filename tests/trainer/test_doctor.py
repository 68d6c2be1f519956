"""`dcdit doctor`: true on this machine, readable, and useful where something is missing."""

import importlib.machinery

import torch

from trainer import doctor
from trainer.doctor import MISSING, NOTE, OK, Row


def test_says_what_is_here_and_exits_zero(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and "select" in out and "/dev/shm" in out
    assert "used (" in out, "one attention backend must be named as the one used"
    assert all(len(line) <= 140 for line in out.splitlines())


def test_columns_line_up_and_long_text_wraps_under_itself():
    rows = {"one": [Row(OK, "a", "short"), Row(MISSING, "long name", "word " * 60, "do this")]}
    lines = doctor.layout(rows, 80).splitlines()
    column = lines[1].index("short")
    assert lines[2].index("word") == column
    assert all(line[:column].strip() == "" for line in lines[3:-2])
    assert all(len(line) <= 80 for line in lines)
    assert lines[-1].startswith("one thing would make this installation better")


def test_nothing_to_mend_is_said():
    assert doctor.layout({"t": [Row(OK, "a", "b")]}).endswith(
        "nothing that this machine could use is missing"
    )


def _fake_apex(monkeypatch, folder):
    spec = importlib.machinery.ModuleSpec("apex", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: spec if name == "apex" else find(name)
    )


def test_the_namesake_of_apex_is_told_apart(monkeypatch, tmp_path):
    _fake_apex(monkeypatch, tmp_path)
    row = doctor.apex_row(gpu=True)
    assert row.mark == NOTE and "not NVIDIA's" in row.found and "pip uninstall apex" in row.mend
    (tmp_path / "optimizers").mkdir()
    (tmp_path / "optimizers" / "fused_adam.py").touch()
    assert doctor.apex_row(gpu=True).mark == OK


def test_gpu_packages_are_only_recommended_where_there_is_a_gpu(monkeypatch):
    package = doctor.Package("no_such_module", ("no-such",), "speed", "pip install no-such", needs_gpu=True)
    monkeypatch.setattr(doctor, "PACKAGES", (package,))
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        row = doctor.package_rows()[0]
        assert row.mark == MISSING and bool(row.mend) == gpu


def test_missing_extension_names_the_mend(monkeypatch):
    from model import ops

    state = ops.available() | {"native": False, "library": None, "reason": "no compiler; install g++"}
    monkeypatch.setattr(ops, "available", lambda: state)
    row = doctor.ops_rows()[0]
    assert row.mark == MISSING and row.mend == "install g++" and "plain PyTorch" in row.found
