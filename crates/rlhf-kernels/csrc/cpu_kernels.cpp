// Compiled once per instruction set with RLHF_ISA naming it. Everything is in an unnamed namespace: no
// inline function may leak from one instruction set into another's code.
#include "cpu_kernels.h"
#include "simd.h"
#include <cstdlib>
#include <cstring>

namespace {

// C (+)= A·B with vectors of L numbers along B's rows. A(i,k) lies at a[i·row + k·col].
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTileVecs = 2;
#else
constexpr int kTileRows = 4, kTileVecs = 1;
#endif
template <class T, int L> struct Lanes {
  typedef T V __attribute__((vector_size(sizeof(T) * L)));
};

template <class T, int L, int R, int C>
INLINE void tile(int64_t k, const T *a, int64_t row, int64_t col, const T *b, int64_t ldb, T *c, int64_t ldc,
                 bool add) {
  using V = typename Lanes<T, L>::V;
  V acc[R][C];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < C; ++j) {
      acc[i][j] = V{};
      if (add) __builtin_memcpy(&acc[i][j], c + i * ldc + j * L, sizeof(V));
    }
  for (int64_t p = 0; p < k; ++p) {
    V y[C];
#pragma GCC unroll 2
    for (int j = 0; j < C; ++j) __builtin_memcpy(&y[j], b + p * ldb + j * L, sizeof(V));
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const T x = a[i * row + p * col];
#pragma GCC unroll 2
      for (int j = 0; j < C; ++j) acc[i][j] += x * y[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < C; ++j) __builtin_memcpy(c + i * ldc + j * L, &acc[i][j], sizeof(V));
}
template <class T, int L, int C>
void tiles(int64_t m, int64_t k, const T *a, int64_t row, int64_t col, const T *b, int64_t ldb, T *c, int64_t ldc,
           bool add) {
  int64_t i = 0;
  for (; i + kTileRows <= m; i += kTileRows)
    tile<T, L, kTileRows, C>(k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, add);
  if (kTileRows > 4 && i + 4 <= m) {
    tile<T, L, 4, C>(k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, add);
    i += 4;
  }
  switch (m - i) {
  case 3: tile<T, L, 3, C>(k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, add); break;
  case 2: tile<T, L, 2, C>(k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, add); break;
  case 1: tile<T, L, 1, C>(k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, add); break;
  default: break;
  }
}
template <class T>
void gemm(int64_t m, int64_t n, int64_t k, const T *a, int64_t row, int64_t col, const T *b, int64_t ldb, T *c,
          int64_t ldc, bool add) {
  constexpr int w = Simd<T>::W;
  int64_t j = 0;
  for (; j + kTileVecs * w <= n; j += kTileVecs * w)
    tiles<T, w, kTileVecs>(m, k, a, row, col, b + j, ldb, c + j, ldc, add);
  for (; j + w <= n; j += w) tiles<T, w, 1>(m, k, a, row, col, b + j, ldb, c + j, ldc, add);
  // Heads whose size is no multiple of the vector.
  if (j + w / 2 <= n) {
    tiles<T, w / 2, 1>(m, k, a, row, col, b + j, ldb, c + j, ldc, add);
    j += w / 2;
  }
  for (; j < n; ++j)
    for (int64_t i = 0; i < m; ++i) {
      T s = add ? c[i * ldc + j] : T(0);
      for (int64_t p = 0; p < k; ++p) s += a[i * row + p * col] * b[p * ldb + j];
      c[i * ldc + j] = s;
    }
}

INLINE F widen(const float *p) { return load(p); }
// bf16 is the upper half of f32.
INLINE F widen(const uint16_t *p) {
  typedef uint16_t H __attribute__((vector_size(32)));
  typedef uint32_t U __attribute__((vector_size(64)));
  H half;
  __builtin_memcpy(&half, p, 32);
  const U bits = __builtin_convertvector(half, U) << 16;
  F wide;
  __builtin_memcpy(&wide, &bits, 64);
  return wide;
}
// One tile of rows; meanwhile AHEAD lines of 64 bytes for each step of k are fetched from `ahead` on.
template <class E, int R, int AHEAD>
void panel_tile(const float *x, int64_t row, int64_t k, const E *panel, float *out, int64_t ldo, const char *ahead) {
  F acc[R][kTileVecs];
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kTileVecs; ++j) acc[i][j] = F{};
  for (int64_t p = 0; p < k; ++p) {
#pragma GCC unroll 2
    for (int l = 0; l < AHEAD; ++l) __builtin_prefetch(ahead + (p * AHEAD + l) * 64, 0, 2);
    F y[kTileVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kTileVecs; ++j) y[j] = widen(panel + p * rlhf::kPanel + j * W);
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      const F b = splat(x[i * row + p]);
#pragma GCC unroll 2
      for (int j = 0; j < kTileVecs; ++j) acc[i][j] += b * y[j];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kTileVecs; ++j) store(out + i * ldo + j * W, acc[i][j]);
}
template <class E, int AHEAD>
int64_t panel_rows(const float *x, int64_t rows, int64_t row, int64_t k, const E *w, float *out, int64_t ldo,
                   const char *ahead) {
  if (kTileRows == 8 && rows >= 12) return panel_tile<E, 12, AHEAD>(x, row, k, w, out, ldo, ahead), 12;
  if (rows >= kTileRows) return panel_tile<E, kTileRows, AHEAD>(x, row, k, w, out, ldo, ahead), kTileRows;
  if (rows >= 4) return panel_tile<E, 4, AHEAD>(x, row, k, w, out, ldo, ahead), 4;
  return panel_tile<E, 1, AHEAD>(x, row, k, w, out, ldo, ahead), 1;
}
// The first pass over a panel waits for memory and the others compute, so the next panel is fetched while this one is
// multiplied: by the first tile of rows alone, or half by each of the first two.
template <class E>
void panel(const float *x, int64_t rows, int64_t row, int64_t k, const E *w, const E *next, float *out, int64_t ldo) {
  constexpr int lines = rlhf::kPanel * sizeof(E) / 64;
  const bool halves = lines == 2 && rows > (kTileRows == 8 ? 12 : kTileRows);
  int64_t fetched = next ? 0 : lines;
  for (int64_t j = 0; j < rlhf::kPanel; j += kTileVecs * W)
    for (int64_t i = 0; i < rows;) {
      const float *from = x + i * row;
      float *to = out + i * ldo + j;
      const char *ahead = (const char *)next + fetched * k * 64;
      if (fetched == lines) i += panel_rows<E, 0>(from, rows - i, row, k, w + j, to, ldo, nullptr);
      else if (halves) i += panel_rows<E, 1>(from, rows - i, row, k, w + j, to, ldo, ahead), ++fetched;
      else i += panel_rows<E, lines>(from, rows - i, row, k, w + j, to, ldo, ahead), fetched = lines;
    }
}

