// The clipped surrogate in one pass: loss, statistics and the gradient of each token, which backward only
// multiplies. Runs of at most 1024 tokens are added up in their order, so the result does not depend on
// the number of threads.
#include "cuda.h"
#include "loss_kernels.h"
#include "shim.h"
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/csrc/autograd/custom_function.h>

namespace {
using namespace rlhf;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Inputs {
  Tensor old, advantages, weights, ref;
  std::vector<int64_t> offsets;
  SurrogateSettings settings;
  bool by_completion, sequence_mean;
  double *sums;
};

struct Run {
  int64_t begin, end, completion;
};

template <class T> void compute(const Tensor &logp, const Inputs &in, Tensor grad) {
  std::vector<Run> runs;
  for (int64_t s = 0; s + 1 < (int64_t)in.offsets.size(); ++s)
    for (int64_t t = in.offsets[s]; t < in.offsets[s + 1]; t += 1024)
      runs.push_back({t, std::min(t + 1024, in.offsets[s + 1]), s});
  std::vector<double> parts(runs.size() * kSurrogateSums);
  auto data = [](const Tensor &t) { return t.defined() ? t.const_data_ptr<T>() : nullptr; };
  auto plus = [](const T *p, int64_t by) { return p ? p + by : nullptr; };
  const T *lp = data(logp), *old = data(in.old), *a = data(in.advantages), *w = data(in.weights), *ref = data(in.ref);
  T *g = grad.mutable_data_ptr<T>();
  const int64_t average = runs.empty() ? 1 : std::max<int64_t>(1, logp.size(0) / (int64_t)runs.size());
  const auto &kernels = loss_kernels();
  at::parallel_for(0, runs.size(), std::max<int64_t>(1, 4096 / average), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const auto &r = runs[i];
      const int64_t length = in.offsets[r.completion + 1] - in.offsets[r.completion];
      const SurrogateTokens<T> x{lp + r.begin,
                                 old + r.begin,
                                 a + (in.by_completion ? r.completion : r.begin),
                                 plus(w, r.begin),
                                 plus(ref, r.begin),
                                 g + r.begin,
                                 r.end - r.begin,
                                 in.by_completion ? 0 : 1,
                                 in.sequence_mean ? 1.0 / length : 1.0};
      if constexpr (std::is_same_v<T, float>) kernels.surrogate_f32(x, in.settings, &parts[i * kSurrogateSums]);
      else kernels.surrogate_f64(x, in.settings, &parts[i * kSurrogateSums]);
    }
  });
  std::fill(in.sums, in.sums + kSurrogateSums, 0.0);
  for (size_t i = 0; i < runs.size(); ++i)
    for (int k = 0; k < kSurrogateSums; ++k) {
      const double part = parts[i * kSurrogateSums + k];
      in.sums[k] = k == kRatioMax ? std::max(in.sums[k], part) : in.sums[k] + part;
    }
}

// The same on a GPU, a block for each completion; gives the loss.
Tensor on_gpu(const Tensor &logp, const Inputs &in, Tensor grad) {
  const auto n = static_cast<int64_t>(in.offsets.size()) - 1;
  const auto at = cuda::upload(in.offsets, logp);
  auto parts = at::empty({n, kSurrogateSums}, logp.options().dtype(at::kDouble));
  auto data = [](const Tensor &t) { return t.defined() ? t.const_data_ptr() : nullptr; };
  cuda::run(logp, logp.scalar_type() == at::kFloat ? "surrogate_f32" : "surrogate_f64", n, 128, data(logp), data(in.old),
            data(in.advantages), data(in.weights), data(in.ref), at.const_data_ptr<int64_t>(), in.settings,
            static_cast<int>(in.by_completion), static_cast<int>(in.sequence_mean), grad.mutable_data_ptr(),
            parts.mutable_data_ptr<double>());
  auto sums = parts.sum(0);
  if (n > 0) sums.select(0, kRatioMax).copy_(parts.select(1, kRatioMax).max());
  const auto host = sums.cpu();
  std::copy_n(host.const_data_ptr<double>(), kSurrogateSums, in.sums);
  return sums.select(0, kLoss).to(logp.scalar_type());
}

struct Surrogate : torch::autograd::Function<Surrogate> {
  static Tensor forward(AutogradContext *ctx, const Tensor &logp, const Inputs *in) {
    const auto x = logp.detach().contiguous();
    auto grad = at::empty_like(x);
    if (x.is_cuda()) {
      const auto loss = on_gpu(x, *in, grad);
      ctx->save_for_backward({grad});
      return loss;
    }
    if (x.scalar_type() == at::kFloat) compute<float>(x, *in, grad);
    else compute<double>(x, *in, grad);
    ctx->save_for_backward({grad});
    return at::scalar_tensor(in->sums[kLoss], x.options());
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    once_differentiable("surrogate");
    return {ctx->get_saved_variables()[0] * grads[0], Tensor()};
  }
};
} // namespace

// Everything contiguous on the CPU or on a GPU that has kernels, f32 or f64, one type. advantages [M], or [S] where `by_completion`;
// weights and ref [M] may be null. out: the loss; sums[7].
RLHF_API char *rlhf_surrogate(Tensor **out, double *sums, const Tensor *logp, const Tensor *const *others,
                              const int64_t *offsets, int64_t n, const SurrogateSettings *settings, int by_completion,
                              int sequence_mean) {
  return guard([&] {
    auto fixed = [](const Tensor *t) { return t ? t->detach().contiguous() : Tensor(); };
    const Inputs in{fixed(others[0]),   fixed(others[1]), fixed(others[2]),
                    fixed(others[3]),   {offsets, offsets + n + 1}, *settings,
                    by_completion != 0, sequence_mean != 0, sums};
    *out = give(Surrogate::apply(*logp, &in));
  });
}
