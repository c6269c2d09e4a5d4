// The inner loops of losses and optimisers on the CPU, free of libtorch: compiled once per instruction set,
// chosen at run time. Everything here is single-threaded; callers split the work.
#pragma once
#include <cstdint>

namespace rlhf {

// Between a student s and a teacher t over one vocabulary.
enum class Divergence : int64_t {
  forward, // KL(t ‖ s)
  reverse, // KL(s ‖ t)
  js,      // β KL(t ‖ m) + (1 − β) KL(s ‖ m), m = β t + (1 − β) s
};

// Two rows of logits with their statistics (see kStats).
struct RowPair {
  const float *s, *t, *s_stats, *t_stats;
  int64_t v;
  float inv_t;
  Divergence kind;
  float beta;
};

// The clipped surrogate of a run of tokens of one completion, with its gradient.
struct SurrogateSettings {
  double low, high, dual;     // 1 − ε_low, 1 + ε_high; dual is infinite where there is none
  double kl;                  // the KL term's coefficient
  int64_t kl_value, kl_slope; // 0 none, 1 k1, 2 k2, 3 k3: whose value, whose gradient
  int64_t kl_weighted;        // whether the ratio multiplies it
};
template <class T> struct SurrogateTokens {
  const T *logp, *old, *advantage;
  const T *weight, *ref; // may be null
  T *grad;               // d loss / d logp
  int64_t n, stride;     // of the advantages: 1, or 0 where the completion has one
  double scale;          // of loss and gradient
};
// What is added up; the fifth is a maximum.
enum SurrogateSum { kLoss, kClippedLow, kClippedHigh, kRatio, kRatioMax, kApproxKl, kKl, kSurrogateSums };

// Magnitudes of an 8-bit map in order, from 0 to 1 and then infinity, and how a number's neighbours are found:
// by its exponent and eight bits of its fraction the largest place not above any number of that bucket. The
// buckets are finer than the map, so at most one step is left.
struct MagnitudeTable {
  static constexpr int kOctaves = 26, kFirst = 127 - kOctaves, kBuckets = (kOctaves + 1) * 256;
  const float *values, *per_gap; // per_gap[k]: 1 over what lies between values k and k + 1
  const int32_t *first;          // [kBuckets]
};
// A block of at most 256 parameters whose moments are 8-bit codes. Signed codes: 127 is 0, 255 is 1, below lie
// the negatives (of which −1 is none).
struct Adam8Block {
  float *parameter;
  const float *grad;
  uint8_t *first, *second;
  float *first_top, *second_top; // the block's largest magnitudes
  int64_t n;
  uint32_t place; // of its first parameter, with the step's salt
};
struct Adam8Settings {
  MagnitudeTable sign, positive;
  const float *first, *second; // what the 256 codes stand for
  float beta1, beta2, rest1, rest2, keep, rate, root, eps;
};

// What a step of AdamW with f32 moments does.
struct AdamSettings {
  float factor, beta1, rest1, beta2, rest2, keep, rate, root, eps; // root: √(1 − β₂ᵗ)
};

struct LossKernels {
  // out[0] the divergence, out[1] Σ s·a with a = log s − log t (reverse) or log s − log m (js).
  void (*divergence)(const RowPair &, float *out);
  // out = g · d divergence / dz of the student's uncapped logits; it may be the row s itself, which holds
  // capped logits where `cap` is not 0. `mean` is the forward pass's out[1].
  void (*divergence_grad)(const RowPair &, float mean, float cap, float g, float *out);
  // sums[kSurrogateSums] of at most 1024 tokens.
  void (*surrogate_f32)(const SurrogateTokens<float> &, const SurrogateSettings &, double *sums);
  void (*surrogate_f64)(const SurrogateTokens<double> &, const SurrogateSettings &, double *sums);
  void (*adamw8)(const Adam8Block &, const Adam8Settings &);
  // Where gradient and moments are all 0 only the decay acts, and nothing is written without one.
  void (*adamw)(float *parameter, const float *grad, float *first, float *second, int64_t n, const AdamSettings &);
};

const LossKernels &loss_kernels();

} // namespace rlhf
