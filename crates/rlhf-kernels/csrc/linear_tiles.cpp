// log p(id) = log_softmax(cap(h·Wᵀ) / T)[id] on the CPU, in f32 or f64, a tile of rows and words at a time.
//
// A tile of logits stays in the cache between the product that makes it and the pass that reads it. Words are
// the outer loop, so that a block of the weight is widened once and its gradient is written once. A row's sums
// are carried from tile to tile; where its largest logit rises, what was added up shrinks by the same factor
// (as in Milakov and Gimelshein 2018, arXiv 1805.02867). Where only `hidden` wants a gradient, forward carries
// Σ exp(z)·W along in the same way, and backward recomputes nothing; nor does it where all logits are so few that
// they are kept.
//
// With filtering forward keeps the largest logit of each row in each run of 32 words. Once all sums are known that
// tells which runs no row of a chunk gives a probability of `filter`; backward leaves them out, and works on the
// rows of the weight that are left, gathered together (Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary
// Language Models", section 4.3). A chunk with more than half of the words left is computed in tiles.
#include "rows.h"
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <algorithm>

namespace rlhf {
namespace {
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Some words of the head: weight and bias in the type that sums are made in.
struct Block {
  int64_t begin, count;
  Tensor weight, bias;
};
template <class Body> void for_blocks(int64_t words, const Tensor &weight, const Tensor &bias, Body body) {
  const int64_t v = weight.size(0);
  const auto acc = accumulation(weight);
  const auto w = weight.detach();
  for (int64_t at = 0; at < v; at += words) {
    const int64_t n = std::min(words, v - at);
    Block block{at, n, w.narrow(0, at, n), wide(bias.defined() ? bias.detach().narrow(0, at, n) : bias, acc)};
    if (w.scalar_type() != acc) block.weight = buffer(1, n, w.size(1), w.options().dtype(acc)).copy_(block.weight);
    body(block);
  }
}
template <class Body> void for_rows(int64_t m, int64_t rows, Body body) {
  for (int64_t r = 0; r < m; r += rows) body(r, std::min(rows, m - r));
}
template <class T> T *data(const Tensor &t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; }

// Runs of words that are kept or left out together, counted from the beginning of each tile.
constexpr int64_t kRun = 32;
inline int64_t runs_of(int64_t words) { return (words + kRun - 1) / kRun; }

// The largest of each run of a row's v words.
template <class T> void run_tops(const T *z, int64_t v, T *tops) {
  for (int64_t at = 0; at < v; at += kRun, ++tops) {
    T lanes[16];
    std::fill(lanes, lanes + 16, (T)-INFINITY);
    const int64_t end = std::min(at + kRun, v);
    int64_t i = at;
    for (; i + 16 <= end; i += 16)
      for (int k = 0; k < 16; ++k) lanes[k] = z[i + k] > lanes[k] ? z[i + k] : lanes[k];
    for (; i < end; ++i) lanes[0] = z[i] > lanes[0] ? z[i] : lanes[0];
    *tops = *std::max_element(lanes, lanes + 16);
  }
}

// Takes a tile into its rows' sums; `mixture` [M,H], of which rows shrink where a logit rises, and `tops`, the largest
// logits of runs [M,runs] from run `run` on, may be undefined.
template <class T>
void take(const Tensor &tile, int64_t row, int64_t word, const FoldSettings &settings, std::vector<RowSums> &sums,
          const Tensor &ids, const Tensor &chosen, const Tensor &top1, const Tensor &mixture, const Tensor &tops,
          int64_t run) {
  const int64_t v = tile.size(1), width = mixture.defined() ? mixture.size(1) : 0;
  const int64_t *wanted = ids.const_data_ptr<int64_t>();
  T *z = data<T>(tile), *own = data<T>(chosen), *mixed = data<T>(mixture);
  bool *agrees = data<bool>(top1);
  at::parallel_for(0, tile.size(0), grain(v), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = row + i, id = wanted[at] - word;
      if (id >= 0 && id < v) own[at] = z[i * v + id];
      if (tops.defined()) run_tops(z + i * v, v, data<T>(tops) + at * tops.size(1) + run);
      auto &s = sums[at];
      const T factor = (T)fold(z + i * v, v, settings, &s);
      if (agrees && s.raised >= 0) agrees[at] = s.raised == id;
      if (mixed && factor != 1)
        for (int64_t j = 0; j < width; ++j) mixed[at * width + j] *= factor;
    }
  });
}
// The gradient of a tile of logits, without the chosen ids' own part, into `tile`, which may be the logits.
template <class T>
void slope(const Tensor &logits, const Tensor &tile, int64_t row, const Tensor &stats, double inv_t, double cap,
           const Tensor &g, const Tensor &ge, const Tensor &gq) {
  const int64_t v = tile.size(1);
  T *to = data<T>(tile);
  const T *z = logits.const_data_ptr<T>();
  const T *s = data<T>(stats), *gs = data<T>(g), *ges = data<T>(ge), *gqs = data<T>(gq);
  at::parallel_for(0, tile.size(0), grain(v), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      grad<T>(z + i * v, to + i * v, v, s + (row + i) * kStats, inv_t, cap, gs ? gs[row + i] : T(0),
              ges ? ges[row + i] : T(0), gqs ? gqs[row + i] : T(0));
  });
}
// Adds the chosen ids' own part.
template <class T> void join(const Tensor &tile, int64_t row, int64_t word, const Tensor &ids, const Tensor &own) {
  const int64_t v = tile.size(1);
  const int64_t *wanted = ids.const_data_ptr<int64_t>();
  T *z = data<T>(tile);
  const T *o = data<T>(own);
  for (int64_t i = 0; i < tile.size(0); ++i)
    if (const int64_t id = wanted[row + i] - word; id >= 0 && id < v) z[i * v + id] += o[row + i];
}
#define RLHF_TYPED(kind, call) ((kind) == at::kDouble ? call<double> : call<float>)