// Scratch that grows and is kept by its thread.
template <class T> T *scratch(int slot, int64_t n) {
  struct Kept {
    T *p[4] = {};
    int64_t size[4] = {};
    ~Kept() {
      for (T *x : p) std::free(x);
    }
  };
  static thread_local Kept kept;
  if (kept.size[slot] < n) {
    std::free(kept.p[slot]);
    void *p = nullptr;
    if (posix_memalign(&p, 64, (size_t)n * sizeof(T)) != 0) p = nullptr;
    kept.p[slot] = (T *)p;
    kept.size[slot] = p ? n : 0;
    if (!p) __builtin_trap(); // a scratch of some hundred kilobytes
  }
  return kept.p[slot];
}

template <class T> int64_t padded(int64_t n) { return (n + Simd<T>::W - 1) / Simd<T>::W * Simd<T>::W; }

// Rows [from, from+n) of one head, transposed: [D][ld], zeros behind.
template <class T> void transpose(const T *x, int64_t stride, int64_t n, int64_t d, T *out, int64_t ld) {
  const int64_t end = padded<T>(n);
  for (int64_t j = 0; j < d; ++j) {
    T *o = out + j * ld;
    for (int64_t i = 0; i < n; ++i) o[i] = x[i * stride + j];
    for (int64_t i = n; i < end; ++i) o[i] = T(0);
  }
}

constexpr int64_t kRows = 48; // queries at once

