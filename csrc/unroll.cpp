// Gradient checkpointing across the steps of an unrolled linear multistep loop. The forward keeps states and
// predictions; the backward re-runs one model call at a time and pulls every cotangent through its graph.
// Device-agnostic: one binary serves CPU and CUDA builds of torch. What the numbers mean is the caller's affair.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <c10/core/Allocator.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/profiler/orchestration/observer.h>
#include <torch/csrc/utils/pybind.h>

#include "step.h"

#include <atomic>
#include <mutex>
#include <optional>

namespace py = pybind11;
using at::Tensor;
using std::optional;

namespace dss_fast {
namespace {

// Counts what the allocators of one device type hand out and take back on this thread and on the autograd threads
// that work for it. Both torch's CPU allocator and its caching device allocators report here.
class MemoryMeter {
 public:
  explicit MemoryMeter(c10::DeviceType device) {
    auto* active = c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE);
    auto* outer = dynamic_cast<Counter*>(active);
    // A running profiler must not be covered up: its callbacks expect to find themselves in this slot.
    if (active && !outer) return;
    counter_ = std::make_shared<Counter>(device, outer);
    guard_.emplace(c10::DebugInfoKind::PROFILER_STATE, counter_);
  }

  bool available() const { return counter_ != nullptr; }
  int64_t now() const { return counter_ ? counter_->now.load() : 0; }
  int64_t peak() const { return counter_ ? counter_->peak.load() : 0; }
  void stop() { guard_.reset(); }

 private:
  // Torch casts what stands in the profiler's slot to this base without asking, so the counter has to be one.
  struct Counter : torch::profiler::impl::ProfilerStateBase {
    Counter(c10::DeviceType device, Counter* outer)
        : ProfilerStateBase(torch::profiler::impl::ProfilerConfig(
              torch::profiler::impl::ProfilerState::Disabled, /*report_input_shapes=*/false, /*profile_memory=*/true)),
          device(device),
          outer(outer) {}

    void reportMemoryUsage(void* block, int64_t bytes, size_t allocated, size_t reserved, c10::Device where) override {
      if (where.type() == device) {
        int64_t total = now += bytes, highest = peak;
        while (total > highest && !peak.compare_exchange_weak(highest, total)) {
        }
      }
      if (outer) outer->reportMemoryUsage(block, bytes, allocated, reserved, where);
    }
    torch::profiler::impl::ActiveProfilerType profilerType() override {
      return torch::profiler::impl::ActiveProfilerType::NONE;
    }

    c10::DeviceType device;
    Counter* outer;
    std::atomic<int64_t> now{0}, peak{0};
  };

  std::shared_ptr<Counter> counter_;
  optional<c10::DebugInfoGuard> guard_;
};

// The state of the random generators a model call may draw from: the CPU's and its device's.
class Random {
 public:
  static Random now(c10::Device device) {
    Random state;
    state.devices_.push_back(c10::Device(at::kCPU));
    if (!device.is_cpu()) state.devices_.push_back(device);
    for (auto where : state.devices_) {
      auto generator = at::globalContext().defaultGenerator(where);
      std::lock_guard<std::mutex> lock(generator.mutex());
      state.states_.push_back(generator.get_state());
    }
    return state;
  }

  bool operator==(const Random& other) const {
    for (size_t i = 0; i < states_.size(); ++i)
      if (!at::equal(states_[i], other.states_[i])) return false;
    return true;
  }

  void restore() const {
    for (size_t i = 0; i < devices_.size(); ++i) {
      auto generator = at::globalContext().defaultGenerator(devices_[i]);
      std::lock_guard<std::mutex> lock(generator.mutex());
      generator.set_state(states_[i]);
    }
  }

 private:
  std::vector<c10::Device> devices_;
  std::vector<Tensor> states_;
};

// Replays a call's random numbers and puts the generators back afterwards. Nothing to do for a call that drew none.
class Replay {
 public:
  Replay(const optional<Random>& state, c10::Device device) {
    if (!state) return;
    before_ = Random::now(device);
    state->restore();
  }
  ~Replay() {
    if (before_) before_->restore();
  }
  Replay(const Replay&) = delete;

