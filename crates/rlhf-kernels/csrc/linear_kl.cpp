// Divergences between a student's and a teacher's next word over the whole vocabulary, a chunk of rows at
// a time: two buffers of chunk·V, never [M,V]. Where only the student's hidden states want a gradient,
// forward makes it, each row's times one number, and backward recomputes nothing.
//
// With the teacher's k likeliest words alone, what the student's rows need is a row of k or k + 1
// categories; their gradient is made in forward and stored, [M,k+1].
#include "cuda.h"
#include "loss_kernels.h"
#include "rows.h"
#include <ATen/Parallel.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

namespace {
using namespace rlhf;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Kind {
  Divergence divergence;
  double beta;
};

// Value [n] and gradient [n,C] with respect to the student's logits, from log-probabilities [n,C] over the
// same categories. `mean` [n] is Σ s·a as in the kernels.
struct Compared {
  Tensor value, mean, grad;
};
Compared compare(const Tensor &log_s, const Tensor &log_t, Kind kind) {
  const auto s = log_s.exp(), t = log_t.exp(), none = at::zeros({}, s.options());
  // 0 · log 0 = 0.
  auto times = [&](const Tensor &p, const Tensor &x) { return at::where(p == 0, none, p * x); };
  if (kind.divergence == Divergence::forward) {
    const auto value = times(t, log_t - log_s).sum(1);
    return {value, value, s - t};
  }
  const double b = kind.beta;
  const bool js = kind.divergence == Divergence::js;
  const auto other = js ? (s * (1 - b) + t * b).log() : log_t;
  const auto own = times(s, log_s - other);
  const auto mean = own.sum(1);
  const auto grad = own - s * mean.unsqueeze(1);
  if (!js) return {mean, mean, grad};
  return {times(t, log_t - other).sum(1) * b + mean * (1 - b), mean, grad * (1 - b)};
}

// Log-probabilities of a row from its statistics.
Tensor log_probs(const Tensor &z, const Tensor &stats, double inv_t) {
  return (z - stats.narrow(1, 0, 1)).mul_(inv_t).sub_(stats.narrow(1, 1, 1));
}

// value and mean [n] of two chunks of logits.
void divergences(const Tensor &zs, const Tensor &zt, const Tensor &ss, const Tensor &st, double inv_t, Kind kind,
                 Tensor value, Tensor mean) {
  const int64_t n = zs.size(0), v = zs.size(1);
  if (rows_on_gpu(zs)) {
    cuda::run(zs, "divergence", n, 512, cuda::in<float>(zs), cuda::in<float>(zt), v, cuda::in<float>(ss),
              cuda::in<float>(st), static_cast<float>(inv_t), static_cast<int>(kind.divergence),
              static_cast<float>(kind.beta), cuda::out<float>(value), cuda::out<float>(mean));
    return;
  }
  if (!fast(zs)) {
    const auto c = compare(log_probs(zs, ss, inv_t), log_probs(zt, st, inv_t), kind);
    value.copy_(c.value);
    mean.copy_(c.mean);
    return;
  }
  const float *s = zs.const_data_ptr<float>(), *t = zt.const_data_ptr<float>();
  const float *a = ss.const_data_ptr<float>(), *b = st.const_data_ptr<float>();
  float *out = value.mutable_data_ptr<float>(), *means = mean.mutable_data_ptr<float>();
  const auto &kernels = loss_kernels();
  at::parallel_for(0, n, grain(v), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float both[2];
      kernels.divergence({s + i * v, t + i * v, a + i * kStats, b + i * kStats, v, (float)inv_t, kind.divergence,
                          (float)kind.beta},
                         both);
      out[i] = both[0];
      means[i] = both[1];
    }
  });
}
// Their gradient times g [n], into `out`, which may be the student's logits.
void divergence_grads(const Tensor &zs, const Tensor &zt, const Tensor &ss, const Tensor &st, double inv_t, double cap,
                      Kind kind, const Tensor &mean, const Tensor &g, Tensor out) {
  const int64_t n = zs.size(0), v = zs.size(1);
  if (rows_on_gpu(zs)) {
    cuda::run(zs, "divergence_slopes", n, 512, cuda::in<float>(zs), cuda::in<float>(zt), v, cuda::in<float>(ss),
              cuda::in<float>(st), static_cast<float>(inv_t), static_cast<int>(kind.divergence),
              static_cast<float>(kind.beta), cuda::in<float>(mean), static_cast<float>(cap), cuda::in<float>(g),
              out.mutable_data_ptr(), cuda::output_kind(out));
    return;
  }
  if (!fast(zs)) {
    auto y = compare(log_probs(zs, ss, inv_t), log_probs(zt, st, inv_t), kind).grad * (g * inv_t).unsqueeze(1);
    if (cap > 0) y.mul_((zs / cap).square_().neg_().add_(1.0));
    out.copy_(y);
    return;
  }
  const float *s = zs.const_data_ptr<float>();
  float *to = out.mutable_data_ptr<float>();
  const float *t = zt.const_data_ptr<float>(), *means = mean.const_data_ptr<float>();
  const float *a = ss.const_data_ptr<float>(), *b = st.const_data_ptr<float>(), *gs = g.const_data_ptr<float>();
  const auto &kernels = loss_kernels();
  at::parallel_for(0, n, grain(v), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.divergence_grad({s + i * v, t + i * v, a + i * kStats, b + i * kStats, v, (float)inv_t, kind.divergence,
                               (float)kind.beta},
                              means[i], (float)cap, gs[i], to + i * v);
  });
}

