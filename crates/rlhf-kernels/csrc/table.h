#pragma once
#include <ATen/core/Tensor.h>

namespace rlhf {
// Whether a tensor is so tall that memory is worth the care: a vocabulary's table on the CPU.
bool is_table(const at::Tensor &t);
} // namespace rlhf