// A block of queries: rows [r0, r0+n) see the prompt's rows [p0, p0+lp) and their own from s0 on. Its
// scores are [n][ld]: the prompt's, padded to `lpp` columns, then its own, padded. With a window, keys
// that no query of the block sees are left out: the first `skip` of the prompt and `own_skip` of its own.
struct Block {
  int64_t p0, lp, lpp, s0, r0, n, own, ld; // own: own keys that the last query sees
  int64_t skip, own_skip, low, own_low;    // low: columns hidden from the block's first query
};

// Calls `body(block)` for all blocks of one sequence, and `own(start, length)` before them.
template <class T, class Own, class Body>
void blocks(int64_t window, int64_t p0, int64_t lp, int64_t start, int64_t end, Own own, Body body) {
  if (start >= end) return;
  own(start, end - start);
  for (int64_t r = start; r < end; r += kRows) {
    const int64_t n = end - r < kRows ? end - r : kRows, keys = r + n - start;
    // The first position that the first query sees, and whole vectors before it.
    const int64_t first = window > 0 && lp + r - start >= window ? lp + r - start - window + 1 : 0;
    const int64_t skip = first >= lp ? lp : first / Simd<T>::W * Simd<T>::W;
    const int64_t own_skip = first > lp ? (first - lp) / Simd<T>::W * Simd<T>::W : 0;
    const int64_t lpp = padded<T>(lp - skip), mine = padded<T>(keys - own_skip);
    body(Block{p0 + skip, lp - skip, lpp, start + own_skip, r, n, keys - own_skip, lpp + mine, skip, own_skip,
               lp + r - start - window + 1 - skip, r - start - window + 1 - own_skip});
  }
}
// The prompt over itself, then each completion over prompt and itself.
template <class T, class Own, class Body> void walk(int64_t window, const rlhf::Group &g, Own own, Body body) {
  const int64_t lp = g.prompt_end - g.prompt_start;
  blocks<T>(window, g.prompt_start, 0, g.prompt_start, g.prompt_end, own, body);
  for (int64_t c = 0; c < g.count; ++c)
    blocks<T>(window, g.prompt_start, lp, g.completions[2 * c], g.completions[2 * c + 1], own, body);
}
int64_t longest(const rlhf::Group &g) {
  int64_t n = g.prompt_end - g.prompt_start;
  for (int64_t c = 0; c < g.count; ++c) {
    const int64_t l = g.completions[2 * c + 1] - g.completions[2 * c];
    n = l > n ? l : n;
  }
  return n;
}

// Scores as the cap squashes them, still to be multiplied by the scale; then −∞ where row i of the block
// must not look.
template <class T> INLINE void finish(T *s, const rlhf::Attention<T> &a, const Block &b, int64_t i) {
  if (a.cap > 0) {
    const T in = (T)(a.scale / a.cap), out = (T)(a.cap / a.scale);
    for (int64_t j = 0; j < b.ld; j += Simd<T>::W) store(s + j, tanh(load(s + j) * in) * out);
  }
  const T inf = (T)__builtin_inf();
  if (a.window > 0) {
    for (int64_t j = 0; j < b.low + i && j < b.lp; ++j) s[j] = -inf;
    for (int64_t j = 0; j < b.own_low + i; ++j) s[b.lpp + j] = -inf;
  }
  for (int64_t j = b.lp; j < b.lpp; ++j) s[j] = -inf;
  for (int64_t j = b.lpp + (b.r0 + i - b.s0) + 1; j < b.ld; ++j) s[j] = -inf;
}

