//! Proximal policy optimisation (Schulman et al. 2017; for language models Ziegler et al. 2019,
//! Stiennon et al. 2020): a value function, GAE, clipped policy and value losses, and a KL penalty to the
//! reference in the reward of each token. With one pass and one minibatch it is A2C (Mnih et al. 2016).

use std::time::Instant;

use rlhf_data::group::PromptGroup;
use rlhf_data::order::{Permutation, endless};
use rlhf_kernels::{LossSum, Ragged};
use rlhf_model::{
    CausalLm, DeviceBatch, ScalarModel, TargetLogprobs, ValueHead, target_logprobs,
    target_logprobs_and_values,
};
use rlhf_train::{Flow, Session, Stepper};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::advantage::{Whitening, generalized, whiten};
use crate::collect::{Harvest, Place, Rules, Samples, Source, drawing};
use crate::error::Result;
use crate::grpo::Players;
use crate::kl::{KlController, KlEstimator};
use crate::learner::{
    PerToken, StepLog, each_kl, gather, logprobs_of, mean_k3, mean_kl, micro_batches, mismatch,
    on_host, pick, sampler_logprobs, scatter, silence_cut, step_rewards, told,
};
use crate::loss::ppo::{PpoLoss, ScorePlace, ValueInputs, ValueStats, token_rewards, value_loss};
use crate::loss::{PolicyInputs, PolicyStats, RatioLevel, Reduction, clipped};
use crate::reference::ReferencePolicy;
use crate::rollout::RolloutConfig;

/// Settings of [`train`].
#[derive(Clone, Debug)]
pub struct PpoConfig {
    /// How completions are drawn.
    pub rollouts: RolloutConfig,
    /// What is done with them before they are learned from.
    pub rules: Rules,
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
    /// What is done to advantages over the batch.
    pub whitening: Whitening,
    /// Whether rewards of tokens are first brought to a deviation of 1 about their mean (TRL's `whiten_rewards`).
    pub whiten_rewards: bool,
    /// The KL coefficient, fixed or adaptive.
    pub kl: KlController,
    /// What becomes of the reference.
    pub reference: ReferencePolicy,
    /// As [`crate::grpo::GrpoConfig::max_kl`].
    pub max_kl: Option<f64>,
    /// Batches at the start in which only the value model learns.
    pub value_warmup_steps: u64,
    /// Samples kept for the report.
    pub samples: Option<Samples>,
}

/// What a run saves besides weights.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    place: Place,
    kl: KlController,
}

/// The value function.
#[derive(Debug)]
pub enum Value<'a> {
    /// A model of its own with a stepper of its own.
    Separate {
        /// V.
        model: &'a ScalarModel,
        /// What holds its parameters.
        stepper: &'a mut Stepper,
    },
    /// A head on the policy's trunk, whose loss is added to the policy's with a weight. The policy's stepper holds
    /// the head too.
    Shared {
        /// The head.
        head: &'a ValueHead,
        /// The weight of its loss (`vf_coef`).
        coef: f64,
    },
}

/// Pretraining text mixed in: InstructGPT's PPO-ptx (Ouyang et al. 2022, arXiv 2203.02155, equation 2).
#[derive(Clone, Copy, Debug)]
pub struct Ptx<'a> {
    /// Texts or demonstrations.
    pub data: &'a [PromptGroup],
    /// Rows a minibatch.
    pub batch_size: usize,
    /// γ, the weight of −log π meant over their trained tokens.
    pub coef: f64,
}

/// Who learns: the value function, and the policy's stepper.
#[derive(Debug)]
pub struct Learners<'a> {
    /// V.
    pub value: Value<'a>,
    /// The policy's stepper.
    pub policy_stepper: &'a mut Stepper,
    /// Text mixed in, if any.
    pub ptx: Option<Ptx<'a>>,
}

/// What is known of a batch of rollouts, for each token of each completion.
struct Known {
    old: PerToken,
    values: PerToken,
    advantages: PerToken,
    returns: PerToken,
}

