//! Sampling completions: prompts join a running batch, finished sequences leave it.
//!
//! Invariant: what a sequence says depends on its prompt, its key, its sample number and the seed,
//! never on the other sequences of the batch (up to rounding of the matrix products, which differs
//! with the batch's size in the last bits). A prompt is computed once for all of its samples.

mod sampler;
#[cfg(feature = "endpoint")]
mod server;
mod settings;
mod wave;

use rlhf_data::group::PromptGroup;

pub use sampler::{LocalSampler, Mismatch, Sampler};
#[cfg(feature = "endpoint")]
pub use server::{ServerLogprobs, ServerSampler};
pub use settings::{
    GenerateLimits, GenerateRequest, RecordedLogprobs, SamplingConfig, StopStrings,
};

use crate::decode::{DecodeWeights, DecoderWeights};
use crate::error::{Error, Result};
use crate::transformer::Transformer;
use wave::Wave;

/// What happens while generating.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum GenerateProgress {
    /// A token was drawn.
    Token {
        /// Index of the request.
        request: usize,
        /// Which of its completions.
        sample: usize,
        /// The token.
        id: u32,
        /// Its recorded log-probability.
        logprob: f32,
    },
    /// Every live sequence got a token.
    Step {
        /// Sequences still running.
        live: usize,
        /// Completions that are done.
        finished: usize,
        /// Completions in all.
        total: usize,
        /// Tokens drawn so far.
        tokens: u64,
    },
}

/// Completes prompts.
///
/// The result has one group a request, in order, each with its `samples` completions. All their
/// tokens are trained; [`rlhf_data::group::Finish::Stop`] completions end with an end-of-sequence token; a completion
/// also ends ([`rlhf_data::group::Finish::Length`]) where the model's context is full.
///
/// # Errors
/// [`Error::Argument`] when a prompt is empty, fills the context, or holds an id outside the
/// vocabulary, or a setting is out of range; [`Error::NonFinite`] when the model gives NaN or
/// infinite logits, naming the request; [`Error::Torch`] when memory does not suffice.
pub fn generate(
    model: &Transformer,
    requests: &[GenerateRequest],
    config: &SamplingConfig,
    limits: &GenerateLimits,
    progress: &mut dyn FnMut(GenerateProgress),
) -> Result<Vec<PromptGroup>> {
    Decoder::new(model)?.generate(requests, config, limits, progress)
}

/// A model with its weights laid out for decoding, for many calls with the same weights.
#[derive(Debug)]
pub struct Decoder<'m> {
    model: &'m Transformer,
    weights: DecodeWeights,
    /// Another model whose logits are mixed in, and its share of them.
    other: Option<(&'m Transformer, DecodeWeights, f64)>,
    stop: Option<StopStrings<'m>>,
}

impl<'m> Decoder<'m> {
    /// Lays out the weights (a copy, for all but very large models).
    ///
    /// # Errors
    /// [`Error::Torch`] or [`Error::Kernel`] when memory does not suffice.
    pub fn new(model: &'m Transformer) -> Result<Self> {
        Self::with_weights(model, DecoderWeights::AsLoaded)
    }

    /// As [`Decoder::new`], with the weights kept as named.
    ///
    /// # Errors
    /// As [`Decoder::new`]; [`Error::Argument`] when the model cannot be kept so.
    pub fn with_weights(model: &'m Transformer, weights: DecoderWeights) -> Result<Self> {
        Ok(Self {
            model,
            weights: DecodeWeights::new(model, weights)?,
            other: None,
            stop: None,
        })
    }

    /// Draws from the geometric mixture of two models instead, token by token: probabilities in proportion to
    /// π^(1−share) · `other`^share (Nash-MD's regularised policy, Munos et al. 2023, arXiv 2312.00886).
    ///
    /// # Errors
    /// [`Error::Argument`] unless `share` lies in 0 to 1 and the models have one vocabulary, context and device.
    pub fn mixed_with(mut self, other: &'m Transformer, share: f64) -> Result<Self> {
        let of = |m: &Transformer| {
            let c = m.config();
            (c.vocab_size, c.max_position_embeddings, m.device())
        };
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::Argument(format!(
                "a share of {share} of the other model's logits, expected 0 to 1"
            )));
        }
        if of(other) != of(self.model) {
            return Err(Error::Argument(format!(
                "models of vocabulary, context and device {:?} and {:?} cannot be mixed",
                of(self.model),
                of(other)
            )));
        }
        let weights = DecodeWeights::new(other, DecoderWeights::AsLoaded)?;
        self.other = Some((other, weights, share));
        Ok(self)
    }

    /// The models with their shares of the logits.
    fn parts(&self) -> impl Iterator<Item = (&Transformer, &DecodeWeights, f64)> {
        let own = 1.0 - self.other.as_ref().map_or(0.0, |o| o.2);
        let other = self.other.as_ref().map(|(m, w, share)| (*m, w, *share));
        std::iter::once((self.model, &self.weights, own)).chain(other)
    }

    /// Ends completions at texts, too; such a completion has [`rlhf_data::group::Finish::Stop`] and keeps all of its
    /// tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] when a string is empty.
    pub fn stop_at(mut self, stop: StopStrings<'m>) -> Result<Self> {
        if stop.strings.iter().any(String::is_empty) {
            return Err(Error::Argument("a stop string is empty".into()));
        }
        self.stop = (!stop.strings.is_empty()).then_some(stop);
        Ok(self)
    }

    /// As [`generate`](generate()).
    ///
    /// # Errors
    /// As [`generate`](generate()).
    pub fn generate(
        &self,
        requests: &[GenerateRequest],
        config: &SamplingConfig,
        limits: &GenerateLimits,
        progress: &mut dyn FnMut(GenerateProgress),
    ) -> Result<Vec<PromptGroup>> {
        let _no_grad = tch::no_grad_guard();
        let mut wave = Wave::new(self, requests, config, limits)?;
        wave.run(progress)?;
        Ok(wave.into_groups())
    }
}