// Rows that are filtered together.
constexpr int64_t kFiltered = 128;

// The words of the runs that some of the rows r.. gives a probability of `filter`; undefined where they are more than
// half of all.
template <class T>
Tensor likely(const Tensor &tops, const Tensor &stats, int64_t r, int64_t n, int64_t v, const Linear &set, double filter,
              const Tensor &ids) {
  const int64_t runs = tops.size(1), each = runs_of(set.words);
  std::vector<uint8_t> kept(runs);
  for (int64_t i = r; i < r + n; ++i) {
    const T *top = data<T>(tops) + i * runs, *s = data<T>(stats) + i * kStats;
    const T least = (T)((std::log(filter) + s[1]) / set.inv_t + s[0]);
    for (int64_t k = 0; k < runs; ++k) kept[k] |= top[k] >= least;
  }
  std::vector<int64_t> words;
  for (int64_t k = 0; k < runs; ++k) {
    const int64_t tile = k / each * set.words, begin = tile + k % each * kRun;
    for (int64_t w = begin; kept[k] && w < std::min({begin + kRun, tile + set.words, v}); ++w) words.push_back(w);
  }
  const int64_t count = (int64_t)words.size();
  if (count * 2 > v) return {};
  auto out = at::empty({count}, ids.options());
  std::copy(words.begin(), words.end(), data<int64_t>(out));
  return out;
}

// What the gradients of the logits of some rows are made of, each [M] or undefined; see row_grad.
struct Slopes {
  Tensor own, dense, entropy, pull;
  Slopes of(int64_t r, int64_t n) const {
    auto part = [&](const Tensor &t) { return t.defined() ? t.narrow(0, r, n) : t; };
    return {part(own), part(dense), part(entropy), part(pull)};
  }
};

// The gradients that are wanted; undefined are those that are not.
struct Gradients {
  Tensor hidden, weight, bias;
};

