#include "facts.h"

#include <string>

const char* metattn_compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

const char* metattn_torch_target() { return METATTN_TORCH_TARGET; }

const char* metattn_cuda() {
#ifdef METATTN_CUDA
  return METATTN_CUDA;
#else
  return nullptr;
#endif
}

const char* metattn_cpu_features() {
  static const std::string found = [] {
    std::string text;
#if defined(__x86_64__)
#define METATTN_FEATURE(name) \
  if (__builtin_cpu_supports(name)) text += text.empty() ? name : "," name
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
    return text;
  }();
  return found.c_str();
}