/// Trains policy and value function.
///
/// # Errors
/// When settings contradict each other, a rollout exceeds `micro_tokens`, a reward fails, the loss stays non-finite,
/// or a file cannot be read or written.
pub fn train(
    players: Players<'_>,
    learners: Learners<'_>,
    cfg: &PpoConfig,
    session: &mut Session,
) -> Result<Flow> {
    drawing(players, &cfg.rollouts, &cfg.rules, cfg.steps, |source| {
        run(source, players, learners, cfg, session)
    })
}

fn run(
    mut source: Source<'_>,
    players: Players<'_>,
    mut learners: Learners<'_>,
    cfg: &PpoConfig,
    session: &mut Session,
) -> Result<Flow> {
    let policy = players.policy;
    let (device, temperature) = (policy.device(), cfg.rollouts.temperature);
    let mut state = State {
        place: Place::default(),
        kl: cfg.kl,
    };
    let start = match session.resume::<State>(&mut learners.steppers_mut())? {
        Some(restored) => {
            state = restored.extra;
            source.restore(std::mem::take(&mut state.place))?;
            restored.step
        }
        None => {
            if cfg.max_kl.is_some() {
                session.before_first(&learners.steppers(), &state)?;
            }
            0
        }
    };
    for step in start..cfg.steps {
        let mut harvest = source.rollouts(step)?;
        let began = Instant::now();
        if cfg.rules.filter_cut {
            silence_cut(&mut harvest.scored);
        }
        let groups = harvest.groups();
        let sampler = sampler_logprobs(&groups);
        let base = players
            .reference
            .map(|r| logprobs_of(r, &groups, temperature, cfg.micro_tokens, device))
            .transpose()?;
        let mut log = StepLog::new(&harvest);
        let kl = base.as_ref().map(|b| mean_kl(&sampler, b));
        if let (Some(kl), Some(base)) = (kl, &base) {
            let k3 = mean_k3(&sampler, base);
            log.add(&[("kl", kl), ("kl_k3", k3), ("kl_coef", state.kl.coef())]);
        }
        if let Some(base) = &base {
            let charged = harvest.charge_kl(players.rewards, &each_kl(&sampler, base));
            log.add(charged.map(|x| ("reward_kl_penalty", x)).as_slice());
        }
        let groups = harvest.groups();
        if cfg
            .max_kl
            .is_some_and(|most| kl.is_some_and(|kl| kl > most))
        {
            log.add(&[("kl_exceeded", 1.0)]);
            session.log(step, 0, &log.values())?;
            let before = harvest.version.saturating_sub(1);
            session.rewind::<State>(before, &mut learners.steppers_mut())?;
            return Ok(Flow::Continue);
        }
        // The ratio is against whoever drew, so that it mends what ahead of its time was drawn by older weights.
        if harvest.version != step {
            let now = logprobs_of(policy, &groups, temperature, cfg.micro_tokens, device)?;
            let gap = mismatch(&now, &sampler);
            log.add(&[("sampler_gap", gap.largest), ("sampler_kl", gap.kl)]);
        }
        let known = know(
            policy,
            &learners.value,
            &harvest,
            &groups,
            sampler.clone(),
            base.as_ref(),
            state.kl.coef(),
            cfg,
        )?;
        if let Some(kl) = kl {
            state.kl.update(kl, known.old.len() as u64);
        }

        let seen = learn(policy, &mut learners, cfg, step, &groups, &known)?;
        if let Some(reference) = players.reference {
            let stepper = &mut *learners.policy_stepper;
            cfg.reference
                .after_step(step + 1, reference, policy, stepper)?;
        }
        log.add(&[
            ("loss", seen.loss),
            ("value_loss", seen.value_loss),
            ("value_mean", seen.value.value_mean()),
            ("return_mean", seen.value.return_mean()),
            ("explained_variance", seen.value.explained_variance()),
            ("value_clip_fraction", seen.value.clip_fraction()),
            ("grad_norm", seen.grad_norm),
            ("lr", seen.lr),
        ]);
        if learners.ptx.is_some() {
            log.add(&[("ptx_loss", seen.ptx.0 / seen.ptx.1.max(1.0))]);
        }
        log.policy(&seen.policy, seen.ratios, &known.advantages);
        log.speed(&harvest, cfg.epochs, began.elapsed().as_secs_f64());
        if let Some(samples) = &cfg.samples {
            let told = told(&known.advantages, &sampler, base.as_ref());
            samples.after_step(session, &players, &harvest, &told)?;
        }
        session.log(step, harvest.facts.stats.tokens, &log.values())?;
        if session.due(step) {
            state.place = source.place()?;
        }
        if let Flow::Stop(signal) = session.after_step(step, &learners.steppers(), &state)? {
            return Ok(Flow::Stop(signal));
        }
    }
    Ok(Flow::Continue)
}

