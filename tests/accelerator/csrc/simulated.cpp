// A simulated accelerator that is neither the CPU nor CUDA: several devices in host memory, behind
// PyTorch's key for private backends.
//
// After the ideas of PyTorch's own test backend,
// test/cpp_extensions/open_registration_extension/torch_openreg.

#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include "autocast.h"
#include "cells.h"
#include "hooks.h"
#include "kernels.h"
#include "sparse.h"

namespace simulated {
namespace {

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &allocator);
[[maybe_unused]] const bool hooks_registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize_);
  m.impl("set_", set_empty_);
  m.impl("set_.source_Tensor", set_tensor_);
  m.impl("set_.source_Storage", set_whole_storage_);
  m.impl("set_.source_Storage_storage_offset", set_storage_);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("_copy_from", copy_from);
  m.impl("_has_compatible_shallow_copy_type", has_compatible_shallow_copy_type);
  m.impl("native_dropout", native_dropout);
  m.impl("_thnn_fused_lstm_cell", lstm_cell);  // in inference mode
  m.impl("_thnn_fused_gru_cell", gru_cell);
  // PyTorch's generic wrapper of this one resizes its output twice, and warns.
  m.impl("mse_loss", torch::CppFunction::makeFromBoxedFunction<&call_on_cpu>());
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable",
         torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
}

TORCH_LIBRARY_IMPL(aten, SparsePrivateUse1, m) { register_sparse(m); }

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) {
  m.impl("_thnn_fused_lstm_cell", lstm_cell);
  m.impl("_thnn_fused_gru_cell", gru_cell);
}

// Copies take tensors with lazy bits as they are; the CPU's copy resolves them.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&call_on_cpu>());
}
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) { register_autocast(m); }

TORCH_LIBRARY(simulated, m) {
  m.def("device_count() -> int", []() -> int64_t { return device_count(); });
  m.def("default_generator(int index) -> Generator?",
        [](int64_t index) { return default_generator(static_cast<c10::DeviceIndex>(index)); });
  m.def("copies() -> int[]", []() { return copies.rows(); });
  m.def("reset_copies() -> ()", []() { copies.reset(); });
  m.def("draw_on_cpu(bool on) -> ()", [](bool on) { draws_on_cpu = on; });
  m.def("take_waits() -> int[]", []() { return waits.take(); });
  m.def("memory(int index) -> int[]", [](int64_t index) {
    return std::vector<int64_t>{live_bytes.at(index).load(), peak_bytes.at(index).load()};
  });
  m.def("reset_peak_memory(int index) -> ()",
        [](int64_t index) { peak_bytes.at(index) = live_bytes.at(index).load(); });
}

}  // namespace
}  // namespace simulated
