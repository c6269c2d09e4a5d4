// What this crate itself runs on NVIDIA GPUs; all else there is libtorch's. NVRTC compiles it at first use, so it
// includes nothing. Rows of logits are f32, a block of threads a row; sums over sequences are made in f64.
typedef long long i64;
typedef unsigned u32;
typedef unsigned char u8;

#define INFINITE __int_as_float(0x7f800000)
#define EVERY 0xffffffffu

template <class T> __device__ T warp_sum(T x) {
  for (int k = 16; k > 0; k /= 2) x += __shfl_xor_sync(EVERY, x, k);
  return x;
}
__device__ float warp_max(float x) {
  for (int k = 16; k > 0; k /= 2) x = fmaxf(x, __shfl_xor_sync(EVERY, x, k));
  return x;
}
__device__ double warp_max(double x) {
  for (int k = 16; k > 0; k /= 2) x = fmax(x, __shfl_xor_sync(EVERY, x, k));
  return x;
}
// Of all threads of a block, given to all.
template <class T> __device__ T block_sum(T x) {
  __shared__ T parts[32];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  const u32 lane = threadIdx.x % 32;
  return warp_sum(lane < blockDim.x / 32 ? parts[lane] : T(0));
}
template <class T> __device__ T block_max(T x) { // of numbers that are not negative
  __shared__ T parts[32];
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  const u32 lane = threadIdx.x % 32;
  return warp_max(lane < blockDim.x / 32 ? parts[lane] : T(0));
}

// Four numbers at a time where rows allow it. body(i, values[], how many)
template <class F> __device__ void over_row(const float *row, i64 v, F &&body) {
  if (v % 4 == 0 && ((unsigned long long)row & 15) == 0) {
    const float4 *wide = (const float4 *)row;
    for (i64 i = threadIdx.x; i < v / 4; i += blockDim.x) {
      const float4 x = wide[i];
      const float list[4] = {x.x, x.y, x.z, x.w};
      body(4 * i, list, 4);
    }
  } else {
    for (i64 i = threadIdx.x; i < v; i += blockDim.x) body(i, row + i, 1);
  }
}

