// The CPU kernels as a table of function pointers, one table per instruction set. A kernel works on a half-open range of
// independent units, so that the caller can split the range over threads as it likes.
#pragma once
#include <cstdint>

#include "../include/params.h"
#include "plan.h"

namespace dcdit {

struct Kernels {
  const char* isa;
  // Images [begin, end): masks, slot counted from 0 inside each image, and the image's count in cu_seqlens[b + 1].
  void (*select_images)(const SelectParams&, int64_t begin, int64_t end);
  // Images [begin, end), after cu_seqlens was summed up: slot made global, index written.
  void (*select_pack)(const SelectParams&, int64_t begin, int64_t end);
  // Output rows [begin, end).
  void (*rows)(const RowsParams&, int64_t begin, int64_t end);
  // Images [begin, end).
  void (*nearest)(const NearestParams&, int64_t begin, int64_t end);

  // De-chunk: first a plan of each image, then blocks of channels in any order, and after the backward ones the sums
  // over blocks, image by image. `scratch` holds dechunk_scratch(L, W) floats.
  void (*dechunk_plan)(const DechunkParams&, const Window&, ImagePlan*, int64_t begin, int64_t end);
  void (*dechunk_forward)(const DechunkParams&, const Window&, const ImagePlan&, int64_t b, int64_t block, float* scratch);
  void (*dechunk_backward)(const DechunkParams&, const Window&, const ImagePlan&, int64_t b, int64_t block, float* scratch);
  void (*dechunk_sums)(const DechunkParams&, const Window&, const ImagePlan*, int64_t begin, int64_t end);
  int64_t (*dechunk_scratch)(int64_t most_tokens, int64_t W);

  void (*limit)(const LimitParams&);
  // adaLN. Forward: rows [begin, end). Backward: a block of kBlock channels of one image.
  void (*modulate)(const ModulateParams&, int64_t begin, int64_t end);
  void (*modulate_backward)(const ModulateParams&, int64_t b, int64_t block);
  void (*add_gated)(const AddGatedParams&, int64_t begin, int64_t end);
  void (*add_gated_backward)(const AddGatedParams&, int64_t b, int64_t block);
};

// The best table this processor can run; the environment variable DCDIT_ISA (base, avx2, avx512) can ask for less.
const Kernels& kernels();

namespace base {
extern const Kernels table;
}
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define DCDIT_MULTI_ISA 1
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

}  // namespace dcdit
