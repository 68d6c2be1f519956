// The kernels compiled for AVX2 and FMA. One source, several instruction sets: no -march flag decides what a
// distributed build runs on. Standard headers come before the pragma, so that nothing shared is compiled for it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels.h"

#ifdef DCDIT_MULTI_ISA
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,lzcnt")
#define DCDIT_ISA avx2
#define DCDIT_VECTOR_BYTES 32
#include "all.inl"
#pragma GCC pop_options
#endif
