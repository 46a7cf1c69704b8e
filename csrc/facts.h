// What the operators' library tells about itself, in C: to the host module (host.cpp), and by ctypes to a Python that the
// host module was not built for (metattn/host.py). Lists are comma-separated; texts live as long as the library.
#pragma once

extern "C" {
#pragma GCC visibility push(default)
const char* metattn_compiler();
const char* metattn_torch_target();         // the oldest torch served
const char* metattn_cuda();                 // CUDA's version, null: built without CUDA
const char* metattn_cpu_features();         // this CPU's instruction sets, those that matter here
const char* metattn_isas();                 // the ISAs built, best first
const char* metattn_usable_isas();          // those of them that run here
const char* metattn_isa();                  // the one in use
int metattn_set_isa(const char* name);      // by name, empty: the best; 0 on success
#pragma GCC visibility pop
}
