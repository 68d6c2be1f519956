// Rows through a map, with an optional position row added in float32: packing, and its backward with map = slot. Bound by
// memory: 16 bytes a thread and several of them in flight.
#include "host.h"
#include "launch.h"

namespace dcdit {
namespace gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kFlight = 4;  // pieces that a thread has under way at once

// What one thread moves at a time: kPer elements of a row.
template <class Number, int kPer>
struct alignas(kPer * sizeof(Number)) Piece {
  Number v[kPer];
};

template <class Number, int kPer>
__device__ __forceinline__ void add_position(Piece<Number, kPer>& piece, const float* pos) {
  constexpr int kStep = kPer % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int k = 0; k < kPer; k += kStep) {
    const Piece<F32, kStep> by = *reinterpret_cast<const Piece<F32, kStep>*>(pos + k);
#pragma unroll
    for (int j = 0; j < kStep; ++j) narrow(widen(piece.v[k + j]) + widen(by.v[j]), piece.v[k + j]);
  }
}

// 2^log_team threads take a row together, so that its map entry is looked up once and nothing is divided a piece.
template <class Number, int kPer>
__global__ void __launch_bounds__(kThreads) copy_rows(RowsParams p, int64_t M, int64_t source_rows, int log_team) {
  using P = Piece<Number, kPer>;
  const int pieces = int(p.D / kPer), team = 1 << log_team, lane = int(threadIdx.x) & (team - 1);
  const int64_t m = int64_t(blockIdx.x) * (kThreads >> log_team) + (int(threadIdx.x) >> log_team);
  if (m >= M) return;
  const int row = p.map[m];
  const bool there = row >= 0 && row < source_rows;
  const P* x = static_cast<const P*>(p.x) + int64_t(there ? row : 0) * pieces;
  const float* pos = p.pos && there ? p.pos + int64_t(unsigned(row) % unsigned(p.L)) * p.D : nullptr;
  P* out = static_cast<P*>(p.out) + m * pieces;
  for (int base = lane; base < pieces; base += team * kFlight) {
    P piece[kFlight];
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      const int at = base + f * team;
#pragma unroll
      for (int k = 0; k < kPer; ++k) piece[f].v[k].bits = 0;
      if (there && at < pieces) piece[f] = x[at];
    }
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      const int at = base + f * team;
      if (at >= pieces) break;
      if (pos) add_position<Number, kPer>(piece[f], pos + int64_t(at) * kPer);
      out[at] = piece[f];
    }
  }
}

template <class Number, int kPer>
void start(const RowsParams& p, int64_t M, int64_t source_rows, void* stream) {
  int log_team = 3;
  while (log_team < 8 && (int64_t(kFlight) << log_team) < p.D / kPer) ++log_team;
  auto kernel = copy_rows<Number, kPer>;
  const int64_t blocks = ceil_div(M, kThreads >> log_team);
  DCDIT_LAUNCH(kernel, dim3(blocks), dim3(kThreads), 0, Stream(stream), p, M, source_rows, log_team);
}

template <class Number>
void start(const RowsParams& p, int64_t M, int64_t source_rows, void* stream) {
  constexpr int kPer = 16 / sizeof(Number);
  const uintptr_t bits = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.out) |
                         reinterpret_cast<uintptr_t>(p.pos);
  if (p.D % kPer == 0 && bits % 16 == 0)
    start<Number, kPer>(p, M, source_rows, stream);
  else
    start<Number, 1>(p, M, source_rows, stream);
}

}  // namespace

const char* rows(const RowsParams& p, int64_t rows, int64_t source_rows, void* stream) {
  if (rows == 0 || p.D == 0) return nullptr;
  if (p.D >= (int64_t(1) << 30) || rows >= (int64_t(1) << 31) || p.L >= (int64_t(1) << 31))
    return "gather_tokens: the GPU kernel takes fewer than 2**30 channels and 2**31 rows; split the batch";
  switch (p.type) {
    case Type::f32: start<F32>(p, rows, source_rows, stream); break;
    case Type::bf16: start<BF16>(p, rows, source_rows, stream); break;
    case Type::f16: start<F16>(p, rows, source_rows, stream); break;
  }
  return launched("gather_tokens");
}

}  // namespace gpu
}  // namespace dcdit
