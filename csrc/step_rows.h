// What the CPU's forward and backward passes share: tensors as rows of blocks, the scalars of a row's step, the
// checks, and the cut into chunks. A row is cut into fixed blocks that stay in the first-level cache, so that the same
// row gives the same bits in any batch and on any number of threads.
#pragma once

#include "step.h"
#include "step_loops.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dss_fast {
namespace {

constexpr int64_t kBlock = 512;              // elements that stay in the cache: 6 float blocks are 12 KB of 32
// Rows from 4 MB on, which come from memory, take shorter ones: the processor's prefetcher then follows all streams,
// and the step takes 0.85 times as long. In the cache the short ones take 1.4 times as long.
constexpr int64_t kShortBlock = 128, kLongRow = 1 << 20;
constexpr int64_t kChunk = 16 * kBlock;      // elements a thread takes at a time, with one partial sum of a gradient
constexpr int64_t kSerialBytes = 512 << 10;  // below this, waking a second thread costs more than it brings
constexpr int64_t kLargeBytes = 12 << 20;    // above this, results leave the cache before anyone reads them

// A new tensor. Large ones ask for pages of 2 MB: with pages of 4 KB the page faults of a 190 MB history take 2.5 times
// as long as the step itself.
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

// A tensor as rows of bytes, read or written a block at a time. One without data stands for a result that is not asked for.
struct Rows {
  char* data = nullptr;
  int64_t row = 0, slot = 0, width = 0;  // bytes; width is one element's
  at::ScalarType type = at::kFloat;
  bool large = false;  // reads fetch the next block ahead, writes go past the cache

  Rows() = default;
  Rows(const at::Tensor& t, const char* name, bool large)
      : data(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))), row(t.stride(0) * t.element_size()),
        slot(t.dim() > 1 ? t.stride(1) * t.element_size() : 0), width(t.element_size()), type(t.scalar_type()),
        large(large) {
    TORCH_CHECK_TYPE(type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, name,
                     " is ", type, "; allowed are float64, float32, bfloat16 and float16");
  }

  // Where a block starts. A processor's own prefetcher gives up on a dozen tensors read 2 KB at a time, which took 1.1
  // to 1.6 times as long.
  char* at(int64_t b, int64_t e, int64_t j = 0) const { return data + b * row + j * slot + e * width; }
  char* fetch(int64_t b, int64_t e, int64_t n, int64_t j = 0) const {
    char* block = at(b, e, j);
    for (int64_t byte = 0; large && byte < n * width; byte += 64)
      __builtin_prefetch(block + kBlock * width + byte, /*write=*/0, /*second level=*/2);
    return block;
  }

  // f(pointer to the block in its own dtype)
  template <class F>
  void visit(char* block, const F& f) const {
    switch (type) {
      case at::kDouble: return f(reinterpret_cast<double*>(block));
      case at::kFloat: return f(reinterpret_cast<float*>(block));
      case at::kBFloat16: return f(reinterpret_cast<at::BFloat16*>(block));
      default: return f(reinterpret_cast<at::Half*>(block));
    }
  }

  // The block as accumulators: itself where the dtype is already right, else converted into `buffer`.
  template <class A>
  const A* read(int64_t b, int64_t e, int64_t n, A* buffer, int64_t j = 0) const {
    char* block = fetch(b, e, n, j);
    if (type == c10::CppTypeToScalarType<A>::value) return reinterpret_cast<const A*>(block);
    visit(block, [&](const auto* from) { convert(from, buffer, n); });
    return buffer;
  }

  // Where to compute what `write` is then given: in place where that is as good, else in `buffer`.
  template <class A>
  A* target(int64_t b, int64_t e, A* buffer, int64_t j = 0) const {
    const bool in_place = data && !large && type == c10::CppTypeToScalarType<A>::value;
    return in_place ? reinterpret_cast<A*>(at(b, e, j)) : buffer;
  }

  template <class A>
  void write(const A* block, int64_t b, int64_t e, int64_t n, int64_t j = 0) const {
    if (!data) return;
    if (type == c10::CppTypeToScalarType<A>::value) return copy(block, at(b, e, j), n);
    alignas(64) char staged[kBlock * sizeof(double)];
    visit(large ? staged : at(b, e, j), [&](auto* to) { convert(block, to, n); });
    if (large) stream(staged, at(b, e, j), n * width);
  }

  void copy(const void* from, void* to, int64_t n) const {
    if (large)
      stream(from, to, n * width);
    else if (from != to)
      std::memcpy(to, from, n * width);
  }
};

// The weighted blocks of a history, added up to 10 at a time.
template <class A>
struct WeightedSlots {
  c10::SmallVector<char*, 32> blocks;
  c10::SmallVector<A, 32> weights;

  void push(A weight, char* block) {
    weights.push_back(weight);
    blocks.push_back(block);
  }

  void add_to(A* total, const Rows& rows, int64_t n) const {
    const int64_t count = blocks.size(), groups = (count + 9) / 10;
    for (int64_t group = 0; group < groups; ++group) {
      const auto first = count * group / groups, last = count * (group + 1) / groups;
      rows.visit(blocks[first], [&](auto* block) {
        const auto slots = reinterpret_cast<const decltype(block)*>(&blocks[first]);
        const A* w = &weights[first];
        switch (last - first) {
          case 1: return add<1>(w, slots, total, n);
          case 2: return add<2>(w, slots, total, n);
          case 3: return add<3>(w, slots, total, n);
          case 4: return add<4>(w, slots, total, n);
          case 5: return add<5>(w, slots, total, n);
          case 6: return add<6>(w, slots, total, n);
          case 7: return add<7>(w, slots, total, n);
          case 8: return add<8>(w, slots, total, n);
          case 9: return add<9>(w, slots, total, n);
          case 10: return add<10>(w, slots, total, n);
        }
      });
    }
  }
};

