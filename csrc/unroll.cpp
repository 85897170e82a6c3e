// Gradient checkpointing across the steps of an unrolled linear multistep loop. The forward keeps states and
// predictions; the backward re-runs one model call at a time and pulls every cotangent through its graph.
// One binary serves CPU and CUDA builds of torch, because every operation goes through the dispatcher.
#include <ATen/Context.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/utils/pybind.h>

#include <pybind11/functional.h>

#include <functional>
#include <optional>

#include "step.h"
#include "unroll_state.h"

namespace py = pybind11;

namespace dss_fast {
namespace {

struct Needs {
  bool x, weights, times;
};

class Engine {
 public:
  // Functions of Python, which take the interpreter's lock while they run.
  using Call = std::function<Tensor(int64_t, const Tensor&, const Tensor&)>;
  using Count = std::function<int64_t()>;

  // call(step, x (B, *S), t (B,)) -> (B or 2B, *S), steps may differ; weights (R, N, 4 + K); times (B, N). kept: none, or what says, once
  // the first call has run with its graph, how many of the last graphs to keep.
  Engine(Call call, Tensor x, Tensor weights, Tensor times, const Count& kept, std::vector<Tensor> parameters,
         Needs needs)
      : call_(std::move(call)),
        x_(std::move(x)),
        weights_(std::move(weights)),
        times_(std::move(times)),
        parameters_(std::move(parameters)),
        needs_(needs),
        steps_(weights_.size(1)),
        slots_(weights_.size(2) - kHistory),
        index_(at::arange(steps_, x_.options().dtype(at::kLong))),
        autocast_(Autocast::now(x_.device()).without_cache()),
        random_(steps_),
        graphs_(steps_) {
    at::AutoGradMode no_grad(false);
    // The model casts as it likes; sums over steps and gradients keep their own precision.
    AutocastGuard full_precision(autocast_.off(), x_.device());
    forward(kept);
  }

  Tensor states() const {
    check_held();
    return states_.movedim(0, 1);
  }
  Tensor history() const {
    check_held();
    return history_;
  }

  using Pulled = std::tuple<optional<Tensor>, optional<Tensor>, optional<Tensor>, std::vector<optional<Tensor>>>;

  Pulled pull(const Tensor& cotangents, bool retain) {
    check_held();
    TORCH_CHECK(states_._version() == version_,
                "the states of a rollout were modified in place before its gradient was taken");
    struct Release {
      ~Release() {
        if (engine) engine->release();
      }
      Engine* engine;
    } at_exit{retain ? nullptr : this};
    at::AutoGradMode no_grad(false);
    AutocastGuard full_precision(autocast_.off(), x_.device());
    return backward(cotangents, retain);
  }

 private:
  struct Graph {
    Tensor x, t, output;
  };

  void check_held() const {
    TORCH_CHECK(!done_,
                "Trying to use a rollout a second time: its states and graphs were let go by the first pull. "
                "Specify retain_graph=True in that one.");
  }

  void forward(const Count& ask) {
    const bool measured = bool(ask);
    auto shape = x_.sizes().vec();
    auto stacked = shape;
    stacked.insert(stacked.begin() + 1, slots_);
    history_ = at::empty(stacked, x_.options());
    if (slots_ > steps_) history_.select(1, steps_).copy_(x_);
    shape.insert(shape.begin(), steps_);
    states_ = at::empty(shape, x_.options());
    int64_t kept = 0;
    Tensor x = x_;
    for (int64_t i = 0; i < steps_; ++i) {
      Tensor output = first_run(i, x, i >= steps_ - kept || (i == 0 && measured));
      if (i == 0 && measured) kept = ask();
      if (i == 0 && kept < steps_) graphs_[0].reset();
      if (i == 0 && !differentiates(0)) first_output_ = output;
      Tensor next = states_.select(0, i);
      multistep_step_(x, output, history_, weights_, index_.slice(0, i, i + 1), next);
      x = next;
    }
    version_ = states_._version();
  }

  // The output (B or 2B, *S) of a step's first call. The random state before it is kept when the call drew numbers.
  Tensor first_run(int64_t step, const Tensor& x, bool keep) {
    auto before = Random::now(x_.device());
    Tensor output = keep ? run_with_graph(step, x).output.detach() : run(step, x, times_.select(1, step).clone());
    if (!(Random::now(x_.device()) == before)) random_[step] = std::move(before);
    return output;
  }

  const Graph& run_with_graph(int64_t step, const Tensor& x) {
    at::AutoGradMode grad(true);
    // A detached state would share its version with the states written later, and would count as modified.
    Graph graph{x.variable_data(), times_.select(1, step).detach().clone(), {}};
    graph.x.set_requires_grad(step > 0 || needs_.x);
    graph.t.set_requires_grad(needs_.times);
    graph.output = run(step, graph.x, graph.t);
    return graphs_[step].emplace(std::move(graph));
  }

