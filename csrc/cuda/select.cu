// Natural set, tail drop and packing maps (DC-DiT v2 §3.3, §3.5). One block an image chooses and numbers its tokens; a
// second kernel, ordered behind it by the stream, adds up the counts of the images before: no grid-wide wait.
#include "host.h"
#include "launch.h"

namespace dcdit {
namespace gpu {
namespace {

constexpr int kThreads = 512;
constexpr int kBins = 256;

// How many of n natural tokens go. The product is float32 on purpose: in double the count differs for some n.
__device__ int drop_count(int n, float tail_drop) {
  const float product = float(n) * tail_drop;
  if (!(product > 0.0f)) return 0;  // NaN too
  return product < float(n) ? least(int(product), n - 2) : n - 2;
}

struct Choice {
  uint32_t key;  // tokens with a smaller key go
  int spare;     // and this many, the highest places, of those that have it
};

// The drop-th smallest key among the natural tokens that are not forced, one byte at a time from the top. Bits of a
// positive float order like the float. Counting is by integer additions: the order in which they come does not matter.
__device__ Choice find_threshold(const float* prob, int L, int drop, int* scratch) {
  __shared__ int bins[kBins];
  __shared__ int found_digit, found_below;
  uint32_t prefix = 0, decided = 0;
  int left = drop;
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (threadIdx.x < kBins) bins[threadIdx.x] = 0;
    __syncthreads();
    for (int i = 1 + threadIdx.x; i < L - 1; i += kThreads) {
      const uint32_t key = bits_of(prob[i]);
      if (prob[i] > 0.5f && (key & decided) == prefix) atomicAdd(&bins[key >> shift & (kBins - 1)], 1);
    }
    __syncthreads();
    const int mine = threadIdx.x < kBins ? bins[threadIdx.x] : 0;
    int all;
    const int before = scan<kThreads>(mine, scratch, &all);
    if (before < left && left <= before + mine) {
      found_digit = threadIdx.x;
      found_below = before;
    }
    __syncthreads();
    prefix |= uint32_t(found_digit) << shift;
    decided |= uint32_t(kBins - 1) << shift;
    left -= found_below;
  }
  return Choice{prefix, left};
}

// Threads own runs of neighbouring places, so that one scan over threads numbers the places in order.
__global__ void __launch_bounds__(kThreads) select_images(SelectParams p, int* counts) {
  __shared__ int scratch[2 * kThreads];
  const int L = int(p.L), share = (L + kThreads - 1) / kThreads;
  const int64_t b = blockIdx.x;
  const int begin = least(L, int(threadIdx.x) * share), end = least(L, begin + share);
  const float* prob = p.prob + b * L;
  bool* natural = p.natural + b * L;
  bool* retained = p.retained + b * L;

  int n = 0;
  for (int i = begin; i < end; ++i) n += natural[i] = prob[i] > 0.5f || i == 0 || i == L - 1;
  int total;
  scan<kThreads>(n, scratch, &total);

  const int drop = drop_count(total, p.tail_drop[b]);
  Choice choice{0, 0};
  int equals = 0, keep_equals = 0;  // tokens at the threshold before this thread's; how many of all of them stay
  if (drop > 0) {
    choice = find_threshold(prob, L, drop, scratch);
    int mine = 0, all;
    for (int i = begin; i < end; ++i)
      mine += natural[i] && i != 0 && i != L - 1 && bits_of(prob[i]) == choice.key;
    equals = scan<kThreads>(mine, scratch, &all);
    keep_equals = all - choice.spare;
  }
  int kept = 0;
  for (int i = begin; i < end; ++i) {
    bool keep = natural[i];
    if (keep && drop > 0 && i != 0 && i != L - 1) {
      const uint32_t key = bits_of(prob[i]);
      keep = key > choice.key || (key == choice.key && equals < keep_equals);
      equals += key == choice.key;
    }
    retained[i] = keep;
    kept += keep;
  }
  int row = scan<kThreads>(kept, scratch, &total);
  for (int i = begin; i < end; ++i) p.slot[b * L + i] = retained[i] ? row++ : -1;
  if (threadIdx.x == 0) counts[b] = total;
}

// Slots made global, the packed index written, and -1 from T on: image b's dropped places pay for its share of that.
__global__ void __launch_bounds__(kThreads) select_pack(SelectParams p, const int* counts) {
  __shared__ int scratch[2 * kThreads];
  const int64_t b = blockIdx.x;
  const int L = int(p.L), B = int(p.B);
  int before = 0, all = 0;
  for (int k = threadIdx.x; k < B; k += kThreads) {
    all += counts[k];
    before += k < b ? counts[k] : 0;
  }
  int first, total;
  scan<kThreads>(before, scratch, &first);
  scan<kThreads>(all, scratch, &total);
  const int mine = counts[b];
  for (int i = threadIdx.x; i < L; i += kThreads) {
    const int row = p.slot[b * L + i];
    if (row < 0) continue;
    p.slot[b * L + i] = first + row;
    p.index[first + row] = int(b * L) + i;
  }
  const int64_t rest = total + b * L - first;
  for (int i = threadIdx.x; i < L - mine; i += kThreads) p.index[rest + i] = -1;
  if (threadIdx.x == 0) {
    p.cu_seqlens[b + 1] = first + mine;
    if (b == 0) p.cu_seqlens[0] = 0;
  }
}

}  // namespace

size_t select_workspace(const SelectParams& p) { return size_t(most<int64_t>(p.B, 1)) * sizeof(int); }

const char* select(const SelectParams& p, void* workspace, void* stream) {
  // B = 0 still has a cu_seqlens to write, which the caller fills.
  if (p.B == 0) return nullptr;
  int* counts = static_cast<int*>(workspace);
  DCDIT_LAUNCH(select_images, dim3(p.B), dim3(kThreads), 0, Stream(stream), p, counts);
  DCDIT_LAUNCH(select_pack, dim3(p.B), dim3(kThreads), 0, Stream(stream), p, counts);
  return launched("select");
}

}  // namespace gpu
}  // namespace dcdit
