// The inner loops that run on the CPU, free of libtorch: compiled once per instruction set, chosen at
// run time. Everything here is single-threaded; callers split the work.
#pragma once
#include <cstdint>

namespace rlhf {

// One prompt and its completions, as row ranges.
struct Group {
  int64_t prompt_start, prompt_end, count;
  const int64_t *completions; // count pairs (start, end)
};

// q [N,Hq,D], k and v [N,Hkv,D] with unit stride in D; everything else is contiguous.
template <class T> struct Attention {
  const T *q, *k, *v;
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;
  int64_t hq, hkv, d;
  double scale;
  double cap;          // scores become cap · tanh(scale · score / cap); 0 for none
  int64_t window;      // keys that a query sees, itself included; 0 for all
  T *out, *norms;      // [N,Hq,D], [N,Hq,2]: the largest score m and 1 / Σ exp(scale·(score − m))
  const T *grad;       // of out, contiguous
  T *gq, *gk, *gv;     // contiguous; gk and gv begin at zero
};

// One new token of each of n sequences, whose keys and values lie in a cache [rows][Hkv][columns][D]. Everything has
// unit stride in D. `starts`: each sequence's first column; `now`: the column of the new token.
struct Decode {
  const float *q, *k, *v; // [n][Hq][D], [n][Hkv][D] of the new token, not yet rotated
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;
  float *keys, *values;
  int64_t cache_row, cache_head, cache_column;
  // [n] of what stands before a sequence's own columns, [Hkv][length][D] each; its length may be 0.
  const float *const *before_keys, *const *before_values;
  const int64_t *before;
  const float *cos, *sin; // [n][turning], the sign of the rotation in sin; null where keys carry no position
  int64_t turning;
  const int64_t *starts;
  int64_t n, now, hq, hkv, d, window; // window: as in Attention
  double scale, cap;
  float *out; // [n][Hq][D]
};

// A token drawn from one row of scores.
struct Drawn {
  int64_t id;
  float logprob, sum; // NaN where a score is NaN or +∞; the sum of all scores, finite exactly when they are
};

// Columns of a matrix that lie together when it is packed for few rows.
constexpr int64_t kPanel = 32;

struct CpuKernels {
  // One group and one key head: its query heads and all its rows.
  void (*attend_f32)(const Attention<float> &, const Group &, int64_t head);
  void (*attend_f64)(const Attention<double> &, const Group &, int64_t head);
  void (*attend_grad_f32)(const Attention<float> &, const Group &, int64_t head);
  void (*attend_grad_f64)(const Attention<double> &, const Group &, int64_t head);
  // out [rows][ldo], kPanel columns of it, = x [rows][k] with rows `row` apart, times one panel [k][kPanel]; `next` is the
  // panel that this thread multiplies next, or null.
  void (*panel_f32)(const float *x, int64_t rows, int64_t row, int64_t k, const float *panel, const float *next,
                    float *out, int64_t ldo);
  void (*panel_bf16)(const float *x, int64_t rows, int64_t row, int64_t k, const uint16_t *panel, const uint16_t *next,
                     float *out, int64_t ldo);
  // One sequence and one key head: writes its key and value, then its query heads' mixtures.
  void (*decode)(const Decode &, int64_t sequence, int64_t head);
  // The first of v ids at which the cumulative probability of softmax(scores) exceeds the uniform.
  Drawn (*draw)(const float *scores, int64_t v, double uniform);
};

const CpuKernels &cpu_kernels();

} // namespace rlhf
