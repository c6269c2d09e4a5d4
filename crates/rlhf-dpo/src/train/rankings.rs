//! Rankings: K completions of one prompt, best first (DPO under the Plackett–Luce model).

use rlhf_data::group::PromptGroup;
use rlhf_kernels::{LossSum, Offsets, Ragged};
use rlhf_model::Transformer;
use rlhf_train::{Flow, Session, Stepper};
use tch::Tensor;

use super::measure::{mean, prefers};
use super::{HeldOut, Seen, Sums, Task, TrainConfig, completion_sums, host, run, starts};
use crate::error::{Result, ensure};
use crate::loss::plackett_luce::RankedLoss;

/// Settings of [`train`].
pub type RankedConfig = TrainConfig<RankedLoss>;

/// Rankings and what is known of them.
#[derive(Clone, Copy, Debug)]
pub struct RankedData<'a> {
    /// Completions best first, at least two.
    pub groups: &'a [PromptGroup],
    /// The sum of each completion's log-probs under the reference, group after group
    /// ([`met_sums`](super::met_sums)).
    pub reference: &'a [f64],
}

struct RankedTask<'a> {
    data: RankedData<'a>,
    loss: RankedLoss,
    starts: Vec<usize>,
}

impl<'a> RankedTask<'a> {
    fn new(data: RankedData<'a>, loss: RankedLoss) -> Result<Self> {
        let starts = starts(data.groups);
        let completions = starts[data.groups.len()];
        ensure(
            data.reference.len() == completions && completions > 0,
            "training on rankings",
            || {
                format!(
                    "{completions} completions and {} sums of the reference: expected as many, at least one",
                    data.reference.len()
                )
            },
        )?;
        let odd = data.groups.iter().find(|g| g.completions.len() < 2);
        ensure(odd.is_none(), "training on rankings", || {
            let row = odd.map_or(0, |g| g.row);
            format!("row {row} has one completion: there is nothing to rank")
        })?;
        Ok(Self { data, loss, starts })
    }

    /// The groups that `picks` are, as offsets, and their sums under the reference.
    fn reference(&self, picks: &[usize]) -> Result<(Offsets, Vec<f64>)> {
        let (mut offsets, mut sums) = (vec![0], Vec::new());
        for &i in picks {
            sums.extend(&self.data.reference[self.starts[i]..self.starts[i + 1]]);
            offsets.push(sums.len() as i64);
        }
        Ok((Offsets::new(offsets)?, sums))
    }
}

/// Share of the pairs of one prompt that stand in the right order, and whether the best stands first; ties half.
fn agreement(rewards: &[f64]) -> (f64, f64) {
    let pairs = (0..rewards.len()).flat_map(|i| (i + 1..rewards.len()).map(move |j| (i, j)));
    let others = rewards[1..]
        .iter()
        .copied()
        .fold(f64::NEG_INFINITY, f64::max);
    (
        mean(pairs.map(|(i, j)| prefers(rewards[i], rewards[j]))),
        prefers(rewards[0], others),
    )
}

impl Task for RankedTask<'_> {
    fn groups(&self) -> &[PromptGroup] {
        self.data.groups
    }

    fn loss(
        &self,
        picks: &[usize],
        own: &Sums,
        _baseline: f64,
        seen: &mut Seen,
    ) -> Result<LossSum> {
        let (offsets, reference) = self.reference(picks)?;
        let ratios = &own.logprobs - own.column(reference);
        let out = self.loss.compute(&Ragged::new(ratios, offsets.clone())?)?;
        let rewards = host(&out.rewards)?;
        for w in offsets.host().windows(2) {
            let (accuracy, best) = agreement(&rewards[w[0] as usize..w[1] as usize]);
            seen.add("accuracy", accuracy);
            seen.add("best_first", best);
        }
        for (name, values) in [("logprobs", &own.logprobs), ("length", &own.lengths)] {
            for value in host(values)? {
                seen.add(name, value);
            }
        }
        seen.rewards.extend(rewards);
        Ok(out.loss)
    }

    fn look(
        &self,
        model: &Transformer,
        micro_tokens: usize,
        _rewards: f64,
    ) -> Result<Vec<(&'static str, f64)>> {
        let sums = completion_sums(model, self.data.groups, micro_tokens)?;
        let picks: Vec<usize> = (0..self.data.groups.len()).collect();
        let (offsets, reference) = self.reference(&picks)?;
        let ratios = Tensor::from_slice(&sums) - Tensor::from_slice(&reference);
        let out = tch::no_grad(|| self.loss.compute(&Ragged::new(ratios, offsets.clone())?))?;
        let rewards = host(&out.rewards)?;
        let found: Vec<(f64, f64)> = offsets
            .host()
            .windows(2)
            .map(|w| agreement(&rewards[w[0] as usize..w[1] as usize]))
            .collect();
        Ok(vec![
            (
                "test_loss",
                out.loss.sum.double_value(&[]) / out.loss.weight,
            ),
            ("test_accuracy", mean(found.iter().map(|f| f.0))),
            ("test_best_first", mean(found.iter().map(|f| f.1))),
        ])
    }
}

/// Trains `model`, whose parameters `stepper` holds, on rankings. What is found on `held_out` ones is logged as
/// `test_…`.
///
/// # Errors
/// When a ranking exceeds `micro_tokens`, the loss fails or stays non-finite, or a file cannot be written.
pub fn train(
    model: &Transformer,
    data: RankedData<'_>,
    cfg: &RankedConfig,
    held_out: Option<&HeldOut<'_, RankedData<'_>>>,
    stepper: &mut Stepper,
    session: &mut Session,
) -> Result<Flow> {
    let task = RankedTask::new(data, cfg.loss)?;
    let held_out = held_out
        .map(|h| h.try_map(|data| RankedTask::new(data, cfg.loss)))
        .transpose()?;
    run(model, &task, cfg, held_out.as_ref(), stepper, session)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agreement_by_hand() {
        // 3 > 1, 3 > 2 and not 1 > 2; the best is first.
        assert_eq!(agreement(&[3.0, 1.0, 2.0]), (2.0 / 3.0, 1.0));
        assert_eq!(agreement(&[1.0, 1.0]), (0.5, 0.5));
    }
}
