// The kernels compiled for whatever the compiler's flags allow. One source, several instruction sets: no -march flag decides what a
// distributed build runs on. Standard headers come before the pragma, so that nothing shared is compiled for it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels.h"

#define DCDIT_ISA base
#define DCDIT_VECTOR_BYTES 16
#include "all.inl"
