// The CPU step's inner loops. Plain C++ that the compiler vectorises, compiled for three instruction sets; only the
// conversions to and from 16 bits are spelt out.
#include "step_loops.h"

#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dss_fast {
namespace {

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

// Copies past the cache with stores of one width. Whole lines at once are a fifth faster than 16 bytes at a time.
#define DSS_STREAM(NAME, TARGET, VECTOR, LOAD, STORE)                                                   \
  TARGET void NAME(const void* from, void* to, int64_t bytes) {                                         \
    constexpr int64_t kWidth = sizeof(VECTOR);                                                          \
    const char* source = static_cast<const char*>(from);                                                \
    char* target = static_cast<char*>(to);                                                              \
    const int64_t odd = -reinterpret_cast<uintptr_t>(to) % kWidth;                                      \
    int64_t i = odd < bytes ? odd : bytes;                                                              \
    std::memcpy(target, source, i);                                                                     \
    for (; i + kWidth <= bytes; i += kWidth)                                                            \
      STORE(reinterpret_cast<VECTOR*>(target + i), LOAD(reinterpret_cast<const VECTOR*>(source + i)));  \
    std::memcpy(target + i, source + i, bytes - i);                                                     \
  }
#if defined(__x86_64__)
DSS_STREAM(stream16, , __m128i, _mm_loadu_si128, _mm_stream_si128)
DSS_STREAM(stream64, __attribute__((target("avx512f"))), __m512i, _mm512_loadu_si512, _mm512_stream_si512)
#else
void stream16(const void* from, void* to, int64_t bytes) {
  std::memcpy(to, from, bytes);
}
#endif

template <class A, class T, bool kFirst, int... I>
DSS_INLINE void sum_group(const A* x, const A* m, const A* head, const void* const* slots, const A* w, A* __restrict y,
                          A* __restrict total, int64_t n, std::integer_sequence<int, I...>) {
  [[maybe_unused]] const T* slot[] = {static_cast<const T*>(slots[I])..., nullptr};
  [[maybe_unused]] const A weight[] = {w[I]..., 0};
  [[maybe_unused]] const A a = kFirst ? head[0] : 0, p = kFirst ? head[1] : 0, q = kFirst ? head[2] : 0,
                           now = kFirst ? head[3] : 0;
  for (int64_t e = 0; e < n; ++e) {
    A s;
    if constexpr (kFirst) {
      y[e] = p * x[e] + q * m[e];
      s = a * x[e] + now * y[e];
    } else {
      s = total[e];
    }
    ((s += weight[I] * static_cast<A>(widen(slot[I][e]))), ...);
    total[e] = s;
  }
}

template <class A, class T, bool kFirst>
DSS_INLINE void sum_loop(const A* x, const A* m, const A* head, const void* const* slots, const A* w, int count, A* y,
                         A* total, int64_t n) {
  switch (count) {
#define DSS_CASE(C) \
  case C:           \
    return sum_group<A, T, kFirst>(x, m, head, slots, w, y, total, n, std::make_integer_sequence<int, C>());
    DSS_CASE(0) DSS_CASE(1) DSS_CASE(2) DSS_CASE(3) DSS_CASE(4) DSS_CASE(5) DSS_CASE(6) DSS_CASE(7) DSS_CASE(8)
#undef DSS_CASE
  }
}

template <class A>
DSS_INLINE void combine_loop(const A* uncond, const A* cond, A g, A* __restrict m, int64_t n) {
  for (int64_t e = 0; e < n; ++e) m[e] = uncond[e] + g * (cond[e] - uncond[e]);
}

template <class A>
DSS_INLINE void step_backward_loop(const A* x, const A* m, const A* grad, const A* later, const A* head,
                                   A* __restrict dx, A* __restrict dm, double* sums, int64_t n) {
  const A a = head[0], p = head[1], q = head[2], now = head[3];
  A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t e = 0; e < n; ++e) {
    const A total = later ? now * grad[e] + later[e] : now * grad[e];
    dx[e] = a * grad[e] + p * total;
    dm[e] = q * total;
    s0 += x[e] * grad[e];
    s1 += x[e] * total;
    s2 += m[e] * total;
    s3 += (p * x[e] + q * m[e]) * grad[e];
  }
  sums[0] += s0, sums[1] += s1, sums[2] += s2, sums[3] += s3;
}

template <class A>
DSS_INLINE A combine_backward_loop(const A* uncond, const A* cond, A g, A* __restrict dm, A* __restrict dcond,
                                   int64_t n) {
  A s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t e = 0; e < n; ++e) {
    s += (cond[e] - uncond[e]) * dm[e];
    dcond[e] = g * dm[e];
    dm[e] = (1 - g) * dm[e];
  }
  return s;
}

