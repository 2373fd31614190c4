// What an op schema cannot carry: facts about the build and the machine, Python's own objects, and
// what tests look at.
// Includes no torch header.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "chunk_plan.h"
#include "cpu/kernels.h"
#include "first_change.h"
#include "holds_only.h"
#include "memory_of.h"

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
  info["cpu_kernels"] = torchtower::cpu::kernels().name;
  return info;
}

std::vector<std::string> available_cpu_kernels() {
  std::vector<std::string> names;
  for (const char* const* name = torchtower::cpu::available_kernels(); *name != nullptr; ++name) {
    names.emplace_back(*name);
  }
  return names;
}

void use_cpu_kernels(const std::string& name) {
  if (torchtower::cpu::use_kernels(name.c_str())) return;
  throw std::invalid_argument("use_cpu_kernels: expected one of available_cpu_kernels(), but got " +
                              name);
}

using PieceTuple = std::tuple<int64_t, int64_t, int64_t>;

std::vector<PieceTuple> pieces(const torchtower::ChunkPlan& plan, int64_t chunk) {
  std::vector<PieceTuple> found;
  plan.for_each_piece(chunk, [&](const torchtower::Piece& piece) {
    found.emplace_back(piece.parameter, piece.begin, piece.end);
  });
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("available_cpu_kernels", &available_cpu_kernels);
  m.def("use_cpu_kernels", &use_cpu_kernels, pybind11::arg("name"));

  m.def("first_change", &torchtower::first_change, pybind11::arg("containers"),
        pybind11::arg("before"), pybind11::arg("begin"));
  m.def("memory_of", &torchtower::memory_of, pybind11::arg("tensors"));
  m.def("holds_only", &torchtower::holds_only, pybind11::arg("container"), pybind11::arg("types"));

  using torchtower::ChunkPlan;
  pybind11::class_<ChunkPlan>(m, "ChunkPlan")
      .def(pybind11::init<std::vector<int64_t>>(), pybind11::arg("numels"))
      .def_property_readonly_static("ALIGNMENT",
                                    [](const pybind11::object&) { return ChunkPlan::kAlignment; })
      .def_property_readonly_static("CHUNK_SIZE",
                                    [](const pybind11::object&) { return ChunkPlan::kChunkSize; })
      .def_property_readonly("num_chunks", &ChunkPlan::num_chunks)
      .def_property_readonly("num_slots", &ChunkPlan::num_slots)
      .def("pieces", &pieces, pybind11::arg("chunk"))
      .def("slot", &ChunkPlan::slot, pybind11::arg("chunk"), pybind11::arg("parameter"))
      .def("chunks_of", &ChunkPlan::chunks_of, pybind11::arg("parameter"));
}