// Gradients of the rows r.. in tiles, whose logits are computed where none are kept. The gradient of the weight is added
// to what is there, or takes its place.
void in_tiles(const Linear &set, const Tensor &h, const Tensor &weight, const Tensor &bias, const Tensor &ids,
              const Tensor &stats, const Slopes &of, int64_t first, int64_t rows, at::ArrayRef<Tensor> kept, bool onto,
              const Gradients &out) {
  size_t next = 0;
  const auto options = h.options();
  const auto acc = h.scalar_type();
  const bool apart = out.weight.defined() && out.weight.scalar_type() != acc;
  for_blocks(set.words, weight, bias, [&](const Block &b) {
    const auto part = out.weight.defined() ? out.weight.narrow(0, b.begin, b.count) : Tensor();
    const auto sum = apart ? buffer(2, b.count, h.size(1), options) : part;
    for_rows(rows, set.rows, [&](int64_t from, int64_t n) {
      const int64_t r = first + from;
      const auto z = buffer(0, n, b.count, options), x = h.narrow(0, r, n);
      if (kept.empty()) set.logits(z, x, b.weight.t(), b.bias);
      RLHF_TYPED(acc, slope)(kept.empty() ? z : kept[next++], z, r, stats, set.inv_t, set.cap, of.dense, of.entropy, of.pull);
      if (out.hidden.defined()) product(out.hidden.narrow(0, r, n), z, b.weight, b.begin > 0);
      if (!out.weight.defined() && !out.bias.defined()) return;
      if (of.own.defined()) RLHF_TYPED(acc, join)(z, r, b.begin, ids, of.own);
      if (out.bias.defined()) out.bias.narrow(0, b.begin, b.count).add_(z.sum(0));
      if (out.weight.defined()) product(sum, z.t(), x, from > 0 || (onto && !apart));
    });
    if (apart && rows > 0) onto ? part.add_(sum) : part.copy_(sum);
  });
  if (out.hidden.defined() && of.own.defined() && rows > 0) {
    const auto own = of.own.narrow(0, first, rows);
    add_own(out.hidden.narrow(0, first, rows), own, weight, ids.narrow(0, first, rows));
  }
}

// Gradients of all rows, of chunks of which some words alone are kept.
void filtered(const Linear &set, const Tensor &h, const Tensor &weight, const Tensor &bias, const Tensor &ids,
              const Tensor &stats, const Slopes &of, at::ArrayRef<Tensor> kept, const Gradients &out) {
  const int64_t m = h.size(0), chunks = (int64_t)kept.size();
  for (int64_t c = 0; c < chunks;) {
    int64_t end = c + 1;
    const int64_t r = c * kFiltered;
    if (!kept[c].defined()) {
      while (end < chunks && !kept[end].defined()) ++end;
      in_tiles(set, h, weight, bias, ids, stats, of, r, std::min(end * kFiltered, m) - r, {}, true, out);
    } else {
      const int64_t n = std::min(kFiltered, m - r);
      const auto part = of.of(r, n);
      of_words(set, kept[c], h.narrow(0, r, n), ids.narrow(0, r, n), weight, bias, stats.narrow(0, r, n), part.own,
               part.dense, part.entropy, part.pull, out.hidden.defined() ? out.hidden.narrow(0, r, n) : Tensor(),
               out.weight, out.bias);
    }
    c = end;
  }
}

