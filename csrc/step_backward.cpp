// The step's gradients on the CPU, and the pull of a rollout's adjoints. Per-sample sums are taken chunk by chunk in
// float64 and added in order: the same bits on any number of threads.
#include "step_rows.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>

namespace dss_fast {
namespace {

template <class A>
alignas(64) constexpr A kZeros[kBlock] = {};

// Writes the output's gradient, which is that of m, or, for a guided pair, (1 - g) and g times that of m, with that of
// the difference, where there is one, taken from the one and given to the other.
template <class A>
void write_output(const Rows& dms, const Shape& s, A guidance, const A* grad_m, int64_t b, int64_t e, int64_t n,
                  const A* difference = nullptr) {
  if (!s.pair) return dms.write(grad_m, b, e, n);
  alignas(64) A half[kBlock];
  if (difference)
    mix(1 - guidance, grad_m, A(-1), difference, half, n);
  else
    scale(1 - guidance, grad_m, half, n);
  dms.write(half, b, e, n);
  if (difference)
    mix(guidance, grad_m, A(1), difference, half, n);
  else
    scale(guidance, grad_m, half, n);
  dms.write(half, b + s.batch, e, n);
}

// What the gradient reads and writes. Rows without data are read as zero, and written nowhere.
struct Gradient {
  Rows next, own, xs, ms;  // the gradients of x_{i+1} and y_i, then x and the output
  std::vector<Rows> past;
  Rows dxs, dms;
  std::vector<Rows> dpast;  // none where they are not wanted
  at::Tensor row;           // (B, columns), or empty
};

// One pass over all tensors. The formulas stand in dss_fast/step/__init__.py.
template <class A>
void backward(const Shape& s, int64_t bytes, const Gradient& t, const at::Tensor& weights, int64_t index) {
  const bool wants_row = t.row.numel();
  std::vector<double> partial(wants_row ? s.batch * s.chunks() * s.columns : 0);

  for_blocks(s, bytes, [&](int64_t b, int64_t e, int64_t n, int64_t chunk) {
    const Step<A> step(s, weights, &index, b);
    alignas(64) A g[kBlock], state[kBlock], uncond[kBlock], cond[kBlock], mixed[kBlock], spread[kBlock], gy[kBlock],
        grad_m[kBlock], work[kBlock], kept[kBlock];
    const A* gp = t.next.data ? t.next.read(b, e, n, g) : kZeros<A>;
    // Y = w_ii G + H and grad x = a G + p Y
    A* dx = t.dxs.target(b, e, work);
    mix_twice(step.w[step.i], gp, A(1), t.own.data ? t.own.read(b, e, n, kept) : kZeros<A>, gy, step.a, step.p, dx, n);
    t.dxs.write(dx, b, e, n);
    A* dm = s.pair ? grad_m : t.dms.target(b, e, grad_m);
    scale(step.q, gy, dm, n);
    write_output(t.dms, s, step.g, dm, b, e, n);
    double* sums = partial.data() + chunk * s.columns;
    if (wants_row) {
      const A *xp = t.xs.read(b, e, n, state), *mp = t.ms.read(b, e, n, uncond);
      if (s.pair) {
        mix_twice(A(-1), mp, A(1), t.ms.read(b + s.batch, e, n, cond), spread, A(1), step.g, mixed, n);
        mp = mixed;
        sums[kGuidance] += dot(spread, dm, n);
      }
      sums[kA] += dot(xp, gp, n);
      sums[kP] += dot(xp, gy, n);
      sums[kQ] += dot(mp, gy, n);
      mix(step.p, xp, step.q, mp, work, n);
      sums[kHistory + step.i] += dot(work, gp, n);
    }
    for (size_t k = 0; k < t.past.size(); ++k) {
      const auto w = column(s, step.i, k);
      if (wants_row) sums[kHistory + w] += dot(t.past[k].read(b, e, n, work), gp, n);
      if (t.dpast.empty()) continue;
      A* dh = t.dpast[k].target(b, e, work);
      scale(step.w[w], gp, dh, n);
      t.dpast[k].write(dh, b, e, n);
    }
  });

  for (int64_t b = 0; wants_row && b < s.batch; ++b) {
    for (int64_t c = 0; c < s.columns; ++c) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < s.chunks(); ++chunk) sum += partial[(b * s.chunks() + chunk) * s.columns + c];
      t.row.mutable_data_ptr<A>()[b * s.columns + c] = static_cast<A>(sum);
    }
  }
}

