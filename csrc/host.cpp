// The pybind11 module `metattn._host`: what was built, what this CPU can do, and which ISA the kernels use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
#define METATTN_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.push_back(name)
  METATTN_FEATURE("sse4.2");
  METATTN_FEATURE("avx");
  METATTN_FEATURE("avx2");
  METATTN_FEATURE("fma");
  METATTN_FEATURE("avx512f");
  METATTN_FEATURE("avx512bw");
  METATTN_FEATURE("avx512dq");
  METATTN_FEATURE("avx512vl");
#if __GNUC__ >= 12 || defined(__clang__)
  METATTN_FEATURE("avx512bf16");
#endif
#undef METATTN_FEATURE
#endif
  return found;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] =
#if defined(__clang__)
      "clang " __clang_version__;
#else
      "gcc " __VERSION__;
#endif
  info["torch_target"] = METATTN_TORCH_TARGET;
#ifdef METATTN_CUDA
  info["cuda"] = METATTN_CUDA;
#else
  info["cuda"] = py::none();
#endif
  info["isas"] = split(METATTN_ISAS);
  return info;
}

void set_isa(const std::string& name) {
  if (metattn_set_isa(name.c_str()) != 0)
    throw py::value_error("isa: expected one of " + std::string(metattn_usable_isas()) + " or '' for the best, got '" + name +
                          "'");
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "What the extension was built for, what this CPU can do, and which ISA its kernels use.";
  module.def("build_info", &build_info, "Compiler, oldest torch served, CUDA version (None: no CUDA), ISAs built.");
  module.def("cpu_features", &cpu_features, "The instruction sets of this CPU that matter here.");
  module.def("usable_isas", [] { return split(metattn_usable_isas()); }, "ISAs built and runnable here, best first.");
  module.def("isa", [] { return std::string(metattn_isa()); }, "The ISA in use.");
  module.def("set_isa", &set_isa, py::arg("name"), "Use an ISA by name, '' for the best; ValueError if it cannot run.");
}
