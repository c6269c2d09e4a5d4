// Shared-prefix attention out of variable-length attention, for devices with a flash kernel: every prompt and every
// completion sees its own past, all completions of a group see their prompt, and the two results are merged by their
// log-sum-exps (as in Juravsky et al. 2024, "Hydragen", arXiv 2402.05099). No mask is made and no prompt is copied for a
// completion. Backward gives each part the merged result and log-sum-exp: a flash kernel's gradients are then this part's
// share of the whole (as in Liu et al. 2023, "Ring Attention", arXiv 2310.01889).
#include "shim.h"
#include <ATen/TensorOperators.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <tuple>
#include <torch/csrc/autograd/custom_function.h>

namespace {
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Ints = std::vector<int64_t>;

// Queries and keys of sequences laid end to end.
struct Sequences {
  Ints q{0}, k{0}; // where each begins, and the end
  int64_t longest_q = 0, longest_k = 0;
  void push(int64_t n, int64_t m) {
    q.push_back(q.back() + n), k.push_back(k.back() + m);
    longest_q = std::max(longest_q, n), longest_k = std::max(longest_k, m);
  }
};
Tensor upload(const Ints &list, const at::TensorOptions &options) {
  return at::tensor(list, at::TensorOptions().dtype(at::kLong)).to(options.device()).to(options.dtype());
}

// What a layout asks of variable-length attention; see attention.cpp for `flat`.
struct Plan {
  Sequences own, seen;
  Ints rows, keys; // of `seen`
  explicit Plan(const Ints &flat) {
    for (size_t i = 0; i + 2 < flat.size(); i += 3 + 2 * flat[i + 2]) {
      const int64_t begin = flat[i], end = flat[i + 1], n = flat[i + 2];
      if (end > begin) own.push(end - begin, end - begin);
      int64_t last = end;
      for (int64_t c = 0; c < n; ++c) {
        const int64_t length = flat[i + 4 + 2 * c] - flat[i + 3 + 2 * c];
        if (length > 0) own.push(length, length);
        last = flat[i + 4 + 2 * c];
      }
      if (end == begin || last == end) continue;
      seen.push(last - end, end - begin);
      for (int64_t r = end; r < last; ++r) rows.push_back(r);
      for (int64_t r = begin; r < end; ++r) keys.push_back(r);
    }
  }
};

// ATen's flash kernel; its log-sum-exps are [heads, rows].
struct Flash {
  static variable_list forward(const Tensor &q, const Tensor &k, const Tensor &v, const Sequences &s, bool causal, double scale) {
    const auto i32 = q.options().dtype(at::kInt);
    auto [out, lse, seed, unused, mask] = at::_flash_attention_forward(
        q, k, v, upload(s.q, i32), upload(s.k, i32), s.longest_q, s.longest_k, 0.0, causal, false, scale);
    TORCH_CHECK(lse.dim() == 2, "the flash kernel gave log-sum-exps of ", lse.dim(), " dimensions, expected [heads, rows]");
    return {out, lse, seed, unused};
  }
  static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor &go, const Tensor &q, const Tensor &k, const Tensor &v,
                                                     const Tensor &out, const Tensor &lse, const Tensor &seed,
                                                     const Tensor &unused, const Sequences &s, bool causal, double scale) {
    const auto i32 = q.options().dtype(at::kInt);
    return at::_flash_attention_backward(go, q, k, v, out, lse, upload(s.q, i32), upload(s.k, i32), s.longest_q, s.longest_k,
                                         0.0, causal, seed, unused, scale);
  }
};

