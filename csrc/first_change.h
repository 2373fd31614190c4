// Which Python containers hold other objects than they held before. Includes no torch header.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>

namespace torchtower {

// The index, from `begin` on, of the first of `containers` that has changed; their number if none
// has. `before` has a tuple for each: of a dict its keys and values in turn, of a list or another
// iterable its members. Compares by identity alone and runs no code of the objects: a module has
// hundreds, looked at several times a step.
size_t first_change(const pybind11::list& containers, const pybind11::list& before, size_t begin);

}  // namespace torchtower
