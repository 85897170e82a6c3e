// What surrounds a model call that runs twice: its memory, its random numbers, its autocast, tensors put aside.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <c10/core/Allocator.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/profiler/orchestration/observer.h>

#include <atomic>
#include <mutex>
#include <optional>

namespace dss_fast {

using at::Tensor;
using std::optional;

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

}  // namespace dss_fast
