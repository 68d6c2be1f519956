#!/usr/bin/env bash
# One node's part of a run: torchrun with an environment that fits, signals that reach the trainer, and its exit code.
#
#   launch/torchrun.sh --config configs/recipe/imagenet256_b.yaml run.dir=runs/b                   # all GPUs of this node
#   NNODES=4 HEAD=node01 launch/torchrun.sh --config ... run.dir=...                               # the same on each node
#
# NPROC       processes on this node (default: its GPUs; 1 without any)
# NNODES      nodes (default 1); HEAD a name or address of one of them that the others reach; PORT (default 29400) free there
# NODE_RANK   0 on HEAD, 1, 2 ... on the others; may be left out where HEAD's own name says which node it is
# RUN_ID      any word that this run's nodes share and no other run's (default: dcdit)
# SCRIPT      what to run (default trainer/train.py); PYTHON the interpreter (default .venv's, else the one on the path)
# DCDIT_ENV   file to source for the network and GPU settings (default: launch/env/{nvidia,amd}.sh by the GPUs found)
#
# SIGTERM, SIGINT and SIGUSR1 make the run save and stop; a second SIGINT kills it. Exit status: that of the trainer
# (0 complete, 2 bad input, 75 stopped after saving), 1 if it died. torchrun alone turns every failure into 1, and gives
# the trainer 30 seconds after a SIGTERM before it kills: too few for a large save, so it is not told.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

fail() {
    echo "error: $*" >&2
    exit 2
}

gpus() {
    local visible=${CUDA_VISIBLE_DEVICES:-${HIP_VISIBLE_DEVICES:-${ROCR_VISIBLE_DEVICES:-}}}
    if [ -n "$visible" ]; then
        tr ',' '\n' <<<"$visible" | grep -c .
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        nvidia-smi -L | grep -c '^GPU'
    elif [ -e /dev/kfd ]; then # nodes of the topology that are not CPUs have a gpu_id
        cat /sys/class/kfd/kfd/topology/nodes/*/gpu_id 2>/dev/null | grep -cv '^0$'
    else
        echo 0
    fi
}

# The address of this node on the network that leads to HEAD: host names that do not resolve, or that resolve to another
# network, are the most frequent reason for a rendezvous that never ends.
own_address() {
    "$PYTHON" - "$1" <<'PY'
import socket, sys
family, kind, protocol, _, address = socket.getaddrinfo(sys.argv[1], 9, type=socket.SOCK_DGRAM)[0]
with socket.socket(family, kind, protocol) as probe:
    probe.connect(address)  # of a datagram socket: sends nothing, picks the route
    print(probe.getsockname()[0])
PY
}

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
command -v "$PYTHON" >/dev/null || fail "PYTHON: $PYTHON is not there; run make setup or set PYTHON"
NNODES=${NNODES:-1}
found=$(gpus)
# A node that has lost a GPU must not join as a smaller one, nor as one of CPUs: status 1, so that it is tried again.
chosen=${NPROC:-}${CUDA_VISIBLE_DEVICES:-}${HIP_VISIBLE_DEVICES:-}${ROCR_VISIBLE_DEVICES:-}
if [ -z "$chosen" ] && [[ ${SLURM_GPUS_ON_NODE:-} =~ ^[0-9]+$ ]] && [ "$found" -lt "$SLURM_GPUS_ON_NODE" ]; then
    echo "error: $(uname -n) shows $found of the $SLURM_GPUS_ON_NODE GPUs that Slurm gave this job; drain the node" >&2
    exit 1
fi
NPROC=${NPROC:-$((found > 0 ? found : 1))}
for number in NNODES NPROC; do
    [[ ${!number} =~ ^[1-9][0-9]*$ ]] || fail "$number: ${!number} is not a number of at least 1"
done

site=${DCDIT_ENV:-}
if [ -z "$site" ] && [ "$found" -gt 0 ]; then
    site=launch/env/nvidia.sh
    if [ -e /dev/kfd ]; then site=launch/env/amd.sh; fi
fi
if [ -n "$site" ]; then
    # shellcheck source=/dev/null
    source "$site" || fail "DCDIT_ENV: $site did not run"
fi

# torchrun sets one thread per process where nothing is said. Loader workers and the few CPU ops of a GPU run want
# little more; on CPUs the processes share the cores.
cores=$(nproc)
threads=$((cores / NPROC))
if [ "$found" -gt 0 ] && [ "$threads" -gt 8 ]; then threads=8; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export PYTHONUNBUFFERED=1

options=(--nproc-per-node="$NPROC" --max-restarts=0)
if [ "$NNODES" -gt 1 ]; then
    [ -n "${HEAD:-}" ] || fail "HEAD: with NNODES=$NNODES give the name or address of the first node"
    address=$(own_address "$HEAD") || fail "HEAD: $HEAD cannot be reached from $(uname -n)"
    conf="join_timeout=${JOIN_TIMEOUT:-900},read_timeout=120"
    if [ -n "${NODE_RANK:-}" ]; then conf+=",is_host=$((NODE_RANK == 0))"; fi
    options+=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29400}"
        --rdzv-id="${RUN_ID:-dcdit}" --rdzv-conf="$conf")
    case $address in
        127.* | ::1) ;; # HEAD's own name, which many systems send to the loopback: no use to the others
        *) options+=(--local-addr="$address") ;;
    esac
else
    options+=(--standalone)
fi

own_status=
if [ -z "${DCDIT_STATUS_FILE:-}" ]; then
    own_status=$(mktemp) || exit 1
    export DCDIT_STATUS_FILE=$own_status
fi

agent='' stopping=0 workers=()
find_workers() { # torchrun's own children, and nobody else's: loader processes and loggers must not get the signal
    workers=()
    if [ -r "/proc/$agent/task/$agent/children" ]; then
        read -r -a workers <"/proc/$agent/task/$agent/children"
    else
        mapfile -t workers < <(pgrep -P "$agent")
    fi
}
# shellcheck disable=SC2317  # called by the traps
stop() {
    if [ "$1" = INT ] && [ "$stopping" = INT ]; then # an impatient Ctrl-C Ctrl-C
        find_workers
        kill -KILL "$agent" "${workers[@]}" 2>/dev/null
    fi
    stopping=$1
}
trap 'stop TERM' TERM
trap 'stop INT' INT
trap 'stop USR1' USR1

# The agent ignores what we pass on (PET_...: an option of newer torchruns; an older one still answers a SIGTERM or SIGINT
# that it gets itself). Ignored signals are inherited, so a worker that is not ready yet misses
# them instead of dying: they are repeated until the run has ended.
(
    trap '' TERM INT USR1
    export PET_SIGNALS_TO_HANDLE=SIGHUP
    exec "$PYTHON" -m torch.distributed.run "${options[@]}" "${SCRIPT:-trainer/train.py}" "$@"
) &
agent=$!
status=0
while kill -0 "$agent" 2>/dev/null; do
    if [ "$stopping" != 0 ]; then
        find_workers
        if [ ${#workers[@]} -gt 0 ]; then kill -USR1 "${workers[@]}"; fi 2>/dev/null
        (trap '' TERM INT USR1 && exec sleep 1) # Slurm signals all of the task's processes: this one stays
    else
        wait "$agent"
        status=$?
    fi
done
if [ "$stopping" != 0 ]; then
    wait "$agent"
    status=$?
fi

if [ -n "$own_status" ]; then # nobody above us reads it: answer ourselves
    for code in 2 75; do
        if grep -qx "end $code" "$own_status"; then status=$code; fi
    done
    rm -f "$own_status"
fi
exit "$status"
