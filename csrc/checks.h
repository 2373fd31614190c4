// What every backend of tower_mean_ and its sibling shares: the arguments are taken off the
// dispatcher's stack, checked, laid out alike and brought to the normal form of tower_mean.h.
//
// A backend's adapter is then (`launch` is its own):
//
//   void tower_mean(StableIValue* stack, uint64_t, uint64_t) {
//     Call call("tower_mean_", stack);
//     launch(call.parameters(), call.num_parameters(), call.towers(), nullptr);
//     call.finish();
//   }
//
//   void tower_mean_with_statistics(StableIValue* stack, uint64_t, uint64_t) {
//     Call call("tower_mean_with_statistics_", stack);
//     StatisticsTensors statistics(call);
//     const Statistics pointers = statistics.pointers();
//     launch(call.parameters(), call.num_parameters(), call.towers(), &pointers);
//     call.finish();
//     statistics.return_on(stack);
//   }
//
//   STABLE_TORCH_LIBRARY_IMPL(torchtower, CPU, m) {
//     m.impl("tower_mean_", &tower_mean);
//     m.impl("tower_mean_with_statistics_", &tower_mean_with_statistics);
//   }
#pragma once

#include <string>
#include <vector>

#include "overlap.h"
#include "tensor_list.h"
#include "tower_mean.h"

namespace torchtower {

// One checked call. Owns its arguments and the temporaries that unequal layouts need.
class Call {
 public:
  // Takes (out, grads, weights) off the stack. Throws std::invalid_argument, which reaches Python
  // as ValueError, before any byte of an output is written. No tensor has a conjugate or negative
  // bit: ops.py sees to that under their dispatch keys, which rank before every backend.
  Call(const char* function, StableIValue* stack);

  // Borrowed from the call. Parameters without elements are among them (numel 0).
  const Parameter* parameters() const { return parameters_.data(); }
  int64_t num_parameters() const { return out_.size(); }
  const Towers& towers() const { return towers_; }

  // As the caller counts towers, those of weight 0 included.
  int64_t num_towers_given() const { return static_cast<int64_t>(weights_.size()); }
  // towers_read()[i]: the caller's index of the i-th tower that is read.
  const std::vector<int64_t>& towers_read() const { return towers_read_; }

  // The one device of every tensor of the call; with no parameters, the CPU.
  int32_t device_type() const { return device_type_; }
  int32_t device_index() const { return device_index_; }

  // Copies temporaries back into outputs with gaps. Called once, after the kernel (in its stream).
  void finish();

 private:
  void normalise_weights();
  void read_outputs();
  void read_gradients();
  void check_gradient(const TensorView& grad, int64_t tower, int64_t index) const;
  const void* as_laid_out(const TensorView& grad, const TensorView& layout);
  void refuse_overlaps() const;
  std::string find_overlap(bool exact) const;
  [[noreturn]] void fail(const std::string& message) const;

  const char* function_;
  TensorList out_;
  TensorList grads_;
  std::vector<double> weights_;

  std::vector<int64_t> towers_read_;
  std::vector<double> weights_read_;
  Towers towers_{};
  std::vector<Parameter> parameters_;
  std::vector<const void*> pointers_;  // parameter-major: [num_parameters, towers_.count]

  std::vector<TensorView> out_views_;
  std::vector<int32_t> first_dtypes_;  // of tower 0's gradients
  std::vector<void*> out_data_;
  std::vector<TensorView> layouts_;       // out_views_, or a dense temporary for an out with gaps
  std::vector<Extent> gradient_extents_;  // of those that are not out itself
  std::vector<TensorHandle> temporaries_;
  int32_t device_type_ = aoti_torch_device_type_cpu();
  int32_t device_index_ = -1;
};

// The sibling's three results, zero-filled on the call's device. `pointers()` speak of the towers
// read; `return_on` gives every tower of the caller a row, zeros for those that were not read.
class StatisticsTensors {
 public:
  explicit StatisticsTensors(const Call& call);

  Statistics pointers() const;
  void return_on(StableIValue* stack);

 private:
  const Call& call_;
  TensorHandle sum_of_squares_;
  TensorHandle non_finite_;
  TensorHandle out_sum_of_squares_;
};

}  // namespace torchtower
