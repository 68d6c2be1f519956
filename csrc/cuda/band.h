// Gaussian smoothing of token rows, separably, by one block for one band of grid rows and one slice of channels: first
// down the columns over the tokens that are there, into shared memory, then along the grid rows at the tokens only.
// A group of 8 threads works on one column or one token, four channels each; sums run in a fixed order.
#pragma once
#include "plan.h"

namespace dcdit {
namespace gpu {

constexpr int kThreads = 256;
constexpr int kGroups = kThreads / kLanes;
constexpr int kSlice = 4 * kLanes;  // channels
constexpr int kBatch = 64;          // tokens whose rows a block holds at once when it fills the grid

inline int64_t slices(const DechunkParams& p) { return ceil_div(p.D, kSlice); }

// Shared memory of a band of `rows` grid rows, in this order: sums between the two passes, `batch` rows, the two tables.
inline size_t band_shared(int64_t W, int radius, int rows, int batch) {
  return size_t(rows * W + batch) * kLanes * sizeof(Four) + size_t((2 * radius + rows) * rows + radius + 1) * sizeof(float);
}

// Grid rows that a block works on together: more of them read each token less often, but take shared memory, of which
// several blocks should find some on a multiprocessor. 0 where even one row does not fit.
inline int band_rows(int64_t W, int radius, int batch) {
  const size_t limit = shared_limit();
  if (band_shared(W, radius, 8, batch) <= least(limit, size_t(80) << 10)) return 8;
  if (band_shared(W, radius, 4, batch) <= least(limit, size_t(112) << 10)) return 4;
  return band_shared(W, radius, 1, batch) <= limit ? 1 : 0;
}

#if defined(DCDIT_EMULATE) || defined(__CUDACC__) || defined(__HIPCC__) || defined(__HIP__)
// Where a block and a thread stand.
template <int kRows>
struct Band {
  int64_t b;
  int H, W, D, radius;
  int slice, r0;         // its slice, its first grid row
  int group, lane;       // of the thread
  int c0, n;             // the thread's first channel, and how many are left from there
  Range tokens;          // packed rows in the band
  Range image;           // packed rows of the image
  Four *between, *held;  // (kRows, W, kLanes), (batch, kLanes)
  float *fan, *half;     // (2 radius + kRows, kRows) weights by row of the token; (radius + 1) weights by distance

  __device__ Band(const DechunkParams& p, const Plan& plan, int batch, unsigned char* shared) {
    const unsigned slices = unsigned((p.D + kSlice - 1) / kSlice), bands = unsigned((p.H + kRows - 1) / kRows);
    slice = int(blockIdx.x % slices);
    const unsigned rest = blockIdx.x / slices;
    r0 = int(rest % bands) * kRows;
    b = rest / bands;
    H = int(p.H), W = int(p.W), D = int(p.D), radius = plan.radius;
    group = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
    c0 = slice * kSlice + lane * 4, n = D - c0;
    const int* start = plan.row_start + b * (H + 1);
    tokens = Range{start[r0], start[least(r0 + kRows, H)]};
    image = image_rows(p, b);
    between = reinterpret_cast<Four*>(shared);
    held = between + kRows * W * kLanes;
    fan = reinterpret_cast<float*>(held + batch * kLanes);
    half = fan + (2 * radius + kRows) * kRows;
  }

  __device__ int64_t at(int row) const { return int64_t(row) * D + c0; }
};

template <int kRows>
__device__ void fill_tables(const Band<kRows>& band, double sigma) {
  const float scale = float(-0.5 / (sigma * sigma));
  const int R = band.radius;
  for (int k = threadIdx.x; k < (2 * R + kRows) * kRows; k += kThreads) {
    const int away = k / kRows - R - k % kRows;
    band.fan[k] = away < -R || away > R ? 0.0f : expf(scale * float(away * away));
  }
  fill_window<kThreads>(sigma, R, band.half);
}

// between[q][c] = sum over the tokens of column c of their weight in grid row r0 + q times fetch(entry).
template <int kRows, class Fetch>
__device__ __forceinline__ void sum_columns(const Band<kRows>& band, const Plan& plan, Fetch fetch) {
  const int R = band.radius, low = most(band.r0 - R, 0), high = least(band.r0 + kRows + R, band.H);
  const int* start = plan.column_start + band.b * (band.H + 1) * band.W;
  for (int c = band.group; c < band.W; c += kGroups) {
    Four sum[kRows];
#pragma unroll
    for (int q = 0; q < kRows; ++q) sum[q] = Four::zero();
    const int end = start[high * band.W + c];
#pragma unroll 2
    for (int k = start[low * band.W + c]; k < end; ++k) {
      const Entry entry = plan.column[k];
      const Four x = fetch(entry);
      const float* weight = band.fan + (entry.row - band.r0 + R) * kRows;
#pragma unroll
      for (int q = 0; q < kRows; ++q) sum[q].add(weight[q], x);
    }
#pragma unroll
    for (int q = 0; q < kRows; ++q) band.between[(q * band.W + c) * kLanes + band.lane] = sum[q];
  }
}

// The sum along the grid row at the place of a token.
template <int kRows>
__device__ __forceinline__ Four sum_row(const Band<kRows>& band, int place) {
  const int R = band.radius, W = band.W, c = place % W;
  const int q = least(most(place / W - band.r0, 0), kRows - 1);
  const Four* line = band.between + (q * W + c) * kLanes + band.lane;
  Four sum = line[0];  // weight 1
  const int left = least(R, c), right = least(R, W - 1 - c);
#pragma unroll 4
  for (int k = 1; k <= left; ++k) sum.add(band.half[k], line[-k * kLanes]);
#pragma unroll 4
  for (int k = 1; k <= right; ++k) sum.add(band.half[k], line[k * kLanes]);
  return sum;
}
#endif

// Blocks of a band kernel, or null and the reason.
inline const char* band_launch(const DechunkParams& p, int radius, int batch, int* rows, int64_t* blocks) {
  static thread_local char message[200];
  *rows = band_rows(p.W, radius, batch);
  if (*rows == 0) {
    std::snprintf(message, sizeof message,
                  "dechunk: a grid %lld wide needs %zu bytes of shared memory a block, the device has %zu; "
                  "use ops_backend=torch for it",
                  static_cast<long long>(p.W), band_shared(p.W, radius, 1, batch), shared_limit());
    return message;
  }
  *blocks = slices(p) * ceil_div(p.H, *rows) * p.B;
  const bool fits = p.B * (p.H + 1) * p.W < (int64_t(1) << 31) && p.T < (int64_t(1) << 31) &&
                    *blocks < (int64_t(1) << 31) && p.H * p.W <= (int64_t(1) << 30) &&
                    most(p.H, p.W) <= 32767 && p.D < (int64_t(1) << 30);
  return fits ? nullptr : "dechunk: the GPU kernels take fewer than 2**31 places and blocks; split the batch";
}

}  // namespace gpu
}  // namespace dcdit
