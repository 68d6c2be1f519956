// One plain struct per op: what the bindings hand to a kernel. No torch, no ownership; all pointers are dense and
// row-major. Shape letters as in model/ops: B images, L = H*W places, D channels, T retained tokens.
#pragma once
#include <cstdint>

namespace dcdit {

// Element type of the tensors that may be stored narrow. Arithmetic is float32 throughout.
enum class Type : int { f32, bf16, f16 };

struct SelectParams {
  const float* prob;       // (B, L)
  const float* tail_drop;  // (B,)
  bool* natural;           // (B, L)
  bool* retained;          // (B, L)
  int32_t* slot;           // (B*L,) packed row, -1 where dropped
  int32_t* index;          // (B*L,) place of each packed row, -1 from T on
  int32_t* cu_seqlens;     // (B+1,)
  int64_t B, L;
};

// rows of x through a map, plus the position row of each place: gather, and with x = gradient and map = slot its
// backward.
struct RowsParams {
  const void* x;       // (N, D)
  const float* pos;    // (L, D) or null
  const int32_t* map;  // (M,) row of x, or -1 for a row of zeros
  void* out;           // (M, D)
  Type type;
  int64_t L, D;
};

struct NearestParams {
  const int32_t* slot;  // (B*L,)
  int32_t* nearest;     // (B, L) packed row
  int64_t H, W;
};

}  // namespace dcdit
