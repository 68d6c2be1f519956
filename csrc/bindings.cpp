// Where tensors become pointers: schemas, checks that name the argument, and the split of work over threads.
// Nothing here computes. Errors are ValueError, like those of the plain PyTorch forms.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/kernels.h"
#include "include/checks.h"

namespace dcdit {
namespace {

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

// An uninitialised tensor. A large one often comes from the system as untouched pages, and taking them 4 KB at a time costs
// several times the arithmetic on them: ask for huge pages where the system leaves that to us.
Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor out = at::empty(sizes, options);
#ifdef __linux__
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out.data_ptr()), end = begin + out.nbytes();
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
  if (out.nbytes() >= 2 * kHuge) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> select(const Tensor& prob, const Tensor& tail_drop) {
  check_select(prob, tail_drop);
  const int64_t B = prob.size(0), L = prob.size(1);
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
  Tensor out = fresh({M, D}, x.options());
  const RowsParams p{x.const_data_ptr(), pos ? pos->const_data_ptr<float>() : nullptr, map.const_data_ptr<int32_t>(),
                     out.mutable_data_ptr(), type_of(op, "x", x), L, D};
  at::parallel_for(0, M, grain(D), [&](int64_t begin, int64_t end) { kernels().rows(p, begin, end); });
  return out;
}

Tensor gather_tokens(const Tensor& x, const std::optional<Tensor>& pos, const Tensor& index, const Tensor& slot) {
  check_gather(x, pos, index, slot);
  const int64_t B = x.size(0), L = x.size(1);
  const Tensor index_ = index.contiguous();
  check_map("gather_tokens", "index", index_, B * L);
  const std::optional<Tensor> pos_ = pos ? std::optional(pos->contiguous()) : std::nullopt;
  return rows(x.contiguous(), pos_, index_, L, "gather_tokens");
}

Tensor gather_tokens_backward(const Tensor& grad, const Tensor& slot, int64_t B, int64_t L) {
  check_gather_backward(grad, slot, B, L);
  const Tensor slot_ = slot.contiguous();
  check_map("gather_tokens_backward", "slot", slot_, grad.size(0));
  return rows(grad.contiguous(), std::nullopt, slot_, L, "gather_tokens_backward").view({B, L, grad.size(1)});
}

Tensor nearest(const Tensor& slot, int64_t B, int64_t H, int64_t W) {
  check_nearest(slot, B, H, W);
  const Tensor slot_ = slot.contiguous();
  Tensor out = at::empty({B, H * W}, slot.options());
  const NearestParams p{slot_.const_data_ptr<int32_t>(), out.mutable_data_ptr<int32_t>(), H, W};
  at::parallel_for(0, B, grain(H * W * H / 8), [&](int64_t begin, int64_t end) { kernels().nearest(p, begin, end); });
  return out;
}

// Square window beyond which the Gaussian is left out. A smoothed row errs by at most 2 (1 - p) / p times the weight
// left out, relative to max |h|; p > 0.5 on retained tokens, and a factor of two more is no matter.
Window make_window(double sigma, int64_t reach) {
  constexpr double kTolerance = 1e-6;
  const auto gauss = [&](int64_t k) { return std::exp(-0.5 * double(k * k) / (sigma * sigma)); };
  double all = 1.0;
  for (int64_t k = 1; k <= 40 * sigma + 1; ++k) all += 2 * gauss(k);
  Window w;
  double inside = 1.0;
  while (w.radius < reach && 2 * (all * all - inside * inside) > kTolerance) inside += 2 * gauss(++w.radius);
  w.table.assign(2 * (w.radius + Window::kPad) + 1, 0.0f);
  for (int64_t k = -w.radius; k <= w.radius; ++k) w.table[w.radius + Window::kPad + k] = float(gauss(k));
  return w;
}

// cu_seqlens and index decide which memory is touched: every entry is looked at.
void check_packing(const char* op, const Tensor& index, const Tensor& cu_seqlens, int64_t B, int64_t L) {
  const int32_t *cu = cu_seqlens.const_data_ptr<int32_t>(), *place = index.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(cu[0] == 0 && cu[B] <= index.numel(), op, ": cu_seqlens goes from ", cu[0], " to ", cu[B],
                    ", expected 0 to at most ", index.numel());
  for (int64_t b = 0; b < B; ++b) {
    TORCH_CHECK_VALUE(cu[b + 1] > cu[b], op, ": cu_seqlens gives image ", b, " no tokens");
    TORCH_CHECK_VALUE(cu[b + 1] <= index.numel(), op, ": cu_seqlens goes past the ", index.numel(), " rows of index");
    int64_t before = b * L - 1;
    for (int64_t t = cu[b]; t < cu[b + 1]; ++t) {
      TORCH_CHECK_VALUE(place[t] > before && place[t] < (b + 1) * L, op, ": index has place ", place[t], " at row ", t,
                        ", expected ascending places of image ", b);
      before = place[t];
    }
  }
}

// Runs work(unit, scratch) for all units; threads take the next unit when they are free, since images differ in cost.
template <class Work>
void each_unit(int64_t units, int64_t scratch_floats, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(units, at::in_parallel_region() ? 1 : at::get_num_threads());
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[scratch_floats]);
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t unit; (unit = next++) < units;) work(unit, scratch.get());
  });
}

