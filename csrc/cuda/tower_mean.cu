// The launches of a call: as few as the size of their arguments allows, one at best.
#include "tower_mean_cuda.h"

#include "packing.h"
#include "tower_mean_kernel.cuh"

namespace torchtower::cuda {
namespace {

constexpr int kDriverOfLargeArguments = 12010;

// What the launches of one call have in common.
struct Work {
  const Parameter* parameters;
  int64_t num_parameters;
  const Towers& towers;
  const Statistics* statistics;
  Partial* scratch;
  cudaStream_t stream;
};

template <int kBytes>
cudaError_t launch_finish(Arguments<kBytes>& arguments, const Work& work) {
  const dim3 grid(arguments.header.num_entries, num_rows(arguments.header));
  const Partial* scratch = work.scratch;
  Statistics statistics = *work.statistics;
  int64_t num_parameters = work.num_parameters;
  void* values[] = {&arguments, &scratch, &statistics, &num_parameters};
  return cudaLaunchKernel(reinterpret_cast<const void*>(&finish_statistics_kernel<kBytes>), grid,
                          dim3(kThreads), values, 0, work.stream);
}

template <int kBytes>
cudaError_t launch_packed(Arguments<kBytes>& arguments, DType dtype, const Work& work) {
  const Header& header = arguments.header;
  const bool with_statistics = work.statistics != nullptr;
  if (header.num_chunks > 0) {
    const size_t shared_bytes = with_statistics ? num_rows(header) * kWarps * sizeof(Partial) : 0;
    const void* kernel = kernel_for<kBytes>(dtype, header.num_towers, with_statistics);
    Partial* scratch = work.scratch;
    void* values[] = {&arguments, &scratch};
    const cudaError_t error = cudaLaunchKernel(kernel, dim3(header.num_chunks), dim3(kThreads),
                                               values, shared_bytes, work.stream);
    if (error != cudaSuccess) {
      return error;
    }
  }
  return with_statistics ? launch_finish(arguments, work) : cudaSuccess;
}

template <int kBytes>
cudaError_t launch_group(const Group& group, const Work& work) {
  Arguments<kBytes> arguments;
  for (int64_t begin = 0; begin < work.num_parameters;) {
    begin = pack(work.parameters, work.num_parameters, begin, group, work.towers,
                 work.statistics != nullptr, &arguments);
    if (arguments.header.num_entries > 0) {
      const cudaError_t error = launch_packed(arguments, group.dtype, work);
      if (error != cudaSuccess) {
        return error;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace

int64_t max_towers() { return kMaxTowers; }

int64_t scratch_bytes(const Parameter* parameters, int64_t num_parameters, const Towers& towers) {
  int64_t chunks = 0;
  for (int64_t index = 0; index < num_parameters; ++index) {
    const Parameter& parameter = parameters[index];
    chunks += num_chunks(parameter.numel, is_aligned(parameter, towers.count),
                         element_bytes(parameter.dtype));
  }
  return chunks * (towers.count + 1) * static_cast<int64_t>(sizeof(Partial));
}

cudaError_t launch_tower_mean(const Parameter* parameters, int64_t num_parameters,
                              const Towers& towers, const Statistics* statistics, void* scratch,
                              int driver_version, cudaStream_t stream) {
  if (towers.count < 1 || towers.count > kMaxTowers) {
    return cudaErrorInvalidValue;
  }
  const Work work{parameters, num_parameters, towers, statistics, static_cast<Partial*>(scratch),
                  stream};
  for (const Group& group : kGroups) {
    // The small argument where all fits it: the driver copies an argument whole, filled or not.
    const bool fits_small =
        count_of(group, parameters, num_parameters) <= max_entries(towers.count, kSmallBytes);
    const cudaError_t error = fits_small || driver_version < kDriverOfLargeArguments
                                  ? launch_group<kSmallBytes>(group, work)
                                  : launch_group<kLargeBytes>(group, work);
    if (error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

}  // namespace torchtower::cuda
