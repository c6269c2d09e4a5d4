// Matrix products: our own in f32 on the CPU where it has AVX-512, else libtorch's.
#pragma once
#include <ATen/core/Tensor.h>

namespace rlhf {
// a · b, of one type.
at::Tensor product(const at::Tensor &a, const at::Tensor &b);
// out = a · b, or out += a · b. The factors may be of another type than `out` where `b` is of 16 bits (on CUDA alone);
// `a` may be in out's type then, it is rounded to b's.
void product(const at::Tensor &out, const at::Tensor &a, const at::Tensor &b, bool add);
} // namespace rlhf
