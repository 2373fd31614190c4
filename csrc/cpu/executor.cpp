#include "executor.h"

#include <algorithm>
#include <vector>

#include "../chunk_plan.h"

namespace torchtower::cpu {

namespace {

int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
  }
  return 0;
}

bool is_input(const Parameter& parameter, const Towers& towers) {
  for (int64_t t = 0; t < towers.count; ++t) {
    if (parameter.grads[t] == parameter.out) return true;
  }
  return false;
}

// Bytes of outputs from which on writing past the cache pays, the outputs' next reader included:
// measured with outputs of 0.5 to 64 MB (docs/kernel.md). The cache's size is not asked for,
// because a virtual machine is told its host's.
constexpr int64_t kStreamingBytes = 16 << 20;

// Elements read, for fewer of which no thread is woken: on an idle machine the two take as long, on
// a busy one whoever waits for a team of threads may wait for milliseconds.
constexpr int64_t kGrainElements = 1 << 19;

// Everything that one chunk's thread needs; written before the threads start, except for slots of
// the statistics, of which each belongs to one piece.
struct Work {
  const Parameter* parameters;
  const Towers& towers;
  const Kernels& kernels;
  const ChunkPlan& plan;
  bool outgrows_cache;
  double* sum_of_squares;      // [num_slots, towers.count]
  int64_t* non_finite;         // [num_slots, towers.count]
  double* out_sum_of_squares;  // [num_slots]

  void mean(const Piece& piece) const {
    const Parameter& parameter = parameters[piece.parameter];
    // A store past the cache saves reading the line first. In place the line has been read anyway,
    // and outputs that fit the cache are wanted there by whoever reads them next: both lose by it.
    const bool stream = outgrows_cache && !is_input(parameter, towers);
    kernels.mean(parameter, piece.begin, piece.end, towers, stream);
  }

  void mean_with_statistics(const Piece& piece, int64_t slot) const {
    const PieceStatistics statistics = {sum_of_squares + slot * towers.count,
                                        non_finite + slot * towers.count,
                                        out_sum_of_squares + slot};
    kernels.mean_with_statistics(parameters[piece.parameter], piece.begin, piece.end, towers,
                                 statistics);
  }

  static void run(int64_t begin, int64_t end, void* context) {
    const Work& work = *static_cast<const Work*>(context);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      work.plan.for_each_piece(chunk, [&](const Piece& piece) {
        if (work.sum_of_squares == nullptr) {
          work.mean(piece);
        } else {
          work.mean_with_statistics(piece, work.plan.slot(chunk, piece.parameter));
        }
      });
    }
  }
};

// Adds every parameter's slots in the order of its pieces.
void combine(const Work& work, int64_t num_parameters, const Statistics& statistics) {
  const int64_t count = work.towers.count;
  for (int64_t p = 0; p < num_parameters; ++p) {
    const auto [first, last] = work.plan.chunks_of(p);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t slot = work.plan.slot(chunk, p);
      for (int64_t t = 0; t < count; ++t) {
        statistics.sum_of_squares[t * num_parameters + p] += work.sum_of_squares[slot * count + t];
        statistics.non_finite[t * num_parameters + p] += work.non_finite[slot * count + t];
      }
      statistics.out_sum_of_squares[p] += work.out_sum_of_squares[slot];
    }
  }
}

}  // namespace

void tower_mean(const Parameter* parameters, int64_t num_parameters, const Towers& towers,
                const Statistics* statistics, ParallelFor parallel_for) {
  std::vector<int64_t> numels(num_parameters);
  int64_t out_bytes = 0;
  for (int64_t p = 0; p < num_parameters; ++p) {
    numels[p] = parameters[p].numel;
    out_bytes += parameters[p].numel * size_of(parameters[p].out_dtype);
  }
  const ChunkPlan plan(std::move(numels));
  const int64_t num_slots = statistics == nullptr ? 0 : plan.num_slots();
  std::vector<double> sum_of_squares(num_slots * towers.count);
  std::vector<int64_t> non_finite(num_slots * towers.count);
  std::vector<double> out_sum_of_squares(num_slots);
  Work work{parameters,
            towers,
            kernels(),
            plan,
            out_bytes >= kStreamingBytes,
            statistics == nullptr ? nullptr : sum_of_squares.data(),
            non_finite.data(),
            out_sum_of_squares.data()};
  const int64_t grain = kGrainElements / ChunkPlan::kChunkSize / towers.count;
  parallel_for(plan.num_chunks(), std::max<int64_t>(grain, 1), &Work::run, &work);
  if (statistics != nullptr) combine(work, num_parameters, *statistics);
}

}  // namespace torchtower::cpu
