// What of a selection fits into a fixed number of packed rows. The threshold is one for the whole batch: its four bytes
// are found from the top by histograms that all blocks add to, one kernel a byte, ordered by the stream; no grid-wide
// wait. Where everything fits, those kernels end at once. Integers only: the same bits on every run.
#include "host.h"
#include "launch.h"

namespace dcdit {
namespace gpu {
namespace {

constexpr int kThreads = 512;
constexpr int kBins = 256;
constexpr int kBytes = 4;   // of a key
constexpr int kPlaces = 8;  // that a thread counts for a histogram, or more of a very large batch
constexpr int64_t kMostBlocks = 1024;

struct Work {
  int* count;  // (B,) retained tokens of each image
  int* below;  // (B,) of those, how many are less probable than the threshold
  int* equal;  // (B,) and how many sit on it
  int* bins;   // (kBytes, kBins)
};

Work carve_work(const LimitParams& p, Carve& carve) {
  Work work{};
  work.count = carve.take<int>(p.B);
  work.below = carve.take<int>(p.B);
  work.equal = carve.take<int>(p.B);
  work.bins = carve.take<int>(kBytes * kBins);
  return work;
}

// Tokens with a smaller key go, and `spare` of those that have it, at the highest places of the batch.
struct Choice {
  uint32_t key;
  int spare;
};

// Order of the numbers as unsigned integers: among positive floats their bits, and those of negative ones below.
__device__ __forceinline__ uint32_t key_of(float prob) { return bits_of(prob) ^ 0x80000000u; }

// Sum of a thread's numbers over the block, for all threads.
__device__ int sum_block(int x, int* scratch) {
  int total;
  scan<kThreads>(x, scratch, &total);
  return total;
}

__device__ int overflow_of(const LimitParams& p, const int* count, int* scratch) {
  int mine = 0;
  for (int k = threadIdx.x; k < int(p.B); k += kThreads) mine += count[k];
  return most(sum_block(mine, scratch) - int(p.capacity), 0);
}

// The first `bytes` bytes of the drop-th smallest key, from the histograms that are complete.
__device__ Choice narrow_down(const int* bins, int bytes, int drop, int* scratch) {
  __shared__ int found_digit, found_before;
  Choice choice{0, drop};
  for (int byte = 0; byte < bytes; ++byte) {
    const int mine = threadIdx.x < kBins ? bins[byte * kBins + threadIdx.x] : 0;
    int all;
    const int before = scan<kThreads>(mine, scratch, &all);
    if (before < choice.spare && choice.spare <= before + mine) {
      found_digit = threadIdx.x;
      found_before = before;
    }
    __syncthreads();
    choice.key |= uint32_t(found_digit) << (24 - 8 * byte);
    choice.spare -= found_before;
  }
  return choice;
}

// Tokens of each image; the first block empties the histograms.
__global__ void __launch_bounds__(kThreads) limit_count(LimitParams p, Work work) {
  __shared__ int scratch[2 * kThreads];
  const int64_t b = blockIdx.x;
  const bool* retained = p.retained_in + b * p.L;
  int mine = 0;
  for (int i = threadIdx.x; i < int(p.L); i += kThreads) mine += retained[i];
  const int total = sum_block(mine, scratch);
  if (threadIdx.x == 0) work.count[b] = total;
  if (b == 0)
    for (int k = threadIdx.x; k < kBytes * kBins; k += kThreads) work.bins[k] = 0;
}

// One byte of the keys of the batch whose bytes above are those of the threshold. Counting is by integer additions: the
// order in which they come does not matter.
__global__ void __launch_bounds__(kThreads) limit_histogram(LimitParams p, Work work, int byte) {
  __shared__ int scratch[2 * kThreads];
  __shared__ int bins[kBins];
  const int drop = overflow_of(p, work.count, scratch);
  if (drop == 0) return;  // all threads of all blocks
  const uint32_t prefix = narrow_down(work.bins, byte, drop, scratch).key;
  const int shift = 24 - 8 * byte;
  const uint32_t decided = byte == 0 ? 0u : ~0u << (shift + 8);
  if (threadIdx.x < kBins) bins[threadIdx.x] = 0;
  __syncthreads();
  const int64_t places = p.B * p.L, step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < places; i += step) {
    const int at = int(uint32_t(i) % uint32_t(p.L));
    if (!p.retained_in[i] || at == 0 || at == int(p.L) - 1) continue;  // the forced tokens are no candidates
    const uint32_t key = key_of(p.prob[i]);
    if ((key & decided) == prefix) atomicAdd(&bins[key >> shift & (kBins - 1)], 1);
  }
  __syncthreads();
  if (threadIdx.x < kBins && bins[threadIdx.x] > 0) atomicAdd(&work.bins[byte * kBins + threadIdx.x], bins[threadIdx.x]);
}

// How many candidates of each image lie below the threshold and on it.
__global__ void __launch_bounds__(kThreads) limit_compare(LimitParams p, Work work) {
  __shared__ int scratch[2 * kThreads];
  const int64_t b = blockIdx.x;
  const int L = int(p.L);
  const int drop = overflow_of(p, work.count, scratch);
  int below = 0, equal = 0;
  if (drop > 0) {
    const uint32_t threshold = narrow_down(work.bins, kBytes, drop, scratch).key;
    for (int i = 1 + threadIdx.x; i < L - 1; i += kThreads) {
      if (!p.retained_in[b * L + i]) continue;
      const uint32_t key = key_of(p.prob[b * L + i]);
      below += key < threshold;
      equal += key == threshold;
    }
  }
  below = sum_block(below, scratch);
  equal = sum_block(equal, scratch);
  if (threadIdx.x == 0) {
    work.below[b] = below;
    work.equal[b] = equal;
  }
}

// Threads own runs of neighbouring places, so that one scan over threads numbers the places in order.
__global__ void __launch_bounds__(kThreads) limit_pack(LimitParams p, Work work) {
  __shared__ int scratch[2 * kThreads];
  const int L = int(p.L), share = (L + kThreads - 1) / kThreads;
  const int64_t b = blockIdx.x;
  const int begin = least(L, int(threadIdx.x) * share), end = least(L, begin + share);
  const float* prob = p.prob + b * L;
  const bool* retained_in = p.retained_in + b * L;
  bool* retained = p.retained + b * L;

  int counts = 0, sure = 0, equals = 0, all_equals = 0;  // of the batch; `sure` and `equals` of the images before
  for (int k = threadIdx.x; k < int(p.B); k += kThreads) {
    counts += work.count[k];
    all_equals += work.equal[k];
    if (k < b) {
      sure += work.count[k] - work.below[k] - work.equal[k];
      equals += work.equal[k];
    }
  }
  const int total = sum_block(counts, scratch), drop = most(total - int(p.capacity), 0);
  sure = sum_block(sure, scratch);
  equals = sum_block(equals, scratch);
  all_equals = sum_block(all_equals, scratch);

  const Choice choice = drop > 0 ? narrow_down(work.bins, kBytes, drop, scratch) : Choice{0, 0};
  const int keep_equals = all_equals - choice.spare;
  const int first = sure + least(equals, keep_equals);  // row

  int mine = 0, all;
  if (drop > 0)
    for (int i = begin; i < end; ++i)
      mine += retained_in[i] && i != 0 && i != L - 1 && key_of(prob[i]) == choice.key;
  int before = equals + scan<kThreads>(mine, scratch, &all);  // candidates on the threshold
  int kept = 0;
  for (int i = begin; i < end; ++i) {
    bool keep = retained_in[i];
    if (keep && drop > 0 && i != 0 && i != L - 1) {
      const uint32_t key = key_of(prob[i]);
      keep = key > choice.key || (key == choice.key && before < keep_equals);
      before += key == choice.key;
    }
    retained[i] = keep;
    kept += keep;
  }
  int kept_here;
  int row = first + scan<kThreads>(kept, scratch, &kept_here);
  for (int i = begin; i < end; ++i) {
    p.slot[b * L + i] = retained[i] ? row : -1;
    if (retained[i]) p.index[row++] = int(b * L) + i;
  }
  // -1 from T on, by all blocks together.
  for (int64_t t = total - drop + b * kThreads + threadIdx.x; t < p.capacity; t += p.B * kThreads) p.index[t] = -1;
  if (threadIdx.x == 0) {
    p.cu_seqlens[b + 1] = first + kept_here;
    if (b == 0) p.cu_seqlens[0] = 0, *p.overflow = drop;
  }
}

}  // namespace

size_t limit_workspace(const LimitParams& p) {
  Carve carve(nullptr);
  carve_work(p, carve);
  return carve.used();
}

const char* limit(const LimitParams& p, void* workspace, void* stream) {
  // B = 0 still has a cu_seqlens and an overflow to write, which the caller fills.
  if (p.B == 0) return nullptr;
  Carve carve(workspace);
  const Work work = carve_work(p, carve);
  const int64_t blocks = least(ceil_div(p.B * p.L, kThreads * kPlaces), kMostBlocks);
  DCDIT_LAUNCH(limit_count, dim3(p.B), dim3(kThreads), 0, Stream(stream), p, work);
  for (int byte = 0; byte < kBytes; ++byte) {
    DCDIT_LAUNCH(limit_histogram, dim3(blocks), dim3(kThreads), 0, Stream(stream), p, work, byte);
  }
  DCDIT_LAUNCH(limit_compare, dim3(p.B), dim3(kThreads), 0, Stream(stream), p, work);
  DCDIT_LAUNCH(limit_pack, dim3(p.B), dim3(kThreads), 0, Stream(stream), p, work);
  return launched("limit");
}

}  // namespace gpu
}  // namespace dcdit
