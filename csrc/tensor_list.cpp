#include "tensor_list.h"

#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>

namespace torchtower {

TensorView::TensorView(AtenTensorHandle tensor) : handle(tensor) {
  int64_t* borrowed_sizes = nullptr;
  int64_t* borrowed_strides = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &borrowed_sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &borrowed_strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &device_index));
  sizes = borrowed_sizes;
  strides = borrowed_strides;
}

bool same_shape(const TensorView& a, const TensorView& b) {
  return a.dim == b.dim && std::equal(a.sizes, a.sizes + a.dim, b.sizes);
}

bool same_layout(const TensorView& tensor, const int64_t* strides) {
  for (int64_t d = 0; d < tensor.dim; ++d) {
    if (tensor.strides[d] != strides[d] && tensor.sizes[d] > 1) return false;
  }
  return true;
}

int64_t count_elements(const TensorView& tensor) {
  int64_t numel = 1;
  for (int64_t d = 0; d < tensor.dim; ++d) numel *= tensor.sizes[d];
  return numel;
}

StrideVector contiguous_strides(const TensorView& tensor) {
  StrideVector strides(tensor.dim);
  int64_t stride = 1;
  for (int64_t d = tensor.dim - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= tensor.sizes[d];
  }
  return strides;
}

Placement placement(const TensorView& tensor, const void* data) {
  return {reinterpret_cast<uintptr_t>(data), tensor.sizes, tensor.strides, tensor.dim,
          static_cast<int64_t>(aoti_torch_dtype_element_size(tensor.dtype))};
}

TensorList::TensorList(StableIValue argument) {
  const auto list = torch::stable::detail::to<StableListHandle>(argument);
  size_t size = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
  handles_.reserve(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue element = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
    handles_.emplace_back(torch::stable::detail::to<AtenTensorHandle>(element));
  }
  TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
}

TensorHandle empty_strided_like(const TensorView& like, const StrideVector& strides) {
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(like.dim, like.sizes, strides.data(), like.dtype,
                                                  like.device_type, like.device_index, &made));
  return TensorHandle(made);
}

}  // namespace torchtower
