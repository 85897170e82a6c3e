// What step.cpp and unroll.cpp share: the step as C++ calls that reach every device through the dispatcher, and the
// list of functions that fill the Python module.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <tuple>
#include <vector>

struct _object;  // PyObject

namespace dss_fast {

// a, p, q and the guidance stand before the history's weights in every row of `weights`.
constexpr int64_t kScalars = 4;

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

// A file with something to put into the module keeps one of these at namespace scope; step.cpp's init calls it.
struct ModulePart {
  using Fill = void (*)(_object* module);
  explicit ModulePart(Fill fill) {
    parts().push_back(fill);
  }
  static std::vector<Fill>& parts() {
    static std::vector<Fill> all;
    return all;
  }
};

}  // namespace dss_fast
