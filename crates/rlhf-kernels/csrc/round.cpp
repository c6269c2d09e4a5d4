// Rounding to bf16 with chances by nearness, so that small steps are kept on average.
#include "cuda.h"
#include "hash.h"
#include "shim.h"
#include <ATen/Parallel.h>
#include <cstring>

// to (bf16) = from (f32), both contiguous, on the CPU or a GPU that has kernels; the i-th number takes the lower half of
// hash(i + salt) as its chance. Infinities stay; NaN stays NaN.
RLHF_API char *rlhf_round_to_bf16(const at::Tensor *from, const at::Tensor *to, uint32_t salt) {
  return rlhf::guard([&] {
    TORCH_CHECK(from->is_contiguous() && to->is_contiguous() && from->numel() == to->numel(), "not alike");
    if (from->is_cuda()) {
      rlhf::cuda::run(*from, "round_to_bf16", (from->numel() + 255) / 256, 256, from->const_data_ptr<float>(), to->data_ptr(),
                      from->numel(), salt);
      return;
    }
    const auto *x = from->const_data_ptr<float>();
    auto *y = static_cast<uint16_t *>(to->data_ptr());
    at::parallel_for(0, from->numel(), 1 << 15, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
        const uint32_t chance = rlhf::hash(static_cast<uint32_t>(i) + salt) & 0xffffu;
        // A NaN whose mark lies in the lower half would become an infinity.
        const uint32_t odd = (bits & 0xffffu) ? 0x10000u : 0u;
        y[i] = static_cast<uint16_t>((finite ? bits + chance : bits | odd) >> 16);
      }
    });
  });
}
