// Sums, repeats and scans over sequences laid end to end. Each of the three is linear, so its backward is
// one of them again and derivatives of any order exist. On the CPU sums are made in f64, a sequence at a
// time and sequences in parallel; on GPUs by kernels, a block a sequence; elsewhere by libtorch's own operations.
#include "cuda.h"
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/zeros.h>
#include <string>
#include <torch/csrc/autograd/custom_function.h>

namespace {
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Offsets = std::vector<int64_t>;

bool fast(const Tensor &x) {
  return x.is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble);
}
bool on_gpu(const Tensor &x) {
  return (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble) && rlhf::cuda::ready(x);
}
// Launches NAME_f32 or NAME_f64 with a block for each sequence.
template <class... A> void run(const Tensor &x, const char *name, const Offsets &o, int threads, A... a) {
  const auto kernel = std::string(name) + (x.scalar_type() == at::kFloat ? "_f32" : "_f64");
  rlhf::cuda::run(x, kernel.c_str(), static_cast<int64_t>(o.size()) - 1, threads, a...);
}
int64_t segments(const Offsets &o) { return static_cast<int64_t>(o.size()) - 1; }

// body(T*) for the tensor's type.
template <class F> void by_type(const Tensor &x, F &&body) {
  if (x.scalar_type() == at::kFloat) body(float{});
  else body(double{});
}
// body(first, last) over sequences, about 8192 values a piece.
template <class F> void over(const Offsets &o, F &&body) {
  const int64_t s = segments(o), grain = std::max<int64_t>(1, 8192 * s / std::max<int64_t>(o.back(), 1));
  at::parallel_for(0, s, grain, body);
}
// The sequence of each value.
Tensor owners(const Offsets &o, const Tensor &like) {
  const auto ends = rlhf::cuda::upload(o, like);
  const auto lengths = ends.narrow(0, 1, segments(o)) - ends.narrow(0, 0, segments(o));
  return at::repeat_interleave(lengths, std::optional<int64_t>(o.back())); // a bare number would be another function
}

Tensor sum(const Tensor &x, const Offsets &o) {
  if (on_gpu(x)) {
    auto out = at::empty({segments(o)}, x.options());
    const auto at = rlhf::cuda::upload(o, x);
    run(x, "sum", o, 128, x.const_data_ptr(), at.const_data_ptr<int64_t>(), out.mutable_data_ptr());
    return out;
  }
  if (!fast(x)) return at::zeros({segments(o)}, x.options()).index_add(0, owners(o, x), x);
  auto out = at::empty({segments(o)}, x.options());
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const T *from = x.const_data_ptr<T>();
    T *to = out.mutable_data_ptr<T>();
    over(o, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        double lanes[8] = {};
        int64_t i = o[s];
        for (; i + 8 <= o[s + 1]; i += 8)
          for (int k = 0; k < 8; ++k) lanes[k] += from[i + k];
        double total = 0;
        for (; i < o[s + 1]; ++i) total += from[i];
        for (double lane : lanes) total += lane;
        to[s] = static_cast<T>(total);
      }
    });
  });
  return out;
}

Tensor repeat(const Tensor &x, const Offsets &o) {
  if (on_gpu(x)) {
    auto out = at::empty({o.back()}, x.options());
    const auto at = rlhf::cuda::upload(o, x);
    run(x, "repeat", o, 128, x.const_data_ptr(), at.const_data_ptr<int64_t>(), out.mutable_data_ptr());
    return out;
  }
  if (!fast(x)) return x.index_select(0, owners(o, x));
  auto out = at::empty({o.back()}, x.options());
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const T *from = x.const_data_ptr<T>();
    T *to = out.mutable_data_ptr<T>();
    over(o, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) std::fill(to + o[s], to + o[s + 1], from[s]);
    });
  });
  return out;
}

