#include "memory_of.h"

// torch keeps all that is not its own stable ABI from who has set this; DLPack is one itself.
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>

#include <cstdint>
#include <cstring>
#include <string>

namespace torchtower {

namespace {

const DLPackExchangeAPI& exchange_api() {
  static const DLPackExchangeAPI* api = nullptr;
  if (api == nullptr) {
    const pybind11::capsule capsule =
        pybind11::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
    const auto* const found = capsule.get_pointer<const DLPackExchangeAPI>();
    if (found->header.version.major != DLPACK_MAJOR_VERSION) {
      throw pybind11::import_error("memory_of: expected torch to speak DLPack " +
                                   std::to_string(DLPACK_MAJOR_VERSION) + ", but got " +
                                   std::to_string(found->header.version.major));
    }
    api = found;
  }
  return *api;
}

pybind11::bytes place_of(const DLTensor& tensor) {
  const auto extents = static_cast<size_t>(tensor.ndim) * sizeof(int64_t);
  const auto address = reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset;
  PyObject* const place = PyBytes_FromStringAndSize(
      nullptr, static_cast<Py_ssize_t>(sizeof(address) + sizeof(tensor.device) +
                                       sizeof(tensor.dtype) + 2 * extents));
  if (place == nullptr) throw pybind11::error_already_set();
  char* end = PyBytes_AS_STRING(place);
  const auto add = [&end](const void* from, size_t size_bytes) {
    if (size_bytes != 0) std::memcpy(end, from, size_bytes);
    end += size_bytes;
  };
  add(&address, sizeof(address));
  add(&tensor.device, sizeof(tensor.device));
  add(&tensor.dtype, sizeof(tensor.dtype));
  add(tensor.shape, extents);
  add(tensor.strides, extents);
  return pybind11::reinterpret_steal<pybind11::bytes>(place);
}

}  // namespace

pybind11::list memory_of(const pybind11::list& tensors) {
  const auto view = exchange_api().dltensor_from_py_object_no_sync;
  pybind11::list places(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    DLTensor tensor;
    if (view(PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i)), &tensor) == 0) {
      places[i] = place_of(tensor);
    } else {
      if (PyErr_ExceptionMatches(PyExc_Exception) == 0) throw pybind11::error_already_set();
      PyErr_Clear();
      places[i] = pybind11::none();
    }
  }
  return places;
}

}  // namespace torchtower
