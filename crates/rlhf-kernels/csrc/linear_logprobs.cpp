// log p(id) = log_softmax(cap(h·Wᵀ) / T)[id] and the entropy of each row.
//
// From (hidden, weight) the [M,V] logits are never whole: forward keeps four numbers a row; backward
// computes each chunk of logits again and turns it into its own gradient in place. So memory is
// O(chunk·V) both ways, in one buffer. Where only `hidden` wants a gradient, each row's is a fixed
// vector times the incoming number: forward makes that vector and backward recomputes nothing.
#include "cpu_kernels.h"
#include "shim.h"
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

namespace {
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// As in the kernels: below it a probability is 0.
constexpr double kFloor = -1e4;

// Only what the inner loops take.
bool fast(const Tensor &z) { return z.is_cpu() && z.scalar_type() == at::kFloat; }

// Rows a thread should take at least, so that starting it pays.
int64_t grain(int64_t v) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(v, 1)); }

// stats [n,4] and logp [n] of logits z [n,V]; `ids` may be undefined, then so is logp.
void row_stats(const Tensor &z, const Tensor &ids, double inv_t, bool entropy, Tensor stats, Tensor logp) {
  const int64_t n = z.size(0), v = z.size(1);
  if (fast(z)) {
    const float *x = z.const_data_ptr<float>();
    float *s = stats.mutable_data_ptr<float>(), *lp = ids.defined() ? logp.mutable_data_ptr<float>() : nullptr;
    const int64_t *id = ids.defined() ? ids.const_data_ptr<int64_t>() : nullptr;
    const auto &kernels = rlhf::cpu_kernels();
    at::parallel_for(0, n, grain(v), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        kernels.stats(x + i * v, v, (float)inv_t, entropy, s + i * rlhf::kStats);
        if (id) lp[i] = (x[i * v + id[i]] - s[i * rlhf::kStats]) * (float)inv_t - s[i * rlhf::kStats + 1];
      }
    });
    return;
  }
  const auto top = z.amax(1, true);
  const auto d = (z - top).mul_(inv_t);
  const auto e = d.exp();
  const auto total = e.sum(1);
  stats.select(1, 0).copy_(top.squeeze(1));
  stats.select(1, 1).copy_(total.log());
  if (entropy) stats.select(1, 2).copy_(total.log() - (e * d.clamp_min(kFloor)).sum(1) / total);
  stats.select(1, 3).copy_(total.reciprocal());
  if (ids.defined()) logp.copy_(d.gather(1, ids.unsqueeze(1)).squeeze(1) - total.log());
}

// The gradient of Σ g·logp + ge·H with respect to the uncapped logits; g and ge [n] may be undefined.
// It comes in two parts: `out` (may be z itself), and, where g is defined, own [n] that belongs to the
// chosen ids. Apart, because a product that sums over the vocabulary would add thousands of small
// terms to one large one.
Tensor row_grad(const Tensor &z, const Tensor &ids, const Tensor &stats, double inv_t, double cap, const Tensor &g,
                const Tensor &ge, Tensor out) {
  Tensor own;
  if (g.defined()) {
    own = g * inv_t;
    if (cap > 0) own.mul_((z.gather(1, ids.unsqueeze(1)).squeeze(1) / cap).square_().neg_().add_(1.0));
  }
  if (fast(z)) {
    const int64_t n = z.size(0), v = z.size(1);
    const float *x = z.const_data_ptr<float>(), *s = stats.const_data_ptr<float>();
    const float *gp = g.defined() ? g.const_data_ptr<float>() : nullptr;
    const float *gep = ge.defined() ? ge.const_data_ptr<float>() : nullptr;
    float *o = out.mutable_data_ptr<float>();
    const auto &kernels = rlhf::cpu_kernels();
    at::parallel_for(0, n, grain(v), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        kernels.grad(x + i * v, o + i * v, v, s + i * rlhf::kStats, (float)inv_t, (float)cap, gp ? gp[i] : 0.f,
                     gep ? gep[i] : 0.f);
    });
    return own;
  }
  // d logp/dz = 1[id] − p ;  d H/dz = −p (log p + H)
  const auto d = (z - stats.narrow(1, 0, 1)).mul_(inv_t);
  auto y = d.exp().mul_(stats.narrow(1, 3, 1)).mul_(-inv_t);
  if (ge.defined()) {
    auto w = d.clamp_min(kFloor).add_(stats.narrow(1, 2, 1)).sub_(stats.narrow(1, 1, 1)).mul_(ge.unsqueeze(1));
    if (g.defined()) w.add_(g.unsqueeze(1));
    y.mul_(w);
  } else {
    y.mul_(g.unsqueeze(1));
  }
  if (cap > 0) y.mul_((z / cap).square_().neg_().add_(1.0));
  out.copy_(y);
  return own;
}
// Joins the two parts.
void join(Tensor grad, const Tensor &ids, const Tensor &own) {
  if (own.defined()) grad.scatter_add_(1, ids.unsqueeze(1), own.unsqueeze(1));
}
// out = (gradient of the logits) · weight, from the two parts.
void hidden_grad(Tensor out, const Tensor &grad, const Tensor &ids, const Tensor &own, const Tensor &w) {
  at::mm_out(out, grad, w);
  if (own.defined()) out.addcmul_(w.index_select(0, ids), own.unsqueeze(1));
}

