// The small operations of a transformer's layer on the CPU, in f32 or f64: each in one pass over its rows forward and in
// one backward, and keeping no more than its inputs.
#include "product.h"
#include "row_kernels.h"
#include "shim.h"
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

namespace {
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class T> const rlhf::LayerKernels<T> &kernels();
template <> const rlhf::LayerKernels<float> &kernels<float>() { return rlhf::row_kernels().layer_f32; }
template <> const rlhf::LayerKernels<double> &kernels<double>() { return rlhf::row_kernels().layer_f64; }
template <class T> T *data(const Tensor &t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; }
template <class T> const T *input(const Tensor &t) { return t.defined() ? t.const_data_ptr<T>() : nullptr; }
#define RLHF_TYPED(kind, call) ((kind) == at::kDouble ? call<double> : call<float>)

int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1)); }
Tensor whole(const Tensor &t) { return t.defined() ? t.detach().contiguous() : t; }
// With unit stride in the last dimension.
Tensor in_rows(const Tensor &t) {
  const auto d = t.detach();
  return d.stride(-1) == 1 ? d : d.contiguous();
}

template <class T>
void norm(const Tensor &a, const Tensor &b, const Tensor &w, double eps, const Tensor &x, const Tensor &y, const Tensor &roots) {
  const int64_t d = w.numel(), n = roots.numel();
  at::parallel_for(0, n, grain(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      data<T>(roots)[i] = kernels<T>().norm(input<T>(a) + i * d, b.defined() ? input<T>(b) + i * d : nullptr, input<T>(w), d,
                                            (T)eps, b.defined() ? data<T>(x) + i * d : nullptr, data<T>(y) + i * d);
  });
}

// Rows whose parts of the weight's gradient are added up together, whatever the number of threads.
constexpr int64_t kTogether = 64;

template <class T>
void norm_grad(const Tensor &g, const Tensor &x, const Tensor &w, const Tensor &roots, const Tensor &more, const Tensor &dx,
               const Tensor &parts) {
  const int64_t d = w.numel(), n = roots.numel();
  at::parallel_for(0, (n + kTogether - 1) / kTogether, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      for (int64_t i = part * kTogether; i < std::min(n, (part + 1) * kTogether); ++i)
        kernels<T>().norm_grad(input<T>(g) + i * d, input<T>(x) + i * d, input<T>(w), input<T>(roots)[i], d,
                               more.defined() ? input<T>(more) + i * d : nullptr, data<T>(dx) + i * d,
                               parts.defined() ? data<T>(parts) + part * d : nullptr);
  });
}

struct Normed {
  Tensor x, y, roots;
};
Normed normed(const Tensor &a, const Tensor &b, const Tensor &w, double eps) {
  const auto from = whole(a), more = whole(b), weight = whole(w);
  const auto x = more.defined() ? at::empty_like(from) : from;
  auto y = at::empty_like(from), roots = at::empty({from.numel() / weight.numel()}, from.options());
  RLHF_TYPED(from.scalar_type(), norm)(from, more, weight, eps, x, y, roots);
  // Without a sum x is the input itself, which goes on with what flows back to it through both.
  return {more.defined() || !a.is_contiguous() ? x : a, y, roots};
}
// The gradients of x and of the weight, `more` being what flows back to x beside g.
std::pair<Tensor, Tensor> normed_back(const Tensor &g, const Tensor &x, const Tensor &w, const Tensor &roots, const Tensor &more,
                                      bool need_w) {
  auto dx = at::empty_like(x);
  auto parts = need_w ? at::zeros({(roots.numel() + kTogether - 1) / kTogether, w.numel()}, x.options()) : Tensor();
  RLHF_TYPED(x.scalar_type(), norm_grad)(g, x, w, roots, more, dx, parts);
  return {dx, need_w ? parts.sum(0).view_as(w) : Tensor()};
}

