// The op and its sibling for CUDA tensors, in the current stream of the tensors' device.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <stdexcept>
#include <string>

#include "../checks.h"
#include "tower_mean_cuda.h"

namespace torchtower::cuda {

namespace {

// The arguments' size depends on it, and it cannot change under a running process.
int driver_version() {
  static const int version = [] {
    int value = 0;
    STD_CUDA_CHECK(cudaDriverGetVersion(&value));
    return value;
  }();
  return version;
}

// From torch's caching allocator, which hands the memory on in stream order and knows of graph
// capture.
TensorHandle allocate_scratch(const Call& call) {
  const int64_t size = scratch_bytes(call.parameters(), call.num_parameters(), call.towers());
  const int64_t stride = 1;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(),
                                                  call.device_type(), call.device_index(), &made));
  return TensorHandle(made);
}

void check_num_towers(const char* function, const Call& call) {
  if (call.towers().count > max_towers()) {
    throw std::invalid_argument(std::string(function) + ": expected at most " +
                                std::to_string(max_towers()) +
                                " towers with a weight above 0 on a CUDA device, but got " +
                                std::to_string(call.towers().count));
  }
}

void launch(const Call& call, const Statistics* statistics) {
  const torch::stable::accelerator::DeviceGuard guard(call.device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(call.device_index(), &stream));
  TensorHandle scratch;
  void* scratch_data = nullptr;
  if (statistics != nullptr) {
    scratch = allocate_scratch(call);
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(scratch.get(), &scratch_data));
  }
  STD_CUDA_CHECK(launch_tower_mean(call.parameters(), call.num_parameters(), call.towers(),
                                   statistics, scratch_data, driver_version(),
                                   static_cast<cudaStream_t>(stream)));
}

void tower_mean_(StableIValue* stack, uint64_t, uint64_t) {
  Call call("tower_mean_", stack);
  check_num_towers("tower_mean_", call);
  launch(call, nullptr);
  call.finish();
}

void tower_mean_with_statistics_(StableIValue* stack, uint64_t, uint64_t) {
  Call call("tower_mean_with_statistics_", stack);
  check_num_towers("tower_mean_with_statistics_", call);
  StatisticsTensors tensors(call);
  const Statistics statistics = tensors.pointers();
  launch(call, &statistics);
  call.finish();
  tensors.return_on(stack);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchtower, CUDA, m) {
  m.impl("tower_mean_", &tower_mean_);
  m.impl("tower_mean_with_statistics_", &tower_mean_with_statistics_);
}

}  // namespace torchtower::cuda