// Gives logp, then the entropy, the log-sum-exp and the logit penalty where they are asked for.
struct LinearTiles : torch::autograd::Function<LinearTiles> {
  static variable_list forward(AutogradContext *ctx, const Tensor &hidden, const Tensor &weight,
                               const std::optional<Tensor> &bias, const Tensor &ids, Linear set, Wanted wanted,
                               double filter, Extras *extras) {
    const auto acc = accumulation(hidden);
    const auto h = wide(hidden, acc);
    const auto options = h.options();
    const int64_t m = h.size(0), v = weight.size(0);
    extras->prepare(m, options);
    auto logp = at::empty({m}, options), stats = at::empty({m, kStats}, options), own = at::empty({m}, options);
    auto fixed = wanted.ahead ? at::empty(h.sizes(), options) : Tensor();
    auto penalty = wanted.penalty != 0 ? at::empty({m}, options) : Tensor();
    const bool along = wanted.ahead && filter == 0;
    const bool keep = filter == 0 && m * v * (int64_t)h.element_size() <= wanted.keep;
    variable_list kept;
    const int64_t each = runs_of(set.words), tiles = (v + set.words - 1) / set.words;
    const auto tops = filter > 0 ? at::full({m, each * tiles}, -INFINITY, options) : Tensor();
    const FoldSettings settings{set.inv_t,     set.cap, wanted.entropy, extras->moments || penalty.defined(),
                                extras->top1, along};
    std::vector<RowSums> sums(m);
    for_blocks(set.words, weight, bias.value_or(Tensor()), [&](const Block &b) {
      for_rows(m, set.rows, [&](int64_t r, int64_t n) {
        const auto z = keep ? at::empty({n, b.count}, options) : buffer(0, n, b.count, options);
        if (keep) kept.push_back(z);
        set.logits(z, h.narrow(0, r, n), b.weight.t(), b.bias);
        RLHF_TYPED(acc, take)(z, r, b.begin, settings, sums, ids, own, extras->is_top1, along ? fixed : Tensor(), tops,
                              b.begin / set.words * each);
        if (along) product(fixed.narrow(0, r, n), z, b.weight, b.begin > 0);
      });
    });
    (acc == at::kDouble ? rows_done<double> : rows_done<float>)(sums, v, set, wanted, stats, own, logp, penalty, *extras);
    // The logits of all tiles, or with a filter the words of each run of rows.
    for (int64_t r = 0; filter > 0 && r < m; r += kFiltered)
      kept.push_back(RLHF_TYPED(acc, likely)(tops, stats, r, std::min(kFiltered, m - r), v, set, filter, ids));
    if (along) {
      fixed.mul_((stats.narrow(1, 3, 1) * -set.inv_t));
      add_own(fixed, own, weight, ids);
    } else if (wanted.ahead) {
      const Slopes one{own, at::full({m}, 1.0, options), {}, {}};
      filtered(set, h, weight.detach(), bias.value_or(Tensor()), ids, stats, one, kept, {fixed, {}, {}});
    }
    ctx->set_materialize_grads(false);
    set.save(ctx);
    ctx->saved_data["entropy"] = wanted.entropy;
    ctx->saved_data["lse"] = wanted.lse;
    ctx->saved_data["penalty"] = wanted.penalty;
    variable_list all{hidden, weight, bias.value_or(Tensor()), ids, stats, own, fixed};
    all.insert(all.end(), kept.begin(), kept.end());
    ctx->save_for_backward(std::move(all));
    ctx->saved_data["filtered"] = filter > 0;
    variable_list out{logp};
    if (wanted.entropy) out.push_back(stats.select(1, 2).clone());
    if (wanted.lse) out.push_back((stats.select(1, 0) * set.inv_t).add_(stats.select(1, 1)));
    if (penalty.defined()) out.push_back(penalty);
    return out;
  }

