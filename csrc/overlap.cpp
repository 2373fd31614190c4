#include "overlap.h"

#include <algorithm>

namespace torchtower {

namespace {

struct Dimension {
  int64_t size;
  int64_t stride;
};

// The dimensions that move through memory, the innermost first.
std::vector<Dimension> dimensions_by_stride(const Placement& tensor) {
  std::vector<Dimension> dimensions;
  for (int64_t d = 0; d < tensor.dim; ++d) {
    if (tensor.sizes[d] > 1) dimensions.push_back({tensor.sizes[d], tensor.strides[d]});
  }
  std::sort(dimensions.begin(), dimensions.end(),
            [](const Dimension& a, const Dimension& b) { return a.stride < b.stride; });
  return dimensions;
}

bool is_contiguous(const Placement& tensor) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim - 1; d >= 0; --d) {
    if (tensor.sizes[d] != 1 && tensor.strides[d] != expected) return false;
    expected *= tensor.sizes[d];
  }
  return true;
}

bool is_empty(const Placement& tensor) {
  return std::find(tensor.sizes, tensor.sizes + tensor.dim, 0) != tensor.sizes + tensor.dim;
}

// Strides that interleave, as (3, 2) of shape (2, 3), may yet tell all elements apart.
bool overlaps_itself(const Placement& tensor) {
  int64_t run = 1;
  for (const Dimension& dimension : dimensions_by_stride(tensor)) {
    if (dimension.stride < run) return true;
    if (dimension.stride > run) break;
    run *= dimension.size;
  }
  std::vector<Extent> runs;
  append_runs(tensor, 0, runs);
  return sort_and_find_conflict(runs).first >= 0;
}

}  // namespace

Density density(const Placement& tensor) {
  if (is_contiguous(tensor) || is_empty(tensor)) return Density::kDense;
  int64_t reach = 1;  // elements from the first to just behind the last
  bool dense = true;
  for (const Dimension& dimension : dimensions_by_stride(tensor)) {
    if (dimension.stride < reach) {
      return overlaps_itself(tensor) ? Density::kSelfOverlap : Density::kGapped;
    }
    dense = dense && dimension.stride == reach;
    reach += (dimension.size - 1) * dimension.stride;
  }
  return dense ? Density::kDense : Density::kGapped;
}

Extent extent(const Placement& tensor, int64_t index) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim; ++d) {
    if (tensor.sizes[d] == 0) return {tensor.data, tensor.data, index};
    last += (tensor.sizes[d] - 1) * tensor.strides[d];
  }
  return {tensor.data, tensor.data + static_cast<uintptr_t>((last + 1) * tensor.element_size),
          index};
}

void append_runs(const Placement& tensor, int64_t index, std::vector<Extent>& runs) {
  if (is_empty(tensor)) return;
  std::vector<Dimension> outer = dimensions_by_stride(tensor);
  int64_t run = 1;
  auto inner_end = outer.begin();
  while (inner_end != outer.end() && inner_end->stride <= run) {
    run += (inner_end->size - 1) * inner_end->stride;
    ++inner_end;
  }
  outer.erase(outer.begin(), inner_end);
  const auto bytes = [&](int64_t elements) {
    return static_cast<uintptr_t>(elements * tensor.element_size);
  };
  std::vector<int64_t> position(outer.size(), 0);
  uintptr_t begin = tensor.data;
  for (;;) {
    runs.push_back({begin, begin + bytes(run), index});
    size_t d = 0;
    for (; d < outer.size(); ++d) {
      begin += bytes(outer[d].stride);
      if (++position[d] < outer[d].size) break;
      begin -= bytes(outer[d].stride * outer[d].size);
      position[d] = 0;
    }
    if (d == outer.size()) return;
  }
}

Conflict sort_and_find_conflict(std::vector<Extent>& extents) {
  const auto by_begin = [](const Extent& a, const Extent& b) { return a.begin < b.begin; };
  if (!std::is_sorted(extents.begin(), extents.end(), by_begin)) {
    std::sort(extents.begin(), extents.end(), by_begin);
  }
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].begin < extents[i - 1].end) return {extents[i - 1].index, extents[i].index};
  }
  return {};
}

bool ExtentSearch::is_lower_bound(size_t position, const Extent& query) const {
  return position <= sorted_.size() &&
         (position == 0 || sorted_[position - 1].end <= query.begin) &&
         (position == sorted_.size() || sorted_[position].end > query.begin);
}

const Extent* ExtentSearch::find(const Extent& query) {
  if (!is_lower_bound(hint_, query) && !is_lower_bound(++hint_, query)) {
    hint_ = std::partition_point(sorted_.begin(), sorted_.end(),
                                 [&](const Extent& e) { return e.end <= query.begin; }) -
            sorted_.begin();
  }
  const bool found = hint_ < sorted_.size() && sorted_[hint_].begin < query.end;
  return found ? &sorted_[hint_] : nullptr;
}

}  // namespace torchtower
