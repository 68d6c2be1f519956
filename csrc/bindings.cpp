// Where tensors become pointers: schemas, checks that name the argument, and the split of work over threads.
// Nothing here computes. Errors are ValueError, like those of the plain PyTorch forms.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>

#include "cpu/kernels.h"

namespace dcdit {
namespace {

using at::Tensor;

Type type_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Type::f32;
    case at::kBFloat16: return Type::bf16;
    case at::kHalf: return Type::f16;
    default: break;
  }
  TORCH_CHECK_VALUE(false, op, ": ", name, " is ", t.scalar_type(), ", expected float32, bfloat16 or float16");
}

void check_dtype(const char* op, const char* name, const Tensor& t, at::ScalarType want) {
  TORCH_CHECK_VALUE(t.scalar_type() == want, op, ": ", name, " is ", t.scalar_type(), ", expected ", want);
}

void check_shape(const char* op, const char* name, const Tensor& t, at::IntArrayRef want) {
  TORCH_CHECK_VALUE(t.sizes() == want, op, ": ", name, " has shape ", t.sizes(), ", expected ", want);
}

// A map that points outside its target would read foreign memory: every entry is looked at.
void check_map(const char* op, const char* name, const Tensor& map, int64_t rows) {
  check_dtype(op, name, map, at::kInt);
  const int32_t* m = map.const_data_ptr<int32_t>();
  int32_t low = 0, high = -1;
  for (int64_t i = 0, n = map.numel(); i < n; ++i) {
    low = std::min(low, m[i]);
    high = std::max(high, m[i]);
  }
  TORCH_CHECK_VALUE(low >= -1 && high < rows, op, ": ", name, " points to row ", low < -1 ? low : high, " of ", rows);
}

// About this many elements are worth a thread.
constexpr int64_t kGrain = 16384;

int64_t grain(int64_t elements_per_unit) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_unit)); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> select(const Tensor& prob, const Tensor& tail_drop) {
  TORCH_CHECK_VALUE(prob.dim() == 2, "select: boundary_prob has shape ", prob.sizes(), ", expected (B, L)");
  const int64_t B = prob.size(0), L = prob.size(1);
  TORCH_CHECK_VALUE(L >= 2, "select: boundary_prob has L = ", L, ", but an image needs at least 2 tokens");
  TORCH_CHECK_VALUE(B * L < (int64_t(1) << 31), "select: boundary_prob has 2**31 places or more; split the batch");
  check_dtype("select", "boundary_prob", prob, at::kFloat);
  check_dtype("select", "tail_drop", tail_drop, at::kFloat);
  check_shape("select", "tail_drop", tail_drop, {B});
  const Tensor prob_ = prob.contiguous(), tail_drop_ = tail_drop.contiguous();
  const auto ints = prob.options().dtype(at::kInt), bools = prob.options().dtype(at::kBool);
  Tensor natural = at::empty({B, L}, bools), retained = at::empty({B, L}, bools);
  Tensor slot = at::empty({B * L}, ints), index = at::empty({B * L}, ints), cu_seqlens = at::empty({B + 1}, ints);

  const SelectParams p{prob_.const_data_ptr<float>(), tail_drop_.const_data_ptr<float>(), natural.mutable_data_ptr<bool>(),
                       retained.mutable_data_ptr<bool>(), slot.mutable_data_ptr<int32_t>(),
                       index.mutable_data_ptr<int32_t>(), cu_seqlens.mutable_data_ptr<int32_t>(), B, L};
  const Kernels& k = kernels();
  at::parallel_for(0, B, grain(L), [&](int64_t begin, int64_t end) { k.select_images(p, begin, end); });
  p.cu_seqlens[0] = 0;
  for (int64_t b = 0; b < B; ++b) p.cu_seqlens[b + 1] += p.cu_seqlens[b];
  at::parallel_for(0, B, grain(L), [&](int64_t begin, int64_t end) { k.select_pack(p, begin, end); });
  std::fill(p.index + p.cu_seqlens[B], p.index + B * L, -1);
  return {natural, retained, slot, index, cu_seqlens};
}

