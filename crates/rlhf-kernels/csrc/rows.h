// What the products of hidden states and vocabularies share: a chunk of logits at a time, in a buffer
// that is kept, and what is remembered of each of its rows.
#pragma once
#include "product.h"
#include "row_kernels.h"
#include "shim.h"
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <cmath>
#include <torch/csrc/autograd/custom_function.h>

namespace rlhf {
using at::Tensor;

// As in the kernels: below it a probability is 0.
constexpr double kFloor = -1e4;

// Only what the inner loops take.
inline bool fast(const Tensor &z) { return z.is_cpu() && z.scalar_type() == at::kFloat; }

// What the GPU's kernels take.
bool rows_on_gpu(const Tensor &z);

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

// The gradient of Σ g·logp + ge·H + ½ gq·Σ (z/T)² with respect to the uncapped logits, without the chosen ids' own part
// (g times `own_slope`), into `out`, which may be z itself or of another type; g, ge and gq [n] may be
// undefined. Apart, because a product that sums over the vocabulary would add thousands of small terms to
// one large one. The gradient of the log-sum-exp is the dense part alone, for −g.
void row_grad(const Tensor &z, const Tensor &stats, double inv_t, double cap, const Tensor &g, const Tensor &ge,
              const Tensor &gq, Tensor out);

template <class T> double fold(T *z, int64_t v, const FoldSettings &o, RowSums *s) {
  if constexpr (sizeof(T) == 4) return row_kernels().fold_f32(z, v, o, s);
  else return row_kernels().fold_f64(z, v, o, s);
}
template <class T>
void grad(const T *z, T *out, int64_t v, const T *stats, double inv_t, double cap, T g, T ge, T gq) {
  if constexpr (sizeof(T) == 4) row_kernels().grad_f32(z, out, v, stats, inv_t, cap, g, ge, gq);
  else row_kernels().grad_f64(z, out, v, stats, inv_t, cap, g, ge, gq);
}
// The statistics that sums amount to.
template <class T> void finish(const RowSums &s, bool entropy, T *stats) {
  const double log_sum = std::log(s.total);
  stats[0] = (T)s.top;
  stats[1] = (T)log_sum;
  stats[2] = entropy ? (T)(log_sum - s.dot / s.total) : T(0);
  stats[3] = (T)(1.0 / s.total);
}

// A chunk's buffer, kept by its thread between calls up to 64 MiB: fresh pages cost more than the
// arithmetic on them.
Tensor buffer(int slot, int64_t rows, int64_t v, const at::TensorOptions &options);

// In the type that sums are made in; undefined stays so.
inline Tensor wide(const Tensor &t, at::ScalarType acc) { return t.defined() ? t.detach().to(acc) : Tensor(); }

// A factor of a product: 16 bits stay where the device multiplies them into sums of 32 (CUDA), else as `wide`.
inline Tensor factor(const Tensor &t, at::ScalarType acc) {
  return t.is_cuda() && at::isReducedFloatingType(t.scalar_type()) ? t.detach() : wide(t, acc);
}

// Where the gradient of logits goes that is to be multiplied with `factor`: over them, or beside them in its type.
inline Tensor slopes_of(const Tensor &z, const Tensor &factor) {
  return z.scalar_type() == factor.scalar_type() ? z : at::empty(z.sizes(), factor.options());
}

// How logits come out of a product, `rows` at a time.
struct Linear {
  double inv_t, cap;
  int64_t rows;
  int64_t words = 0; // of a tile; 0 where rows are whole
  void save(torch::autograd::AutogradContext *ctx) const {
    ctx->saved_data["inv_t"] = inv_t;
    ctx->saved_data["cap"] = cap;
    ctx->saved_data["rows"] = rows;
    ctx->saved_data["words"] = words;
  }
  static Linear of(torch::autograd::AutogradContext *ctx) {
    return {ctx->saved_data["inv_t"].toDouble(), ctx->saved_data["cap"].toDouble(), ctx->saved_data["rows"].toInt(),
            ctx->saved_data["words"].toInt()};
  }
  // out = cap(h · wt + bias) of factors; the bias, in out's type, may be undefined.
  void logits(Tensor out, const Tensor &h, const Tensor &wt, const Tensor &bias) const;
};

// What log-probabilities give beside the differentiable results.
struct Extras {
  bool top1, moments;
  Tensor is_top1, top1_logprobs, log_sum_sq_probs, mean_logits;
  void prepare(int64_t m, const at::TensorOptions &options);
};

// What log-probabilities give that is differentiable, and how they are made.
struct Wanted {
  bool entropy, lse;
  double penalty; // of (z/T)², mean over words; 0 for none
  bool ahead;     // only hidden states want a gradient
  int64_t keep;   // bytes that the logits may take to be kept for backward
};
// out += own · W[ids], some rows at a time so that little of W is copied.
void add_own(const Tensor &out, const Tensor &own, const Tensor &weight, const Tensor &ids);

// The gradients of n rows where all but some `words` are left out: that of the hidden states is written, those of weight
// and bias are added to what is there; each may be undefined. The slopes are as in row_grad, `own` the chosen ids'.
void of_words(const Linear &set, const Tensor &words, const Tensor &h, const Tensor &ids, const Tensor &weight,
              const Tensor &bias, const Tensor &stats, const Tensor &own, const Tensor &dense, const Tensor &entropy,
              const Tensor &pull, Tensor hidden, Tensor to_weight, Tensor to_bias);

// On the CPU, a tile of rows and words at a time: see linear_tiles.cpp. `filter` is 0 for none.
torch::autograd::variable_list linear_tiles(const Tensor &hidden, const Tensor &weight,
                                            const std::optional<Tensor> &bias, const Tensor &ids, Linear set, Wanted,
                                            double filter, Extras *);
} // namespace rlhf
