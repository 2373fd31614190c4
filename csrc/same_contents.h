// Whether Python containers hold the very objects that they held before. Includes no torch header.
#pragma once

#include <pybind11/pybind11.h>

namespace torchtower {

// `before` has a tuple for each of `containers`: of a dict its keys and values in turn, of a list
// or another iterable its members. Compares by identity alone and runs no code of the objects: a
// module has hundreds, looked at several times a step.
bool same_contents(const pybind11::list& containers, const pybind11::list& before);

}  // namespace torchtower
