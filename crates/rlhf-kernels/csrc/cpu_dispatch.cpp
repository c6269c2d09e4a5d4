// Picks the inner loops for this machine's instruction set.
#include "cpu_kernels.h"
#include "loss_kernels.h"
#include "product_kernels.h"
#include "row_kernels.h"
#include "shim.h"
#include <atomic>

namespace rlhf {
extern const CpuKernels cpu_plain;
extern const LossKernels cpu_plain_losses;
extern const ProductKernels cpu_plain_products;
extern const RowKernels cpu_plain_rows;
#if defined(__x86_64__)
extern const CpuKernels cpu_avx2, cpu_avx512;
extern const LossKernels cpu_avx2_losses, cpu_avx512_losses;
extern const ProductKernels cpu_avx2_products, cpu_avx512_products;
extern const RowKernels cpu_avx2_rows, cpu_avx512_rows;
#endif

namespace {
// 0 plain, 1 AVX2, 2 AVX-512: the best that the machine has.
int best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}
std::atomic<int> level{best()};

#if defined(__x86_64__)
template <class T> const T &pick(const T &plain, const T &avx2, const T &avx512) {
  const int now = level.load(std::memory_order_relaxed);
  return now == 2 ? avx512 : now == 1 ? avx2 : plain;
}
#define RLHF_PICK(table) pick(cpu_plain##table, cpu_avx2##table, cpu_avx512##table)
#else
#define RLHF_PICK(table) cpu_plain##table
#endif
} // namespace

const CpuKernels &cpu_kernels() { return RLHF_PICK(); }
const LossKernels &loss_kernels() { return RLHF_PICK(_losses); }
const ProductKernels &product_kernels() { return RLHF_PICK(_products); }
const RowKernels &row_kernels() { return RLHF_PICK(_rows); }
} // namespace rlhf

// For tests: caps the instruction set; gives what is then used.
RLHF_API int rlhf_cap_instruction_set(int cap) noexcept {
  const int have = rlhf::best();
  rlhf::level = cap < have ? cap : have;
  return rlhf::level;
}
