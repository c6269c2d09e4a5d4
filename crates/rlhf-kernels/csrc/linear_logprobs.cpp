// log p(id) = log_softmax(cap(h·Wᵀ) / T)[id] and the entropy of each row, whole rows of logits at a time:
// what other devices than the CPU run. (linear_tiles.cpp is the CPU's own way.)
//
// From (hidden, weight) the [M,V] logits are never whole: forward keeps four numbers a row; backward
// computes each chunk of logits again and turns it into its own gradient in place. So memory is
// O(chunk·V) both ways, in one buffer. Where only `hidden` wants a gradient, each row's is a fixed
// vector times the incoming number: forward makes that vector and backward recomputes nothing, unless
// the entropy's gradient is asked for.
//
// With filtering, words that no row of a chunk gives a probability of `filter` are left out of its
// gradients. Forward notes the others; backward computes logits and products of those alone, over their
// rows of the weight gathered together.
#include "cuda.h"
#include "rows.h"
#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <algorithm>
#include <torch/csrc/autograd/variable.h>

namespace rlhf {
bool rows_on_gpu(const Tensor &z) { return z.scalar_type() == at::kFloat && z.is_contiguous() && cuda::ready(z); }

void row_stats(const Tensor &z, const Tensor &ids, double inv_t, bool entropy, Tensor stats, Tensor logp) {
  const int64_t n = z.size(0), v = z.size(1);
  if (fast(z)) {
    const float *x = z.const_data_ptr<float>();
    float *s = stats.mutable_data_ptr<float>(), *lp = ids.defined() ? logp.mutable_data_ptr<float>() : nullptr;
    const int64_t *id = ids.defined() ? ids.const_data_ptr<int64_t>() : nullptr;
    at::parallel_for(0, n, grain(v), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        RowSums sums;
        fold(const_cast<float *>(x) + i * v, v, {inv_t, 0, entropy, false, false, false}, &sums); // keeps the logits
        finish(sums, entropy, s + i * kStats);
        if (id) lp[i] = (x[i * v + id[i]] - s[i * kStats]) * (float)inv_t - s[i * kStats + 1];
      }
    });
    return;
  }
  if (rows_on_gpu(z)) {
    cuda::run(z, "row_stats", n, 512, cuda::in<float>(z), v, cuda::in<int64_t>(ids), static_cast<float>(inv_t),
              cuda::out<float>(stats), cuda::out<float>(ids.defined() ? logp : Tensor()));
    return;
  }
  const auto top = z.amax(1, true);
  auto d = z - top;
  if (inv_t != 1) d.mul_(inv_t);
  const auto own = ids.defined() ? d.gather(1, ids.unsqueeze(1)).squeeze(1) : Tensor();
  const auto e = entropy ? d.exp() : d.exp_();
  const auto total = e.sum(1), log_total = total.log();
  stats.select(1, 0).copy_(top.squeeze(1));
  stats.select(1, 1).copy_(log_total);
  if (entropy) stats.select(1, 2).copy_(log_total - d.clamp_min_(kFloor).mul_(e).sum(1) / total);
  stats.select(1, 3).copy_(total.reciprocal());
  if (ids.defined()) logp.copy_(own - log_total);
}

Tensor own_slope(const Tensor &z, const Tensor &ids, double inv_t, double cap) {
  if (cap <= 0) return at::full({z.size(0)}, inv_t, z.options());
  return (z.gather(1, ids.unsqueeze(1)).squeeze(1) / cap).square_().neg_().add_(1.0).mul_(inv_t);
}

