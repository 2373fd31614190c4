// What every kernel of torchtower::tower_mean_ is told: pointers, sizes and dtypes; no torch, no
// device.
#pragma once

#include <cstdint>

namespace torchtower {

// Complex numbers travel as twice as many reals.
enum class DType : int8_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

// One parameter: where its mean goes and where the towers' gradients lie, all dense and laid out
// alike. `out` may be the very memory of one of `grads`, never a part of it.
struct Parameter {
  void* out;
  const void* const* grads;  // [num_towers], tower order
  int64_t numel;             // in reals
  DType dtype;               // of every gradient
  DType out_dtype;           // dtype, or kFloat32 for half types
};

// The op's weights in normal form: towers of weight 0 are dropped (they are never read), and what
// is done with the others is decided once. A mean sums and then divides once, as torch.mean does.
enum class Rule : int8_t { kSum, kMean, kWeighted };

struct Towers {
  int64_t count;          // towers that are read, at least 1
  Rule rule;              // kSum: all weights are 1; kMean: all are 1 / count; kWeighted: any other
  const double* weights;  // [count]; read under kWeighted only
};

// Taken from the same reads, where asked for. Row-major over towers read and parameters: [count,
// num_parameters].
struct Statistics {
  double* sum_of_squares;      // [count, num_parameters], of each gradient as it was read
  int64_t* non_finite;         // [count, num_parameters], elements that are NaN or infinite
  double* out_sum_of_squares;  // [num_parameters], of the mean before it is rounded to out_dtype
};

}  // namespace torchtower
