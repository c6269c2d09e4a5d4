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

// Two rows of logits with their statistics (see CpuKernels::stats).
struct RowPair {
  const float *s, *t, *s_stats, *t_stats;
  int64_t v;
  float inv_t;
  Divergence kind;
  float beta;
};

struct LossKernels {
  // out[0] the divergence, out[1] Σ s·a with a = log s − log t (reverse) or log s − log m (js).
  void (*divergence)(const RowPair &, float *out);
  // out = g · d divergence / dz of the student's uncapped logits; it may be the row s itself, which holds
  // capped logits where `cap` is not 0. `mean` is the forward pass's out[1].
  void (*divergence_grad)(const RowPair &, float mean, float cap, float g, float *out);
};

const LossKernels &loss_kernels();

} // namespace rlhf
