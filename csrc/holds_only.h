// Whether a Python container holds nothing but objects of some types. Includes no torch header.
#pragma once

#include <pybind11/pybind11.h>

namespace torchtower {

// Of a dict its keys and values count, of a list, tuple or another iterable its members, and of
// tuples among all these their members in turn. Looks at the types themselves, runs no code of the
// objects, and stops at the first of another type: tables of a million numbers or pairs are asked
// at every step.
bool holds_only(const pybind11::object& container, const pybind11::frozenset& types);

}  // namespace torchtower