void save_kind(AutogradContext *ctx, Kind kind) {
  ctx->saved_data["kind"] = static_cast<int64_t>(kind.divergence);
  ctx->saved_data["beta"] = kind.beta;
}
Kind kind_of(AutogradContext *ctx) {
  return {static_cast<Divergence>(ctx->saved_data["kind"].toInt()), ctx->saved_data["beta"].toDouble()};
}

// What the student's hidden states, weight and bias get from chunks of logit gradients.
struct Gradients {
  Tensor hidden, weight, bias;
  bool first = true;
  Gradients(bool h, bool w, bool b, const Tensor &all, const Tensor &weights, const at::TensorOptions &options) {
    if (h) hidden = at::empty(all.sizes(), options);
    if (w) weight = all.size(0) == 0 ? at::zeros(weights.sizes(), options) : at::empty(weights.sizes(), options);
    if (b) bias = at::zeros({weights.size(0)}, options);
  }
  void add(int64_t r, const Tensor &dz, const Tensor &h, const Tensor &w) {
    if (hidden.defined()) product(hidden.narrow(0, r, dz.size(0)), dz, w, false);
    if (bias.defined()) bias.add_(dz.sum(0, false, bias.scalar_type()));
    if (!weight.defined()) return;
    product(weight, dz.t(), h, !first);
    first = false;
  }
};

