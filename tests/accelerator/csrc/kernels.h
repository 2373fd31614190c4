// Operators that call another one of the CPU's than their own.
#pragma once

#include <cmath>

#include "cpu_calls.h"

namespace simulated {

inline c10::OperatorHandle find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

// PyTorch sends this device's convolutions to operators that a backend must override.
inline void convolution(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  static const auto op = find_operator("aten::convolution");
  call_on_cpu(op, stack);
}

inline void convolution_backward(const c10::OperatorHandle& overridden, torch::jit::Stack* stack) {
  static const auto op = find_operator("aten::convolution_backward");
  const size_t begin = stack->size() - overridden.schema().arguments().size();
  const at::Tensor grad = (*stack)[begin].toTensor();
  stack->insert(stack->begin() + begin + 3,
                c10::IValue(std::vector<int64_t>{grad.size(1)}));  // bias_sizes
  call_on_cpu(op, stack);
}

inline at::Tensor as_cpu(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  const c10::Storage& storage = tensor.storage();
  c10::Storage cpu(c10::Storage::use_byte_size_t(), storage.nbytes(),
                   c10::DataPtr(storage.mutable_data(), c10::Device(c10::kCPU)), nullptr, false);
  return tensor_over(std::move(cpu), c10::DispatchKey::CPU, tensor, c10::Device(c10::kCPU));
}

inline at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  copies.add(self.device(), to.device(), static_cast<int64_t>(self.numel() * self.itemsize()));
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (non_blocking && to.is_cpu()) {
    // Whoever reads before a synchronisation must see that it was too early.
    unfinished.add([to, value = as_cpu(self).clone()] { to.copy_(value); });
    to.fill_(to.is_floating_point() || to.is_complex() ? std::nan("") : 0);
  } else {
    as_cpu(to).copy_(as_cpu(self));
  }
  return to;
}

// A module's parameters keep their identity, hence their ties, when it moves here from the CPU.
inline bool has_compatible_shallow_copy_type(const at::Tensor& self, const at::Tensor& from) {
  const auto dense = [](const at::Tensor& tensor) {
    return tensor.layout() == c10::kStrided && (tensor.is_cpu() || tensor.device().type() == kType);
  };
  return dense(self) && dense(from);
}

}  // namespace simulated
