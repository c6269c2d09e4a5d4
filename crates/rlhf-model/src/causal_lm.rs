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

    /// [`CausalLm::hidden`] of `rows` (i64 `[R]`) alone, `[R, H]`. A transformer computes of its last layer no more.
    ///
    /// # Errors
    /// As [`CausalLm::hidden`]; also when a row is outside the batch.
    fn hidden_at(&self, batch: &DeviceBatch, rows: &Tensor) -> Result<Tensor> {
        Ok(self.hidden(batch)?.f_index_select(0, rows)?)
    }

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
    let hidden = model.hidden_at(batch, &batch.target_rows)?;
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
    let hidden = model.hidden_at(batch, &batch.target_rows)?;
    let values = Ragged::new(head.of(&hidden), batch.offsets.clone())?;
    let logprobs = of_hidden(model, &hidden, batch, temperature, entropy)?;
    Ok((logprobs, values))
}

/// At each trained token the divergence of the two models' whole next-token distributions at a temperature; the
/// student's gradient alone is followed.
///
/// # Errors
/// As [`target_logprobs`], and when the two do not have one vocabulary.
pub fn target_divergence(
    student: &dyn CausalLm,
    teacher: &dyn CausalLm,
    batch: &DeviceBatch,
    divergence: Divergence,
    temperature: f64,
) -> Result<Ragged> {
    let hidden = student.hidden_at(batch, &batch.target_rows)?;
    apart(student, &hidden, teacher, batch, divergence, temperature)
}

/// As [`target_logprobs`], and at each trained token KL(model‖reference) of the two whole next-token distributions, of
/// one pass; no gradient goes to the reference.
///
/// # Errors
/// As [`target_divergence`].
pub fn target_logprobs_and_kl(
    model: &dyn CausalLm,
    reference: &dyn CausalLm,
    batch: &DeviceBatch,
    temperature: f64,
    entropy: bool,
) -> Result<(TargetLogprobs, Ragged)> {
    let hidden = model.hidden_at(batch, &batch.target_rows)?;
    let reverse = Divergence::Reverse;
    let kl = apart(model, &hidden, reference, batch, reverse, temperature)?;
    let logprobs = of_hidden(model, &hidden, batch, temperature, entropy)?;
    Ok((logprobs, kl))
}

fn apart(
    student: &dyn CausalLm,
    hidden: &Tensor,
    teacher: &dyn CausalLm,
    batch: &DeviceBatch,
    divergence: Divergence,
    temperature: f64,
) -> Result<Ragged> {
    let theirs = tch::no_grad(|| teacher.hidden_at(batch, &batch.target_rows))?;
    let (head, their_head) = (student.lm_head(), teacher.lm_head().detach());
    let student = Logits {
        softcap: student.logit_softcap(),
        ..Logits::new(hidden, &head)
    };
    let teacher = Logits {
        softcap: teacher.logit_softcap(),
        ..Logits::new(&theirs, &their_head)
    };
    let options = KlOptions {
        temperature,
        ..KlOptions::new(divergence)
    };
    let at_tokens = linear_kl(student, teacher, &options)?;
    Ok(Ragged::new(at_tokens, batch.offsets.clone())?)
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
