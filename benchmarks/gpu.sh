#!/usr/bin/env bash
# Everything that wants a GPU, in one command of under nine minutes: the extension built in place, the GPU tests, the ops
# against the dense form, and training steps; each with its own log in OUT, with the numbers as JSON. What fails or takes
# too long is noted and the next begins; the summary comes last. Needs torch with CUDA or ROCm, its compiler and pytest.
#
#     benchmarks/gpu.sh OUT        (PYTHON=python3; LIMIT=525, seconds in all)
set -uo pipefail
[ $# -eq 1 ] || { echo "usage: benchmarks/gpu.sh OUT" >&2; exit 2; }
mkdir -p "$1" || exit 2
OUT=$(realpath "$1")
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-525}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
FAILED=0
: >"$OUT/summary.txt"

# name, seconds at most, command...
item() {
  local name=$1 most=$2 left=$((LIMIT - SECONDS)) began=$SECONDS status
  shift 2
  [ "$most" -le "$left" ] || most=$left
  if [ "$most" -lt 5 ]; then
    status="left out: no time"
  elif timeout -k 5 "$most" "$@" >"$OUT/$name.log" 2>&1; then
    status=ok
  else
    status="failed with $? (124: more than $most s)"
  fi
  [ "$status" = ok ] || FAILED=1
  printf '%-22s %4d s  %s\n' "$name" $((SECONDS - began)) "$status" | tee -a "$OUT/summary.txt"
}
step() {  # name, seconds at most, model, batch, kinds, words...
  local name=$1 most=$2 model=$3 batch=$4 kinds=$5
  shift 5
  item "$name" "$most" "$PYTHON" benchmarks/step.py --models "DC-$model,$model/2" --kinds "$kinds" --batch "$batch" \
    --precision bf16 --rounds 10 --warm 4 --json "$OUT/$name.json" "$@"
}

item machine 30 bash -c "nvidia-smi || rocm-smi; nvcc --version || hipcc --version; '$PYTHON' -c 'import torch, sys
print(sys.version, torch.__version__, torch.version.cuda, torch.version.hip)
print(torch.cuda.get_device_properties(0))'"
item build 150 "$PYTHON" setup.py build_ext --inplace
item ops 40 "$PYTHON" -c "import json
from model.ops import available
found = available()
print(json.dumps(found, indent=1))
assert 'cuda' in found['serves']['dechunk'], found['reason'] or 'built without nvcc or hipcc'"
item test-ops 120 "$PYTHON" -m pytest -p no:cacheprovider -rs --tb=short tests/model/test_cuda_ops.py
item test-capacity 80 "$PYTHON" -m pytest -p no:cacheprovider -rs --tb=short tests/model/test_cuda_capacity.py
item chunking 80 "$PYTHON" benchmarks/chunking.py --no-compile --rounds 15 --json "$OUT/chunking.json"
item chunking-model 40 "$PYTHON" benchmarks/chunking.py --model --dtype bfloat16 --rounds 10 --json "$OUT/chunking-model.json"
step step-S 40 DiT-S 64 eager,capacity
step step-B 40 DiT-B 64 eager,capacity
step step-XL 60 DiT-XL 32 eager,capacity
step step-XL-compiled 100 DiT-XL 32 compiled,compiled_capacity
step step-S-compiled 70 DiT-S 64 compiled,compiled_capacity
step step-B-compiled 70 DiT-B 64 compiled,compiled_capacity
step step-XL-parts 60 DiT-XL 32 eager,capacity --parts
item chunking-compiled 80 "$PYTHON" benchmarks/chunking.py --dtype bfloat16 --json "$OUT/chunking-compiled.json"

{
  for log in "$OUT"/test-*.log "$OUT"/chunking*.log "$OUT"/step-*.log; do
    [ -e "$log" ] || continue
    printf '\n%s\n' "${log##*/}"
    tail -n 14 "$log"
  done
} >>"$OUT/summary.txt"
cat "$OUT/summary.txt"
exit "$FAILED"