impl Learners<'_> {
    fn steppers(&self) -> Vec<(&str, &Stepper)> {
        let mut all = vec![("model", &*self.policy_stepper)];
        if let Value::Separate { stepper, .. } = &self.value {
            all.push(("value", &**stepper));
        }
        all
    }

    fn steppers_mut(&mut self) -> Vec<(&str, &mut Stepper)> {
        let mut all = vec![("model", &mut *self.policy_stepper)];
        if let Value::Separate { stepper, .. } = &mut self.value {
            all.push(("value", &mut **stepper));
        }
        all
    }
}

#[derive(Default)]
struct Seen {
    policy: PolicyStats,
    value: ValueStats,
    ratios: Vec<f64>,
    /// Σ −log π and tokens of the text mixed in.
    ptx: (f64, f64),
    loss: f64,
    value_loss: f64,
    grad_norm: f64,
    lr: f64,
}

/// The passes over a batch.
fn learn(
    policy: &rlhf_model::Transformer,
    learners: &mut Learners<'_>,
    cfg: &PpoConfig,
    step: u64,
    groups: &[&PromptGroup],
    known: &Known,
) -> Result<Seen> {
    let learn_policy = step >= cfg.value_warmup_steps;
    let mut seen = Seen::default();
    for epoch in 0..cfg.epochs {
        let order = Permutation::new(cfg.rollouts.seed ^ step, groups.len(), epoch);
        let order: Vec<usize> = (0..groups.len()).map(|i| order.at(i)).collect();
        for (turn, part) in order
            .chunks(groups.len().div_ceil(cfg.minibatches))
            .enumerate()
        {
            let (picked, completions) = pick(groups, part);
            let tokens: usize = completions.iter().map(|&i| known.old[i].len()).sum();
            if tokens == 0 {
                continue;
            }
            let mut shared_loss = 0.0;
            for micro in micro_batches(&picked, cfg.micro_tokens)? {
                let batch = micro.pack(&picked, policy.device())?;
                if batch.offsets.num_values() == 0 {
                    continue;
                }
                let here = &completions[micro.completions.clone()];
                let list = |lists: &PerToken| {
                    let rows = here.iter().map(|&i| &lists[i]);
                    gather(rows, &batch.offsets, Kind::Float, policy.device())
                };
                let (now, values) = learners.value.forward(
                    policy,
                    &batch,
                    cfg.rollouts.temperature,
                    learn_policy,
                )?;
                let (old_values, returns) = (list(&known.values)?, list(&known.returns)?);
                let inputs = ValueInputs {
                    values: &values,
                    old_values: &old_values,
                    returns: &returns,
                };
                let value = value_loss(&inputs, cfg.loss.value_clip)?;
                seen.value.merge(&value.stats);
                let mut loss = None;
                if let Some(now) = &now {
                    let (old, advantages) = (list(&known.old)?, list(&known.advantages)?);
                    if epoch + 1 == cfg.epochs {
                        let log_ratio = now.logprobs.values().detach() - old.values();
                        let ratios = log_ratio.exp().to_kind(Kind::Double).to_device(Device::Cpu);
                        seen.ratios.extend(Vec::<f64>::try_from(&ratios)?);
                    }
                    let mut inputs = PolicyInputs::new(&now.logprobs, &old, &advantages);
                    inputs.entropy = now.entropy.as_ref();
                    let token = (RatioLevel::Token, Reduction::Token {});
                    let out = clipped::surrogate(&inputs, cfg.loss.clip, token.0, token.1)?;
                    seen.policy.merge(&out.stats);
                    loss = Some(out.loss);
                }
                match &mut learners.value {
                    Value::Separate { stepper, .. } => stepper.accumulate(value.loss)?,
                    Value::Shared { coef, .. } => {
                        // Both are sums over the same tokens.
                        let weight = value.loss.weight;
                        let own = &value.loss.sum * *coef;
                        shared_loss += value.loss.sum.double_value(&[]) / tokens as f64;
                        let sum = loss.map_or_else(|| own.shallow_clone(), |l| l.sum + &own);
                        loss = Some(LossSum { sum, weight });
                    }
                }
                if let Some(loss) = loss {
                    learners.policy_stepper.accumulate(loss)?;
                }
            }
            if let (Some(ptx), true) = (learners.ptx, learn_policy) {
                let turn = (step * cfg.epochs + epoch) * cfg.minibatches as u64 + turn as u64;
                let how = (cfg.rollouts.seed, cfg.micro_tokens);
                let (sum, n) = mix_in(policy, &ptx, how, turn, tokens, learners.policy_stepper)?;
                seen.ptx = (seen.ptx.0 + sum, seen.ptx.1 + n);
            }
            if learn_policy || matches!(learners.value, Value::Shared { .. }) {
                let report = learners.policy_stepper.apply()?;
                (seen.loss, seen.grad_norm, seen.lr) = (report.loss, report.grad_norm, report.lr);
            }
            seen.value_loss = match &mut learners.value {
                Value::Separate { stepper, .. } => stepper.apply()?.loss,
                Value::Shared { .. } => shared_loss,
            };
        }
    }
    Ok(seen)
}

