//! The binary's one call into the C library.

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
