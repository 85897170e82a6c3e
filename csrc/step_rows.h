// What the CPU's forward and backward passes share: tensors as rows of blocks, the scalars of a row's step, the
// checks, and the cut into chunks. A row is cut into fixed blocks that stay in the first-level cache, so that the same
// row gives the same bits in any batch and on any number of threads.
#pragma once

#include "step.h"
#include "step_loops.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dss_fast {
namespace {

constexpr int64_t kBlock = 512;              // elements in cache at a time: 6 float blocks are 12 KB of 32
constexpr int64_t kChunk = 16 * kBlock;      // elements a thread takes at a time, and one partial sum of a gradient
constexpr int64_t kSerialBytes = 512 << 10;  // below this, waking a second thread costs more than it brings
constexpr int64_t kStreamBytes = 12 << 20;   // above this, results leave the cache before anyone reads them

int kind(const at::Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kDouble: return 0;
    case at::kFloat: return 1;
    case at::kBFloat16: return 2;
    case at::kHalf: return 3;
    default:
      TORCH_CHECK_TYPE(false, name, " is ", t.scalar_type(), "; allowed are float64, float32, bfloat16 and float16");
  }
}

// A new tensor. Large ones ask for pages of 2 MB: the 47,000 page faults of a 190 MB history in pages of 4 KB take
// longer than the step.
at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  auto t = at::empty(sizes, options);
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(t.data_ptr()) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(t.data_ptr()) + t.nbytes()) / kPage * kPage;
  if (t.nbytes() >= 4 * kPage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return t;
}

// `stream` writes past the cache: a large result is not worth the read that an ordinary store begins with.
template <class A>
void copy_block(const Kernels<A>& k, const void* from, void* to, int64_t bytes, bool stream) {
  if (stream)
    k.stream(from, to, bytes);
  else
    std::memcpy(to, from, bytes);
}

// A tensor as rows of bytes, read or written a block at a time.
struct Rows {
  char* data = nullptr;
  int64_t row = 0, slot = 0, width = 0;  // bytes; width is one element's
  int kind = 1;

  Rows() = default;
  Rows(const at::Tensor& t, const char* name, bool slots = false)
      : data(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))), width(t.element_size()),
        kind(dss_fast::kind(t, name)) {
    row = t.stride(0) * width;
    slot = slots ? t.stride(1) * width : 0;
  }
  explicit operator bool() const { return data != nullptr; }
  char* at(int64_t b, int64_t e, int64_t j = 0) const { return data + b * row + j * slot + e * width; }

  // The block as accumulators: itself where the dtype is already right, else converted into `buffer`.
  template <class A>
  const A* read(const Kernels<A>& k, int64_t b, int64_t e, int64_t n, A* buffer, int64_t j = 0) const {
    if (kind == (std::is_same_v<A, double> ? 0 : 1)) return reinterpret_cast<const A*>(at(b, e, j));
    k.load[kind](at(b, e, j), buffer, n);
    return buffer;
  }

  template <class A>
  void write(const Kernels<A>& k, const A* block, int64_t b, int64_t e, int64_t n, bool stream, int64_t j = 0) const {
    char* to = at(b, e, j);
    const bool same = kind == (std::is_same_v<A, double> ? 0 : 1);
    if (stream || same) {
      alignas(64) char staged[kBlock * sizeof(double)];
      if (!same) k.store[kind](block, staged, n);
      return copy_block(k, same ? static_cast<const void*>(block) : staged, to, n * width, stream);
    }
    k.store[kind](block, to, n);
  }
};

void streamed_before() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The scalars of one row at its own step.
template <class A>
struct Step {
  int64_t i;
  bool active;
  const A* w;      // a, p, q, g, then the weights of the history
  A head[4];       // a, p, q, w_ii
  A g;

  Step(const A* weights, int64_t steps, int64_t columns, bool per_row, const int64_t* index, bool index_per_row,
       int64_t b)
      : i(index[index_per_row ? b : 0]), active(i >= 0 && i < steps) {
    w = weights + (per_row ? b : 0) * steps * columns + (active ? i : 0) * columns;
    std::copy(w, w + 3, head);
    head[3] = w[kScalars + (active ? i : 0)];
    g = w[3];
  }
};