// A chunk's buffer, kept by its thread between calls up to 64 MiB: fresh pages cost more than the
// arithmetic on them.
Tensor buffer(int64_t rows, int64_t v, const at::TensorOptions &options) {
  constexpr int64_t most = 16 << 20;
  if (!options.device().is_cpu() || options.dtype() != at::kFloat || rows * v > most) return at::empty({rows, v}, options);
  static thread_local Tensor kept;
  if (!kept.defined() || kept.numel() < rows * v) kept = at::empty({rows * v}, options);
  return kept.narrow(0, 0, rows * v).view({rows, v});
}

struct Settings {
  double inv_t, cap;
  int64_t rows;
  void save(AutogradContext *ctx) const {
    ctx->saved_data["inv_t"] = inv_t;
    ctx->saved_data["cap"] = cap;
    ctx->saved_data["rows"] = rows;
  }
  static Settings of(AutogradContext *ctx) {
    return {ctx->saved_data["inv_t"].toDouble(), ctx->saved_data["cap"].toDouble(), ctx->saved_data["rows"].toInt()};
  }
  void logits(Tensor out, const Tensor &h, const Tensor &wt) const {
    at::mm_out(out, h, wt);
    if (cap > 0) out.div_(cap).tanh_().mul_(cap);
  }
};

struct LinearLogprobs : torch::autograd::Function<LinearLogprobs> {
  static variable_list forward(AutogradContext *ctx, const Tensor &hidden, const Tensor &weight, const Tensor &ids,
                               Settings set, bool entropy, bool ahead) {
    const auto acc = rlhf::accumulation(hidden);
    const auto w = weight.detach().to(acc), all = hidden.detach().to(acc);
    const auto wt = w.t();
    const int64_t m = hidden.size(0), v = weight.size(0);
    auto logp = at::empty({m}, w.options()), stats = at::empty({m, rlhf::kStats}, w.options());
    const auto fixed = ahead ? at::empty(all.sizes(), w.options()) : Tensor();
    const auto one = ahead ? at::empty({std::min(m, set.rows)}, w.options()).fill_(1.0) : Tensor();
    const auto whole = buffer(std::min(m, set.rows), v, w.options());
    for (int64_t r = 0; r < m; r += set.rows) {
      const int64_t n = std::min(set.rows, m - r);
      const auto z = whole.narrow(0, 0, n), i = ids.narrow(0, r, n), s = stats.narrow(0, r, n);
      set.logits(z, all.narrow(0, r, n), wt);
      row_stats(z, i, set.inv_t, entropy, s, logp.narrow(0, r, n));
      if (ahead) {
        const auto own = row_grad(z, i, s, set.inv_t, set.cap, one.narrow(0, 0, n), Tensor(), z);
        hidden_grad(fixed.narrow(0, r, n), z, i, own, w);
      }
    }
    ctx->set_materialize_grads(false);
    set.save(ctx);
    ctx->saved_data["ahead"] = ahead;
    if (ahead) ctx->save_for_backward({fixed, hidden});
    else ctx->save_for_backward({hidden, weight, ids, stats});
    if (!entropy) return {logp};
    return {logp, stats.select(1, 2).clone()};
  }

  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    rlhf::once_differentiable("linear_logprobs");
    const auto saved = ctx->get_saved_variables();
    const auto set = Settings::of(ctx);
    variable_list result(6);
    const auto g_logp = grads[0].defined() ? grads[0].contiguous() : Tensor();
    const auto g_entropy = grads.size() > 1 && grads[1].defined() ? grads[1].contiguous() : Tensor();
    if (!g_logp.defined() && !g_entropy.defined()) return result;
    if (ctx->saved_data["ahead"].toBool()) {
      result[0] = (saved[0] * g_logp.unsqueeze(1)).to(saved[1].scalar_type());
      return result;
    }
    const auto &hidden = saved[0], &weight = saved[1], &ids = saved[2], &stats = saved[3];
    const bool need_h = ctx->needs_input_grad(0), need_w = ctx->needs_input_grad(1);
    if (!need_h && !need_w) return result;
    const auto acc = rlhf::accumulation(hidden);
    const auto w = weight.detach().to(acc), all = hidden.detach().to(acc);
    const auto wt = w.t();
    const int64_t m = hidden.size(0), v = weight.size(0);
    Tensor gh = need_h ? at::empty(all.sizes(), w.options()) : Tensor();
    Tensor gw = need_w ? (m == 0 ? at::zeros(w.sizes(), w.options()) : at::empty(w.sizes(), w.options())) : Tensor();
    const auto whole = buffer(std::min(m, set.rows), v, w.options());
    for (int64_t r = 0; r < m; r += set.rows) {
      const int64_t n = std::min(set.rows, m - r);
      const auto z = whole.narrow(0, 0, n), h = all.narrow(0, r, n), i = ids.narrow(0, r, n);
      auto part = [&](const Tensor &t) { return t.defined() ? t.narrow(0, r, n) : Tensor(); };
      set.logits(z, h, wt);
      const auto own =
          row_grad(z, i, stats.narrow(0, r, n), set.inv_t, set.cap, part(g_logp), part(g_entropy), z);
      if (need_h) hidden_grad(gh.narrow(0, r, n), z, i, own, w);
      if (!need_w) continue;
      join(z, i, own);
      if (r == 0) at::mm_out(gw, z.t(), h);
      else at::addmm_out(gw, gw, z.t(), h);
    }
    if (need_h) result[0] = gh.to(hidden.scalar_type());
    if (need_w) result[1] = gw.to(weight.scalar_type());
    return result;
  }
};

