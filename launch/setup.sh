#!/usr/bin/env bash
# Set up a virtual environment with everything the demo and the tests need. Called by `make setup`; safe to repeat.
#
# torch comes first: later packages would otherwise bring a build of their own choice. Where an NVIDIA or AMD GPU is
# seen, the torch that is already there is used (it has to match the driver); without a GPU the CPU build is installed.
set -euo pipefail
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TORCH=${TORCH:-torch==2.13.0}

say() { printf '\n== %s\n' "$*"; }
has_torch() { "$1" -c 'import torch' 2>/dev/null; }

gpu=none
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then gpu=NVIDIA; fi
if [ -e /dev/kfd ]; then gpu=AMD; fi

say "virtual environment in $VENV ($("$PYTHON" --version 2>&1), GPU: $gpu)"
if [ ! -x "$VENV/bin/python3" ]; then
    if [ "$gpu" != none ] && has_torch "$PYTHON"; then
        "$PYTHON" -m venv --system-site-packages "$VENV" # the torch that matches this driver
    else
        "$PYTHON" -m venv "$VENV"
    fi
fi
PY="$VENV/bin/python3" # where the environment is a system's Python, there need not be a plain "python"
pip() { "$PY" -m pip install --quiet --disable-pip-version-check "$@"; }

say "torch"
if has_torch "$PY"; then
    echo "using torch $("$PY" -c 'import torch; print(torch.__version__)')"
elif [ "$gpu" = none ]; then
    pip "$TORCH" numpy
else
    echo "error: a $gpu GPU is here, but no torch. Install the build for your driver first (pytorch.org, 'Get started')," >&2
    echo "       for example: $PY -m pip install torch   (NVIDIA)   then run make again." >&2
    exit 2
fi
# From here on pip must leave torch alone.
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
{ cat constraints.txt; echo "torch==$("$PY" -c 'import torch; print(torch.__version__.split("+")[0])')"; } >"$pins"

say "libraries"
pip -c "$pins" "setuptools>=70" wheel ninja einops omegaconf safetensors tqdm rich numpy \
    scikit-image scikit-learn matplotlib pillow tensorboard wandb webdataset diffusers \
    pytest pytest-timeout hypothesis ruff
pip -c "$pins" deepspeed huggingface_hub
# mosaicml-streaming asks for torchvision and transformers, which it needs for image and text sets only and which
# would replace torch: take the small packages that its core imports, then it alone.
pip -c "$pins" brotli python-snappy zstd catalogue xxhash
pip --no-deps "mosaicml-streaming==0.13.0"
# Of torch-fidelity only the network of FID is used, which needs nothing beside torch; its torchvision would replace torch.
pip --no-deps "torch-fidelity==0.4.0"

say "dcdit, with its extension"
pip --no-build-isolation --no-deps -e .
"$PY" -m trainer.doctor
