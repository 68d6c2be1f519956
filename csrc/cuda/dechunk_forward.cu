// De-chunk forward (DC-DiT v2 §3.4): smoothing, blend, plug-back and residual in one pass over the residual.
#include "band.h"
#include "launch.h"

namespace dcdit {
namespace gpu {
namespace {

constexpr int kFlight = 4;  // places that a group has under way at once

// Places filled[from .. to) get the held row of their token plus the residual; the first held row is token first_held's.
template <class Residual, bool kWide, int kRows>
__device__ void fill_places(const Band<kRows>& band, const DechunkParams& p, const Filled* filled, int from, int to,
                            int first_held) {
  const Residual* residual = static_cast<const Residual*>(p.residual);
  F32* out = reinterpret_cast<F32*>(p.out);
  for (int e = from + band.group; e < to; e += kGroups * kFlight) {
    Filled place[kFlight];
    Four x[kFlight];
#pragma unroll
    for (int f = 0; f < kFlight; ++f) place[f] = filled[least(e + f * kGroups, to - 1)];
#pragma unroll
    for (int f = 0; f < kFlight; ++f) x[f] = read<kWide, true>(residual + band.at(place[f].place), band.n);
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      if (e + f * kGroups >= to) break;
      if (place[f].token >= 0) x[f].add(band.held[(place[f].token - first_held) * kLanes + band.lane]);
      F32* to = out + band.at(place[f].place);
      if (!kWide)
        write<false>(x[f], band.n, to);
      else if (band.n > 0)
        store_once(x[f], to);
    }
  }
}

template <bool kWide, int kRows>
__device__ void fill_places(const Band<kRows>& band, const DechunkParams& p, const Filled* filled, int from, int to,
                            int first_held) {
  switch (p.residual_type) {
    case Type::f32: return fill_places<F32, kWide>(band, p, filled, from, to, first_held);
    case Type::bf16: return fill_places<BF16, kWide>(band, p, filled, from, to, first_held);
    case Type::f16: return fill_places<F16, kWide>(band, p, filled, from, to, first_held);
  }
}

template <class Number, int kRows, bool kWide>
__global__ void DCDIT_BOUNDS(kThreads, 3) forward_band(DechunkParams p, Plan plan) {
  DCDIT_DYNAMIC_SHARED(shared);
  const Band<kRows> band(p, plan, kBatch, shared);
  F32* smooth = reinterpret_cast<F32*>(p.smooth);
  if (smooth && band.b == p.B - 1 && band.r0 == 0)  // padding of a fixed capacity
    for (int t = band.image.end + band.group; t < p.T; t += kGroups)
      write<kWide>(Four::zero(), band.n, smooth + band.at(t));
  if (band.image.begin == band.image.end) {
    const int from = int(band.b) * band.H * band.W + band.r0 * band.W;
    fill_places<kWide>(band, p, plan.filled, from, from + least(kRows, band.H - band.r0) * band.W, 0);
  }
  if (band.tokens.begin == band.tokens.end) return;

  const Number* h = static_cast<const Number*>(p.h);
  fill_tables(band, p.sigma);
  __syncthreads();
  sum_columns(band, plan, [&](const Entry& e) { return read<kWide>(h + band.at(e.token), band.n).times(e.p); });
  __syncthreads();
  for (int t0 = band.tokens.begin; t0 < band.tokens.end; t0 += kBatch) {
    const int t1 = least(t0 + kBatch, band.tokens.end);
    for (int t = t0 + band.group; t < t1; t += kGroups) {
      Four row = read<kWide>(h + band.at(t), band.n);
      const float prob = plan.p[t];
      const Four s = sum_row(band, place_of(p, band.b, t)).times(1.0f / plan.norm[t]);
      if (smooth) write<kWide>(s, band.n, smooth + band.at(t));
      row = row.times(prob);
      row.add(1.0f - prob, s);
      band.held[(t - t0) * kLanes + band.lane] = row;
    }
    __syncthreads();
    fill_places<kWide>(band, p, plan.filled, plan.cell[t0].begin, plan.cell[t1 - 1].end, t0);
    __syncthreads();
  }
}

template <class Number, int kRows>
void start(const DechunkParams& p, const Plan& plan, int64_t blocks, bool wide, Stream stream) {
  const size_t bytes = band_shared(p.W, plan.radius, kRows, kBatch);
  auto kernel = wide ? forward_band<Number, kRows, true> : forward_band<Number, kRows, false>;
  allow_shared(kernel, bytes);
  DCDIT_LAUNCH(kernel, dim3(blocks), dim3(kThreads), bytes, stream, p, plan);
}

template <class Number>
void start(const DechunkParams& p, const Plan& plan, int rows, int64_t blocks, bool wide, Stream stream) {
  switch (rows) {
    case 8: return start<Number, 8>(p, plan, blocks, wide, stream);
    case 4: return start<Number, 4>(p, plan, blocks, wide, stream);
    default: return start<Number, 1>(p, plan, blocks, wide, stream);
  }
}

}  // namespace

const char* dechunk_forward(const DechunkParams& p, void* workspace, void* stream) {
  if (p.B == 0 || p.D == 0) return nullptr;
  Carve carve(workspace);
  const Plan plan = carve_plan(p, carve);
  int rows;
  int64_t blocks;
  if (const char* reason = band_launch(p, plan.radius, kBatch, &rows, &blocks)) return reason;
  const uintptr_t bits = reinterpret_cast<uintptr_t>(p.h) | reinterpret_cast<uintptr_t>(p.residual) |
                         reinterpret_cast<uintptr_t>(p.out) | reinterpret_cast<uintptr_t>(p.smooth);
  const bool wide = p.D % 4 == 0 && bits % 16 == 0;
  launch_plan(p, plan, Stream(stream));
  switch (p.h_type) {
    case Type::f32: start<F32>(p, plan, rows, blocks, wide, Stream(stream)); break;
    case Type::bf16: start<BF16>(p, plan, rows, blocks, wide, Stream(stream)); break;
    case Type::f16: start<F16>(p, plan, rows, blocks, wide, Stream(stream)); break;
  }
  return launched("dechunk");
}

}  // namespace gpu
}  // namespace dcdit
