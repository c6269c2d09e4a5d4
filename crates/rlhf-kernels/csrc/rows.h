// What the products of hidden states and vocabularies share: a chunk of logits at a time, in a buffer
// that is kept, and what is remembered of each of its rows.
#pragma once
#include "cpu_kernels.h"
#include "shim.h"
#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/custom_function.h>

namespace rlhf {
using at::Tensor;

// As in the kernels: below it a probability is 0.
constexpr double kFloor = -1e4;

// Only what the inner loops take.
inline bool fast(const Tensor &z) { return z.is_cpu() && z.scalar_type() == at::kFloat; }

// Rows a thread should take at least, so that starting it pays.
inline int64_t grain(int64_t v) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(v, 1)); }

// An equal length for chunks of at most `most` rows, so that none is a thin rest.
inline int64_t even_rows(int64_t m, int64_t most) {
  const int64_t parts = std::max<int64_t>(1, (m + most - 1) / most);
  return std::max<int64_t>(1, (m + parts - 1) / parts);
}

// stats [n,4] and logp [n] of logits z [n,V]; `ids` may be undefined, then so is logp.
void row_stats(const Tensor &z, const Tensor &ids, double inv_t, bool entropy, Tensor stats, Tensor logp);

// How much of a chosen id's gradient the temperature and the cap let through, [n].
Tensor own_slope(const Tensor &z, const Tensor &ids, double inv_t, double cap);

// The gradient of Σ g·logp + ge·H with respect to the uncapped logits, without the chosen ids' own part
// (g times `own_slope`), into `out`, which may be z itself; g and ge [n] may be
// undefined. Apart, because a product that sums over the vocabulary would add thousands of small terms to
// one large one. The gradient of the log-sum-exp is the dense part alone, for −g.
void row_grad(const Tensor &z, const Tensor &stats, double inv_t, double cap, const Tensor &g, const Tensor &ge,
              Tensor out);

// A chunk's buffer, kept by its thread between calls up to 64 MiB: fresh pages cost more than the
// arithmetic on them.
Tensor buffer(int slot, int64_t rows, int64_t v, const at::TensorOptions &options);

// In the type that sums are made in; undefined stays so.
inline Tensor wide(const Tensor &t, at::ScalarType acc) { return t.defined() ? t.detach().to(acc) : Tensor(); }

// How logits come out of a product, `rows` at a time.
struct Linear {
  double inv_t, cap;
  int64_t rows;
  void save(torch::autograd::AutogradContext *ctx) const {
    ctx->saved_data["inv_t"] = inv_t;
    ctx->saved_data["cap"] = cap;
    ctx->saved_data["rows"] = rows;
  }
  static Linear of(torch::autograd::AutogradContext *ctx) {
    return {ctx->saved_data["inv_t"].toDouble(), ctx->saved_data["cap"].toDouble(), ctx->saved_data["rows"].toInt()};
  }
  // out = cap(h · wt + bias); the bias may be undefined.
  void logits(Tensor out, const Tensor &h, const Tensor &wt, const Tensor &bias) const;
};
} // namespace rlhf
