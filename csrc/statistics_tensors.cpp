#include <torch/headeronly/util/shim_utils.h>

#include "checks.h"

namespace torchtower {

namespace {

TensorHandle zeros(const std::vector<int64_t>& sizes, int32_t dtype, const Call& call) {
  StrideVector strides(sizes.size(), 1);
  if (sizes.size() == 2) strides[0] = sizes[1];
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, call.device_type(),
                                                  call.device_index(), &made));
  TensorHandle tensor(made);
  TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(made));
  return tensor;
}

template <typename T>
T* data(const TensorHandle& tensor) {
  void* pointer = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor.get(), &pointer));
  return static_cast<T*>(pointer);
}

// Rows of the towers that were read, put where the caller counts them.
TensorHandle give_every_tower_a_row(TensorHandle read, int32_t dtype, const Call& call) {
  if (call.num_towers_given() == call.towers().count) return read;
  TensorHandle all = zeros({call.num_towers_given(), call.num_parameters()}, dtype, call);
  const int64_t size = call.num_parameters();
  const int64_t stride = 1;
  const auto row_of = [&](const TensorHandle& tensor, int64_t row) {
    AtenTensorHandle view = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(tensor.get(), 1, &size, &stride, row * size, &view));
    return TensorHandle(view);
  };
  for (int64_t i = 0; i < call.towers().count; ++i) {
    const TensorHandle from = row_of(read, i);
    const TensorHandle to = row_of(all, call.towers_read()[i]);
    TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(to.get(), from.get(), 0));
  }
  return all;
}

}  // namespace

StatisticsTensors::StatisticsTensors(const Call& call)
    : call_(call),
      sum_of_squares_(
          zeros({call.towers().count, call.num_parameters()}, aoti_torch_dtype_float64(), call)),
      non_finite_(
          zeros({call.towers().count, call.num_parameters()}, aoti_torch_dtype_int64(), call)),
      out_sum_of_squares_(zeros({call.num_parameters()}, aoti_torch_dtype_float64(), call)) {}

Statistics StatisticsTensors::pointers() const {
  return {data<double>(sum_of_squares_), data<int64_t>(non_finite_),
          data<double>(out_sum_of_squares_)};
}

void StatisticsTensors::return_on(StableIValue* stack) {
  sum_of_squares_ =
      give_every_tower_a_row(std::move(sum_of_squares_), aoti_torch_dtype_float64(), call_);
  non_finite_ = give_every_tower_a_row(std::move(non_finite_), aoti_torch_dtype_int64(), call_);
  stack[0] = torch::stable::detail::from(sum_of_squares_.release());
  stack[1] = torch::stable::detail::from(non_finite_.release());
  stack[2] = torch::stable::detail::from(out_sum_of_squares_.release());
}

}  // namespace torchtower
