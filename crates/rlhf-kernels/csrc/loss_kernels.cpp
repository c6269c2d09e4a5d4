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

// e^x where it overflows too.
INLINE F exp_any(F x) { return x > 88.37f ? splat(__builtin_inff()) : exp(x); }
INLINE Vec<double> exp_any(Vec<double> x) { return exp(x); }
// e^y − 1 − y without loss of digits at 0.
INLINE F exp_rest(F y) {
  F p = splat(1.9875691500e-4f);
  p = p * y + 1.3981999507e-3f;
  p = p * y + 8.3334519073e-3f;
  p = p * y + 4.1665795894e-2f;
  p = p * y + 1.6666665459e-1f;
  p = p * y + 5.0000001201e-1f;
  const F size = y < 0.f ? -y : y;
  return size < 0.34f ? p * y * y : exp_any(y) - 1.f - y;
}
INLINE Vec<double> exp_rest(Vec<double> y) {
  Vec<double> x;
  for (int i = 0; i < 8; ++i) x[i] = __builtin_expm1(y[i]) - y[i];
  return x;
}

template <class T> struct KlOf {
  Vec<T> value, slope;
};
template <class T> INLINE KlOf<T> sampled_kl(Vec<T> k1, const rlhf::SurrogateSettings &c) {
  KlOf<T> k{};
  const bool third = c.kl_value == 3 || c.kl_slope == 3;
  const Vec<T> rest = third ? exp_rest(-k1) : Vec<T>{};
  k.value = c.kl_value == 1 ? k1 : c.kl_value == 2 ? k1 * k1 * (T)0.5 : rest;
  // d k3 = 1 − e^{−k1} = −(rest − k1).
  k.slope = c.kl_slope == 1 ? splat<T>(1) : c.kl_slope == 2 ? k1 : k1 - rest;
  return k;
}

template <class T>
void surrogate(const rlhf::SurrogateTokens<T> &x, const rlhf::SurrogateSettings &c, double *sums) {
  using V = Vec<T>;
  constexpr int64_t L = Simd<T>::W;
  const V low = splat<T>((T)c.low), high = splat<T>((T)c.high), dual = splat<T>((T)c.dual), none{};
  const V one = splat<T>(1);
  V loss{}, below{}, above{}, ratios{}, top{}, moved{}, kls{};
  for (int64_t i = 0; i < x.n; i += L) {
    const int64_t left = x.n - i;
    auto at = [&](const T *p) { return left >= L ? load(p + i) : load(p + i, left, (T)0); };
    V there = one;
    if (left < L)
      for (int64_t k = left; k < L; ++k) there[k] = 0;
    const V logp = at(x.logp), a = x.stride ? at(x.advantage) : splat<T>(*x.advantage) * there;
    const V log_ratio = logp - at(x.old), ratio = exp_any(log_ratio);
    // As min() of two products, whose gradient is shared where they are equal.
    const V bounded = ratio > dual ? dual : ratio;
    const V held = ratio < low ? low : (ratio > high ? high : ratio);
    const V plain = bounded * a, clipped = held * a;
    const V d_plain = ratio <= dual ? a : none;
    const V d_clipped = ratio < low ? none : (ratio > high ? none : a);
    const V d = plain < clipped ? d_plain : (clipped < plain ? d_clipped : (d_plain + d_clipped) * (T)0.5);
    V l = -(plain < clipped ? plain : clipped), g = -d * ratio;
    if (x.weight) {
      const V w = at(x.weight);
      l *= w;
      g *= w;
    }
    if (x.ref) {
      const KlOf<T> k = sampled_kl<T>(logp - at(x.ref), c);
      const V by = c.kl_weighted ? ratio * (T)c.kl : splat<T>((T)c.kl);
      l += k.value * by;
      g += (c.kl_weighted ? k.slope + k.value : k.slope) * by;
      kls += k.value;
    }
    l *= (T)x.scale;
    g *= (T)x.scale;
    loss += l * there;
    if (left >= L) store(x.grad + i, g);
    else store(x.grad + i, g, left);
    below += ratio < low ? (a < none ? one : none) : none;
    above += ratio > high ? (a > none ? one : none) : none;
    ratios += ratio * there;
    const V seen = ratio * there;
    top = seen > top ? seen : top;
    moved += log_ratio * log_ratio;
  }
  using namespace rlhf;
  sums[kLoss] = sum<T>(loss);
  sums[kClippedLow] = sum<T>(below);
  sums[kClippedHigh] = sum<T>(above);
  sums[kRatio] = sum<T>(ratios);
  sums[kRatioMax] = max<T>(top);
  sums[kApproxKl] = 0.5 * sum<T>(moved);
  sums[kKl] = sum<T>(kls);
}