 private:
  optional<Random> before_;
};

class Autocast {
 public:
  static Autocast now(c10::Device device) {
    Autocast state;
    state.modes_.push_back(Mode::of(at::kCPU));
    if (!device.is_cpu()) state.modes_.push_back(Mode::of(device.type()));
    state.cache_ = at::autocast::is_autocast_cache_enabled();
    return state;
  }

  void restore() const {
    for (const auto& mode : modes_) {
      at::autocast::set_autocast_enabled(mode.device, mode.enabled);
      at::autocast::set_autocast_dtype(mode.device, mode.dtype);
    }
    at::autocast::set_autocast_cache_enabled(cache_);
  }

  // A cast cached without a graph would be reused where one is needed, or with one already freed.
  Autocast without_cache() const {
    auto state = *this;
    state.cache_ = false;
    return state;
  }

  Autocast off() const {
    auto state = *this;
    for (auto& mode : state.modes_) mode.enabled = false;
    return state;
  }

 private:
  struct Mode {
    static Mode of(c10::DeviceType device) {
      return {device, at::autocast::is_autocast_enabled(device), at::autocast::get_autocast_dtype(device)};
    }
    c10::DeviceType device;
    bool enabled;
    at::ScalarType dtype;
  };
  std::vector<Mode> modes_;
  bool cache_ = true;
};

class AutocastGuard {
 public:
  explicit AutocastGuard(const Autocast& state, c10::Device device) : before_(Autocast::now(device)) { state.restore(); }
  ~AutocastGuard() { before_.restore(); }
  AutocastGuard(const AutocastGuard&) = delete;

 private:
  Autocast before_;
};

// Tensors waiting in host memory. On an accelerator the memory is pinned and the copies run on a side stream.
class Shelf {
 public:
  Shelf(const Tensor& like, int64_t slots) : device_(like.device()), fetched_(slots) {
    auto sizes = like.sizes().vec();
    sizes.insert(sizes.begin(), slots);
    auto options = like.options().device(at::kCPU);
    host_ = at::empty(sizes, device_.is_cpu() ? options : options.pinned_memory(true));
    if (!device_.is_cpu()) side_ = c10::impl::VirtualGuardImpl(device_.type()).getStreamFromGlobalPool(device_);
  }

  // The row must not be written afterwards.
  void put(int64_t slot, const Tensor& row) {
    if (!side_) {
      host_.select(0, slot).copy_(row);
      return;
    }
    order(current(), *side_);
    c10::StreamGuard guard(*side_);
    host_.select(0, slot).copy_(row, /*non_blocking=*/true);
    row.record_stream(*side_);
  }

  void prefetch(int64_t slot) {
    if (slot < 0 || fetched_[slot].defined()) return;
    if (!side_) {
      fetched_[slot] = host_.select(0, slot).clone();
      return;
    }
    c10::StreamGuard guard(*side_);
    fetched_[slot] = host_.select(0, slot).to(device_, /*non_blocking=*/true);
  }

  Tensor get(int64_t slot) {
    prefetch(slot);
    if (side_) {
      order(*side_, current());
      fetched_[slot].record_stream(current());
    }
    return std::move(fetched_[slot]);
  }

  Tensor host() const {
    if (side_) side_->synchronize();
    return host_;
  }

 private:
  c10::Stream current() const { return c10::impl::VirtualGuardImpl(device_.type()).getStream(device_); }

  void order(const c10::Stream& first, const c10::Stream& then) const {
    c10::Event event(device_.type());
    event.record(first);
    event.block(then);
  }

  c10::Device device_;
  Tensor host_;
  std::vector<Tensor> fetched_;
  optional<c10::Stream> side_;
};

struct Needs {
  bool x, weights, times;
};

class Rollout {
 public:
  // call(step, x (B, *S), t (B,)) -> (B or 2B, *S); weights (R, N, 4 + K); times (B, N).
  Rollout(py::object call, Tensor x, Tensor weights, Tensor times, int64_t guided, optional<int64_t> budget,
          bool offload, std::vector<Tensor> parameters, Needs needs)
      : call_(new py::object(std::move(call)), [](py::object* held) {
          py::gil_scoped_acquire gil;
          delete held;
        }),
        x_(std::move(x)),
        weights_(std::move(weights)),
        times_(std::move(times)),
        guided_(guided),
        parameters_(std::move(parameters)),
        needs_(needs),
        steps_(weights_.size(1)),
        slots_(weights_.size(2) - kScalars),
        index_(at::arange(steps_, x_.options().dtype(at::kLong))),
        autocast_(Autocast::now(x_.device()).without_cache()),
        random_(steps_),
        graphs_(steps_) {
    at::AutoGradMode no_grad(false);
    // The model casts as it likes; sums over steps and gradients keep their own precision.
    AutocastGuard full_precision(autocast_.off(), x_.device());
    forward(budget, offload);
  }

