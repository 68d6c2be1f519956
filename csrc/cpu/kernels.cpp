// Chooses the kernel table once, at first use.
#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace dcdit {
namespace {

const Kernels* choose() {
#ifdef DCDIT_MULTI_ISA
  const char* asked = std::getenv("DCDIT_ISA");
  const bool any = asked == nullptr || *asked == '\0';
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (any || std::strcmp(asked, "avx512") == 0)) return &avx512::table;
  if (has_avx2 && (any || std::strcmp(asked, "base") != 0)) return &avx2::table;
#endif
  return &base::table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* chosen = choose();
  return *chosen;
}

}  // namespace dcdit
