#include "describe.h"

#include <sstream>

namespace torchtower {

namespace {

struct KnownDType {
  int32_t code;
  const char* name;
  bool taken;
  RealDType real;
};

// The codes are libtorch's to choose; they are asked for once.
const std::vector<KnownDType>& known_dtypes() {
  static const std::vector<KnownDType> known = {
      {aoti_torch_dtype_float32(), "float32", true, {DType::kFloat32, 1}},
      {aoti_torch_dtype_bfloat16(), "bfloat16", true, {DType::kBFloat16, 1}},
      {aoti_torch_dtype_float16(), "float16", true, {DType::kFloat16, 1}},
      {aoti_torch_dtype_float64(), "float64", true, {DType::kFloat64, 1}},
      {aoti_torch_dtype_complex64(), "complex64", true, {DType::kFloat32, 2}},
      {aoti_torch_dtype_complex128(), "complex128", true, {DType::kFloat64, 2}},
      {aoti_torch_dtype_complex32(), "complex32", false, {}},
      {aoti_torch_dtype_bool(), "bool", false, {}},
      {aoti_torch_dtype_uint8(), "uint8", false, {}},
      {aoti_torch_dtype_int8(), "int8", false, {}},
      {aoti_torch_dtype_int16(), "int16", false, {}},
      {aoti_torch_dtype_int32(), "int32", false, {}},
      {aoti_torch_dtype_int64(), "int64", false, {}},
      {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn", false, {}},
      {aoti_torch_dtype_float8_e5m2(), "float8_e5m2", false, {}},
  };
  return known;
}

}  // namespace

const RealDType* find_real_dtype(int32_t dtype) {
  for (const KnownDType& known : known_dtypes()) {
    if (known.code == dtype) return known.taken ? &known.real : nullptr;
  }
  return nullptr;
}

std::string describe_dtype(int32_t dtype) {
  for (const KnownDType& known : known_dtypes()) {
    if (known.code == dtype) return known.name;
  }
  return "dtype number " + std::to_string(dtype);
}

std::string describe_device(int32_t device_type, int32_t device_index) {
  if (device_type == aoti_torch_device_type_cpu()) return "cpu";
  std::string name = "device type " + std::to_string(device_type);
  if (device_type == aoti_torch_device_type_cuda()) name = "cuda";
  if (device_type == aoti_torch_device_type_xpu()) name = "xpu";
  if (device_type == aoti_torch_device_type_mps()) name = "mps";
  return name + ":" + std::to_string(device_index);
}

std::string describe_shape(const TensorView& tensor) {
  std::ostringstream shape;
  shape << "(";
  for (int64_t d = 0; d < tensor.dim; ++d) shape << (d == 0 ? "" : ", ") << tensor.sizes[d];
  shape << (tensor.dim == 1 ? ",)" : ")");
  return shape.str();
}

}  // namespace torchtower