  Tensor states() const {
    check_held();
    return (state_shelf_ ? state_shelf_->host() : states_).movedim(0, 1);
  }
  Tensor history() const {
    check_held();
    return history_shelf_ ? history_shelf_->host().movedim(0, 1) : history_;
  }
  std::pair<int64_t, optional<int64_t>> plan() const { return {kept_, activation_bytes_}; }

  using Pulled = std::tuple<optional<Tensor>, optional<Tensor>, optional<Tensor>, std::vector<optional<Tensor>>>;

  Pulled pull(const Tensor& cotangents, bool retain) {
    check_held();
    TORCH_CHECK(state_shelf_ || states_._version() == version_,
                "the states of a rollout were modified in place before its gradient was taken");
    struct Release {
      ~Release() {
        if (rollout) rollout->release();
      }
      Rollout* rollout;
    } at_exit{retain ? nullptr : this};
    at::AutoGradMode no_grad(false);
    AutocastGuard full_precision(autocast_.off(), x_.device());
    return backward(cotangents, retain);
  }

 private:
  struct Call {
    Tensor x, t, output;
  };

  // What a step asks of its prediction's neighbours: the guided output and the spread between the guided halves.
  struct Mixed {
    Tensor output, spread;
  };

  void check_held() const {
    TORCH_CHECK(!done_,
                "Trying to use a rollout a second time: its states and graphs were let go by the first pull. "
                "Specify retain_graph=True in that one.");
  }

  void forward(optional<int64_t> budget, bool offload) {
    auto shape = x_.sizes().vec();
    auto stacked = shape;
    stacked.insert(stacked.begin() + 1, slots_);
    history_ = at::empty(stacked, x_.options());
    if (slots_ > steps_) history_.select(1, steps_).copy_(x_);
    if (offload) {
      state_shelf_.emplace(x_, steps_);
      history_shelf_.emplace(x_, slots_);
      if (slots_ > steps_) history_shelf_->put(steps_, x_);
    } else {
      auto all = shape;
      all.insert(all.begin(), steps_);
      states_ = at::empty(all, x_.options());
    }
    Tensor x = x_;
    for (int64_t i = 0; i < steps_; ++i) {
      Tensor output = i == 0 && budget ? measured_call(x, *budget) : first_run(i, x, i >= steps_ - kept_);
      if (i == 0 && !differentiates(0)) first_output_ = output;
      Tensor next = offload ? at::empty_like(x) : states_.select(0, i);
      multistep_step_(x, output, history_, weights_, index_.slice(0, i, i + 1), guided_, next);
      if (offload) {
        state_shelf_->put(i, next);
        history_shelf_->put(i, history_.select(1, i).contiguous());
      }
      x = next;
    }
    if (offload)
      history_.reset();
    else
      version_ = states_._version();
  }

  // The first call, with its graph; decides how many of the last graphs to keep, itself among them or not.
  Tensor measured_call(const Tensor& x, int64_t budget) {
    MemoryMeter meter(x.device().type());
    Tensor output = first_run(0, x, true);
    if (!meter.available()) {
      TORCH_WARN("a profiler is active on this thread, so a graph cannot be measured: memory_budget keeps none");
      graphs_[0].reset();
      return output;
    }
    int64_t held = meter.now();
    if (held * steps_ <= budget) {
      activation_bytes_ = held;
      kept_ = steps_;
      return output;
    }
    // What the call merely left in caches stays when its graph goes, and is not part of one activation set.
    output = output.clone();
    graphs_[0].reset();
    int64_t set = std::max<int64_t>(held - meter.now() + output.nbytes(), 1);
    activation_bytes_ = set;
    kept_ = std::min(steps_ - 1, budget / set);
    return output;
  }