struct LinearKl : torch::autograd::Function<LinearKl> {
  static variable_list forward(AutogradContext *ctx, const Tensor &hidden, const Tensor &weight,
                               const std::optional<Tensor> &bias, const Tensor &t_hidden, const Tensor &t_weight,
                               const std::optional<Tensor> &t_bias, Linear set, double t_cap, Kind kind, bool ahead) {
    const auto acc = accumulation(hidden);
    const auto w = factor(weight, acc), h = factor(hidden, acc), b = wide(bias.value_or(Tensor()), acc);
    const auto tw = factor(t_weight, acc), th = factor(t_hidden, acc), tb = wide(t_bias.value_or(Tensor()), acc);
    const auto options = w.options().dtype(acc);
    const Linear teacher{set.inv_t, t_cap, set.rows};
    const int64_t m = h.size(0), v = w.size(0), rows = std::min(m, set.rows);
    auto value = at::empty({m}, options), mean = at::empty({m}, options);
    auto ss = at::empty({m, kStats}, options), st = at::empty({m, kStats}, options);
    Tensor fixed = ahead ? at::empty(h.sizes(), options) : Tensor();
    const auto one = at::full({rows}, 1.0, options);
    const auto a = buffer(0, rows, v, options), c = buffer(1, rows, v, options);
    for (int64_t r = 0; r < m; r += set.rows) {
      const int64_t n = std::min(set.rows, m - r);
      const auto zs = a.narrow(0, 0, n), zt = c.narrow(0, 0, n), s = ss.narrow(0, r, n), t = st.narrow(0, r, n);
      set.logits(zs, h.narrow(0, r, n), w.t(), b);
      teacher.logits(zt, th.narrow(0, r, n), tw.t(), tb);
      row_stats(zs, Tensor(), set.inv_t, false, s, Tensor());
      row_stats(zt, Tensor(), set.inv_t, false, t, Tensor());
      divergences(zs, zt, s, t, set.inv_t, kind, value.narrow(0, r, n), mean.narrow(0, r, n));
      if (ahead) {
        const auto dz = slopes_of(zs, w);
        divergence_grads(zs, zt, s, t, set.inv_t, set.cap, kind, mean.narrow(0, r, n), one.narrow(0, 0, n), dz);
        product(fixed.narrow(0, r, n), dz, w, false);
      }
    }
    ctx->set_materialize_grads(false);
    set.save(ctx);
    save_kind(ctx, kind);
    ctx->saved_data["t_cap"] = t_cap;
    if (ahead) ctx->save_for_backward({hidden, fixed});
    else
      ctx->save_for_backward({hidden, weight, bias.value_or(Tensor()), t_hidden, t_weight, t_bias.value_or(Tensor()), ss,
                              st, mean});
    return {value};
  }

  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    once_differentiable("linear_kl");
    variable_list result(10);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const auto set = Linear::of(ctx);
    const auto kind = kind_of(ctx);
    const auto g = grads[0].contiguous();
    const auto &hidden = saved[0];
    if (saved.size() == 2) {
      result[0] = (saved[1] * g.unsqueeze(1)).to(hidden.scalar_type());
      return result;
    }
    const auto &weight = saved[1], &bias = saved[2];
    const auto acc = accumulation(hidden);
    const auto w = factor(weight, acc), h = factor(hidden, acc), b = wide(bias, acc);
    const auto th = factor(saved[3], acc), tw = factor(saved[4], acc), tb = wide(saved[5], acc);
    const auto options = w.options().dtype(acc);
    const Linear teacher{set.inv_t, ctx->saved_data["t_cap"].toDouble(), set.rows};
    const int64_t m = h.size(0), v = w.size(0), rows = std::min(m, set.rows);
    Gradients out(ctx->needs_input_grad(0), ctx->needs_input_grad(1), bias.defined() && ctx->needs_input_grad(2), h, w,
                  options);
    const auto a = buffer(0, rows, v, options), c = buffer(1, rows, v, options);
    for (int64_t r = 0; r < m; r += set.rows) {
      const int64_t n = std::min(set.rows, m - r);
      const auto zs = a.narrow(0, 0, n), zt = c.narrow(0, 0, n);
      set.logits(zs, h.narrow(0, r, n), w.t(), b);
      teacher.logits(zt, th.narrow(0, r, n), tw.t(), tb);
      const auto dz = slopes_of(zs, w);
      divergence_grads(zs, zt, saved[6].narrow(0, r, n), saved[7].narrow(0, r, n), set.inv_t, set.cap, kind,
                       saved[8].narrow(0, r, n), g.narrow(0, r, n), dz);
      out.add(r, dz, h.narrow(0, r, n), w);
    }
    if (out.hidden.defined()) result[0] = out.hidden.to(hidden.scalar_type());
    if (out.weight.defined()) result[1] = out.weight.to(weight.scalar_type());
    if (out.bias.defined()) result[2] = out.bias.to(bias.scalar_type());
    return result;
  }
};