  Tensor run(int64_t step, const Tensor& x, const Tensor& t) {
    AutocastGuard autocast(autocast_, x_.device());
    return call_(step, x, t);
  }

  // Whether any wanted gradient passes through the model's call at a step.
  bool differentiates(int64_t step) const { return step > 0 || needs_.x || needs_.times || !parameters_.empty(); }

  Pulled backward(const Tensor& cotangents, bool retain) {
    const int64_t C = cotangents.size(0), B = x_.size(0), N = steps_;
    const auto real = weights_.options();
    auto sizes = x_.sizes().vec();
    sizes.insert(sizes.begin(), {C});
    auto per_step = sizes;
    per_step.insert(per_step.begin() + 2, N);
    // Slot i holds g_{i+1}, the gradient of x_{i+1}; zero where the caller asks for nothing there.
    Tensor adjoints = at::zeros(per_step, real);
    if (cotangents.dim() == x_.dim() + 2)
      adjoints.copy_(cotangents);
    else
      adjoints.select(2, N - 1).copy_(cotangents);
    Tensor grad_x = needs_.x ? at::empty(sizes, real) : Tensor();
    Tensor grad_weights = needs_.weights ? at::zeros({C, B, N, kHistory + slots_}, real) : Tensor();
    Tensor grad_times = needs_.times ? at::zeros({C, B, N}, real) : Tensor();
    std::vector<std::vector<Tensor>> grad_parameters(C, std::vector<Tensor>(parameters_.size()));

    for (int64_t j = N - 1; j >= 0; --j) {
      Tensor x = j == 0 ? x_ : states_.select(0, j - 1);
      Tensor y = history_.select(1, j);
      bool kept = graphs_[j].has_value();
      if (!kept && differentiates(j)) {
        Replay replay(random_[j], x_.device());
        run_with_graph(j, x);
      }
      auto& graph = graphs_[j];
      Tensor output = graph ? graph->output.detach() : first_output_;
      const bool pair = output.size(0) == 2 * B;
      Tensor probes = needs_.weights ? weight_probes(j, x, y, output) : Tensor();
      output.reset();

      for (int64_t c = 0; c < C; ++c) {
        Tensor g = adjoints.select(0, c);
        auto [grad_state, grad_output] = multistep_pull(g, weights_, index_.slice(0, j, j + 1), pair);
        if (graph) {
          bool last = c == C - 1 && !(kept && retain);
          auto found = vjp(*graph, grad_output, !last);
          if (found[0].defined()) grad_state.add_(found[0]);
          if (found[1].defined()) grad_times.select(0, c).select(1, j).copy_(found[1]);
          for (size_t k = 0; k < parameters_.size(); ++k) {
            auto& sum = grad_parameters[c][k];
            if (const auto& own = found[2 + k]; own.defined()) sum = sum.defined() ? sum + own : own;
          }
        }
        if (needs_.weights) add_weight_gradients(grad_weights.select(0, c), j, g.flatten(2), probes);
        if (j > 0)
          g.select(1, j - 1).add_(grad_state);
        else if (needs_.x)
          grad_x.select(0, c).copy_(grad_state.add_(noise_gradient(g)));
      }
      if (!(kept && retain)) graph.reset();
    }
    return {defined(grad_x), defined(grad_weights), defined(grad_times), stack(grad_parameters)};
  }

  // The vectors whose products with the adjoints are step j's weight gradients, (B, 3 or 4, D): x, y, the guided output
  // m and, with guidance, m_cond - m_uncond.
  Tensor weight_probes(int64_t j, const Tensor& x, const Tensor& y, const Tensor& output) const {
    const auto real = weights_.scalar_type();
    const int64_t B = x_.size(0);
    Tensor m = output.flatten(1).to(real);
    std::vector<Tensor> probes{x.flatten(1).to(real), y.flatten(1).to(real), m.narrow(0, 0, B)};
    if (output.size(0) != B) {
      probes.push_back(m.narrow(0, B, B) - probes[2]);
      probes[2] = probes[2] + weights_.select(1, j).slice(1, kGuidance, kGuidance + 1) * probes[3];
    }
    return at::stack(probes, 1);
  }