// The inputs, their maps looked at, and the plans of the images.
struct Dechunk : DechunkInputs {
  Window window;
  std::vector<ImagePlan> plans;
  int64_t scratch = 0;

  template <class... Inputs>
  explicit Dechunk(const char* op, const Inputs&... inputs) : DechunkInputs(op, inputs...) {
    check_packing(op, index, cu_seqlens, p.B, p.H * p.W);
    window = make_window(p.sigma, std::max(p.H, p.W) - 1);
    plans.resize(p.B);
    at::parallel_for(0, p.B, 1, [&](int64_t begin, int64_t end) {
      kernels().dechunk_plan(p, window, plans.data(), begin, end);
    });
    int64_t most = 0;
    for (const ImagePlan& plan : plans) most = std::max(most, plan.M);
    scratch = kernels().dechunk_scratch(most, p.W);
  }
};

// The smoothed rows are made again in the backward: measured, that costs what writing and reading them costs, and a third
// of the memory. So the second output, which the GPU's backward reads, is empty, and `keep` says nothing here.
std::tuple<Tensor, Tensor> dechunk(const Tensor& h, const Tensor& prob, const Tensor& natural, const Tensor& index,
                                   const Tensor& cu_seqlens, const Tensor& residual, int64_t H, int64_t W, double sigma,
                                   bool /*keep*/) {
  Dechunk d("dechunk", h, prob, natural, index, cu_seqlens, H, W, sigma);
  check_shape("dechunk", "residual", residual, {d.p.B, H * W, d.p.D});
  const Tensor residual_ = residual.contiguous();
  Tensor out = fresh({d.p.B, H * W, d.p.D}, h.options().dtype(at::kFloat));
  Tensor smooth = at::empty({0, d.p.D}, out.options());
  d.p.residual = residual_.const_data_ptr();
  d.p.residual_type = type_of("dechunk", "residual", residual_);
  d.p.out = out.mutable_data_ptr<float>();
  const int64_t blocks = d.p.blocks();
  each_unit(d.p.B * blocks, d.scratch, [&](int64_t unit, float* scratch) {
    const int64_t b = unit / blocks;
    kernels().dechunk_forward(d.p, d.window, d.plans[b], b, unit % blocks, scratch);
  });
  return {out, smooth};
}

