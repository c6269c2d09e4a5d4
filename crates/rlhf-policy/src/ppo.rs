//! Proximal policy optimisation (Schulman et al. 2017; for language models Ziegler et al. 2019,
//! Stiennon et al. 2020): a value model of its own, GAE, clipped policy and value losses, and a KL
//! penalty to the reference in the reward of each token.

use rlhf_data::group::PromptGroup;
use rlhf_data::order::Permutation;
use rlhf_kernels::Offsets;
use rlhf_model::{ScalarModel, target_logprobs};
use rlhf_train::{Flow, Session, Stepper};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::advantage::{Whitening, generalized};
use crate::error::Result;
use crate::grpo::Players;
use crate::kl::{KlController, KlEstimator};
use crate::learner::{
    PerToken, gather, logprobs_of, mean_kl, micro_batches, sampler_logprobs, scatter,
};
use crate::loss::ppo::{PpoLoss, ScorePlace, ValueInputs, ValueStats, token_rewards, value_loss};
use crate::loss::{PolicyInputs, PolicyStats, RatioLevel, Reduction, clipped};
use crate::rollout::{self, RolloutConfig};

/// Settings of [`train`].
#[derive(Clone, Debug)]
pub struct PpoConfig {
    /// How completions are drawn.
    pub rollouts: RolloutConfig,
    /// Batches of rollouts.
    pub steps: u64,
    /// Passes over each batch.
    pub epochs: u64,
    /// Optimiser steps a pass.
    pub minibatches: usize,
    /// Packed tokens a micro-batch.
    pub micro_tokens: usize,
    /// Policy and value clips.
    pub loss: PpoLoss,
    /// γ.
    pub gamma: f64,
    /// λ.
    pub gae_lambda: f64,
    /// The KL coefficient, fixed or adaptive.
    pub kl: KlController,
    /// Batches at the start in which only the value model learns.
    pub value_warmup_steps: u64,
}

/// What a run saves besides weights.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct State {
    kl: KlController,
}

/// The value model with the stepper that holds its parameters, and the policy's stepper.
#[derive(Debug)]
pub struct Learners<'a> {
    /// V.
    pub value: &'a ScalarModel,
    /// The policy's stepper.
    pub policy_stepper: &'a mut Stepper,
    /// The value model's stepper.
    pub value_stepper: &'a mut Stepper,
}

/// What is known of a batch of rollouts, for each token of each completion.
struct Known {
    old: PerToken,
    values: PerToken,
    advantages: PerToken,
    returns: PerToken,
}

