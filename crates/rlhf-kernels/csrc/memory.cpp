// How a program's memory is had. On other C libraries than glibc nothing is changed.
#include "shim.h"
#if defined(__GLIBC__)
#include <c10/core/CPUAllocator.h>
#include <cstdint>
#include <malloc.h>

namespace {
constexpr uintptr_t kLine = 64;

// libtorch asks posix_memalign, which cuts a tensor from a block larger by the alignment, so that the hole that it
// leaves is too small for another of its size, and fragments stay. Here malloc's own block is found just below the
// aligned address.
struct Malloc final : c10::Allocator {
  static void release(void *p) {
    if (p) std::free(static_cast<void **>(p)[-1]);
  }
  c10::DataPtr allocate(size_t n) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (n == 0) return {nullptr, nullptr, &release, cpu};
    auto *block = n <= PTRDIFF_MAX - kLine ? std::malloc(n + kLine) : nullptr;
    TORCH_CHECK(block, "not enough memory: a tensor of ", n, " bytes was asked for");
    // malloc aligns to 16, so that there is room for a pointer.
    auto *p = reinterpret_cast<void **>((reinterpret_cast<uintptr_t>(block) + kLine) & ~(kLine - 1));
    p[-1] = block;
    return {p, p, &release, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void *to, const void *from, size_t n) const override { default_copy_data(to, from, n); }
} by_malloc;
} // namespace

RLHF_API void rlhf_keep_memory() {
  // Older versions take no threshold above 32 MiB, and once another value is set they stay at 128 KiB.
  if (!mallopt(M_MMAP_THRESHOLD, 1 << 30)) mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, INT32_MAX);
  mallopt(M_TOP_PAD, 64 << 20);
  c10::SetCPUAllocator(&by_malloc, 1);
}
#else
RLHF_API void rlhf_keep_memory() {}
#endif
