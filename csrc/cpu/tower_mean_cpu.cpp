// The CPU's kernels of the op and its sibling.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../checks.h"
#include "executor.h"

namespace torchtower::cpu {

namespace {

void torch_parallel_for_chunks(int64_t count, int64_t grain, Body body, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

void run(const Call& call, const Statistics* statistics) {
  tower_mean(call.parameters(), call.num_parameters(), call.towers(), statistics,
             &torch_parallel_for_chunks);
}

void tower_mean_(StableIValue* stack, uint64_t, uint64_t) {
  Call call("tower_mean_", stack);
  run(call, nullptr);
  call.finish();
}

void tower_mean_with_statistics_(StableIValue* stack, uint64_t, uint64_t) {
  Call call("tower_mean_with_statistics_", stack);
  StatisticsTensors tensors(call);
  const Statistics statistics = tensors.pointers();
  run(call, &statistics);
  call.finish();
  tensors.return_on(stack);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchtower, CPU, m) {
  m.impl("tower_mean_", &tower_mean_);
  m.impl("tower_mean_with_statistics_", &tower_mean_with_statistics_);
}

}  // namespace torchtower::cpu
