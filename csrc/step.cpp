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
  const bool fresh = !history_next.is_same(history);  // a new history is the old one with slot i replaced
  const int64_t bytes = 2 * x.nbytes() + output.nbytes() + (1 + fresh) * history.nbytes();
  const bool large = bytes > kLargeBytes, in_place = out.const_data_ptr() == x.const_data_ptr();
  const Rows xs(x, "x", large), ms(output, "output", large), hs(history, "history", large),
      next(history_next, "history", large), outs(out, "out", large && !in_place);

  for_blocks(s, bytes, [&](int64_t b, int64_t e, int64_t n, int64_t) {
    const Step<A> step(s, weights, index, b);
    alignas(64) A state[kBlock], uncond[kBlock], cond[kBlock], mixed[kBlock], y_buffer[kBlock], total_buffer[kBlock];
    A* y = step.active ? next.target(b, e, y_buffer, step.i) : y_buffer;
    A* total = in_place ? total_buffer : outs.target(b, e, total_buffer);
    const A* xp = xs.read(b, e, n, state);
    if (step.active) {
      const A* mp = ms.read(b, e, n, uncond);
      if (s.pair) {
        mix_twice(A(-1), mp, A(1), ms.read(b + s.batch, e, n, cond), y, A(1), step.g, mixed, n);
        mp = mixed;
      }
      mix_twice(step.p, xp, step.q, mp, y, step.a, step.w[step.i], total, n);
      WeightedSlots<A> past;
      for (int64_t j = 0; j < s.slots; ++j)
        if ((j < step.i || j == s.steps) && step.w[j] != 0) past.push(step.w[j], hs.fetch(b, e, n, j));
      past.add_to(total, hs, n);
      next.write(y, b, e, n, step.i);
    }
    outs.write(step.active ? total : xp, b, e, n);
    for (int64_t j = 0; fresh && j < s.slots; ++j)
      if (!step.active || j != step.i) next.copy(hs.at(b, e, j), next.at(b, e, j), n);
  });
}

void step_inplace(const at::Tensor& x, const at::Tensor& output, at::Tensor& history, const at::Tensor& weights,
                  const at::Tensor& index, at::Tensor& out) {
  const auto s = check(x, output, history, weights, index);
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
                                                   const at::Tensor& index) {
  const auto s = check(x, output, history, weights, index);
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
