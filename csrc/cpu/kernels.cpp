#include "kernels.h"

#include <array>
#include <atomic>
#include <cstring>

namespace torchtower::cpu {

namespace {

constexpr size_t kMost = 2;

struct Available {
  std::array<const Kernels*, kMost> kernels{};
  std::array<const char*, kMost + 1> names{};
  size_t count = 0;

  void add(const Kernels& one) {
    kernels[count] = &one;
    names[count++] = one.name;
  }
};

const Available& available() {
  static const Available found = [] {
    Available machine;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      machine.add(kAvx2Kernels);
    }
#elif defined(__aarch64__)
    machine.add(kNeonKernels);
#endif
    machine.add(kBaselineKernels);
    return machine;
  }();
  return found;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{available().kernels[0]};
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

const char* const* available_kernels() { return available().names.data(); }

bool use_kernels(const char* name) {
  for (size_t i = 0; i < available().count; ++i) {
    if (std::strcmp(available().names[i], name) == 0) {
      chosen().store(available().kernels[i], std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace torchtower::cpu
