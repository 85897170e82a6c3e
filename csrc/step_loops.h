// The CPU step's inner loops over one block of elements that stays in the first-level cache, for accumulators of type
// A. Plain C++ that the compiler vectorises.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// One wheel serves every x86-64: the loader picks the clone for the processor at hand. Without the clones, SSE2 alone,
// the step takes 1.1 to 1.5 times as long in float32 and up to 2.9 (6.4) times with bfloat16 (float16) networks.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define DSS_CLONES
#define DSS_LOOP __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define DSS_LOOP
#endif

namespace dss_fast {
namespace {

template <class From, class To>
DSS_LOOP void convert(const From* from, To* __restrict to, int64_t n) {
  for (int64_t e = 0; e < n; ++e) to[e] = static_cast<To>(from[e]);
}

// z = a * x
template <class A>
DSS_LOOP void scale(A a, const A* x, A* __restrict z, int64_t n) {
  for (int64_t e = 0; e < n; ++e) z[e] = a * x[e];
}

// z = a * x + b * y
template <class A>
DSS_LOOP void mix(A a, const A* x, A b, const A* y, A* __restrict z, int64_t n) {
  for (int64_t e = 0; e < n; ++e) z[e] = a * x[e] + b * y[e];
}

// y = p * x + q * m and z = a * x + b * y
template <class A>
DSS_LOOP void mix_twice(A p, const A* x, A q, const A* m, A* __restrict y, A a, A b, A* __restrict z, int64_t n) {
  for (int64_t e = 0; e < n; ++e) {
    y[e] = p * x[e] + q * m[e];
    z[e] = a * x[e] + b * y[e];
  }
}

// total += sum_k w[k] * slots[k], side by side: one slot after the other took 1.2 to 1.7 times as long.
template <int K, class A, class T>
DSS_LOOP void add(const A* w, const T* const* slots, A* __restrict total, int64_t n) {
  for (int64_t e = 0; e < n; ++e) {
    A sum = total[e];
#pragma GCC unroll 10
    for (int k = 0; k < K; ++k) sum += w[k] * static_cast<A>(slots[k][e]);
    total[e] = sum;
  }
}

// Four accumulators of 64 bytes take turns, because a single one would wait for itself.
template <class A>
DSS_LOOP A dot(const A* x, const A* y, int64_t n) {
  typedef A Lanes __attribute__((vector_size(64)));
  constexpr int kLanes = 64 / sizeof(A), kAccumulators = 4;
  Lanes sums[kAccumulators] = {};
  int64_t e = 0;
  for (; e + kAccumulators * kLanes <= n; e += kAccumulators * kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < kAccumulators; ++k) {
      Lanes u, v;
      std::memcpy(&u, x + e + k * kLanes, sizeof u);
      std::memcpy(&v, y + e + k * kLanes, sizeof v);
      sums[k] += u * v;
    }
  }
  A sum = 0;
  for (; e < n; ++e) sum += x[e] * y[e];
  const Lanes lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int k = 0; k < kLanes; ++k) sum += lanes[k];
  return sum;
}

// Writes past the cache. An ordinary store first reads the line it writes to, which for a result that no longer fits
// made the step 1.2 to 1.6 times as slow. Whole lines at once are a fifth faster than 16 bytes at a time.
#if defined(__x86_64__)
#define DSS_STREAM(TARGET, VECTOR, LOAD, STORE)                                                              \
  TARGET void stream(const void* from, void* to, int64_t bytes) {                                            \
    constexpr int64_t kWidth = sizeof(VECTOR);                                                               \
    const char* source = static_cast<const char*>(from);                                                     \
    char* target = static_cast<char*>(to);                                                                   \
    const int64_t odd = -reinterpret_cast<uintptr_t>(to) % kWidth;                                           \
    int64_t i = odd < bytes ? odd : bytes;                                                                   \
    std::memcpy(target, source, i);                                                                          \
    for (; i + kWidth <= bytes; i += kWidth)                                                                 \
      STORE(reinterpret_cast<VECTOR*>(target + i), LOAD(reinterpret_cast<const VECTOR*>(source + i)));       \
    std::memcpy(target + i, source + i, bytes - i);                                                          \
  }
#if defined(DSS_CLONES)
DSS_STREAM(__attribute__((target("avx512f"))), __m512i, _mm512_loadu_si512, _mm512_stream_si512)
DSS_STREAM(__attribute__((target("default"))), __m128i, _mm_loadu_si128, _mm_stream_si128)
#else
DSS_STREAM(inline, __m128i, _mm_loadu_si128, _mm_stream_si128)
#endif
#undef DSS_STREAM
#else
inline void stream(const void* from, void* to, int64_t bytes) {
  std::memcpy(to, from, bytes);
}
#endif

inline void streamed_before() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace dss_fast
