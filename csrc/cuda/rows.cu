// Rows through a map, with an optional position row added in float32: packing, and its backward with map = slot. Bound by
// memory: 16 bytes a thread and several of them in flight.
#include "host.h"
#include "launch.h"

namespace dcdit {
namespace gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kFlight = 4;  // pieces that a thread has under way at once

// Piece `c` of a row: kPer elements, the whole piece inside the row.
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

// A block takes `rows_each` rows of the output, so that the division by the row's length is of small numbers.
template <class Number, int kPer>
__global__ void __launch_bounds__(kThreads) copy_rows(RowsParams p, int64_t M, int64_t source_rows, int rows_each) {
  using P = Piece<Number, kPer>;
  const int pieces = int(p.D / kPer);
  const int64_t m0 = int64_t(blockIdx.x) * rows_each;
  const int count = int(least<int64_t>(rows_each, M - m0)) * pieces;
  const P* x = static_cast<const P*>(p.x);
  P* out = static_cast<P*>(p.out) + m0 * pieces;
  for (int base = threadIdx.x; base < count; base += kThreads * kFlight) {
    P piece[kFlight];
    int64_t place[kFlight];
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      const int at = base + f * kThreads;
      const int64_t from = at < count ? p.map[m0 + at / pieces] : -1;
      place[f] = from < source_rows ? from : -1;
#pragma unroll
      for (int k = 0; k < kPer; ++k) piece[f].v[k].bits = 0;
      if (place[f] >= 0) piece[f] = x[place[f] * pieces + at % pieces];
    }
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      const int at = base + f * kThreads;
      if (at >= count) break;
      if (p.pos && place[f] >= 0)
        add_position<Number, kPer>(piece[f], p.pos + (place[f] % p.L) * p.D + (at % pieces) * kPer);
      out[at] = piece[f];
    }
  }
}

template <class Number, int kPer>
void start(const RowsParams& p, int64_t M, int64_t source_rows, void* stream) {
  const int64_t pieces = p.D / kPer;
  const int each = int(most<int64_t>(1, ceil_div(2 * kThreads * kFlight, pieces)));
  auto kernel = copy_rows<Number, kPer>;
  DCDIT_LAUNCH(kernel, dim3(ceil_div(M, each)), dim3(kThreads), 0, Stream(stream), p, M, source_rows, each);
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
  if (p.D >= (int64_t(1) << 24)) return "gather_tokens: a row of 2**24 channels or more is beyond the GPU kernel";
  switch (p.type) {
    case Type::f32: start<F32>(p, rows, source_rows, stream); break;
    case Type::bf16: start<BF16>(p, rows, source_rows, stream); break;
    case Type::f16: start<F16>(p, rows, source_rows, stream); break;
  }
  return launched("gather_tokens");
}

}  // namespace gpu
}  // namespace dcdit
