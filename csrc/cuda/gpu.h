// What differs between CUDA, HIP and the CPU emulation of a launch (csrc/emulate): everything else in csrc/cuda is one
// source for all three. No inline PTX, no warp size: threads exchange values only inside groups of 8 lanes, which divide
// 32 and 64 alike.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../include/params.h"

#if defined(DCDIT_EMULATE)
#include "../emulate/launch.h"
#elif defined(__HIP_PLATFORM_AMD__)
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>
#define DCDIT_HIP 1
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#if !defined(DCDIT_EMULATE)
#define DCDIT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define DCDIT_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<(grid), (block), (shared), (stream)>>>(__VA_ARGS__)
#endif

// Registers for at least `blocks` blocks a multiprocessor. HIP reads the second number as something else.
#if defined(DCDIT_HIP)
#define DCDIT_BOUNDS(threads, blocks) __launch_bounds__(threads)
#else
#define DCDIT_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#endif

namespace dcdit {
namespace gpu {

#if defined(DCDIT_EMULATE)
using Stream = void*;
using Status = int;
#elif defined(DCDIT_HIP)
using Stream = hipStream_t;
using Status = hipError_t;
#else
using Stream = cudaStream_t;
using Status = cudaError_t;
#endif

constexpr int kLanes = 8;  // threads of one group

// x of the lane whose number in its group differs by `off` bits. All 8 lanes of the group must come here together.
__device__ __forceinline__ float shuffle_xor(float x, int off) {
#if defined(DCDIT_EMULATE)
  return emulate::shuffle_xor(x, off, kLanes);
#elif defined(DCDIT_HIP)
  return __shfl_xor(x, off, kLanes);
#else
  const unsigned group = 0xffu << ((threadIdx.x & 31u) & ~unsigned(kLanes - 1));
  return __shfl_xor_sync(group, x, off, kLanes);
#endif
}

// Sum over the group, the same bits in each lane: the additions pair up in one fixed order.
__device__ __forceinline__ float group_sum(float x) {
  x += shuffle_xor(x, 4);
  x += shuffle_xor(x, 2);
  return x + shuffle_xor(x, 1);
}

template <class T>
__host__ __device__ __forceinline__ T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
__host__ __device__ __forceinline__ T most(T a, T b) {
  return a < b ? b : a;
}

__device__ __forceinline__ uint32_t bits_of(float x) {
  union {
    float f;
    uint32_t u;
  } both;
  both.f = x;
  return both.u;
}
__device__ __forceinline__ float float_of(uint32_t u) {
  union {
    uint32_t u;
    float f;
  } both;
  both.u = u;
  return both.f;
}

// Element types as stored.
struct F32 {
  uint32_t bits;
};
struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

__device__ __forceinline__ float widen(F32 v) { return float_of(v.bits); }
__device__ __forceinline__ float widen(BF16 v) { return float_of(uint32_t(v.bits) << 16); }
__device__ __forceinline__ float widen(F16 v) {
#if defined(DCDIT_EMULATE)
  return emulate::half_to_float(v.bits);
#else
  return __half2float(__ushort_as_half(v.bits));
#endif
}

__device__ __forceinline__ void narrow(float x, F32& to) { to.bits = bits_of(x); }
__device__ __forceinline__ void narrow(float x, BF16& to) {
#if !defined(DCDIT_EMULATE) && !defined(DCDIT_HIP)
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else  // by its bits: not every HIP has a header for it
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
  to.bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
#endif
}
__device__ __forceinline__ void narrow(float x, F16& to) {
#if defined(DCDIT_EMULATE)
  to.bits = emulate::float_to_half(x);
#else
  to.bits = __half_as_ushort(__float2half_rn(x));
#endif
}

// Four neighbouring channels, what one thread works on.
struct alignas(16) Four {
  float v[4];

  __device__ __forceinline__ static Four zero() { return Four{{0.0f, 0.0f, 0.0f, 0.0f}}; }
  __device__ __forceinline__ void add(float weight, const Four& x) {
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] += weight * x.v[k];
  }
  __device__ __forceinline__ void add(const Four& x) {
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] += x.v[k];
  }
  __device__ __forceinline__ Four times(float weight) const {
    return Four{{v[0] * weight, v[1] * weight, v[2] * weight, v[3] * weight}};
  }
  __device__ __forceinline__ float dot(const Four& x) const {
    return (v[0] * x.v[0] + v[1] * x.v[1]) + (v[2] * x.v[2] + v[3] * x.v[3]);
  }
};

template <class Number>
struct alignas(4 * sizeof(Number)) Packed {
  Number v[4];
};

// For what is touched once and never again: it should not push out of the cache what other blocks will read.
template <class P>
__device__ __forceinline__ P load_once(const P* x) {
#if defined(DCDIT_EMULATE) || defined(DCDIT_HIP)
  return *x;
#else
  union {
    P p;
    uint2 two;
    uint4 four;
  } both;
  if (sizeof(P) == sizeof(uint4))
    both.four = __ldcs(reinterpret_cast<const uint4*>(x));
  else
    both.two = __ldcs(reinterpret_cast<const uint2*>(x));
  return both.p;
#endif
}

__device__ __forceinline__ void store_once(const Four& x, F32* to) {
#if defined(DCDIT_EMULATE) || defined(DCDIT_HIP)
  *reinterpret_cast<Four*>(to) = x;
#else
  __stcs(reinterpret_cast<float4*>(to), make_float4(x.v[0], x.v[1], x.v[2], x.v[3]));
#endif
}

// Reads the `n` channels that are left of a row, at most four; zeros beyond. kWide: all rows start on a multiple of four
// elements, so that n is 0 or at least 4.
template <bool kWide, bool kOnce = false, class Number>
__device__ __forceinline__ Four read(const Number* x, int n) {
  Four out = Four::zero();
  if (kWide) {
    if (n > 0) {
      const Packed<Number>* from = reinterpret_cast<const Packed<Number>*>(x);
      const Packed<Number> four = kOnce ? load_once(from) : *from;
#pragma unroll
      for (int k = 0; k < 4; ++k) out.v[k] = widen(four.v[k]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < n) out.v[k] = widen(x[k]);
  }
  return out;
}

template <bool kWide, class Number>
__device__ __forceinline__ void write(const Four& from, int n, Number* x) {
  if (kWide) {
    if (n > 0) {
      Packed<Number> four;
#pragma unroll
      for (int k = 0; k < 4; ++k) narrow(from.v[k], four.v[k]);
      *reinterpret_cast<Packed<Number>*>(x) = four;
    }
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < n) narrow(from.v[k], x[k]);
  }
}

// Sum of `x` over the block's threads before this one, and over all of them in `total`. `shared` holds 2 * kThreads.
template <int kThreads>
__device__ __forceinline__ int scan(int x, int* shared, int* total) {
  const int t = threadIdx.x;
  int* from = shared;
  int* to = shared + kThreads;
  from[t] = x;
  __syncthreads();
  for (int off = 1; off < kThreads; off *= 2) {
    to[t] = from[t] + (t >= off ? from[t - off] : 0);
    __syncthreads();
    int* swap = from;
    from = to;
    to = swap;
  }
  const int before = from[t] - x;
  *total = from[kThreads - 1];
  __syncthreads();
  return before;
}

}  // namespace gpu
}  // namespace dcdit
