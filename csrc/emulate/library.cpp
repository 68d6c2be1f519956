// The launches of csrc/cuda as plain C functions over the emulation, for the tests to load.
#include <cstring>
#include <vector>

#include "../cuda/gpu.h"
#include "../cuda/launch.h"

using namespace dcdit;

namespace {

// A workspace that holds not-a-number at first: nothing may lean on what it held before.
struct Workspace {
  std::vector<unsigned char> bytes;
  explicit Workspace(size_t size) : bytes(size + 256, 0xff) {}
  void* data() {
    const uintptr_t at = reinterpret_cast<uintptr_t>(bytes.data());
    return reinterpret_cast<void*>((at + 255) / 256 * 256);
  }
};

}  // namespace

extern "C" {

// Order of the threads and the shared memory of the pretended device.
void emulate_device(int reverse, int64_t shared_limit) {
  emulate::machine.reverse = reverse != 0;
  emulate::machine.shared_limit = size_t(shared_limit);
}

const char* emulate_select(const float* prob, const float* tail_drop, bool* natural, bool* retained, int32_t* slot,
                           int32_t* index, int32_t* cu_seqlens, int64_t B, int64_t L) {
  const SelectParams p{prob, tail_drop, natural, retained, slot, index, cu_seqlens, B, L};
  Workspace workspace(gpu::select_workspace(p));
  return gpu::select(p, workspace.data(), nullptr);
}

const char* emulate_limit(const float* prob, const bool* retained_in, bool* retained, int32_t* slot, int32_t* index,
                          int32_t* cu_seqlens, int32_t* overflow, int64_t B, int64_t L, int64_t capacity) {
  const LimitParams p{prob, retained_in, retained, slot, index, cu_seqlens, overflow, B, L, capacity};
  Workspace workspace(gpu::limit_workspace(p));
  return gpu::limit(p, workspace.data(), nullptr);
}

const char* emulate_rows(const void* x, const float* pos, const int32_t* map, void* out, int type, int64_t L, int64_t D,
                         int64_t rows, int64_t source_rows) {
  const RowsParams p{x, pos, map, out, Type(type), L, D};
  return gpu::rows(p, rows, source_rows, nullptr);
}

const char* emulate_nearest(const int32_t* slot, int32_t* nearest, int64_t B, int64_t H, int64_t W) {
  const NearestParams p{slot, nearest, H, W};
  Workspace workspace(gpu::nearest_workspace(p, B));
  return gpu::nearest(p, B, workspace.data(), nullptr);
}

// `forward`: reads residual, writes out and smooth (may be null). Else reads grad and smooth, writes dh and dprob.
const char* emulate_dechunk(int forward, const void* h, const float* prob, const bool* natural, const int32_t* index,
                            const int32_t* cu_seqlens, const void* residual, float* out, float* smooth, const float* grad,
                            void* dh, float* dprob, int h_type, int residual_type, int64_t B, int64_t H, int64_t W,
                            int64_t D, int64_t T, double sigma) {
  DechunkParams p{};
  p.h = h, p.prob = prob, p.natural = natural, p.index = index, p.cu_seqlens = cu_seqlens;
  p.h_type = Type(h_type), p.residual_type = Type(residual_type);
  p.B = B, p.H = H, p.W = W, p.D = D, p.T = T, p.sigma = sigma;
  p.residual = residual, p.out = out, p.smooth = smooth, p.grad = grad, p.dh = dh, p.dprob = dprob;
  Workspace workspace(gpu::dechunk_workspace(p, !forward));
  return forward ? gpu::dechunk_forward(p, workspace.data(), nullptr) : gpu::dechunk_backward(p, workspace.data(), nullptr);
}

}  // extern "C"
