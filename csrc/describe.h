// The op's dtypes, and tensors in words for error texts.
#pragma once

#include <string>

#include "tensor_list.h"
#include "tower_mean.h"

namespace torchtower {

// A dtype that the op takes; complex numbers are pairs of reals.
struct RealDType {
  DType dtype;
  int64_t reals_per_element;
};

// nullptr for a dtype that the op does not take.
const RealDType* find_real_dtype(int32_t dtype);

std::string describe_dtype(int32_t dtype);
std::string describe_device(int32_t device_type, int32_t device_index);
std::string describe_shape(const TensorView& tensor);

}  // namespace torchtower