// The same by definition, sequence by sequence: what the tests merge.
struct Plain {
  static Tensor heads(const Tensor &t, int64_t from, int64_t to, int64_t repeats) {
    return t.narrow(0, from, to - from).transpose(0, 1).repeat_interleave(repeats, 0);
  }
  static Tensor scores(const Tensor &q, const Tensor &k, bool causal, double scale) {
    auto s = at::matmul(q, k.transpose(1, 2)) * scale;
    if (causal) s.masked_fill_(at::ones({q.size(1), k.size(1)}, s.options().dtype(at::kBool)).tril().logical_not(), -INFINITY);
    return s;
  }
  static variable_list forward(const Tensor &q, const Tensor &k, const Tensor &v, const Sequences &s, bool causal, double scale) {
    auto out = at::empty(q.sizes(), q.options()), lse = at::empty({q.size(1), q.size(0)}, q.options());
    const int64_t repeats = q.size(1) / k.size(1);
    for (size_t i = 0; i + 1 < s.q.size(); ++i) {
      const int64_t n = s.q[i + 1] - s.q[i];
      const auto z = scores(heads(q, s.q[i], s.q[i + 1], 1), heads(k, s.k[i], s.k[i + 1], repeats), causal, scale);
      const auto l = z.logsumexp(-1);
      lse.narrow(1, s.q[i], n).copy_(l);
      out.narrow(0, s.q[i], n).copy_(at::matmul((z - l.unsqueeze(-1)).exp(), heads(v, s.k[i], s.k[i + 1], repeats)).transpose(0, 1));
    }
    return {out, lse, Tensor(), Tensor()};
  }
  static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor &go, const Tensor &q, const Tensor &k, const Tensor &v,
                                                     const Tensor &out, const Tensor &lse, const Tensor &, const Tensor &,
                                                     const Sequences &s, bool causal, double scale) {
    auto gq = at::zeros_like(q), gk = at::zeros_like(k), gv = at::zeros_like(v);
    const int64_t repeats = q.size(1) / k.size(1);
    auto add = [&](const Tensor &to, int64_t from, const Tensor &g) { // of the heads that share a key head
      const auto sum = g.view({to.size(1), -1, g.size(1), g.size(2)}).sum(1).transpose(0, 1);
      to.narrow(0, from, g.size(1)).add_(sum);
    };
    for (size_t i = 0; i + 1 < s.q.size(); ++i) {
      const auto x = heads(q, s.q[i], s.q[i + 1], 1), y = heads(k, s.k[i], s.k[i + 1], repeats),
                 w = heads(v, s.k[i], s.k[i + 1], repeats), g = heads(go, s.q[i], s.q[i + 1], 1),
                 o = heads(out, s.q[i], s.q[i + 1], 1);
      const auto p = (scores(x, y, causal, scale) - lse.narrow(1, s.q[i], x.size(1)).unsqueeze(-1)).exp();
      const auto slope = p * (at::matmul(g, w.transpose(1, 2)) - (g * o).sum(-1, true)) * scale;
      add(gq, s.q[i], at::matmul(slope, y));
      add(gk, s.k[i], at::matmul(slope.transpose(1, 2), x).contiguous());
      add(gv, s.k[i], at::matmul(p.transpose(1, 2), g).contiguous());
    }
    return {gq, gk, gv};
  }
};

template <class Kernel> struct ByParts : torch::autograd::Function<ByParts<Kernel>> {
  static Tensor forward(AutogradContext *ctx, const Tensor &q, const Tensor &k, const Tensor &v, Ints flat, double scale) {
    const auto a = q.detach().contiguous(), b = k.detach().contiguous(), c = v.detach().contiguous();
    const Plan plan(flat);
    auto own = Kernel::forward(a, b, c, plan.own, true, scale);
    auto &out = own[0], &lse = own[1];
    variable_list seen(4);
    if (!plan.rows.empty()) {
      const auto i64 = a.options().dtype(at::kLong);
      const auto rows = upload(plan.rows, i64), keys = upload(plan.keys, i64);
      seen = Kernel::forward(a.index_select(0, rows), b.index_select(0, keys), c.index_select(0, keys), plan.seen, false, scale);
      const auto mine = lse.index_select(1, rows), both = at::logaddexp(mine, seen[1]);
      auto share = [&](const Tensor &l) { return (l - both).exp().t().unsqueeze(-1); };
      const auto mixed = out.index_select(0, rows) * share(mine) + seen[0] * share(seen[1]);
      out.index_copy_(0, rows, mixed.to(out.scalar_type()));
      lse.index_copy_(1, rows, both);
    }
    ctx->saved_data["flat"] = std::move(flat);
    ctx->saved_data["scale"] = scale;
    ctx->save_for_backward({a, b, c, out, lse, own[2], own[3], seen[2], seen[3]});
    return out;
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    rlhf::once_differentiable("shared_prefix_attention");
    const auto s = ctx->get_saved_variables();
    const Plan plan(ctx->saved_data["flat"].toIntVector());
    const double scale = ctx->saved_data["scale"].toDouble();
    const auto go = grads[0].contiguous();
    auto [gq, gk, gv] = Kernel::backward(go, s[0], s[1], s[2], s[3], s[4], s[5], s[6], plan.own, true, scale);
    if (!plan.rows.empty()) {
      const auto i64 = s[0].options().dtype(at::kLong);
      const auto rows = upload(plan.rows, i64), keys = upload(plan.keys, i64);
      auto at_rows = [&](const Tensor &t) { return t.index_select(0, rows); };
      auto [q, k, v] = Kernel::backward(at_rows(go), at_rows(s[0]), s[1].index_select(0, keys), s[2].index_select(0, keys),
                                        at_rows(s[3]), s[4].index_select(1, rows).contiguous(), s[7], s[8], plan.seen, false,
                                        scale);
      gq.index_add_(0, rows, q), gk.index_add_(0, keys, k), gv.index_add_(0, keys, v);
    }
    return {gq, gk, gv, Tensor(), Tensor()};
  }
};
} // namespace

// As rlhf_prefix_attention, without cap and window; `flash` or by definition.
RLHF_API char *rlhf_prefix_attention_by_parts(Tensor **out, const Tensor *q, const Tensor *k, const Tensor *v,
                                              const int64_t *flat, int64_t n, double scale, int flash) {
  return rlhf::guard([&] {
    Ints all(flat, flat + n);
    *out = rlhf::give(flash ? ByParts<Flash>::apply(*q, *k, *v, std::move(all), scale)
                            : ByParts<Plain>::apply(*q, *k, *v, std::move(all), scale));
  });
}
