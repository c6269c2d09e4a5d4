// Attention over packed groups: a completion sees its prompt and its own past.
//
// One task is one group and one key head, so no two tasks write the same gradient. The prompt's keys
// and values are laid out once a task, however many completions look at them; scores exist for a
// block of rows at a time. The arithmetic is in cpu_kernels.cpp.
#include "cpu_kernels.h"
#include "shim.h"
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

namespace {
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Ints = std::vector<int64_t>;

// `flat`: for each group prompt start, prompt end, the completions' count, then their starts and ends.
std::vector<rlhf::Group> groups_of(const Ints &flat) {
  std::vector<rlhf::Group> all;
  for (size_t i = 0; i + 2 < flat.size(); i += 3 + 2 * flat[i + 2])
    all.push_back({flat[i], flat[i + 1], flat[i + 2], flat.data() + i + 3});
  return all;
}

Tensor unit_stride(const Tensor &t) {
  const auto d = t.detach();
  return d.stride(2) == 1 ? d : d.contiguous();
}

struct Options {
  double scale, cap;
  int64_t window;
};

template <class T>
rlhf::Attention<T> arguments(const Tensor &q, const Tensor &k, const Tensor &v, Tensor &out, Tensor &norms, Options o) {
  rlhf::Attention<T> a{};
  a.q = q.const_data_ptr<T>(), a.k = k.const_data_ptr<T>(), a.v = v.const_data_ptr<T>();
  a.q_row = q.stride(0), a.q_head = q.stride(1);
  a.k_row = k.stride(0), a.k_head = k.stride(1);
  a.v_row = v.stride(0), a.v_head = v.stride(1);
  a.hq = q.size(1), a.hkv = k.size(1), a.d = q.size(2), a.scale = o.scale, a.cap = o.cap, a.window = o.window;
  a.out = out.mutable_data_ptr<T>(), a.norms = norms.mutable_data_ptr<T>();
  return a;
}

template <class T, class Kernel> void run(const rlhf::Attention<T> &a, const Ints &flat, Kernel kernel) {
  const auto groups = groups_of(flat);
  at::parallel_for(0, (int64_t)groups.size() * a.hkv, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel(a, groups[i / a.hkv], i % a.hkv);
  });
}

struct PrefixAttention : torch::autograd::Function<PrefixAttention> {
  static Tensor forward(AutogradContext *ctx, const Tensor &q, const Tensor &k, const Tensor &v, Ints flat,
                        Options o) {
    const auto qs = unit_stride(q), ks = unit_stride(k), vs = unit_stride(v);
    auto out = at::empty(q.sizes(), q.options()), norms = at::empty({q.size(0), q.size(1), 2}, q.options());
    if (q.scalar_type() == at::kDouble)
      run(arguments<double>(qs, ks, vs, out, norms, o), flat, rlhf::cpu_kernels().attend_f64);
    else
      run(arguments<float>(qs, ks, vs, out, norms, o), flat, rlhf::cpu_kernels().attend_f32);
    ctx->save_for_backward({qs, ks, vs, out, norms});
    ctx->saved_data["flat"] = std::move(flat);
    ctx->saved_data["scale"] = o.scale;
    ctx->saved_data["cap"] = o.cap;
    ctx->saved_data["window"] = o.window;
    return out;
  }

  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    rlhf::once_differentiable("shared_prefix_attention");
    const auto saved = ctx->get_saved_variables();
    const auto &q = saved[0], &k = saved[1], &v = saved[2];
    auto out = saved[3], norms = saved[4];
    const auto flat = ctx->saved_data["flat"].toIntVector();
    const Options o{ctx->saved_data["scale"].toDouble(), ctx->saved_data["cap"].toDouble(),
                    ctx->saved_data["window"].toInt()};
    const auto go = grads[0].contiguous();
    auto gq = at::empty(q.sizes(), q.options()), gk = at::zeros(k.sizes(), k.options()), gv = at::zeros(v.sizes(), v.options());
    auto backwards = [&](auto a, auto kernel) {
      using T = std::remove_pointer_t<decltype(a.gq)>;
      a.grad = go.const_data_ptr<T>();
      a.gq = gq.mutable_data_ptr<T>(), a.gk = gk.mutable_data_ptr<T>(), a.gv = gv.mutable_data_ptr<T>();
      run(a, flat, kernel);
    };
    if (q.scalar_type() == at::kDouble)
      backwards(arguments<double>(q, k, v, out, norms, o), rlhf::cpu_kernels().attend_grad_f64);
    else
      backwards(arguments<float>(q, k, v, out, norms, o), rlhf::cpu_kernels().attend_grad_f32);
    return {gq, gk, gv, Tensor(), Tensor()};
  }
};
} // namespace

RLHF_API char *rlhf_prefix_attention(Tensor **out, const Tensor *q, const Tensor *k, const Tensor *v,
                                     const int64_t *flat, int64_t n, double scale, double cap, int64_t window) {
  return rlhf::guard([&] {
    *out = rlhf::give(PrefixAttention::apply(*q, *k, *v, Ints(flat, flat + n), Options{scale, cap, window}));
  });
}