struct Shape {
  int64_t batch, size, slots, steps, columns, guided;
  bool pair, per_row, index_per_row;
  int64_t chunks() const { return (size + kChunk - 1) / kChunk; }
  // A block is guided as a whole or not at all: it ends where the guided elements do.
  int64_t block(int64_t e, int64_t last) const {
    return std::min({kBlock, last - e, e < guided ? guided - e : kBlock});
  }
};

// What the step and the pull have in common; `state` is a tensor of the state's dtype and shape.
Shape check_weights(const at::Tensor& state, int64_t slots, const at::Tensor& weights, const at::Tensor& index,
                    int64_t guided, bool pair) {
  const auto batch = state.size(0);
  TORCH_CHECK_VALUE(weights.dim() == 3 && (weights.size(0) == 1 || weights.size(0) == batch) &&
                        weights.size(2) == kScalars + slots &&
                        (slots == weights.size(1) || slots == weights.size(1) + 1),
                    "weights ", weights.sizes(), " do not fit a batch of ", batch, " and a history of ", slots,
                    " slots: N steps take (1 or batch, N, 4 + slots) with N slots, or N + 1 when the last one holds "
                    "the initial noise");
  const auto wanted = state.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(weights.scalar_type() == wanted, "weights are ", weights.scalar_type(), "; a ",
                    state.scalar_type(), " state needs ", wanted, ", use weights.to(...)");
  TORCH_CHECK_VALUE(
      index.scalar_type() == at::kLong && index.dim() == 1 && (index.size(0) == 1 || index.size(0) == batch),
      "index is ", index.scalar_type(), " ", index.sizes(), "; needed is int64 of shape (1,) or (", batch, ",)");
  const auto size = c10::multiply_integers(state.sizes().slice(1));
  TORCH_CHECK_VALUE(guided >= -1 && guided <= size, "guided is ", guided,
                    "; give -1 for all or a count within a sample's ", size, " elements");
  return {batch, size, slots, weights.size(1), weights.size(2), guided < 0 ? size : guided, pair,
          weights.size(0) != 1, index.size(0) != 1};
}

Shape check(const at::Tensor& x, const at::Tensor& output, const at::Tensor& history, const at::Tensor& weights,
            const at::Tensor& index, int64_t guided) {
  TORCH_CHECK_VALUE(x.dim() > 0, "x has no batch dimension; needed is (batch, *sample)");
  const auto batch = x.size(0);
  const auto sample = x.sizes().slice(1);
  TORCH_CHECK_VALUE(output.dim() == x.dim() && (output.size(0) == batch || output.size(0) == 2 * batch) &&
                        output.sizes().slice(1) == sample,
                    "output has shape ", output.sizes(), "; x ", x.sizes(), " allows the same, or, guided, ",
                    2 * batch, " rows with the unconditional ones first");
  TORCH_CHECK_VALUE(history.dim() == x.dim() + 1 && history.size(0) == batch && history.sizes().slice(2) == sample,
                    "history has shape ", history.sizes(), "; x ", x.sizes(), " needs (batch, slots, *sample)");
  return check_weights(x, history.size(1), weights, index, guided, output.size(0) != batch);
}

// body(b, first element, last element, chunk number) for every chunk of every row.
template <class Body>
void for_chunks(const Shape& s, int64_t bytes, const Body& body) {
  const auto chunks = s.chunks(), total = s.batch * chunks;
  auto run = [&](int64_t begin, int64_t end) {
    for (auto c = begin; c < end; ++c) {
      const auto first = c % chunks * kChunk;
      body(c / chunks, first, std::min(first + kChunk, s.size), c);
    }
    streamed_before();
  };
  if (bytes < kSerialBytes || total == 1) return run(0, total);
  at::parallel_for(0, total, 1, run);
}

// A history may be a slice of a larger one as long as every sample is contiguous.
at::Tensor samples_contiguous(const at::Tensor& t) {
  if (t.is_contiguous() || t.select(0, 0).select(0, 0).is_contiguous()) return t;
  return t.contiguous();
}

}  // namespace
}  // namespace dss_fast
