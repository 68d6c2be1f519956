// Checks that the CPU and GPU bindings share: shapes and types, which need no look at the data. Errors are ValueError,
// like those of the plain PyTorch forms, and name the argument.
#pragma once
#include <ATen/core/Tensor.h>

#include "params.h"

namespace dcdit {

using at::Tensor;

inline Type type_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Type::f32;
    case at::kBFloat16: return Type::bf16;
    case at::kHalf: return Type::f16;
    default: break;
  }
  TORCH_CHECK_VALUE(false, op, ": ", name, " is ", t.scalar_type(), ", expected float32, bfloat16 or float16");
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, at::ScalarType want) {
  TORCH_CHECK_VALUE(t.scalar_type() == want, op, ": ", name, " is ", t.scalar_type(), ", expected ", want);
}

inline void check_shape(const char* op, const char* name, const Tensor& t, at::IntArrayRef want) {
  TORCH_CHECK_VALUE(t.sizes() == want, op, ": ", name, " has shape ", t.sizes(), ", expected ", want);
}

inline void check_limit(const Tensor& prob, const Tensor& retained, int64_t capacity) {
  const char* op = "limit";
  TORCH_CHECK_VALUE(prob.dim() == 2 && prob.size(1) >= 2, op, ": boundary_prob has shape ", prob.sizes(),
                    ", expected (B, L) with L of at least 2");
  const int64_t B = prob.size(0), L = prob.size(1);
  TORCH_CHECK_VALUE(B * L < (int64_t(1) << 31), op, ": boundary_prob has 2**31 places or more; split the batch");
  TORCH_CHECK_VALUE(capacity >= 2 * B && capacity <= B * L, op, ": capacity is ", capacity, ", expected ", 2 * B, " to ",
                    B * L);
  check_dtype(op, "boundary_prob", prob, at::kFloat);
  check_dtype(op, "retained", retained, at::kBool);
  check_shape(op, "retained", retained, {B, L});
}

}  // namespace dcdit
