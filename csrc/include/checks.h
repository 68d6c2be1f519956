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

}  // namespace dcdit