// y_t = x_t + decay·y of the neighbour before (or, in reverse, after) within the sequence. Elsewhere than
// on the CPU, or where `doubling` asks for it, by doubling: log₂ of the longest sequence passes.
Tensor scan(const Tensor &x, const Offsets &o, double decay, bool reverse, bool doubling = false) {
  const int64_t m = o.back();
  if (!doubling && on_gpu(x)) {
    auto out = at::empty({m}, x.options());
    const auto at = rlhf::cuda::upload(o, x);
    run(x, "scan", o, 32, x.const_data_ptr(), at.const_data_ptr<int64_t>(), decay, static_cast<int>(reverse),
        out.mutable_data_ptr());
    return out;
  }
  if (doubling || !fast(x)) {
    int64_t longest = 0;
    for (int64_t s = 0; s < segments(o); ++s) longest = std::max(longest, o[s + 1] - o[s]);
    auto y = reverse ? x.flip(0) : x;
    auto ids = owners(o, x);
    if (reverse) ids = ids.flip(0);
    for (int64_t step = 1; step < longest; step *= 2) {
      const auto same = ids.narrow(0, step, m - step) == ids.narrow(0, 0, m - step);
      const auto more = y.narrow(0, 0, m - step) * same * std::pow(decay, step);
      y = at::cat({y.narrow(0, 0, step), y.narrow(0, step, m - step) + more});
    }
    return reverse ? y.flip(0) : y.clone();
  }
  auto out = at::empty({m}, x.options());
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const T *from = x.const_data_ptr<T>();
    T *to = out.mutable_data_ptr<T>();
    over(o, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        double y = 0;
        if (reverse)
          for (int64_t i = o[s + 1] - 1; i >= o[s]; --i) to[i] = static_cast<T>(y = from[i] + decay * y);
        else
          for (int64_t i = o[s]; i < o[s + 1]; ++i) to[i] = static_cast<T>(y = from[i] + decay * y);
      }
    });
  });
  return out;
}

struct Repeat;
struct Sum : torch::autograd::Function<Sum> {
  static Tensor forward(AutogradContext *ctx, const Tensor &x, const Offsets &o) {
    ctx->saved_data["offsets"] = o;
    return sum(x.detach().contiguous(), o);
  }
  static variable_list backward(AutogradContext *ctx, variable_list g);
};
struct Repeat : torch::autograd::Function<Repeat> {
  static Tensor forward(AutogradContext *ctx, const Tensor &x, const Offsets &o) {
    ctx->saved_data["offsets"] = o;
    return repeat(x.detach().contiguous(), o);
  }
  static variable_list backward(AutogradContext *ctx, variable_list g) {
    return {Sum::apply(g[0], ctx->saved_data["offsets"].toIntVector()), Tensor()};
  }
};
variable_list Sum::backward(AutogradContext *ctx, variable_list g) {
  return {Repeat::apply(g[0], ctx->saved_data["offsets"].toIntVector()), Tensor()};
}
struct Scan : torch::autograd::Function<Scan> {
  static Tensor forward(AutogradContext *ctx, const Tensor &x, const Offsets &o, double decay, bool reverse) {
    ctx->saved_data["offsets"] = o;
    ctx->saved_data["decay"] = decay;
    ctx->saved_data["reverse"] = reverse;
    return scan(x.detach().contiguous(), o, decay, reverse);
  }
  static variable_list backward(AutogradContext *ctx, variable_list g) {
    const auto x = Scan::apply(g[0], ctx->saved_data["offsets"].toIntVector(), ctx->saved_data["decay"].toDouble(),
                               !ctx->saved_data["reverse"].toBool());
    return {x, Tensor(), Tensor(), Tensor()};
  }
};
} // namespace

// offsets: n + 1 numbers. `op`: 0 the sums, 1 the repeats.
RLHF_API char *rlhf_segments(Tensor **out, const Tensor *x, const int64_t *offsets, int64_t n, int op) {
  return rlhf::guard([&] {
    const Offsets o(offsets, offsets + n + 1);
    *out = rlhf::give(op == 0 ? Sum::apply(*x, o) : Repeat::apply(*x, o));
  });
}

RLHF_API char *rlhf_scan(Tensor **out, const Tensor *x, const int64_t *offsets, int64_t n, double decay, int reverse) {
  return rlhf::guard([&] {
    *out = rlhf::give(Scan::apply(*x, Offsets(offsets, offsets + n + 1), decay, reverse != 0));
  });
}

