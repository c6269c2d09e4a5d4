//! A packed batch as tensors on a device.
//!
//! Invariant: the same content as the host's [`PackedBatch`]; no padding, no mask. Axes: N packed
//! rows, M targets, S completions.

use rlhf_data::pack::PackedBatch;
use rlhf_kernels::{AttentionGroup, AttentionLayout, Offsets};
use tch::{Device, Tensor};

use crate::error::{Error, Result};

/// A packed batch on a device.
#[derive(Debug)]
pub struct DeviceBatch {
    /// Token ids, i64 `[N]`.
    pub token_ids: Tensor,
    /// Positions, i64 `[N]`; they go on from the prompt's in every completion.
    pub positions: Tensor,
    /// Who sees whom.
    pub layout: AttentionLayout,
    /// Rows whose next token is trained, i64 `[M]`.
    pub target_rows: Tensor,
    /// Those next tokens, i64 `[M]`.
    pub target_ids: Tensor,
    /// Completion s owns the targets `offsets[s]..offsets[s + 1]`.
    pub offsets: Offsets,
    /// The last row of every completion, i64 `[S]`.
    pub last_rows: Tensor,
    /// The largest token id, for checks against a vocabulary without asking the device.
    pub max_token_id: i64,
    /// The largest position, for checks against a context length.
    pub max_position: i64,
    /// Added to the embeddings of the rows, `[N, H]`: noise in training (NEFTune).
    pub embedding_noise: Option<Tensor>,
}

impl DeviceBatch {
    /// Copies a packed batch to `device`.
    ///
    /// # Errors
    /// [`Error::Torch`] when the device has no memory left; [`Error::Kernel`] when the batch's
    /// groups do not cover its rows.
    pub fn new(batch: &PackedBatch, device: Device) -> Result<Self> {
        let groups = batch
            .groups
            .iter()
            .map(|g| AttentionGroup {
                prompt: g.prompt.start as i64..g.prompt.end as i64,
                completions: g
                    .completions
                    .iter()
                    .map(|c| c.start as i64..c.end as i64)
                    .collect(),
            })
            .collect();
        let max_token_id = batch
            .token_ids
            .iter()
            .chain(&batch.target_ids)
            .copied()
            .max();
        Ok(Self {
            token_ids: upload(&batch.token_ids, device)?,
            positions: upload(&batch.positions, device)?,
            layout: AttentionLayout::new(groups)?,
            target_rows: upload(&batch.target_rows, device)?,
            target_ids: upload(&batch.target_ids, device)?,
            offsets: Offsets::new(batch.offsets.clone())?,
            last_rows: upload(&batch.last_rows(), device)?,
            max_token_id: max_token_id.unwrap_or(-1),
            max_position: batch.positions.iter().copied().max().unwrap_or(-1),
            embedding_noise: None,
        })
    }

    /// The number of packed rows, N.
    #[must_use]
    pub fn num_tokens(&self) -> i64 {
        self.token_ids.size().first().copied().unwrap_or(0)
    }

    /// The number of trained tokens, M.
    #[must_use]
    pub fn num_targets(&self) -> i64 {
        self.offsets.num_values()
    }

    /// The number of completions, S.
    #[must_use]
    pub fn num_completions(&self) -> i64 {
        self.offsets.num_segments()
    }

    /// Checks the batch against a model's vocabulary and context.
    pub(crate) fn check(&self, vocab_size: i64, context: i64) -> Result<()> {
        if self.max_token_id >= vocab_size {
            return Err(Error::Argument(format!(
                "token id {} is outside the model's vocabulary of {vocab_size}; tokenizer and model do not belong together",
                self.max_token_id
            )));
        }
        if self.max_position >= context {
            return Err(Error::Argument(format!(
                "a sequence of {} tokens is longer than the model's context of {context}; shorten it",
                self.max_position + 1
            )));
        }
        Ok(())
    }
}

fn upload(values: &[i64], device: Device) -> Result<Tensor> {
    Ok(Tensor::f_from_slice(values)?.f_to_device(device)?)
}