template <class T> void attend(const rlhf::Attention<T> &a, const rlhf::Group &g, int64_t head) {
  constexpr int64_t w = Simd<T>::W;
  const int64_t d = a.d, rep = a.hq / a.hkv, out_row = a.hq * d;
  const int64_t lp = g.prompt_end - g.prompt_start, lpp = padded<T>(lp), most = padded<T>(longest(g));
  T *prefix = scratch<T>(0, d * lpp + 1), *own = scratch<T>(1, d * most + 1);
  T *scores = scratch<T>(2, kRows * (lpp + most));
  const T *k = a.k + head * a.k_head, *v = a.v + head * a.v_head;
  const T scale = (T)a.scale;
  transpose(k + g.prompt_start * a.k_row, a.k_row, lp, d, prefix, lpp);
  walk<T>(
      a.window, g, [&](int64_t start, int64_t n) { transpose(k + start * a.k_row, a.k_row, n, d, own, most); },
      [&](const Block &b) {
        for (int64_t h = head * rep; h < (head + 1) * rep; ++h) {
          const T *q = a.q + b.r0 * a.q_row + h * a.q_head;
          T *out = a.out + b.r0 * out_row + h * d;
          if (b.lp > 0) gemm(b.n, b.lpp, d, q, a.q_row, (int64_t)1, prefix + b.skip, lpp, scores, b.ld, false);
          gemm(b.n, b.ld - b.lpp, d, q, a.q_row, (int64_t)1, own + b.own_skip, most, scores + b.lpp, b.ld, false);
          T inverse[kRows];
          for (int64_t i = 0; i < b.n; ++i) {
            T *s = scores + i * b.ld;
            finish(s, a, b, i);
            Vec<T> top = load(s);
            for (int64_t j = w; j < b.ld; j += w) top = larger<T>(load(s + j), top);
            const T m = max<T>(top);
            Vec<T> total{};
            for (int64_t j = 0; j < b.ld; j += w) {
              const Vec<T> p = exp((load(s + j) - m) * scale);
              store(s + j, p);
              total += p;
            }
            const T t = sum<T>(total);
            inverse[i] = T(1) / t;
            T *norm = a.norms + 2 * ((b.r0 + i) * a.hq + h);
            norm[0] = m;
            norm[1] = inverse[i];
          }
          if (b.lp > 0) gemm(b.n, d, b.lp, scores, b.ld, (int64_t)1, v + b.p0 * a.v_row, a.v_row, out, out_row, false);
          gemm(b.n, d, b.own, scores + b.lpp, b.ld, (int64_t)1, v + b.s0 * a.v_row, a.v_row, out, out_row, b.lp > 0);
          for (int64_t i = 0; i < b.n; ++i)
            for (int64_t j = 0; j < d; ++j) out[i * out_row + j] *= inverse[i];
        }
      });
}

