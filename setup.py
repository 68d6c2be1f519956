"""Package metadata, and the native build of csrc/, which may fail without failing the installation."""

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

MEND = "install torch first and a C++ compiler (g++), then `pip install --no-build-isolation -e .`"
MEND_GPU = (
    "give the nvcc or hipcc of the version torch was built with (CUDA_HOME, ROCM_HOME), then install again"
)


def brief(error):
    return " ".join(str(error).split())[:300] or type(error).__name__


def import_torch():
    """torch.utils.cpp_extension of this environment, also from inside pip's isolated build, or None."""
    try:
        import torch.utils.cpp_extension as cpp_extension
    except ImportError:
        # An isolated build hides the environment it installs into; the ops will run with that one's torch.
        sys.path += [sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
        try:
            import torch.utils.cpp_extension as cpp_extension
        except ImportError:
            return None
    return cpp_extension


def version_of(text):
    """(major, minor) of "13.0" or "6.2.41133-dd7f95766"; () of None."""
    return tuple(int(part) for part in (text or "").split(".")[:2] if part)


def cuda_home(cpp):
    """Where CUDA's headers are. torch takes the folder above that of the nvcc on the PATH, which may be no more than a
    script or a link to the real one: then nvcc itself is asked."""
    home = cpp.CUDA_HOME
    nvcc = home and os.path.join(home, "bin", "nvcc")
    if (
        not home
        or os.path.exists(os.path.join(home, "include", "cuda_runtime_api.h"))
        or not os.path.exists(nvcc)
    ):
        return home
    said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return os.path.realpath(top[1].strip()) if top else home


def cuda_archs(home):
    """The architectures to build for that nvcc knows: it need not be of the version torch was built with."""
    try:
        said = subprocess.run(
            [os.path.join(home, "bin", "nvcc"), "--list-gpu-arch"], capture_output=True, text=True
        )
        known = [
            arch
            for arch in ("8.0", "9.0", "10.0")
            if f"compute_{arch.replace('.', '')}" in said.stdout.split()
        ]
    except OSError:
        known = []
    return ";".join(known or ["8.0", "9.0"]) + "+PTX"


def extension(cpp, gpu=True):
    """The one extension: always the CPU kernels, the GPU ones where they are wanted and their compiler is there."""
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    sources = ["csrc/bindings.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))]
    depends = sorted(glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.inl", recursive=True))
    if cpp is None:
        return Extension("model.ops._C", sources)
    # Compiled for OpenMP but not linked to a runtime: at::parallel_for must use the one torch has loaded.
    flags = {"cxx": ["-O3"] + (["-fopenmp"] if sys.platform == "linux" else [])}
    kind = cpp.CppExtension
    cuda, hip = version_of(cpp.torch.version.cuda), version_of(cpp.torch.version.hip)
    cpp.CUDA_HOME = cuda_home(cpp)
    if gpu and (cpp.CUDA_HOME or cpp.ROCM_HOME) and (cuda or hip):
        kind = cpp.CUDAExtension
        sources += ["csrc/bindings_cuda.cpp", *sorted(glob.glob("csrc/cuda/*.cu"))]
        flags["nvcc"] = ["-O3"]
        if not cpp.torch.cuda.is_available():  # else torch builds for the GPU that is there
            if cuda and cpp.CUDA_HOME and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
                os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs(cpp.CUDA_HOME)
            # The last only where the compiler knows it.
            hip_archs = "gfx90a;gfx942;gfx950" if hip >= (7,) else "gfx90a;gfx942"
            os.environ.setdefault("PYTORCH_ROCM_ARCH", hip_archs)
    return kind("model.ops._C", sources, depends=depends, extra_compile_args=flags)


def forgiving(base, cpp):
    """`base` as a command that warns, and notes it for `dcdit doctor`, where there is no native build."""

    class Build(base):
        def run(self):
            torch_version, reason, gpu = None, "torch was not found while building", None
            inplace = self.inplace
            if cpp is not None:
                torch_version = cpp.torch.__version__
                compiler = cpp.get_cxx_compiler()
                try:
                    if not shutil.which(compiler.split()[0]):
                        raise RuntimeError(f"the C++ compiler {compiler} was not found")
                    gpu = self.build_with_or_without_gpu()
                    reason = None
                except (Exception, SystemExit) as error:
                    reason = brief(error)
            self.inplace = inplace  # a run that broke off leaves it changed
            self.leave_note(torch_version, reason, gpu)

        def build_with_or_without_gpu(self):
            """A GPU compiler that fails must not take the CPU kernels with it. Returns why the GPU ones are missing."""
            before, (module,) = (self.inplace, self.compiler), self.extensions
            with_gpu = any(source.endswith((".cu", ".hip")) for source in module.sources)
            try:
                super().run()
            except (Exception, SystemExit) as error:
                if not with_gpu:
                    raise
                self.inplace, self.compiler = before  # a run that broke off leaves them changed
                plain = vars(
                    extension(cpp, gpu=False)
                )  # what setuptools has added to `module` begins with "_"
                vars(module).update({key: value for key, value in plain.items() if not key.startswith("_")})
                super().run()
                warnings.warn(
                    f"the GPU kernels were not built ({brief(error)}). Mend: {MEND_GPU}", stacklevel=1
                )
                return brief(error)
            return None

        def leave_note(self, torch_version, reason, gpu):
            target = self.get_ext_fullpath("model.ops._C")
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(os.path.join(os.path.dirname(target), "_build.json"), "w") as file:
                json.dump(
                    {
                        "torch": torch_version,
                        "reason": reason,
                        "gpu": gpu,
                        "mend": MEND,
                        "mend_gpu": MEND_GPU,
                    },
                    file,
                )
            if reason:
                if os.path.exists(target):
                    os.remove(target)  # an older build would not match these sources
                text = "Everything works without them, but selection, packing and de-chunking run as plain PyTorch"
                warnings.warn(
                    f"the native chunking ops were not built ({reason}). {text}, several times slower. Mend: {MEND}",
                    stacklevel=1,
                )

    return Build


cpp = import_torch()
setup(
    name="dcdit",
    version="0.1.0",
    description="Dynamic chunking diffusion transformers: training, sampling and elastic inference",
    python_requires=">=3.10",
    packages=find_packages(include=["model", "model.*", "trainer", "trainer.*"]),
    package_data={"model.ops": ["_build.json"], "trainer": ["**/*.html", "**/*.css", "**/*.js", "**/*.yaml"]},
    install_requires=["torch>=2.6", "numpy", "einops", "omegaconf", "safetensors", "tqdm", "rich", "pillow"],
    extras_require={
        "deepspeed": ["deepspeed", "huggingface_hub"],
        "wandb": ["wandb"],
        "webdataset": ["webdataset", "xxhash"],
        "vae": ["diffusers"],
        "flash": ["flash-attn>=2.6"],
        "triton": ["triton"],
        "streaming": ["mosaicml-streaming>=0.13,<0.14"],
        "evaluate": [
            "torch-fidelity"
        ],  # `pip install --no-deps torch-fidelity` is enough, and brings no torchvision
        "dinov2": ["transformers"],
        "demo": ["scikit-image", "scikit-learn", "matplotlib", "pillow"],
        "test": [
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "ruff",
            "tensorboard",
            "scikit-image",
            "matplotlib",
        ],
    },
    entry_points={"console_scripts": ["dcdit = trainer.cli:main"]},
    ext_modules=[extension(cpp)],
    cmdclass={"build_ext": forgiving(cpp.BuildExtension if cpp else build_ext, cpp)},
)
