// The step's gradients on the CPU, and the pull of a rollout's adjoints. Per-sample sums are taken chunk by chunk in
// float64 and added in order: the same bits on any number of threads.
#include "step_rows.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

namespace dss_fast {
namespace {

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
    alignas(64) A g[kBlock], gy[kBlock], state[kBlock], uncond[kBlock], cond[kBlock], mixed[kBlock];
    alignas(64) A dx[kBlock], dm[kBlock], dcond[kBlock], past[kGroup][kBlock];
    double* row = partial.data() + chunk * columns;
    c10::SmallVector<int64_t, 32> read;
    for (int64_t j = 0; j < s.slots; ++j)
      if (j < step.i || j == s.steps) read.push_back(j);
    int64_t n;
    for (auto e = first; e < last; e += n) {
      n = s.block(e, last);
      const A* gp = gs.read(k, b, e, n, g);
      if (!step.active) {
        std::fill(dm, dm + n, A(0));
        if (dxs) dxs.write(k, gp, b, e, n, stream);
        if (dms) dms.write(k, dm, b, e, n, stream);
        if (dms && s.pair) dms.write(k, dm, b + s.batch, e, n, stream);
        for (int64_t j = 0; dhs && j < s.slots; ++j)
          dhs.write(k, laters ? laters.read(k, b, e, n, dx, j) : dm, b, e, n, stream, j);
        continue;
      }
      const A* yp = laters ? laters.read(k, b, e, n, gy, step.i) : nullptr;
      const A* xp = xs.read(k, b, e, n, state);
      const A* up = ms.read(k, b, e, n, uncond);
      const A* cp = s.pair ? ms.read(k, b + s.batch, e, n, cond) : nullptr;
      const A scale = e < s.guided ? step.g : A(1);
      if (cp) k.combine(up, cp, scale, mixed, n);
      double sums[4] = {};
      k.step_backward(xp, cp ? mixed : up, gp, yp, step.head, dx, dm, sums, n);
      row[0] += sums[0], row[1] += sums[1], row[2] += sums[2], row[kScalars + step.i] += sums[3];
      if (cp) {
        const A by_scale = k.combine_backward(up, cp, scale, dm, dcond, n);
        if (e < s.guided) row[3] += by_scale;
      }
      if (dxs) dxs.write(k, dx, b, e, n, stream);
      if (dms) dms.write(k, dm, b, e, n, stream);
      if (dms && cp) dms.write(k, dcond, b + s.batch, e, n, stream);
      for (size_t r = 0; grad_row && r < read.size(); r += kGroup) {
        const A* slots[kGroup];
        double products[kGroup] = {};
        const int count = static_cast<int>(std::min<size_t>(kGroup, read.size() - r));
        for (int c = 0; c < count; ++c) slots[c] = hs.read(k, b, e, n, past[c], read[r + c]);
        k.dots(slots, gp, count, products, n);
        for (int c = 0; c < count; ++c) row[kScalars + read[r + c]] += products[c];
      }
      for (int64_t j = 0; dhs && j < s.slots; ++j) {
        const A* later = laters && j != step.i ? laters.read(k, b, e, n, gy, j) : nullptr;
        k.scale(gp, later, j < step.i || j == s.steps ? step.w[kScalars + j] : A(0), dx, n);
        dhs.write(k, dx, b, e, n, stream, j);
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
    const A head[] = {step.head[2], step.head[1], step.head[0], 0};  // dx = p * pulled + a * own, dm = q * pulled
    alignas(64) A own[kBlock], pulled[kBlock], dx[kBlock], dm[kBlock], dcond[kBlock];
    int64_t n;
    for (auto e = first; e < last; e += n) {
      n = s.block(e, last);
      std::fill(pulled, pulled + n, A(0));
      const void* slots[kGroup];
      A wanted[kGroup];
      int count = 0;
      for (int64_t i = step.active ? step.i : s.steps; i < s.steps; ++i) {
        const A weight = rows[i * s.columns + kScalars + step.i];
        if (weight != 0) slots[count] = gs.at(b, e, i), wanted[count++] = weight;
        if (count == kGroup || (count && i + 1 == s.steps)) {
          k.sum[gs.kind](slots, wanted, count, pulled, n);
          count = 0;
        }
      }
      if (step.active) {
        k.step[0](pulled, gs.read(k, b, e, n, own, step.i), head, nullptr, nullptr, 0, dx, dm, n);
      } else {
        std::fill(dx, dx + n, A(0));
        std::fill(dm, dm + n, A(0));
      }
      if (s.pair) {
        k.combine_backward(pulled, pulled, e < s.guided ? step.g : A(1), dm, dcond, n);
        dms.write(k, dcond, b + s.batch, e, n, stream);
      }
      dxs.write(k, dx, b, e, n, stream);
      dms.write(k, dm, b, e, n, stream);
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> step_backward(
    const at::Tensor& grad_x_next, const std::optional<at::Tensor>& grad_next, const at::Tensor& x,
    const at::Tensor& output, const at::Tensor& history, const at::Tensor& weights, const at::Tensor& index,
    int64_t guided, int64_t needs) {
  const auto s = check(x, output, history, weights, index, guided);
  auto like = [&](const at::Tensor& t, int bit) {
    return needs >> bit & 1 ? fresh(t.sizes(), t.options()) : at::empty({0}, t.options());
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
  auto dx = fresh(sizes, adjoints.options());
  sizes[0] *= pair ? 2 : 1;
  auto dm = fresh(sizes, adjoints.options());
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
  m.impl("multistep_step_backward", step_backward);
  m.impl("multistep_pull", step_pull);
}

}  // namespace dss_fast
