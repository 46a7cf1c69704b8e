// Tensors of an operator's call, by LibTorch's C shims. torch::stable::Tensor counts its owners on the heap, is asked for one
// dimension at a time, and is allocated by an operator's name: a small problem's attention takes less time than that.
//
// METATTN_ON_GPU: zeros are written by torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <initializer_list>
#include <optional>
#include <utility>

namespace {

// One owner; none: an optional tensor that is not there.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  explicit operator bool() const { return handle_ != nullptr; }
  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

  int64_t dim() const { return ask<int64_t>(aoti_torch_get_dim); }
  const int64_t* sizes() const { return ask<int64_t*>(aoti_torch_get_sizes); }
  const int64_t* strides() const { return ask<int64_t*>(aoti_torch_get_strides); }
  int64_t size(int64_t dim) const { return sizes()[dim]; }
  int32_t dtype() const { return ask<int32_t>(aoti_torch_get_dtype); }  // compared to those of Codes
  int32_t device_type() const { return ask<int32_t>(aoti_torch_get_device_type); }
  int32_t device_index() const { return ask<int32_t>(aoti_torch_get_device_index); }
  bool is_contiguous() const { return ask<bool>(aoti_torch_is_contiguous); }
  char* data() const { return static_cast<char*>(ask<void*>(aoti_torch_get_data_ptr)); }

 private:
  template <class T>
  T ask(AOTITorchError (*question)(AtenTensorHandle, T*)) const {
    T answer;
    TORCH_ERROR_CODE_CHECK(question(handle_, &answer));
    return answer;
  }

  AtenTensorHandle handle_ = nullptr;
};

// What this torch calls the dtypes and devices.
struct Codes {
  int32_t f64 = aoti_torch_dtype_float64(), f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16();
  int32_t f16 = aoti_torch_dtype_float16(), i32 = aoti_torch_dtype_int32(), i64 = aoti_torch_dtype_int64();
  int32_t boolean = aoti_torch_dtype_bool();
  int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda();
};
const Codes codes;

constexpr int kMostDimensions = 5;

// ---- allocation, on the device of `like` ----

Tensor empty_strided(const Tensor& like, int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, like.device_type(), like.device_index(), &made));
  return Tensor(made);
}

// Contiguous.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, int32_t dtype) {
  const int64_t dim = static_cast<int64_t>(sizes.size());
  int64_t strides[kMostDimensions], step = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = step;
    const int64_t size = sizes.begin()[i];
    if (size > 1) step *= size;
  }
  return empty_strided(like, dim, sizes.begin(), strides, dtype);
}

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, int32_t dtype) {
  Tensor made = empty(like, sizes, dtype);
#ifdef METATTN_ON_GPU
  TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(made.get()));
#else
  size_t bytes = aoti_torch_dtype_element_size(dtype);
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  if (bytes > 0) memset(made.data(), 0, bytes);
#endif
  return made;
}

// Whether each of the tensor's elements has a place of its own and no place is left over, in whatever order of dimensions.
bool is_dense(const Tensor& x, int64_t dim, const int64_t* sizes, const int64_t* strides) {
  if (x.is_contiguous()) return true;
  unsigned found = 0;
  int64_t left = 0, step = 1;
  for (int64_t i = 0; i < dim; ++i) left += sizes[i] > 1;
  for (; left > 0; --left) {
    int64_t next = 0;
    while (next < dim && (sizes[next] <= 1 || strides[next] != step || (found >> next & 1) != 0)) ++next;
    if (next == dim) return false;
    found |= 1u << next;
    step *= sizes[next];
  }
  return true;
}

// As torch's own, layout and all: it keeps the strides of what is dense. What it makes of others is left to it.
Tensor empty_like(const Tensor& x) {
  const int64_t dim = x.dim();
  const int64_t *sizes = x.sizes(), *strides = x.strides();
  if (is_dense(x, dim, sizes, strides)) return empty_strided(x, dim, sizes, strides, x.dtype());
  AtenTensorHandle shared = nullptr, made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(x.get(), &shared));
  const torch::stable::Tensor like = torch::stable::empty_like(torch::stable::Tensor(shared));
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(like.get(), &made));
  return Tensor(made);
}

// ---- an operator's stack ----

// Takes its arguments, in the order of the schema; tensors become the caller's. The schema of a plain call is without what
// only options need.
class Arguments {
 public:
  explicit Arguments(const StableIValue* stack, bool plain = false) : next_(stack), plain_(plain) {}
  bool plain() const { return plain_; }
  Tensor tensor() { return Tensor(take<AtenTensorHandle>()); }
  Tensor maybe() {  // there, where the call is plain
    return plain_ ? tensor() : Tensor(take<std::optional<AtenTensorHandle>>().value_or(nullptr));
  }
  Tensor option() { return plain_ ? Tensor() : maybe(); }
  int64_t integer() { return take<int64_t>(); }
  double real() { return take<double>(); }
  bool flag() { return take<bool>(); }

 private:
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }
  const StableIValue* next_;
  const bool plain_;
};

}  // namespace
