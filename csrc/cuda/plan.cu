// The plan of each image, one block each. All of it is integers but the sums of weights, which add up in a fixed order.
#include "plan.h"

#include "nearest.h"

namespace dcdit {
namespace gpu {
namespace {

constexpr int kThreads = 512;

// One image as the steps see it.
template <class Small>
struct Image {
  int64_t b;
  int H, W, L, radius;
  Range rows;             // its packed rows
  int *slot, *scratch;    // slot (L,); scratch 2 * kThreads, shared
  Small *side, *near, *cursor;  // (L,) each
  float *grid, *along, *weights;
};

template <class Small>
__device__ void place_tokens(const DechunkParams& p, const Plan& plan, const Image<Small>& im) {
  for (int i = threadIdx.x; i < im.L; i += kThreads) {
    im.slot[i] = -1;
    im.grid[i] = 0.0f;
  }
  __syncthreads();
  for (int t = im.rows.begin + int(threadIdx.x); t < im.rows.end; t += kThreads) {
    const int i = place_of(p, im.b, t);
    const float given = i == 0 || i == im.L - 1 ? 1.0f : p.prob[im.b * im.L + i];
    const float prob = least(most(given, kClamp), 1.0f - kClamp);
    im.slot[i] = t;
    im.grid[i] = plan.p[t] = prob;
  }
  __syncthreads();
}

// near: number within the image of the token that fills each place; side becomes the place's number within its run of
// equal tokens along the row. In one row, the places nearest to a token are one run.
template <class Small>
__device__ void find_cells(const Plan& plan, const Image<Small>& im) {
  nearest_in_row<kThreads>(im.slot, im.H, im.W, im.side);
  __syncthreads();
  for (int i = threadIdx.x; i < im.L; i += kThreads) {
    const int place = nearest_of_rows(im.side, im.H, im.W, i);
    im.near[i] = place < 0 ? Small(0) : Small(im.slot[place] - im.rows.begin);
  }
  for (int t = im.rows.begin + int(threadIdx.x); t < im.rows.end; t += kThreads) plan.cell[t].end = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < im.L; i += kThreads) {
    const Small token = im.near[i];
    const int c = i % im.W;
    int run = 0;
    while (run < c && im.near[i - run - 1] == token) ++run;
    im.side[i] = Small(run);
    const bool last = c == im.W - 1 || im.near[i + 1] != token;
    if (last && im.rows.begin < im.rows.end) atomicAdd(&plan.cell[im.rows.begin + token].end, run + 1);
  }
  __syncthreads();
}

// Counts become ranges, then the rows of the grid are walked in order, each run appending itself to its token's range.
template <class Small>
__device__ void list_cells(const Plan& plan, const Image<Small>& im) {
  const int M = im.rows.end - im.rows.begin, share = (M + kThreads - 1) / kThreads;
  const int begin = least(M, int(threadIdx.x) * share), end = least(M, begin + share);
  Range* cell = plan.cell + im.rows.begin;
  int mine = 0, all;
  for (int t = begin; t < end; ++t) mine += cell[t].end;
  int at = scan<kThreads>(mine, im.scratch, &all);
  const int base = int(im.b * im.L);
  for (int t = begin; t < end; ++t) {
    const int size = cell[t].end;
    im.cursor[t] = Small(at);
    cell[t] = Range{base + at, base + at + size};
    at += size;
  }
  __syncthreads();
  Filled* filled = plan.filled + base;
  if (M == 0) {  // `select` makes no such image: its places take the residual alone
    for (int i = threadIdx.x; i < im.L; i += kThreads) filled[i] = Filled{base + i, -1};
    return;
  }
  for (int r = 0; r < im.H; ++r) {
    for (int i = r * im.W + int(threadIdx.x); i < (r + 1) * im.W; i += kThreads)
      filled[im.cursor[im.near[i]] + im.side[i]] = Filled{base + i, im.rows.begin + int(im.near[i])};
    __syncthreads();
    for (int i = r * im.W + int(threadIdx.x); i < (r + 1) * im.W; i += kThreads)
      if (i == (r + 1) * im.W - 1 || im.near[i + 1] != im.near[i])
        im.cursor[im.near[i]] = Small(im.cursor[im.near[i]] + im.side[i] + 1);
    __syncthreads();
  }
}

template <class Small>
__device__ void sum_weights(const DechunkParams& p, const Plan& plan, const Image<Small>& im) {
  sum_down<kThreads>(im.grid, im.H, im.W, im.weights, im.radius, im.along);
  __syncthreads();
  for (int t = im.rows.begin + int(threadIdx.x); t < im.rows.end; t += kThreads)
    plan.norm[t] = sum_across(im.along, place_of(p, im.b, t), im.W, im.weights, im.radius) + kEps;
  __syncthreads();
}

// Tokens by column, a thread a column; and the first packed row of each grid row.
template <class Small>
__device__ void list_columns(const DechunkParams& p, const Plan& plan, const Image<Small>& im) {
  const int share = (im.W + kThreads - 1) / kThreads;
  const int begin = least(im.W, int(threadIdx.x) * share), end = least(im.W, begin + share);
  int mine = 0, all;
  for (int c = begin; c < end; ++c)
#pragma unroll 8
    for (int r = 0; r < im.H; ++r) mine += im.slot[r * im.W + c] >= 0;
  int at = im.rows.begin + scan<kThreads>(mine, im.scratch, &all);
  int* start = plan.column_start + im.b * (im.H + 1) * im.W;
  for (int c = begin; c < end; ++c) {
#pragma unroll 8
    for (int r = 0; r < im.H; ++r) {
      const int t = im.slot[r * im.W + c];
      start[r * im.W + c] = at;
      if (t >= 0) {
        const float prob = plan.p[t];
        plan.column[at++] = Entry{t, r, prob, (1.0f - prob) / plan.norm[t]};
      }
    }
    start[im.H * im.W + c] = at;
  }
  for (int r = threadIdx.x; r <= im.H; r += kThreads) {
    int low = im.rows.begin, high = im.rows.end;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (p.index[middle] < im.b * im.L + r * im.W)
        low = middle + 1;
      else
        high = middle;
    }
    plan.row_start[im.b * (im.H + 1) + r] = low;
  }
}

template <class Small>
__global__ void __launch_bounds__(kThreads) make_plan(DechunkParams p, Plan plan) {
  __shared__ int scratch[2 * kThreads];
  DCDIT_DYNAMIC_SHARED(shared);
  Image<Small> im;
  im.b = blockIdx.x;
  im.H = int(p.H), im.W = int(p.W), im.L = im.H * im.W, im.radius = plan.radius;
  im.rows = image_rows(p, im.b);
  im.scratch = scratch;
  im.slot = plan.slot + im.b * im.L;
  im.grid = plan.grid + im.b * im.L;
  im.along = plan.along + im.b * im.L;
  im.weights = reinterpret_cast<float*>(shared);
  Small* memory = plan.spare ? reinterpret_cast<Small*>(plan.spare) + 3 * im.b * im.L
                             : reinterpret_cast<Small*>(im.weights + plan.radius + 1);
  im.side = memory, im.near = memory + im.L, im.cursor = memory + 2 * im.L;
  fill_window<kThreads>(p.sigma, plan.radius, im.weights);
  place_tokens(p, plan, im);
  find_cells(plan, im);
  list_cells(plan, im);
  sum_weights(p, plan, im);
  list_columns(p, plan, im);
  // Padding rows of a fixed capacity fill no place.
  if (im.b == p.B - 1)
    for (int t = im.rows.end + int(threadIdx.x); t < p.T; t += kThreads) plan.cell[t] = Range{0, 0};
}

}  // namespace

void launch_plan(const DechunkParams& p, const Plan& plan, Stream stream) {
  const size_t weights = size_t(plan.radius + 1) * sizeof(float);
  if (plan.spare) {
    auto kernel = make_plan<uint32_t>;
    allow_shared(kernel, weights);
    DCDIT_LAUNCH(kernel, dim3(p.B), dim3(kThreads), weights, stream, p, plan);
  } else {
    auto kernel = make_plan<uint16_t>;
    DCDIT_LAUNCH(kernel, dim3(p.B), dim3(kThreads), weights + 3 * p.H * p.W * sizeof(uint16_t), stream, p, plan);
  }
}

}  // namespace gpu
}  // namespace dcdit
