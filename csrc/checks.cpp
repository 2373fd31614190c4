#include "checks.h"

#include <torch/headeronly/util/shim_utils.h>

#include <sstream>
#include <stdexcept>

#include "describe.h"
#include "weights.h"

namespace torchtower {

namespace {

std::vector<double> take_doubles(StableIValue argument) {
  const auto list = torch::stable::detail::to<StableListHandle>(argument);
  size_t size = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
  std::vector<double> doubles(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue element = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
    doubles[i] = torch::stable::detail::to<double>(element);
  }
  TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  return doubles;
}

}  // namespace

Call::Call(const char* function, StableIValue* stack)
    : function_(function), out_(stack[0]), grads_(stack[1]), weights_(take_doubles(stack[2])) {
  normalise_weights();
  read_outputs();
  read_gradients();
  refuse_overlaps();
}

void Call::fail(const std::string& message) const {
  throw std::invalid_argument(std::string(function_) + ": " + message);
}

void Call::normalise_weights() {
  const std::string complaint = describe_bad_weights(weights_);
  if (!complaint.empty()) fail(complaint);
  if (grads_.size() != num_towers_given() * out_.size()) {
    std::ostringstream message;
    message << "expected " << num_towers_given() * out_.size()
            << " gradients, tower-major (as many towers as weights, " << num_towers_given()
            << ", times as many parameters as outputs, " << out_.size() << "), but got "
            << grads_.size();
    fail(message.str());
  }
  NormalWeights normal = normalise(weights_);
  towers_read_ = std::move(normal.towers_read);
  weights_read_ = std::move(normal.weights);
  towers_ = {static_cast<int64_t>(towers_read_.size()), normal.rule, weights_read_.data()};
}

void Call::read_outputs() {
  const NoGradGuard no_grad;
  out_views_.reserve(out_.size());
  out_data_.reserve(out_.size());
  layouts_.reserve(out_.size());
  parameters_.reserve(out_.size());
  for (int64_t p = 0; p < out_.size(); ++p) {
    const TensorView out(out_[p]);
    if (p == 0) {
      device_type_ = out.device_type;
      device_index_ = out.device_index;
    }
    if (out.device_type != device_type_ || out.device_index != device_index_) {
      fail("expected every tensor on " + describe_device(device_type_, device_index_) +
           ", where parameter 0's output is, but parameter " + std::to_string(p) +
           "'s output is on " + describe_device(out.device_type, out.device_index));
    }
    const RealDType* real = find_real_dtype(out.dtype);
    if (real == nullptr) {
      fail("expected parameter " + std::to_string(p) +
           "'s output to have dtype float32, float64, float16, bfloat16, complex64 or complex128, "
           "but got " +
           describe_dtype(out.dtype));
    }
    // Every output's pointer is taken before any gradient's: asking for a writable pointer gives a
    // lazily cloned tensor memory of its own.
    void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(out.handle, &data));
    out_views_.push_back(out);
    out_data_.push_back(data);
    TensorView layout = out;
    switch (density(placement(out, data))) {
      case Density::kDense:
        break;
      case Density::kGapped:
        temporaries_.push_back(empty_strided_like(out, contiguous_strides(out)));
        layout = TensorView(temporaries_.back().get());
        TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(layout.handle, &data));
        break;
      case Density::kSelfOverlap:
        fail(
            "expected the elements of parameter " + std::to_string(p) +
            "'s output to lie apart in memory, but its strides let them overlap (is it expanded?)");
    }
    layouts_.push_back(layout);
    const int64_t numel = count_elements(out) * real->reals_per_element;
    parameters_.push_back({data, nullptr, numel, real->dtype, real->dtype});
  }
}

void Call::check_gradient(const TensorView& grad, int64_t tower, int64_t index) const {
  const TensorView& out = out_views_[index];
  const auto whose = [&] {
    return "tower " + std::to_string(tower) + "'s gradient of parameter " + std::to_string(index);
  };
  const auto expected = [&](const std::string& what, const std::string& got) {
    fail("expected every tower's gradient of parameter " + std::to_string(index) + " to have " +
         what + ", but tower " + std::to_string(tower) + "'s has " + got);
  };
  if (grad.device_type != device_type_ || grad.device_index != device_index_) {
    fail("expected every tensor on " + describe_device(device_type_, device_index_) +
         ", where parameter 0's output is, but " + whose() + " is on " +
         describe_device(grad.device_type, grad.device_index));
  }
  if (!same_shape(grad, out)) expected("shape " + describe_shape(out), describe_shape(grad));
  if (grad.dtype == (tower == 0 ? out.dtype : first_dtypes_[index])) return;
  const RealDType* real = find_real_dtype(grad.dtype);
  if (real == nullptr) {
    fail("expected " + whose() +
         " to have dtype float32, float64, float16, bfloat16, complex64 or complex128, but got " +
         describe_dtype(grad.dtype));
  }
  const bool is_half = real->dtype == DType::kFloat16 || real->dtype == DType::kBFloat16;
  const bool widens = is_half && out.dtype == aoti_torch_dtype_float32();
  if (tower == 0 && !widens) {
    expected("the output's dtype, " + describe_dtype(out.dtype), describe_dtype(grad.dtype));
  }
  if (tower > 0) {
    expected("dtype " + describe_dtype(first_dtypes_[index]) + ", as tower 0's",
             describe_dtype(grad.dtype));
  }
}

void Call::read_gradients() {
  const NoGradGuard no_grad;
  const int64_t num = num_parameters();
  const int64_t count = towers_.count;
  pointers_.resize(num * count);
  first_dtypes_.resize(num);
  gradient_extents_.reserve(grads_.size());
  int64_t row = 0;  // among the towers that are read
  for (int64_t t = 0; t < num_towers_given(); ++t) {
    const bool is_read = row < count && towers_read_[row] == t;
    for (int64_t p = 0; p < num; ++p) {
      const TensorView grad(grads_[t * num + p]);
      check_gradient(grad, t, p);
      if (t == 0) {
        first_dtypes_[p] = grad.dtype;
        parameters_[p].dtype = find_real_dtype(grad.dtype)->dtype;
      }
      const void* data = nullptr;
      TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(grad.handle, &data));
      const bool is_out = data == out_data_[p] && grad.dtype == out_views_[p].dtype &&
                          same_layout(grad, out_views_[p].strides);
      if (!is_out) gradient_extents_.push_back(extent(placement(grad, data), t * num + p));
      if (is_read) pointers_[p * count + row] = as_laid_out(grad, layouts_[p]);
    }
    row += is_read;
  }
  for (int64_t p = 0; p < num; ++p) parameters_[p].grads = pointers_.data() + p * count;
}

}  // namespace torchtower
