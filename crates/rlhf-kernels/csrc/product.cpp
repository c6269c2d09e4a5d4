#include "product.h"
#include "product_kernels.h"
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <algorithm>

namespace rlhf {
namespace {
int64_t parts(int64_t n, int64_t each) { return (n + each - 1) / each; }

// The first of the numbers from 0 that part `i` of `n` has.
int64_t bound(int64_t all, int64_t each, int64_t i, int64_t n) { return std::min(all, parts(all, each) * i / n * each); }

// Below this many multiply-adds a second thread takes longer to start than it spares.
constexpr int64_t kAlone = 1 << 18;

void multiply(void (*f32)(const Product &), const Product &x) {
  // Threads share columns and rows so that the longest part is short; each copies its part of B for itself.
  const int64_t panels = parts(x.n, kProductColumns), tiles = parts(x.m, kProductRows);
  const int64_t threads = x.m * x.n * x.k < kAlone || at::in_parallel_region() ? 1 : at::get_num_threads();
  int64_t across = threads, least = panels * tiles + 1;
  for (int64_t n = threads; n > 0; --n) {
    const int64_t longest = parts(panels, n) * parts(tiles, threads / n);
    if (longest < least) across = n, least = longest;
  }
  const int64_t down = threads / across;
  at::parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t column = t % across, row = t / across;
      const int64_t j = bound(x.n, kProductColumns, column, across), i = bound(x.m, kProductRows, row, down);
      Product part = x;
      part.n = bound(x.n, kProductColumns, column + 1, across) - j;
      part.m = bound(x.m, kProductRows, row + 1, down) - i;
      if (part.m <= 0 || part.n <= 0) continue;
      part.a += i * x.a_row;
      part.b += j * x.b_col;
      part.c += i * x.c_row + j;
      f32(part);
    }
  });
}
} // namespace

void product(const at::Tensor &out, const at::Tensor &a, const at::Tensor &b, bool add) {
  const auto plain = [](const at::Tensor &t) { return t.is_cpu() && t.scalar_type() == at::kFloat && !t.is_neg(); };
  const auto f32 = product_kernels().f32;
  if (f32 && plain(out) && plain(a) && plain(b) && (out.stride(1) == 1 || out.size(1) == 1)) {
    TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0) && out.size(0) == a.size(0) &&
                    out.size(1) == b.size(1),
                "product: ", a.sizes(), " and ", b.sizes(), " do not make ", out.sizes());
    // A gradient that is one number everywhere has no stride of 1.
    const auto lying = [](const at::Tensor &t) { return t.stride(0) == 1 || t.stride(1) == 1 ? t : t.contiguous(); };
    const auto x = lying(a), y = lying(b);
    multiply(f32, {out.size(0), out.size(1), x.size(1), x.const_data_ptr<float>(), x.stride(0), x.stride(1),
                   y.const_data_ptr<float>(), y.stride(0), y.stride(1), out.mutable_data_ptr<float>(), out.stride(0), add});
    return;
  }
  at::Tensor to = out;
  if (b.scalar_type() != out.scalar_type()) {
    const auto left = a.to(b.scalar_type());
    if (add) to.add_(at::mm(left, b, out.scalar_type()));
    else at::mm_out(to, left, b, out.scalar_type());
  } else if (add) to.addmm_(a, b);
  else at::mm_out(to, a, b);
}

at::Tensor product(const at::Tensor &a, const at::Tensor &b) {
  auto out = at::empty({a.size(0), b.size(1)}, a.options());
  product(out, a, b, false);
  return out;
}
} // namespace rlhf
