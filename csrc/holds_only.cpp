#include "holds_only.h"

namespace torchtower {

namespace {

// Remembers the last type that was one of these: neighbours are mostly alike.
class Types {
 public:
  explicit Types(const pybind11::frozenset& types) : types_(types.ptr()) {}

  bool has_type_of(PyObject* object) {
    PyTypeObject* const type = Py_TYPE(object);
    if (type == last_) return true;
    if (PyTuple_CheckExact(object)) return has_members_of(object);
    if (PySet_Contains(types_, reinterpret_cast<PyObject*>(type)) != 1) return false;
    last_ = type;
    return true;
  }

 private:
  bool has_members_of(PyObject* tuple) {
    // Tuples may be nested deeper than the stack is.
    if (depth_ == kDeepest) return false;
    ++depth_;
    bool all = true;
    for (Py_ssize_t i = 0; all && i < PyTuple_GET_SIZE(tuple); ++i) {
      all = has_type_of(PyTuple_GET_ITEM(tuple, i));
    }
    --depth_;
    return all;
  }

  static constexpr int kDeepest = 8;

  PyObject* types_;
  int depth_ = 0;
  PyTypeObject* last_ = nullptr;
};

bool has_only(Types& keys, Types& values, PyObject* dict) {
  Py_ssize_t position = 0;
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  while (PyDict_Next(dict, &position, &key, &value) != 0) {
    if (!keys.has_type_of(key) || !values.has_type_of(value)) return false;
  }
  return true;
}

}  // namespace

bool holds_only(const pybind11::object& container, const pybind11::frozenset& types) {
  Types values(types);
  if (PyDict_Check(container.ptr())) {
    Types keys(types);
    return has_only(keys, values, container.ptr());
  }
  const auto members = pybind11::reinterpret_steal<pybind11::object>(
      PySequence_Fast(container.ptr(), "holds_only: expected a container"));
  if (!members) throw pybind11::error_already_set();
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(members.ptr()); ++i) {
    if (!values.has_type_of(PySequence_Fast_GET_ITEM(members.ptr(), i))) return false;
  }
  return true;
}

}  // namespace torchtower
