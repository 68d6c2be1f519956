"""`dcdit`: dispatch, help, and how errors reach the person at the keyboard."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from model.errors import UserError
from trainer import cli

ROOT = Path(__file__).resolve().parents[2]


def test_help_lists_every_command_and_does_not_load_torch():
    code = "import sys; from trainer import cli; cli.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("train", "prepare", "sample", "report", "doctor", "demo"):
        assert f"  {command} " in done.stdout


def test_no_command_prints_usage_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: dcdit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("smaple", "did you mean 'sample'?"), ("trian", "did you mean 'train'?"), ("xyzzy", "choose from")],
)
def test_unknown_command_offers_the_nearest(typed, hint, capsys):
    assert cli.main([typed]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and hint in error and error.count("\n") == 1


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_exists_and_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    assert f"dcdit {command}" in capsys.readouterr().out


def _stand_in(monkeypatch, main):
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(main=main))


def test_user_error_is_one_line_and_status_2(monkeypatch, capsys):
    def main(argv):
        raise UserError("data.path: no such folder\n/nowhere")

    _stand_in(monkeypatch, main)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "error: data.path: no such folder /nowhere\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def main(argv):
        raise ValueError("ours")

    _stand_in(monkeypatch, main)
    with pytest.raises(ValueError, match="ours"):
        cli.main(["train"])


def test_status_and_arguments_are_passed_through(monkeypatch):
    seen = []
    _stand_in(monkeypatch, lambda argv: seen.append(argv) or 75)
    assert cli.main(["train", "--config", "x", "a=b"]) == 75
    assert seen == [["--config", "x", "a=b"]]


def test_interrupt_is_quiet(monkeypatch, capsys):
    def main(argv):
        raise KeyboardInterrupt

    _stand_in(monkeypatch, main)
    assert cli.main(["sample"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("script", ["cli.py", "sample.py", "report.py", "doctor.py"])
def test_scripts_run_from_anywhere_without_installation(script, tmp_path):
    """-S -I would hide torch too; -P is not in 3.10. The root must come from the file's own place."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "trainer" / script), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "usage: dcdit" in done.stdout


def test_script_reports_bad_input_like_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "trainer" / "report.py"), "nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nowhere: no such folder")
