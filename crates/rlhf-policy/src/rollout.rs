//! Completions drawn from a policy, and their rewards.
//!
//! Types carry the phase: [`Rollout`] has tokens and text, [`ScoredRollout`] has rewards too.
//! Invariant: a prompt draws the same noise whatever batch it is in: the key is
//! (seed, step, prompt's row, sample, token position).

use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_data::order::endless;
use rlhf_data::tokenize::ChatTokenizer;
use rlhf_model::{
    Decoder, DecoderWeights, GenerateLimits, GenerateRequest, LocalSampler, Sampler,
    SamplingConfig, Transformer,
};
use rlhf_reward::source::{Judged, RewardMix};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Result, ensure};

/// A prompt to draw completions for.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// Row of the data: part of the noise key.
    pub row: u64,
    /// Token ids, ending where the assistant begins.
    pub ids: Vec<u32>,
    /// The user's text.
    pub text: String,
    /// What else the data says about it.
    pub fields: Map<String, Value>,
}

/// How rollouts are drawn.
#[derive(Clone, Debug)]
pub struct RolloutConfig {
    /// Seed of the order of prompts and of the sampling noise.
    pub seed: u64,
    /// Prompts a step.
    pub prompts_per_step: usize,
    /// Completions of each prompt.
    pub group_size: usize,
    /// Sampling temperature; the learner's log-probs use it too.
    pub temperature: f64,
    /// As in [`SamplingConfig`]. Policy losses take completions to be drawn from the whole distribution: for
    /// evaluation and rejection sampling.
    pub top_k: Option<usize>,
    /// As `top_k`.
    pub top_p: Option<f64>,
    /// As `top_k`.
    pub min_p: Option<f64>,
    /// Longest completion in tokens.
    pub max_new_tokens: usize,
    /// Sequences decoded together.
    pub max_sequences: usize,
    /// How the sampler keeps the policy's weights.
    pub weights: DecoderWeights,
}

/// Completions of one prompt, as tokens and as text.
#[derive(Clone, Debug)]
pub struct Rollout {
    /// Index into the prompts.
    pub prompt: usize,
    /// Prompt and completions with the sampler's log-probs.
    pub group: PromptGroup,
    /// Each completion's text.
    pub texts: Vec<String>,
    /// `[K]` rewards that an environment gave, which are added to those of all sources; empty where there is none.
    pub earned: Vec<f64>,
}

/// A rollout with a reward for each completion.
#[derive(Clone, Debug)]
pub struct ScoredRollout {
    /// The rollout.
    pub rollout: Rollout,
    /// `[K]` rewards.
    pub rewards: Vec<f64>,
    /// `[K]` rewards of steps, each with the place of its step's last token in the completion; empty where nobody
    /// judges steps.
    pub steps: Vec<StepRewards>,
}

/// Rewards of a completion's steps: the place of each step's last token in the completion, and the reward.
pub type StepRewards = Vec<(usize, f64)>;

/// Something that scores the steps of completions (process supervision).
pub trait StepSource {
    /// A short name for metrics.
    fn name(&self) -> &str;

    /// The steps of each completion of each item, in order of places.
    ///
    /// # Errors
    /// Whatever keeps the source from scoring.
    fn steps(&self, items: &[Judged<'_>]) -> Result<Vec<Vec<StepRewards>>>;
}

/// The prompts of optimiser step `step`: an endless seeded walk over all of them.
#[must_use]
pub fn prompts_of_step(cfg: &RolloutConfig, num_prompts: usize, step: u64) -> Vec<usize> {
    let first = step * cfg.prompts_per_step as u64;
    (0..cfg.prompts_per_step as u64)
        .map(|i| endless(cfg.seed, num_prompts, first + i))
        .collect()
}

impl RolloutConfig {
    /// `model` as a sampler, its weights laid out as they are now.
    ///
    /// # Errors
    /// When memory does not suffice, or the model cannot be kept as [`RolloutConfig::weights`] says.
    pub fn local<'m>(&self, model: &'m Transformer) -> Result<LocalSampler<'m>> {
        Ok(LocalSampler {
            decoder: Decoder::with_weights(model, self.weights)?,
            limits: GenerateLimits {
                max_batch_sequences: self.max_sequences,
                ..GenerateLimits::default()
            },
        })
    }
}

/// Draws `cfg.group_size` completions of each chosen prompt.
///
/// # Errors
/// When the sampler fails or a prompt does not fit its context.
pub fn draw(
    sampler: &dyn Sampler,
    tokenizer: &ChatTokenizer,
    prompts: &[Prompt],
    chosen: &[usize],
    cfg: &RolloutConfig,
    step: u64,
) -> Result<Vec<Rollout>> {
    let requests: Vec<GenerateRequest> = chosen
        .iter()
        .map(|&i| GenerateRequest {
            prompt: prompts[i].ids.clone(),
            prompt_key: step << 32 | (prompts[i].row & 0xffff_ffff),
            samples: cfg.group_size,
            max_new_tokens: None,
        })
        .collect();
    let sampling = SamplingConfig {
        temperature: cfg.temperature,
        top_k: cfg.top_k,
        top_p: cfg.top_p,
        min_p: cfg.min_p,
        max_new_tokens: cfg.max_new_tokens,
        eos_ids: tokenizer.eos_ids().to_vec(),
        seed: cfg.seed,
        policy_version: step,
        ..SamplingConfig::default()
    };
    let groups = sampler.sample(&requests, &sampling)?;
    chosen
        .iter()
        .zip(groups)
        .map(|(&prompt, mut group)| {
            group.row = prompts[prompt].row;
            let texts = group
                .completions
                .iter()
                .map(|c| tokenizer.decode(&c.ids, true))
                .collect::<rlhf_data::Result<_>>()?;
            Ok(Rollout {
                prompt,
                group,
                texts,
                earned: Vec::new(),
            })
        })
        .collect()
}

