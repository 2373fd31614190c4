// Where tensors lie in memory, and how. Includes no header of torch's but DLPack's.
#pragma once

#include <pybind11/pybind11.h>

namespace torchtower {

// Of each of these tensors some bytes that change with its address, device, dtype, sizes and
// strides; None of one that DLPack has no words for (quantised, sparse, on the meta device). A
// module has hundreds of parameters, and each step looks at them and at every replica's: asking
// Python for four attributes of each costs ten times as much.
// Source: the C exchange API of DLPack 1.3, `torch.Tensor.__dlpack_c_exchange_api__`.
pybind11::list memory_of(const pybind11::list& tensors);

}  // namespace torchtower
