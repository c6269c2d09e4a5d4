// The inner loops over a row of logits on the CPU, free of libtorch: compiled once per instruction set,
// chosen at run time. Everything here is single-threaded; callers split the work.
#pragma once
#include <cstdint>

namespace rlhf {

// What is known of a row after some of its words, at temperature T: the largest logit m, and over words
// Σ e^d, Σ e^d·d, Σ e^2d, Σ z, Σ z², with d = (z − m)/T.
struct RowSums {
  double top = -__builtin_inf(), total = 0, dot = 0, squares = 0, sum = 0, energy = 0;
  int64_t raised = -1; // where among the words taken last a larger logit stood first; -1 for nowhere
};
struct FoldSettings {
  double inv_t;
  double cap;         // of the soft cap, 0 for none: only where `keep` is
  bool dot, moments;  // whether Σ e^d·d is wanted, and the last three sums
  bool raised;        // whether to look where
  bool keep;          // the logits become e^d (times the soft cap's slope)
};

// Of one row of logits: its maximum m, log S with S = Σ exp((z − m)/T), its entropy (0 unless asked for),
// and 1/S. Probabilities come from 1/S: log S in f32 would make all of a row's wrong by the same factor.
constexpr int64_t kStats = 4;

// Rows of a layer's small operations; see layer.cpp.
template <class T> struct LayerKernels {
  // x = a + b, or a where b is null (x is not written then), y = x·w / √(mean x² + ε); gives 1/√….
  T (*norm)(const T *a, const T *b, const T *w, int64_t d, T eps, T *x, T *y);
  // dx = more + dy/dx·g, dw += dy/dw·g; `more` and dw may be null.
  void (*norm_grad)(const T *g, const T *x, const T *w, T root, int64_t d, const T *more, T *dx, T *dw);
  // y = gate·σ(gate)·up, and its gradients.
  void (*silu)(const T *gate, const T *up, int64_t d, T *y);
  void (*silu_grad)(const T *gate, const T *up, const T *g, int64_t d, T *to_gate, T *to_up);
  // The halves of the first `turning` numbers: y₁ = x₁·cos₁ + x₂·low, y₂ = x₂·cos₂ + x₁·high; the rest stays.
  void (*rotate)(const T *x, const T *cos, const T *low, const T *high, int64_t turning, int64_t d, T *y);
};

struct RowKernels {
  // Takes v more words into a row's sums; gives the factor that the former sums were multiplied by, because the
  // largest logit rose.
  double (*fold_f32)(float *z, int64_t v, const FoldSettings &, RowSums *);
  double (*fold_f64)(double *z, int64_t v, const FoldSettings &, RowSums *);
  // out = d(g·logp + ge·H + ½ gq·Σ (z/T)²)/dz of a row's words, without the chosen id's own part; out may be z.
  // With a soft cap z holds capped logits and out is the gradient of the uncapped.
  void (*grad_f32)(const float *z, float *out, int64_t v, const float *stats, double inv_t, double cap, float g,
                   float ge, float gq);
  void (*grad_f64)(const double *z, double *out, int64_t v, const double *stats, double inv_t, double cap, double g,
                   double ge, double gq);
  LayerKernels<float> layer_f32;
  LayerKernels<double> layer_f64;
};

const RowKernels &row_kernels();
} // namespace rlhf
