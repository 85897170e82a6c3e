// The step on the CPU: every tensor is streamed through once, the sums live in a block of accumulators.
#include <Python.h>

#include "step_rows.h"

#include <torch/library.h>

namespace dss_fast {
namespace {

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
    alignas(64) A state[kBlock], uncond[kBlock], cond[kBlock], mixed[kBlock], y[kBlock], total[kBlock];
    if (!step.active) {
      if (outs.data != xs.data) std::memcpy(outs.at(b, first), xs.at(b, first), (last - first) * xs.width);
      for (int64_t j = 0; fresh && j < s.slots; ++j)
        std::memcpy(next.at(b, first, j), hs.at(b, first, j), (last - first) * hs.width);
      return;
    }
    c10::SmallVector<int64_t, 32> read;
    for (int64_t j = 0; j < s.slots; ++j)
      if ((j < step.i || j == s.steps) && step.w[kScalars + j] != 0) read.push_back(j);
    const auto groups = std::max<int64_t>(1, (read.size() + kGroup - 1) / kGroup);
    int64_t n;
    for (auto e = first; e < last; e += n) {
      n = s.block(e, last);
      const A* xp = xs.read(k, b, e, n, state);
      const A* mp = ms.read(k, b, e, n, uncond);
      if (s.pair) {
        k.combine(mp, ms.read(k, b + s.batch, e, n, cond), e < s.guided ? step.g : A(1), mixed, n);
        mp = mixed;
      }
      for (int64_t group = 0, r = 0; group < groups; ++group) {
        const void* slots[kGroup];
        A wanted[kGroup];
        int count = 0;
        for (const int64_t end = read.size() * (group + 1) / groups; r < end; ++r, ++count) {
          slots[count] = hs.at(b, e, read[r]);
          wanted[count] = step.w[kScalars + read[r]];
        }
        if (group == 0)
          k.step[hs.kind](xp, mp, step.head, slots, wanted, count, y, total, n);
        else
          k.sum[hs.kind](slots, wanted, count, total, n);
      }
      next.write(k, y, b, e, n, stream_y, step.i);
      outs.write(k, total, b, e, n, stream_x);
      for (int64_t j = 0; fresh && j < s.slots; ++j)
        if (j != step.i) copy_block(k, hs.at(b, e, j), next.at(b, e, j), n * hs.width, stream_y);
    }
  });
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
  auto out = fresh(x.sizes(), x.options());
  auto next = fresh(history.sizes(), history.options());
  if (x.numel() == 0) return {out, next};
  const auto go = x.scalar_type() == at::kDouble ? forward<double> : forward<float>;
  go(s, *x.expect_contiguous(), *output.expect_contiguous(), samples_contiguous(history), *weights.expect_contiguous(),
     *index.expect_contiguous(), next, out);
  return {out, next};
}

}  // namespace

TORCH_LIBRARY_IMPL(dss_fast, CPU, m) {
  m.impl("multistep_step", step_functional);
  m.impl("multistep_step_", step_inplace);
}

}  // namespace dss_fast

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  for (auto fill : dss_fast::ModulePart::parts()) fill(module);
  return module;
}
