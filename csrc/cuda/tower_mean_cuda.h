// The CUDA launcher of torchtower::tower_mean_ and its sibling: pointers and a stream in, nothing
// of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "tower_mean.h"

namespace torchtower::cuda {

// Of more towers than this not even one parameter fits the smallest launch.
int64_t max_towers();

// Device memory that the statistics of a call need while it runs.
int64_t scratch_bytes(const Parameter* parameters, int64_t num_parameters, const Towers& towers);

// Averages all parameters, which lie on the current device, in `stream`, and fills `statistics`
// (device memory; null for the plain op, which needs no `scratch` either) from the same reads.
// Allocates nothing and waits for nothing. Everything that the kernels are told travels by value in
// their launches, so that a captured graph replays them.
//
// driver_version, as cudaDriverGetVersion gives it, decides how much one launch may be told.
cudaError_t launch_tower_mean(const Parameter* parameters, int64_t num_parameters,
                              const Towers& towers, const Statistics* statistics, void* scratch,
                              int driver_version, cudaStream_t stream);

}  // namespace torchtower::cuda