  // With gy = sum_{i>=j} w_ij g_{i+1}, and ge alike of the columns of e_j: da = <g_{j+1}, x>, dp = <gy, x>, dq = <gy, m>, dg = q <gy + ge, spread>,
  // dw_ij = <g_{i+1}, y>, dr_ij = <g_{i+1}, e>, dq = ... + (g - 1) <ge, spread>. The products with gy are sums over those with the adjoints, so gy itself is not needed.
  void add_weight_gradients(const Tensor& gradient, int64_t j, const Tensor& adjoints, const Tensor& probes) const {
    const int64_t N = steps_;
    at::NoTF32Guard full;  // these sums settle the search's step, whatever precision the model's products may have
    Tensor products = at::bmm(adjoints.slice(1, j), probes.transpose(1, 2));
    Tensor through = (weights_.slice(1, j).select(2, kHistory + j).unsqueeze(2) * products).sum(1);
    Tensor row = gradient.select(1, j);
    row.select(1, kA).copy_(products.select(1, 0).select(1, 0));
    row.select(1, kP).copy_(through.select(1, 0));
    row.select(1, kQ).copy_(through.select(1, 2));
    if (probes.size(1) == 4) {
      const Tensor q = weights_.select(1, j).select(1, kQ), spread = products.select(2, 3);
      Tensor guided = through.select(1, 3);
      if (slots_ > N + 1) {
        const Tensor excess = weights_.select(1, j).select(1, kGuidance) - 1;
        const int64_t column = kHistory + N + 1 + j;
        Tensor added = (weights_.slice(1, j).select(2, column) * spread).sum(1);
        gradient.slice(1, j).select(2, column).copy_((q * excess).unsqueeze(1) * spread);
        row.select(1, kQ).add_(excess * added);
        guided = guided + added;
      }
      row.select(1, kGuidance).copy_(q * guided);
    }
    gradient.slice(1, j).select(2, kHistory + j).copy_(products.select(2, 1));
    if (j == 0 && slots_ > N) gradient.select(2, kHistory + N).copy_(products.select(2, 0));
  }

  // What the last slot, the initial state itself, sends back: sum_i w_iN g_{i+1}.
  Tensor noise_gradient(const Tensor& g) const {
    if (slots_ == steps_) return at::zeros({}, weights_.options());
    at::NoTF32Guard full;
    Tensor row = weights_.select(2, kHistory + steps_).unsqueeze(1).expand({x_.size(0), 1, steps_});
    return at::bmm(row, g.flatten(2)).view(x_.sizes());
  }

  // The products of a call's Jacobians with a cotangent (B or 2B, *S) of its output: of x, t and each parameter;
  // undefined where nothing depends or is wanted.
  std::vector<Tensor> vjp(const Graph& call, const Tensor& grad_output, bool retain) const {
    std::vector<Tensor> all{call.x, call.t}, inputs;
    all.insert(all.end(), parameters_.begin(), parameters_.end());
    for (const auto& t : all)
      if (t.requires_grad()) inputs.push_back(t);
    std::vector<Tensor> found(all.size());
    if (inputs.empty() || !call.output.requires_grad()) return found;
    auto gradients = torch::autograd::grad({call.output}, inputs, {grad_output.to(call.output.scalar_type())}, retain,
                                           /*create_graph=*/false, /*allow_unused=*/true);
    size_t next = 0;
    for (size_t k = 0; k < all.size(); ++k)
      if (all[k].requires_grad()) found[k] = gradients[next++];
    return found;
  }

  static optional<Tensor> defined(const Tensor& tensor) {
    return tensor.defined() ? optional<Tensor>(tensor) : std::nullopt;
  }

  static std::vector<optional<Tensor>> stack(const std::vector<std::vector<Tensor>>& gradients) {
    std::vector<optional<Tensor>> stacked;
    for (size_t k = 0; k < gradients.front().size(); ++k) {
      std::vector<Tensor> column;
      for (const auto& row : gradients)
        if (row[k].defined()) column.push_back(row[k]);
      stacked.push_back(column.empty() ? std::nullopt : optional<Tensor>(at::stack(column)));
    }
    return stacked;
  }

  void release() {
    done_ = true;
    graphs_.clear();
    random_.clear();
    states_.reset();
    history_.reset();
    first_output_.reset();
  }

  Call call_;
  Tensor x_, weights_, times_;
  std::vector<Tensor> parameters_;
  Needs needs_;
  int64_t steps_, slots_;
  Tensor index_;
  Autocast autocast_;
  std::vector<optional<Random>> random_;
  std::vector<optional<Graph>> graphs_;
  Tensor states_, history_, first_output_;
  int64_t version_ = 0;
  bool done_ = false;
};

std::unique_ptr<Engine> make_engine(Engine::Call call, Tensor x, Tensor weights, Tensor times, Engine::Count kept,
                                    std::vector<Tensor> parameters, std::array<bool, 3> needs) {
  return std::make_unique<Engine>(std::move(call), std::move(x), std::move(weights), std::move(times), kept,
                                  std::move(parameters), Needs{needs[0], needs[1], needs[2]});
}

Engine::Pulled pull(Engine& engine, const Tensor& cotangents, bool retain) { return engine.pull(cotangents, retain); }

}  // namespace
}  // namespace dss_fast

// The build names the module after the version of torch (setup.py).
PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace dss_fast;
  module.attr("columns") = std::array<int64_t, 5>{kA, kP, kQ, kGuidance, kHistory};
  py::class_<Engine>(module, "Engine")
      .def(py::init(torch::wrap_pybind_function_no_gil(make_engine)))
      .def("pull", torch::wrap_pybind_function_no_gil(pull))
      .def_property_readonly("states", &Engine::states)
      .def_property_readonly("history", &Engine::history);
}
