//! What training needs of a language model: hidden states of a packed batch, and a head.
//!
//! The logits are never materialised here: [`target_logprobs`] hands the hidden states of the
//! trained rows and the head's matrix to the kernel that does both at once.

use rlhf_kernels::kl::{Divergence, KlOptions, Logits};
use rlhf_kernels::{LogprobOptions, Ragged, linear_kl, linear_logprobs};
use tch::Tensor;

use crate::batch::DeviceBatch;
use crate::error::Result;
use crate::scalar::ValueHead;

/// A language model that can be trained: log p(next token) = log-softmax(hidden · headᵀ).
pub trait CausalLm {
    /// Hidden states `[N, H]` of every packed row, with gradients where they are enabled.
    ///
    /// # Errors
    /// When the batch does not fit the model (a token id outside the vocabulary, a sequence longer
    /// than the context).
    fn hidden(&self, batch: &DeviceBatch) -> Result<Tensor>;

    /// The output matrix `[V, H]`; for tied embeddings the embedding itself.
    fn lm_head(&self) -> Tensor;

    /// The cap c of logits squashed as c·tanh(x/c), for models that have one.
    fn logit_softcap(&self) -> Option<f64> {
        None
    }

    /// Every weight that is trained, once, by its name in a Hugging Face folder (an adapter's in
    /// PEFT's), always in the same order. The tensors share storage with the model's.
    fn parameters(&self) -> Vec<(String, Tensor)>;
}

/// Per-token results of the trained tokens.
#[derive(Debug)]
pub struct TargetLogprobs {
    /// log p of every trained token, differentiable.
    pub logprobs: Ragged,
    /// The entropy of the distribution that each was predicted from, where asked for; differentiable.
    pub entropy: Option<Ragged>,
}

/// The log-probabilities of the batch's trained tokens at a temperature (logits are divided by it).
///
/// # Shapes
/// Both results hold M values in S segments, as the batch's offsets say.
///
/// # Errors
/// As [`CausalLm::hidden`]; [`crate::Error::Kernel`] when the temperature is not positive.
pub fn target_logprobs(
    model: &dyn CausalLm,
    batch: &DeviceBatch,
    temperature: f64,
    entropy: bool,
) -> Result<TargetLogprobs> {
    let hidden = model.hidden(batch)?.index_select(0, &batch.target_rows);
    of_hidden(model, &hidden, batch, temperature, entropy)
}

/// As [`target_logprobs`], and a value for each trained token from a head on the same hidden states.
///
/// # Errors
/// As [`target_logprobs`].
pub fn target_logprobs_and_values(
    model: &dyn CausalLm,
    head: &ValueHead,
    batch: &DeviceBatch,
    temperature: f64,
    entropy: bool,
) -> Result<(TargetLogprobs, Ragged)> {
    let hidden = model.hidden(batch)?.index_select(0, &batch.target_rows);
    let values = Ragged::new(head.of(&hidden), batch.offsets.clone())?;
    let logprobs = of_hidden(model, &hidden, batch, temperature, entropy)?;
    Ok((logprobs, values))
}

/// As [`target_logprobs`], and at each trained token KL(model‖reference) of the two whole next-token distributions at the
/// temperature; no gradient goes to the reference.
///
/// # Errors
/// As [`target_logprobs`], and when the two do not have one vocabulary.
pub fn target_logprobs_and_kl(
    model: &dyn CausalLm,
    reference: &dyn CausalLm,
    batch: &DeviceBatch,
    temperature: f64,
    entropy: bool,
) -> Result<(TargetLogprobs, Ragged)> {
    let rows = |hidden: Tensor| hidden.index_select(0, &batch.target_rows);
    let hidden = rows(model.hidden(batch)?);
    let theirs = rows(tch::no_grad(|| reference.hidden(batch))?);
    let (head, their_head) = (model.lm_head(), reference.lm_head().detach());
    let logits = |hidden, head, softcap| Logits {
        softcap,
        ..Logits::new(hidden, head)
    };
    let kl = linear_kl(
        logits(&hidden, &head, model.logit_softcap()),
        logits(&theirs, &their_head, reference.logit_softcap()),
        &KlOptions {
            temperature,
            ..KlOptions::new(Divergence::Reverse)
        },
    )?;
    let logprobs = of_hidden(model, &hidden, batch, temperature, entropy)?;
    Ok((logprobs, Ragged::new(kl, batch.offsets.clone())?))
}

fn of_hidden(
    model: &dyn CausalLm,
    hidden: &Tensor,
    batch: &DeviceBatch,
    temperature: f64,
    entropy: bool,
) -> Result<TargetLogprobs> {
    let options = LogprobOptions {
        temperature,
        softcap: model.logit_softcap(),
        entropy,
        ..LogprobOptions::default()
    };
    let out = linear_logprobs(hidden, &model.lm_head(), &batch.target_ids, &options)?;
    let ragged = |t: Tensor| Ragged::new(t, batch.offsets.clone());
    Ok(TargetLogprobs {
        logprobs: ragged(out.logprobs)?,
        entropy: out.entropy.map(ragged).transpose()?,
    })
}
