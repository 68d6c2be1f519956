// The GPU forms of the schemas in bindings.cpp: tensors become pointers, memory is taken from torch's allocator, kernels
// go to the current stream. Nothing here reads the device: T is the rows of `index`, whatever cu_seqlens holds, so maps
// are not looked at as on the CPU (csrc/cuda/launch.h says what the kernels make of wrong ones).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>

#include "cuda/launch.h"
#include "include/checks.h"

namespace dcdit {
namespace {

// Where an op runs: its tensors must share one device, whose current stream takes the kernels.
class Place {
 public:
  using Named = std::initializer_list<std::pair<const char*, const Tensor*>>;

  Place(const char* op, const Named& tensors) : device_(shared_device(op, tensors)), guard_(device_) {}
  void* stream() const { return c10::cuda::getCurrentCUDAStream(device_.index()).stream(); }
  Tensor workspace(size_t bytes) const {
    return at::empty({int64_t(bytes)}, at::TensorOptions().dtype(at::kByte).device(device_));
  }

 private:
  // Before the guard, which takes no other device than a GPU.
  static at::Device shared_device(const char* op, const Named& tensors) {
    const at::Device device = tensors.begin()->second->device();
    for (const auto& [name, tensor] : tensors)
      TORCH_CHECK_VALUE(tensor->device() == device, op, ": ", name, " is on ", tensor->device(), " but ",
                        tensors.begin()->first, " is on ", device);
    return device;
  }