std::tuple<Tensor, Tensor> dechunk_backward(const Tensor& grad, const Tensor& h, const Tensor& prob, const Tensor& natural,
                                            const Tensor& index, const Tensor& cu_seqlens, const Tensor& /*smooth*/,
                                            int64_t H, int64_t W, double sigma) {
  const char* op = "dechunk_backward";
  Dechunk d(op, h, prob, natural, index, cu_seqlens, H, W, sigma);
  check_shape(op, "grad", grad, {d.p.B, H * W, d.p.D});
  check_dtype(op, "grad", grad, at::kFloat);
  const Tensor grad_ = grad.contiguous();
  const int64_t blocks = d.p.blocks(), used = d.p.cu_seqlens[d.p.B];
  Tensor dh = fresh(d.h.sizes(), d.h.options()), dprob = at::empty_like(d.prob);
  Tensor parts = at::empty({blocks * (d.p.B * H * W + 2 * d.p.T)}, dprob.options());
  if (used < d.p.T) dh.narrow(0, used, d.p.T - used).zero_();
  d.p.grad = grad_.const_data_ptr<float>();
  d.p.dh = dh.mutable_data_ptr();
  d.p.dprob = dprob.mutable_data_ptr<float>();
  d.p.part_gate = parts.mutable_data_ptr<float>();
  d.p.part_weight = d.p.part_gate + blocks * d.p.B * H * W;
  d.p.part_cell = d.p.part_weight + blocks * d.p.T;
  each_unit(d.p.B * blocks, d.scratch, [&](int64_t unit, float* scratch) {
    const int64_t b = unit / blocks;
    kernels().dechunk_backward(d.p, d.window, d.plans[b], b, unit % blocks, scratch);
  });
  at::parallel_for(0, d.p.B, 1, [&](int64_t begin, int64_t end) {
    kernels().dechunk_sums(d.p, d.window, d.plans.data(), begin, end);
  });
  return {dh, dprob};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> limit(const Tensor& prob, const Tensor& retained, int64_t capacity) {
  check_limit(prob, retained, capacity);
  const int64_t B = prob.size(0), L = prob.size(1);
  const Tensor prob_ = prob.contiguous(), retained_ = retained.contiguous();
  const auto ints = prob.options().dtype(at::kInt);
  Tensor out = at::empty({B, L}, retained.options()), slot = at::empty({B * L}, ints), index = at::empty({capacity}, ints);
  Tensor cu_seqlens = at::empty({B + 1}, ints), overflow = at::empty({}, ints);
  kernels().limit({prob_.const_data_ptr<float>(), retained_.const_data_ptr<bool>(), out.mutable_data_ptr<bool>(),
                   slot.mutable_data_ptr<int32_t>(), index.mutable_data_ptr<int32_t>(),
                   cu_seqlens.mutable_data_ptr<int32_t>(), overflow.mutable_data_ptr<int32_t>(), B, L, capacity});
  return {out, slot, index, cu_seqlens, overflow};
}

// The number of rows that images own; every entry is looked at, since it decides which memory is touched.
int64_t check_rows(const char* op, const Tensor& cu_seqlens, int64_t T) {
  TORCH_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.numel() > 0, op, ": cu_seqlens has shape ", cu_seqlens.sizes(),
                    ", expected (B+1,)");
  check_dtype(op, "cu_seqlens", cu_seqlens, at::kInt);
  const int32_t* cu = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t B = cu_seqlens.numel() - 1;
  bool ascending = cu[0] == 0;
  for (int64_t b = 0; b < B; ++b) ascending &= cu[b] <= cu[b + 1];
  TORCH_CHECK_VALUE(ascending && cu[B] <= T, op, ": cu_seqlens must ascend from 0 to at most ", T);
  return cu[B];
}

// The vectors of the images, (B, D) float32 with dense rows that may be apart.
Tensor vectors(const char* op, const char* name, const Tensor& v, int64_t B, int64_t D) {
  check_shape(op, name, v, {B, D});
  type_of(op, name, v);
  const Tensor wide = v.to(at::kFloat);
  return D > 1 && wide.stride(1) != 1 ? wide.contiguous() : wide;
}

// Checks what both adaLN ops share and fills it in.
template <class Params>
void rows_of_images(const char* op, Params& p, const Tensor& x, const Tensor& cu_seqlens) {
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": x has shape ", x.sizes(), ", expected (T, D)");
  check_rows(op, cu_seqlens, x.size(0));
  p.cu_seqlens = cu_seqlens.const_data_ptr<int32_t>();
  p.B = cu_seqlens.numel() - 1, p.T = x.size(0), p.D = x.size(1);
}

