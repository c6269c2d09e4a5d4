// Lists of tensors in one call: AdamW, the global norm, scaling.
#include "loss_kernels.h"
#include "shim.h"
#include "table.h"
#include <ATen/Parallel.h>
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

// AdamW of a tensor in f32 on the CPU, a run of numbers after another: a table's rows, so that those which nothing
// moves stay untouched.
void adamw_runs(const at::Tensor &parameter, const at::Tensor &grad, const at::Tensor &first, const at::Tensor &second,
                const rlhf::AdamSettings &c) {
  const int64_t n = parameter.numel(), run = rlhf::is_table(parameter) ? parameter.size(1) : 4096;
  auto *p = parameter.mutable_data_ptr<float>();
  const auto *g = grad.const_data_ptr<float>();
  auto *m = first.mutable_data_ptr<float>(), *v = second.mutable_data_ptr<float>();
  const auto step = rlhf::loss_kernels().adamw;
  at::parallel_for(0, (n + run - 1) / run, std::max<int64_t>(1, 65536 / run), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * run; i < std::min(n, end * run); i += run)
      step(p + i, g + i, m + i, v + i, std::min(run, n - i), c);
  });
}
} // namespace

// tensors: n parameters, n gradients, n first moments, n second moments, n steps. Gradients count times `factor`, in the
// same pass; afterwards some are multiplied by it.
RLHF_API char *rlhf_adamw(const at::Tensor *const *tensors, int64_t n, double lr, double factor, double beta1, double beta2,
                          double weight_decay, double eps) {
  return rlhf::guard([&] {
    c10::AutoGradMode off(false);
    // Small tensors gain nothing by it.
    const auto runs = [](const at::Tensor &t) {
      return t.is_cpu() && t.scalar_type() == at::kFloat && t.is_contiguous() && t.numel() >= 65536;
    };
    std::vector<at::Tensor> params, grads, m, v, steps;
    for (int64_t i = 0; i < n; ++i) {
      const auto &p = *tensors[i], &g = *tensors[n + i], &first = *tensors[2 * n + i], &second = *tensors[3 * n + i],
                 &step = *tensors[4 * n + i];
      if (runs(p) && runs(g) && runs(first) && runs(second)) {
        const double t = step.item<double>();
        adamw_runs(p, g, first, second,
                   {static_cast<float>(factor), static_cast<float>(beta1), static_cast<float>(1 - beta1),
                    static_cast<float>(beta2), static_cast<float>(1 - beta2), static_cast<float>(1 - lr * weight_decay),
                    static_cast<float>(lr / (1 - std::pow(beta1, t))), static_cast<float>(std::sqrt(1 - std::pow(beta2, t))),
                    static_cast<float>(eps)});
        continue;
      }
      params.push_back(p), grads.push_back(g), m.push_back(first), v.push_back(second), steps.push_back(step);
    }
    if (params.empty()) return;
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
