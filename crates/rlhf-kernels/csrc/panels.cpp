// Products of few rows with a matrix that was packed for them.
#include "cpu_kernels.h"
#include "shim.h"
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

// x [B,I] f32 with unit stride in I; panels [n,I,32] f32 or bf16, contiguous. Result [B, 32·n].
RLHF_API char *rlhf_panel_product(at::Tensor **out, const at::Tensor *x, const at::Tensor *panels) {
  return rlhf::guard([&] {
    const auto &kernels = rlhf::cpu_kernels();
    const int64_t rows = x->size(0), k = x->size(1), row = x->stride(0), n = panels->size(0), ldo = n * rlhf::kPanel;
    auto y = at::empty({rows, ldo}, x->options());
    const float *from = x->const_data_ptr<float>();
    float *to = y.mutable_data_ptr<float>();
    const bool half = panels->scalar_type() == at::kBFloat16;
    const void *w = panels->const_data_ptr();
    at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        if (half)
          kernels.panel_bf16(from, rows, row, k, (const uint16_t *)w + p * k * rlhf::kPanel, to + p * rlhf::kPanel, ldo);
        else
          kernels.panel_f32(from, rows, row, k, (const float *)w + p * k * rlhf::kPanel, to + p * rlhf::kPanel, ldo);
    });
    *out = rlhf::give(std::move(y));
  });
}
