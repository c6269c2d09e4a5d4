//! Group-relative policy optimisation: GRPO (Shao et al. 2024), DAPO (Yu et al. 2025), Dr.GRPO, RLOO
//! and GSPO by their settings.
//!
//! Each step: draw K completions of each prompt, score them, compare each with its group, and take
//! `epochs` clipped policy-gradient steps on the batch.

use rlhf_data::group::PromptGroup;
use rlhf_data::tokenize::ChatTokenizer;
use rlhf_kernels::Ragged;
use rlhf_model::{Mismatch, Sampler, Transformer, target_logprobs};
use rlhf_reward::source::RewardMix;
use rlhf_train::{Flow, Session, Stepper};
use tch::Kind;

use crate::advantage::AdvantageEstimator;
use crate::error::Result;
use crate::kl::{KlPenalty, KlPlacement};
use crate::learner::{
    gather, logprobs_of, mean_kl, micro_batches, mismatch, sampler_logprobs, scatter,
};
use crate::loss::mismatch::Correction;
use crate::loss::{KlTerm, PolicyInputs, PolicyLoss, PolicyStats};
use crate::rollout::{self, Prompt, Rollout, RolloutConfig};

/// Settings of [`train`].
#[derive(Clone, Debug)]
pub struct GrpoConfig {
    /// How completions are drawn.
    pub rollouts: RolloutConfig,
    /// Batches of rollouts.
    pub steps: u64,
    /// Passes over each batch, one optimiser step each.
    pub epochs: u64,
    /// Packed tokens a micro-batch.
    pub micro_tokens: usize,
    /// How rewards become advantages.
    pub advantage: AdvantageEstimator,
    /// The surrogate: clipping and reduction.
    pub loss: PolicyLoss,
    /// The penalty on the distance from the reference.
    pub kl: KlPenalty,
    /// How completions are weighed that a sampler with other probabilities drew; not at all when absent.
    pub correction: Option<Correction>,
}

/// Who takes part: the policy, its frozen reference, tokenizer, prompts and rewards.
#[derive(Clone, Copy, Debug)]
pub struct Players<'a> {
    /// The policy, whose parameters the stepper holds.
    pub policy: &'a Transformer,
    /// The reference π₀.
    pub reference: &'a Transformer,
    /// The tokenizer.
    pub tokenizer: &'a ChatTokenizer,
    /// The prompts.
    pub prompts: &'a [Prompt],
    /// The rewards.
    pub rewards: &'a RewardMix,
    /// Who draws completions, where that is not the policy itself.
    pub server: Option<&'a dyn Sampler>,
}

impl Players<'_> {
    /// Draws the completions of step `step`.
    pub(crate) fn draw(&self, cfg: &RolloutConfig, step: u64) -> Result<Vec<Rollout>> {
        let chosen = rollout::prompts_of_step(cfg, self.prompts.len(), step);
        let draw = |sampler: &dyn Sampler| {
            rollout::draw(sampler, self.tokenizer, self.prompts, &chosen, cfg, step)
        };
        match self.server {
            Some(server) => draw(server),
            None => draw(&cfg.local(self.policy)?),
        }
    }
}