void row_grad(const Tensor &z, const Tensor &stats, double inv_t, double cap, const Tensor &g, const Tensor &ge,
              const Tensor &gq, Tensor out) {
  const int64_t n = z.size(0), v = z.size(1);
  if (fast(z)) {
    const float *x = z.const_data_ptr<float>(), *s = stats.const_data_ptr<float>();
    const float *gp = g.defined() ? g.const_data_ptr<float>() : nullptr;
    const float *gep = ge.defined() ? ge.const_data_ptr<float>() : nullptr;
    const float *gqp = gq.defined() ? gq.const_data_ptr<float>() : nullptr;
    float *o = out.mutable_data_ptr<float>();
    at::parallel_for(0, n, grain(v), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        grad(x + i * v, o + i * v, v, s + i * kStats, inv_t, cap, gp ? gp[i] : 0.f, gep ? gep[i] : 0.f,
             gqp ? gqp[i] : 0.f);
    });
    return;
  }
  if (rows_on_gpu(z)) {
    cuda::run(z, "row_slopes", n, 512, cuda::in<float>(z), v, cuda::in<float>(stats), static_cast<float>(inv_t),
              static_cast<float>(cap), cuda::in<float>(g), cuda::in<float>(ge), cuda::in<float>(gq), out.mutable_data_ptr(),
              cuda::output_kind(out));
    return;
  }
  // d logp/dz = 1[id] − p ;  d H/dz = −p (log p + H)
  const auto d = (z - stats.narrow(1, 0, 1)).mul_(inv_t);
  auto y = d.exp().mul_(stats.narrow(1, 3, 1)).mul_(-inv_t);
  if (ge.defined()) {
    auto w = d.clamp_min(kFloor).add_(stats.narrow(1, 2, 1)).sub_(stats.narrow(1, 1, 1)).mul_(ge.unsqueeze(1));
    if (g.defined()) w.add_(g.unsqueeze(1));
    y.mul_(w);
  } else if (g.defined()) {
    y.mul_(g.unsqueeze(1));
  } else {
    y.zero_();
  }
  if (gq.defined()) y.addcmul_(z, (gq * (inv_t * inv_t)).unsqueeze(1));
  if (cap > 0) y.mul_((z / cap).square_().neg_().add_(1.0));
  out.copy_(y);
}
Tensor buffer(int slot, int64_t rows, int64_t v, const at::TensorOptions &options) {
  constexpr int64_t most = 16 << 20;
  if (!options.device().is_cpu() || options.dtype() != at::kFloat || rows * v > most) return at::empty({rows, v}, options);
  static thread_local Tensor slots[3];
  auto &kept = slots[slot];
  if (!kept.defined() || kept.numel() < rows * v) kept = at::empty({rows * v}, options);
  return kept.narrow(0, 0, rows * v).view({rows, v});
}

void Extras::prepare(int64_t m, const at::TensorOptions &options) {
  if (top1) {
    is_top1 = at::zeros({m}, options.dtype(at::kBool));
    top1_logprobs = at::empty({m}, options);
  }
  if (moments) {
    log_sum_sq_probs = at::empty({m}, options);
    mean_logits = at::empty({m}, options);
  }
}

void add_own(const Tensor &out, const Tensor &own, const Tensor &weight, const Tensor &ids) {
  for (int64_t r = 0; r < ids.size(0); r += 128) {
    const int64_t n = std::min<int64_t>(128, ids.size(0) - r);
    const auto rows = weight.detach().index_select(0, ids.narrow(0, r, n)).to(out.scalar_type());
    out.narrow(0, r, n).addcmul_(rows, own.narrow(0, r, n).unsqueeze(1));
  }
}

void of_words(const Linear &set, const Tensor &words, const Tensor &h, const Tensor &ids, const Tensor &weight,
              const Tensor &bias, const Tensor &stats, const Tensor &own, const Tensor &dense, const Tensor &entropy,
              const Tensor &pull, Tensor hidden, Tensor to_weight, Tensor to_bias) {
  const auto acc = h.scalar_type();
  const auto some = weight.index_select(0, words).to(acc);
  const auto y = at::empty({h.size(0), words.size(0)}, h.options());
  set.logits(y, h, some.t(), bias.defined() ? bias.index_select(0, words).to(acc) : bias);
  row_grad(y, stats, set.inv_t, set.cap, dense, entropy, pull, y);
  if (hidden.defined()) {
    product(hidden, y, some, false);
    if (own.defined()) add_own(hidden, own, weight, ids);
  }
  if (to_bias.defined()) {
    to_bias.index_add_(0, words, y.sum(0));
    if (own.defined()) to_bias.index_add_(0, ids, own);
  }
  if (to_weight.defined()) {
    to_weight.index_add_(0, words, product(y.t(), h));
    if (own.defined()) to_weight.index_add_(0, ids, h * own.unsqueeze(1));
  }
}

