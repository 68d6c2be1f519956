# shellcheck shell=bash
# Sourced by launch/torchrun.sh on nodes with NVIDIA GPUs. NCCL finds links, network cards and algorithms by itself, and
# what is forced here would still be forced on the next cluster: set only what it cannot know. Values from outside win.

# Every step allocates other sizes (ragged batches), which splits the allocator's blocks for good; segments that grow
# keep the reserved memory near the used. (Newer torch calls it PYTORCH_ALLOC_CONF and still reads this name.)
if [ -z "${PYTORCH_ALLOC_CONF:-}" ]; then
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
fi

# Warnings only. INFO prints which network and which rings were chosen: the first thing to try when it is slow.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# The interface for the first contact between nodes (NCCL's bootstrap; gloo's flags and checkpoints). Both take what the
# host name resolves to or the first that is up, which is wrong where that is docker0 or a management network. Set them
# once for your cluster in a file of your own (DCDIT_ENV=/path/site.sh, which may source this one):
# export NCCL_SOCKET_IFNAME=eno,enp        # prefixes; ^docker,lo excludes; =eth0 is exact
# export GLOO_SOCKET_IFNAME=eno1           # gloo knows exact names only
# InfiniBand or RoCE cards, where some of a node's are for storage (`ibstat` lists them):
# export NCCL_IB_HCA=mlx5_0,mlx5_1
# RoCE, where NCCL is older than 2.21 and picks another address: the index of RoCE v2 in the card's table (`show_gids`):
# export NCCL_IB_GID_INDEX=3
# To prove that the cards are the problem, and never to keep: sockets instead of InfiniBand, several times slower.
# export NCCL_IB_DISABLE=1

# Left alone, and why:
# TORCH_FR_*, TORCH_NCCL_DUMP_ON_TIMEOUT   the trainer turns the flight recorder on itself, in run.dir
# TORCH_NCCL_ASYNC_ERROR_HANDLING  torch's default (3) already ends the process when a collective fails or times out
# CUDA_DEVICE_MAX_CONNECTIONS      1 keeps the order of launch that tensor parallelism wants; FSDP does not need it
# NCCL_ALGO, NCCL_PROTO, NCCL_NTHREADS   NCCL's own choice by size and topology is hard to beat and easy to break
