//! Transformers in Hugging Face layout: load, save, batch forward, generate.
//!
//! A [`Transformer`] computes the hidden states of a packed batch ([`DeviceBatch`]), where a prompt's
//! tokens stand once however many completions hang on it. [`target_logprobs`] turns them into the
//! log-probabilities of the trained tokens; a [`Reference`] does only that, without gradients; a
//! [`ScalarModel`] puts one number on a completion (a reward) or on each of its tokens (values).
//! [`generate`](generate()) samples completions with a key-value cache.
//!
//! Whoever brings a model of their own implements [`CausalLm`].
//!
//! ```
//! use rlhf_model::{Config, GenerateLimits, GenerateRequest, SamplingConfig, Transformer, generate};
//! use tch::{Device, Kind};
//!
//! # fn main() -> rlhf_model::Result<()> {
//! // Vocabulary 64, width 32, two layers of four heads, context 128.
//! let model = Transformer::init(Config::new(64, 32, 2, 4, 128), 1, Device::Cpu, Kind::Float)?;
//! let request = GenerateRequest { prompt: vec![1, 5, 9], prompt_key: 0, samples: 4, max_new_tokens: None };
//! let config = SamplingConfig { max_new_tokens: 8, eos_ids: vec![2], ..Default::default() };
//! let groups = generate(&model, &[request], &config, &GenerateLimits::default(), &mut |_| {})?;
//! assert_eq!(groups[0].completions.len(), 4);
//! # Ok(())
//! # }
//! ```

mod adapter;
pub mod batch;
pub mod causal_lm;
pub mod config;
mod decode;
mod error;
pub mod family;
#[allow(
    unsafe_code,
    reason = "memory-mapping a file is unsafe by nature; this is its only place"
)]
mod ffi;
pub mod generate;
mod layers;
mod linear;
pub mod reference;
mod rope;
pub mod sampling;
pub mod scalar;
pub mod tabular;
pub mod transformer;
mod trunk;
pub mod weights;

pub use adapter::AdapterConfig;
pub use batch::DeviceBatch;
pub use causal_lm::{
    CausalLm, TargetLogprobs, target_divergence, target_logprobs, target_logprobs_and_kl,
    target_logprobs_and_values,
};
pub use config::{Activation, Config, RopeScaling};
pub use decode::DecoderWeights;
pub use error::{Error, Result, TensorProblem};
pub use family::Family;
pub use generate::{
    Decoder, GenerateLimits, GenerateProgress, GenerateRequest, LocalSampler, Mismatch,
    RecordedLogprobs, Sampler, SamplingConfig, StopStrings, generate,
};
#[cfg(feature = "endpoint")]
pub use generate::{ServerLogprobs, ServerSampler};
pub use reference::Reference;
pub use scalar::{RewardNorm, ScalarModel, ValueHead};
pub use transformer::{LoadOptions, SaveOptions, Transformer, copy_tokenizer};
