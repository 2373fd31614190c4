// Launches of the kernel body on the host: the real packing, then every thread of every block in
// turn. The towers' statistics, which the device sums by shuffles, are summed thread by thread.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "device_stand_ins.h"
// In this order: the body takes its names from above.
#include "cuda/packing.h"
#include "cuda/tower_mean_body.cuh"

namespace host {

using namespace torchtower;
using namespace torchtower::cuda;

struct HostRecorder {
  static constexpr bool kRecords = true;
  std::vector<Partial> rows;
  void record(int row, const Partial& partial) {
    rows[row].sum_of_squares += partial.sum_of_squares;
    rows[row].non_finite += partial.non_finite;
  }
};

template <DType kDType, int kTowers, class Recorder, int kBytes>
void run_block(const Arguments<kBytes>& arguments, uint32_t block, Recorder& recorder) {
  blockIdx.x = block;
  for (threadIdx.x = 0; threadIdx.x < kThreads; ++threadIdx.x) {
    average_block<kDType, kTowers>(arguments, recorder);
  }
}

template <DType kDType, int kBytes>
void run_plain_block(const Arguments<kBytes>& arguments, uint32_t block) {
  NoRecorder recorder;
  switch (arguments.header.num_towers) {
    case 2:
      return run_block<kDType, 2>(arguments, block, recorder);
    case 4:
      return run_block<kDType, 4>(arguments, block, recorder);
    case 8:
      return run_block<kDType, 8>(arguments, block, recorder);
    default:
      return run_block<kDType, 0>(arguments, block, recorder);
  }
}

template <DType kDType, int kBytes>
void run_recorded_block(const Arguments<kBytes>& arguments, uint32_t block,
                        const Statistics& statistics, int64_t num_parameters) {
  const int64_t num_towers = arguments.header.num_towers;
  HostRecorder recorder{std::vector<Partial>(num_towers + 1, Partial{0, 0})};
  run_block<kDType, 0>(arguments, block, recorder);
  const int64_t parameter = arguments.entry(arguments.find_entry(block)).index;
  for (int64_t tower = 0; tower < num_towers; ++tower) {
    const int64_t at = tower * num_parameters + parameter;
    statistics.sum_of_squares[at] += recorder.rows[tower].sum_of_squares;
    statistics.non_finite[at] += recorder.rows[tower].non_finite;
  }
  statistics.out_sum_of_squares[parameter] += recorder.rows[num_towers].sum_of_squares;
}

template <DType kDType, int kBytes>
void run_launch(const Arguments<kBytes>& arguments, const Statistics* statistics,
                int64_t num_parameters) {
  for (uint32_t block = 0; block < arguments.header.num_chunks; ++block) {
    if (statistics != nullptr) {
      run_recorded_block<kDType>(arguments, block, *statistics, num_parameters);
    } else {
      run_plain_block<kDType>(arguments, block);
    }
  }
}

// `statistics` must be zero-filled.
inline void launch(const std::vector<Parameter>& parameters, const Towers& towers,
                   const Statistics* statistics = nullptr) {
  const int64_t count = static_cast<int64_t>(parameters.size());
  const auto arguments = std::make_unique<Arguments<kSmallBytes>>();
  for (const Group& group : kGroups) {
    for (int64_t begin = 0; begin < count;) {
      begin = pack(parameters.data(), count, begin, group, towers, statistics != nullptr,
                   arguments.get());
      if (arguments->header.num_entries == 0) continue;
      switch (group.dtype) {
        case DType::kFloat32:
          run_launch<DType::kFloat32>(*arguments, statistics, count);
          break;
        case DType::kFloat64:
          run_launch<DType::kFloat64>(*arguments, statistics, count);
          break;
        case DType::kFloat16:
          run_launch<DType::kFloat16>(*arguments, statistics, count);
          break;
        case DType::kBFloat16:
          run_launch<DType::kBFloat16>(*arguments, statistics, count);
          break;
      }
    }
  }
}

}  // namespace host