// lowbias32 (Wellons 2018): every bit of the result depends on every bit of the argument.
INLINE uint32_t hash(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}
// The place of a neighbour of x in 0..1 (anything else, NaN too, gives some place); `chance` in 0..1 is how
// near the upper one must be. Without branches: they would be as random as the numbers.
INLINE int32_t neighbour(const rlhf::MagnitudeTable &t, float x, float chance) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  int32_t i = (bits >> 15) - (rlhf::MagnitudeTable::kFirst << 8);
  i = i < 0 ? 0 : i;
  i = i < rlhf::MagnitudeTable::kBuckets ? i : rlhf::MagnitudeTable::kBuckets - 1;
  int32_t k = t.first[i];
  k += x >= t.values[k + 1];
  return k + ((x - t.values[k]) * t.per_gap[k] > chance);
}
void adamw8(const rlhf::Adam8Block &b, const rlhf::Adam8Settings &c) {
  float m[256], v[256];
  int32_t first[256], second[256];
  const int64_t n = b.n;
  const float old_m = *b.first_top, old_v = *b.second_top;
  for (int64_t i = 0; i < n; ++i) m[i] = c.first[b.first[i]] * old_m;
  for (int64_t i = 0; i < n; ++i) v[i] = c.second[b.second[i]] * old_v;
  float top_m = 0, top_v = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float g = b.grad[i];
    m[i] = c.beta1 * m[i] + c.rest1 * g;
    v[i] = c.beta2 * v[i] + c.rest2 * g * g;
  }
  for (int64_t i = 0; i < n; ++i)
    b.parameter[i] = c.keep * b.parameter[i] - c.rate * m[i] / (__builtin_sqrtf(v[i]) * c.root + c.eps);
  for (int64_t i = 0; i < n; ++i) {
    const float size = __builtin_fabsf(m[i]);
    top_m = size > top_m ? size : top_m;
    top_v = v[i] > top_v ? v[i] : top_v;
  }
  *b.first_top = top_m;
  *b.second_top = top_v;
  const float by_m = top_m > 0 ? 1.f / top_m : 0.f, by_v = top_v > 0 ? 1.f / top_v : 0.f;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t noise = hash(b.place + (uint32_t)i);
    const float x = m[i] * by_m, y = v[i] * by_v;
    const int32_t j = neighbour(c.sign, __builtin_fabsf(x), (float)(int32_t)(noise >> 16) * 0x1p-16f);
    const int32_t k = neighbour(c.positive, y, (float)(int32_t)(noise & 0xffff) * 0x1p-16f);
    first[i] = x < 0 ? 127 - (j < 127 ? j : 127) : 127 + j;
    // What is above 0 stays above 0: a second moment of 0 would make the next step huge.
    const int32_t least = y > 0;
    second[i] = k > least ? k : least;
  }
  for (int64_t i = 0; i < n; ++i) b.first[i] = (uint8_t)first[i];
  for (int64_t i = 0; i < n; ++i) b.second[i] = (uint8_t)second[i];
}

bool still(const float *g, const float *m, const float *v, int64_t n) {
  if (n > 0 && g[0] != 0) return false;
  int any = 0;
  for (int64_t i = 0; i < n; ++i) any |= (g[i] != 0) | (m[i] != 0) | (v[i] != 0);
  return !any;
}
void adamw(float *__restrict p, const float *__restrict grad, float *__restrict m, float *__restrict v, int64_t n,
           const rlhf::AdamSettings &c) {
  if (still(grad, m, v, n)) {
    for (int64_t i = 0; c.keep != 1 && i < n; ++i) p[i] *= c.keep;
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const float g = grad[i] * c.factor;
    m[i] = c.beta1 * m[i] + c.rest1 * g;
    v[i] = c.beta2 * v[i] + c.rest2 * g * g;
    p[i] = c.keep * p[i] - c.rate * m[i] / (__builtin_sqrtf(v[i]) / c.root + c.eps);
  }
}

} // namespace

namespace rlhf {
#define RLHF_JOIN(a, b) a##b
#define RLHF_NAME(isa) RLHF_JOIN(isa, _losses)
extern const LossKernels RLHF_NAME(RLHF_ISA);
const LossKernels RLHF_NAME(RLHF_ISA) = {divergence, divergence_grad, surrogate<float>, surrogate<double>,
                                               adamw8, adamw};
} // namespace rlhf
