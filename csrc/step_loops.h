// The CPU step's inner loops over one block of elements, in accumulators of type A: what they do and their table for
// the instruction set at hand. Dtypes are numbered 0 double, 1 float, 2 bfloat16, 3 float16.
#pragma once

#include <cstdint>

namespace dss_fast {

constexpr int kGroup = 8;  // history slots that one loop reads side by side

template <class A>
struct Kernels {
  // to = from, and back.
  void (*load[4])(const void* from, A* to, int64_t n);
  void (*store[4])(const A* from, void* to, int64_t n);
  // Copies bytes past the cache.
  void (*stream)(const void* from, void* to, int64_t bytes);
  // m = uncond + g * (cond - uncond)
  void (*combine)(const A* uncond, const A* cond, A g, A* m, int64_t n);
  // y = p * x + q * m and total = a * x + now * y + sum_j w[j] * slots[j], for head = a, p, q, now and 0 to kGroup slots.
  void (*step[4])(const A* x, const A* m, const A* head, const void* const* slots, const A* w, int count, A* y,
                  A* total, int64_t n);
  // total += sum_j w[j] * slots[j], 1 to kGroup slots.
  void (*sum[4])(const void* const* slots, const A* w, int count, A* total, int64_t n);
  // The step's gradients before the history, for head = a, p, q, now; m's where there is no pair, and the sums
  // sums[0..3] += <x, G>, <x, Y>, <m, Y>, <y, G>.
  void (*step_backward)(const A* x, const A* m, const A* grad, const A* later, const A* head, A* dx, A* dm,
                        double* sums, int64_t n);
  // From m's gradient and g those of the pair: the first one in place. Returns <cond - uncond, dm>.
  A (*combine_backward)(const A* uncond, const A* cond, A g, A* dm, A* dcond, int64_t n);
  // sums[j] += <slots[j], grad>, 1 to kGroup slots.
  void (*dots)(const A* const* slots, const A* grad, int count, double* sums, int64_t n);
  // to = w * grad (+ later)
  void (*scale)(const A* grad, const A* later, A w, A* to, int64_t n);
};

template <class A>
const Kernels<A>& kernels();

}  // namespace dss_fast