template <class T> void attend_grad(const rlhf::Attention<T> &a, const rlhf::Group &g, int64_t head) {
  constexpr int64_t w = Simd<T>::W;
  const int64_t d = a.d, rep = a.hq / a.hkv, out_row = a.hq * d, key_row = a.hkv * d;
  const int64_t lp = g.prompt_end - g.prompt_start, lpp = padded<T>(lp), most = padded<T>(longest(g));
  T *prefix = scratch<T>(0, 2 * d * lpp + 1), *own = scratch<T>(1, 2 * d * most + 1);
  T *prefix_v = prefix + d * lpp, *own_v = own + d * most;
  T *probs = scratch<T>(2, kRows * (lpp + most)), *grads = scratch<T>(3, kRows * (lpp + most));
  const T *k = a.k + head * a.k_head, *v = a.v + head * a.v_head;
  T *gk = a.gk + head * d, *gv = a.gv + head * d;
  const T scale = (T)a.scale;
  transpose(k + g.prompt_start * a.k_row, a.k_row, lp, d, prefix, lpp);
  transpose(v + g.prompt_start * a.v_row, a.v_row, lp, d, prefix_v, lpp);
  walk<T>(
      a.window, g,
      [&](int64_t start, int64_t n) {
        transpose(k + start * a.k_row, a.k_row, n, d, own, most);
        transpose(v + start * a.v_row, a.v_row, n, d, own_v, most);
      },
      [&](const Block &b) {
        for (int64_t h = head * rep; h < (head + 1) * rep; ++h) {
          const T *q = a.q + b.r0 * a.q_row + h * a.q_head;
          const T *out = a.out + b.r0 * out_row + h * d, *go = a.grad + b.r0 * out_row + h * d;
          T *gq = a.gq + b.r0 * out_row + h * d;
          const int64_t mine = b.ld - b.lpp;
          if (b.lp > 0) {
            gemm(b.n, b.lpp, d, q, a.q_row, (int64_t)1, prefix + b.skip, lpp, probs, b.ld, false);
            gemm(b.n, b.lpp, d, go, out_row, (int64_t)1, prefix_v + b.skip, lpp, grads, b.ld, false);
          }
          gemm(b.n, mine, d, q, a.q_row, (int64_t)1, own + b.own_skip, most, probs + b.lpp, b.ld, false);
          gemm(b.n, mine, d, go, out_row, (int64_t)1, own_v + b.own_skip, most, grads + b.lpp, b.ld, false);
          for (int64_t i = 0; i < b.n; ++i) {
            T *p = probs + i * b.ld, *x = grads + i * b.ld, delta = 0;
            finish(p, a, b, i);
            for (int64_t j = 0; j < d; ++j) delta += go[i * out_row + j] * out[i * out_row + j];
            const T *norm = a.norms + 2 * ((b.r0 + i) * a.hq + h);
            const T m = norm[0], inverse = norm[1];
            // Through the cap the slope is 1 − tanh². A hidden score is −∞: its probability 0 must not
            // meet an infinite slope.
            const T squash = a.cap > 0 ? (T)(a.scale / a.cap) : T(0);
            for (int64_t j = 0; j < b.ld; j += w) {
              const Vec<T> z = load(p + j), e = exp((z - m) * scale) * inverse;
              Vec<T> g = e * (load(x + j) - delta) * scale;
              if (a.cap > 0) {
                const Vec<T> t = floored<T>(z * squash, splat<T>(-1));
                g *= T(1) - t * t;
              }
              store(p + j, e);
              store(x + j, g);
            }
          }
          if (b.lp > 0) {
            gemm(b.n, d, b.lp, grads, b.ld, (int64_t)1, k + b.p0 * a.k_row, a.k_row, gq, out_row, false);
            gemm(b.lp, d, b.n, grads, (int64_t)1, b.ld, q, a.q_row, gk + b.p0 * key_row, key_row, true);
            gemm(b.lp, d, b.n, probs, (int64_t)1, b.ld, go, out_row, gv + b.p0 * key_row, key_row, true);
          }
          gemm(b.n, d, b.own, grads + b.lpp, b.ld, (int64_t)1, k + b.s0 * a.k_row, a.k_row, gq, out_row, b.lp > 0);
          gemm(b.own, d, b.n, grads + b.lpp, (int64_t)1, b.ld, q, a.q_row, gk + b.s0 * key_row, key_row, true);
          gemm(b.own, d, b.n, probs + b.lpp, (int64_t)1, b.ld, go, out_row, gv + b.s0 * key_row, key_row, true);
        }
      });
}

// The sum of a vector's numbers, in halves.
INLINE float folded(F v) {
  typedef float H __attribute__((vector_size(32)));
  typedef float Q __attribute__((vector_size(16)));
  H h[2];
  __builtin_memcpy(h, &v, 64);
  const H a = h[0] + h[1];
  Q q[2];
  __builtin_memcpy(q, &a, 32);
  const Q b = q[0] + q[1];
  return (b[0] + b[2]) + (b[1] + b[3]);
}
INLINE F some(const float *p, int64_t n) { return n >= W ? load(p) : load(p, n, 0.f); }
INLINE void put(float *p, F v, int64_t n) {
  if (n >= W) store(p, v);
  else store(p, v, n);
}
INLINE float dot(const float *a, const float *b, int64_t n) {
  F s{};
  for (int64_t i = 0; i < n; i += W) s += some(a + i, n - i) * some(b + i, n - i);
  return folded(s);
}

// The first `turning` numbers turn in halves, the rest stays.
void rotate(const float *x, const rlhf::Decode &a, int64_t sequence, float factor, float *out) {
  const int64_t turning = a.cos ? a.turning : 0, half = turning / 2;
  const float *cos = a.cos + sequence * turning, *sin = a.sin + sequence * turning;
  for (int64_t i = 0; i < half; ++i) {
    const float low = x[i], high = x[half + i];
    out[i] = (low * cos[i] + high * sin[i]) * factor;
    out[half + i] = (high * cos[half + i] + low * sin[half + i]) * factor;
  }
  for (int64_t i = turning; i < a.d; ++i) out[i] = x[i] * factor;
}