// Of f32 or f64 values [M] on the CPU or a GPU that has kernels, no gradients: out[0] by `op` 0 deviations from the
// mean, 1 those over (std + epsilon), 2 n/(n − 1) times them; out[1] the deviations with divisor n − correction, [S]. Equal
// values give exactly 0, as the first is taken away before the mean is.
RLHF_API char *rlhf_statistics(Tensor **out, const Tensor *x, const int64_t *offsets, int64_t n, int op, double epsilon,
                               double correction) {
  return rlhf::guard([&] {
    const Offsets o(offsets, offsets + n + 1);
    const auto from = x->detach().contiguous();
    auto values = at::empty_like(from), deviations = at::empty({n}, from.options());
    if (from.is_cuda()) {
      const auto at = rlhf::cuda::upload(o, from);
      run(from, "statistics", o, 128, from.const_data_ptr(), at.const_data_ptr<int64_t>(), op, epsilon, correction,
          values.mutable_data_ptr(), deviations.mutable_data_ptr());
      out[0] = rlhf::give(values);
      out[1] = rlhf::give(deviations);
      return;
    }
    by_type(from, [&](auto zero) {
      using T = decltype(zero);
      const T *p = from.const_data_ptr<T>();
      T *to = values.mutable_data_ptr<T>(), *spread = deviations.mutable_data_ptr<T>();
      over(o, [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) {
          const int64_t count = o[s + 1] - o[s];
          const T *row = p + o[s];
          double sums[8] = {}, squares[8] = {}, shift = 0, square = 0;
          for (int64_t i = 0; i < count; ++i) sums[i % 8] += static_cast<double>(row[i]) - row[0];
          for (double sum : sums) shift += sum;
          if (count > 0) shift /= count;
          for (int64_t i = 0; i < count; ++i) {
            const double d = static_cast<double>(row[i]) - row[0] - shift;
            squares[i % 8] += d * d;
          }
          for (double part : squares) square += part;
          const double divisor = count - correction, deviation = divisor > 0 ? std::sqrt(square / divisor) : 0.0;
          const double scale = op == 0   ? 1.0
                               : op == 2 ? static_cast<double>(count) / std::max<int64_t>(count - 1, 1)
                               : deviation > 0 ? 1.0 / (deviation + epsilon)
                                               : 1.0;
          spread[s] = static_cast<T>(deviation);
          for (int64_t i = 0; i < count; ++i)
            to[o[s] + i] = static_cast<T>((static_cast<double>(row[i]) - row[0] - shift) * scale);
        }
      });
    });
    out[0] = rlhf::give(values);
    out[1] = rlhf::give(deviations);
  });
}

// Generalised advantages: out[0] advantages, out[1] returns, of rewards' type; in f64 within a sequence.
// `doubling` takes other devices' way on the CPU, for tests.
RLHF_API char *rlhf_gae(Tensor **out, const Tensor *rewards, const Tensor *values, const int64_t *offsets, int64_t n,
                        double gamma, double lambda, int doubling) {
  return rlhf::guard([&] {
    c10::AutoGradMode off(false);
    const Offsets o(offsets, offsets + n + 1);
    const auto acc = rlhf::accumulation(*rewards);
    const auto r = rewards->detach().to(acc).contiguous(), v = values->detach().to(acc).contiguous();
    auto a = at::empty_like(r), g = at::empty_like(r);
    if (!doubling && on_gpu(r)) {
      const auto at = rlhf::cuda::upload(o, r);
      run(r, "gae", o, 32, r.const_data_ptr(), v.const_data_ptr(), at.const_data_ptr<int64_t>(), gamma, lambda,
          a.mutable_data_ptr(), g.mutable_data_ptr());
    } else if (fast(r) && !doubling) {
      by_type(r, [&](auto zero) {
        using T = decltype(zero);
        const T *rp = r.const_data_ptr<T>(), *vp = v.const_data_ptr<T>();
        T *ap = a.mutable_data_ptr<T>(), *gp = g.mutable_data_ptr<T>();
        over(o, [&](int64_t begin, int64_t end) {
          for (int64_t s = begin; s < end; ++s) {
            double next_value = 0, next = 0;
            for (int64_t t = o[s + 1] - 1; t >= o[s]; --t) {
              const double value = vp[t], delta = rp[t] + gamma * next_value - value;
              next = delta + gamma * lambda * next;
              next_value = value;
              ap[t] = static_cast<T>(next);
              gp[t] = static_cast<T>(next + value);
            }
          }
        });
      });
    } else if (const int64_t m = o.back(); m > 0) {
      const auto ids = owners(o, r);
      const auto after = v.narrow(0, 1, m - 1) * (ids.narrow(0, 1, m - 1) == ids.narrow(0, 0, m - 1));
      const auto delta = r - v + at::cat({after, at::zeros({1}, v.options())}) * gamma;
      a = scan(delta, o, gamma * lambda, true, true);
      g = a + v;
    }
    out[0] = rlhf::give(a.to(rewards->scalar_type()));
    out[1] = rlhf::give(g.to(rewards->scalar_type()));
  });
}
