//! How a program's memory is had.

use crate::ffi;

/// For a program's `main`, before it makes tensors; a library never calls it, since it is for the whole process.
/// With glibc, freed pages are kept instead of given back, because fresh ones page-fault expensively and a training
/// step asks for the same sizes again and again; and tensors on the CPU come from `malloc` itself, whose blocks fit
/// the next tensor of their size, not from `posix_memalign`, whose holes do not (a DPO step of SmolLM2 takes 2.6
/// instead of 2.8 GB so). Elsewhere nothing is done.
pub fn keep_memory() {
    ffi::keep_memory();
}