// Sums in lanes of 64 bytes whatever the instruction set: one accumulator a slot stays in a register.
template <class A, int... I>
DSS_INLINE void dots_group(const A* const* slots, const A* grad, double* sums, int64_t n,
                           std::integer_sequence<int, I...>) {
  typedef A Lanes __attribute__((vector_size(64)));
  constexpr int kLanes = 64 / sizeof(A);
  const A* slot[] = {slots[I]...};
  Lanes s[sizeof...(I)] = {};
  int64_t e = 0;
  for (; e + kLanes <= n; e += kLanes) {
    Lanes g, v;
    std::memcpy(&g, grad + e, sizeof(g));
    ((std::memcpy(&v, slot[I] + e, sizeof(v)), s[I] += v * g), ...);
  }
  for (int lane = 0; e + lane < n; ++lane) ((s[I][lane] += slot[I][e + lane] * grad[e + lane]), ...);
  for (int lane = 1; lane < kLanes; ++lane) ((s[I][0] += s[I][lane]), ...);
  ((sums[I] += s[I][0]), ...);
}

template <class A>
DSS_INLINE void dots_loop(const A* const* slots, const A* grad, int count, double* sums, int64_t n) {
  switch (count) {
#define DSS_CASE(C) case C: return dots_group<A>(slots, grad, sums, n, std::make_integer_sequence<int, C>());
    DSS_CASE(1) DSS_CASE(2) DSS_CASE(3) DSS_CASE(4) DSS_CASE(5) DSS_CASE(6) DSS_CASE(7) DSS_CASE(8)
#undef DSS_CASE
  }
}

template <class A>
DSS_INLINE void scale_loop(const A* grad, const A* later, A w, A* __restrict to, int64_t n) {
  for (int64_t e = 0; e < n; ++e) to[e] = later ? w * grad[e] + later[e] : w * grad[e];
}

#define DSS_KERNELS(NAME, TARGET, STREAM)                                                                             \
  template <class A>                                                                                                  \
  struct NAME {                                                                                                       \
    template <class T>                                                                                                \
    TARGET static void load(const void* f, A* t, int64_t n) { load_loop<A, T>(f, t, n); }                             \
    template <class T>                                                                                                \
    TARGET static void store(const A* f, void* t, int64_t n) { store_loop<A, T>(f, t, n); }                           \
    TARGET static void combine(const A* u, const A* c, A g, A* m, int64_t n) { combine_loop(u, c, g, m, n); }         \
    template <class T>                                                                                                \
    TARGET static void step(const A* x, const A* m, const A* h, const void* const* s, const A* w, int c, A* y, A* t,  \
                            int64_t n) {                                                                              \
      sum_loop<A, T, true>(x, m, h, s, w, c, y, t, n);                                                                \
    }                                                                                                                 \
    template <class T>                                                                                                \
    TARGET static void sum(const void* const* s, const A* w, int c, A* t, int64_t n) {                                \
      sum_loop<A, T, false>(nullptr, nullptr, nullptr, s, w, c, nullptr, t, n);                                       \
    }                                                                                                                 \
    TARGET static void step_backward(const A* x, const A* m, const A* g, const A* l, const A* h, A* dx, A* dm,        \
                                     double* s, int64_t n) {                                                          \
      l ? step_backward_loop(x, m, g, l, h, dx, dm, s, n) : step_backward_loop<A>(x, m, g, nullptr, h, dx, dm, s, n); \
    }                                                                                                                 \
    TARGET static A combine_backward(const A* u, const A* c, A g, A* dm, A* dc, int64_t n) {                          \
      return combine_backward_loop(u, c, g, dm, dc, n);                                                               \
    }                                                                                                                 \
    TARGET static void dots(const A* const* s, const A* g, int c, double* r, int64_t n) { dots_loop(s, g, c, r, n); } \
    TARGET static void scale(const A* g, const A* l, A w, A* t, int64_t n) {                                          \
      l ? scale_loop(g, l, w, t, n) : scale_loop<A>(g, nullptr, w, t, n);                                             \
    }                                                                                                                 \
    static constexpr Kernels<A> table = {{load<double>, load<float>, load<bf16>, load<fp16>},                         \
                                         {store<double>, store<float>, store<bf16>, store<fp16>},                     \
                                         STREAM,                                                                      \
                                         combine,                                                                     \
                                         {step<double>, step<float>, step<bf16>, step<fp16>},                         \
                                         {sum<double>, sum<float>, sum<bf16>, sum<fp16>},                             \
                                         step_backward,                                                               \
                                         combine_backward,                                                            \
                                         dots,                                                                        \
                                         scale};                                                                      \
  };

DSS_KERNELS(Plain, , stream16)
#if defined(__x86_64__)
DSS_KERNELS(Avx2, __attribute__((target("avx2,fma"))), stream16)
DSS_KERNELS(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"))), stream64)
#endif

}  // namespace

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

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

}  // namespace dss_fast
