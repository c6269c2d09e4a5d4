//! What GRPO and PPO share between drawing completions and learning from them.
//!
//! Invariant: per-token facts of rollouts (log-probs, values, advantages) live on the host, one list
//! per completion, so that any grouping into micro-batches gathers the same numbers.

use rlhf_data::group::PromptGroup;
use rlhf_data::pack::{PackedBatch, batches_by_tokens};
use rlhf_kernels::{Offsets, Ragged};
use rlhf_model::{CausalLm, DeviceBatch, Mismatch, target_logprobs};
use tch::{Device, Kind, Tensor};

use crate::error::Result;

/// One number for each trained token of each completion.
pub(crate) type PerToken = Vec<Vec<f64>>;

/// Gathers per-token facts of a micro-batch's completions as one ragged tensor.
pub(crate) fn gather<'a>(
    lists: impl Iterator<Item = &'a Vec<f64>>,
    offsets: &Offsets,
    kind: Kind,
    device: Device,
) -> Result<Ragged> {
    let flat: Vec<f64> = lists.flatten().copied().collect();
    Ok(Ragged::new(
        Tensor::from_slice(&flat).to_kind(kind).to_device(device),
        offsets.clone(),
    )?)
}

/// The values of a ragged tensor as one list per completion.
pub(crate) fn scatter(values: &Ragged) -> Result<PerToken> {
    let host = Vec::<f64>::try_from(
        &values
            .values()
            .detach()
            .to_kind(Kind::Double)
            .to_device(Device::Cpu),
    )?;
    Ok(values
        .offsets()
        .host()
        .windows(2)
        .map(|w| host[w[0] as usize..w[1] as usize].to_vec())
        .collect())
}

/// Micro-batches of `groups`: ranges of groups with the completions that they hold.
pub(crate) fn micro_batches(groups: &[&PromptGroup], micro_tokens: usize) -> Result<Vec<Micro>> {
    let lengths: Vec<usize> = groups.iter().map(|g| g.num_tokens()).collect();
    let mut first = 0;
    Ok(batches_by_tokens(&lengths, micro_tokens)?
        .into_iter()
        .map(|range| {
            let n: usize = groups[range.clone()]
                .iter()
                .map(|g| g.completions.len())
                .sum();
            let completions = first..first + n;
            first += n;
            Micro {
                groups: range,
                completions,
            }
        })
        .collect())
}

/// A micro-batch: which groups, and which completions counted over all groups.
#[derive(Clone, Debug)]
pub(crate) struct Micro {
    pub(crate) groups: std::ops::Range<usize>,
    pub(crate) completions: std::ops::Range<usize>,
}

impl Micro {
    /// Packs the micro-batch onto a device.
    pub(crate) fn pack(&self, groups: &[&PromptGroup], device: Device) -> Result<DeviceBatch> {
        let part: Vec<PromptGroup> = groups[self.groups.clone()]
            .iter()
            .map(|g| (*g).clone())
            .collect();
        Ok(DeviceBatch::new(&PackedBatch::pack(&part)?, device)?)
    }
}

/// Log-probs of every trained token under `model`, without gradients.
pub(crate) fn logprobs_of(
    model: &dyn CausalLm,
    groups: &[&PromptGroup],
    temperature: f64,
    micro_tokens: usize,
    device: Device,
) -> Result<PerToken> {
    let _guard = tch::no_grad_guard();
    let mut all = Vec::new();
    for micro in micro_batches(groups, micro_tokens)? {
        let batch = micro.pack(groups, device)?;
        all.extend(scatter(
            &target_logprobs(model, &batch, temperature, false)?.logprobs,
        )?);
    }
    Ok(all)
}

/// The sampler's log-probs of every completion.
pub(crate) fn sampler_logprobs(groups: &[&PromptGroup]) -> PerToken {
    groups
        .iter()
        .flat_map(|g| &g.completions)
        .map(|c| {
            c.sampler.as_ref().map_or_else(Vec::new, |s| {
                s.logprobs.iter().map(|&x| f64::from(x)).collect()
            })
        })
        .collect()
}

/// Mean over completions of Σ (log π − log π₀): the KL in nats a completion, estimated by k1.
pub(crate) fn mean_kl(policy: &PerToken, reference: &PerToken) -> f64 {
    let sum: f64 = policy.iter().flatten().sum::<f64>() - reference.iter().flatten().sum::<f64>();
    sum / policy.len().max(1) as f64
}

/// What learner and sampler disagree by on the same tokens.
pub(crate) fn mismatch(learner: &PerToken, sampler: &PerToken) -> Mismatch {
    Mismatch::of(
        learner.iter().flatten().copied(),
        sampler.iter().flatten().copied(),
    )
}
