// The small operations of a transformer's layer on the CPU, in f32 or f64: each in one pass over its rows forward and in
// one backward, and keeping no more than its inputs.
#include "row_kernels.h"
#include "shim.h"
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
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

// x = a + b, or a itself where b is undefined, and y = x·w / √(mean x² + ε) over the last dimension.
struct AddNorm : torch::autograd::Function<AddNorm> {
  static variable_list forward(AutogradContext *ctx, const Tensor &a, const std::optional<Tensor> &b, const Tensor &w,
                               double eps) {
    const auto from = whole(a), more = whole(b.value_or(Tensor())), weight = whole(w);
    const bool sum = more.defined();
    const auto x = sum ? at::empty_like(from) : from;
    auto y = at::empty_like(from), roots = at::empty({from.numel() / weight.numel()}, from.options());
    RLHF_TYPED(from.scalar_type(), norm)(from, more, weight, eps, x, y, roots);
    ctx->set_materialize_grads(false);
    ctx->saved_data["sum"] = sum;
    // Without a sum x is the input itself, which goes on with what flows back to it through both.
    const auto out = sum || !a.is_contiguous() ? x : a;
    ctx->save_for_backward({out, w, roots});
    return {out, y};
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
    const auto x = whole(saved[0]), w = whole(saved[1]), &roots = saved[2];
    const auto g = grads[1].contiguous(), more = whole(grads[0]);
    const bool need_w = ctx->needs_input_grad(sum ? 2 : 1);
    auto dx = at::empty_like(x);
    auto parts = need_w ? at::zeros({(roots.numel() + kTogether - 1) / kTogether, w.numel()}, x.options()) : Tensor();
    RLHF_TYPED(x.scalar_type(), norm_grad)(g, x, w, roots, more, dx, parts);
    if (need_w) result[2] = parts.sum(0).view_as(w);
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

// gate·σ(gate)·up
struct SiluMul : torch::autograd::Function<SiluMul> {
  static Tensor forward(AutogradContext *ctx, const Tensor &gate, const Tensor &up) {
    const auto a = in_rows(gate), b = in_rows(up);
    auto y = at::empty(a.sizes(), a.options());
    RLHF_TYPED(a.scalar_type(), silu)(a, b, y);
    ctx->save_for_backward({gate, up});
    return y;
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

// x·Wᵀ for several W: what flows back to x is added up by the products.
struct Linears : torch::autograd::Function<Linears> {
  static variable_list forward(AutogradContext *ctx, const Tensor &x, at::TensorList weights) {
    variable_list out, saved{x};
    for (const auto &w : weights) {
      out.push_back(at::mm(x.detach(), w.detach().t()));
      saved.push_back(w);
    }
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(std::move(saved));
    return out;
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    rlhf::once_differentiable("linears");
    const auto saved = ctx->get_saved_variables();
    const auto x = saved[0].detach();
    variable_list result(saved.size());
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined()) continue;
      const auto &g = grads[i];
      if (ctx->needs_input_grad(0)) {
        const auto w = saved[1 + i].detach();
        if (result[0].defined()) result[0].addmm_(g, w);
        else result[0] = at::mm(g, w);
      }
      if (ctx->needs_input_grad(1 + i)) result[1 + i] = at::mm(g.t(), x);
    }
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
