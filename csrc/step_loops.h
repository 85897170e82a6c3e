// The inner loops of the CPU step, over one block of elements in accumulators of type A, and their table for each
// instruction set. Plain C++ that the compiler vectorises; only the conversions to and from 16 bits are spelt out.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace dss_fast {
namespace {

constexpr int kGroup = 8;                    // history slots summed per pass over the accumulators

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

#define DSS_INLINE static inline __attribute__((always_inline))

template <class To, class From>
DSS_INLINE To bit_cast(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

DSS_INLINE double widen(double v) { return v; }
DSS_INLINE float widen(float v) { return v; }
DSS_INLINE float widen(bf16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
// Moves the exponent with an exact multiplication, so that subnormal halves come out right without a branch.
DSS_INLINE float widen(fp16 v) {
  const uint32_t magnitude = (v.bits & 0x7fffu) << 13, sign = (v.bits & 0x8000u) << 16;
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN keep an exponent of all ones
  return bit_cast<float>(bits | sign);
}

DSS_INLINE void narrow(double v, double& out) { out = v; }
DSS_INLINE void narrow(double v, float& out) { out = static_cast<float>(v); }
DSS_INLINE void narrow(float v, double& out) { out = v; }
DSS_INLINE void narrow(float v, float& out) { out = v; }
DSS_INLINE void narrow(float v, bf16& out) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(v != v ? 0x7fc0u : rounded);
}
// Adding a power of two that leaves 10 (or, for subnormals, fewer) bits of fraction rounds to nearest, ties to even.
DSS_INLINE void narrow(float v, fp16& out) {
  const uint32_t bits = bit_cast<uint32_t>(v), sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t bias = magnitude & 0x7f800000u;
  bias = bias < 0x38800000u ? 0x38800000u : bias;
  const float grid = bit_cast<float>(bias + (13u << 23));
  const uint32_t sum = bit_cast<uint32_t>(bit_cast<float>(magnitude) + grid) - bit_cast<uint32_t>(grid);
  uint32_t half = ((bias - 0x38800000u) >> 13) + sum;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = static_cast<uint16_t>(half | sign);
}
template <class T>
DSS_INLINE void narrow(double v, T& out) { narrow(static_cast<float>(v), out); }

template <class A, class T>
DSS_INLINE void load_loop(const void* from, A* __restrict to, int64_t n) {
  const T* source = static_cast<const T*>(from);
  for (int64_t e = 0; e < n; ++e) to[e] = widen(source[e]);
}

template <class A, class T>
DSS_INLINE void store_loop(const A* __restrict from, void* to, int64_t n) {
  T* __restrict target = static_cast<T*>(to);
  for (int64_t e = 0; e < n; ++e) narrow(from[e], target[e]);
}

template <class A, class T, int... I>
DSS_INLINE void sum_group(A* __restrict total, const void* const* slots, const A* w, int64_t n,
                          std::integer_sequence<int, I...>) {
  const T* slot[] = {static_cast<const T*>(slots[I])...};
  const A weight[] = {w[I]...};
  for (int64_t e = 0; e < n; ++e) {
    A s = total[e];
    ((s += weight[I] * static_cast<A>(widen(slot[I][e]))), ...);
    total[e] = s;
  }
}

template <class A, class T>
DSS_INLINE void sum_loop(A* total, const void* const* slots, const A* w, int count, int64_t n) {
  switch (count) {
#define DSS_CASE(C) case C: return sum_group<A, T>(total, slots, w, n, std::make_integer_sequence<int, C>());
    DSS_CASE(1) DSS_CASE(2) DSS_CASE(3) DSS_CASE(4) DSS_CASE(5) DSS_CASE(6) DSS_CASE(7) DSS_CASE(8)
#undef DSS_CASE
  }
}

// m (in place over uncond), y and the first two terms of the sum.
template <class A>
DSS_INLINE void begin_loop(const A* x, const A* uncond, const A* cond, const A* w, A* __restrict y,
                           A* __restrict total, int64_t n) {
  const A a = w[0], p = w[1], q = w[2], g = w[3], now = w[4];
  for (int64_t e = 0; e < n; ++e) {
    const A m = cond ? uncond[e] + g * (cond[e] - uncond[e]) : uncond[e];
    const A value = p * x[e] + q * m;
    y[e] = value;
    total[e] = a * x[e] + now * value;
  }
}

// Gradients through one block before the history: sums[0..4] += <x,G>, <x,Y>, <m,Y>, <difference,Y>, <y,G>.
template <class A>
DSS_INLINE void begin_backward_loop(const A* x, const A* uncond, const A* cond, const A* g, const A* gy, const A* w,
                                    A* __restrict dx, A* __restrict duncond, A* __restrict dcond, double* sums,
                                    int64_t n) {
  const A a = w[0], p = w[1], q = w[2], scale = w[3], now = w[4];
  A s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, s4)
  for (int64_t e = 0; e < n; ++e) {
    const A difference = cond ? cond[e] - uncond[e] : A(0);
    const A m = cond ? uncond[e] + scale * difference : uncond[e];
    const A value = p * x[e] + q * m, grad = g[e];
    const A total = gy ? now * grad + gy[e] : now * grad;
    dx[e] = a * grad + p * total;
    duncond[e] = cond ? (1 - scale) * (q * total) : q * total;
    if (cond) dcond[e] = scale * (q * total);
    s0 += x[e] * grad;
    s1 += x[e] * total;
    s2 += m * total;
    s3 += difference * total;
    s4 += value * grad;
  }
  sums[0] += s0, sums[1] += s1, sums[2] += s2, sums[3] += s3 * q, sums[4] += s4;
}

// to = w * g (+ later), and returns <slot, g>.
template <class A, class T>
DSS_INLINE A history_backward_loop(const void* from, const A* g, const A* later, A w, A* __restrict to, int64_t n) {
  const T* slot = static_cast<const T*>(from);
  A s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t e = 0; e < n; ++e) {
    s += static_cast<A>(widen(slot[e])) * g[e];
    to[e] = later ? w * g[e] + later[e] : w * g[e];
  }
  return s;
}