/// Adds γ times the mean of −log π over the trained tokens of the turn's rows to a step whose own weight is `tokens`.
/// Gives the sum and the number of those tokens.
fn mix_in(
    policy: &rlhf_model::Transformer,
    ptx: &Ptx<'_>,
    (seed, micro_tokens): (u64, usize),
    turn: u64,
    tokens: usize,
    stepper: &mut Stepper,
) -> Result<(f64, f64)> {
    let first = turn * ptx.batch_size as u64;
    let rows: Vec<&PromptGroup> = (first..first + ptx.batch_size as u64)
        .map(|i| &ptx.data[endless(seed, ptx.data.len(), i)])
        .collect();
    let own: usize = rows
        .iter()
        .flat_map(|r| &r.completions)
        .map(rlhf_data::group::Completion::trained_tokens)
        .sum();
    let mut total = 0.0;
    for micro in micro_batches(&rows, micro_tokens)? {
        let batch = micro.pack(&rows, policy.device())?;
        let logprobs = target_logprobs(policy, &batch, 1.0, false)?.logprobs;
        let sum = -logprobs.values().sum(logprobs.values().kind());
        total += sum.double_value(&[]);
        // The step divides by `tokens`; this mean has a divisor of its own.
        let share = ptx.coef * tokens as f64 / own.max(1) as f64;
        let (sum, weight) = (sum * share, 0.0);
        stepper.accumulate(LossSum { sum, weight })?;
    }
    Ok((total, own as f64))
}

impl Value<'_> {
    /// The policy's log-probs, where it learns too, and the values.
    fn forward(
        &self,
        policy: &rlhf_model::Transformer,
        batch: &DeviceBatch,
        temperature: f64,
        learn_policy: bool,
    ) -> Result<(Option<TargetLogprobs>, Ragged)> {
        Ok(match self {
            Self::Separate { model, .. } => {
                let now = learn_policy
                    .then(|| target_logprobs(policy, batch, temperature, true))
                    .transpose()?;
                (now, model.values(batch)?)
            }
            Self::Shared { head, .. } => {
                let (now, values) =
                    target_logprobs_and_values(policy, head, batch, temperature, true)?;
                (learn_policy.then_some(now), values)
            }
        })
    }
}