// The same from logits that exist already.
struct LogitLogprobs : torch::autograd::Function<LogitLogprobs> {
  static variable_list forward(AutogradContext *ctx, const Tensor &logits, const std::optional<Tensor> &ids,
                               bool entropy) {
    const auto z = logits.detach().to(rlhf::accumulation(logits)).contiguous();
    const auto i = ids.value_or(Tensor());
    auto logp = i.defined() ? at::empty({z.size(0)}, z.options()) : Tensor();
    auto stats = at::empty({z.size(0), rlhf::kStats}, z.options());
    row_stats(z, i, 1.0, entropy, stats, logp);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({logits, i, stats});
    if (!i.defined()) return {stats.select(1, 2).clone()};
    return {logp};
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    rlhf::once_differentiable("token_logprobs");
    const auto saved = ctx->get_saved_variables();
    variable_list result(3);
    if (!grads[0].defined()) return result;
    const auto &logits = saved[0], &ids = saved[1], &stats = saved[2];
    const auto z = logits.detach().to(rlhf::accumulation(logits)).contiguous(), g = grads[0].contiguous();
    auto out = at::empty_like(z);
    join(out, ids, row_grad(z, ids, stats, 1.0, 0.0, ids.defined() ? g : Tensor(), ids.defined() ? Tensor() : g, out));
    result[0] = out.to(logits.scalar_type());
    return result;
  }
};
} // namespace

// out[0] log-probabilities, out[1] entropies where asked for.
RLHF_API char *rlhf_linear_logprobs(Tensor **out, const Tensor *hidden, const Tensor *weight, const Tensor *ids,
                                    double temperature, double softcap, int entropy, int64_t chunk) {
  return rlhf::guard([&] {
    const bool grad = at::GradMode::is_enabled();
    const bool ahead = grad && hidden->requires_grad() && !weight->requires_grad() && !entropy;
    // Chunks of equal length, so that none is a thin rest.
    const int64_t m = hidden->size(0), parts = std::max<int64_t>(1, (m + chunk - 1) / chunk);
    const Settings set{1.0 / temperature, softcap, std::max<int64_t>(1, (m + parts - 1) / parts)};
    auto r = LinearLogprobs::apply(*hidden, *weight, ids->contiguous(), set, entropy != 0, ahead);
    out[0] = rlhf::give(r[0]);
    out[1] = entropy ? rlhf::give(r[1]) : nullptr;
  });
}

// Log-probabilities of `ids`, or where that is null the entropies.
RLHF_API char *rlhf_logit_logprobs(Tensor **out, const Tensor *logits, const Tensor *ids) {
  return rlhf::guard([&] {
    const auto i = ids ? std::optional<Tensor>(ids->contiguous()) : std::nullopt;
    *out = rlhf::give(LogitLogprobs::apply(*logits, i, ids == nullptr)[0]);
  });
}
