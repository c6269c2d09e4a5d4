// Compiled once per instruction set with RLHF_ISA naming it. Everything is in an unnamed namespace: no
// inline function may leak from one instruction set into another's code.
#include "loss_kernels.h"
#include "simd.h"

namespace {

using rlhf::Divergence;
using rlhf::RowPair;

// One vector of both distributions.
struct Both {
  F s, t, log_s, log_t;
};
INLINE Both both(const RowPair &r, F s, F t) {
  const F ds = (s - r.s_stats[0]) * r.inv_t, dt = (t - r.t_stats[0]) * r.inv_t;
  return {exp(ds) * r.s_stats[3], exp(dt) * r.t_stats[3], ds - r.s_stats[1], dt - r.t_stats[1]};
}
// log x − log(b·y + (1 − b)·x) where x is not 0.
INLINE F over_mixture(F x, F y, float b) {
  const F ratio = y / x;
  return -log((1.f - b) + b * (ratio < 1e30f ? ratio : splat(1e30f)));
}
// The student's own term: what its probability multiplies, in the value (not of the forward divergence)
// and in the gradient.
template <Divergence KIND> INLINE F own(const Both &x, float beta) {
  const F a = KIND == Divergence::reverse ? x.log_s - x.log_t : over_mixture(x.s, x.t, beta);
  return x.s > 0.f ? a : F{};
}

// Logits beyond a row's end are −∞: probability 0 on both sides.
INLINE F end_of(const float *p, int64_t left) {
  return left >= W ? load(p) : load(p, left, -__builtin_inff());
}

template <Divergence KIND> void divergence_of(const RowPair &r, float *out) {
  double value = 0, mean = 0;
  for (int64_t block = 0; block < r.v; block += 64 * W) {
    const int64_t end = block + 64 * W < r.v ? block + 64 * W : r.v;
    F a{}, b{};
    for (int64_t i = block; i < end; i += W) {
      const Both x = both(r, end_of(r.s + i, end - i), end_of(r.t + i, end - i));
      if (KIND != Divergence::forward) b += x.s * own<KIND>(x, r.beta);
      if (KIND == Divergence::forward) a += x.t > 0.f ? x.t * (x.log_t - x.log_s) : F{};
      if (KIND == Divergence::js) a += x.t > 0.f ? x.t * over_mixture(x.t, x.s, 1.f - r.beta) : F{};
    }
    value += sum<float>(a);
    mean += sum<float>(b);
  }
  out[1] = (float)mean;
  out[0] = KIND == Divergence::forward ? (float)value
           : KIND == Divergence::reverse ? (float)mean
                                         : (float)(r.beta * value + (1.0 - r.beta) * mean);
}
void divergence(const RowPair &r, float *out) {
  switch (r.kind) {
  case Divergence::forward: return divergence_of<Divergence::forward>(r, out);
  case Divergence::reverse: return divergence_of<Divergence::reverse>(r, out);
  case Divergence::js: return divergence_of<Divergence::js>(r, out);
  }
}

template <Divergence KIND> void divergence_grad_of(const RowPair &r, float mean, float cap, float g, float *out) {
  const float scale = g * r.inv_t * (KIND == Divergence::js ? 1.f - r.beta : 1.f);
  const float inv_cap = cap > 0 ? 1.f / cap : 0.f;
  for (int64_t i = 0; i < r.v; i += W) {
    const F z = end_of(r.s + i, r.v - i);
    const Both x = both(r, z, end_of(r.t + i, r.v - i));
    F y = KIND == Divergence::forward ? x.s - x.t : x.s > 0.f ? x.s * (own<KIND>(x, r.beta) - mean) : F{};
    y *= scale;
    if (cap > 0) {
      const F c = z * inv_cap;
      y *= 1.f - c * c;
    }
    if (r.v - i >= W) store(out + i, y);
    else store(out + i, y, r.v - i);
  }
}
void divergence_grad(const RowPair &r, float mean, float cap, float g, float *out) {
  switch (r.kind) {
  case Divergence::forward: return divergence_grad_of<Divergence::forward>(r, mean, cap, g, out);
  case Divergence::reverse: return divergence_grad_of<Divergence::reverse>(r, mean, cap, g, out);
  case Divergence::js: return divergence_grad_of<Divergence::js>(r, mean, cap, g, out);
  }
}

} // namespace

namespace rlhf {
#define RLHF_JOIN(a, b) a##b
#define RLHF_NAME(isa) RLHF_JOIN(isa, _losses)
extern const LossKernels RLHF_NAME(RLHF_ISA);
const LossKernels RLHF_NAME(RLHF_ISA) = {divergence, divergence_grad};
} // namespace rlhf
