// Vectors of 64 bytes and what the inner loops do with them. They are the compiler's generic ones, so the
// same text becomes SSE2, AVX2, AVX-512 or NEON. Everything is in an unnamed namespace: no inline function
// may leak from one instruction set into another's code.
#pragma once
#include <cstdint>

namespace {

template <class T> struct Simd;
template <> struct Simd<float> {
  typedef float V __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
  static constexpr int64_t W = 16;
};
template <> struct Simd<double> {
  typedef double V __attribute__((vector_size(64)));
  typedef int64_t I __attribute__((vector_size(64)));
  static constexpr int64_t W = 8;
};
template <class T> using Vec = typename Simd<T>::V;
using F = Vec<float>;

#define INLINE inline __attribute__((always_inline))

// Minus, not plus: x − 0 is x whatever its sign, so this is a broadcast alone; 0 + x is an addition to the compiler.
template <class T> INLINE Vec<T> splat(T x) { return x - Vec<T>{}; }
template <class T> INLINE Vec<T> load(const T *p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, 64);
  return v;
}
template <class T> INLINE Vec<T> load(const T *p, int64_t n, T pad) {
  Vec<T> v = splat<T>(pad);
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
template <class T> INLINE void store(T *p, Vec<T> v) { __builtin_memcpy(p, &v, 64); }
template <class T> INLINE void store(T *p, Vec<T> v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
// The second operand where the first is not greater: a NaN in `x` is dropped, which is what a running
// maximum wants (the exponential shows it afterwards).
template <class T> INLINE Vec<T> larger(Vec<T> x, Vec<T> best) { return x > best ? x : best; }
// `x` unless it is below `low`; a NaN stays.
template <class T> INLINE Vec<T> floored(Vec<T> x, Vec<T> low) { return x < low ? low : x; }
template <class T> INLINE T sum(Vec<T> v) {
  T s = 0;
  for (int64_t i = 0; i < Simd<T>::W; ++i) s += v[i];
  return s;
}
template <class T> INLINE T max(Vec<T> v) {
  T m = v[0];
  for (int64_t i = 1; i < Simd<T>::W; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// e^x for x ≤ 88 to about one unit in the last place (Cephes' expf); 0 below the normal numbers, NaN
// stays NaN.
INLINE F exp(F x) {
  const F low = splat(-87.33654f);
  const F y = floored<float>(x, low);
  const F n = (y * 1.44269504088896341f + 12582912.f) - 12582912.f; // nearest whole number
  const F r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
  F p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const Simd<float>::I bits = (__builtin_convertvector(n, Simd<float>::I) + 127) << 23;
  F power;
  __builtin_memcpy(&power, &bits, 64);
  return x < low ? F{} : p * power;
}
INLINE Vec<double> exp(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < 8; ++i) y[i] = __builtin_exp(x[i]);
  return y;
}

// tanh x to about one unit in the last place (Cephes' tanhf); the exponential's range is enough, for
// beyond ±9 the result is ±1.
INLINE F tanh(F x) {
  const F big = x < -9.f ? splat(-9.f) : x > 9.f ? splat(9.f) : x;
  const F far = 1.f - 2.f / (exp(big + big) + 1.f);
  const F z = x * x;
  F p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  p = p * z * x + x;
  return z < 0.390625f ? p : far;
}
INLINE Vec<double> tanh(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < 8; ++i) y[i] = __builtin_tanh(x[i]);
  return y;
}

// Below it a probability is 0; stands for −∞ where that meets a factor 0.
constexpr float kFloor = -1e4f;
constexpr int64_t W = Simd<float>::W;

// log x of normal positive numbers to about one unit in the last place (Cephes' logf); anything else gives
// a finite number.
INLINE F log(F x) {
  Simd<float>::I bits;
  __builtin_memcpy(&bits, &x, 64);
  F e = __builtin_convertvector((bits >> 23) - 126, F);
  bits = (bits & 0x7fffff) | 0x3f000000;
  F m;
  __builtin_memcpy(&m, &bits, 64);
  const auto low = m < 0.707106781186547524f;
  e = low ? e - 1.f : e;
  m = low ? m + m - 1.f : m - 1.f;
  const F z = m * m;
  F y = splat(7.0376836292e-2f);
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * z + e * -2.12194440e-4f - 0.5f * z;
  return (m + y) + e * 0.693359375f;
}

} // namespace
