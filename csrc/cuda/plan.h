// What de-chunking needs to know of each image before it touches a channel: which token fills each place and the
// reverse, the tokens of each column, and the sums of smoothing weights. Made on the device, in one workspace.
#pragma once
#include <cmath>

#include "gpu.h"
#include "host.h"

namespace dcdit {
namespace gpu {

constexpr float kClamp = 1e-4f, kEps = 1e-8f;

// One place, and the packed row that fills it.
struct alignas(8) Filled {
  int place, token;
};
struct alignas(8) Range {
  int begin, end;
};
// A retained token as the sums down a column read it. `factor` is (1 - p) over the sum of its weights.
struct alignas(16) Entry {
  int token, row;
  float p, factor;
};

struct Plan {
  int* slot;          // (B, L) packed row, or -1
  Filled* filled;     // (B, L) grouped by token, by place within a token
  Range* cell;        // (T,) a token's part of `filled`
  Entry* column;      // (T,) of each image by column, then by row
  int* column_start;  // (B, H + 1, W) first entry of the column at or below the row
  int* row_start;     // (B, H + 1) first packed row at or below the grid row
  float *p, *norm;    // (T,) clamped probability; sum of weights + 1e-8
  float *grid, *along;  // (B, L) one number a place, and its sums down the columns
  uint32_t* spare;      // (B, 3, L) for grids too large for shared memory, else null
  int radius;           // of the window
};

// Small grids keep three numbers a place in shared memory.
inline bool plan_fits_shared(const DechunkParams& p, int radius) {
  constexpr int64_t kScans = 4096;
  const int64_t bytes = 3 * p.H * p.W * int64_t(sizeof(uint16_t)) + 4 * (radius + 1) + kScans;
  return p.H * p.W < 65535 && bytes <= int64_t(kFreeShared);
}

// Square window beyond which the Gaussian is left out. A smoothed row errs by at most 2 (1 - p) / p times the weight left
// out, relative to max |h|; p > 0.5 on retained tokens, and a factor of two more is no matter.
inline int window_radius(double sigma, int64_t reach) {
  constexpr double kTolerance = 1e-6;
  const auto gauss = [&](int64_t k) { return std::exp(-0.5 * double(k * k) / (sigma * sigma)); };
  double all = 1.0, inside = 1.0;
  for (int64_t k = 1; k <= 40 * sigma + 1; ++k) all += 2 * gauss(k);
  int radius = 0;
  while (radius < reach && 2 * (all * all - inside * inside) > kTolerance) inside += 2 * gauss(++radius);
  return radius;
}

inline Plan carve_plan(const DechunkParams& p, Carve& carve) {
  const int64_t L = p.H * p.W;
  Plan plan{};
  plan.slot = carve.take<int>(p.B * L);
  plan.filled = carve.take<Filled>(p.B * L);
  plan.cell = carve.take<Range>(p.T);
  plan.column = carve.take<Entry>(p.T);
  plan.column_start = carve.take<int>(p.B * (p.H + 1) * p.W);
  plan.row_start = carve.take<int>(p.B * (p.H + 1));
  plan.p = carve.take<float>(p.T);
  plan.norm = carve.take<float>(p.T);
  plan.grid = carve.take<float>(p.B * L);
  plan.along = carve.take<float>(p.B * L);
  plan.radius = window_radius(p.sigma, most(p.H, p.W) - 1);
  plan.spare = plan_fits_shared(p, plan.radius) ? nullptr : carve.take<uint32_t>(3 * p.B * L);
  return plan;
}

void launch_plan(const DechunkParams& p, const Plan& plan, Stream stream);

#if defined(DCDIT_EMULATE) || defined(__CUDACC__) || defined(__HIPCC__) || defined(__HIP__)
// Packed rows of image b. What is read from memory is kept inside h.
__device__ __forceinline__ Range image_rows(const DechunkParams& p, int64_t b) {
  const int T = int(p.T), begin = least(most(p.cu_seqlens[b], 0), T);
  return Range{begin, least(most(p.cu_seqlens[b + 1], begin), T)};
}

// Place of packed row t inside image b.
__device__ __forceinline__ int place_of(const DechunkParams& p, int64_t b, int t) {
  const int64_t L = p.H * p.W, place = p.index[t] - b * L;
  return int(least(most<int64_t>(place, 0), L - 1));
}

// Half of the window's weights, distances 0 .. radius, by all threads. Ends without a barrier.
template <int kThreads>
__device__ void fill_window(double sigma, int radius, float* weights) {
  const float scale = float(-0.5 / (sigma * sigma));
  for (int k = threadIdx.x; k <= radius; k += kThreads) weights[k] = expf(scale * float(k * k));
}

// One number a place, `grid`, summed over the window down the columns, into `along`. Needs a barrier before it.
template <int kThreads>
__device__ void sum_down(const float* grid, int H, int W, const float* weights, int radius, float* along) {
  for (int i = threadIdx.x; i < H * W; i += kThreads) {
    const int r = i / W, low = most(-radius, -r), high = least(radius, H - 1 - r);
    float sum = 0.0f;
#pragma unroll 4
    for (int k = low; k <= high; ++k) sum += weights[k < 0 ? -k : k] * grid[i + k * W];
    along[i] = sum;
  }
}

__device__ __forceinline__ float sum_across(const float* along, int i, int W, const float* weights, int radius) {
  const int c = i % W, low = most(-radius, -c), high = least(radius, W - 1 - c);
  float sum = 0.0f;
#pragma unroll 4
  for (int k = low; k <= high; ++k) sum += weights[k < 0 ? -k : k] * along[i + k];
  return sum;
}
#endif

}  // namespace gpu
}  // namespace dcdit
