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

// The output's gradient where m's is grad_m: itself, or for a guided pair (1 - g) and g times it.
template <class A>
void write_output(const Rows& dms, const Shape& s, A guidance, const A* grad_m, int64_t b, int64_t e, int64_t n) {
  if (!s.pair) return dms.write(grad_m, b, e, n);
  alignas(64) A half[kBlock];
  scale(1 - guidance, grad_m, half, n);
  dms.write(half, b, e, n);
  scale(guidance, grad_m, half, n);
  dms.write(half, b + s.batch, e, n);
}

// An undefined grad_next is zero, and an empty result is not wanted.
template <class A>
void backward(const Shape& s, const at::Tensor& grad, const at::Tensor& grad_next, const at::Tensor& x,
              const at::Tensor& output, const at::Tensor& history, const at::Tensor& weights, const at::Tensor& index,
              const at::Tensor& grad_x, const at::Tensor& grad_output, const at::Tensor& grad_history,
              const at::Tensor& grad_row) {
  const int64_t bytes = 4 * x.nbytes() + 2 * output.nbytes() + 2 * history.nbytes();
  auto rows = [&](const at::Tensor& t, const char* name) {
    return t.defined() && t.numel() ? Rows(t, name, bytes > kLargeBytes) : Rows();
  };
  const Rows gs = rows(grad, "grad_x_next"), laters = rows(grad_next, "grad_history_next"), xs = rows(x, "x"),
             ms = rows(output, "output"), hs = rows(history, "history"), dxs = rows(grad_x, "x"),
             dms = rows(grad_output, "output"), dhs = rows(grad_history, "history");
  std::vector<double> partial(s.batch * s.chunks() * s.columns);

  for_blocks(s, bytes, [&](int64_t b, int64_t e, int64_t n, int64_t chunk) {
    const Step<A> step(s, weights, index, b);
    alignas(64) A g[kBlock], state[kBlock], uncond[kBlock], cond[kBlock], mixed[kBlock], spread[kBlock], gy[kBlock],
        grad_m[kBlock], work[kBlock], kept[kBlock];
    const A* gp = gs.read(b, e, n, g);
    auto later = [&](int64_t j) { return laters.data ? laters.read(b, e, n, kept, j) : kZeros<A>; };
    if (!step.active) {
      dxs.write(gp, b, e, n);
      write_output(dms, s, A(0), kZeros<A>, b, e, n);
      for (int64_t j = 0; dhs.data && j < s.slots; ++j) dhs.write(later(j), b, e, n, j);
      return;
    }
    // Y = w_ii G + H_i and grad x = a G + p Y
    A* dx = dxs.target(b, e, work);
    mix_twice(step.w[step.i], gp, A(1), later(step.i), gy, step.a, step.p, dx, n);
    dxs.write(dx, b, e, n);
    A* dm = s.pair ? grad_m : dms.target(b, e, grad_m);
    scale(step.q, gy, dm, n);
    write_output(dms, s, step.g, dm, b, e, n);
    double* sums = partial.data() + chunk * s.columns;
    if (grad_row.numel()) {
      const A *xp = xs.read(b, e, n, state), *mp = ms.read(b, e, n, uncond);
      if (s.pair) {
        mix_twice(A(-1), mp, A(1), ms.read(b + s.batch, e, n, cond), spread, A(1), step.g, mixed, n);
        mp = mixed;
        sums[3] += dot(spread, dm, n);
      }
      sums[0] += dot(xp, gp, n);
      sums[1] += dot(xp, gy, n);
      sums[2] += dot(mp, gy, n);
      mix(step.p, xp, step.q, mp, work, n);
      sums[kScalars + step.i] += dot(work, gp, n);
    }
    for (int64_t j = 0; j < s.slots; ++j) {
      const bool past = j < step.i || j == s.steps;
      if (past && grad_row.numel()) sums[kScalars + j] += dot(hs.read(b, e, n, work, j), gp, n);
      if (!dhs.data) continue;
      const A w = past ? step.w[j] : A(0);
      A* dh = dhs.target(b, e, work, j);
      if (laters.data && j != step.i)
        mix(w, gp, A(1), later(j), dh, n);
      else
        scale(w, gp, dh, n);
      dhs.write(dh, b, e, n, j);
    }
  });

  for (int64_t b = 0; grad_row.numel() && b < s.batch; ++b) {
    for (int64_t c = 0; c < s.columns; ++c) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < s.chunks(); ++chunk) sum += partial[(b * s.chunks() + chunk) * s.columns + c];
      grad_row.mutable_data_ptr<A>()[b * s.columns + c] = static_cast<A>(sum);
    }
  }
}

