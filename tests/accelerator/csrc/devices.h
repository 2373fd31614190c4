// The simulated devices: how many there are, which one each thread is on, streams and events that
// have always finished.
#pragma once

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace simulated {

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;
constexpr int64_t kMaxDevices = 16;

inline c10::DeviceIndex device_count() {
  static const c10::DeviceIndex count = [] {
    const char* given = std::getenv("TORCHTOWER_SIMULATED_DEVICES");
    const int wanted = given ? std::atoi(given) : 2;
    return static_cast<c10::DeviceIndex>(std::clamp(wanted, 1, static_cast<int>(kMaxDevices)));
  }();
  return count;
}

// Per thread, as a CUDA runtime's current device is.
inline thread_local c10::DeviceIndex current_index = 0;
inline thread_local std::map<c10::DeviceIndex, c10::StreamId> current_streams;

inline void set_current(c10::DeviceIndex index) {
  if (index < 0) return;
  TORCH_CHECK(index < device_count(), "invalid device ordinal ", int(index), " of ",
              int(device_count()));
  current_index = index;
}

inline c10::Device resolve(c10::Device device) {
  TORCH_CHECK(device.type() == kType, "expected a simulated device, but got ", device);
  TORCH_CHECK(device.index() < device_count(), "invalid device ordinal in ", device);
  return device.has_index() ? device : c10::Device(kType, current_index);
}

// Copies to the CPU that were asked not to block; they happen at the next synchronisation.
class Unfinished {
 public:
  void add(std::function<void()> copy) {
    const std::lock_guard<std::mutex> lock(mutex_);
    copies_.push_back(std::move(copy));
  }
  void finish() {
    std::vector<std::function<void()>> copies;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      copies.swap(copies_);
    }
    for (const auto& copy : copies) copy();
  }

 private:
  std::mutex mutex_;
  std::vector<std::function<void()>> copies_;
};

inline Unfinished unfinished;

// Which streams were told to wait for events of which others.
class Waits {
 public:
  void add(const c10::Stream& stream, int64_t device_index, int64_t stream_id) {
    const std::lock_guard<std::mutex> lock(mutex_);
    rows_.insert(rows_.end(), {stream.device_index(), stream.id(), device_index, stream_id});
  }
  // Four numbers each: device and stream of who waits, then of whom it waits for. Begins anew.
  std::vector<int64_t> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(rows_, {});
  }

 private:
  std::mutex mutex_;
  std::vector<int64_t> rows_;
};

inline Waits waits;

// All else runs at once in the calling thread, so a stream is only a number, and an event the
// number of its stream, in place of an address.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count(); }
  c10::Device getDevice() const override { return {kType, current_index}; }
  void setDevice(c10::Device device) const override { set_current(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current_index = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }

  c10::Stream getStream(c10::Device device) const override {
    const c10::Device on = resolve(device);
    return c10::Stream(c10::Stream::UNSAFE, on, current_streams[on.index()]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, resolve(device));
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    static std::atomic<c10::StreamId> last{0};
    return c10::Stream(c10::Stream::UNSAFE, resolve(device), ++last);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return before;
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { unfinished.finish(); }
  void synchronizeDevice(c10::DeviceIndex) const override { unfinished.finish(); }

  void record(void** event, const c10::Stream& stream, c10::DeviceIndex index,
              c10::EventFlag) const override {
    TORCH_CHECK(index == -1 || index == stream.device_index(), "an event of device ", int(index),
                " cannot be recorded on stream ", stream);
    *event = reinterpret_cast<void*>((stream.id() + 1) * kMaxDevices + stream.device_index());
  }
  void block(void* event, const c10::Stream& stream) const override {
    const auto of = reinterpret_cast<intptr_t>(event);
    waits.add(stream, of % kMaxDevices, of / kMaxDevices - 1);
  }
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { unfinished.finish(); }
  double elapsedTime(void*, void*, c10::DeviceIndex) const override { return 0; }
};

}  // namespace simulated