// Units of the backward ones: images x blocks of channels.
template <class Params, class Work>
void each_block(const Params& p, const Work& work) {
  const int64_t blocks = (p.D + Params::kBlock - 1) / Params::kBlock;
  const int64_t size = p.T * p.D / std::max<int64_t>(1, p.B * blocks);
  at::parallel_for(0, p.B * blocks, grain(size), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) work(unit / blocks, unit % blocks);
  });
}

void zero_padding(Tensor& rows, int64_t used) {
  if (used < rows.size(0)) rows.narrow(0, used, rows.size(0) - used).zero_();
}

Tensor modulate(const Tensor& x, const Tensor& shift, const Tensor& scale, const Tensor& cu_seqlens, at::ScalarType dtype) {
  const char* op = "modulate";
  ModulateParams p{};
  const Tensor x_ = x.contiguous(), cu = cu_seqlens.contiguous();
  rows_of_images(op, p, x_, cu);
  const Tensor shift_ = vectors(op, "shift", shift, p.B, p.D), scale_ = vectors(op, "scale", scale, p.B, p.D);
  Tensor out = fresh({p.T, p.D}, x.options().dtype(dtype));
  p.x = x_.const_data_ptr(), p.x_type = type_of(op, "x", x);
  p.shift = shift_.const_data_ptr<float>(), p.shift_stride = shift_.stride(0);
  p.scale = scale_.const_data_ptr<float>(), p.scale_stride = scale_.stride(0);
  p.out = out.mutable_data_ptr(), p.out_type = type_of(op, "dtype", out);
  at::parallel_for(0, p.T, grain(p.D), [&](int64_t begin, int64_t end) { kernels().modulate(p, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> modulate_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                     const Tensor& cu_seqlens) {
  const char* op = "modulate_backward";
  ModulateParams p{};
  const Tensor grad_ = grad.contiguous(), x_ = x.contiguous(), cu = cu_seqlens.contiguous();
  rows_of_images(op, p, x_, cu);
  check_shape(op, "grad", grad, x.sizes());
  const Tensor scale_ = vectors(op, "scale", scale, p.B, p.D);
  Tensor dx = fresh(x_.sizes(), x_.options());
  Tensor dshift = at::empty({p.B, p.D}, x.options().dtype(at::kFloat)), dscale = at::empty_like(dshift);
  zero_padding(dx, p.cu_seqlens[p.B]);
  p.x = x_.const_data_ptr(), p.x_type = type_of(op, "x", x);
  p.scale = scale_.const_data_ptr<float>(), p.scale_stride = scale_.stride(0);
  p.grad = grad_.const_data_ptr(), p.out_type = type_of(op, "grad", grad);
  p.dx = dx.mutable_data_ptr();
  p.dshift = dshift.mutable_data_ptr<float>(), p.dscale = dscale.mutable_data_ptr<float>();
  each_block(p, [&](int64_t b, int64_t block) { kernels().modulate_backward(p, b, block); });
  return {dx, dshift, dscale};
}

Tensor add_gated(const Tensor& x, const Tensor& gate, const Tensor& y, const Tensor& cu_seqlens) {
  const char* op = "add_gated";
  AddGatedParams p{};
  const Tensor x_ = x.contiguous(), y_ = y.contiguous(), cu = cu_seqlens.contiguous();
  rows_of_images(op, p, x_, cu);
  check_shape(op, "y", y, x.sizes());
  const Tensor gate_ = vectors(op, "gate", gate, p.B, p.D);
  Tensor out = fresh(x_.sizes(), x_.options());
  p.x = x_.const_data_ptr(), p.x_type = type_of(op, "x", x);
  p.gate = gate_.const_data_ptr<float>(), p.gate_stride = gate_.stride(0);
  p.y = y_.const_data_ptr(), p.y_type = type_of(op, "y", y);
  p.out = out.mutable_data_ptr();
  at::parallel_for(0, p.T, grain(p.D), [&](int64_t begin, int64_t end) { kernels().add_gated(p, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> add_gated_backward(const Tensor& grad, const Tensor& gate, const Tensor& y,
                                              const Tensor& cu_seqlens) {
  const char* op = "add_gated_backward";
  AddGatedParams p{};
  const Tensor grad_ = grad.contiguous(), y_ = y.contiguous(), cu = cu_seqlens.contiguous();
  rows_of_images(op, p, y_, cu);
  check_shape(op, "grad", grad, y.sizes());
  const Tensor gate_ = vectors(op, "gate", gate, p.B, p.D);
  Tensor dy = fresh(y_.sizes(), y_.options()), dgate = at::empty({p.B, p.D}, y.options().dtype(at::kFloat));
  zero_padding(dy, p.cu_seqlens[p.B]);
  p.gate = gate_.const_data_ptr<float>(), p.gate_stride = gate_.stride(0);
  p.y = y_.const_data_ptr(), p.y_type = type_of(op, "y", y);
  p.grad = grad_.const_data_ptr(), p.x_type = type_of(op, "grad", grad);
  p.dy = dy.mutable_data_ptr(), p.dgate = dgate.mutable_data_ptr<float>();
  each_block(p, [&](int64_t b, int64_t block) { kernels().add_gated_backward(p, b, block); });
  return {dy, dgate};
}

}  // namespace
}  // namespace dcdit

TORCH_LIBRARY(dcdit, m) {
  m.def(
      "select(Tensor boundary_prob, Tensor tail_drop) -> "
      "(Tensor natural, Tensor retained, Tensor slot, Tensor index, Tensor cu_seqlens)");
  m.def("gather_tokens(Tensor x, Tensor? pos, Tensor index, Tensor slot) -> Tensor");
  m.def("gather_tokens_backward(Tensor grad, Tensor slot, SymInt B, SymInt L) -> Tensor");
  m.def(
      "limit(Tensor boundary_prob, Tensor retained, SymInt capacity) -> "
      "(Tensor retained_out, Tensor slot, Tensor index, Tensor cu_seqlens, Tensor overflow)");
  m.def("nearest(Tensor slot, SymInt B, SymInt H, SymInt W) -> Tensor");
  m.def(
      "dechunk(Tensor h, Tensor boundary_prob, Tensor natural, Tensor index, Tensor cu_seqlens, Tensor residual, "
      "SymInt H, SymInt W, float sigma, bool keep) -> (Tensor out, Tensor smooth)");
  m.def(
      "dechunk_backward(Tensor grad, Tensor h, Tensor boundary_prob, Tensor natural, Tensor index, Tensor cu_seqlens, "
      "Tensor smooth, SymInt H, SymInt W, float sigma) -> (Tensor dh, Tensor dprob)");
  m.def("modulate(Tensor x, Tensor shift, Tensor scale, Tensor cu_seqlens, ScalarType dtype) -> Tensor");
  m.def(
      "modulate_backward(Tensor grad, Tensor x, Tensor scale, Tensor cu_seqlens) -> "
      "(Tensor dx, Tensor dshift, Tensor dscale)");
  m.def("add_gated(Tensor x, Tensor gate, Tensor y, Tensor cu_seqlens) -> Tensor");
  m.def(
      "add_gated_backward(Tensor grad, Tensor gate, Tensor y, Tensor cu_seqlens) -> (Tensor dy, Tensor dgate)");
}

TORCH_LIBRARY_IMPL(dcdit, CPU, m) {
  m.impl("select", &dcdit::select);
  m.impl("gather_tokens", &dcdit::gather_tokens);
  m.impl("gather_tokens_backward", &dcdit::gather_tokens_backward);
  m.impl("nearest", &dcdit::nearest);
  m.impl("dechunk", &dcdit::dechunk);
  m.impl("dechunk_backward", &dcdit::dechunk_backward);
  m.impl("limit", &dcdit::limit);
  m.impl("modulate", &dcdit::modulate);
  m.impl("modulate_backward", &dcdit::modulate_backward);
  m.impl("add_gated", &dcdit::add_gated);
  m.impl("add_gated_backward", &dcdit::add_gated_backward);
}