  Tensor first_run(int64_t step, const Tensor& x, bool keep) {
    auto before = Random::now(x_.device());
    Tensor output = keep ? run_with_graph(step, x).output.detach() : run(step, x, times_.select(1, step).clone());
    if (!(Random::now(x_.device()) == before)) random_[step] = std::move(before);
    return output;
  }

  const Call& run_with_graph(int64_t step, const Tensor& x) {
    at::AutoGradMode grad(true);
    Call call{x.detach(), times_.select(1, step).detach().clone(), {}};
    call.x.set_requires_grad(step > 0 || needs_.x);
    call.t.set_requires_grad(needs_.times);
    call.output = run(step, call.x, call.t);
    return graphs_[step].emplace(std::move(call));
  }

  Tensor run(int64_t step, const Tensor& x, const Tensor& t) {
    AutocastGuard autocast(autocast_, x_.device());
    py::gil_scoped_acquire gil;
    return py::cast<Tensor>((*call_)(step, x, t));
  }

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
    Tensor grad_weights = needs_.weights ? at::zeros({C, B, N, kScalars + slots_}, real) : Tensor();
    Tensor grad_times = needs_.times ? at::zeros({C, B, N}, real) : Tensor();
    std::vector<std::vector<Tensor>> grad_parameters(C, std::vector<Tensor>(parameters_.size()));