  // From the sums of all words; `own` holds the chosen logits and gets how much of a chosen id's gradient the
  // temperature and the cap let through.
  template <class T>
  static void rows_done(const std::vector<RowSums> &sums, int64_t v, const Linear &set, const Wanted &wanted,
                        const Tensor &stats, const Tensor &own, const Tensor &logp, const Tensor &penalty,
                        const Extras &extras) {
    T *st = data<T>(stats), *z = data<T>(own), *lp = data<T>(logp), *pen = data<T>(penalty);
    T *top = data<T>(extras.top1_logprobs), *squares = data<T>(extras.log_sum_sq_probs), *mean = data<T>(extras.mean_logits);
    for (size_t i = 0; i < sums.size(); ++i) {
      const auto &s = sums[i];
      const double log_sum = std::log(s.total);
      finish(s, wanted.entropy, st + i * kStats);
      lp[i] = (T)((z[i] - s.top) * set.inv_t - log_sum);
      const double squash = set.cap > 0 ? z[i] / set.cap : 0;
      z[i] = (T)(set.inv_t * (1 - squash * squash));
      if (top) top[i] = (T)-log_sum;
      if (squares) squares[i] = (T)(std::log(s.squares) - 2 * log_sum);
      if (mean) mean[i] = (T)(s.sum / v * set.inv_t);
      if (pen) pen[i] = (T)(wanted.penalty * s.energy / v * set.inv_t * set.inv_t);
    }
  }

  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    once_differentiable("linear_logprobs");
    const auto saved = ctx->get_saved_variables();
    const auto set = Linear::of(ctx);
    variable_list result(8);
    size_t next = 0;
    auto given = [&](bool there) {
      return there && grads[next++].defined() ? grads[next - 1].contiguous() : Tensor();
    };
    const auto g_logp = given(true), g_entropy = given(ctx->saved_data["entropy"].toBool()),
               g_lse = given(ctx->saved_data["lse"].toBool());
    const double penalty = ctx->saved_data["penalty"].toDouble();
    const auto g_penalty = given(penalty != 0);
    const auto &hidden = saved[0], &weight = saved[1], &bias = saved[2], &ids = saved[3], &stats = saved[4];
    const bool need_h = ctx->needs_input_grad(0), need_w = ctx->needs_input_grad(1);
    const bool need_b = bias.defined() && ctx->needs_input_grad(2);
    const bool any = g_logp.defined() || g_entropy.defined() || g_lse.defined() || g_penalty.defined();
    if (!any || (!need_h && !need_w && !need_b)) return result;
    // Of the softmax: what logp takes away, the log-sum-exp brings.
    const auto dense = !g_lse.defined() ? g_logp : g_logp.defined() ? g_logp - g_lse : -g_lse;
    const auto own = g_logp.defined() ? saved[5] * g_logp : Tensor();
    if (const auto &fixed = saved[6]; fixed.defined() && !g_entropy.defined() && !g_penalty.defined()) {
      auto gh = fixed * dense.unsqueeze(1);
      if (g_lse.defined()) add_own(gh, saved[5] * g_lse, weight, ids);
      result[0] = gh.to(hidden.scalar_type());
      return result;
    }
    const auto acc = accumulation(hidden);
    const auto h = wide(hidden, acc);
    const auto options = h.options();
    const int64_t m = h.size(0);
    const auto pull = g_penalty.defined() ? g_penalty * (2 * penalty / weight.size(0)) : Tensor();
    const bool filter = ctx->saved_data["filtered"].toBool(), empty = filter || m == 0;
    // Filtered rows add to a gradient of few words each, in the type that sums are made in.
    const auto like = filter ? weight.options().dtype(acc) : weight.options();
    const Gradients out{need_h ? at::empty(h.sizes(), options) : Tensor(),
                        !need_w ? Tensor() : empty ? at::zeros(weight.sizes(), like) : at::empty(weight.sizes(), like),
                        need_b ? at::zeros({weight.size(0)}, options) : Tensor()};
    const Slopes of{own, dense, g_entropy, pull};
    const auto w = weight.detach(), b = bias.defined() ? bias.detach() : bias;
    const auto kept = at::ArrayRef<Tensor>(saved).slice(7);
    if (filter) filtered(set, h, w, b, ids, stats, of, kept, out);
    else in_tiles(set, h, w, b, ids, stats, of, 0, m, kept, false, out);
    if (need_h) result[0] = out.hidden.to(hidden.scalar_type());
    if (need_w) result[1] = out.weight.to(weight.scalar_type());
    if (need_b) result[2] = out.bias.to(bias.scalar_type());
    return result;
  }
};
} // namespace

torch::autograd::variable_list linear_tiles(const Tensor &hidden, const Tensor &weight,
                                            const std::optional<Tensor> &bias, const Tensor &ids, Linear set,
                                            Wanted wanted, double filter, Extras *extras) {
  return LinearTiles::apply(hidden, weight, bias, ids, set, wanted, filter, extras);
}
} // namespace rlhf
