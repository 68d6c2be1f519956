// De-chunk backward in gather form: no float atomics, every sum in a fixed order, so the same bits on every run.
// With g the gradient on the grid, a_i = sum of g over the places that token i fills; u_j = sum_i K_ij (1 - p_i) / d_i a_i;
// dh_j = p_j (a_j + u_j). Of dp: the gate at each place, and at a token (h - s).a + h.u less the window's sum of
// (1 - p) / d s.a. Two kernels over the data, two small ones over the sums.
#include "band.h"
#include "launch.h"

namespace dcdit {
namespace gpu {
namespace {

constexpr int kFlight = 4;
constexpr int kLargeCell = 64;  // places from which a cell is work for a whole block
constexpr int kSumThreads = 512;

// Of one token: (h - s).a, the blend's part of dp, and s.a.
struct alignas(8) Terms {
  float blend, cell;
};

struct Sums {
  float* a;          // (T, D) gradient of each token's cell
  float* gate;       // (slices, B*L) of one slice: gradient times the row filled in
  Terms* terms;      // (slices, T) of one slice
  float* weight;     // (slices, T) of one slice: h.u
  float* per_token;  // (T,) blend and weight over all slices
};

struct Backward {
  DechunkParams p;
  Plan plan;
  Sums sums;
};

// One group's part of a cell: places begin, begin + step, ..., each with its gate term.
template <bool kWide>
__device__ __forceinline__ Four collect(const Backward& args, const Four& row, int begin, int end, int step, int64_t c0,
                                        int n, int lane, float* gate) {
  const F32* grad = reinterpret_cast<const F32*>(args.p.grad) + c0;
  Four sum = Four::zero();
  for (int e = begin; e < end; e += step * kFlight) {
    int place[kFlight];
    Four g[kFlight];
#pragma unroll
    for (int f = 0; f < kFlight; ++f) place[f] = args.plan.filled[least(e + f * step, end - 1)].place;
#pragma unroll
    for (int f = 0; f < kFlight; ++f) g[f] = read<kWide, true>(grad + place[f] * args.p.D, n);
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      if (e + f * step >= end) break;
      sum.add(g[f]);
      const float dot = group_sum(g[f].dot(row));
      if (lane == 0) gate[place[f]] = dot;
    }
  }
  return sum;
}

// The slice of one token that a thread holds.
template <class Number, bool kWide>
struct Token {
  int64_t at;
  Four h, s, row;  // the row that fills its places: p h + (1 - p) s