// log Σ exp of each row of the categories that `log_p` leaves, [n,1]; −∞ where it leaves nothing.
Tensor rest_of(const Tensor &log_p) {
  const auto rest = (-log_p.to(at::kDouble).exp().sum(1, true)).add_(1.0).clamp_min_(0.0);
  return rest.log().to(log_p.scalar_type());
}

// The teacher gives its k likeliest words' log-probabilities. With a bucket, all others are one more
// category; without, both sides are taken given that the word is one of the k.
struct LinearKlTop : torch::autograd::Function<LinearKlTop> {
  // Logits [n,k] of chosen words, and the weight's rows [n,k,H] that made them.
  static std::pair<Tensor, Tensor> chosen(const Linear &set, const Tensor &h, const Tensor &ids, const Tensor &weight,
                                          const Tensor &bias, at::ScalarType acc) {
    const int64_t n = ids.size(0), k = ids.size(1);
    const auto rows = weight.detach().index_select(0, ids.reshape({-1})).view({n, k, -1}).to(acc);
    auto z = at::bmm(rows, h.unsqueeze(2)).squeeze(2);
    if (bias.defined()) z.add_(bias.index_select(0, ids.reshape({-1})).view({n, k}));
    if (set.cap > 0) z.div_(set.cap).tanh_().mul_(set.cap);
    return {z, rows};
  }
  // The logits of all others, where the chosen ones are −∞, and their statistics.
  static void others(const Linear &set, const Tensor &z, const Tensor &h, const Tensor &wt, const Tensor &bias,
                     const Tensor &ids, const Tensor &stats) {
    set.logits(z, h, wt, bias);
    z.scatter_(1, ids, -std::numeric_limits<double>::infinity());
    row_stats(z, Tensor(), set.inv_t, false, stats, Tensor());
    // Nobody left: any finite maximum gives probabilities 0.
    const auto none = stats.select(1, 0) == -std::numeric_limits<double>::infinity();
    stats.select(1, 0).masked_fill_(none, 0.0);
    stats.select(1, 1).masked_fill_(none, -std::numeric_limits<double>::infinity());
    stats.select(1, 3).masked_fill_(none, 1.0);
  }

