//! What a program sets up for its whole process. A library never calls these.

use crate::ffi;

/// For a program's `main`, before it makes tensors. With glibc, freed pages are kept instead of given back, because
/// fresh ones page-fault expensively and a training step asks for the same sizes again and again; and tensors on the
/// CPU come from `malloc` itself, whose blocks fit the next tensor of their size, not from `posix_memalign`, whose
/// holes do not (a DPO step of SmolLM2 takes 2.6 instead of 2.8 GB so). Elsewhere nothing is done.
pub fn keep_memory() {
    ffi::keep_memory();
}

/// Loads libtorch's CUDA part where there is one, so that `tch::Cuda::is_available` can say yes. For a program's
/// `main`: asking for CUDA before this makes CUDA unavailable for the life of the process. Linux only; elsewhere
/// nothing is done.
pub fn load_cuda() {
    ffi::load_cuda();
}
