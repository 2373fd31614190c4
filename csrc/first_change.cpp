#include "first_change.h"

namespace torchtower {

namespace {

bool same_entries(PyObject* dict, PyObject* before) {
  if (2 * PyDict_GET_SIZE(dict) != PyTuple_GET_SIZE(before)) return false;
  if (PyTuple_GET_SIZE(before) == 0) return true;  // as most of a module's dicts are
  Py_ssize_t position = 0;
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  for (Py_ssize_t i = 0; PyDict_Next(dict, &position, &key, &value) != 0; i += 2) {
    if (key != PyTuple_GET_ITEM(before, i) || value != PyTuple_GET_ITEM(before, i + 1))
      return false;
  }
  return true;
}

bool same_items(PyObject* list, PyObject* before) {
  if (PyList_GET_SIZE(list) != PyTuple_GET_SIZE(before)) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    if (PyList_GET_ITEM(list, i) != PyTuple_GET_ITEM(before, i)) return false;
  }
  return true;
}

bool same_members(PyObject* iterable, PyObject* before) {
  const auto now = pybind11::tuple(pybind11::reinterpret_borrow<pybind11::object>(iterable));
  if (PyTuple_GET_SIZE(now.ptr()) != PyTuple_GET_SIZE(before)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(before); ++i) {
    if (PyTuple_GET_ITEM(now.ptr(), i) != PyTuple_GET_ITEM(before, i)) return false;
  }
  return true;
}

}  // namespace

size_t first_change(const pybind11::list& containers, const pybind11::list& before, size_t begin) {
  if (containers.size() != before.size())
    throw pybind11::type_error("first_change: expected as many tuples as containers");
  for (size_t i = begin; i < containers.size(); ++i) {
    PyObject* const container = PyList_GET_ITEM(containers.ptr(), static_cast<Py_ssize_t>(i));
    PyObject* const then = PyList_GET_ITEM(before.ptr(), static_cast<Py_ssize_t>(i));
    if (!PyTuple_Check(then)) throw pybind11::type_error("first_change: expected tuples");
    const bool same = PyDict_Check(container)   ? same_entries(container, then)
                      : PyList_Check(container) ? same_items(container, then)
                                                : same_members(container, then);
    if (!same) return i;
  }
  return containers.size();
}

}  // namespace torchtower
