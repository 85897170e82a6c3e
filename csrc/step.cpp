// The step on the CPU. A row is cut into fixed blocks that stay in the first-level cache: every tensor is streamed
// through once, the sums live in a block of accumulators, and the same row gives the same bits in any batch and on
// any number of threads. The inner loops are plain C++, compiled for three instruction sets, picked at run time.
#include <Python.h>

#include "step.h"
#include "step_loops.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dss_fast {
namespace {

constexpr int64_t kBlock = 1024;             // elements in cache at a time: 5 float blocks are 20 KB of 32
constexpr int64_t kChunk = 8 * kBlock;       // elements a thread takes at a time, and one partial sum of a gradient
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

// `stream` writes past the cache: a large result is not worth the read that an ordinary store begins with.
void copy_block(const char* from, char* to, int64_t bytes, bool stream) {
#if defined(__x86_64__)
  if (stream && reinterpret_cast<uintptr_t>(to) % 16 == 0 && bytes % 16 == 0) {
    for (int64_t i = 0; i < bytes; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    return;
  }
#endif
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

  // Calls for the block after this one: the hardware starts anew in each of a dozen streams every 4 KB.
  void prefetch(int64_t b, int64_t e, int64_t n, int64_t j = 0) const {
    const char* after = at(b, e + n, j);
    for (int64_t i = 0; i < n * width; i += 64) __builtin_prefetch(after + i, 0, 2);
  }

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
      return copy_block(same ? reinterpret_cast<const char*>(block) : staged, to, n * width, stream);
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
  A head[5];       // a, p, q, g, w_ii
  A unguided[5];   // the same with g = 1

  Step(const A* weights, int64_t steps, int64_t columns, bool per_row, const int64_t* index, bool index_per_row,
       int64_t b)
      : i(index[index_per_row ? b : 0]), active(i >= 0 && i < steps) {
    w = weights + (per_row ? b : 0) * steps * columns + (active ? i : 0) * columns;
    for (int c = 0; c < kScalars; ++c) head[c] = w[c];
    head[4] = w[kScalars + (active ? i : 0)];
    std::copy(head, head + 5, unguided);
    unguided[3] = 1;
  }
};

struct Shape {
  int64_t batch, size, slots, steps, columns, guided;
  bool pair, per_row, index_per_row;
  int64_t chunks() const { return (size + kChunk - 1) / kChunk; }
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

// The first `n` elements from `e` fall into guided ones, then unguided ones: call part(offset, count, scalars) for each.
template <class A, class Part>
void split(const Step<A>& step, int64_t guided, int64_t e, int64_t n, const Part& part) {
  const auto count = std::clamp<int64_t>(guided - e, 0, n);
  if (count) part(0, count, step.head);
  if (count < n) part(count, n - count, step.unguided);
}

template <class A>
void forward(const Shape& s, const at::Tensor& x, const at::Tensor& output, const at::Tensor& history,
             const at::Tensor& weights, const at::Tensor& index, const at::Tensor& history_next,
             const at::Tensor& out) {
  const auto& k = kernels<A>();
  const Rows xs(x, "x"), ms(output, "output"), hs(history, "history", true), next(history_next, "history", true),
      outs(out, "out");
  const bool fresh = next.data != hs.data;  // a new history is the old one with slot i replaced
  const A* w = weights.const_data_ptr<A>();
  const int64_t* at = index.const_data_ptr<int64_t>();
  const int64_t bytes =
      s.batch * s.size * (2 * xs.width + (s.pair ? 2 : 1) * ms.width + (s.slots + 1 + fresh * s.slots) * hs.width);
  const bool stream_y = bytes > kStreamBytes, stream_x = stream_y && xs.data != outs.data;

  for_chunks(s, bytes, [&](int64_t b, int64_t first, int64_t last, int64_t) {
    const Step<A> step(w, s.steps, s.columns, s.per_row, at, s.index_per_row, b);
    alignas(64) A state[kBlock], uncond[kBlock], cond[kBlock], y[kBlock], total[kBlock];
    if (!step.active) {
      if (outs.data != xs.data) std::memcpy(outs.at(b, first), xs.at(b, first), (last - first) * xs.width);
      for (int64_t j = 0; fresh && j < s.slots; ++j)
        std::memcpy(next.at(b, first, j), hs.at(b, first, j), (last - first) * hs.width);
      return;
    }
    c10::SmallVector<int64_t, 32> read;
    for (int64_t j = 0; j < s.slots; ++j)
      if ((j < step.i || j == s.steps) && step.w[kScalars + j] != 0) read.push_back(j);
    for (auto e = first; e < last; e += kBlock) {
      const auto n = std::min(kBlock, last - e);
      const A* xp = xs.read(k, b, e, n, state);
      const A* up = ms.read(k, b, e, n, uncond);
      const A* cp = s.pair ? ms.read(k, b + s.batch, e, n, cond) : nullptr;
      if (stream_y) {
        for (auto j : read) hs.prefetch(b, e, n, j);
        xs.prefetch(b, e, n), ms.prefetch(b, e, n);
        if (s.pair) ms.prefetch(b + s.batch, e, n);
      }
      split(step, s.guided, e, n, [&](int64_t o, int64_t count, const A* scalars) {
        k.begin(xp + o, up + o, cp ? cp + o : nullptr, scalars, y + o, total + o, count);
      });
      next.write(k, y, b, e, n, stream_y, step.i);
      for (size_t r = 0; r < read.size(); r += kGroup) {
        const void* slots[kGroup];
        A wanted[kGroup];
        const int count = static_cast<int>(std::min<size_t>(kGroup, read.size() - r));
        for (int g = 0; g < count; ++g) {
          slots[g] = hs.at(b, e, read[r + g]);
          wanted[g] = step.w[kScalars + read[r + g]];
        }
        k.sum[hs.kind](total, slots, wanted, count, n);
      }
      outs.write(k, total, b, e, n, stream_x);
      for (int64_t j = 0; fresh && j < s.slots; ++j)
        if (j != step.i) copy_block(hs.at(b, e, j), next.at(b, e, j), n * hs.width, stream_y);
    }
  });
}

template <class A>
void backward(const Shape& s, const at::Tensor& grad, const at::Tensor& grad_next, const at::Tensor& x,
              const at::Tensor& output, const at::Tensor& history, const at::Tensor& weights, const at::Tensor& index,
              const Rows& dxs, const Rows& dms, const Rows& dhs, A* grad_row) {
  const auto& k = kernels<A>();
  const Rows gs(grad, "grad_x_next"), xs(x, "x"), ms(output, "output"), hs(history, "history", true);
  const Rows laters = grad_next.defined() ? Rows(grad_next, "grad_history_next", true) : Rows();
  const A* w = weights.const_data_ptr<A>();
  const int64_t* at = index.const_data_ptr<int64_t>();
  const auto columns = s.columns;
  const int64_t bytes = 2 * s.batch * s.size * (2 * xs.width + (s.pair ? 2 : 1) * ms.width + s.slots * hs.width);
  const bool stream = bytes > kStreamBytes;
  std::vector<double> partial(s.batch * s.chunks() * columns);

  for_chunks(s, bytes, [&](int64_t b, int64_t first, int64_t last, int64_t chunk) {
    const Step<A> step(w, s.steps, columns, s.per_row, at, s.index_per_row, b);
    alignas(64) A g[kBlock], gy[kBlock], state[kBlock], uncond[kBlock], cond[kBlock];
    alignas(64) A dx[kBlock], du[kBlock], dc[kBlock];
    double* row = partial.data() + chunk * columns;
    for (auto e = first; e < last; e += kBlock) {
      const auto n = std::min(kBlock, last - e);
      const A* gp = gs.read(k, b, e, n, g);
      if (!step.active) {
        std::fill(du, du + n, A(0));
        if (dxs) dxs.write(k, gp, b, e, n, stream);
        if (dms) dms.write(k, du, b, e, n, stream);
        if (dms && s.pair) dms.write(k, du, b + s.batch, e, n, stream);
        for (int64_t j = 0; dhs && j < s.slots; ++j)
          dhs.write(k, laters ? laters.read(k, b, e, n, dx, j) : du, b, e, n, stream, j);
        continue;
      }
      const A* yp = laters ? laters.read(k, b, e, n, gy, step.i) : nullptr;
      const A* xp = xs.read(k, b, e, n, state);
      const A* up = ms.read(k, b, e, n, uncond);
      const A* cp = s.pair ? ms.read(k, b + s.batch, e, n, cond) : nullptr;
      split(step, s.guided, e, n, [&](int64_t o, int64_t count, const A* scalars) {
        double sums[5] = {};
        k.begin_backward(xp + o, up + o, cp ? cp + o : nullptr, gp + o, yp ? yp + o : nullptr, scalars, dx + o, du + o,
                         dc + o, sums, count);
        row[0] += sums[0], row[1] += sums[1], row[2] += sums[2], row[kScalars + step.i] += sums[4];
        if (cp && scalars == step.head) row[3] += sums[3];
      });
      if (stream) {
        gs.prefetch(b, e, n), xs.prefetch(b, e, n), ms.prefetch(b, e, n);
        for (int64_t j = 0; j < step.i; ++j) hs.prefetch(b, e, n, j);
      }
      if (dxs) dxs.write(k, dx, b, e, n, stream);
      if (dms) dms.write(k, du, b, e, n, stream);
      if (dms && s.pair) dms.write(k, dc, b + s.batch, e, n, stream);
      std::fill(du, du + n, A(0));
      for (int64_t j = 0; j < s.slots; ++j) {
        const bool past = j < step.i || j == s.steps;
        const A* later = dhs && laters && j != step.i ? laters.read(k, b, e, n, gy, j) : nullptr;
        if (past && (grad_row || dhs))
          row[kScalars + j] +=
              k.history_backward[hs.kind](hs.at(b, e, j), gp, later, step.w[kScalars + j], dx, n);
        if (dhs) dhs.write(k, past ? dx : later ? later : du, b, e, n, stream, j);
      }
    }
  });

  for (int64_t b = 0; grad_row && b < s.batch; ++b) {
    for (int64_t c = 0; c < columns; ++c) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < s.chunks(); ++chunk) sum += partial[(b * s.chunks() + chunk) * columns + c];
      grad_row[b * columns + c] = static_cast<A>(sum);
    }
  }
}

template <class A>
void pull(const Shape& s, const at::Tensor& adjoints, const at::Tensor& weights, const at::Tensor& index,
          const at::Tensor& grad_x, const at::Tensor& grad_output) {
  const auto& k = kernels<A>();
  const Rows gs(adjoints, "adjoints", true), dxs(grad_x, "adjoints"), dms(grad_output, "adjoints");
  const A* w = weights.const_data_ptr<A>();
  const int64_t* at = index.const_data_ptr<int64_t>();
  const int64_t bytes = s.batch * s.size * gs.width * (s.steps + (s.pair ? 3 : 2));
  const bool stream = bytes > kStreamBytes;

  for_chunks(s, bytes, [&](int64_t b, int64_t first, int64_t last, int64_t) {
    const Step<A> step(w, s.steps, s.columns, s.per_row, at, s.index_per_row, b);
    const A* rows = w + (s.per_row ? b : 0) * s.steps * s.columns;
    alignas(64) A own[kBlock], pulled[kBlock], dx[kBlock], du[kBlock], dc[kBlock];
    for (auto e = first; e < last; e += kBlock) {
      const auto n = std::min(kBlock, last - e);
      std::fill(pulled, pulled + n, A(0));
      std::fill(dx, dx + n, A(0));
      const void* slots[kGroup];
      A wanted[kGroup];
      int count = 0;
      for (int64_t i = step.active ? step.i : s.steps; i < s.steps; ++i) {
        const A weight = rows[i * s.columns + kScalars + step.i];
        if (weight != 0) slots[count] = gs.at(b, e, i), wanted[count++] = weight;
        if (count == kGroup || (count && i + 1 == s.steps)) {
          k.sum[gs.kind](pulled, slots, wanted, count, n);
          count = 0;
        }
      }
      if (step.active) {
        const A* gp = gs.read(k, b, e, n, own, step.i);
        for (int64_t o = 0; o < n; ++o) dx[o] = step.head[0] * gp[o] + step.head[1] * pulled[o];
      }
      split(step, s.guided, e, n, [&](int64_t o, int64_t c, const A* scalars) {
        const A q = step.active ? scalars[2] : 0, g = scalars[3];
        for (auto i = o; i < o + c; ++i) {
          du[i] = s.pair ? (1 - g) * (q * pulled[i]) : q * pulled[i];
          dc[i] = g * (q * pulled[i]);
        }
      });
      dxs.write(k, dx, b, e, n, stream);
      dms.write(k, du, b, e, n, stream);
      if (s.pair) dms.write(k, dc, b + s.batch, e, n, stream);
    }
  });
}

// A history may be a slice of a larger one as long as every sample is contiguous.
at::Tensor samples_contiguous(const at::Tensor& t) {
  if (t.is_contiguous() || t.select(0, 0).select(0, 0).is_contiguous()) return t;
  return t.contiguous();
}

void step_inplace(const at::Tensor& x, const at::Tensor& output, at::Tensor& history,
                            const at::Tensor& weights, const at::Tensor& index, int64_t guided, at::Tensor& out) {
  const auto s = check(x, output, history, weights, index, guided);
  TORCH_CHECK_VALUE(out.sizes() == x.sizes() && out.scalar_type() == x.scalar_type(), "out is ", out.scalar_type(), " ",
                    out.sizes(), "; needed is ", x.scalar_type(), " ", x.sizes(), " like x");
  if (x.numel() == 0) return;
  const auto slots = samples_contiguous(history);
  const auto target = out.is_contiguous() ? out : at::empty(out.sizes(), out.options());
  const auto go = x.scalar_type() == at::kDouble ? forward<double> : forward<float>;
  go(s, *x.expect_contiguous(), *output.expect_contiguous(), slots, *weights.expect_contiguous(),
     *index.expect_contiguous(), slots, target);
  if (!slots.is_same(history)) history.copy_(slots);
  if (!target.is_same(out)) out.copy_(target);
}

std::tuple<at::Tensor, at::Tensor> step_functional(const at::Tensor& x, const at::Tensor& output,
                                                  const at::Tensor& history, const at::Tensor& weights,
                                                  const at::Tensor& index, int64_t guided) {
  const auto s = check(x, output, history, weights, index, guided);
  auto out = at::empty(x.sizes(), x.options());
  auto next = at::empty(history.sizes(), history.options());
  if (x.numel() == 0) return {out, next};
  const auto go = x.scalar_type() == at::kDouble ? forward<double> : forward<float>;
  go(s, *x.expect_contiguous(), *output.expect_contiguous(), samples_contiguous(history), *weights.expect_contiguous(),
     *index.expect_contiguous(), next, out);
  return {out, next};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> step_backward(
    const at::Tensor& grad_x_next, const std::optional<at::Tensor>& grad_next, const at::Tensor& x,
    const at::Tensor& output, const at::Tensor& history, const at::Tensor& weights, const at::Tensor& index,
    int64_t guided, int64_t needs) {
  const auto s = check(x, output, history, weights, index, guided);
  auto like = [&](const at::Tensor& t, int bit) {
    return needs >> bit & 1 ? at::empty(t.sizes(), t.options()) : at::empty({0}, t.options());
  };
  auto dx = like(x, 0), dm = like(output, 1), dh = like(history, 2);
  auto row = needs >> 3 & 1 ? at::zeros({s.batch, s.columns}, weights.options()) : at::empty({0}, weights.options());
  if (x.numel() == 0) return {dx, dm, dh, row};
  const auto later = grad_next && grad_next->defined() ? grad_next->contiguous() : at::Tensor();
  auto go = [&](auto zero) {
    using A = decltype(zero);
    backward<A>(s, *grad_x_next.expect_contiguous(), later, *x.expect_contiguous(), *output.expect_contiguous(),
                samples_contiguous(history), *weights.expect_contiguous(), *index.expect_contiguous(),
                needs & 1 ? Rows(dx, "x") : Rows(), needs & 2 ? Rows(dm, "output") : Rows(),
                needs & 4 ? Rows(dh, "history", true) : Rows(), needs & 8 ? row.mutable_data_ptr<A>() : nullptr);
  };
  x.scalar_type() == at::kDouble ? go(double()) : go(float());
  return {dx, dm, dh, row};
}

std::tuple<at::Tensor, at::Tensor> step_pull(const at::Tensor& adjoints, const at::Tensor& weights,
                                                  const at::Tensor& index, bool pair, int64_t guided) {
  TORCH_CHECK_VALUE(adjoints.dim() >= 2, "adjoints have shape ", adjoints.sizes(),
                    "; needed is (batch, steps, *sample)");
  const auto slot = adjoints.select(1, 0);
  auto sizes = slot.sizes().vec();
  auto dx = at::empty(sizes, adjoints.options());
  sizes[0] *= pair ? 2 : 1;
  auto dm = at::empty(sizes, adjoints.options());
  const auto steps = adjoints.size(1), columns = weights.dim() == 3 ? weights.size(2) : 0;
  const auto s = check_weights(dx, columns == kScalars + steps + 1 ? steps + 1 : steps, weights, index, guided, pair);
  TORCH_CHECK_VALUE(s.steps == steps, "weights are for ", s.steps, " steps and adjoints hold ", steps);
  if (adjoints.numel() == 0) return {dx, dm};
  const auto go = adjoints.scalar_type() == at::kDouble ? pull<double> : pull<float>;
  go(s, samples_contiguous(adjoints), *weights.expect_contiguous(), *index.expect_contiguous(), dx, dm);
  return {dx, dm};
}

}  // namespace

TORCH_LIBRARY_IMPL(dss_fast, CPU, m) {
  m.impl("multistep_step", step_functional);
  m.impl("multistep_step_", step_inplace);
  m.impl("multistep_step_backward", step_backward);
  m.impl("multistep_pull", step_pull);
}

}  // namespace dss_fast

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  for (auto fill : dss_fast::ModulePart::parts()) fill(module);
  return module;
}