// One table per instruction set. Index: 0 double, 1 float, 2 bfloat16, 3 float16.
template <class A>
struct Kernels {
  void (*load[4])(const void*, A*, int64_t);
  void (*store[4])(const A*, void*, int64_t);
  void (*sum[4])(A*, const void* const*, const A*, int, int64_t);
  A (*history_backward[4])(const void*, const A*, const A*, A, A*, int64_t);
  void (*begin)(const A*, const A*, const A*, const A*, A*, A*, int64_t);
  void (*begin_backward)(const A*, const A*, const A*, const A*, const A*, const A*, A*, A*, A*, double*, int64_t);
};

#define DSS_KERNELS(NAME, TARGET)                                                                                    \
  template <class A>                                                                                                 \
  struct NAME {                                                                                                      \
    template <class T>                                                                                               \
    TARGET static void load(const void* f, A* t, int64_t n) { load_loop<A, T>(f, t, n); }                            \
    template <class T>                                                                                               \
    TARGET static void store(const A* f, void* t, int64_t n) { store_loop<A, T>(f, t, n); }                          \
    template <class T>                                                                                               \
    TARGET static void sum(A* t, const void* const* s, const A* w, int c, int64_t n) { sum_loop<A, T>(t, s, w, c, n); } \
    template <class T>                                                                                               \
    TARGET static A history(const void* f, const A* g, const A* l, A w, A* t, int64_t n) {                            \
      return l ? history_backward_loop<A, T>(f, g, l, w, t, n)                                                       \
               : history_backward_loop<A, T>(f, g, nullptr, w, t, n);                                                \
    }                                                                                                                \
    TARGET static void begin(const A* x, const A* u, const A* c, const A* w, A* y, A* t, int64_t n) {                \
      c ? begin_loop(x, u, c, w, y, t, n) : begin_loop<A>(x, u, nullptr, w, y, t, n);                                \
    }                                                                                                                \
    TARGET static void begin_backward(const A* x, const A* u, const A* c, const A* g, const A* gy, const A* w,       \
                                      A* dx, A* du, A* dc, double* s, int64_t n) {                                   \
      c ? begin_backward_loop(x, u, c, g, gy, w, dx, du, dc, s, n)                                                   \
        : begin_backward_loop<A>(x, u, nullptr, g, gy, w, dx, du, nullptr, s, n);                                    \
    }                                                                                                                \
    static constexpr Kernels<A> table = {{load<double>, load<float>, load<bf16>, load<fp16>},                        \
                                         {store<double>, store<float>, store<bf16>, store<fp16>},                    \
                                         {sum<double>, sum<float>, sum<bf16>, sum<fp16>},                            \
                                         {history<double>, history<float>, history<bf16>, history<fp16>},            \
                                         begin,                                                                      \
                                         begin_backward};                                                            \
  };

DSS_KERNELS(Plain, )
#if defined(__x86_64__)
DSS_KERNELS(Avx2, __attribute__((target("avx2,fma"))))
DSS_KERNELS(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"))))
#endif

template <class A>
const Kernels<A>& kernels() {
#if defined(__x86_64__)
  static const Kernels<A>& chosen =
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
          ? Avx512<A>::table
      : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Avx2<A>::table
                                                                        : Plain<A>::table;
  return chosen;
#else
  return Plain<A>::table;
#endif
}

}  // namespace
}  // namespace dss_fast
