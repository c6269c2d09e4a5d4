//! The binary's one call into the C library.

/// Tells glibc's malloc to keep freed pages instead of returning them: fresh large allocations
/// page-fault expensively, and a training step allocates the same sizes again and again.
///
/// Called once at the start of `main`. Does nothing where the allocator is another one.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn keep_pages() {
    use std::ffi::c_int;
    unsafe extern "C" {
        fn mallopt(param: c_int, value: c_int) -> c_int;
    }
    const M_TRIM_THRESHOLD: c_int = -1;
    const M_TOP_PAD: c_int = -2;
    const M_MMAP_THRESHOLD: c_int = -3;
    // SAFETY: mallopt only stores the value; it is called before other threads start.
    let set = |param, value| unsafe { mallopt(param, value) } != 0;
    // Older versions take no threshold above 32 MiB, and once another value is set they stay at 128 KiB.
    if !set(M_MMAP_THRESHOLD, 1 << 30) {
        set(M_MMAP_THRESHOLD, 32 << 20);
    }
    set(M_TRIM_THRESHOLD, c_int::MAX);
    set(M_TOP_PAD, 64 << 20);
}

/// Nothing to do on this platform.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn keep_pages() {}

/// Loads libtorch's CUDA part, where there is one. Must be the first act that has to do with torch:
/// asking for CUDA before it makes CUDA unavailable for the life of the process.
#[cfg(target_os = "linux")]
pub(crate) fn load_cuda() {
    use std::ffi::{c_char, c_int, c_void};
    unsafe extern "C" {
        fn dlopen(file: *const c_char, flags: c_int) -> *mut c_void;
    }
    const RTLD_NOW: c_int = 2;
    const RTLD_GLOBAL: c_int = 0x100;
    // SAFETY: the name is a valid C string; the library's initialisers are libtorch's own, and the
    // handle is kept for the life of the process on purpose. Failure means that there is no CUDA.
    unsafe { dlopen(c"libtorch_cuda.so".as_ptr(), RTLD_NOW | RTLD_GLOBAL) };
}

/// CUDA exists on Linux only.
#[cfg(not(target_os = "linux"))]
pub(crate) fn load_cuda() {}