void Linear::logits(Tensor out, const Tensor &h, const Tensor &wt, const Tensor &bias) const {
  product(out, h, wt, false);
  if (bias.defined()) out.add_(bias);
  if (cap > 0) out.div_(cap).tanh_().mul_(cap);
}
} // namespace rlhf

namespace {
using namespace rlhf;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Which of equal largest words comes first is what an argmax means.
void row_top1(const Tensor &z, const Tensor &ids, const Tensor &stats, Tensor out) {
  if (!fast(z)) {
    const auto top = z == stats.narrow(1, 0, 1).to(z.scalar_type());
    const auto before = at::arange(z.size(1), ids.options()).unsqueeze(0) < ids.unsqueeze(1);
    out.copy_(top.gather(1, ids.unsqueeze(1)).squeeze(1).logical_and_(top.logical_and(before).any(1).logical_not_()));
    return;
  }
  const int64_t n = z.size(0), v = z.size(1);
  const float *x = z.const_data_ptr<float>(), *s = stats.const_data_ptr<float>();
  const int64_t *id = ids.const_data_ptr<int64_t>();
  bool *o = out.mutable_data_ptr<bool>();
  at::parallel_for(0, n, grain(v), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float *row = x + i * v, top = s[i * rlhf::kStats];
      bool first = row[id[i]] == top;
      for (int64_t j = 0; first && j < id[i]; j += 1024) {
        int found = 0;
        for (int64_t k = j, stop = std::min(j + 1024, id[i]); k < stop; ++k) found |= row[k] == top;
        first = !found;
      }
      o[i] = first;
    }
  });
}

// Joins the two parts.
void join(Tensor grad, const Tensor &ids, const Tensor &own) {
  if (own.defined()) grad.scatter_add_(1, ids.unsqueeze(1), own.unsqueeze(1).to(grad.scalar_type()));
}
// out = (gradient of the logits) · weight, from the two parts.
// Where `words` is defined the gradient is of those alone.
void hidden_grad(Tensor out, const Tensor &grad, const Tensor &ids, const Tensor &own, const Tensor &w,
                 const Tensor &words = {}) {
  product(out, grad, words.defined() ? w.index_select(0, words) : w, false);
  if (own.defined()) out.addcmul_(w.index_select(0, ids).to(out.scalar_type()), own.unsqueeze(1));
}

void of_chunk(Extras &e, int64_t r, const Tensor &z, const Tensor &ids, const Tensor &stats, double inv_t) {
  const int64_t n = z.size(0);
  if (e.top1) {
    row_top1(z, ids, stats, e.is_top1.narrow(0, r, n));
    e.top1_logprobs.narrow(0, r, n).copy_(-stats.select(1, 1));
  }
  if (e.moments) {
    const auto squares = (z - stats.narrow(1, 0, 1)).mul_(2 * inv_t).exp_().sum(1);
    e.log_sum_sq_probs.narrow(0, r, n).copy_(squares.log_() - stats.select(1, 1) * 2);
    e.mean_logits.narrow(0, r, n).copy_(z.mean(1) * inv_t);
  }
}

// Words with a probability of at least `filter` in any row, i64 [A]; undefined where they are more than half,
// so that gathering does not pay.
Tensor likely(const Tensor &z, const Tensor &stats, double inv_t, double filter) {
  const int64_t v = z.size(1);
  const auto least = (stats.select(1, 1) + std::log(filter)).div_(inv_t).add_(stats.select(1, 0));
  const auto any = (z >= least.unsqueeze(1)).any(0);
  const auto words = any.nonzero().squeeze(1);
  return words.size(0) * 2 > v ? Tensor() : words;
}

// The slopes of chosen ids where only some words' logits are there.
Tensor own_slope_alone(const Linear &set, const Tensor &h, const Tensor &w, const Tensor &bias, const Tensor &ids) {
  if (set.cap <= 0) return at::full({ids.size(0)}, set.inv_t, h.options());
  auto z = (h * w.index_select(0, ids)).sum(1);
  if (bias.defined()) z.add_(bias.index_select(0, ids));
  return z.div_(set.cap).tanh_().square_().neg_().add_(1.0).mul_(set.inv_t);
}