  static variable_list forward(AutogradContext *ctx, const Tensor &hidden, const Tensor &weight,
                               const std::optional<Tensor> &bias, const Tensor &ids, const Tensor &log_t, Linear set,
                               Kind kind, bool bucket) {
    const auto acc = accumulation(hidden);
    const auto h = wide(hidden, acc), b = wide(bias.value_or(Tensor()), acc);
    const auto all = bucket ? factor(hidden, acc) : Tensor(), w = bucket ? factor(weight, acc) : Tensor();
    const int64_t m = h.size(0), v = weight.size(0), k = ids.size(1);
    auto value = at::empty({m}, h.options()), grad = at::empty({m, k + (bucket ? 1 : 0)}, h.options());
    auto stats = bucket ? at::empty({m, kStats}, h.options()) : Tensor();
    const auto whole = bucket ? buffer(0, std::min(m, set.rows), v, h.options()) : Tensor();
    for (int64_t r = 0; r < m; r += set.rows) {
      const int64_t n = std::min(set.rows, m - r);
      const auto i = ids.narrow(0, r, n), x = h.narrow(0, r, n);
      const auto z = chosen(set, x, i, weight, b, acc).first;
      const auto u = z * set.inv_t, t = log_t.narrow(0, r, n).to(acc);
      Compared c;
      if (bucket) {
        const auto s = stats.narrow(0, r, n);
        others(set, whole.narrow(0, 0, n), all.narrow(0, r, n), w.t(), b, i, s);
        const auto rest = (s.narrow(1, 0, 1) * set.inv_t).add_(s.narrow(1, 1, 1));
        const auto lse = at::logaddexp(at::logsumexp(u, {1}, true), rest);
        c = compare(at::cat({u - lse, rest - lse}, 1), at::cat({t, rest_of(t)}, 1), kind);
      } else {
        c = compare(u - at::logsumexp(u, {1}, true), t - at::logsumexp(t, {1}, true), kind);
      }
      value.narrow(0, r, n).copy_(c.value);
      c.grad.mul_(set.inv_t);
      if (set.cap > 0) c.grad.narrow(1, 0, k).mul_((z / set.cap).square_().neg_().add_(1.0));
      grad.narrow(0, r, n).copy_(c.grad);
    }
    ctx->set_materialize_grads(false);
    set.save(ctx);
    ctx->saved_data["bucket"] = bucket;
    ctx->save_for_backward({hidden, weight, bias.value_or(Tensor()), ids, grad, stats});
    return {value};
  }

  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    once_differentiable("linear_kl_top");
    variable_list result(8);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const auto set = Linear::of(ctx);
    const bool bucket = ctx->saved_data["bucket"].toBool();
    const auto &hidden = saved[0], &weight = saved[1], &bias = saved[2], &ids = saved[3];
    const auto acc = accumulation(hidden);
    const auto h = wide(hidden, acc), b = wide(bias, acc);
    const auto g = saved[4] * grads[0].unsqueeze(1);
    const int64_t m = h.size(0), v = weight.size(0), k = ids.size(1);
    const bool need_h = ctx->needs_input_grad(0), need_w = ctx->needs_input_grad(1),
               need_b = bias.defined() && ctx->needs_input_grad(2);
    Tensor gh, gw, gb;
    if (bucket) {
      const auto all = factor(hidden, acc), w = factor(weight, acc);
      Gradients out(need_h, need_w, need_b, h, w, h.options());
      const auto whole = buffer(0, std::min(m, set.rows), v, h.options());
      for (int64_t r = 0; r < m; r += set.rows) {
        const int64_t n = std::min(set.rows, m - r);
        const auto z = whole.narrow(0, 0, n), x = all.narrow(0, r, n), i = ids.narrow(0, r, n);
        const auto part = g.narrow(0, r, n);
        set.logits(z, x, w.t(), b);
        z.scatter_(1, i, -std::numeric_limits<double>::infinity());
        // d log Σ exp = the softmax; `row_grad` gives −g·inv_t times it, and inv_t is in `part` already.
        const auto rest = part.select(1, k) * (-1.0 / set.inv_t);
        row_grad(z, saved[5].narrow(0, r, n), set.inv_t, set.cap, rest, Tensor(), Tensor(), z);
        z.scatter_(1, i, part.narrow(1, 0, k));
        out.add(r, z, x, w);
      }
      gh = out.hidden, gw = out.weight, gb = out.bias;
    } else {
      if (need_h) gh = at::empty(h.sizes(), h.options());
      if (need_w) gw = at::zeros(weight.sizes(), h.options());
      if (need_b) gb = at::zeros({v}, h.options());
      for (int64_t r = 0; r < m; r += set.rows) {
        const int64_t n = std::min(set.rows, m - r);
        const auto flat = ids.narrow(0, r, n).reshape({-1}), part = g.narrow(0, r, n);
        if (need_h) {
          const auto rows = weight.detach().index_select(0, flat).view({n, k, -1}).to(acc);
          gh.narrow(0, r, n).copy_(at::bmm(part.unsqueeze(1), rows).squeeze(1));
        }
        if (need_w)
          gw.index_add_(0, flat, at::bmm(part.unsqueeze(2), h.narrow(0, r, n).unsqueeze(1)).view({n * k, -1}));
        if (need_b) gb.index_add_(0, flat, part.reshape({-1}));
      }
    }
    if (gh.defined()) result[0] = gh.to(hidden.scalar_type());
    if (gw.defined()) result[1] = gw.to(weight.scalar_type());
    if (gb.defined()) result[2] = gb.to(bias.scalar_type());
    return result;
  }
};

