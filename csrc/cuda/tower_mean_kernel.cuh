// The averaging kernel.
//
// Mapping: one block of 256 threads averages one chunk of one parameter: 4096 elements of float32
// or a half type, 2048 of float64. A block finds its parameter by bisecting the launch's own
// argument, which lies in constant memory: eight to ten uniform loads against thousands of cycles
// of streaming. So one launch takes parameters of every size and its grid is exactly as long as its
// work. A thread walks the towers in order and holds 16 sums (float64: 8).
//
// Bytes: (T + 1) * numel * element size, each gradient read once and the mean written once.
// Little's law asks for bandwidth times latency in flight: about 18 KB a multiprocessor on an H100
// and 43 KB on a B200. 64 registers a thread, which __launch_bounds__ asks for and the compile gate
// holds without a spill, let 4 blocks live on each multiprocessor of sm_75 to sm_120. Their 1024
// threads have 4 vectors (half types: 2) of 16 bytes each in flight for every tower that the
// unrolled loop loads ahead: 64 KB (32 KB) and more.
//
// Alignment: 128-bit loads and stores where out and every tower's gradient lie on 16 bytes; the
// elements behind the last whole vector, and parameters of which one pointer lies elsewhere, go by
// single, coalesced elements.
//
// Numerics: see numerics.cuh and squares.cuh. Out may be any tower's gradient: a thread reads all
// towers of its elements before it writes them, and no pointer is __restrict__, so no read goes
// through the non-coherent cache.
#pragma once

#include "arguments.h"
#include "intrinsics.cuh"
#include "statistics.cuh"
#include "tower_mean_body.cuh"

namespace torchtower::cuda {

constexpr int kBlocksPerMultiprocessor = 4;

// kTowers: 0 for a count known at run time only.
template <DType kDType, int kTowers, int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    tower_mean_kernel(const __grid_constant__ Arguments<kBytes> arguments) {
  NoRecorder recorder;
  average_block<kDType, kTowers>(arguments, recorder);
}

template <DType kDType, int kBytes>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    tower_mean_with_statistics_kernel(const __grid_constant__ Arguments<kBytes> arguments,
                                      Partial* scratch) {
  extern __shared__ Partial shared[];
  BlockRecorder recorder{shared};
  average_block<kDType, 0>(arguments, recorder);
  recorder.write(scratch, num_rows(arguments.header), arguments.header.num_chunks);
}

// The kernel for a launch, of which a few counts of towers have one of their own.
template <DType kDType, int kBytes>
const void* kernel_for(int64_t num_towers, bool with_statistics) {
  const auto address = [](auto* kernel) { return reinterpret_cast<const void*>(kernel); };
  if (with_statistics) {
    return address(&tower_mean_with_statistics_kernel<kDType, kBytes>);
  }
  switch (num_towers) {
    case 2:
      return address(&tower_mean_kernel<kDType, 2, kBytes>);
    case 4:
      return address(&tower_mean_kernel<kDType, 4, kBytes>);
    case 8:
      return address(&tower_mean_kernel<kDType, 8, kBytes>);
    default:
      return address(&tower_mean_kernel<kDType, 0, kBytes>);
  }
}

template <int kBytes>
const void* kernel_for(DType dtype, int64_t num_towers, bool with_statistics) {
  switch (dtype) {
    case DType::kFloat32:
      return kernel_for<DType::kFloat32, kBytes>(num_towers, with_statistics);
    case DType::kFloat64:
      return kernel_for<DType::kFloat64, kBytes>(num_towers, with_statistics);
    case DType::kFloat16:
      return kernel_for<DType::kFloat16, kBytes>(num_towers, with_statistics);
    default:
      return kernel_for<DType::kBFloat16, kBytes>(num_towers, with_statistics);
  }
}

}  // namespace torchtower::cuda