/// Trains policy and value model.
///
/// # Errors
/// When a rollout exceeds `micro_tokens`, a reward fails, the loss stays non-finite, or a file cannot
/// be written.
pub fn train(
    players: Players<'_>,
    learners: Learners<'_>,
    cfg: &PpoConfig,
    session: &mut Session,
) -> Result<Flow> {
    let Players {
        policy,
        reference,
        prompts,
        rewards,
        ..
    } = players;
    let Learners {
        value,
        policy_stepper,
        value_stepper,
    } = learners;
    let (device, temperature) = (policy.device(), cfg.rollouts.temperature);
    let restored =
        session.resume::<State>(&mut [("model", policy_stepper), ("value", value_stepper)])?;
    let (start, mut state) = restored.map_or((0, State { kl: cfg.kl }), |r| (r.step, r.extra));
    for step in start..cfg.steps {
        let drawn = players.draw(&cfg.rollouts, step)?;
        let (scored, parts) = rollout::score(drawn, prompts, rewards)?;
        let facts = rollout::stats(&scored);
        let groups: Vec<&PromptGroup> = scored.iter().map(|s| &s.rollout.group).collect();
        let scores: Vec<f64> = scored
            .iter()
            .flat_map(|s| s.rewards.iter().copied())
            .collect();

        let sampler = sampler_logprobs(&groups);
        let base = logprobs_of(reference, &groups, temperature, cfg.micro_tokens, device)?;
        let kl = mean_kl(&sampler, &base);
        let known = know(
            value,
            &groups,
            sampler,
            &base,
            &scores,
            state.kl.coef(),
            cfg,
        )?;
        state.kl.update(kl, scores.len() as u64);

        let learn_policy = step >= cfg.value_warmup_steps;
        let mut seen = Seen::default();
        for epoch in 0..cfg.epochs {
            let order = Permutation::new(cfg.rollouts.seed ^ step, groups.len(), epoch);
            let order: Vec<usize> = (0..groups.len()).map(|i| order.at(i)).collect();
            for part in order.chunks(groups.len().div_ceil(cfg.minibatches)) {
                let (picked, completions) = pick(&groups, part);
                for micro in micro_batches(&picked, cfg.micro_tokens)? {
                    let batch = micro.pack(&picked, device)?;
                    let here = &completions[micro.completions.clone()];
                    let list = |lists: &PerToken| {
                        gather(
                            here.iter().map(|&i| &lists[i]),
                            &batch.offsets,
                            Kind::Float,
                            device,
                        )
                    };
                    if learn_policy {
                        let now = target_logprobs(policy, &batch, temperature, true)?;
                        let (old, advantages) = (list(&known.old)?, list(&known.advantages)?);
                        let mut inputs = PolicyInputs::new(&now.logprobs, &old, &advantages);
                        inputs.entropy = now.entropy.as_ref();
                        let out = clipped::surrogate(
                            &inputs,
                            cfg.loss.clip,
                            RatioLevel::Token,
                            Reduction::Token {},
                        )?;
                        seen.policy.merge(&out.stats);
                        policy_stepper.accumulate(out.loss)?;
                    }
                    let values = value.values(&batch)?;
                    let (old_values, returns) = (list(&known.values)?, list(&known.returns)?);
                    let inputs = ValueInputs {
                        values: &values,
                        old_values: &old_values,
                        returns: &returns,
                    };
                    let out = value_loss(&inputs, cfg.loss.value_clip)?;
                    seen.value.merge(&out.stats);
                    value_stepper.accumulate(out.loss)?;
                }
                if learn_policy {
                    let report = policy_stepper.apply()?;
                    (seen.loss, seen.grad_norm, seen.lr) =
                        (report.loss, report.grad_norm, report.lr);
                }
                let report = value_stepper.apply()?;
                seen.value_loss = report.loss;
            }
        }

        let mut metrics = vec![
            ("loss", seen.loss),
            ("value_loss", seen.value_loss),
            ("explained_variance", seen.value.explained_variance()),
            ("value_clip_fraction", seen.value.clip_fraction()),
            ("reward", facts.reward),
            ("reward_std", facts.reward_std),
            ("kl", kl),
            ("kl_coef", state.kl.coef()),
            ("length", facts.length),
            ("stopped", facts.stopped),
            ("entropy", seen.policy.entropy()),
            ("clip_fraction_low", seen.policy.clip_fraction_low()),
            ("clip_fraction_high", seen.policy.clip_fraction_high()),
            ("ratio_mean", seen.policy.ratio_mean()),
            ("approx_kl", seen.policy.approx_kl()),
            ("grad_norm", seen.grad_norm),
            ("lr", seen.lr),
        ];
        let named: Vec<(String, f64)> = parts
            .into_iter()
            .map(|(n, v)| (format!("reward_{n}"), v))
            .collect();
        metrics.extend(named.iter().map(|(n, v)| (n.as_str(), *v)));
        session.log(step, facts.tokens, &metrics)?;
        let steppers = [("model", &*policy_stepper), ("value", &*value_stepper)];
        if let Flow::Stop(signal) = session.after_step(step, &steppers, &state)? {
            return Ok(Flow::Stop(signal));
        }
    }
    Ok(Flow::Continue)
}

#[derive(Default)]
struct Seen {
    policy: PolicyStats,
    value: ValueStats,
    loss: f64,
    value_loss: f64,
    grad_norm: f64,
    lr: f64,
}

/// Values, rewards of tokens, advantages and returns of a batch, on the host.
fn know(
    value: &ScalarModel,
    groups: &[&PromptGroup],
    old: PerToken,
    base: &PerToken,
    scores: &[f64],
    kl_coef: f64,
    cfg: &PpoConfig,
) -> Result<Known> {
    let guard = tch::no_grad_guard();
    let mut values = Vec::new();
    for micro in micro_batches(groups, cfg.micro_tokens)? {
        values.extend(scatter(
            &value.values(&micro.pack(groups, value.device())?)?,
        )?);
    }
    drop(guard);
    let lengths: Vec<i64> = old.iter().map(|o| o.len() as i64).collect();
    let offsets = Offsets::from_lengths(&lengths)?;
    let list = |lists: &PerToken| gather(lists.iter(), &offsets, Kind::Double, Device::Cpu);
    let kl = KlEstimator::K1.estimate(&list(&old)?, &list(base)?)?;
    let rewards = token_rewards(
        &kl,
        &Tensor::from_slice(scores),
        kl_coef,
        ScorePlace::LastToken {},
    )?;
    let g = generalized(
        &rewards,
        &list(&values)?,
        cfg.gamma,
        cfg.gae_lambda,
        Whitening::RemoveMean,
    )?;
    Ok(Known {
        advantages: scatter(&g.advantages)?,
        returns: scatter(&g.returns)?,
        old,
        values,
    })
}

/// The chosen groups, and the index of each of their completions over all groups.
fn pick<'a>(groups: &[&'a PromptGroup], chosen: &[usize]) -> (Vec<&'a PromptGroup>, Vec<usize>) {
    let mut first = vec![0];
    for g in groups {
        first.push(first[first.len() - 1] + g.completions.len());
    }
    let completions = chosen
        .iter()
        .flat_map(|&i| first[i]..first[i + 1])
        .collect();
    (chosen.iter().map(|&i| groups[i]).collect(), completions)
}