template <class A>
void pull(const Shape& s, const at::Tensor& adjoints, const at::Tensor& weights, const at::Tensor& index,
          const at::Tensor& grad_x, const at::Tensor& grad_output) {
  const int64_t bytes = adjoints.nbytes() + grad_x.nbytes() + grad_output.nbytes();
  const bool large = bytes > kLargeBytes;
  const Rows gs(adjoints, "adjoints", large), dxs(grad_x, "adjoints", large), dms(grad_output, "adjoints", large);

  for_blocks(s, bytes, [&](int64_t b, int64_t e, int64_t n, int64_t) {
    const Step<A> step(s, weights, index, b);
    alignas(64) A own[kBlock], gy[kBlock], dx_buffer[kBlock], dm_buffer[kBlock];
    A *dx = dxs.target(b, e, dx_buffer), *dm = s.pair ? dm_buffer : dms.target(b, e, dm_buffer);
    if (step.active) {
      std::fill_n(gy, n, A(0));
      WeightedSlots<A> later;
      for (auto i = step.i; i < s.steps; ++i) {
        const A w = step.table[i * s.columns + kScalars + step.i];
        if (w != 0) later.push(w, gs.fetch(b, e, n, i));
      }
      later.add_to(gy, gs, n);
      mix(step.a, gs.read(b, e, n, own, step.i), step.p, gy, dx, n);
      scale(step.q, gy, dm, n);
    } else {
      std::fill_n(dx, n, A(0));
      std::fill_n(dm, n, A(0));
    }
    dxs.write(dx, b, e, n);
    write_output(dms, s, step.g, dm, b, e, n);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> step_backward(
    const at::Tensor& grad_x_next, const std::optional<at::Tensor>& grad_next, const at::Tensor& x,
    const at::Tensor& output, const at::Tensor& history, const at::Tensor& weights, const at::Tensor& index,
    std::array<bool, 4> needs) {
  const auto s = check(x, output, history, weights, index);
  auto like = [](const at::Tensor& t, bool needed) {
    return needed ? fresh(t.sizes(), t.options()) : at::empty({0}, t.options());
  };
  auto dx = like(x, needs[0]), dm = like(output, needs[1]), dh = like(history, needs[2]);
  auto row = needs[3] ? at::zeros({s.batch, s.columns}, weights.options()) : at::empty({0}, weights.options());
  if (x.numel() == 0) return {dx, dm, dh, row};
  const auto go = x.scalar_type() == at::kDouble ? backward<double> : backward<float>;
  go(s, *grad_x_next.expect_contiguous(), grad_next && grad_next->defined() ? grad_next->contiguous() : at::Tensor(),
     *x.expect_contiguous(), *output.expect_contiguous(), samples_contiguous(history), *weights.expect_contiguous(),
     *index.expect_contiguous(), dx, dm, dh, row);
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
  const auto s = check_weights(dx, columns == kScalars + steps + 1 ? steps + 1 : steps, weights, index, pair);
  TORCH_CHECK_VALUE(s.steps == steps, "weights are for ", s.steps, " steps and adjoints hold ", steps);
  if (adjoints.numel() == 0) return {dx, dm};
  const auto go = adjoints.scalar_type() == at::kDouble ? pull<double> : pull<float>;
  go(s, samples_contiguous(adjoints), *weights.expect_contiguous(), *index.expect_contiguous(), dx, dm);
  return {dx, dm};
}

}  // namespace

TORCH_LIBRARY_IMPL(dss_fast, CPU, m) {
  m.impl("multistep_step_backward", step_backward);
  m.impl("multistep_pull", step_pull);
}

}  // namespace dss_fast
