// Autocast: which operators run in the lower precision and which in float32, of the lists that
// other devices use.
#pragma once

#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "devices.h"

namespace simulated {

template <bool kLower>
void cast_and_call(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastPrivateUse1);
  const c10::ScalarType dtype = kLower ? at::autocast::get_autocast_dtype(kType) : c10::kFloat;
  for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = at::autocast::cached_cast(dtype, value.toTensor(), kType);
    } else if (value.isTensorList()) {
      value = at::autocast::cached_cast(dtype, value.toTensorList().vec(), kType);
    }
  }
  op.callBoxed(stack);
}

inline void register_autocast(torch::Library& library) {
  const auto lower = [&](const char* name) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&cast_and_call<true>>());
  };
  const auto full = [&](const char* name) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&cast_and_call<false>>());
  };
  for (const char* name : {"linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "conv1d", "conv2d",
                           "conv3d", "_convolution", "scaled_dot_product_attention"}) {
    lower(name);
  }
  for (const char* name :
       {"softmax.int", "log_softmax.int", "layer_norm", "group_norm", "mse_loss", "nll_loss",
        "cross_entropy_loss", "exp", "log", "sum", "pow.Tensor_Scalar"}) {
    full(name);
  }
}

}  // namespace simulated
