//! A frozen model that gives log-probabilities and nothing else.

use rlhf_kernels::Ragged;

use crate::batch::DeviceBatch;
use crate::causal_lm::{CausalLm, target_logprobs};
use crate::error::Result;
use crate::transformer::Transformer;

/// The reference policy π₀: no gradients, no way to change it.
#[derive(Debug)]
pub struct Reference<M = Transformer> {
    model: M,
}

impl<M: CausalLm> Reference<M> {
    /// Freezes a model. Its weights must not be shared with one in training: take a
    /// [`Transformer::duplicate`] of that.
    #[must_use]
    pub fn new(model: M) -> Self {
        for (_, mut tensor) in model.parameters() {
            if tensor.is_leaf() {
                let _ = tensor.requires_grad_(false);
            }
        }
        Self { model }
    }

    /// log π₀ of the batch's trained tokens at a temperature, without gradients.
    ///
    /// # Errors
    /// As [`target_logprobs`].
    pub fn logprobs(&self, batch: &DeviceBatch, temperature: f64) -> Result<Ragged> {
        let _no_grad = tch::no_grad_guard();
        Ok(target_logprobs(&self.model, batch, temperature, false)?.logprobs)
    }
}