// Gives logp, then the entropy, the log-sum-exp and the logit penalty where they are asked for.
struct LinearLogprobs : torch::autograd::Function<LinearLogprobs> {
  static variable_list forward(AutogradContext *ctx, const Tensor &hidden, const Tensor &weight,
                               const std::optional<Tensor> &bias, const Tensor &ids, Linear set, Wanted wanted,
                               double filter, Extras *extras) {
    const bool entropy = wanted.entropy, ahead = wanted.ahead;
    const auto acc = rlhf::accumulation(hidden);
    const auto operand = filter > 0 ? wide : factor;
    const auto w = operand(weight, acc), all = operand(hidden, acc), b = wide(bias.value_or(Tensor()), acc);
    const auto wt = w.t();
    const auto options = w.options().dtype(acc);
    const int64_t m = hidden.size(0), v = weight.size(0);
    auto logp = at::empty({m}, options), stats = at::empty({m, rlhf::kStats}, options);
    extras->prepare(m, options);
    auto penalty = wanted.penalty != 0 ? at::empty({m}, options) : Tensor();
    Tensor fixed, slope, one;
    if (ahead) {
      fixed = at::empty(all.sizes(), options);
      slope = at::empty({m}, options);
      one = at::full({std::min(m, set.rows)}, 1.0, options);
    }
    variable_list kept;
    const auto whole = buffer(0, std::min(m, set.rows), v, options);
    for (int64_t r = 0; r < m; r += set.rows) {
      const int64_t n = std::min(set.rows, m - r);
      const auto z = whole.narrow(0, 0, n), i = ids.narrow(0, r, n), s = stats.narrow(0, r, n);
      set.logits(z, all.narrow(0, r, n), wt, b);
      row_stats(z, i, set.inv_t, entropy, s, logp.narrow(0, r, n));
      of_chunk(*extras, r, z, i, s, set.inv_t);
      if (penalty.defined())
        penalty.narrow(0, r, n).copy_(z.square().mean(1).mul_(wanted.penalty * set.inv_t * set.inv_t));
      const auto words = filter > 0 ? likely(z, s, set.inv_t, filter) : Tensor();
      kept.push_back(words);
      if (ahead) {
        const auto own = slope.narrow(0, r, n).copy_(own_slope(z, i, set.inv_t, set.cap));
        const auto some = words.defined() ? z.index_select(1, words) : z;
        const auto dz = slopes_of(some, w);
        row_grad(some, s, set.inv_t, set.cap, one.narrow(0, 0, n), Tensor(), Tensor(), dz);
        hidden_grad(fixed.narrow(0, r, n), dz, i, own, w, words);
      }
    }
    ctx->set_materialize_grads(false);
    set.save(ctx);
    ctx->saved_data["entropy"] = entropy;
    ctx->saved_data["lse"] = wanted.lse;
    ctx->saved_data["penalty"] = wanted.penalty;
    ctx->saved_data["ahead"] = ahead;
    variable_list all_saved{hidden, weight, bias.value_or(Tensor()), ids, stats, fixed, slope};
    all_saved.insert(all_saved.end(), kept.begin(), kept.end());
    ctx->save_for_backward(std::move(all_saved));
    variable_list out{logp};
    if (entropy) out.push_back(stats.select(1, 2).clone());
    if (wanted.lse) out.push_back((stats.select(1, 0) * set.inv_t).add_(stats.select(1, 1)));
    if (penalty.defined()) out.push_back(penalty);
    return out;
  }

  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    rlhf::once_differentiable("linear_logprobs");
    const auto saved = ctx->get_saved_variables();
    const auto set = Linear::of(ctx);
    variable_list result(8);
    size_t next = 0;
    auto take = [&](bool there) {
      return there && grads[next++].defined() ? grads[next - 1].contiguous() : Tensor();
    };
    const auto g_logp = take(true), g_entropy = take(ctx->saved_data["entropy"].toBool()),
               g_lse = take(ctx->saved_data["lse"].toBool());
    const double penalty = ctx->saved_data["penalty"].toDouble();
    const auto g_penalty = take(penalty != 0);
    if (!g_logp.defined() && !g_entropy.defined() && !g_lse.defined() && !g_penalty.defined()) return result;
    const auto &hidden = saved[0], &weight = saved[1], &bias = saved[2], &ids = saved[3], &stats = saved[4];
    const auto acc = rlhf::accumulation(hidden);
    const bool need_h = ctx->needs_input_grad(0), need_w = ctx->needs_input_grad(1);
    const bool need_b = bias.defined() && ctx->needs_input_grad(2);
    if (!need_h && !need_w && !need_b) return result;
    // Of the softmax: what logp takes away, the log-sum-exp brings.
    const auto dense = !g_lse.defined() ? g_logp : g_logp.defined() ? g_logp - g_lse : -g_lse;
    if (ctx->saved_data["ahead"].toBool() && !g_entropy.defined() && !g_penalty.defined()) {
      auto gh = saved[5] * dense.unsqueeze(1);
      if (g_lse.defined()) gh.addcmul_(wide(weight.index_select(0, ids), acc), (saved[6] * g_lse).unsqueeze(1));
      result[0] = gh.to(hidden.scalar_type());
      return result;
    }
    const bool filtered = std::any_of(saved.begin() + 7, saved.end(), [](const Tensor &t) { return t.defined(); });
    const auto operand = filtered ? wide : factor;
    const auto w = operand(weight, acc), all = operand(hidden, acc), b = wide(bias, acc);
    const auto wt = w.t();
    const auto options = w.options().dtype(acc);
    const int64_t m = hidden.size(0), v = weight.size(0);
    const auto pull = g_penalty.defined() ? g_penalty * (2 * penalty / v) : Tensor();
    Tensor gh = need_h ? at::empty(all.sizes(), options) : Tensor();
    Tensor gw = need_w ? (m == 0 ? at::zeros(w.sizes(), options) : at::empty(w.sizes(), options)) : Tensor();
    Tensor gb = need_b ? at::zeros({v}, options) : Tensor();
    bool first = true;
    const auto whole = buffer(0, std::min(m, set.rows), v, options);
    for (int64_t r = 0; r < m; r += set.rows) {
      const int64_t n = std::min(set.rows, m - r);
      const auto z = whole.narrow(0, 0, n), h = all.narrow(0, r, n), i = ids.narrow(0, r, n);
      auto part = [&](const Tensor &t) { return t.defined() ? t.narrow(0, r, n) : Tensor(); };
      if (const auto &words = saved[7 + r / set.rows]; words.defined()) {
        const auto own = g_logp.defined() ? own_slope_alone(set, h, w, b, i).mul_(part(g_logp)) : Tensor();
        if (need_w && first) gw.zero_();
        if (need_w) first = false;
        of_words(set, words, h, i, w, b, stats.narrow(0, r, n), own, part(dense), part(g_entropy), part(pull),
                 need_h ? gh.narrow(0, r, n) : Tensor(), gw, gb);
        continue;
      }
      set.logits(z, h, wt, b);
      const auto own = g_logp.defined() ? own_slope(z, i, set.inv_t, set.cap).mul_(part(g_logp)) : Tensor();
      const auto dz = slopes_of(z, w);
      row_grad(z, stats.narrow(0, r, n), set.inv_t, set.cap, part(dense), part(g_entropy), part(pull), dz);
      if (need_h) hidden_grad(gh.narrow(0, r, n), dz, i, own, w);
      if (!need_w && !need_b) continue;
      join(dz, i, own);
      if (need_b) gb.add_(dz.sum(0, false, acc));
      if (!need_w) continue;
      product(gw, dz.t(), h, !first);
      first = false;
    }
    if (need_h) result[0] = gh.to(hidden.scalar_type());
    if (need_w) result[1] = gw.to(weight.scalar_type());
    if (need_b) result[2] = gb.to(bias.scalar_type());
    return result;
  }
};

