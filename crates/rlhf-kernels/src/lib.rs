//! The tensor operations of RLHF: ragged sequences and their scans, chunked log-probabilities and
//! divergences over the vocabulary, the clipped surrogate, shared-prefix attention, optimisers, groups of
//! processes.
//!
//! Invariant: nothing here knows of models, files, text or training loops. Every operation has a plain
//! version in [`mod@reference`], which is its oracle.
//!
//! ```
//! use rlhf_kernels::{LogprobOptions, linear_logprobs};
//! use tch::{Kind, Tensor};
//!
//! # fn main() -> Result<(), rlhf_kernels::Error> {
//! let hidden = Tensor::from_slice(&[1f32, 0., 0., 1.]).view([2, 2]).set_requires_grad(true);
//! let weight = Tensor::from_slice(&[2f32, 0., 0., 2., 1., 1.]).view([3, 2]);
//! let ids = Tensor::from_slice(&[0i64, 2]);
//! let out = linear_logprobs(&hidden, &weight, &ids, &LogprobOptions::default())?;
//! (-out.logprobs.sum(Kind::Float)).backward();
//! assert_eq!(hidden.grad().size(), [2, 2]);
//! # Ok(()) }
//! ```

mod attention;
pub mod collective;
pub mod decode;
mod error;
#[allow(unsafe_code, reason = "the one place that calls C++")]
mod ffi;
pub mod kl;
pub mod layer;
mod linear_logprobs;
mod nucleus;
pub mod optim;
mod panels;
mod program;
mod ragged;
mod recompute;
pub mod reference;
mod scan;
pub mod surrogate;

pub use attention::{AttentionGroup, AttentionLayout, AttentionOptions, shared_prefix_attention};
pub use error::{Error, Result};
pub use kl::{linear_kl, linear_kl_top, top_logprobs};
pub use linear_logprobs::{
    F32_RESOLUTION, Head, LogprobOptions, Logprobs, Moments, Top1, entropy, linear_logprobs,
    token_logprobs, token_logprobs_in_place,
};
pub use nucleus::{Nucleus, nucleus};
pub use panels::Panels;
pub use program::{keep_memory, load_cuda};
pub use ragged::{LossSum, Mean, Offsets, Ragged};
pub use recompute::recompute;
pub use scan::{Direction, discounted_returns, gae, scan};
pub use surrogate::surrogate;
