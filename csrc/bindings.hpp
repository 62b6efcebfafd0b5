// What the parts of the Python face share.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

namespace ldmseg {

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

inline void require(bool condition, const char* message) {
    if (!condition) throw py::value_error(message);
}

template <typename T>
Array<T> to_array(const std::vector<T>& rows) {
    return Array<T>(static_cast<py::ssize_t>(rows.size()), rows.data());
}

void bind_masks(py::module_& m);

}  // namespace ldmseg