// x = a + b, or a itself where b is undefined, and y = x·w / √(mean x² + ε) over the last dimension.
struct AddNorm : torch::autograd::Function<AddNorm> {
  static variable_list forward(AutogradContext *ctx, const Tensor &a, const std::optional<Tensor> &b, const Tensor &w,
                               double eps) {
    const auto [x, y, roots] = normed(a, b.value_or(Tensor()), w, eps);
    ctx->set_materialize_grads(false);
    ctx->saved_data["sum"] = b.has_value();
    ctx->save_for_backward({x, w, roots});
    return {x, y};
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    rlhf::once_differentiable("add_norm");
    const auto saved = ctx->get_saved_variables();
    const bool sum = ctx->saved_data["sum"].toBool();
    variable_list result(4);
    auto pass = [&](const Tensor &t) {
      result[0] = t;
      if (sum) result[1] = t;
      return result;
    };
    if (!grads[1].defined()) return pass(grads[0]);
    const auto [dx, dw] = normed_back(grads[1].contiguous(), whole(saved[0]), whole(saved[1]), saved[2], whole(grads[0]),
                                      ctx->needs_input_grad(sum ? 2 : 1));
    result[2] = dw;
    return pass(dx);
  }
};

template <class T> void silu(const Tensor &gate, const Tensor &up, const Tensor &y) {
  const int64_t n = gate.size(0), d = gate.size(1);
  at::parallel_for(0, n, grain(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels<T>().silu(input<T>(gate) + i * gate.stride(0), input<T>(up) + i * up.stride(0), d, data<T>(y) + i * d);
  });
}
template <class T>
void silu_grad(const Tensor &gate, const Tensor &up, const Tensor &g, const Tensor &to_gate, const Tensor &to_up) {
  const int64_t n = gate.size(0), d = gate.size(1);
  at::parallel_for(0, n, grain(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels<T>().silu_grad(input<T>(gate) + i * gate.stride(0), input<T>(up) + i * up.stride(0), input<T>(g) + i * d, d,
                             data<T>(to_gate) + i * d, data<T>(to_up) + i * d);
  });
}

Tensor gated(const Tensor &gate, const Tensor &up) {
  auto y = at::empty(gate.sizes(), gate.options());
  RLHF_TYPED(gate.scalar_type(), silu)(gate, up, y);
  return y;
}

// gate·σ(gate)·up
struct SiluMul : torch::autograd::Function<SiluMul> {
  static Tensor forward(AutogradContext *ctx, const Tensor &gate, const Tensor &up) {
    ctx->save_for_backward({gate, up});
    return gated(in_rows(gate), in_rows(up));
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    rlhf::once_differentiable("silu_mul");
    const auto saved = ctx->get_saved_variables();
    const auto a = in_rows(saved[0]), b = in_rows(saved[1]), g = grads[0].contiguous();
    auto to_gate = at::empty(a.sizes(), a.options()), to_up = at::empty(a.sizes(), a.options());
    RLHF_TYPED(a.scalar_type(), silu_grad)(a, b, g, to_gate, to_up);
    return {to_gate, to_up};
  }
};

// (gate·σ(gate)·up)·Wᵀ: what is between the products is computed again in backward.
struct SiluMulLinear : torch::autograd::Function<SiluMulLinear> {
  static Tensor forward(AutogradContext *ctx, const Tensor &gate, const Tensor &up, const Tensor &w) {
    ctx->save_for_backward({gate, up, w});
    return rlhf::product(gated(in_rows(gate), in_rows(up)), w.detach().t());
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    rlhf::once_differentiable("silu_mul_linear");
    const auto saved = ctx->get_saved_variables();
    const auto a = in_rows(saved[0]), b = in_rows(saved[1]), w = saved[2].detach(), &g = grads[0];
    variable_list result(3);
    auto inner = gated(a, b);
    if (ctx->needs_input_grad(2)) result[2] = rlhf::product(g.t(), inner);
    if (ctx->needs_input_grad(0) || ctx->needs_input_grad(1)) {
      // `inner` is done with, and a number that flows back is read before its place is written.
      const auto back = rlhf::product(g, w);
      RLHF_TYPED(a.scalar_type(), silu_grad)(a, b, back, inner, back);
      result[0] = inner;
      result[1] = back;
    }
    return result;
  }
};

