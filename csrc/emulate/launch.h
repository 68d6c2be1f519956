// Runs a CUDA kernel on the CPU, for tests only: blocks one after another, the threads of a block as fibers that take
// turns. A fiber runs until a barrier or a shuffle, so a missing barrier shows as a result that depends on the order of
// the threads (`reverse`), and a barrier that some threads never reach ends the program with a message.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulate {

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  bool started = false, done = true;
};

struct Machine {
  static constexpr size_t kStack = 64 << 10;
  static constexpr unsigned kMost = 1024;

  std::vector<Fiber> fibers = std::vector<Fiber>(kMost);
  jmp_buf scheduler;
  ucontext_t scheduler_context;
  std::function<void()> job;
  dim3 thread, block, grid;
  unsigned threads = 0, current = 0;
  // A barrier, or a group's exchange, is passed when its count of arrivals is full; then its generation moves on.
  unsigned arrived = 0, generation = 0;
  unsigned group_arrived[kMost], group_generation[kMost];
  float exchange[2][kMost];
  uint64_t progress = 0;
  bool reverse = false;
  size_t shared_limit = 227 << 10;
  std::vector<unsigned char> shared;
};

inline Machine machine;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "launch emulation: %s (block %u, thread %u)\n", what, machine.block.x, machine.current);
  std::abort();
}

inline void yield() {
  if (_setjmp(machine.fibers[machine.current].here) == 0) _longjmp(machine.scheduler, 1);
}

inline void fiber_main() {
  for (;;) {
    machine.job();
    machine.fibers[machine.current].done = true;
    ++machine.progress;
    yield();
  }
}

inline void resume(unsigned t) {
  Fiber& fiber = machine.fibers[t];
  machine.current = t;
  machine.thread = dim3(t);
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  fiber.stack.reset(new char[Machine::kStack]);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = Machine::kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
}

inline void barrier() {
  const unsigned generation = machine.generation;
  ++machine.progress;
  if (++machine.arrived == machine.threads) {
    machine.arrived = 0;
    ++machine.generation;
    return;
  }
  while (machine.generation == generation) yield();
}

inline float shuffle_xor(float x, int off, unsigned lanes) {
  const unsigned t = machine.current, group = t / lanes;
  const unsigned generation = machine.group_generation[group];
  // Two sets of slots in turn: a lane that runs ahead cannot overwrite what a slow one has yet to read.
  float* slots = machine.exchange[generation & 1];
  slots[t] = x;
  ++machine.progress;
  if (++machine.group_arrived[group] == lanes) {
    machine.group_arrived[group] = 0;
    ++machine.group_generation[group];
  } else {
    while (machine.group_generation[group] == generation) yield();
  }
  return slots[t ^ unsigned(off)];
}

inline void run_block(unsigned threads, size_t shared) {
  Machine& m = machine;
  m.threads = threads;
  m.arrived = 0;
  std::memset(m.group_arrived, 0, sizeof m.group_arrived);
  // Shared memory starts as not-a-number, with a margin that must stay as it is.
  constexpr size_t kMargin = 256;
  m.shared.assign(shared + kMargin, 0xff);
  for (unsigned t = 0; t < threads; ++t) m.fibers[t].done = false;
  for (unsigned left = threads; left > 0;) {
    const uint64_t before = m.progress;
    left = 0;
    for (unsigned k = 0; k < threads; ++k) {
      const unsigned t = m.reverse ? threads - 1 - k : k;
      if (m.fibers[t].done) continue;
      resume(t);
      left += !m.fibers[t].done;
    }
    if (left > 0 && m.progress == before) fail("a barrier or shuffle that not all threads reach");
  }
  for (size_t k = shared; k < m.shared.size(); ++k)
    if (m.shared[k] != 0xff) fail("a write past the end of shared memory");
}

template <class Job>
void launch(dim3 grid, dim3 block, size_t shared, Job job) {
  if (block.x > Machine::kMost || shared > machine.shared_limit) fail("a launch beyond the device's limits");
  machine.job = job;
  machine.grid = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        machine.block = dim3(x, y, z);
        run_block(block.x, shared);
      }
}

inline float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  float x = exponent == 31 ? (fraction ? __builtin_nanf("") : __builtin_inff())
            : exponent     ? __builtin_ldexpf(float(1024 + fraction), exponent - 25)
                           : __builtin_ldexpf(float(fraction), -24);
  return h & 0x8000 ? -x : x;
}

inline uint16_t float_to_half(float x) {
  const uint16_t sign = __builtin_signbit(x) ? 0x8000 : 0;
  const float size = __builtin_fabsf(x);
  if (size != size) return 0x7e00;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = 0;
  __builtin_frexpf(size, &exponent);
  exponent = exponent < -13 ? -13 : exponent;  // subnormal halves share the smallest exponent
  const float units = __builtin_nearbyintf(__builtin_ldexpf(size, 11 - exponent));
  const uint16_t whole = uint16_t(units);  // 0 .. 2048, a carry moves into the exponent by itself
  return sign | uint16_t(size == 0 ? 0 : whole + (exponent + 13) * 1024);
}

}  // namespace emulate

#define threadIdx (emulate::machine.thread)
#define blockIdx (emulate::machine.block)
#define gridDim (emulate::machine.grid)
#define DCDIT_DYNAMIC_SHARED(name) unsigned char* name = emulate::machine.shared.data()
#define DCDIT_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ((void)(stream), emulate::launch((grid), (block), (shared), [=] { kernel(__VA_ARGS__); }))

inline void __syncthreads() { emulate::barrier(); }

inline int atomicAdd(int* to, int x) {
  const int before = *to;
  *to += x;
  return before;
}