    for (int64_t j = N - 1; j >= 0; --j) {
      Tensor x = j == 0 ? x_ : state_shelf_ ? state_shelf_->get(j - 1) : states_.select(0, j - 1);
      Tensor y = history_shelf_ ? history_shelf_->get(j) : history_.select(1, j);
      if (state_shelf_) {
        state_shelf_->prefetch(j - 2);
        history_shelf_->prefetch(j - 1);
      }
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
        auto [grad_state, grad_output] = multistep_pull(g, weights_, index_.slice(0, j, j + 1), pair, guided_);
        if (graph) {
          bool last = c == C - 1 && !(kept && retain);
          auto found = vjp(*graph, grad_output, !last);
          if (found.x.defined()) grad_state.add_(found.x);
          if (found.t.defined()) grad_times.select(0, c).select(1, j).copy_(found.t);
          for (size_t k = 0; k < parameters_.size(); ++k) {
            auto& sum = grad_parameters[c][k];
            if (found.parameters[k].defined()) sum = sum.defined() ? sum + found.parameters[k] : found.parameters[k];
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

  Mixed mixed(int64_t j, const Tensor& output) const {
    const int64_t B = x_.size(0);
    Tensor rows = output.flatten(1).to(weights_.scalar_type());
    if (output.size(0) == B) return {rows, {}};
    Tensor uncond = rows.narrow(0, 0, B), cond = rows.narrow(0, B, B);
    Tensor spread = cond - uncond;
    if (guided_ >= 0) spread.slice(1, guided_).zero_();
    // m = m_cond + (g - 1) spread, which is m_cond where nothing is guided.
    return {cond + (weights_.select(1, j).slice(1, 3, 4) - 1) * spread, spread};
  }

  // The vectors whose products with the adjoints are step j's weight gradients, (B, 3 or 4, D): x, y, m, spread.
  Tensor weight_probes(int64_t j, const Tensor& x, const Tensor& y, const Tensor& output) const {
    const auto real = weights_.scalar_type();
    auto [m, spread] = mixed(j, output);
    std::vector<Tensor> probes{x.flatten(1).to(real), y.flatten(1).to(real), m};
    if (spread.defined()) probes.push_back(spread);
    return at::stack(probes, 1);
  }

  // With gy = sum_{i>=j} w_ij g_{i+1}: da = <g_{j+1}, x>, dp = <gy, x>, dq = <gy, m>, dg = q <gy, spread>,
  // dw_ij = <g_{i+1}, y>. The products with gy are sums over those with the adjoints, so gy itself is not needed.
  void add_weight_gradients(const Tensor& gradient, int64_t j, const Tensor& adjoints, const Tensor& probes) const {
    const int64_t N = steps_;
    Tensor products = at::bmm(adjoints.slice(1, j), probes.transpose(1, 2));
    Tensor through = (weights_.slice(1, j).select(2, kScalars + j).unsqueeze(2) * products).sum(1);
    Tensor row = gradient.select(1, j);
    row.select(1, 0).copy_(products.select(1, 0).select(1, 0));
    row.select(1, 1).copy_(through.select(1, 0));
    row.select(1, 2).copy_(through.select(1, 2));
    if (probes.size(1) == 4) row.select(1, 3).copy_(weights_.select(1, j).select(1, 2) * through.select(1, 3));
    gradient.slice(1, j).select(2, kScalars + j).copy_(products.select(2, 1));
    if (j == 0 && slots_ > N) gradient.select(2, kScalars + N).copy_(products.select(2, 0));
  }

  // What the last slot, the initial state itself, sends back: sum_i w_iN g_{i+1}.
  Tensor noise_gradient(const Tensor& g) const {
    if (slots_ == steps_) return at::zeros({}, weights_.options());
    Tensor row = weights_.select(2, kScalars + steps_).unsqueeze(1).expand({x_.size(0), 1, steps_});
    return at::bmm(row, g.flatten(2)).view(x_.sizes());
  }

  struct Gradients {
    Tensor x, t;
    std::vector<Tensor> parameters;
  };

  Gradients vjp(const Call& call, const Tensor& grad_output, bool retain) const {
    std::vector<Tensor> inputs;
    if (call.x.requires_grad()) inputs.push_back(call.x);
    if (call.t.requires_grad()) inputs.push_back(call.t);
    inputs.insert(inputs.end(), parameters_.begin(), parameters_.end());
    Gradients found{{}, {}, std::vector<Tensor>(parameters_.size())};
    if (inputs.empty() || !call.output.requires_grad()) return found;
    auto gradients = torch::autograd::grad({call.output}, inputs, {grad_output.to(call.output.scalar_type())}, retain,
                                           /*create_graph=*/false, /*allow_unused=*/true);
    size_t next = 0;
    if (call.x.requires_grad()) found.x = gradients[next++];
    if (call.t.requires_grad()) found.t = gradients[next++];
    for (auto& gradient : found.parameters) gradient = gradients[next++];
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
    state_shelf_.reset();
    history_shelf_.reset();
    states_.reset();
    history_.reset();
    first_output_.reset();
  }

  std::shared_ptr<py::object> call_;
  Tensor x_, weights_, times_;
  int64_t guided_;
  std::vector<Tensor> parameters_;
  Needs needs_;
  int64_t steps_, slots_;
  Tensor index_;
  Autocast autocast_;
  std::vector<optional<Random>> random_;
  std::vector<optional<Call>> graphs_;
  Tensor states_, history_, first_output_;
  optional<Shelf> state_shelf_, history_shelf_;
  int64_t kept_ = 0, version_ = 0;
  optional<int64_t> activation_bytes_;
  bool done_ = false;
};

std::unique_ptr<Rollout> make_rollout(py::object call, Tensor x, Tensor weights, Tensor times, int64_t guided,
                                      optional<int64_t> budget, bool offload, std::vector<Tensor> parameters,
                                      std::array<bool, 3> needs) {
  return std::make_unique<Rollout>(std::move(call), std::move(x), std::move(weights), std::move(times), guided, budget,
                                   offload, std::move(parameters), Needs{needs[0], needs[1], needs[2]});
}

Rollout::Pulled pull(Rollout& rollout, const Tensor& cotangents, bool retain) {
  return rollout.pull(cotangents, retain);
}

void bind(PyObject* target) {
  auto module = py::reinterpret_borrow<py::module_>(target);
  py::class_<Rollout>(module, "Rollout")
      .def(py::init(torch::wrap_pybind_function_no_gil(make_rollout)))
      .def("pull", torch::wrap_pybind_function_no_gil(pull))
      .def_property_readonly("states", &Rollout::states)
      .def_property_readonly("history", &Rollout::history)
      .def_property_readonly("plan", &Rollout::plan);
  py::class_<MemoryMeter>(module, "MemoryMeter", "Bytes allocated on a device type while the meter is open.")
      .def(py::init([](const std::string& device) { return std::make_unique<MemoryMeter>(c10::Device(device).type()); }),
           py::arg("device") = "cpu")
      .def_property_readonly("available", &MemoryMeter::available)
      .def_property_readonly("now", &MemoryMeter::now)
      .def_property_readonly("peak", &MemoryMeter::peak)
      .def("stop", &MemoryMeter::stop);
}

const ModulePart part(bind);

}  // namespace
}  // namespace dss_fast