Tensor rows(const Tensor& x, const std::optional<Tensor>& pos, const Tensor& map, int64_t L, const char* op) {
  const int64_t D = x.size(-1), M = map.numel();
  Tensor out = at::empty({M, D}, x.options());
  const RowsParams p{x.const_data_ptr(), pos ? pos->const_data_ptr<float>() : nullptr, map.const_data_ptr<int32_t>(),
                     out.mutable_data_ptr(), type_of(op, "x", x), L, D};
  at::parallel_for(0, M, grain(D), [&](int64_t begin, int64_t end) { kernels().rows(p, begin, end); });
  return out;
}

Tensor gather_tokens(const Tensor& x, const std::optional<Tensor>& pos, const Tensor& index, const Tensor& slot) {
  TORCH_CHECK_VALUE(x.dim() == 3, "gather_tokens: x has shape ", x.sizes(), ", expected (B, L, D)");
  const int64_t B = x.size(0), L = x.size(1), D = x.size(2);
  TORCH_CHECK_VALUE(index.dim() == 1, "gather_tokens: index has shape ", index.sizes(), ", expected (T,)");
  check_shape("gather_tokens", "slot", slot, {B * L});
  check_dtype("gather_tokens", "slot", slot, at::kInt);
  const Tensor index_ = index.contiguous();
  check_map("gather_tokens", "index", index_, B * L);
  std::optional<Tensor> pos_;
  if (pos) {
    check_shape("gather_tokens", "pos", *pos, {L, D});
    check_dtype("gather_tokens", "pos", *pos, at::kFloat);
    pos_ = pos->contiguous();
  }
  return rows(x.contiguous(), pos_, index_, L, "gather_tokens");
}

Tensor gather_tokens_backward(const Tensor& grad, const Tensor& slot, int64_t B, int64_t L) {
  TORCH_CHECK_VALUE(grad.dim() == 2, "gather_tokens_backward: grad has shape ", grad.sizes(), ", expected (T, D)");
  check_shape("gather_tokens_backward", "slot", slot, {B * L});
  const Tensor slot_ = slot.contiguous();
  check_map("gather_tokens_backward", "slot", slot_, grad.size(0));
  return rows(grad.contiguous(), std::nullopt, slot_, L, "gather_tokens_backward").view({B, L, grad.size(1)});
}

Tensor nearest(const Tensor& slot, int64_t B, int64_t H, int64_t W) {
  TORCH_CHECK_VALUE(B >= 0 && H > 0 && W > 0, "nearest: B, H, W are ", B, ", ", H, ", ", W, ", expected positive numbers");
  check_shape("nearest", "slot", slot, {B * H * W});
  check_dtype("nearest", "slot", slot, at::kInt);
  const Tensor slot_ = slot.contiguous();
  Tensor out = at::empty({B, H * W}, slot.options());
  const NearestParams p{slot_.const_data_ptr<int32_t>(), out.mutable_data_ptr<int32_t>(), H, W};
  at::parallel_for(0, B, grain(H * W * H / 8), [&](int64_t begin, int64_t end) { kernels().nearest(p, begin, end); });
  return out;
}

}  // namespace
}  // namespace dcdit

TORCH_LIBRARY(dcdit, m) {
  m.def(
      "select(Tensor boundary_prob, Tensor tail_drop) -> "
      "(Tensor natural, Tensor retained, Tensor slot, Tensor index, Tensor cu_seqlens)");
  m.def("gather_tokens(Tensor x, Tensor? pos, Tensor index, Tensor slot) -> Tensor");
  m.def("gather_tokens_backward(Tensor grad, Tensor slot, SymInt B, SymInt L) -> Tensor");
  m.def("nearest(Tensor slot, SymInt B, SymInt H, SymInt W) -> Tensor");
}

TORCH_LIBRARY_IMPL(dcdit, CPU, m) {
  m.impl("select", &dcdit::select);
  m.impl("gather_tokens", &dcdit::gather_tokens);
  m.impl("gather_tokens_backward", &dcdit::gather_tokens_backward);
  m.impl("nearest", &dcdit::nearest);
}