// gy = sum_{i>=j} w_ij g_{i+1}, grad x = a_j g_{j+1} + p_j gy, grad m = q_j gy. Slot i of the adjoints holds g_{i+1}.
// The e_j sends q_j (g_j - 1) sum_{i>=j} r_ij g_{i+1} to the difference of a pair.
template <class A>
void pull(const Shape& s, const at::Tensor& adjoints, const at::Tensor& weights, const at::Tensor& index,
          const at::Tensor& grad_x, const at::Tensor& grad_output) {
  const int64_t bytes = adjoints.nbytes() + grad_x.nbytes() + grad_output.nbytes();
  const bool large = bytes > kLargeBytes;
  const Rows gs(adjoints, "adjoints", large), dxs(grad_x, "adjoints", large), dms(grad_output, "adjoints", large);

  for_blocks(s, bytes, [&](int64_t b, int64_t e, int64_t n, int64_t) {
    const Step<A> step(s, weights, index.const_data_ptr<int64_t>(), b);
    alignas(64) A own[kBlock], gy[kBlock], dx_buffer[kBlock], dm_buffer[kBlock];
    A *dx = dxs.target(b, e, dx_buffer), *dm = s.pair ? dm_buffer : dms.target(b, e, dm_buffer);
    const bool adds = s.pair && s.added();
    alignas(64) A difference[kBlock];
    const auto sum_into = [&](A* total, int64_t column) {
      std::fill_n(total, n, A(0));
      WeightedSlots<A> later;
      for (auto i = step.i; i < s.steps; ++i) {
        const A w = step.table[i * s.columns + kHistory + column];
        if (w != 0) later.push(w, gs.fetch(b, e, n, i));
      }
      later.add_to(total, gs, n);
    };
    if (adds) std::fill_n(difference, n, A(0));
    if (step.active) {
      if (adds) {
        sum_into(gy, s.steps + 1 + step.i);
        scale(step.q * (step.g - 1), gy, difference, n);
      }
      sum_into(gy, step.i);
      mix(step.a, gs.read(b, e, n, own, step.i), step.p, gy, dx, n);
      scale(step.q, gy, dm, n);
    } else {
      std::fill_n(dx, n, A(0));
      std::fill_n(dm, n, A(0));
    }
    dxs.write(dx, b, e, n);
    write_output(dms, s, step.g, dm, b, e, n, adds ? difference : nullptr);
  });
}

std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>, at::Tensor> update_backward(
    const std::optional<at::Tensor>& grad_x_next, const std::optional<at::Tensor>& grad_y, const at::Tensor& x,
    const at::Tensor& output, at::TensorList history, const at::Tensor& weights, int64_t step,
    std::array<bool, 4> needs) {
  const auto s = check_list(x, output, history, weights, step);
  auto like = [](const at::Tensor& t, bool needed) {
    return needed ? fresh(t.sizes(), t.options()) : at::empty({0}, t.options());
  };
  auto dx = like(x, needs[0]), dm = like(output, needs[1]);
  std::vector<at::Tensor> dh;
  for (size_t k = 0; needs[2] && k < history.size(); ++k) dh.push_back(like(history[k], true));
  auto row = needs[3] ? at::zeros({s.batch, s.columns}, weights.options()) : at::empty({0}, weights.options());
  if (x.numel() == 0) return {dx, dm, dh, row};
  auto given = [](const std::optional<at::Tensor>& t) { return t && t->defined() ? t->contiguous() : at::Tensor(); };
  const auto next = given(grad_x_next), own = given(grad_y);
  const auto state = x.expect_contiguous(), model = output.expect_contiguous(), table = weights.expect_contiguous();
  const auto past = contiguous(history);
  const int64_t slots = (needs[2] + needs[3]) * past.size() * (past.empty() ? 0 : past[0].nbytes());
  const int64_t bytes = 3 * x.nbytes() + 2 * output.nbytes() + slots;
  auto rows = [&](const at::Tensor& t, const char* name) {
    return t.defined() && t.numel() ? Rows(t, name, bytes > kLargeBytes) : Rows();
  };
  const auto go = [&](auto zero) {
    using A = decltype(zero);
    backward<A>(s, bytes,
                Gradient{rows(next, "grad_x_next"), rows(own, "grad_y"), rows(*state, "x"), rows(*model, "output"),
                 rows_of(past, bytes > kLargeBytes), rows(dx, "x"), rows(dm, "output"),
                 rows_of(dh, bytes > kLargeBytes), row},
                *table, step);
  };
  x.scalar_type() == at::kDouble ? go(double()) : go(float());
  return {dx, dm, dh, row};
}

std::tuple<at::Tensor, at::Tensor> step_pull(const at::Tensor& adjoints, const at::Tensor& weights,
                                             const at::Tensor& index, bool pair) {
  TORCH_CHECK_VALUE(adjoints.dim() >= 2, "adjoints have shape ", adjoints.sizes(),
                    "; needed is (batch, steps, *sample)");
  auto sizes = adjoints.select(1, 0).sizes().vec();
  auto dx = fresh(sizes, adjoints.options());
  sizes[0] *= pair ? 2 : 1;
  auto dm = fresh(sizes, adjoints.options());
  const auto steps = adjoints.size(1), columns = weights.dim() == 3 ? weights.size(2) : 0;
  const auto s = check_index(check_weights(dx, columns - kHistory, weights, pair), index);
  TORCH_CHECK_VALUE(s.steps == steps, "weights are for ", s.steps, " steps and adjoints hold ", steps);
  if (adjoints.numel() == 0) return {dx, dm};
  const auto go = adjoints.scalar_type() == at::kDouble ? pull<double> : pull<float>;
  go(s, samples_contiguous(adjoints), *weights.expect_contiguous(), *index.expect_contiguous(), dx, dm);
  return {dx, dm};
}

}  // namespace

TORCH_LIBRARY_IMPL(dss_fast, CPU, m) {
  m.impl("multistep_update_backward", update_backward);
  m.impl("multistep_pull", step_pull);
}

}  // namespace dss_fast
