// Sparse tensors, as far as embeddings make them: PyTorch's kernels for CPUs, which read host
// memory.
#pragma once

#include <ATen/NativeFunctions.h>
#include <torch/library.h>

#include "memory.h"

namespace simulated {

// A sparse tensor's device is the current one when it is made.
inline at::Tensor sparse_of(int64_t sparse_dim, int64_t dense_dim, c10::SymIntArrayRef size,
                            const at::Tensor& indices, const at::Tensor& values,
                            std::optional<c10::ScalarType> dtype, std::optional<c10::Layout> layout,
                            std::optional<c10::Device> device, std::optional<bool> pin_memory,
                            std::optional<bool> is_coalesced) {
  const OnDevice guard(values.device());
  return at::native::new_with_dims_and_tensor_sparse_symint(sparse_dim, dense_dim, size, indices,
                                                            values, dtype, layout, device,
                                                            pin_memory, is_coalesced);
}

inline at::Tensor empty_sparse_of_dims(int64_t sparse_dim, int64_t dense_dim, c10::IntArrayRef size,
                                       std::optional<c10::ScalarType> dtype,
                                       std::optional<c10::Layout> layout,
                                       std::optional<c10::Device> device,
                                       std::optional<bool> pin_memory) {
  const OnDevice guard(c10::device_or_default(device));
  return at::native::new_with_dims_sparse(sparse_dim, dense_dim, size, dtype, layout, device,
                                          pin_memory);
}

inline at::Tensor empty_sparse(c10::SymIntArrayRef size, std::optional<c10::ScalarType> dtype,
                               std::optional<c10::Layout> layout, std::optional<c10::Device> device,
                               std::optional<bool> pin_memory,
                               std::optional<c10::MemoryFormat> format) {
  const OnDevice guard(c10::device_or_default(device));
  return at::native::empty_sparse_symint(size, dtype, layout, device, pin_memory, format);
}

template <auto* kKernel>
struct OnDeviceOfSelf;
template <typename Result, typename Self, typename... Rest, Result (*kKernel)(Self, Rest...)>
struct OnDeviceOfSelf<kKernel> {
  static Result call(Self self, Rest... rest) {
    const OnDevice guard(self.device());
    return kKernel(self, std::forward<Rest>(rest)...);
  }
};

inline void register_sparse(torch::Library& library) {
  library.impl("_sparse_coo_tensor_with_dims_and_tensors", sparse_of);
  library.impl("_sparse_coo_tensor_with_dims", empty_sparse_of_dims);
  library.impl("empty.memory_format", empty_sparse);
  library.impl("sparse_dim", at::native::sparse_dim_sparse);
  library.impl("dense_dim", at::native::dense_dim_sparse);
  library.impl("_nnz", at::native::_nnz_sparse);
  library.impl("_indices", at::native::_indices_sparse);
  library.impl("_values", at::native::_values_sparse);
  library.impl("indices", at::native::indices_sparse);
  library.impl("values", at::native::values_sparse);
  library.impl("is_coalesced", at::native::is_coalesced_sparse);
  library.impl("_coalesced_", at::native::_coalesced_sparse_);
  library.impl("_coalesce", OnDeviceOfSelf<&at::native::_coalesce_sparse_cpu>::call);
  library.impl("clone", OnDeviceOfSelf<&at::native::clone_sparse>::call);
  library.impl("copy_sparse_to_sparse_", at::native::copy_sparse_);
  library.impl("copy_", at::native::copy_sparse_wrapper_);
  library.impl("add.Tensor", OnDeviceOfSelf<&at::native::add_sparse>::call);
  library.impl("mul.Tensor", OnDeviceOfSelf<&at::native::mul_sparse>::call);
  library.impl("mul.out", at::native::mul_out_sparse_cpu);
  library.impl("add_.Tensor", at::native::add_sparse_);
  library.impl("add.out", at::native::add_out_sparse_cpu);
  library.impl("_to_dense", at::native::sparse_to_dense);
  library.impl("zero_", at::native::zero_sparse_);
  library.impl("sparse_mask", OnDeviceOfSelf<&at::native::sparse_mask>::call);
}

}  // namespace simulated
