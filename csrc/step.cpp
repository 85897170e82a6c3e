// The step on the CPU. Every tensor passes through once; the sums live in a block of accumulators.
#include "step_rows.h"

#include <torch/library.h>

namespace dss_fast {
namespace {

// The slots that a row's step reads, and where its own y goes: a stacked history, or a list and a new tensor.
struct Slots {
  std::vector<Rows> past;  // a stacked history has one for all slots, a list one each
  Rows own;
  bool stacked;

  template <class A>
  void weigh(const Shape& s, const Step<A>& step, int64_t b, int64_t e, int64_t n, WeightedSlots<A>& sum) const {
    if (stacked) {
      for (int64_t j = 0; j < s.slots; ++j)
        if ((j < step.i || j == s.steps || (j > s.steps && j - s.steps - 1 < step.i)) && step.w[j] != 0)
          sum.push(step.w[j], past[0].fetch(b, e, n, j));
    } else {
      for (size_t k = 0; k < past.size(); ++k)
        if (const A w = step.w[column(s, step.i, k)]; w != 0) sum.push(w, past[k].fetch(b, e, n));
    }
  }
};

// m = m_uncond + g (m_cond - m_uncond), y = p x + q m, x_{i+1} = a x + sum_j w_ij y_j, a block at a time.
template <class A>
void forward(const Shape& s, int64_t bytes, const Rows& xs, const Rows& ms, const Slots& slots, const Rows& outs,
             const at::Tensor& weights, const int64_t* index) {
  const bool in_place = outs.data == xs.data;
  for_blocks(s, bytes, [&](int64_t b, int64_t e, int64_t n, int64_t) {
    const Step<A> step(s, weights, index, b);
    alignas(64) A state[kBlock], uncond[kBlock], cond[kBlock], mixed[kBlock], y_buffer[kBlock], total_buffer[kBlock];
    const A* xp = xs.read(b, e, n, state);
    if (!step.active) return outs.write(xp, b, e, n);
    const int64_t at = slots.stacked ? step.i : 0;
    A* y = slots.own.target(b, e, y_buffer, at);
    A* total = in_place ? total_buffer : outs.target(b, e, total_buffer);
    const A* mp = ms.read(b, e, n, uncond);
    const bool adds = slots.stacked && s.added();
    alignas(64) A added[kBlock];
    if (adds) std::fill_n(added, n, A(0));
    if (s.pair) {
      mix_twice(A(-1), mp, A(1), ms.read(b + s.batch, e, n, cond), y, A(1), step.g, mixed, n);
      if (adds) scale(step.q * (step.g - 1), y, added, n);  // where y will stand now stands the difference
      mp = mixed;
    }
    mix_twice(step.p, xp, step.q, mp, y, step.a, step.w[step.i], total, n);
    if (adds) {
      const A* own[] = {added};
      if (const A w = step.w[s.steps + 1 + step.i]; w != 0) add<1>(&w, own, total, n);
      slots.own.write(added, b, e, n, s.steps + 1 + step.i);
    }
    WeightedSlots<A> past;
    slots.weigh(s, step, b, e, n, past);
    past.add_to(total, slots.past.empty() ? slots.own : slots.past[0], n);
    slots.own.write(y, b, e, n, at);
    outs.write(total, b, e, n);
  });
}

Shape check(const at::Tensor& x, const at::Tensor& output, const at::Tensor& history, const at::Tensor& weights,
            const at::Tensor& index) {
  check_output(x, output);
  TORCH_CHECK_VALUE(history.dim() == x.dim() + 1 && history.size(0) == x.size(0) &&
                        history.sizes().slice(2) == x.sizes().slice(1),
                    "history has shape ", history.sizes(), "; x ", x.sizes(), " needs (batch, slots, *sample)");
  return check_index(check_weights(x, history.size(1), weights, output.size(0) != x.size(0)), index);
}

void step_inplace(const at::Tensor& x, const at::Tensor& output, at::Tensor& history, const at::Tensor& weights,
                  const at::Tensor& index, at::Tensor& out) {
  const auto s = check(x, output, history, weights, index);
  TORCH_CHECK_VALUE(out.sizes() == x.sizes() && out.scalar_type() == x.scalar_type(), "out is ", out.scalar_type(), " ",
                    out.sizes(), "; needed is ", x.scalar_type(), " ", x.sizes(), " like x");
  if (x.numel() == 0) return;
  const auto stored = samples_contiguous(history);
  const auto target = out.is_contiguous() ? out : at::empty(out.sizes(), out.options());
  const auto state = x.expect_contiguous(), model = output.expect_contiguous(), table = weights.expect_contiguous(),
             at = index.expect_contiguous();
  const int64_t bytes = 2 * x.nbytes() + output.nbytes() + history.nbytes();
  const bool large = bytes > kLargeBytes;
  const auto go = [&](auto zero) {
    using A = decltype(zero);
    const Rows xs(*state, "x", large), rows(stored, "history", large);
    const Rows outs(target, "out", large && target.const_data_ptr() != state->const_data_ptr());
    forward<A>(s, bytes, xs, Rows(*model, "output", large), Slots{{rows}, rows, true}, outs, *table,
               at->const_data_ptr<int64_t>());
  };
  x.scalar_type() == at::kDouble ? go(double()) : go(float());
  if (!stored.is_same(history)) history.copy_(stored);
  if (!target.is_same(out)) out.copy_(target);
}

std::tuple<at::Tensor, at::Tensor> update(const at::Tensor& x, const at::Tensor& output, at::TensorList history,
                                          const at::Tensor& weights, int64_t step) {
  const auto s = check_list(x, output, history, weights, step);
  auto out = fresh(x.sizes(), x.options());
  auto y = fresh(x.sizes(), history.empty() ? x.options() : history[0].options());
  if (x.numel() == 0) return {out, y};
  const auto state = x.expect_contiguous(), model = output.expect_contiguous(), table = weights.expect_contiguous();
  const auto past = contiguous(history);
  const int64_t bytes = 2 * x.nbytes() + output.nbytes() + (1 + past.size()) * y.nbytes();
  const bool large = bytes > kLargeBytes;
  const auto go = [&](auto zero) {
    using A = decltype(zero);
    forward<A>(s, bytes, Rows(*state, "x", large), Rows(*model, "output", large),
               Slots{rows_of(past, large), Rows(y, "history", large), false},
               Rows(out, "x", large), *table, &step);
  };
  x.scalar_type() == at::kDouble ? go(double()) : go(float());
  return {out, y};
}

}  // namespace

TORCH_LIBRARY_IMPL(dss_fast, CPU, m) {
  m.impl("multistep_step_", step_inplace);
  m.impl("multistep_update", update);
}

}  // namespace dss_fast
