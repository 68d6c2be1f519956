# shellcheck shell=bash
# Sourced by launch/torchrun.sh on nodes with AMD GPUs. RCCL answers to the NCCL_* names and, like it, finds links and
# cards by itself: set only what it cannot know. Values from outside win.

# Warnings only; INFO prints which network was chosen.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# MI300: RCCL's kernels use scratch memory, and the runtime takes it back from idle queues and hands it out again at the
# next collective, which stalls it. Keep it (a few hundred MB).
export HSA_NO_SCRATCH_RECLAIM=${HSA_NO_SCRATCH_RECLAIM:-1}

# MIOpen (only the VAE's convolutions use it) keeps what it tuned in database files under the home folder. On a network
# file system many ranks lock each other out of them ("database is locked", or minutes at the first convolution): take
# a folder of the node's own, one per user and job.
miopen=${TMPDIR:-/tmp}/miopen-$(id -u)-${SLURM_JOB_ID:-0}
export MIOPEN_USER_DB_PATH=${MIOPEN_USER_DB_PATH:-$miopen}
export MIOPEN_CUSTOM_CACHE_DIR=${MIOPEN_CUSTOM_CACHE_DIR:-$miopen/cache}
mkdir -p "$MIOPEN_USER_DB_PATH" "$MIOPEN_CUSTOM_CACHE_DIR"
unset miopen

# Interfaces, as in env/nvidia.sh. On Slingshot (hsn0..3) RCCL also needs the aws-ofi-rccl plug-in on LD_LIBRARY_PATH.
# export NCCL_SOCKET_IFNAME=hsn0,hsn1,hsn2,hsn3
# export GLOO_SOCKET_IFNAME=hsn0
# Cards on PCIe without XGMI links, where `dcdit doctor` and rocm-smi agree that peers can reach each other:
# export HSA_FORCE_FINE_GRAIN_PCIE=1

# Left alone, and why:
# PYTORCH_HIP_ALLOC_CONF    expandable_segments helps ragged batches (env/nvidia.sh), but only newer ROCm builds of torch
#                           know it and the others warn; try it where memory runs out with much of it reserved and unused
# HIP_VISIBLE_DEVICES       Slurm or the container sets it or ROCR_VISIBLE_DEVICES. Both set together are applied one
#                           after the other: the second counts from the first's zero
# HSA_OVERRIDE_GFX_VERSION  makes ROCm take one GPU for another: only for cards it has no build for, wrong kernels elsewhere
# GPU_MAX_HW_QUEUES         the default leaves a queue for each stream that FSDP uses; fewer serialises them
# MIOPEN_FIND_MODE          the default tunes what it does not know; FAST skips that and may run slow kernels for ever
# NCCL_MIN_NCHANNELS        helped early MI300X releases; newer RCCL chooses by itself
