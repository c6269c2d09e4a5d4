// See cuda.h. The names are those of CUDA's driver API and of NVRTC, whose C interfaces have been the same since
// CUDA 11; handles are pointers there.
#include "cuda.h"
#include "kernels_cu.h" // kernels.cu as `kSource`, by build.rs
#include <array>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>
#include <mutex>
#include <string>
#include <unordered_map>

namespace {
using Handle = void *;
using Code = int;

struct Library {
  Code (*attribute)(int *, int, int) = nullptr;
  Code (*memory)(size_t *, int) = nullptr;
  Code (*current)(Handle *) = nullptr;
  Code (*retain)(Handle *, int) = nullptr;
  Code (*make_current)(Handle) = nullptr;
  Code (*load)(Handle *, const void *) = nullptr;
  Code (*function)(Handle *, Handle, const char *) = nullptr;
  Code (*launch)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void **,
                 void **) = nullptr;
  Code (*create)(Handle *, const char *, const char *, int, const char *const *, const char *const *) = nullptr;
  Code (*compile)(Handle, int, const char *const *) = nullptr;
  Code (*log_size)(Handle, size_t *) = nullptr;
  Code (*log)(Handle, char *) = nullptr;
  Code (*cubin_size)(Handle, size_t *) = nullptr;
  Code (*cubin)(Handle, char *) = nullptr;
  bool whole = true;

  Library() {
    // The first is libtorch's own, which needs the right ones of the others.
    std::vector<void *> all;
    for (const char *name : {"libcaffe2_nvrtc.so", "libcuda.so.1", "libnvrtc.so.13", "libnvrtc.so.12"})
      if (void *handle = dlopen(name, RTLD_NOW)) all.push_back(handle);
    auto find = [&](auto &to, const char *name) {
      for (void *handle : all)
        if (void *symbol = dlsym(handle, name)) {
          to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(symbol);
          return;
        }
      whole = false;
    };
    find(attribute, "cuDeviceGetAttribute");
    find(memory, "cuDeviceTotalMem_v2");
    find(current, "cuCtxGetCurrent");
    find(retain, "cuDevicePrimaryCtxRetain");
    find(make_current, "cuCtxSetCurrent");
    find(load, "cuModuleLoadData");
    find(function, "cuModuleGetFunction");
    find(launch, "cuLaunchKernel");
    find(create, "nvrtcCreateProgram");
    find(compile, "nvrtcCompileProgram");
    find(log_size, "nvrtcGetProgramLogSize");
    find(log, "nvrtcGetProgramLog");
    find(cubin_size, "nvrtcGetCUBINSize");
    find(cubin, "nvrtcGetCUBIN");
  }
};
const Library &library() {
  static const Library all;
  return all;
}

// A device's kernels; nothing is ever unloaded, for the driver may be gone before a static's destructor runs.
struct Device {
  std::mutex lock;
  bool tried = false;
  Handle module = nullptr;
  std::unordered_map<std::string, Handle> functions;

  void prepare(int index) {
    tried = true;
    const auto &l = library();
    int major = 0, minor = 0;
    if (!l.whole || l.attribute(&major, 75, index) || l.attribute(&minor, 76, index)) return;
    const std::string target = "--gpu-architecture=sm_" + std::to_string(10 * major + minor);
    const char *options[] = {target.c_str(), "--std=c++17"};
    Handle program = nullptr;
    if (l.create(&program, kSource, "rlhf_kernels.cu", 0, nullptr, nullptr)) return;
    if (const Code code = l.compile(program, 2, options)) {
      size_t n = 0;
      l.log_size(program, &n);
      std::string text(n, ' ');
      l.log(program, text.data());
      TORCH_WARN("the GPU's kernels did not compile (", code, "), libtorch's operations are used: ", text);
      return;
    }
    size_t n = 0;
    if (l.cubin_size(program, &n)) return;
    std::vector<char> image(n);
    Handle made = nullptr;
    if (l.cubin(program, image.data()) || l.load(&made, image.data())) return;
    module = made;
  }
};
Device &device(int index) {
  static auto *all = new std::array<Device, 64>;
  return (*all)[static_cast<size_t>(index)];
}

// The driver's calls want a context, which libtorch makes in a thread when it first needs one there.
void enter(int index) {
  const auto &l = library();
  Handle now = nullptr;
  l.current(&now);
  if (now) return;
  Handle context = nullptr;
  TORCH_CHECK(!l.retain(&context, index) && !l.make_current(context), "no CUDA context for GPU ", index);
}
int index_of(const at::Tensor &t) { return t.device().index() < 0 ? 0 : t.device().index(); }
} // namespace

namespace rlhf::cuda {
bool ready(const at::Tensor &t) {
  if (!t.is_cuda() || index_of(t) >= 64 || !library().whole) return false;
  const c10::DeviceGuard guard(t.device());
  auto &d = device(index_of(t));
  const std::lock_guard hold(d.lock);
  if (!d.tried) {
    enter(index_of(t));
    d.prepare(index_of(t));
  }
  return d.module != nullptr;
}

void launch(const at::Tensor &on, const char *kernel, int64_t blocks, int threads, void **arguments) {
  const auto &l = library();
  const int index = index_of(on);
  const c10::DeviceGuard guard(on.device());
  enter(index);
  auto &d = device(index);
  Handle function = nullptr;
  {
    const std::lock_guard hold(d.lock);
    auto &known = d.functions[kernel];
    if (!known) TORCH_CHECK(!l.function(&known, d.module, kernel), "no kernel `", kernel, "`");
    function = known;
  }
  const auto stream = c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(on.device());
  TORCH_CHECK(blocks <= 0x7fffffff, kernel, ": ", blocks, " blocks are more than a GPU takes");
  // The default stream is a null handle.
  const Handle queue = stream.id() == 0 ? nullptr : stream.native_handle();
  const Code code = l.launch(function, static_cast<unsigned>(blocks), 1, 1, static_cast<unsigned>(threads), 1, 1, 0, queue,
                             arguments, nullptr);
  TORCH_CHECK(code == 0, kernel, ": the launch failed with CUDA's error ", code);
}
} // namespace rlhf::cuda

// Whether a tensor lies where `launch` can run.
RLHF_API int rlhf_has_kernels(const at::Tensor *t) noexcept {
  try {
    return rlhf::cuda::ready(*t);
  } catch (...) {
    return 0;
  }
}

// Bytes of memory of the GPU that a tensor lies on; 0 where that cannot be said.
RLHF_API int64_t rlhf_gpu_memory(const at::Tensor *t) noexcept {
  size_t bytes = 0;
  try {
    if (!rlhf::cuda::ready(*t) || library().memory(&bytes, index_of(*t))) return 0;
  } catch (...) {
    return 0;
  }
  return static_cast<int64_t>(bytes);
}
