// What surrounds a model call that runs twice: its random numbers and its autocast.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>

#include <mutex>
#include <optional>

namespace dss_fast {

using at::Tensor;
using std::optional;

// The state of the random generators a model call may draw from: the CPU's and its device's.
class Random {
 public:
  static Random now(c10::Device device) {
    Random random;
    for (auto where : {c10::Device(at::kCPU), device}) {
      if (where.is_cpu() && !random.states_.empty()) continue;
      auto generator = at::globalContext().defaultGenerator(where);
      std::lock_guard<std::mutex> lock(generator.mutex());
      random.states_.emplace_back(generator, generator.get_state());
    }
    return random;
  }

  bool operator==(const Random& other) const {
    for (size_t i = 0; i < states_.size(); ++i)
      if (!at::equal(states_[i].second, other.states_[i].second)) return false;
    return true;
  }

  void restore() const {
    for (auto [generator, state] : states_) {
      std::lock_guard<std::mutex> lock(generator.mutex());
      generator.set_state(state);
    }
  }

 private:
  std::vector<std::pair<at::Generator, Tensor>> states_;
};

// Replays a call's random numbers and puts the generators back afterwards. For a call that drew none it does nothing.
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

  // The cache would give a cast without a graph where one is needed, or one whose graph is already freed.
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

}  // namespace dss_fast
