// The one guard between C++ exceptions and Rust, and how tensors cross.
//
// Rust passes borrowed `at::Tensor*`; a returned tensor is a `new at::Tensor` that Rust then owns.
// Every function returns null, or a malloc'ed message that Rust frees.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <cstdlib>
#include <cstring>
#include <exception>

#define RLHF_API extern "C" __attribute__((visibility("default")))

namespace rlhf {
template <class F> char *guard(F &&body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const c10::Error &e) {
    return strdup(e.what_without_backtrace());
  } catch (const std::exception &e) {
    return strdup(e.what());
  } catch (...) {
    return strdup("an unknown C++ exception");
  }
}
inline at::Tensor *give(at::Tensor t) { return new at::Tensor(std::move(t)); }

// At the head of a backward that builds no graph of its own.
inline void once_differentiable(const char *op) {
  TORCH_CHECK(!at::GradMode::is_enabled(), op, " has no second derivative (create_graph was asked for)");
}
// The type that sums are made in.
inline at::ScalarType accumulation(const at::Tensor &t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}
} // namespace rlhf
