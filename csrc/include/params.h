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

// De-chunk, forward and backward. Work is cut into images x blocks of kBlock channels.
struct DechunkParams {
  static constexpr int64_t kBlock = 128;

  const void* h;              // (T, D)
  const float* prob;          // (B, L)
  const bool* natural;        // (B, L)
  const int32_t* index;       // (T,)
  const int32_t* cu_seqlens;  // (B+1,)
  Type h_type, residual_type;
  int64_t B, H, W, D;
  double sigma;

  const void* residual;  // forward: (B, L, D)
  float* out;            // forward: (B, L, D)
  float* smooth;         // (T, D) smoothed rows: written forward if not null, read backward

  const float* grad;  // backward: (B, L, D)
  void* dh;           // backward: (T, D)
  float* dprob;       // backward: (B, L)
  // Backward, sums over one block's channels: (blocks, B*L) gradient times filled-in row; (blocks, T) blend and
  // neighbour terms of dp; (blocks, T) smoothed row times cell gradient.
  float *part_gate, *part_weight, *part_cell;
  int64_t T;

  int64_t blocks() const { return (D + kBlock - 1) / kBlock; }
};

}  // namespace dcdit