std::optional<Tensor> optional(const Tensor *t) { return t ? std::optional<Tensor>(t->detach()) : std::nullopt; }
std::optional<Tensor> live(const Tensor *t) { return t ? std::optional<Tensor>(*t) : std::nullopt; }
} // namespace

// As in ffi.rs.
struct RlhfHead {
  const Tensor *hidden, *weight, *bias; // bias may be null
  double softcap;                       // 0 for none
};
struct RlhfKlOptions {
  double temperature, beta;
  int64_t divergence, chunk_rows;
};

RLHF_API char *rlhf_linear_kl(Tensor **out, const RlhfHead *s, const RlhfHead *t, const RlhfKlOptions *o) {
  return guard([&] {
    const bool trained = s->weight->requires_grad() || (s->bias && s->bias->requires_grad());
    const bool ahead = at::GradMode::is_enabled() && s->hidden->requires_grad() && !trained;
    const Linear set{1.0 / o->temperature, s->softcap, even_rows(s->hidden->size(0), o->chunk_rows)};
    const Kind kind{static_cast<Divergence>(o->divergence), o->beta};
    *out = give(LinearKl::apply(*s->hidden, *s->weight, live(s->bias), t->hidden->detach(), t->weight->detach(),
                                optional(t->bias), set, t->softcap, kind, ahead)[0]);
  });
}

// ids and log_t [M,k]: the teacher's likeliest words, each row's ids distinct.
RLHF_API char *rlhf_linear_kl_top(Tensor **out, const RlhfHead *s, const Tensor *ids, const Tensor *log_t, int bucket,
                                  const RlhfKlOptions *o) {
  return guard([&] {
    const Linear set{1.0 / o->temperature, s->softcap, even_rows(s->hidden->size(0), o->chunk_rows)};
    const Kind kind{static_cast<Divergence>(o->divergence), o->beta};
    *out = give(LinearKlTop::apply(*s->hidden, *s->weight, live(s->bias), ids->contiguous(), log_t->detach(), set, kind,
                                   bucket != 0)[0]);
  });
}

// out: ids and log-probabilities [M,k] of the k likeliest words, likeliest first.
RLHF_API char *rlhf_top_logprobs(Tensor **out, const RlhfHead *t, int64_t k, double temperature, int64_t chunk_rows) {
  return guard([&] {
    c10::AutoGradMode off(false);
    const auto acc = accumulation(*t->hidden);
    const auto w = factor(*t->weight, acc), h = factor(*t->hidden, acc), b = t->bias ? wide(*t->bias, acc) : Tensor();
    const auto options = h.options().dtype(acc);
    const int64_t m = h.size(0), v = w.size(0);
    const Linear set{1.0 / temperature, t->softcap, even_rows(m, chunk_rows)};
    auto ids = at::empty({m, k}, options.dtype(at::kLong)), logp = at::empty({m, k}, options);
    const auto whole = buffer(0, std::min(m, set.rows), v, options);
    for (int64_t r = 0; r < m; r += set.rows) {
      const int64_t n = std::min(set.rows, m - r);
      const auto z = whole.narrow(0, 0, n);
      const auto stats = at::empty({n, kStats}, options);
      set.logits(z, h.narrow(0, r, n), w.t(), b);
      row_stats(z, Tensor(), set.inv_t, false, stats, Tensor());
      const auto [values, words] = z.topk(k, 1);
      ids.narrow(0, r, n).copy_(words);
      logp.narrow(0, r, n).copy_(log_probs(values, stats, set.inv_t));
    }
    out[0] = give(ids);
    out[1] = give(logp);
  });
}
