// The part of the module _core that runs the operators on memory of a GPU, given as addresses.
#pragma once
#include <pybind11/pybind11.h>

namespace performer {
namespace bindings {

void DefineGpu(pybind11::module_& module);

}  // namespace bindings
}  // namespace performer
