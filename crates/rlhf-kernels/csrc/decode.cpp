// What a decoding step does between its matrix products, each in one pass on the CPU in f32.
#include "cpu_kernels.h"
#include "row_kernels.h"
#include "shim.h"
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <vector>

// q [n,Hq,D], k and v [n,Hkv,D] of the new tokens; keys and values [rows ≥ n,Hkv,columns,D] with the same strides; cos
// and sin [n,1,D'] contiguous or null; starts[n]; prefixes[2n] keys and values [Hkv,L,D] of each sequence, contiguous or
// null. Unit stride in D. Result [n, Hq·D].
RLHF_API char *rlhf_decode_attention(at::Tensor **out, const at::Tensor *const *t, const int64_t *starts,
                                     const at::Tensor *const *prefixes, int64_t now, double scale, double cap,
                                     int64_t window) {
  return rlhf::guard([&] {
    const auto &q = *t[0], &k = *t[1], &v = *t[2], &keys = *t[3], &values = *t[4];
    const int64_t n = q.size(0);
    std::vector<const float *> before_keys(n), before_values(n);
    std::vector<int64_t> before(n);
    for (int64_t i = 0; i < n; ++i) {
      if (!prefixes[2 * i]) continue;
      before_keys[i] = prefixes[2 * i]->const_data_ptr<float>();
      before_values[i] = prefixes[2 * i + 1]->const_data_ptr<float>();
      before[i] = prefixes[2 * i]->size(1);
    }
    auto mixed = at::empty({n, q.size(1) * q.size(2)}, q.options());
    const rlhf::Decode d{q.const_data_ptr<float>(),
                         k.const_data_ptr<float>(),
                         v.const_data_ptr<float>(),
                         q.stride(0),
                         q.stride(1),
                         k.stride(0),
                         k.stride(1),
                         v.stride(0),
                         v.stride(1),
                         static_cast<float *>(keys.data_ptr()),
                         static_cast<float *>(values.data_ptr()),
                         keys.stride(0),
                         keys.stride(1),
                         keys.stride(2),
                         before_keys.data(),
                         before_values.data(),
                         before.data(),
                         t[5] ? t[5]->const_data_ptr<float>() : nullptr,
                         t[6] ? t[6]->const_data_ptr<float>() : nullptr,
                         t[5] ? t[5]->size(2) : 0,
                         starts,
                         n,
                         now,
                         q.size(1),
                         k.size(1),
                         q.size(2),
                         window,
                         scale,
                         cap,
                         mixed.mutable_data_ptr<float>()};
    const auto &kernels = rlhf::cpu_kernels();
    at::parallel_for(0, n * d.hkv, 2, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) kernels.decode(d, i / d.hkv, i % d.hkv);
    });
    *out = rlhf::give(std::move(mixed));
  });
}

// x [n,D] with unit stride in D, weight [D]. Result [n,D].
RLHF_API char *rlhf_rms_norm(at::Tensor **out, const at::Tensor *x, const at::Tensor *weight, double eps) {
  return rlhf::guard([&] {
    const int64_t n = x->size(0), d = x->size(1), row = x->stride(0);
    auto y = at::empty({n, d}, x->options());
    const float *from = x->const_data_ptr<float>(), *w = weight->const_data_ptr<float>();
    float *to = y.mutable_data_ptr<float>();
    const auto norm = rlhf::row_kernels().layer_f32.norm;
    at::parallel_for(0, n, std::max<int64_t>(1, 65536 / d), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        norm(from + i * row, nullptr, w, d, static_cast<float>(eps), nullptr, to + i * d);
    });
    *out = rlhf::give(std::move(y));
  });
}

// both [n,2·D] with unit stride: gate, then up. Result [n,D].
RLHF_API char *rlhf_silu_gate(at::Tensor **out, const at::Tensor *both) {
  return rlhf::guard([&] {
    const int64_t n = both->size(0), d = both->size(1) / 2, row = both->stride(0);
    auto y = at::empty({n, d}, both->options());
    const float *from = both->const_data_ptr<float>();
    float *to = y.mutable_data_ptr<float>();
    const auto silu = rlhf::row_kernels().layer_f32.silu;
    at::parallel_for(0, n, std::max<int64_t>(1, 16384 / d), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) silu(from + i * row, from + i * row + d, d, to + i * d);
    });
    *out = rlhf::give(std::move(y));
  });
}

// scores [n,V] with unit stride in V, uniforms[n]. Into ids[n], logprobs[n], sums[n].
RLHF_API char *rlhf_draw(const at::Tensor *scores, const double *uniforms, int64_t *ids, float *logprobs, float *sums) {
  return rlhf::guard([&] {
    const int64_t n = scores->size(0), v = scores->size(1), row = scores->stride(0);
    const float *from = scores->const_data_ptr<float>();
    const auto &kernels = rlhf::cpu_kernels();
    at::parallel_for(0, n, std::max<int64_t>(1, 8192 / v), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const rlhf::Drawn drawn = kernels.draw(from + i * row, v, uniforms[i]);
        ids[i] = drawn.id;
        logprobs[i] = drawn.logprob;
        sums[i] = drawn.sum;
      }
    });
  });
}
