// What step.cpp and unroll.cpp share: the row's columns, and the step as C++ calls that reach every device through
// the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <tuple>

namespace dss_fast {

// The columns of a row of `weights`, as in dss_fast/table.py: from kHistory on they weigh the history.
enum Column : int64_t { kA, kP, kQ, kGuidance, kHistory };

// Whether N steps may have so many slots: the predictions, the initial noise behind them, and behind it the e_j, what
// guidance added to each prediction.
inline bool fits(int64_t steps, int64_t slots) {
  return slots == steps || slots == steps + 1 || slots == 2 * steps + 1;
}

// x_next goes to `out` (may be x), y to history's slot. Schemas and equations: dss_fast/step/__init__.py.
inline void multistep_step_(const at::Tensor& x, const at::Tensor& output, at::Tensor& history,
                            const at::Tensor& weights, const at::Tensor& index, at::Tensor& out) {
  using Signature = void(const at::Tensor&, const at::Tensor&, at::Tensor&, const at::Tensor&, const at::Tensor&,
                         at::Tensor&);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("dss_fast::multistep_step_", "").typed<Signature>();
  op.call(x, output, history, weights, index, out);
}

// (grad_x, grad_output) of step `index` from the adjoints of all later states.
inline std::tuple<at::Tensor, at::Tensor> multistep_pull(const at::Tensor& adjoints, const at::Tensor& weights,
                                                         const at::Tensor& index, bool pair) {
  using Signature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&, bool);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("dss_fast::multistep_pull", "").typed<Signature>();
  return op.call(adjoints, weights, index, pair);
}

}  // namespace dss_fast
