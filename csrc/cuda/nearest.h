// Exact nearest retained token of every place of one image, by one block: the nearest in its own row first, then the best
// of the rows. Ties go to the lowest row-major place.
#pragma once
#include "gpu.h"

namespace dcdit {
namespace gpu {

constexpr int kLongestSide = 32767;  // of a grid: squared distances stay within 31 bits

// `side` (L,): the column of the nearest retained token in the place's row, or all ones. Small is any unsigned type that
// holds L - 1 and one more. Ends without a barrier.
template <int kThreads, class Small>
__device__ void nearest_in_row(const int* slot, int H, int W, Small* side) {
  for (int i = threadIdx.x; i < H * W; i += kThreads) {
    const int c = i % W;
    const int* row = slot + (i - c);
    int found = -1;
    for (int d = 0; found < 0 && (d <= c || c + d < W); ++d) {
      if (c + d < W && row[c + d] >= 0) found = c + d;
      if (d <= c && row[c - d] >= 0) found = c - d;  // the left one of a tie is the lower place
    }
    side[i] = Small(found);
  }
}

// Place of the nearest retained token, -1 where the image has none.
template <class Small>
__device__ int nearest_of_rows(const Small* side, int H, int W, int i) {
  const int r = i / W, c = i % W;
  const Small none = Small(-1);
  uint64_t best = ~uint64_t(0);
  for (int d = 0; d <= r || r + d < H; ++d) {
    if (uint64_t(d) * d > best >> 32) break;  // an equal distance may still be a lower place
    for (int sign = -1; sign <= 1; sign += 2) {
      const int s = r + sign * d;
      if (s < 0 || s >= H) continue;
      const Small at = side[s * W + c];
      if (at == none) continue;
      const uint32_t dc = uint32_t(int(at) - c);
      const uint64_t key = uint64_t(uint32_t(d) * d + dc * dc) << 32 | uint32_t(s * W + int(at));
      best = least(best, key);
    }
  }
  return best == ~uint64_t(0) ? -1 : int(uint32_t(best));
}

}  // namespace gpu
}  // namespace dcdit