/// Values, rewards of tokens, advantages and returns of a batch, on the host.
#[allow(
    clippy::too_many_arguments,
    reason = "all that a batch is made of, named once"
)]
fn know(
    policy: &rlhf_model::Transformer,
    value: &Value<'_>,
    harvest: &Harvest,
    groups: &[&PromptGroup],
    old: PerToken,
    base: Option<&PerToken>,
    kl_coef: f64,
    cfg: &PpoConfig,
) -> Result<Known> {
    let guard = tch::no_grad_guard();
    let mut values = Vec::new();
    for micro in micro_batches(groups, cfg.micro_tokens)? {
        let batch = micro.pack(groups, policy.device())?;
        values.extend(scatter(&match value {
            Value::Separate { model, .. } => model.values(&batch)?,
            Value::Shared { head, .. } => {
                let hidden = policy.hidden_at(&batch, &batch.target_rows)?;
                Ragged::new(head.of(&hidden), batch.offsets.clone())?
            }
        })?);
    }
    drop(guard);
    let sampler = on_host(&old)?;
    let kl = match base {
        Some(base) => KlEstimator::K1.estimate(&sampler, &on_host(base)?)?,
        None => sampler.with_values(sampler.values().zeros_like())?,
    };
    let scores: Vec<f64> = harvest
        .scored
        .iter()
        .flat_map(|s| s.rewards.iter().copied())
        .collect();
    let place = ScorePlace::LastToken {};
    let mut rewards = token_rewards(&kl, &Tensor::from_slice(&scores), kl_coef, place)?;
    if let Some(steps) = step_rewards(&harvest.scored) {
        let steps = on_host(&steps)?.values().nan_to_num(0.0, None, None);
        rewards = rewards.with_values(rewards.values() + steps)?;
    }
    if cfg.whiten_rewards {
        rewards = whiten(&rewards, Whitening::KeepMean)?;
    }
    let g = generalized(
        &rewards,
        &on_host(&values)?,
        cfg.gamma,
        cfg.gae_lambda,
        cfg.whitening,
    )?;
    Ok(Known {
        advantages: scatter(&g.advantages)?,
        returns: scatter(&g.returns)?,
        old,
        values,
    })
}

#[cfg(test)]
mod tests {
    use rlhf_data::group::{Completion, Finish};
    use rlhf_kernels::optim::AdamWConfig;
    use rlhf_model::{Config, Transformer};
    use rlhf_train::StepperConfig;
    use rlhf_train::lr_schedule::LrSchedule;

    use super::*;

    fn text(n: u32) -> PromptGroup {
        PromptGroup {
            row: u64::from(n),
            prompt: vec![1],
            completions: vec![Completion::whole((2..2 + n).collect(), Finish::Stop)],
        }
    }

    /// The loss of a step is that of its own tokens, plus γ times a mean over the text's tokens, however the text is
    /// split.
    #[test]
    fn text_mixed_in_has_a_divisor_of_its_own() {
        let data = [text(2), text(5), text(3)];
        let mut losses = Vec::new();
        for micro_tokens in [6, 64] {
            let policy =
                Transformer::init(Config::new(16, 8, 1, 2, 16), 5, Device::Cpu, Kind::Double);
            let policy = policy.unwrap();
            let config = StepperConfig {
                lr: 0.0,
                schedule: LrSchedule::Constant {},
                warmup_steps: 0,
                total_steps: 1,
                max_grad_norm: None,
                max_bad_steps: 1,
            };
            let mut stepper = Stepper::new(policy.parameters(), AdamWConfig::default(), config);
            let ptx = Ptx {
                data: &data,
                batch_size: 3,
                coef: 4.0,
            };
            // The step's own part: a sum of 10 over 5 tokens.
            let own = LossSum {
                sum: policy.parameters()[0].1.sum(Kind::Double) * 0.0 + 10.0,
                weight: 5.0,
            };
            stepper.accumulate(own).unwrap();
            let (sum, n) = mix_in(&policy, &ptx, (9, micro_tokens), 0, 5, &mut stepper).unwrap();
            assert_eq!(n, 10.0);
            let report = stepper.apply().unwrap();
            assert!((report.loss - (2.0 + 4.0 * sum / n)).abs() < 1e-12);
            assert!(sum / n > 1.0);
            losses.push((report.loss, report.grad_norm));
        }
        assert!((losses[0].0 - losses[1].0).abs() < 1e-12);
        assert!((losses[0].1 - losses[1].1).abs() < 1e-10, "{losses:?}");
    }
}
