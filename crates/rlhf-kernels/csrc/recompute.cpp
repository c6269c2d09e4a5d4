// Activation checkpointing: run a closure without recording, run it again in backward.
#include "shim.h"
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <mutex>

namespace {
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The Rust closure: takes `n` borrowed tensors, gives an owned tensor, or null and a malloc'ed message.
using Call = Tensor *(*)(void *data, const Tensor *const *inputs, int64_t n, char **message);
using Drop = void (*)(void *data);

// The global generators that a body on these inputs may draw from, and their states.
struct Draws {
  std::vector<std::pair<at::Generator, Tensor>> states;
  void note(at::Generator g) {
    std::lock_guard<std::mutex> lock(g.mutex());
    states.emplace_back(g, g.get_state());
  }
  explicit Draws(const variable_list &inputs) {
    note(at::detail::getDefaultCPUGenerator());
    if (inputs[0].is_cuda()) note(at::globalContext().defaultGenerator(inputs[0].device()));
  }
  void set() {
    for (auto &[g, state] : states) {
      std::lock_guard<std::mutex> lock(g.mutex());
      g.set_state(state);
    }
  }
};

// While it lives the generators repeat what they drew the first time; then they go on where they were.
struct Again {
  Draws now;
  Again(Draws &then, const variable_list &inputs) : now(inputs) { then.set(); }
  Again(const Again &) = delete;
  ~Again() { now.set(); }
};

struct Closure : torch::CustomClassHolder {
  void *data;
  Call call;
  Drop drop;
  // As the generators were before the first run.
  std::unique_ptr<Draws> draws;
  Closure(void *d, Call c, Drop f) : data(d), call(c), drop(f) {}
  Closure(const Closure &) = delete;
  ~Closure() override { drop(data); }
  Tensor run(const variable_list &inputs) const {
    std::vector<const Tensor *> raw;
    for (const auto &t : inputs) raw.push_back(&t);
    char *message = nullptr;
    std::unique_ptr<Tensor> out(call(data, raw.data(), (int64_t)raw.size(), &message));
    const std::string text = message ? message : "";
    std::free(message);
    TORCH_CHECK(out, "the closure panicked: ", text);
    return *out;
  }
};

struct Recompute : torch::autograd::Function<Recompute> {
  // The first argument, a tie, requires grad, so that the node is recorded even if only captured parameters do.
  static Tensor forward(AutogradContext *ctx, const Tensor &, at::TensorList list,
                        c10::intrusive_ptr<Closure> closure) {
    const auto inputs = list.vec();
    closure->draws = std::make_unique<Draws>(inputs);
    Tensor out;
    {
      c10::AutoGradMode off(false);
      out = closure->run(inputs);
    }
    ctx->save_for_backward(inputs);
    ctx->saved_data["closure"] = c10::IValue::make_capsule(std::move(closure));
    return out;
  }
  static variable_list backward(AutogradContext *ctx, variable_list grads) {
    rlhf::once_differentiable("recompute");
    const auto saved = ctx->get_saved_variables();
    auto closure = c10::static_intrusive_pointer_cast<Closure>(ctx->saved_data["closure"].toCapsule());
    variable_list inputs;
    for (size_t i = 0; i < saved.size(); ++i) inputs.push_back(saved[i].detach().requires_grad_(ctx->needs_input_grad(1 + i)));
    Tensor out;
    {
      const Again again(*closure->draws, inputs);
      c10::AutoGradMode on(true);
      out = closure->run(inputs);
    }
    // Nothing inside wants a gradient: only the tie brought us here.
    if (out.requires_grad()) torch::autograd::backward({out}, {grads[0]});
    variable_list result{Tensor()};
    for (const auto &t : inputs) result.push_back(t.grad());
    result.push_back(Tensor());
    return result;
  }
};
} // namespace

RLHF_API char *rlhf_recompute(Tensor **out, const Tensor *const *inputs, int64_t n, void *data, Call call, Drop drop) {
  return rlhf::guard([&] {
    auto closure = c10::make_intrusive<Closure>(data, call, drop);
    variable_list list;
    for (int64_t i = 0; i < n; ++i) list.push_back(*inputs[i]);
    if (!at::GradMode::is_enabled()) {
      *out = rlhf::give(closure->run(list));
      return;
    }
    auto tie = at::empty({0}, list[0].options().dtype(at::kFloat)).requires_grad_(true);
    // A TensorList, not a vector: only that counts as tensors to autograd.
    *out = rlhf::give(Recompute::apply(tie, at::TensorList(list), closure));
  });
}
