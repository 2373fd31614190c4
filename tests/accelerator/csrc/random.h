// Generators: a CPU generator on a simulated device. Every device has a default one.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/bernoulli.h>
#include <ATen/ops/empty_like.h>

#include "devices.h"

namespace simulated {

class GeneratorOnDevice final : public c10::GeneratorImpl {
 public:
  explicit GeneratorOnDevice(c10::DeviceIndex index, at::Generator cpu)
      : GeneratorImpl(c10::Device(kType, index),
                      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        cpu_(std::move(cpu)) {}

  const at::Generator& cpu() const { return cpu_; }

  void set_current_seed(uint64_t seed) override {
    const auto lock = locked();
    cpu_.set_current_seed(seed);
  }
  uint64_t current_seed() const override { return cpu_.current_seed(); }
  uint64_t seed() override { return cpu_.seed(); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "simulated generators have no offset"); }
  uint64_t get_offset() const override {
    TORCH_CHECK(false, "simulated generators have no offset");
  }
  void set_state(const c10::TensorImpl& state) override {
    const auto lock = locked();
    cpu_.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    const auto lock = locked();
    return cpu_.unsafeGetGeneratorImpl()->get_state();
  }

 private:
  GeneratorOnDevice* clone_impl() const override {
    return new GeneratorOnDevice(device_.index(),
                                 at::Generator(cpu_.unsafeGetGeneratorImpl()->clone()));
  }

  std::unique_lock<std::mutex> locked() const {
    return std::unique_lock(cpu_.unsafeGetGeneratorImpl()->mutex_);
  }

  at::Generator cpu_;
};

inline at::Generator new_generator(c10::DeviceIndex index) {
  const auto on = static_cast<c10::DeviceIndex>(index < 0 ? current_index : index);
  return at::make_generator<GeneratorOnDevice>(on, at::detail::createCPUGenerator());
}

inline const at::Generator& default_generator(c10::DeviceIndex index) {
  static const std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (c10::DeviceIndex i = 0; i < device_count(); ++i) made.push_back(new_generator(i));
    return made;
  }();
  return all.at(index < 0 ? current_index : index);
}

inline const at::Generator& cpu_generator_of(const at::Generator& generator) {
  return static_cast<GeneratorOnDevice*>(generator.unsafeGetGeneratorImpl())->cpu();
}

// Whether operators leave random numbers to the CPU's, which refuse a simulated device's generator,
// as in backends that have none of their own.
inline std::atomic<bool> draws_on_cpu = false;

// Fused dropout takes no generator: it draws from its device's default one, as CUDA's does.
inline std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& input, double p,
                                                         std::optional<bool> train) {
  at::Tensor mask = at::empty_like(input, input.options().dtype(c10::kBool));
  if (train.has_value() && !*train) return {input.clone(), mask.fill_(true)};
  if (draws_on_cpu) {
    mask.copy_(at::empty_like(mask, c10::kCPU).bernoulli_(1 - p));
  } else {
    mask.bernoulli_(1 - p, default_generator(input.device().index()));
  }
  return {input.mul(mask).mul_(p < 1 ? 1 / (1 - p) : 0), mask};
}

}  // namespace simulated
