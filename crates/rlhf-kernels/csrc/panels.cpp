// Products of few rows with a matrix that was packed for them.
#include "cpu_kernels.h"
#include "shim.h"
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <algorithm>

namespace {
// Panels [begin,end) of a matrix whose number (o,i) lies at w[o·row + i·col].
template <class E>
void pack(const E *w, int64_t out, int64_t from, int64_t row, int64_t col, E *to, int64_t begin, int64_t end) {
  constexpr int64_t width = rlhf::kPanel, line = 64 / sizeof(E);
  for (int64_t p = begin; p < end; ++p) {
    const int64_t rows = std::min(width, out - p * width);
    const E *panel = w + p * width * row;
    E *into = to + p * width * from;
    for (int64_t first = 0; first < from; first += line) {
      const int64_t last = std::min(first + line, from);
      for (int64_t r = 0; r < width; ++r)
        for (int64_t i = first; i < last; ++i) into[i * width + r] = r < rows ? panel[r * row + i * col] : E(0);
    }
  }
}
} // namespace

// weight [O,I] f32 or bf16. Result [⌈O/32⌉,I,32], the last panel filled with zeros.
RLHF_API char *rlhf_pack_panels(at::Tensor **out, const at::Tensor *weight) {
  return rlhf::guard([&] {
    const int64_t o = weight->size(0), k = weight->size(1), n = (o + rlhf::kPanel - 1) / rlhf::kPanel;
    auto y = at::empty({n, k, rlhf::kPanel}, weight->options());
    const int64_t row = weight->stride(0), col = weight->stride(1);
    at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      if (y.scalar_type() == at::kFloat)
        pack(weight->const_data_ptr<float>(), o, k, row, col, y.mutable_data_ptr<float>(), begin, end);
      else
        pack(static_cast<const uint16_t *>(weight->const_data_ptr()), o, k, row, col,
             static_cast<uint16_t *>(y.mutable_data_ptr()), begin, end);
    });
    *out = rlhf::give(std::move(y));
  });
}

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
    const auto multiply = [&](auto product, const auto *w, int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const auto *panel = w + p * k * rlhf::kPanel;
        product(from, rows, row, k, panel, p + 1 < end ? panel + k * rlhf::kPanel : nullptr, to + p * rlhf::kPanel, ldo);
      }
    };
    at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      if (half) multiply(kernels.panel_bf16, static_cast<const uint16_t *>(w), begin, end);
      else multiply(kernels.panel_f32, static_cast<const float *>(w), begin, end);
    });
    *out = rlhf::give(std::move(y));
  });
}
