//! Who draws completions: a model here, or whoever else keeps to the same terms.

use rlhf_data::group::PromptGroup;

use super::{Decoder, GenerateLimits, GenerateRequest, SamplingConfig};
use crate::error::Result;

/// Draws completions.
pub trait Sampler: std::fmt::Debug {
    /// One group a request, in order, each with its `samples` completions and their log-probabilities, as
    /// [`generate`](crate::generate()) gives them.
    ///
    /// # Errors
    /// When a request cannot be met.
    fn sample(
        &self,
        requests: &[GenerateRequest],
        config: &SamplingConfig,
    ) -> Result<Vec<PromptGroup>>;
}

/// A model here.
#[derive(Debug)]
pub struct LocalSampler<'m> {
    /// Its weights, laid out.
    pub decoder: Decoder<'m>,
    /// How much is computed at once.
    pub limits: GenerateLimits,
}

impl Sampler for LocalSampler<'_> {
    fn sample(
        &self,
        requests: &[GenerateRequest],
        config: &SamplingConfig,
    ) -> Result<Vec<PromptGroup>> {
        self.decoder
            .generate(requests, config, &self.limits, &mut |_| {})
    }
}

/// How far a sampler's log-probabilities log μ are from a learner's log π on the tokens that were drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mismatch {
    /// How many tokens were compared.
    pub tokens: u64,
    /// max |log π − log μ|.
    pub largest: f64,
    /// Mean |log π − log μ|.
    pub mean: f64,
    /// KL(μ ‖ π) a token in nats, as the mean of π/μ − 1 − log(π/μ) (Schulman's k3).
    pub kl: f64,
}

impl Mismatch {
    /// Of the same tokens' log-probabilities in the same order.
    pub fn of(
        learner: impl IntoIterator<Item = f64>,
        sampler: impl IntoIterator<Item = f64>,
    ) -> Self {
        let mut all = Self::default();
        for (p, q) in learner.into_iter().zip(sampler) {
            let d = p - q;
            all.tokens += 1;
            all.largest = all.largest.max(d.abs());
            all.mean += d.abs();
            all.kl += d.exp_m1() - d;
        }
        let n = all.tokens.max(1) as f64;
        all.mean /= n;
        all.kl /= n;
        all
    }
}