struct Shape {
  int64_t batch, size, slots, steps, columns;
  bool pair, per_row, index_per_row;
  bool added() const { return slots > steps + 1; }  // whether the last N slots hold the e_j
  int64_t chunks() const { return (size + kChunk - 1) / kChunk; }
};

// The scalars of one row at its own step.
template <class A>
struct Step {
  Step(const Shape& s, const at::Tensor& weights, const int64_t* index, int64_t b)
      : i(index[s.index_per_row ? b : 0]), active(i >= 0 && i < s.steps),
        table(weights.const_data_ptr<A>() + (s.per_row ? b * s.steps * s.columns : 0)),
        row(table + (active ? i * s.columns : 0)), a(row[kA]), p(row[kP]), q(row[kQ]), g(row[kGuidance]), w(row + kHistory) {}

  int64_t i;
  bool active;
  const A *table, *row;
  A a, p, q, g;
  const A* w;
};

// What the step, its list form and the pull have in common; `state` is a tensor of the state's dtype and shape.
Shape check_weights(const at::Tensor& state, int64_t slots, const at::Tensor& weights, bool pair) {
  const auto batch = state.size(0);
  TORCH_CHECK_VALUE(weights.dim() == 3 && (weights.size(0) == 1 || weights.size(0) == batch) &&
                        weights.size(2) == kHistory + slots &&
                        fits(weights.size(1), slots),
                    "weights ", weights.sizes(), " do not fit a batch of ", batch, " and a history of ", slots,
                    " slots: N steps take (1 or batch, N, ", kHistory, " + slots) with N slots, N + 1 when the last one holds "
                    "the initial noise, or 2 N + 1");
  const auto wanted = state.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(weights.scalar_type() == wanted, "weights are ", weights.scalar_type(), "; a ",
                    state.scalar_type(), " state needs ", wanted, ", use weights.to(...)");
  return {batch, c10::multiply_integers(state.sizes().slice(1)), slots, weights.size(1), weights.size(2), pair,
          weights.size(0) != 1, false};
}

Shape check_index(Shape s, const at::Tensor& index) {
  TORCH_CHECK_VALUE(
      index.scalar_type() == at::kLong && index.dim() == 1 && (index.size(0) == 1 || index.size(0) == s.batch),
      "index is ", index.scalar_type(), " ", index.sizes(), "; needed is int64 of shape (1,) or (", s.batch, ",)");
  s.index_per_row = index.size(0) != 1;
  return s;
}

void check_output(const at::Tensor& x, const at::Tensor& output) {
  TORCH_CHECK_VALUE(x.dim() > 0, "x has no batch dimension; needed is (batch, *sample)");
  const auto batch = x.size(0);
  TORCH_CHECK_VALUE(output.dim() == x.dim() && (output.size(0) == batch || output.size(0) == 2 * batch) &&
                        output.sizes().slice(1) == x.sizes().slice(1),
                    "output has shape ", output.sizes(), "; x ", x.sizes(), " allows the same, or, guided, ",
                    2 * batch, " rows with the unconditional ones first");
}

Shape check_list(const at::Tensor& x, const at::Tensor& output, at::TensorList history, const at::Tensor& weights,
                 int64_t step) {
  check_output(x, output);
  const auto s = check_weights(x, weights.dim() == 3 ? weights.size(2) - kHistory : 0, weights,
                               output.size(0) != x.size(0));
  TORCH_CHECK_VALUE(step >= 0 && step < s.steps, "step is ", step, "; weights ", weights.sizes(),
                    " are for the steps 0 to ", s.steps - 1);
  const int64_t wanted = step + (s.slots > s.steps) + (step + 1) * s.added(), given = history.size();
  TORCH_CHECK_VALUE(given == wanted, "history holds ", given, " tensors; step ", step, " with weights ",
                    weights.sizes(), " takes the ", step, " predictions before it",
                    s.slots > s.steps ? ", the initial noise behind them," : "",
                    s.added() ? " then what guidance added at each and here, " : " ", wanted, " in all");
  for (int64_t j = 0; j < given; ++j)
    TORCH_CHECK_VALUE(history[j].sizes() == x.sizes() && history[j].scalar_type() == history[0].scalar_type(),
                      "history[", j, "] is ", history[j].scalar_type(), " ", history[j].sizes(), "; needed is ",
                      history[0].scalar_type(), " ", x.sizes(), " like x and like the rest of the history");
  return s;
}

// A list's tensors, contiguous, as rows, and which of a row's weights is the k-th's: behind the predictions' stand the
// initial noise's and the e_j's.
std::vector<at::Tensor> contiguous(at::TensorList list) {
  std::vector<at::Tensor> all;
  for (const auto& t : list) all.push_back(t.contiguous());
  return all;
}

std::vector<Rows> rows_of(const std::vector<at::Tensor>& list, bool large) {
  std::vector<Rows> all;
  for (const auto& t : list) all.emplace_back(t, "history", large);
  return all;
}

int64_t column(const Shape& s, int64_t step, int64_t k) { return k < step ? k : s.steps + k - step; }

// body(row, first element, count, number of the chunk) for every block of every row; `bytes` are moved in all.
template <class Body>
void for_blocks(const Shape& s, int64_t bytes, const Body& body) {
  const auto chunks = s.chunks(), total = s.batch * chunks, block = s.size < kLongRow ? kBlock : kShortBlock;
  auto run = [&](int64_t begin, int64_t end) {
    for (auto c = begin; c < end; ++c) {
      const auto last = std::min((c % chunks + 1) * kChunk, s.size);
      for (auto e = c % chunks * kChunk; e < last; e += block) body(c / chunks, e, std::min(block, last - e), c);
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
