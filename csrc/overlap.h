// Where tensors lie in memory, and whether they share any of it. No torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace torchtower {

// A strided tensor's memory: strides in elements, never negative (torch has none).
struct Placement {
  uintptr_t data;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dim;
  int64_t element_size;
};

enum class Density {
  kDense,        // every element of one block of memory, in any order
  kGapped,       // elements apart, with gaps between them
  kSelfOverlap,  // elements that share memory
};

Density density(const Placement& tensor);

// Bytes [begin, end) that tensor number `index` uses.
struct Extent {
  uintptr_t begin;
  uintptr_t end;
  int64_t index;
};

// The smallest extent around a tensor; empty without elements.
Extent extent(const Placement& tensor, int64_t index);

// The exact bytes of a tensor, as runs of neighbouring elements.
void append_runs(const Placement& tensor, int64_t index, std::vector<Extent>& runs);

// Sorts; returns a pair of indices that overlap, or {-1, -1}.
struct Conflict {
  int64_t first = -1;
  int64_t second = -1;
};
Conflict sort_and_find_conflict(std::vector<Extent>& extents);

// Looks extents up among sorted, disjoint ones. Gradients mostly lie in the order of their
// parameters, so each search begins where the last one ended: O(1) each, O(log n) at worst.
class ExtentSearch {
 public:
  explicit ExtentSearch(const std::vector<Extent>& sorted) : sorted_(sorted) {}
  // An extent that shares memory with `query`, or nullptr.
  const Extent* find(const Extent& query);

 private:
  bool is_lower_bound(size_t position, const Extent& query) const;

  const std::vector<Extent>& sorted_;
  size_t hint_ = 0;
};

}  // namespace torchtower
