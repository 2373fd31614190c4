// The native ops' schemas. Each backend registers its own kernels by dispatch key in its own
// folder.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(torchtower, m) {
  m.def("tower_mean_(Tensor(a!)[] out, Tensor[] grads, float[] weights) -> ()");
  m.def(
      "tower_mean_with_statistics_(Tensor(a!)[] out, Tensor[] grads, float[] weights) -> "
      "(Tensor sum_of_squares, Tensor non_finite, Tensor out_sum_of_squares)");
}