  __device__ Token(const Backward& args, int t, int64_t c0, int n) : at(t * args.p.D + c0) {
    h = read<kWide>(static_cast<const Number*>(args.p.h) + at, n);
    s = read<kWide>(reinterpret_cast<const F32*>(args.p.smooth) + at, n);
    row = h.times(args.plan.p[t]);
    row.add(1.0f - args.plan.p[t], s);
  }
  __device__ void finish(const Backward& args, const Four& a, int n, int lane, Terms* terms) const {
    write<kWide>(a, n, reinterpret_cast<F32*>(args.sums.a) + at);
    const float h_a = group_sum(h.dot(a)), s_a = group_sum(s.dot(a));
    if (lane == 0) *terms = Terms{h_a - s_a, s_a};
  }
};

// a, the gate's terms and the blend's: a group a token, or the whole block together where a token fills many places.
template <class Number, bool kWide>
__global__ void DCDIT_BOUNDS(kThreads, 4) collect_cells(Backward args) {
  __shared__ Four parts[kThreads];
  __shared__ int any_large;
  const DechunkParams& p = args.p;
  const unsigned slices = unsigned((p.D + kSlice - 1) / kSlice), slice = blockIdx.x % slices;
  const int group = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  const int64_t c0 = int64_t(slice) * kSlice + lane * 4;
  const int n = int(p.D - c0), t0 = int(blockIdx.x / slices) * kGroups;
  float* gate = args.sums.gate + slice * (p.B * p.H * p.W);
  Terms* terms = args.sums.terms + slice * p.T;

  if (threadIdx.x == 0) any_large = 0;
  __syncthreads();
  const int t = t0 + group;
  if (t < p.T) {
    const Range cell = args.plan.cell[t];
    if (cell.end - cell.begin > kLargeCell) {
      any_large = 1;
    } else if (cell.end > cell.begin) {  // not padding
      const Token<Number, kWide> token(args, t, c0, n);
      const Four a = collect<kWide>(args, token.row, cell.begin, cell.end, 1, c0, n, lane, gate);
      token.finish(args, a, n, lane, terms + t);
    }
  }
  __syncthreads();
  if (!any_large) return;
  for (int k = t0; k < least<int64_t>(t0 + kGroups, p.T); ++k) {
    const Range large = args.plan.cell[k];
    if (large.end - large.begin <= kLargeCell) continue;
    const Token<Number, kWide> token(args, k, c0, n);
    parts[threadIdx.x] = collect<kWide>(args, token.row, large.begin + group, large.end, kGroups, c0, n, lane, gate);
    __syncthreads();
    if (group == 0) {
      Four a = parts[lane];
#pragma unroll 2
      for (int j = 1; j < kGroups; ++j) a.add(parts[j * kLanes + lane]);
      token.finish(args, a, n, lane, terms + k);
    }
    __syncthreads();
  }
}

// u, dh and the weights' terms.
template <class Number, int kRows, bool kWide>
__global__ void DCDIT_BOUNDS(kThreads, 3) spread_band(Backward args) {
  DCDIT_DYNAMIC_SHARED(shared);
  const DechunkParams& p = args.p;
  const Band<kRows> band(p, args.plan, 0, shared);
  Number* dh = static_cast<Number*>(p.dh);
  if (band.b == p.B - 1 && band.r0 == 0)  // padding of a fixed capacity
    for (int t = band.image.end + band.group; t < p.T; t += kGroups) write<kWide>(Four::zero(), band.n, dh + band.at(t));
  if (band.tokens.begin == band.tokens.end) return;

  const F32* a = reinterpret_cast<const F32*>(args.sums.a);
  const Number* h = static_cast<const Number*>(p.h);
  float* weight = args.sums.weight + band.slice * p.T;
  fill_tables(band, p.sigma);
  __syncthreads();
  sum_columns(band, args.plan,
              [&](const Entry& e) { return read<kWide>(a + band.at(e.token), band.n).times(e.factor); });
  __syncthreads();
  for (int t = band.tokens.begin + band.group; t < band.tokens.end; t += kGroups) {
    const Four a_t = read<kWide>(a + band.at(t), band.n);
    const Four h_t = read<kWide>(h + band.at(t), band.n);
    Four u = sum_row(band, place_of(p, band.b, t));
    const float h_u = group_sum(h_t.dot(u));
    u.add(a_t);
    write<kWide>(u.times(args.plan.p[t]), band.n, dh + band.at(t));
    if (band.lane == 0) weight[t] = h_u;
  }
}

// Over the slices, in their order: the gate of every place; at tokens also the other terms.
__global__ void __launch_bounds__(kSumThreads) sum_slices(Backward args) {
  const DechunkParams& p = args.p;
  const int L = int(p.H * p.W), places = int(p.B) * L;
  const unsigned at = blockIdx.x * kSumThreads + threadIdx.x;
  if (at >= unsigned(places)) return;
  const int i = int(at);
  const int slices = int((p.D + kSlice - 1) / kSlice);
  const Range image = image_rows(p, i / L);
  float gate = 0.0f;
  if (image.begin < image.end)
#pragma unroll 8
    for (int k = 0; k < slices; ++k) gate += args.sums.gate[int64_t(k) * places + i];
  p.dprob[i] = p.natural[i] ? gate : -gate;
  const int t = args.plan.slot[i];
  float cell = 0.0f;
  if (t >= 0) {
    float weight = 0.0f;
#pragma unroll 4
    for (int k = 0; k < slices; ++k) {
      const Terms term = args.sums.terms[k * p.T + t];
      weight += term.blend + args.sums.weight[k * p.T + t];
      cell += term.cell;
    }
    args.sums.per_token[t] = weight;
    cell *= (1.0f - args.plan.p[t]) / args.plan.norm[t];
  }
  args.plan.grid[i] = cell;
}

// The smoothing weights' part of dp, an image a block.
__global__ void __launch_bounds__(kSumThreads) finish_prob(Backward args) {
  DCDIT_DYNAMIC_SHARED(shared);
  float* weights = reinterpret_cast<float*>(shared);
  const DechunkParams& p = args.p;
  const Plan& plan = args.plan;
  const int64_t b = blockIdx.x;
  const int H = int(p.H), W = int(p.W), L = H * W;
  float* along = plan.along + b * L;
  fill_window<kSumThreads>(p.sigma, plan.radius, weights);
  __syncthreads();
  sum_down<kSumThreads>(plan.grid + b * L, H, W, weights, plan.radius, along);
  __syncthreads();
  const Range rows = image_rows(p, b);
  for (int t = rows.begin + int(threadIdx.x); t < rows.end; t += kSumThreads) {
    const int i = place_of(p, b, t);
    const float prob = p.prob[b * L + i];
    if (prob >= kClamp && prob <= 1.0f - kClamp)
      p.dprob[b * L + i] += args.sums.per_token[t] - sum_across(along, i, W, weights, plan.radius);
  }
  __syncthreads();
  if (threadIdx.x == 0) p.dprob[b * L] = p.dprob[b * L + L - 1] = 0.0f;  // forced: no gradient to their logits
}

Backward carve_backward(const DechunkParams& p, Carve& carve) {
  Backward args{p, carve_plan(p, carve), {}};
  args.sums.a = carve.take<float>(p.T * p.D);
  args.sums.gate = carve.take<float>(slices(p) * p.B * p.H * p.W);
  args.sums.terms = carve.take<Terms>(slices(p) * p.T);
  args.sums.weight = carve.take<float>(slices(p) * p.T);
  args.sums.per_token = carve.take<float>(p.T);
  return args;
}

template <class Number, int kRows>
void spread(const Backward& args, int64_t blocks, bool wide, Stream stream) {
  const size_t bytes = band_shared(args.p.W, args.plan.radius, kRows, 0);
  auto kernel = wide ? spread_band<Number, kRows, true> : spread_band<Number, kRows, false>;
  allow_shared(kernel, bytes);
  DCDIT_LAUNCH(kernel, dim3(blocks), dim3(kThreads), bytes, stream, args);
}

template <class Number>
void start(const Backward& args, int rows, int64_t blocks, bool wide, Stream stream) {
  const int64_t tiles = slices(args.p) * ceil_div(args.p.T, kGroups);
  auto kernel = wide ? collect_cells<Number, true> : collect_cells<Number, false>;
  DCDIT_LAUNCH(kernel, dim3(tiles), dim3(kThreads), 0, stream, args);
  switch (rows) {
    case 8: return spread<Number, 8>(args, blocks, wide, stream);
    case 4: return spread<Number, 4>(args, blocks, wide, stream);
    default: return spread<Number, 1>(args, blocks, wide, stream);
  }
}

}  // namespace

size_t dechunk_workspace(const DechunkParams& p, bool backward) {
  Carve carve(nullptr);
  if (backward)
    carve_backward(p, carve);
  else
    carve_plan(p, carve);
  return carve.used();
}

const char* dechunk_backward(const DechunkParams& p, void* workspace, void* stream_) {
  if (p.B == 0 || p.D == 0 || p.T == 0) return nullptr;
  const Stream stream = Stream(stream_);
  Carve carve(workspace);
  const Backward args = carve_backward(p, carve);
  int rows;
  int64_t blocks;
  if (const char* reason = band_launch(p, args.plan.radius, 0, &rows, &blocks)) return reason;
  const uintptr_t bits = reinterpret_cast<uintptr_t>(p.h) | reinterpret_cast<uintptr_t>(p.grad) |
                         reinterpret_cast<uintptr_t>(p.dh) | reinterpret_cast<uintptr_t>(p.smooth);
  const bool wide = p.D % 4 == 0 && bits % 16 == 0;
  launch_plan(p, args.plan, stream);
  switch (p.h_type) {
    case Type::f32: start<F32>(args, rows, blocks, wide, stream); break;
    case Type::bf16: start<BF16>(args, rows, blocks, wide, stream); break;
    case Type::f16: start<F16>(args, rows, blocks, wide, stream); break;
  }
  DCDIT_LAUNCH(sum_slices, dim3(ceil_div(p.B * p.H * p.W, kSumThreads)), dim3(kSumThreads), 0, stream, args);
  const size_t weights = size_t(args.plan.radius + 1) * sizeof(float);
  allow_shared(finish_prob, weights);
  DCDIT_LAUNCH(finish_prob, dim3(p.B), dim3(kSumThreads), weights, stream, args);
  return launched("dechunk_backward");
}

}  // namespace gpu
}  // namespace dcdit
