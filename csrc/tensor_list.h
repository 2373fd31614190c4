// The stable C interface's tensors without torch::stable::Tensor, whose shared_ptr costs one more
// allocation for each of the thousands of tensors of a call.
#pragma once

#include <torch/csrc/stable/library.h>

#include <memory>
#include <utility>
#include <vector>

#include "overlap.h"

namespace torchtower {

using StrideVector = std::vector<int64_t>;

struct TensorDeleter {
  void operator()(AtenTensorOpaque* tensor) const { aoti_torch_delete_tensor_object(tensor); }
};

// One owned tensor.
using TensorHandle = std::unique_ptr<AtenTensorOpaque, TensorDeleter>;

// What a kernel needs to know of one strided tensor; borrows from it.
struct TensorView {
  explicit TensorView(AtenTensorHandle tensor);

  AtenTensorHandle handle;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dim;
  int32_t dtype;
  int32_t device_type;
  int32_t device_index;
};

bool same_shape(const TensorView& a, const TensorView& b);
// A dimension of size 1 has no stride worth comparing.
bool same_layout(const TensorView& tensor, const int64_t* strides);
int64_t count_elements(const TensorView& tensor);
StrideVector contiguous_strides(const TensorView& tensor);
Placement placement(const TensorView& tensor, const void* data);

// A Tensor[] argument, taken off the dispatcher's stack.
class TensorList {
 public:
  explicit TensorList(StableIValue argument);

  int64_t size() const { return static_cast<int64_t>(handles_.size()); }
  AtenTensorHandle operator[](int64_t index) const { return handles_[index].get(); }

 private:
  std::vector<TensorHandle> handles_;
};

// An uninitialised tensor with the shape, dtype and device of `like` and the strides given.
TensorHandle empty_strided_like(const TensorView& like, const StrideVector& strides);

// Copies into and out of temporaries are no part of anybody's graph.
class NoGradGuard {
 public:
  NoGradGuard() : before_(aoti_torch_grad_mode_is_enabled()) {
    aoti_torch_grad_mode_set_enabled(false);
  }
  ~NoGradGuard() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGradGuard(const NoGradGuard&) = delete;
  NoGradGuard& operator=(const NoGradGuard&) = delete;

 private:
  bool before_;
};

}  // namespace torchtower
