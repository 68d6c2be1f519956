// Nearest retained token of every place (DC-DiT v2 §3.4, plug-back).
#include "nearest.h"

#include "host.h"
#include "launch.h"

namespace dcdit {
namespace gpu {
namespace {

constexpr int kThreads = 512;

// Small grids keep the row pass in shared memory, others in `workspace`, (B, L) int32.
bool fits_shared(const NearestParams& p) {
  return p.H * p.W < 65535 && p.H * p.W * int64_t(sizeof(uint16_t)) <= int64_t(kFreeShared);
}

template <class Small>
__global__ void __launch_bounds__(kThreads) nearest_images(NearestParams p, Small* workspace) {
  DCDIT_DYNAMIC_SHARED(shared);
  const int H = int(p.H), W = int(p.W), L = H * W;
  const int64_t b = blockIdx.x;
  Small* side = workspace ? workspace + b * L : reinterpret_cast<Small*>(shared);
  const int* slot = p.slot + b * L;
  nearest_in_row<kThreads>(slot, H, W, side);
  __syncthreads();
  for (int i = threadIdx.x; i < L; i += kThreads) {
    const int place = nearest_of_rows(side, H, W, i);
    p.nearest[b * L + i] = place < 0 ? -1 : slot[place];
  }
}

}  // namespace

size_t nearest_workspace(const NearestParams& p, int64_t B) {
  return fits_shared(p) ? 0 : size_t(B * p.H * p.W) * sizeof(uint32_t);
}

const char* nearest(const NearestParams& p, int64_t B, void* workspace, void* stream) {
  if (B == 0) return nullptr;
  if (most(p.H, p.W) > kLongestSide || p.H * p.W * B >= (int64_t(1) << 31))
    return "nearest: the GPU kernel takes grids of up to 32767 places a side and fewer than 2**31 places in all";
  if (fits_shared(p)) {
    const size_t bytes = size_t(p.H * p.W) * sizeof(uint16_t);
    auto kernel = nearest_images<uint16_t>;
    DCDIT_LAUNCH(kernel, dim3(B), dim3(kThreads), bytes, Stream(stream), p, static_cast<uint16_t*>(nullptr));
  } else {
    auto kernel = nearest_images<uint32_t>;
    DCDIT_LAUNCH(kernel, dim3(B), dim3(kThreads), 0, Stream(stream), p, static_cast<uint32_t*>(workspace));
  }
  return launched("nearest");
}

}  // namespace gpu
}  // namespace dcdit