// The same from logits that exist already.
struct LogitLogprobs : torch::autograd::Function<LogitLogprobs> {
  static variable_list forward(AutogradContext *ctx, const Tensor &logits, const std::optional<Tensor> &ids,
                               bool entropy, bool in_place) {
    const auto z = logits.detach().to(rlhf::accumulation(logits)).contiguous();
    const auto i = ids.value_or(Tensor());
    auto logp = i.defined() ? at::empty({z.size(0)}, z.options()) : Tensor();
    auto stats = at::empty({z.size(0), rlhf::kStats}, z.options());
    row_stats(z, i, 1.0, entropy, stats, logp);
    ctx->set_materialize_grads(false);
    ctx->saved_data["in_place"] = in_place;
    ctx->save_for_backward({logits, i, stats});
    if (!i.defined()) return {stats.select(1, 2).clone()};
    return {logp};
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    rlhf::once_differentiable("token_logprobs");
    const auto saved = ctx->get_saved_variables();
    variable_list result(4);
    if (!grads[0].defined()) return result;
    const auto &logits = saved[0], &ids = saved[1], &stats = saved[2];
    const auto z = logits.detach().to(rlhf::accumulation(logits)).contiguous(), g = grads[0].contiguous();
    const bool over = ctx->saved_data["in_place"].toBool() && z.is_alias_of(logits);
    auto out = over ? z : at::empty_like(z);
    if (over) torch::autograd::impl::bump_version(logits); // whoever else saved them must know
    row_grad(z, stats, 1.0, 0.0, ids.defined() ? g : Tensor(), ids.defined() ? Tensor() : g, Tensor(), out);
    if (ids.defined()) join(out, ids, g);
    result[0] = out.to(logits.scalar_type());
    return result;
  }
};
} // namespace

