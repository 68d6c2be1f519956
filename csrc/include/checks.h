// Checks that the CPU and GPU bindings share: shapes and types, which need no look at the data. Errors are ValueError,
// like those of the plain PyTorch forms, and name the argument.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

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

inline void check_select(const Tensor& prob, const Tensor& tail_drop) {
  const char* op = "select";
  TORCH_CHECK_VALUE(prob.dim() == 2, op, ": boundary_prob has shape ", prob.sizes(), ", expected (B, L)");
  const int64_t B = prob.size(0), L = prob.size(1);
  TORCH_CHECK_VALUE(L >= 2, op, ": boundary_prob has L = ", L, ", but an image needs at least 2 tokens");
  TORCH_CHECK_VALUE(B * L < (int64_t(1) << 31), op, ": boundary_prob has 2**31 places or more; split the batch");
  check_dtype(op, "boundary_prob", prob, at::kFloat);
  check_dtype(op, "tail_drop", tail_drop, at::kFloat);
  check_shape(op, "tail_drop", tail_drop, {B});
}

inline void check_gather(const Tensor& x, const std::optional<Tensor>& pos, const Tensor& index, const Tensor& slot) {
  const char* op = "gather_tokens";
  TORCH_CHECK_VALUE(x.dim() == 3, op, ": x has shape ", x.sizes(), ", expected (B, L, D)");
  const int64_t B = x.size(0), L = x.size(1), D = x.size(2);
  TORCH_CHECK_VALUE(index.dim() == 1, op, ": index has shape ", index.sizes(), ", expected (T,)");
  check_dtype(op, "index", index, at::kInt);
  check_shape(op, "slot", slot, {B * L});
  check_dtype(op, "slot", slot, at::kInt);
  if (!pos) return;
  check_shape(op, "pos", *pos, {L, D});
  check_dtype(op, "pos", *pos, at::kFloat);
}

inline void check_gather_backward(const Tensor& grad, const Tensor& slot, int64_t B, int64_t L) {
  const char* op = "gather_tokens_backward";
  TORCH_CHECK_VALUE(grad.dim() == 2, op, ": grad has shape ", grad.sizes(), ", expected (T, D)");
  check_shape(op, "slot", slot, {B * L});
  check_dtype(op, "slot", slot, at::kInt);
}

inline void check_nearest(const Tensor& slot, int64_t B, int64_t H, int64_t W) {
  const char* op = "nearest";
  TORCH_CHECK_VALUE(B >= 0 && H > 0 && W > 0, op, ": B, H, W are ", B, ", ", H, ", ", W, ", expected positive numbers");
  check_shape(op, "slot", slot, {B * H * W});
  check_dtype(op, "slot", slot, at::kInt);
}

// What forward and backward of de-chunking share: dense tensors that fit each other, and the parameters that point at them.
struct DechunkInputs {
  Tensor h, prob, natural, index, cu_seqlens;
  DechunkParams p{};

  DechunkInputs(const char* op, const Tensor& h_, const Tensor& prob_, const Tensor& natural_, const Tensor& index_,
                const Tensor& cu_seqlens_, int64_t H, int64_t W, double sigma)
      : h(h_.contiguous()), prob(prob_.contiguous()), natural(natural_.contiguous()), index(index_.contiguous()),
        cu_seqlens(cu_seqlens_.contiguous()) {
    TORCH_CHECK_VALUE(h.dim() == 2, op, ": h has shape ", h.sizes(), ", expected (T, D)");
    TORCH_CHECK_VALUE(prob.dim() == 2, op, ": boundary_prob has shape ", prob.sizes(), ", expected (B, L)");
    const int64_t B = prob.size(0), L = prob.size(1);
    TORCH_CHECK_VALUE(H > 0 && W > 0 && H * W == L, op, ": grid ", H, "x", W, " does not have L = ", L, " places");
    TORCH_CHECK_VALUE(sigma > 0, op, ": sigma is ", sigma, ", expected a positive number");
    check_dtype(op, "boundary_prob", prob, at::kFloat);
    check_dtype(op, "natural", natural, at::kBool);
    check_shape(op, "natural", natural, {B, L});
    check_dtype(op, "index", index, at::kInt);
    check_shape(op, "index", index, {h.size(0)});
    check_dtype(op, "cu_seqlens", cu_seqlens, at::kInt);
    check_shape(op, "cu_seqlens", cu_seqlens, {B + 1});
    p.h = h.const_data_ptr();
    p.h_type = p.residual_type = type_of(op, "h", h);
    p.prob = prob.const_data_ptr<float>();
    p.natural = natural.const_data_ptr<bool>();
    p.index = index.const_data_ptr<int32_t>();
    p.cu_seqlens = cu_seqlens.const_data_ptr<int32_t>();
    p.B = B, p.H = H, p.W = W, p.T = h.size(0), p.D = h.size(1), p.sigma = sigma;
  }
};

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
