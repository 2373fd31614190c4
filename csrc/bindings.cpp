// What an op schema cannot carry: facts about the build. Includes no torch header.
#include <pybind11/pybind11.h>

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = TORCHTOWER_VERSION;
  info["built_with_torch"] = TORCHTOWER_BUILT_WITH_TORCH;
  info["compiler"] = __VERSION__;
#ifdef TORCHTOWER_WITH_CUDA
  info["cuda"] = true;
  info["cuda_architectures"] = TORCHTOWER_CUDA_ARCHITECTURES;
#else
  info["cuda"] = false;
  info["cuda_architectures"] = "";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) { m.def("build_info", &build_info); }
