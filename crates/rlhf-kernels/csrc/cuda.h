// Launching the kernels of kernels.cu on a tensor's GPU and stream. Needs no CUDA to build: the driver and NVRTC are
// looked for at first use, among what libtorch's CUDA part brings along.
#pragma once
#include "shim.h"
#include <ATen/ops/tensor.h>
#include <vector>

namespace rlhf::cuda {
// Whether kernels can be launched where `t` lives; they are compiled for that GPU at the first call. Where this is
// false for a GPU, libtorch's own operations do the work.
bool ready(const at::Tensor &t);

// `arguments` point at the kernel's parameters, in order and in its types.
void launch(const at::Tensor &on, const char *kernel, int64_t blocks, int threads, void **arguments);
template <class... A> void run(const at::Tensor &on, const char *kernel, int64_t blocks, int threads, A... a) {
  if (blocks == 0) return;
  void *arguments[] = {&a...};
  launch(on, kernel, blocks, threads, arguments);
}

template <class T> const T *in(const at::Tensor &t) { return t.defined() ? t.const_data_ptr<T>() : nullptr; }
template <class T> T *out(const at::Tensor &t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; }

// How kernels are told the type of a gradient that they write: `put` in kernels.cu.
inline int output_kind(const at::Tensor &t) {
  return t.scalar_type() == at::kFloat ? 0 : t.scalar_type() == at::kBFloat16 ? 1 : 2;
}

// A small list of numbers as a tensor there.
inline at::Tensor upload(const std::vector<int64_t> &list, const at::Tensor &like) {
  return at::tensor(list, at::TensorOptions().dtype(at::kLong)).to(like.device(), at::kLong, /*non_blocking=*/true);
}
} // namespace rlhf::cuda
