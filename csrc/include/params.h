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

// What of a selection fits into `capacity` packed rows. As from select: the two forced tokens of each image are retained.
struct LimitParams {
  const float* prob;        // (B, L)
  const bool* retained_in;  // (B, L)
  bool* retained;           // (B, L)
  int32_t* slot;            // (B*L,)
  int32_t* index;           // (capacity,), -1 from T on
  int32_t* cu_seqlens;      // (B+1,)
  int32_t* overflow;        // one number: how many tokens went
  int64_t B, L, capacity;   // capacity >= 2 B
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
  float* smooth;         // (T, D) smoothed rows, GPU only: written forward if not null, read backward

  const float* grad;  // backward: (B, L, D)
  void* dh;           // backward: (T, D)
  float* dprob;       // backward: (B, L)
  // Backward, sums over one block's channels: (blocks, B*L) gradient times filled-in row; (blocks, T) blend and
  // neighbour terms of dp; (blocks, T) smoothed row times cell gradient.
  float *part_gate, *part_weight, *part_cell;
  int64_t T;

  int64_t blocks() const { return (D + kBlock - 1) / kBlock; }
};

// x (1 + scale) + shift and its backward. Vectors of an image are float32, `*_stride` apart; rows from cu_seqlens[B] on
// belong to no image.
struct ModulateParams {
  static constexpr int64_t kBlock = 256;  // channels that one unit of the backward takes

  const void* x;  // (T, D)
  const float *shift, *scale;
  int64_t shift_stride, scale_stride;
  const int32_t* cu_seqlens;  // (B+1,)
  void* out;                  // forward: (T, D)
  const void* grad;           // backward: (T, D), of out's type
  void* dx;                   // backward: (T, D)
  float *dshift, *dscale;     // backward: (B, D)
  Type x_type, out_type;
  int64_t B, T, D;
};

// x + gate y and its backward (that of x is the gradient itself).
struct AddGatedParams {
  static constexpr int64_t kBlock = 256;

  const void* x;  // forward: (T, D)
  const float* gate;
  int64_t gate_stride;
  const void* y;              // (T, D)
  const int32_t* cu_seqlens;  // (B+1,)
  void* out;                  // forward: (T, D), of x's type
  const void* grad;           // backward: (T, D), of x's type
  void* dy;                   // backward: (T, D)
  float* dgate;               // backward: (B, D)
  Type x_type, y_type;
  int64_t B, T, D;
};

}  // namespace dcdit