template <class T> void turn(const Tensor &x, const Tensor &cos, const Tensor &sin, bool back, const Tensor &y) {
  const int64_t n = x.size(0), heads = x.size(1), d = x.size(2), turning = cos.size(-1);
  at::parallel_for(0, n, grain(heads * d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T *s = input<T>(sin) + i * turning, *low = back ? s + turning / 2 : s, *high = back ? s : s + turning / 2;
      for (int64_t h = 0; h < heads; ++h)
        kernels<T>().rotate(input<T>(x) + i * x.stride(0) + h * x.stride(1), input<T>(cos) + i * turning, low, high, turning,
                            d, data<T>(y) + (i * heads + h) * d);
    }
  });
}

// The first D' of a head's D numbers turn by x·cos + roll(x, D'/2)·sin.
struct Rotate : torch::autograd::Function<Rotate> {
  static Tensor of(const Tensor &x, const Tensor &cos, const Tensor &sin, bool back) {
    const auto rows = in_rows(x);
    auto y = at::empty(rows.sizes(), rows.options());
    RLHF_TYPED(rows.scalar_type(), turn)(rows, whole(cos), whole(sin), back, y);
    return y;
  }
  static Tensor forward(AutogradContext *ctx, const Tensor &x, const Tensor &cos, const Tensor &sin) {
    ctx->save_for_backward({cos, sin});
    return of(x, cos, sin, false);
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    rlhf::once_differentiable("rotate");
    const auto saved = ctx->get_saved_variables();
    return {of(grads[0], saved[0], saved[1], true), Tensor(), Tensor()};
  }
};

// The gradients of x, where wanted, and of each W of x·Wᵀ for several W, the first of which is the input of that number:
// those of x are added up by the products. `x` is asked for where a weight's is wanted.
template <class X>
variable_list linears_back(AutogradContext *ctx, const X &x, const variable_list &weights, const variable_list &grads,
                           bool need_x, size_t first) {
  variable_list result(1 + weights.size());
  auto &dx = result[0];
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto &g = grads[i];
    if (!g.defined()) continue;
    if (need_x) {
      const auto w = weights[i].detach();
      if (dx.defined()) rlhf::product(dx, g, w, true);
      else dx = rlhf::product(g, w);
    }
    if (ctx->needs_input_grad(first + i)) result[1 + i] = rlhf::product(g.t(), x());
  }
  return result;
}

// x·Wᵀ for several W.
struct Linears : torch::autograd::Function<Linears> {
  static variable_list forward(AutogradContext *ctx, const Tensor &x, at::TensorList weights) {
    variable_list out, saved{x};
    for (const auto &w : weights) {
      out.push_back(rlhf::product(x.detach(), w.detach().t()));
      saved.push_back(w);
    }
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(std::move(saved));
    return out;
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    rlhf::once_differentiable("linears");
    const auto saved = ctx->get_saved_variables();
    const variable_list weights(saved.begin() + 1, saved.end());
    return linears_back(ctx, [&] { return saved[0].detach(); }, weights, grads, ctx->needs_input_grad(0), 1);
  }
};