// Rounded to the nearest, ties to even; what is not finite stays so.
__device__ u32 bf16(float x) {
  const u32 bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40u;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
__device__ u32 f16(float x) {
  unsigned short y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
// A gradient's numbers, as f32 (kind 0), bf16 (1) or f16 (2).
__device__ void put(void *out, i64 at, const float *y, int n, int kind) {
  if (kind == 0) {
    float *to = (float *)out + at;
    if (n == 4) *(float4 *)to = make_float4(y[0], y[1], y[2], y[3]);
    else *to = y[0];
    return;
  }
  unsigned short *to = (unsigned short *)out + at;
  u32 bits[4];
  for (int k = 0; k < n; ++k) bits[k] = kind == 1 ? bf16(y[k]) : f16(y[k]);
  if (n == 4) *(uint2 *)to = make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
  else *to = (unsigned short)bits[0];
}

// The largest logit so far, Σ exp((z − top)/T), and Σ of that times its exponent.
struct RowSums {
  float top, total, dot;
  __device__ void add(float x, float inv_t) {
    if (x == -INFINITE) return;
    if (top == -INFINITE && x > top) {
      top = x, total += 1.f, dot = 0.f;
    } else if (x > top) {
      const float d = (top - x) * inv_t, by = expf(d);
      dot = by * (dot + total * d), total = total * by + 1.f, top = x;
    } else {
      const float d = (x - top) * inv_t, e = expf(d);
      total += e, dot += e * d;
    }
  }
  __device__ void join(RowSums b, float inv_t) {
    if (b.top > top) {
      const RowSums a = *this;
      *this = b, b = a;
    }
    if (b.top == -INFINITE) { // none, or what is no number
      total += b.total;
      return;
    }
    const float d = (b.top - top) * inv_t, by = expf(d);
    dot += by * (b.dot + b.total * d), total += by * b.total;
  }
  __device__ RowSums of_lane(int mask) const {
    return {__shfl_xor_sync(EVERY, top, mask), __shfl_xor_sync(EVERY, total, mask), __shfl_xor_sync(EVERY, dot, mask)};
  }
};

// stats [n,4]: the largest logit, log Σ, entropy, 1/Σ; logp [n] of ids, which may be null.
extern "C" __global__ void row_stats(const float *z, i64 v, const i64 *ids, float inv_t, float *stats, float *logp) {
  __shared__ RowSums parts[32];
  const float *row = z + blockIdx.x * v;
  RowSums s = {-INFINITE, 0.f, 0.f};
  over_row(row, v, [&](i64, const float *x, int n) {
    for (int k = 0; k < n; ++k) s.add(x[k], inv_t);
  });
  for (int k = 16; k > 0; k /= 2) s.join(s.of_lane(k), inv_t);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x) return;
  for (u32 w = 1; w < blockDim.x / 32; ++w) s.join(parts[w], inv_t);
  const float log_sum = logf(s.total);
  float *out = stats + 4 * (i64)blockIdx.x;
  out[0] = s.top, out[1] = log_sum, out[2] = log_sum - s.dot / s.total, out[3] = 1.f / s.total;
  if (ids) logp[blockIdx.x] = (row[ids[blockIdx.x]] - s.top) * inv_t - log_sum;
}

// As row_grad of rows.h; out may be z where it is f32.
extern "C" __global__ void row_slopes(const float *z, i64 v, const float *stats, float inv_t, float cap, const float *g,
                                      const float *ge, const float *gq, void *out, int kind) {
  const i64 i = blockIdx.x;
  const float *s = stats + 4 * i;
  const float top = s[0], scale = -inv_t * s[3], shift = s[2] - s[1];
  const float own = g ? g[i] : 0.f, entropy = ge ? ge[i] : 0.f, pull = gq ? gq[i] * inv_t * inv_t : 0.f;
  over_row(z + i * v, v, [&](i64 at, const float *x, int n) {
    float y[4];
    for (int k = 0; k < n; ++k) {
      const float d = (x[k] - top) * inv_t;
      float w = own;
      if (ge) w += entropy * (fmaxf(d, -1e4f) + shift);
      y[k] = g || ge ? scale * expf(d) * w : 0.f;
      if (gq) y[k] += pull * x[k];
      if (cap > 0) y[k] *= 1.f - (x[k] / cap) * (x[k] / cap);
    }
    put(out, i * v + at, y, n, kind);
  });
}

// Two rows of log-probabilities at one place; see loss_kernels.cpp.
struct Both {
  float s, t, log_s, log_t;
  __device__ Both(float zs, float zt, const float *a, const float *b, float inv_t) {
    const float ds = (zs - a[0]) * inv_t, dt = (zt - b[0]) * inv_t;
    s = expf(ds) * a[3], t = expf(dt) * b[3], log_s = ds - a[1], log_t = dt - b[1];
  }
  // log x − log(b·y + (1 − b)·x) where x is not 0.
  static __device__ float over_mixture(float x, float y, float b) { return -logf((1.f - b) + b * fminf(y / x, 1e30f)); }
  // kind: 0 forward, 1 reverse, 2 Jensen-Shannon
  __device__ float own(int kind, float beta) const {
    if (!(s > 0.f)) return 0.f;
    return kind == 1 ? log_s - log_t : over_mixture(s, t, beta);
  }
};
// Where all threads take one number from each of two rows. body(i, zs, zt)
template <class F> __device__ void over_rows(const float *s, const float *t, i64 v, F &&body) {
  for (i64 i = threadIdx.x; i < v; i += blockDim.x) body(i, s[i], t[i]);
}
extern "C" __global__ void divergence(const float *zs, const float *zt, i64 v, const float *ss, const float *st,
                                      float inv_t, int kind, float beta, float *value, float *mean) {
  const i64 row = blockIdx.x;
  const float *a = ss + 4 * row, *b = st + 4 * row;
  double first = 0, second = 0;
  over_rows(zs + row * v, zt + row * v, v, [&](i64, float s, float t) {
    const Both x(s, t, a, b, inv_t);
    if (kind != 0) second += x.s * x.own(kind, beta);
    if (x.t > 0.f && kind == 0) first += x.t * (x.log_t - x.log_s);
    if (x.t > 0.f && kind == 2) first += x.t * Both::over_mixture(x.t, x.s, 1.f - beta);
  });
  first = block_sum(first), second = block_sum(second);
  if (threadIdx.x) return;
  mean[row] = (float)second;
  value[row] = (float)(kind == 0 ? first : kind == 1 ? second : beta * first + (1.0 - beta) * second);
}
extern "C" __global__ void divergence_slopes(const float *zs, const float *zt, i64 v, const float *ss, const float *st,
                                             float inv_t, int kind, float beta, const float *mean, float cap,
                                             const float *g, void *out, int to) {
  const i64 row = blockIdx.x;
  const float *a = ss + 4 * row, *b = st + 4 * row;
  const float scale = g[row] * inv_t * (kind == 2 ? 1.f - beta : 1.f), m = mean[row];
  over_rows(zs + row * v, zt + row * v, v, [&](i64 i, float s, float t) {
    const Both x(s, t, a, b, inv_t);
    float y = scale * (kind == 0 ? x.s - x.t : x.s > 0.f ? x.s * (x.own(kind, beta) - m) : 0.f);
    if (cap > 0) y *= 1.f - (s / cap) * (s / cap);
    put(out, row * v + i, &y, 1, to);
  });
}

// Sequences: a block each. offsets [S + 1].
template <class T> __device__ void segment_sum(const T *x, const i64 *offsets, T *out) {
  double s = 0;
  for (i64 i = offsets[blockIdx.x] + threadIdx.x; i < offsets[blockIdx.x + 1]; i += blockDim.x) s += x[i];
  s = block_sum(s);
  if (threadIdx.x == 0) out[blockIdx.x] = (T)s;
}
template <class T> __device__ void segment_repeat(const T *x, const i64 *offsets, T *out) {
  const T y = x[blockIdx.x];
  for (i64 i = offsets[blockIdx.x] + threadIdx.x; i < offsets[blockIdx.x + 1]; i += blockDim.x) out[i] = y;
}
// As rlhf_statistics of ragged.cpp.
template <class T>
__device__ void segment_statistics(const T *x, const i64 *offsets, int op, double epsilon, double correction, T *values,
                                   T *deviations) {
  const i64 begin = offsets[blockIdx.x], n = offsets[blockIdx.x + 1] - begin;
  const double first = n > 0 ? (double)x[begin] : 0.0;
  double shift = 0, square = 0;
  for (i64 i = threadIdx.x; i < n; i += blockDim.x) shift += x[begin + i] - first;
  shift = block_sum(shift) / (n > 0 ? n : 1);
  for (i64 i = threadIdx.x; i < n; i += blockDim.x) {
    const double d = x[begin + i] - first - shift;
    square += d * d;
  }
  square = block_sum(square);
  const double divisor = n - correction, deviation = divisor > 0 ? sqrt(square / divisor) : 0.0;
  const double scale = op == 0   ? 1.0
                       : op == 2 ? (double)n / (n > 2 ? n - 1 : 1)
                       : deviation > 0 ? 1.0 / (deviation + epsilon)
                                       : 1.0;
  if (threadIdx.x == 0) deviations[blockIdx.x] = (T)deviation;
  for (i64 i = threadIdx.x; i < n; i += blockDim.x) values[begin + i] = (T)((x[begin + i] - first - shift) * scale);
}

// y of a lane = Σ over lanes before it of x · decay^distance, and what came before the warp.
struct Decay {
  double by[5], to_lane;
  __device__ explicit Decay(double decay) {
    by[0] = decay;
    for (int k = 1; k < 5; ++k) by[k] = by[k - 1] * by[k - 1];
    to_lane = pow(decay, (double)(threadIdx.x + 1));
  }
  __device__ double scan(double x, double before) const {
    for (int k = 0; k < 5; ++k) {
      const double other = __shfl_up_sync(EVERY, x, 1 << k);
      if (threadIdx.x >= (1 << k)) x += by[k] * other;
    }
    return x + before * to_lane;
  }
};
// A warp a sequence, 32 of its values at a time.
template <class T> __device__ void segment_scan(const T *x, const i64 *offsets, double decay, int reverse, T *out) {
  const i64 begin = offsets[blockIdx.x], end = offsets[blockIdx.x + 1];
  const Decay d(decay);
  double y = 0;
  for (i64 i = 0; i < end - begin; i += 32) {
    const i64 at = i + threadIdx.x, t = reverse ? end - 1 - at : begin + at;
    const bool in = at < end - begin;
    y = d.scan(in ? (double)x[t] : 0.0, y);
    if (in) out[t] = (T)y;
    y = __shfl_sync(EVERY, y, 31);
  }
}
template <class T>
__device__ void segment_gae(const T *r, const T *v, const i64 *offsets, double gamma, double lambda, T *a, T *g) {
  const i64 begin = offsets[blockIdx.x], end = offsets[blockIdx.x + 1];
  const Decay d(gamma * lambda);
  double y = 0;
  for (i64 last = end - 1; last >= begin; last -= 32) {
    const i64 t = last - threadIdx.x;
    const bool in = t >= begin;
    const double value = in ? (double)v[t] : 0.0;
    const double delta = in ? r[t] + gamma * (t + 1 < end ? (double)v[t + 1] : 0.0) - value : 0.0;
    y = d.scan(delta, y);
    if (in) a[t] = (T)y, g[t] = (T)(y + value);
    y = __shfl_sync(EVERY, y, 31);
  }
}

struct SurrogateSettings { // as in loss_kernels.h
  double low, high, dual, kl;
  i64 kl_value, kl_slope, kl_weighted;
};
__device__ float exponential(float x) { return expf(x); }
__device__ double exponential(double x) { return exp(x); }
__device__ float less_one(float x) { return expm1f(x); }
__device__ double less_one(double x) { return expm1(x); }
// As `surrogate` of loss_kernels.cpp; sums [S,7].
template <class T>
__device__ void segment_surrogate(const T *logp, const T *old, const T *advantage, const T *weight, const T *ref,
                                  const i64 *offsets, SurrogateSettings c, int by_completion, int sequence_mean, T *grad,
                                  double *sums) {
  const i64 begin = offsets[blockIdx.x], end = offsets[blockIdx.x + 1];
  const T scale = sequence_mean ? (T)(1.0 / (double)(end > begin ? end - begin : 1)) : T(1);
  const T low = (T)c.low, high = (T)c.high, dual = (T)c.dual;
  double s[7] = {0, 0, 0, 0, 0, 0, 0};
  for (i64 i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const T a = advantage[by_completion ? (i64)blockIdx.x : i], log_ratio = logp[i] - old[i], ratio = exponential(log_ratio);
    const T bounded = ratio > dual ? dual : ratio, held = ratio < low ? low : ratio > high ? high : ratio;
    const T plain = bounded * a, clipped = held * a;
    const T d_plain = ratio <= dual ? a : T(0), d_clipped = ratio < low || ratio > high ? T(0) : a;
    // As min() of two products, whose gradient is shared where they are equal.
    const T d = plain < clipped ? d_plain : clipped < plain ? d_clipped : (d_plain + d_clipped) * T(0.5);
    T l = -(plain < clipped ? plain : clipped), slope = -d * ratio;
    if (weight) l *= weight[i], slope *= weight[i];
    if (ref) {
      const T k1 = logp[i] - ref[i], rest = less_one(-k1) + k1;
      const T value = c.kl_value == 1 ? k1 : c.kl_value == 2 ? k1 * k1 * T(0.5) : rest;
      const T to = c.kl_slope == 1 ? T(1) : c.kl_slope == 2 ? k1 : k1 - rest;
      const T by = c.kl_weighted ? ratio * (T)c.kl : (T)c.kl;
      l += value * by;
      slope += (c.kl_weighted ? to + value : to) * by;
      s[6] += value;
    }
    grad[i] = slope * scale;
    s[0] += l * scale;
    s[1] += ratio < low && a < T(0);
    s[2] += ratio > high && a > T(0);
    s[3] += ratio;
    s[4] = s[4] > ratio ? s[4] : (double)ratio;
    s[5] += T(0.5) * log_ratio * log_ratio;
  }
  for (int k = 0; k < 7; ++k) {
    const double all = k == 4 ? block_max(s[k]) : block_sum(s[k]);
    if (threadIdx.x == 0) sums[7 * (i64)blockIdx.x + k] = all;
  }
}

#define EACH(T, NAME)                                                                                                  \
  extern "C" __global__ void sum_##NAME(const T *x, const i64 *o, T *out) { segment_sum(x, o, out); }                  \
  extern "C" __global__ void repeat_##NAME(const T *x, const i64 *o, T *out) { segment_repeat(x, o, out); }            \
  extern "C" __global__ void statistics_##NAME(const T *x, const i64 *o, int op, double e, double c, T *y, T *d) {     \
    segment_statistics(x, o, op, e, c, y, d);                                                                          \
  }                                                                                                                    \
  extern "C" __global__ void scan_##NAME(const T *x, const i64 *o, double decay, int reverse, T *out) {                \
    segment_scan(x, o, decay, reverse, out);                                                                           \
  }                                                                                                                    \
  extern "C" __global__ void gae_##NAME(const T *r, const T *v, const i64 *o, double gamma, double lambda, T *a, T *g) { \
    segment_gae(r, v, o, gamma, lambda, a, g);                                                                         \
  }                                                                                                                    \
  extern "C" __global__ void surrogate_##NAME(const T *lp, const T *old, const T *a, const T *w, const T *ref,         \
                                              const i64 *o, SurrogateSettings c, int by_completion, int sequence_mean, \
                                              T *g, double *sums) {                                                    \
    segment_surrogate(lp, old, a, w, ref, o, c, by_completion, sequence_mean, g, sums);                                \
  }