// out[c] = q · keys[c] over n columns; d is VECS vectors, or any number where VECS is 0. `each(c)` comes before.
template <int VECS, class Each>
INLINE void scores(const float *q, const float *keys, int64_t column, int64_t n, int64_t d, float *out, Each each) {
  F x[VECS + 1];
#pragma GCC unroll 8
  for (int j = 0; j < VECS; ++j) x[j] = load(q + j * W);
  for (int64_t c = 0; c < n; ++c) {
    each(c);
    const float *k = keys + c * column;
    if (VECS == 0) {
      out[c] = dot(q, k, d);
      continue;
    }
    F s[2] = {};
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j) s[j % 2] += x[j] * load(k + j * W);
    out[c] = folded(s[0] + s[1]);
  }
}

// out[d] = Σ weights[c] · values[c][d] over n columns, added to what it is where there is `more`; for d up to VECS
// vectors, all of them whole or not.
template <int VECS, bool WHOLE>
INLINE void mix(const float *values, int64_t column, const float *weights, int64_t n, int64_t d, bool more, float *out) {
  F acc[VECS];
#pragma GCC unroll 4
  for (int j = 0; j < VECS; ++j) acc[j] = more ? some(out + j * W, d - j * W) : F{};
  for (int64_t c = 0; c < n; ++c) {
    const F w = splat(weights[c]);
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) {
      const float *v = values + c * column + j * W;
      acc[j] += w * (WHOLE ? load(v) : some(v, d - j * W));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < VECS; ++j) put(out + j * W, acc[j], d - j * W);
}

// q · keys of n columns.
template <class Each>
INLINE void scores_of(const float *q, const float *keys, int64_t column, int64_t n, int64_t d, float *out, Each each) {
  switch (d % W == 0 ? d / W : 0) {
  case 4: scores<4>(q, keys, column, n, d, out, each); break;
  case 8: scores<8>(q, keys, column, n, d, out, each); break;
  default: scores<0>(q, keys, column, n, d, out, each);
  }
}

INLINE void mix_of(const float *values, int64_t column, const float *weights, int64_t n, int64_t d, bool more,
                   float *out) {
  int64_t j = 0;
  for (; j + 4 * W <= d; j += 4 * W) mix<4, true>(values + j, column, weights, n, d - j, more, out + j);
  for (; j < d; j += W) mix<1, false>(values + j, column, weights, n, d - j, more, out + j);
}

void decode(const rlhf::Decode &a, int64_t sequence, int64_t head) {
  const int64_t d = a.d, each = a.hq / a.hkv, at = sequence * a.cache_row + head * a.cache_head;
  const float *k = a.k + sequence * a.k_row + head * a.k_head, *v = a.v + sequence * a.v_row + head * a.v_head;
  rotate(k, a, sequence, 1.f, a.keys + at + a.now * a.cache_column);
  __builtin_memcpy(a.values + at + a.now * a.cache_column, v, d * sizeof(float));
  // The columns before, then its own; what the window has left behind is at the front.
  const int64_t length = a.before[sequence], all = length + a.now + 1 - a.starts[sequence];
  const int64_t passed = a.window > 0 && all > a.window ? all - a.window : 0;
  const int64_t skipped = passed < length ? passed : length, from = a.starts[sequence] + passed - skipped;
  const int64_t old = length - skipped, own = a.now + 1 - from, n = old + own;
  const int64_t there = old > 0 ? (head * length + skipped) * d : 0;
  const float *old_keys = a.before_keys[sequence] + there, *old_values = a.before_values[sequence] + there;
  const float *keys = a.keys + at + from * a.cache_column, *values = a.values + at + from * a.cache_column;
  float *weights = scratch<float>(0, n + W), *q = scratch<float>(1, d + W);
  const float cap = (float)a.cap;
  // What this thread reads next is fetched while it computes.
  const int64_t after = head + 1 < a.hkv ? at + a.cache_head : at + a.cache_row - head * a.cache_head;
  const bool last = sequence + 1 == a.n && head + 1 == a.hkv, more_heads = head + 1 < a.hkv;
  const auto fetch = [&](bool wanted, const float *next) {
    for (int64_t j = 0; wanted && j < d; j += 16) __builtin_prefetch(next + j, 0, 2);
  };
  for (int64_t g = 0; g < each; ++g) {
    const int64_t query = head * each + g;
    float *out = a.out + (sequence * a.hq + query) * d;
    rotate(a.q + sequence * a.q_row + query * a.q_head, a, sequence, (float)(cap > 0 ? a.scale / a.cap : a.scale), q);
    scores_of(q, old_keys, d, old, d, weights, [&](int64_t c) {
      fetch(more_heads && g == 0, old_keys + (length + c) * d), fetch(more_heads && g == 0, old_values + (length + c) * d);
    });
    scores_of(q, keys, a.cache_column, own, d, weights + old, [&](int64_t c) {
      const int64_t next = after + (from + c) * a.cache_column;
      fetch(!last && g == 0, a.keys + next), fetch(!last && g == 0, a.values + next);
    });
    const float inf = __builtin_inff();
    F top = splat(-inf);
    for (int64_t c = 0; c < n; c += W) {
      F s = n - c >= W ? load(weights + c) : load(weights + c, n - c, -inf);
      if (cap > 0) s = tanh(s) * cap;
      top = larger<float>(s, top);
      store(weights + c, s);
    }
    const float m = max<float>(top);
    F total{};
    for (int64_t c = 0; c < n; c += W) {
      const F p = exp(n - c >= W ? load(weights + c) - m : load(weights + c, n - c, -inf) - m);
      total += p;
      store(weights + c, p);
    }
    const float share = 1.f / folded(total);
    for (int64_t c = 0; c < n; ++c) weights[c] *= share;
    if (old > 0) mix_of(old_values, d, weights, old, d, false, out);
    mix_of(values, a.cache_column, weights + old, own, d, old > 0, out);
  }
}