// The x of AddNorm and y·Wᵀ for several W; y is computed again in backward.
struct NormLinears : torch::autograd::Function<NormLinears> {
  static variable_list forward(AutogradContext *ctx, const Tensor &a, const std::optional<Tensor> &b, const Tensor &w,
                               at::TensorList weights, double eps) {
    const auto [x, y, roots] = normed(a, b.value_or(Tensor()), w, eps);
    variable_list out{x}, saved{x, w, roots};
    for (const auto &one : weights) {
      out.push_back(rlhf::product(y, one.detach().t()));
      saved.push_back(one);
    }
    ctx->set_materialize_grads(false);
    ctx->saved_data["sum"] = b.has_value();
    ctx->saved_data["eps"] = eps;
    ctx->save_for_backward(std::move(saved));
    return out;
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    rlhf::once_differentiable("norm_linears");
    const auto saved = ctx->get_saved_variables();
    const bool sum = ctx->saved_data["sum"].toBool();
    const auto x = whole(saved[0]), w = whole(saved[1]);
    // An absent b has its place among the results, but is not counted among the inputs.
    const size_t at = sum ? 2 : 1;
    Tensor y;
    const auto again = [&] {
      if (!y.defined()) y = normed(x, Tensor(), w, ctx->saved_data["eps"].toDouble()).y;
      return y;
    };
    const variable_list weights(saved.begin() + 3, saved.end()), back(grads.begin() + 1, grads.end());
    const bool need_x = ctx->needs_input_grad(0) || (sum && ctx->needs_input_grad(1)) || ctx->needs_input_grad(at);
    const auto products = linears_back(ctx, again, weights, back, need_x, at + 1);
    Tensor dx = grads[0], dw;
    if (products[0].defined())
      std::tie(dx, dw) = normed_back(products[0], x, w, saved[2], whole(grads[0]), ctx->needs_input_grad(at));
    variable_list result{dx, sum ? dx : Tensor(), dw};
    result.insert(result.end(), products.begin() + 1, products.end());
    result.emplace_back();
    return result;
  }
};
} // namespace

// out: x and y. `more` may be null.
RLHF_API char *rlhf_add_norm(Tensor **out, const Tensor *x, const Tensor *more, const Tensor *weight, double eps) {
  return rlhf::guard([&] {
    const auto r = AddNorm::apply(*x, more ? std::optional<Tensor>(*more) : std::nullopt, *weight, eps);
    out[0] = rlhf::give(r[0]);
    out[1] = rlhf::give(r[1]);
  });
}
RLHF_API char *rlhf_silu_mul(Tensor **out, const Tensor *gate, const Tensor *up) {
  return rlhf::guard([&] { *out = rlhf::give(SiluMul::apply(*gate, *up)); });
}
RLHF_API char *rlhf_silu_mul_linear(Tensor **out, const Tensor *gate, const Tensor *up, const Tensor *weight) {
  return rlhf::guard([&] { *out = rlhf::give(SiluMulLinear::apply(*gate, *up, *weight)); });
}
RLHF_API char *rlhf_rotate(Tensor **out, const Tensor *x, const Tensor *cos, const Tensor *sin) {
  return rlhf::guard([&] { *out = rlhf::give(Rotate::apply(*x, *cos, *sin)); });
}
// out[n]
RLHF_API char *rlhf_linears(Tensor **out, const Tensor *x, const Tensor *const *weights, int64_t n) {
  return rlhf::guard([&] {
    variable_list list;
    for (int64_t i = 0; i < n; ++i) list.push_back(*weights[i]);
    const auto r = Linears::apply(*x, at::TensorList(list));
    for (int64_t i = 0; i < n; ++i) out[i] = rlhf::give(r[i]);
  });
}
// out[1 + n]: x, then the products. `more` may be null.
RLHF_API char *rlhf_norm_linears(Tensor **out, const Tensor *x, const Tensor *more, const Tensor *norm, double eps,
                                 const Tensor *const *weights, int64_t n) {
  return rlhf::guard([&] {
    variable_list list;
    for (int64_t i = 0; i < n; ++i) list.push_back(*weights[i]);
    const auto r = NormLinears::apply(*x, more ? std::optional<Tensor>(*more) : std::nullopt, *norm, at::TensorList(list), eps);
    for (int64_t i = 0; i <= n; ++i) out[i] = rlhf::give(r[i]);
  });
}