  at::Device device_;
  c10::cuda::CUDAGuard guard_;
};

void need(const char* problem) { TORCH_CHECK_VALUE(problem == nullptr, problem); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> select(const Tensor& prob, const Tensor& tail_drop) {
  const Place place("select", {{"boundary_prob", &prob}, {"tail_drop", &tail_drop}});
  check_select(prob, tail_drop);
  const int64_t B = prob.size(0), L = prob.size(1);
  const Tensor prob_ = prob.contiguous(), tail_drop_ = tail_drop.contiguous();
  const auto ints = prob.options().dtype(at::kInt), bools = prob.options().dtype(at::kBool);
  Tensor natural = at::empty({B, L}, bools), retained = at::empty({B, L}, bools);
  Tensor slot = at::empty({B * L}, ints), index = at::empty({B * L}, ints), cu_seqlens = at::empty({B + 1}, ints);
  if (B == 0) cu_seqlens.zero_();
  const SelectParams p{prob_.const_data_ptr<float>(), tail_drop_.const_data_ptr<float>(), natural.mutable_data_ptr<bool>(),
                       retained.mutable_data_ptr<bool>(), slot.mutable_data_ptr<int32_t>(),
                       index.mutable_data_ptr<int32_t>(), cu_seqlens.mutable_data_ptr<int32_t>(), B, L};
  const Tensor workspace = place.workspace(gpu::select_workspace(p));
  need(gpu::select(p, workspace.data_ptr(), place.stream()));
  return {natural, retained, slot, index, cu_seqlens};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> limit(const Tensor& prob, const Tensor& retained, int64_t capacity) {
  const char* op = "limit";
  const Place place(op, {{"boundary_prob", &prob}, {"retained", &retained}});
  check_limit(prob, retained, capacity);
  const int64_t B = prob.size(0), L = prob.size(1);
  const Tensor prob_ = prob.contiguous(), retained_ = retained.contiguous();
  const auto ints = prob.options().dtype(at::kInt);
  Tensor out = at::empty({B, L}, retained.options()), slot = at::empty({B * L}, ints), index = at::empty({capacity}, ints);
  Tensor cu_seqlens = at::empty({B + 1}, ints), overflow = at::empty({}, ints);
  if (B == 0) cu_seqlens.zero_(), overflow.zero_();
  const LimitParams p{prob_.const_data_ptr<float>(), retained_.const_data_ptr<bool>(), out.mutable_data_ptr<bool>(),
                      slot.mutable_data_ptr<int32_t>(), index.mutable_data_ptr<int32_t>(),
                      cu_seqlens.mutable_data_ptr<int32_t>(), overflow.mutable_data_ptr<int32_t>(), B, L, capacity};
  const Tensor workspace = place.workspace(gpu::limit_workspace(p));
  need(gpu::limit(p, workspace.data_ptr(), place.stream()));
  return {out, slot, index, cu_seqlens, overflow};
}

Tensor copy_rows(const Place& place, const char* op, const Tensor& x, const std::optional<Tensor>& pos, const Tensor& map,
                 int64_t L) {
  const int64_t D = x.size(-1), M = map.numel(), source_rows = D > 0 ? x.numel() / D : 0;
  Tensor out = at::empty({M, D}, x.options());
  const RowsParams p{x.const_data_ptr(), pos ? pos->const_data_ptr<float>() : nullptr, map.const_data_ptr<int32_t>(),
                     out.mutable_data_ptr(), type_of(op, "x", x), L, D};
  need(gpu::rows(p, M, source_rows, place.stream()));
  return out;
}

Tensor gather_tokens(const Tensor& x, const std::optional<Tensor>& pos, const Tensor& index, const Tensor& slot) {
  const char* op = "gather_tokens";
  const Place place(op, {{"x", &x}, {"index", &index}, {"slot", &slot}, {"pos", pos ? &*pos : &x}});
  check_gather(x, pos, index, slot);
  const std::optional<Tensor> pos_ = pos ? std::optional(pos->contiguous()) : std::nullopt;
  return copy_rows(place, op, x.contiguous(), pos_, index.contiguous(), x.size(1));
}

Tensor gather_tokens_backward(const Tensor& grad, const Tensor& slot, int64_t B, int64_t L) {
  const char* op = "gather_tokens_backward";
  const Place place(op, {{"grad", &grad}, {"slot", &slot}});
  check_gather_backward(grad, slot, B, L);
  return copy_rows(place, op, grad.contiguous(), std::nullopt, slot.contiguous(), L).view({B, L, grad.size(1)});
}

Tensor nearest(const Tensor& slot, int64_t B, int64_t H, int64_t W) {
  const Place place("nearest", {{"slot", &slot}});
  check_nearest(slot, B, H, W);
  const Tensor slot_ = slot.contiguous();
  Tensor out = at::empty({B, H * W}, slot.options());
  const NearestParams p{slot_.const_data_ptr<int32_t>(), out.mutable_data_ptr<int32_t>(), H, W};
  const Tensor workspace = place.workspace(gpu::nearest_workspace(p, B));
  need(gpu::nearest(p, B, workspace.data_ptr(), place.stream()));
  return out;
}

std::tuple<Tensor, Tensor> dechunk(const Tensor& h, const Tensor& prob, const Tensor& natural, const Tensor& index,
                                   const Tensor& cu_seqlens, const Tensor& residual, int64_t H, int64_t W, double sigma,
                                   bool keep) {
  const char* op = "dechunk";
  const Place place(op, {{"h", &h}, {"boundary_prob", &prob}, {"natural", &natural}, {"index", &index},
                         {"cu_seqlens", &cu_seqlens}, {"residual", &residual}});
  DechunkInputs d(op, h, prob, natural, index, cu_seqlens, H, W, sigma);
  check_shape(op, "residual", residual, {d.p.B, H * W, d.p.D});
  const Tensor residual_ = residual.contiguous();
  Tensor out = at::empty({d.p.B, H * W, d.p.D}, h.options().dtype(at::kFloat));
  Tensor smooth = at::empty({keep ? d.p.T : 0, d.p.D}, out.options());
  d.p.residual = residual_.const_data_ptr();
  d.p.residual_type = type_of(op, "residual", residual_);
  d.p.out = out.mutable_data_ptr<float>();
  d.p.smooth = keep ? smooth.mutable_data_ptr<float>() : nullptr;
  const Tensor workspace = place.workspace(gpu::dechunk_workspace(d.p, false));
  need(gpu::dechunk_forward(d.p, workspace.data_ptr(), place.stream()));
  return {out, smooth};
}

std::tuple<Tensor, Tensor> dechunk_backward(const Tensor& grad, const Tensor& h, const Tensor& prob, const Tensor& natural,
                                            const Tensor& index, const Tensor& cu_seqlens, const Tensor& smooth, int64_t H,
                                            int64_t W, double sigma) {
  const char* op = "dechunk_backward";
  const Place place(op, {{"h", &h}, {"grad", &grad}, {"boundary_prob", &prob}, {"natural", &natural}, {"index", &index},
                         {"cu_seqlens", &cu_seqlens}, {"smooth", &smooth}});
  DechunkInputs d(op, h, prob, natural, index, cu_seqlens, H, W, sigma);
  check_shape(op, "grad", grad, {d.p.B, H * W, d.p.D});
  check_dtype(op, "grad", grad, at::kFloat);
  check_shape(op, "smooth", smooth, h.sizes());
  check_dtype(op, "smooth", smooth, at::kFloat);
  const Tensor grad_ = grad.contiguous(), smooth_ = smooth.contiguous();
  Tensor dh = at::empty(d.h.sizes(), d.h.options()), dprob = at::empty(d.prob.sizes(), d.prob.options());
  if (d.p.D == 0 || d.p.T == 0) dprob.zero_();
  d.p.grad = grad_.const_data_ptr<float>();
  d.p.smooth = const_cast<float*>(smooth_.const_data_ptr<float>());  // only read backward
  d.p.dh = dh.mutable_data_ptr();
  d.p.dprob = dprob.mutable_data_ptr<float>();
  const Tensor workspace = place.workspace(gpu::dechunk_workspace(d.p, true));
  need(gpu::dechunk_backward(d.p, workspace.data_ptr(), place.stream()));
  return {dh, dprob};
}

}  // namespace
}  // namespace dcdit

TORCH_LIBRARY_IMPL(dcdit, CUDA, m) {
  m.impl("select", &dcdit::select);
  m.impl("limit", &dcdit::limit);
  m.impl("gather_tokens", &dcdit::gather_tokens);
  m.impl("gather_tokens_backward", &dcdit::gather_tokens_backward);
  m.impl("nearest", &dcdit::nearest);
  m.impl("dechunk", &dcdit::dechunk);
  m.impl("dechunk_backward", &dcdit::dechunk_backward);
}