/// Trains the policy.
///
/// # Errors
/// When a rollout exceeds `micro_tokens`, a reward fails, the loss stays non-finite, or a file cannot
/// be written.
pub fn train(
    players: Players<'_>,
    cfg: &GrpoConfig,
    stepper: &mut Stepper,
    session: &mut Session,
) -> Result<Flow> {
    let Players {
        policy,
        reference,
        prompts,
        rewards,
        ..
    } = players;
    let (device, temperature) = (policy.device(), cfg.rollouts.temperature);
    let start = session
        .resume(&mut [("model", stepper)])?
        .map_or(0, |r: rlhf_train::Restored<()>| r.step);
    for step in start..cfg.steps {
        let drawn = players.draw(&cfg.rollouts, step)?;
        let (scored, parts) = rollout::score(drawn, prompts, rewards)?;
        let facts = rollout::stats(&scored);
        let groups: Vec<&PromptGroup> = scored.iter().map(|s| &s.rollout.group).collect();
        let sampler = sampler_logprobs(&groups);
        let base = logprobs_of(reference, &groups, temperature, cfg.micro_tokens, device)?;
        let kl = mean_kl(&sampler, &base);

        let mut scores: Vec<f64> = scored
            .iter()
            .flat_map(|s| s.rewards.iter().copied())
            .collect();
        if cfg.kl.placement == KlPlacement::InReward {
            for ((score, p), q) in scores.iter_mut().zip(&sampler).zip(&base) {
                *score -= cfg.kl.coef * (p.iter().sum::<f64>() - q.iter().sum::<f64>());
            }
        }
        let sizes: Vec<usize> = groups.iter().map(|g| g.completions.len()).collect();
        let advantages = cfg.advantage.advantages(&scores, &sizes)?;

        // The first pass runs on the sampler's own weights: its log-probs are the old policy's.
        let mut old = Vec::new();
        let (mut stats, mut gap, mut loss, mut grad_norm, mut lr) =
            (PolicyStats::default(), Mismatch::default(), 0.0, 0.0, 0.0);
        for epoch in 0..cfg.epochs {
            for micro in micro_batches(&groups, cfg.micro_tokens)? {
                let batch = micro.pack(&groups, device)?;
                let now = target_logprobs(policy, &batch, temperature, true)?;
                let here = micro.completions.clone();
                if epoch == 0 {
                    old.extend(scatter(&now.logprobs)?);
                }
                let list = |lists: &[Vec<f64>]| {
                    gather(
                        lists[here.clone()].iter(),
                        &batch.offsets,
                        Kind::Float,
                        device,
                    )
                };
                let before = if epoch == 0 {
                    now.logprobs.with_values(now.logprobs.values().detach())?
                } else {
                    list(&old)?
                };
                let ref_logprobs = list(&base)?;
                let spread: Vec<Vec<f64>> = here
                    .clone()
                    .map(|i| {
                        vec![advantages[i]; batch.offsets.host_lengths()[i - here.start] as usize]
                    })
                    .collect();
                let spread: Ragged = gather(spread.iter(), &batch.offsets, Kind::Float, device)?;
                let mut inputs = PolicyInputs::new(&now.logprobs, &before, &spread);
                inputs.entropy = now.entropy.as_ref();
                let weights = match &cfg.correction {
                    Some(c) => Some(c.weights(&before, &list(&sampler)?)?),
                    None => None,
                };
                inputs.weights = weights.as_ref();
                if cfg.kl.placement != KlPlacement::InReward && cfg.kl.coef > 0.0 {
                    inputs.kl = Some(KlTerm {
                        ref_logprobs: &ref_logprobs,
                        penalty: cfg.kl,
                    });
                }
                let out = cfg.loss.compute(&inputs)?;
                stats.merge(&out.stats);
                stepper.accumulate(out.loss)?;
            }
            if epoch == 0 {
                gap = mismatch(&old, &sampler);
            }
            let report = stepper.apply()?;
            (loss, grad_norm, lr) = (report.loss, report.grad_norm, report.lr);
        }

        let mut metrics = vec![
            ("loss", loss),
            ("reward", facts.reward),
            ("reward_std", facts.reward_std),
            ("kl", kl),
            ("length", facts.length),
            ("stopped", facts.stopped),
            ("no_contrast", facts.no_contrast),
            ("entropy", stats.entropy()),
            ("clip_fraction_low", stats.clip_fraction_low()),
            ("clip_fraction_high", stats.clip_fraction_high()),
            ("ratio_mean", stats.ratio_mean()),
            ("approx_kl", stats.approx_kl()),
            ("sampler_gap", gap.largest),
            ("sampler_kl", gap.kl),
            ("grad_norm", grad_norm),
            ("lr", lr),
        ];
        let named: Vec<(String, f64)> = parts
            .into_iter()
            .map(|(n, v)| (format!("reward_{n}"), v))
            .collect();
        metrics.extend(named.iter().map(|(n, v)| (n.as_str(), *v)));
        session.log(step, facts.tokens, &metrics)?;
        if let Flow::Stop(signal) = session.after_step(step, &[("model", stepper)], &())? {
            return Ok(Flow::Stop(signal));
        }
    }
    Ok(Flow::Continue)
}
