// How one call's work is cut for the threads of a CPU. No torch.
//
// All parameters' elements lie on one line, each parameter at a multiple of kAlignment; the line
// is cut into chunks of kChunkSize, whatever the mix of huge and tiny tensors. Cuts depend on the
// sizes alone, never on the number of threads, so that what is summed over pieces (the statistics)
// has the same bits for any number of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace torchtower {

// Elements [begin, end) of one parameter.
struct Piece {
  int64_t parameter;
  int64_t begin;
  int64_t end;
};

class ChunkPlan {
 public:
  // Pieces begin at whole cache lines of a parameter for every dtype, and no tiny tensor is free.
  static constexpr int64_t kAlignment = 64;
  static constexpr int64_t kChunkSize = 32768;
  static_assert(kChunkSize % kAlignment == 0, "a cut within a line would share it between threads");

  explicit ChunkPlan(std::vector<int64_t> numels) : numels_(std::move(numels)) {
    starts_.reserve(numels_.size() + 1);
    starts_.push_back(0);
    for (const int64_t numel : numels_) {
      starts_.push_back(starts_.back() + (numel + kAlignment - 1) / kAlignment * kAlignment);
    }
  }

  int64_t num_chunks() const { return (starts_.back() + kChunkSize - 1) / kChunkSize; }

  // f(Piece) for each piece of a chunk, in the parameters' order; no piece is empty.
  template <typename F>
  void for_each_piece(int64_t chunk, const F& f) const {
    const int64_t chunk_begin = chunk * kChunkSize;
    const int64_t chunk_end = chunk_begin + kChunkSize;
    int64_t p = std::upper_bound(starts_.begin(), starts_.end(), chunk_begin) - starts_.begin() - 1;
    for (; p < static_cast<int64_t>(numels_.size()) && starts_[p] < chunk_end; ++p) {
      const int64_t begin = std::max<int64_t>(chunk_begin - starts_[p], 0);
      const int64_t end = std::min(chunk_end - starts_[p], numels_[p]);
      if (begin < end) f(Piece{p, begin, end});
    }
  }

  // A number below num_slots() that each piece has for itself. Along the line, from one piece to
  // the next, the chunk or the parameter moves on, and neither ever moves back.
  int64_t slot(int64_t chunk, int64_t parameter) const { return chunk + parameter; }
  int64_t num_slots() const { return num_chunks() + static_cast<int64_t>(numels_.size()); }

  // Chunks [first, last) hold a parameter's pieces; none if it has no elements.
  std::pair<int64_t, int64_t> chunks_of(int64_t parameter) const {
    const int64_t begin = starts_[parameter];
    const int64_t end = begin + numels_[parameter];
    if (begin == end) return {0, 0};
    return {begin / kChunkSize, (end - 1) / kChunkSize + 1};
  }

 private:
  std::vector<int64_t> numels_;
  std::vector<int64_t> starts_;  // one more than parameters: the last is the line's length
};

}  // namespace torchtower
