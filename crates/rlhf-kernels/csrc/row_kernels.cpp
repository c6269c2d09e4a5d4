// Compiled once per instruction set with RLHF_ISA naming it. Everything is in an unnamed namespace: no
// inline function may leak from one instruction set into another's code.
#include "row_kernels.h"
#include "simd.h"

namespace {

template <class T> INLINE Vec<T> end_of(const T *p, int64_t left, T pad) {
  return left >= Simd<T>::W ? load(p) : load(p, left, pad);
}
template <class T> INLINE void put(T *p, Vec<T> v, int64_t left) {
  if (left >= Simd<T>::W) store(p, v);
  else store(p, v, left);
}

template <class T> T largest(const T *z, int64_t v) {
  constexpr int64_t w = Simd<T>::W;
  const T inf = (T)__builtin_inf();
  Vec<T> m0 = splat<T>(-inf), m1 = m0, m2 = m0, m3 = m0;
  int64_t i = 0;
  for (; i + 4 * w <= v; i += 4 * w) {
    m0 = larger<T>(load(z + i), m0);
    m1 = larger<T>(load(z + i + w), m1);
    m2 = larger<T>(load(z + i + 2 * w), m2);
    m3 = larger<T>(load(z + i + 3 * w), m3);
  }
  for (; i < v; i += w) m0 = larger<T>(end_of(z + i, v - i, -inf), m0);
  return max<T>(larger<T>(larger<T>(m0, m1), larger<T>(m2, m3)));
}

template <class T, bool DOT, bool MOMENTS, bool KEEP>
void sums(T *z, int64_t v, T m, T inv_t, T cap, rlhf::RowSums *s) {
  constexpr int64_t w = Simd<T>::W;
  const T inf = (T)__builtin_inf(), squash = KEEP && cap > 0 ? T(1) / cap : T(0);
  // Short blocks in T, their sums in f64.
  for (int64_t block = 0; block < v; block += 64 * w) {
    const int64_t end = block + 64 * w < v ? block + 64 * w : v;
    Vec<T> total{}, dot{}, squares{}, plain{}, energy{};
    for (int64_t i = block; i < end; i += w) {
      const Vec<T> x = end_of(z + i, end - i, -inf), d = (x - m) * inv_t, p = exp(d);
      total += p;
      if (DOT) dot += p * floored<T>(d, splat<T>((T)kFloor));
      if (MOMENTS) {
        squares += p * p;
        const Vec<T> y = end_of(z + i, end - i, T(0));
        plain += y;
        energy += y * y;
      }
      if (KEEP) {
        const Vec<T> c = x * squash;
        put(z + i, cap > 0 ? p * (T(1) - c * c) : p, end - i);
      }
    }
    s->total += sum<T>(total);
    if (DOT) s->dot += sum<T>(dot);
    if (MOMENTS) {
      s->squares += sum<T>(squares);
      s->sum += sum<T>(plain);
      s->energy += sum<T>(energy);
    }
  }
}

template <class T> double fold(T *z, int64_t v, const rlhf::FoldSettings &o, rlhf::RowSums *s) {
  const double none = -__builtin_inf();
  const T found = largest(z, v);
  double factor = 1;
  s->raised = -1;
  if (found > s->top) {
    if (s->top > none) {
      const double shift = (s->top - found) * o.inv_t;
      factor = __builtin_exp(shift);
      s->dot = factor * (s->dot + s->total * shift);
      s->total *= factor;
      s->squares *= factor * factor;
    }
    s->top = found;
    if (o.raised)
      while (z[++s->raised] != found) {}
  }
  // Only −∞ so far: any finite maximum gives 0, and a NaN shows.
  const T m = s->top > none ? (T)s->top : T(0), inv_t = (T)o.inv_t, cap = (T)o.cap;
  if (o.keep) {
    if (o.moments) sums<T, true, true, true>(z, v, m, inv_t, cap, s);
    else if (o.dot) sums<T, true, false, true>(z, v, m, inv_t, cap, s);
    else sums<T, false, false, true>(z, v, m, inv_t, cap, s);
  } else {
    if (o.moments) sums<T, true, true, false>(z, v, m, inv_t, cap, s);
    else if (o.dot) sums<T, true, false, false>(z, v, m, inv_t, cap, s);
    else sums<T, false, false, false>(z, v, m, inv_t, cap, s);
  }
  return factor;
}

template <class T, bool ENTROPY, bool CAP>
void grad_row(const T *z, T *out, int64_t v, const T *s, T inv_t, T cap, T g, T ge, T gq) {
  constexpr int64_t w = Simd<T>::W;
  const T inv_cap = CAP ? T(1) / cap : T(0), top = s[0], each = -g * inv_t * s[3];
  const T by = ge * inv_t * s[3], more = s[2] - s[1], pull = gq * inv_t * inv_t;
  for (int64_t i = 0; i < v; i += w) {
    const Vec<T> x = end_of(z + i, v - i, T(0)), d = (x - top) * inv_t;
    Vec<T> y = splat<T>(each);
    if (ENTROPY) y -= (floored<T>(d, splat<T>((T)kFloor)) + more) * by;
    y *= exp(d);
    if (gq != 0) y += x * pull;
    if (CAP) {
      const Vec<T> c = x * inv_cap;
      y *= T(1) - c * c;
    }
    put(out + i, y, v - i);
  }
}
template <class T>
void grad(const T *z, T *out, int64_t v, const T *s, double inv_t, double cap, T g, T ge, T gq) {
  const auto row = ge != 0 ? (cap > 0 ? grad_row<T, true, true> : grad_row<T, true, false>)
                           : (cap > 0 ? grad_row<T, false, true> : grad_row<T, false, false>);
  row(z, out, v, s, (T)inv_t, (T)cap, g, ge, gq);
}

template <class T> T norm(const T *a, const T *b, const T *w, int64_t d, T eps, T *x, T *y) {
  constexpr int64_t step = Simd<T>::W;
  Vec<T> squares{};
  for (int64_t i = 0; i < d; i += step) {
    Vec<T> v = end_of(a + i, d - i, T(0));
    if (b) {
      v += end_of(b + i, d - i, T(0));
      put(x + i, v, d - i);
    }
    squares += v * v;
  }
  const T root = T(1) / (T)__builtin_sqrt(sum<T>(squares) / (T)d + eps);
  const T *from = b ? x : a;
  for (int64_t i = 0; i < d; i += step)
    put(y + i, end_of(from + i, d - i, T(0)) * root * end_of(w + i, d - i, T(0)), d - i);
  return root;
}
template <class T>
void norm_grad(const T *g, const T *x, const T *w, T root, int64_t d, const T *more, T *dx, T *dw) {
  constexpr int64_t step = Simd<T>::W;
  Vec<T> dots{};
  for (int64_t i = 0; i < d; i += step)
    dots += end_of(g + i, d - i, T(0)) * end_of(w + i, d - i, T(0)) * end_of(x + i, d - i, T(0));
  const T back = sum<T>(dots) * root * root / (T)d;
  for (int64_t i = 0; i < d; i += step) {
    const int64_t left = d - i;
    const Vec<T> gi = end_of(g + i, left, T(0)), xi = end_of(x + i, left, T(0));
    Vec<T> to = (gi * end_of(w + i, left, T(0)) - xi * back) * root;
    if (more) to += end_of(more + i, left, T(0));
    if (dw) put(dw + i, end_of(dw + i, left, T(0)) + gi * xi * root, left);
    put(dx + i, to, left);
  }
}
// 1/(1 + e^−x); the exponential is right for numbers that are not too large only, beyond them the quotient is 0.
template <class T> INLINE Vec<T> sigmoid(Vec<T> x) {
  const T most = sizeof(T) == 4 ? T(88) : T(700);
  return T(1) / (exp(-x > most ? splat<T>(most) : -x) + T(1));
}
template <class T> void silu(const T *gate, const T *up, int64_t d, T *y) {
  for (int64_t i = 0; i < d; i += Simd<T>::W) {
    const Vec<T> x = end_of(gate + i, d - i, T(0));
    put(y + i, x * sigmoid<T>(x) * end_of(up + i, d - i, T(0)), d - i);
  }
}
template <class T> void silu_grad(const T *gate, const T *up, const T *g, int64_t d, T *to_gate, T *to_up) {
  for (int64_t i = 0; i < d; i += Simd<T>::W) {
    const int64_t left = d - i;
    const Vec<T> x = end_of(gate + i, left, T(0)), s = sigmoid<T>(x), gi = end_of(g + i, left, T(0));
    put(to_up + i, gi * x * s, left);
    put(to_gate + i, gi * end_of(up + i, left, T(0)) * s * (x * (T(1) - s) + T(1)), left);
  }
}
template <class T> void rotate(const T *x, const T *cos, const T *low, const T *high, int64_t turning, int64_t d, T *y) {
  const int64_t half = turning / 2;
  for (int64_t i = 0; i < half; i += Simd<T>::W) {
    const int64_t left = half - i;
    const Vec<T> a = end_of(x + i, left, T(0)), b = end_of(x + half + i, left, T(0));
    put(y + i, a * end_of(cos + i, left, T(0)) + b * end_of(low + i, left, T(0)), left);
    put(y + half + i, b * end_of(cos + half + i, left, T(0)) + a * end_of(high + i, left, T(0)), left);
  }
  for (int64_t i = turning; i < d; ++i) y[i] = x[i];
}

} // namespace

namespace rlhf {
#define RLHF_JOIN(a, b) a##b
#define RLHF_NAME(isa) RLHF_JOIN(isa, _rows)
extern const RowKernels RLHF_NAME(RLHF_ISA);
const RowKernels RLHF_NAME(RLHF_ISA) = {
    fold<float>, fold<double>, grad<float>, grad<double>,
    {norm<float>, norm_grad<float>, silu<float>, silu_grad<float>, rotate<float>},
    {norm<double>, norm_grad<double>, silu<double>, silu_grad<double>, rotate<double>}};
} // namespace rlhf
