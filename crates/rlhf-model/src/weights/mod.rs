//! Files of weights: safetensors in and out, GGUF in, models from the Hugging Face Hub.
//!
//! Invariant: nothing is allocated from a number found in a file before that number was checked
//! against the file's size, and no path found in a file leaves its folder. Knows tensors by name and
//! shape only; what a model needs is the business of [`crate::transformer`].

pub mod gguf;
#[cfg(feature = "hub")]
pub mod hub;
mod safetensors;
mod staging;
mod store;

pub(crate) use safetensors::{Entry, write_safetensors};
pub use safetensors::{TensorInfo, WeightFile};
pub(crate) use staging::{Staging, sync_write};
pub use store::WeightStore;
pub(crate) use store::{Load, save_tensors};
