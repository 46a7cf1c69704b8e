// The pybind11 module `metattn._host`: the library's facts, for the Python that it was built with.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "facts.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = metattn_compiler();
  info["torch_target"] = metattn_torch_target();
  info["cuda"] = metattn_cuda();
  info["isas"] = split(metattn_isas());
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
  module.def("cpu_features", [] { return split(metattn_cpu_features()); },
             "The instruction sets of this CPU that matter here.");
  module.def("usable_isas", [] { return split(metattn_usable_isas()); }, "ISAs built and runnable here, best first.");
  module.def("isa", [] { return std::string(metattn_isa()); }, "The ISA in use.");
  module.def("set_isa", &set_isa, py::arg("name"), "Use an ISA by name, '' for the best; ValueError if it cannot run.");
}