/// Scored rollouts, and the mean of each part of the reward by name.
pub type Scored = (Vec<ScoredRollout>, Vec<(String, f64)>);

/// Scores rollouts; also gives the mean of each part of the reward by name, that of an environment as `environment`.
///
/// # Errors
/// When a reward source fails.
pub fn score(rollouts: Vec<Rollout>, prompts: &[Prompt], rewards: &RewardMix) -> Result<Scored> {
    let items: Vec<Judged<'_>> = rollouts
        .iter()
        .map(|r| Judged {
            group: &r.group,
            prompt: &prompts[r.prompt].text,
            texts: &r.texts,
            fields: &prompts[r.prompt].fields,
        })
        .collect();
    let scores = rewards.scores(&items)?;
    let earned: Vec<f64> = rollouts.iter().flat_map(|r| &r.earned).copied().collect();
    let mut parts = scores.part_means;
    if !earned.is_empty() {
        let mean = earned.iter().sum::<f64>() / earned.len() as f64;
        parts.insert(0, ("environment".to_owned(), mean));
    }
    let scored = rollouts
        .into_iter()
        .zip(scores.total)
        .map(|(rollout, mut rewards)| {
            for (total, earned) in rewards.iter_mut().zip(&rollout.earned) {
                *total += earned;
            }
            ScoredRollout {
                rollout,
                rewards,
                steps: Vec::new(),
            }
        })
        .collect();
    Ok((scored, parts))
}

/// Scores the steps of completions.
///
/// # Errors
/// When the source fails, or names a place outside a completion.
pub fn score_steps(
    scored: &mut [ScoredRollout],
    prompts: &[Prompt],
    source: &dyn StepSource,
) -> Result<()> {
    let items: Vec<Judged<'_>> = scored
        .iter()
        .map(|s| Judged {
            group: &s.rollout.group,
            prompt: &prompts[s.rollout.prompt].text,
            texts: &s.rollout.texts,
            fields: &prompts[s.rollout.prompt].fields,
        })
        .collect();
    let all = source.steps(&items)?;
    for (s, steps) in scored.iter_mut().zip(all) {
        let completions = &s.rollout.group.completions;
        let fits = steps.len() == completions.len()
            && steps.iter().zip(completions).all(|(steps, c)| {
                steps
                    .iter()
                    .all(|(at, r)| *at < c.ids.len() && r.is_finite())
            });
        ensure(fits, "step rewards", || {
            format!(
                "`{}` gave a step outside a completion of row {}, or a reward that is not finite",
                source.name(),
                s.rollout.group.row
            )
        })?;
        s.steps = steps;
    }
    Ok(())
}

/// Whether the group's rewards differ: without that it carries no gradient.
#[must_use]
pub fn has_contrast(scored: &ScoredRollout) -> bool {
    !scored.rewards.iter().all(|r| *r == scored.rewards[0])
}

/// Facts about a batch of rollouts, for the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RolloutStats {
    /// Mean reward.
    pub reward: f64,
    /// Standard deviation of rewards over the batch.
    pub reward_std: f64,
    /// Mean completion length in tokens.
    pub length: f64,
    /// Mean length of those that end by themselves; 0 where there is none.
    pub length_stopped: f64,
    /// Mean length of those that were cut off; 0 where there is none.
    pub length_cut: f64,
    /// Share of completions that end by themselves.
    pub stopped: f64,
    /// Share of groups whose rewards are all equal: they carry no gradient.
    pub no_contrast: f64,
    /// Packed tokens.
    pub tokens: usize,
}

/// Facts about `scored`.
#[must_use]
pub fn stats(scored: &[ScoredRollout]) -> RolloutStats {
    let rewards: Vec<f64> = scored
        .iter()
        .flat_map(|s| s.rewards.iter().copied())
        .collect();
    let completions: Vec<_> = scored
        .iter()
        .flat_map(|s| &s.rollout.group.completions)
        .collect();
    let n = rewards.len().max(1) as f64;
    let mean = rewards.iter().sum::<f64>() / n;
    let mean_length = |of: &dyn Fn(&Completion) -> bool| {
        let lengths: Vec<usize> = completions
            .iter()
            .filter(|c| of(c))
            .map(|c| c.ids.len())
            .collect();
        (
            lengths.iter().sum::<usize>() as f64 / lengths.len().max(1) as f64,
            lengths.len() as f64,
        )
    };
    let stopped = mean_length(&|c| c.finish == Finish::Stop);
    RolloutStats {
        reward: mean,
        reward_std: (rewards.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / n).sqrt(),
        length: mean_length(&|_| true).0,
        length_stopped: stopped.0,
        length_cut: mean_length(&|c| c.finish != Finish::Stop).0,
        stopped: stopped.1 / n,
        no_contrast: scored.iter().filter(|s| !has_contrast(s)).count() as f64
            / scored.len().max(1) as f64,
        tokens: scored.iter().map(|s| s.rollout.group.num_tokens()).sum(),
    }
}
