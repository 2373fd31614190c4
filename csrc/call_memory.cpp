// Where a call's tensors lie: overlaps, and copies where layouts differ.
#include <torch/headeronly/util/shim_utils.h>

#include "checks.h"

namespace torchtower {

const void* Call::as_laid_out(const TensorView& grad, const TensorView& layout) {
  AtenTensorHandle source = grad.handle;
  if (!same_layout(grad, layout.strides)) {
    const StrideVector strides(layout.strides, layout.strides + layout.dim);
    temporaries_.push_back(empty_strided_like(grad, strides));
    source = temporaries_.back().get();
    TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(source, grad.handle, 0));
  }
  const void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(source, &data));
  return data;
}

std::string Call::find_overlap(bool exact) const {
  std::vector<Extent> outs;
  outs.reserve(num_parameters());
  for (int64_t p = 0; p < num_parameters(); ++p) {
    const Placement out = placement(out_views_[p], out_data_[p]);
    if (exact) {
      append_runs(out, p, outs);
    } else if (parameters_[p].numel > 0) {
      outs.push_back(extent(out, p));
    }
  }
  const Conflict conflict = sort_and_find_conflict(outs);
  if (conflict.first >= 0) {
    return "the outputs of parameters " + std::to_string(conflict.first) + " and " +
           std::to_string(conflict.second);
  }
  ExtentSearch search(outs);
  std::vector<Extent> pieces(1);
  for (const Extent& grad : gradient_extents_) {
    pieces.assign(1, grad);
    if (exact && search.find(grad) != nullptr) {
      const TensorView view(grads_[grad.index]);
      pieces.clear();
      append_runs(placement(view, reinterpret_cast<const void*>(grad.begin)), grad.index, pieces);
    }
    for (const Extent& piece : pieces) {
      const Extent* out = piece.begin == piece.end ? nullptr : search.find(piece);
      if (out == nullptr) continue;
      return "parameter " + std::to_string(out->index) + "'s output and tower " +
             std::to_string(grad.index / num_parameters()) + "'s gradient of parameter " +
             std::to_string(grad.index % num_parameters());
    }
  }
  return "";
}

// Tensors with gaps may interleave, so what their extents suspect is looked at run by run.
void Call::refuse_overlaps() const {
  if (find_overlap(/*exact=*/false).empty()) return;
  const std::string overlap = find_overlap(/*exact=*/true);
  if (!overlap.empty()) {
    fail(
        "expected each output to share memory with nothing but, whole, its own parameter's "
        "gradients, but " +
        overlap + " overlap in part");
  }
}

void Call::finish() {
  const NoGradGuard no_grad;
  for (int64_t p = 0; p < num_parameters(); ++p) {
    if (layouts_[p].handle == out_views_[p].handle) continue;
    TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(out_views_[p].handle, layouts_[p].handle, 0));
  }
}

}  // namespace torchtower
