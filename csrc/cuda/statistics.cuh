// The statistics of a launch, the same bits in every run: no atomics, every sum in one fixed order.
//
// First pass (BlockRecorder, inside the averaging kernel): thread -> warp by shuffles -> block
// through shared memory
// -> one Partial for each row and chunk, in scratch memory [num_towers + 1, num_chunks]. Row t is
// tower t, the last row is the mean. Second pass (finish_statistics): one block for each parameter
// and row adds that parameter's chunks. Scratch is 16 bytes for every 16 KB read.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "squares.cuh"
#include "tower_mean.h"

namespace torchtower::cuda {

constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;

// The towers and the mean.
TORCHTOWER_HOST_DEVICE inline int num_rows(const Header& header) { return header.num_towers + 1; }

__device__ __forceinline__ Partial plus(const Partial& a, const Partial& b) {
  return {add(a.sum_of_squares, b.sum_of_squares), a.non_finite + b.non_finite};
}

// The sum over the 32 lanes, in lane 0.
__device__ __forceinline__ Partial warp_sum(Partial partial) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const Partial other{__shfl_down_sync(0xffffffffu, partial.sum_of_squares, distance),
                        __shfl_down_sync(0xffffffffu, partial.non_finite, distance)};
    partial = plus(partial, other);
  }
  return partial;
}

__device__ __forceinline__ Partial sum_in_order(const Partial* partials, int count) {
  Partial sum = partials[0];
  for (int i = 1; i < count; ++i) {
    sum = plus(sum, partials[i]);
  }
  return sum;
}

struct BlockRecorder {
  static constexpr bool kRecords = true;

  Partial* shared;  // [rows, kWarps]

  __device__ __forceinline__ void record(int row, const Partial& partial) {
    const Partial sum = warp_sum(partial);
    if (threadIdx.x % kWarpSize == 0) {
      shared[row * kWarps + threadIdx.x / kWarpSize] = sum;
    }
  }

  __device__ __forceinline__ void write(Partial* scratch, int num_rows, uint32_t num_chunks) const {
    __syncthreads();
    for (int row = threadIdx.x; row < num_rows; row += kThreads) {
      scratch[static_cast<int64_t>(row) * num_chunks + blockIdx.x] =
          sum_in_order(shared + row * kWarps, kWarps);
    }
  }
};

// Grid: (entries of the launch, towers + 1).
template <int kBytes>
__global__ void __launch_bounds__(kThreads)
    finish_statistics_kernel(const __grid_constant__ Arguments<kBytes> arguments,
                             const Partial* scratch, Statistics statistics,
                             int64_t num_parameters) {
  __shared__ Partial shared[kWarps];
  const int index = blockIdx.x;
  const int row = blockIdx.y;
  const Header& header = arguments.header;
  const uint32_t begin = arguments.entry(index).first_chunk;
  const uint32_t end =
      index + 1 < header.num_entries ? arguments.entry(index + 1).first_chunk : header.num_chunks;

  const Partial* chunks = scratch + static_cast<int64_t>(row) * header.num_chunks;
  Partial sum{0, 0};
  for (uint32_t chunk = begin + threadIdx.x; chunk < end; chunk += kThreads) {
    sum = plus(sum, chunks[chunk]);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarpSize == 0) {
    shared[threadIdx.x / kWarpSize] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = sum_in_order(shared, kWarps);
    const int64_t parameter = arguments.entry(index).index;
    if (row < header.num_towers) {
      statistics.sum_of_squares[row * num_parameters + parameter] = sum.sum_of_squares;
      statistics.non_finite[row * num_parameters + parameter] = sum.non_finite;
    } else {
      statistics.out_sum_of_squares[parameter] = sum.sum_of_squares;
    }
  }
}

}  // namespace torchtower::cuda