EACH(float, f32)
EACH(double, f64)

__device__ u32 hash(u32 x) { // as in hash.h
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}
// The place of a neighbour of x in the magnitudes `map`, of which the last, `top`, is 1: see loss_kernels.cpp.
__device__ int neighbour(const float *map, int top, float x, float chance) {
  int low = 0, high = top; // map[low] ≤ x
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (x >= map[middle]) low = middle;
    else high = middle - 1;
  }
  return low + (low < top && (x - map[low]) / (map[low + 1] - map[low]) > chance);
}
// As `adamw8` of loss_kernels.cpp, a thread a number; maps [512].
extern "C" __global__ void adamw8(float *p, const float *g, u8 *first, u8 *second, float *first_top, float *second_top,
                                  const float *maps, i64 n, u32 salt, float beta1, float beta2, float rest1, float rest2,
                                  float keep, float rate, float root, float eps) {
  __shared__ float map[512];
  for (int k = threadIdx.x; k < 512; k += 256) map[k] = maps[k];
  __syncthreads();
  const i64 i = blockIdx.x * 256ll + threadIdx.x;
  const bool in = i < n;
  float m = 0.f, v = 0.f;
  if (in) {
    const float slope = g[i];
    m = beta1 * map[first[i]] * first_top[blockIdx.x] + rest1 * slope;
    v = beta2 * map[256 + second[i]] * second_top[blockIdx.x] + rest2 * slope * slope;
    p[i] = keep * p[i] - rate * m / (sqrtf(v) * root + eps);
  }
  const float top_m = block_max(fabsf(m)), top_v = block_max(v);
  if (threadIdx.x == 0) first_top[blockIdx.x] = top_m, second_top[blockIdx.x] = top_v;
  if (!in) return;
  const u32 noise = hash((u32)i + salt);
  const float x = top_m > 0.f ? m / top_m : 0.f, y = top_v > 0.f ? v / top_v : 0.f;
  const int j = neighbour(map + 127, 128, fabsf(x), (float)(noise >> 16) * 0x1p-16f);
  const int k = neighbour(map + 256, 255, y, (float)(noise & 0xffffu) * 0x1p-16f);
  first[i] = (u8)(x < 0.f ? 127 - min(j, 127) : 127 + j);
  second[i] = (u8)max(k, y > 0.f ? 1 : 0);
}

// As rlhf_round_to_bf16 of round.cpp.
extern "C" __global__ void round_to_bf16(const float *x, unsigned short *y, i64 n, u32 salt) {
  const i64 i = blockIdx.x * 256ll + threadIdx.x;
  if (i >= n) return;
  const u32 bits = __float_as_uint(x[i]);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  y[i] = (unsigned short)(finite ? (bits + (hash((u32)i + salt) & 0xffffu)) >> 16 : bf16(x[i]));
}
