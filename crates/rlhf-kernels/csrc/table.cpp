// Tables of a vocabulary's rows, of which a batch touches few: the gradient and the optimiser's moments of a table take
// memory a page at a time, for the rows that were ever written.
#include "table.h"
#include "shim.h"
#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rlhf {
bool is_table(const at::Tensor &t) { return t.is_cpu() && t.dim() == 2 && t.size(0) >= 4096 && t.is_contiguous(); }
} // namespace rlhf

namespace {
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Zeros as large as a table. The system gives a page of them when it is first written; until then all are read from one.
Tensor zeros_like_table(at::IntArrayRef size, const at::TensorOptions &options) {
#if defined(__linux__)
  const size_t bytes = c10::multiply_integers(size) * options.dtype().itemsize();
  constexpr size_t large = 1 << 20;
  void *p = bytes < large ? MAP_FAILED : mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p != MAP_FAILED) {
    madvise(p, bytes, MADV_NOHUGEPAGE); // or a row would take 2 MiB
    return at::from_blob(p, size, [bytes](void *q) { munmap(q, bytes); }, options);
  }
#endif
  return at::zeros(size, options);
}

// Each thread adds up its own columns, so that the order of sums is that of the ids.
template <class T> void add_rows(const Tensor &ids, const Tensor &g, const Tensor &out) {
  const int64_t n = ids.numel(), width = out.size(1);
  const auto *id = ids.const_data_ptr<int64_t>();
  const T *from = g.const_data_ptr<T>();
  T *to = out.mutable_data_ptr<T>();
  at::parallel_for(0, width, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = begin; j < end; ++j) to[id[i] * width + j] += from[i * width + j];
  });
}

struct Rows : torch::autograd::Function<Rows> {
  static Tensor forward(AutogradContext *ctx, const Tensor &table, const Tensor &ids) {
    ctx->save_for_backward({ids});
    ctx->saved_data["size"] = table.sizes().vec();
    return at::index_select(table, 0, ids);
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    rlhf::once_differentiable("embedding");
    const auto ids = ctx->get_saved_variables()[0];
    const auto g = grads[0].contiguous();
    auto out = zeros_like_table(ctx->saved_data["size"].toIntVector(), g.options());
    (g.scalar_type() == at::kDouble ? add_rows<double> : add_rows<float>)(ids, g, out);
    return {out, Tensor()};
  }
};
} // namespace

// A table in f32 or f64, ids in i64 [n].
RLHF_API char *rlhf_embedding(Tensor **out, const Tensor *table, const Tensor *ids) {
  return rlhf::guard([&] { *out = rlhf::give(Rows::apply(*table, ids->contiguous())); });
}
RLHF_API int rlhf_is_table(const Tensor *t) noexcept { return rlhf::is_table(*t); }
RLHF_API char *rlhf_zeros_like_table(Tensor **out, const Tensor *t) {
  return rlhf::guard([&] { *out = rlhf::give(zeros_like_table(t->sizes(), t->options().requires_grad(false))); });
}
