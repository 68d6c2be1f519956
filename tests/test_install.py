"""The install without a compiler: it succeeds, says what is slower, the ops fall back to plain PyTorch."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools

ROOT = Path(__file__).parents[1]
LIBRARY = f"model/ops/_C{sysconfig.get_config_var('EXT_SUFFIX')}"

NVCC = """#!/bin/sh
echo '#$ _SPACE_= ' >&2
echo '#$ TOP={top}/bin/..' >&2
"""

BROKEN_NVCC = """#!/bin/sh
case "$1" in
    --version) echo 'Cuda compilation tools, release 12.8, V12.8.93' ;;
    --list-gpu-arch) printf 'compute_80\\ncompute_90\\n' ;;
    *) echo "$@" >> {log}; echo 'nvcc fatal: broken on purpose' >&2; exit 1 ;;
esac
"""
# setup.py as on a machine whose torch was built for CUDA
BUILD_FOR_CUDA = """
import os, runpy, sys, torch
import torch.utils.cpp_extension as cpp
torch.version.cuda, cpp.CUDA_HOME = "12.8", os.environ["TOOLKIT"]
sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""

USE = """
import torch
from model.errors import UserError
from model.ops import available, gather_tokens, resolve, select
report = available()
assert report["native"] is False and report["library"] is None, report
assert "no-build-isolation" in report["reason"], report
s = select(torch.rand(2, 16), torch.zeros(2))
rows = gather_tokens(torch.randn(2, 16, 4), None, s.index[: int(s.cu_seqlens[-1])], s.slot)
assert resolve("auto", "cpu") == "torch" and rows.shape[1] == 4
try:
    resolve("native", "cpu")
except UserError as error:
    print(error)
"""


@pytest.fixture
def copy(tmp_path):
    for name in ("model", "trainer", "csrc"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def python(folder, *arguments, **environment):
    env = {**os.environ, "PYTHONPATH": str(folder), **environment}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_without_a_compiler_the_install_succeeds_and_the_ops_work(copy):
    target = copy / "installed"
    pip = [
        "-m",
        "pip",
        "install",
        "-v",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(target),
    ]
    output = python(copy, *pip, ".", CXX="/nonexistent/c++", CC="/nonexistent/cc")
    assert "the native chunking ops were not built" in output and "several times slower" in output
    note = json.loads((target / "model/ops/_build.json").read_text())
    assert "/nonexistent/c++ was not found" in note["reason"] and not list(target.glob("model/ops/*.so"))
    assert (target / "bin/dcdit").exists()
    said = python(target, "-c", USE)
    assert "ops_backend=native" in said and "ops_backend=auto" in said


def test_a_failed_rebuild_leaves_no_old_library_and_the_note_says_why(copy):
    pretend = copy / LIBRARY
    pretend.write_bytes(b"an older build")
    build = ["setup.py", "-q", "build_ext", "--inplace"]
    (copy / "csrc/bindings.cpp").write_text("#error broken on purpose\n")
    output = python(copy, *build, MAX_JOBS="1")
    assert "were not built" in output and not pretend.exists()
    assert "Error compiling" in json.loads((copy / "model/ops/_build.json").read_text())["reason"]
    assert not list(copy.glob("model/ops/*.so"))


def test_a_library_for_another_torch_is_not_loaded(copy):
    (copy / LIBRARY).write_bytes(b"not a library")
    (copy / "model/ops/_build.json").write_text(json.dumps({"torch": "1.0.0", "reason": None}))
    show = "from model.ops import available; print(available()['reason'])"
    assert "built for torch 1.0.0" in python(copy, "-c", show)
    (copy / "model/ops/_build.json").unlink()
    assert "does not load" in python(copy, "-c", show)


def test_a_gpu_compiler_that_fails_leaves_the_cpu_kernels(copy):
    """It is asked only for the architectures that it knows."""
    toolkit = copy / "cuda"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "include").mkdir()
    (toolkit / "include/cuda_runtime_api.h").touch()
    nvcc = toolkit / "bin/nvcc"
    nvcc.write_text(BROKEN_NVCC.format(log=copy / "asked"))
    nvcc.chmod(0o755)
    for source in (copy / "csrc/cpu").glob("*.cpp"):  # the bindings alone are quick to compile
        source.unlink()
    (copy / "csrc/bindings_cuda.cpp").write_text("")
    output = python(copy, "-c", BUILD_FOR_CUDA, TOOLKIT=str(toolkit), MAX_JOBS="2", TORCH_CUDA_ARCH_LIST="")
    asked = (copy / "asked").read_text()
    assert "sm_80" in asked and "sm_90" in asked and "_100" not in asked
    assert "the GPU kernels were not built" in output and (copy / LIBRARY).exists()
    note = json.loads((copy / "model/ops/_build.json").read_text())
    assert note["reason"] is None and "Error compiling" in note["gpu"]
    show = "from model.ops import _native as n; n._REASON = None; print(n.why_not('select', 'cuda'))"
    assert "its GPU kernels were not built" in python(copy, "-c", show)


def test_cudas_home_is_behind_an_nvcc_that_is_a_script_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)  # where setup.py goes
    cuda_home = runpy.run_path(str(ROOT / "setup.py"))["cuda_home"]
    toolkit, elsewhere = tmp_path / "cuda-13.0", tmp_path / "local"
    header, nvcc = toolkit / "include/cuda_runtime_api.h", elsewhere / "bin/nvcc"
    for file in (header, nvcc):
        file.parent.mkdir(parents=True)
    header.touch()
    nvcc.write_text(NVCC.format(top=toolkit))
    nvcc.chmod(0o755)
    assert cuda_home(SimpleNamespace(CUDA_HOME=str(elsewhere))) == str(toolkit)
    assert cuda_home(SimpleNamespace(CUDA_HOME=str(toolkit))) == str(toolkit)
    assert cuda_home(SimpleNamespace(CUDA_HOME=None)) is None
