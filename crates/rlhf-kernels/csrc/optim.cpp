// Lists of tensors in one call: AdamW, the global norm, scaling.
#include "shim.h"
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <c10/core/GradMode.h>

namespace {
std::vector<at::Tensor> list(const at::Tensor *const *t, int64_t n) {
  std::vector<at::Tensor> out;
  out.reserve(n);
  for (int64_t i = 0; i < n; ++i) out.push_back(*t[i]);
  return out;
}
} // namespace

// tensors: n parameters, n gradients, n first moments, n second moments, n steps. Gradients count times `factor`, in the
// same pass; they are multiplied by it afterwards where it is not 1.
RLHF_API char *rlhf_adamw(const at::Tensor *const *tensors, int64_t n, double lr, double factor, double beta1, double beta2,
                          double weight_decay, double eps) {
  return rlhf::guard([&] {
    c10::AutoGradMode off(false);
    auto params = list(tensors, n), grads = list(tensors + n, n), m = list(tensors + 2 * n, n),
         v = list(tensors + 3 * n, n), steps = list(tensors + 4 * n, n);
    std::optional<at::Tensor> divisor;
    if (factor != 1) divisor = at::full({}, 1 / factor, params[0].options().dtype(at::kFloat));
    at::_fused_adamw_(params, grads, m, v, {}, steps, lr, beta1, beta2, weight_decay, eps, false, false, divisor);
  });
}

RLHF_API char *rlhf_global_norm(double *norm, const at::Tensor *const *tensors, int64_t n) {
  return rlhf::guard([&] {
    c10::AutoGradMode off(false);
    auto all = list(tensors, n);
    *norm = n == 0 ? 0.0 : at::stack(at::_foreach_norm(all, 2)).to(at::kDouble).norm().item<double>();
  });
}

// Adds 1 to each.
RLHF_API char *rlhf_count(const at::Tensor *const *tensors, int64_t n) {
  return rlhf::guard([&] {
    c10::AutoGradMode off(false);
    at::_foreach_add_(list(tensors, n), 1);
  });
}

// Leaves the tensors without gradients.
RLHF_API char *rlhf_forget_grads(const at::Tensor *const *tensors, int64_t n) {
  return rlhf::guard([&] {
    for (int64_t i = 0; i < n; ++i) tensors[i]->mutable_grad() = at::Tensor();
  });
}

RLHF_API char *rlhf_scale(const at::Tensor *const *tensors, int64_t n, double factor) {
  return rlhf::guard([&] {
    c10::AutoGradMode off(false);
    auto all = list(tensors, n);
    if (n > 0) at::_foreach_mul_(all, factor);
  });
}