// As in ffi.rs.
struct RlhfLogprobOptions {
  double temperature, softcap, filter, penalty; // 0 for none
  int64_t chunk_rows, chunk_words;     // 0 words: whole rows
  int64_t keep;                        // bytes; see Wanted
  int entropy, log_sum_exp, top1, moments;
};

// out: log-probabilities; then, null unless asked for, entropies, log-sum-exps, logit penalties, whether the id
// is the argmax, the largest log-probability, log Σ p², the mean of the logits. `bias` may be null.
RLHF_API char *rlhf_linear_logprobs(Tensor **out, const Tensor *hidden, const Tensor *weight, const Tensor *bias,
                                    const Tensor *ids, const RlhfLogprobOptions *o) {
  return rlhf::guard([&] {
    const bool trained = weight->requires_grad() || (bias && bias->requires_grad());
    const bool wanted = at::GradMode::is_enabled() && (trained || hidden->requires_grad());
    const bool ahead = wanted && !trained;
    const Linear set{1.0 / o->temperature, o->softcap, even_rows(hidden->size(0), o->chunk_rows), o->chunk_words};
    const auto b = bias ? std::optional<Tensor>(*bias) : std::nullopt;
    const auto i = ids->contiguous();
    Extras extras{o->top1 != 0, o->moments != 0, {}, {}, {}, {}};
    const Wanted what{o->entropy != 0, o->log_sum_exp != 0, o->penalty, ahead, wanted && trained ? o->keep : 0};
    const double filter = wanted ? o->filter : 0.0;
    auto r = set.words > 0 ? linear_tiles(*hidden, *weight, b, i, set, what, filter, &extras)
                           : LinearLogprobs::apply(*hidden, *weight, b, i, set, what, filter, &extras);
    size_t next = 0;
    out[0] = rlhf::give(r[next++]);
    if (o->entropy) out[1] = rlhf::give(r[next++]);
    if (o->log_sum_exp) out[2] = rlhf::give(r[next++]);
    if (o->penalty != 0) out[3] = rlhf::give(r[next++]);
    const Tensor *rest[] = {&extras.is_top1, &extras.top1_logprobs, &extras.log_sum_sq_probs, &extras.mean_logits};
    for (int i = 0; i < 4; ++i)
      if (rest[i]->defined()) out[4 + i] = rlhf::give(*rest[i]);
  });
}

// Log-probabilities of `ids`, or where that is null the entropies. `in_place`: backward writes over the logits.
RLHF_API char *rlhf_logit_logprobs(Tensor **out, const Tensor *logits, const Tensor *ids, int in_place) {
  return rlhf::guard([&] {
    const auto i = ids ? std::optional<Tensor>(ids->contiguous()) : std::nullopt;
    *out = rlhf::give(LogitLogprobs::apply(*logits, i, ids == nullptr, in_place != 0)[0]);
  });
}
