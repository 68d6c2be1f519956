// Host side of the launches: the vendor's runtime behind four functions.
#pragma once
#include <cstdio>

#include "gpu.h"

namespace dcdit {
namespace gpu {

constexpr size_t kFreeShared = 48 << 10;  // what every device grants a block without being asked, static and dynamic
constexpr size_t kMostStatic = 8 << 10;   // of that, what a kernel here may declare itself

// Most shared memory that one block may have on the current device.
inline size_t shared_limit() {
#if defined(DCDIT_EMULATE)
  return emulate::machine.shared_limit;
#else
  int device = 0, bytes = 0;
#if defined(DCDIT_HIP)
  if (hipGetDevice(&device) != hipSuccess ||
      hipDeviceGetAttribute(&bytes, hipDeviceAttributeMaxSharedMemoryPerBlock, device) != hipSuccess)
    return kFreeShared;
#else
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return kFreeShared;
#endif
  return size_t(bytes);
#endif
}

// Lets a kernel be launched with more dynamic shared memory than every device grants.
template <class Kernel>
inline void allow_shared(Kernel kernel, size_t bytes) {
#if !defined(DCDIT_EMULATE) && !defined(DCDIT_HIP)
  if (bytes > kFreeShared - kMostStatic)
    cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
#else
  (void)kernel, (void)bytes;
#endif
}

// Null if everything launched since the last call was accepted.
inline const char* launched(const char* op) {
#if defined(DCDIT_EMULATE)
  (void)op;
  return nullptr;
#else
#if defined(DCDIT_HIP)
  const Status status = hipGetLastError();
  const char* text = hipGetErrorString(status);
  const bool good = status == hipSuccess;
#else
  const Status status = cudaGetLastError();
  const char* text = cudaGetErrorString(status);
  const bool good = status == cudaSuccess;
#endif
  if (good) return nullptr;
  static thread_local char message[200];
  std::snprintf(message, sizeof message, "%s: the GPU refused the launch: %s", op, text);
  return message;
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out aligned pieces of one allocation; with a null base it only measures.
class Carve {
 public:
  explicit Carve(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* at = base_ ? base_ + used_ : nullptr;
    used_ += (size_t(count) * sizeof(T) + 255) / 256 * 256;
    return reinterpret_cast<T*>(at);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace gpu
}  // namespace dcdit