// Probabilities are summed by blocks of ids first; those of one block are computed again for the exact place.
constexpr int64_t kDrawBlock = 16 * W;
rlhf::Drawn draw(const float *z, int64_t v, double uniform) {
  const float inf = __builtin_inff();
  F top = splat(-inf), sums{};
  for (int64_t i = 0; i < v; i += W) {
    const bool whole = v - i >= W;
    top = larger<float>(whole ? load(z + i) : load(z + i, v - i, -inf), top);
    sums += whole ? load(z + i) : load(z + i, v - i, 0.f);
  }
  const float m = max<float>(top);
  const auto p = [&](int64_t i) { return exp((v - i >= W ? load(z + i) : load(z + i, v - i, -inf)) - m); };
  const int64_t blocks = (v + kDrawBlock - 1) / kDrawBlock;
  double *upto = scratch<double>(0, blocks), total = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t end = (b + 1) * kDrawBlock < v ? (b + 1) * kDrawBlock : v;
    F s{};
    for (int64_t i = b * kDrawBlock; i < end; i += W) s += p(i);
    upto[b] = total += folded(s);
  }
  // Rounding may put a drawn point on the total; so far below it the point certainly lies inside. A NaN falls out of
  // every comparison: the last id, and it shows in the log-probability.
  const double inside = 1 - 1e-12, point = (uniform < inside ? uniform : inside) * total;
  int64_t b = 0;
  while (b + 1 < blocks && !(upto[b] > point)) ++b;
  const double before = b > 0 ? upto[b - 1] : 0;
  double part = (point - before) / (upto[b] - before);
  part = part < 0 ? 0 : part > inside ? inside : part;
  const int64_t first = b * kDrawBlock, n = v - first < kDrawBlock ? v - first : kDrawBlock;
  float each[kDrawBlock];
  double mass = 0, sum = 0;
  for (int64_t i = 0; i < n; i += W) store(each + i, p(first + i));
  for (int64_t i = 0; i < n; ++i) mass += each[i];
  int64_t i = 0;
  for (; i + 1 < n; ++i)
    if ((sum += each[i]) > part * mass) break;
  const int64_t id = first + i;
  return {id, (float)((double)z[id] - m - __builtin_log(total)), folded(sums)};
}

} // namespace

namespace rlhf {
extern const CpuKernels RLHF_ISA;
const CpuKernels RLHF_ISA = {attend<float>, attend<double>, attend_grad<float>, attend_grad<double>,
                             panel<float>, panel<uint16_t>, decode, draw};
} // namespace rlhf
