//! REINFORCE, advantage actor-critic and PPO: one loop, whose algorithm says how much is drawn, how often it
//! is looked at, and how far a step may go.

use std::collections::VecDeque;

use rlhf_data::order::Permutation;
use rlhf_kernels::optim::AdamWConfig;
use rlhf_train::{Flow, Session, Stepper, StepperConfig};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::batch::{Batch, Part, advantages, losses};
use super::environment::Environment;
use super::lanes::{Act, Collect, Ends, Finished, Lane, Lanes};
use super::mlp::Mlp;
use crate::advantage::Whitening;
use crate::error::{Result, ensure};
use crate::loss::ppo::ValueStats;
use crate::loss::{Clip, PolicyLoss, PolicyStats, RatioLevel, Reduction};

/// How the policy learns from what was drawn. One pass over steps at ρ = 1 makes the surrogate's gradient that of
/// −A log π, so all three have the same losses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Algorithm {
    /// Williams 1992: one step on whole episodes, A = the return from each step on, less V where there is a
    /// baseline. Without one, episodes that the time limit cuts count as if they had ended there.
    Reinforce {
        /// Whether a value function learns to be the baseline.
        baseline: bool,
    },
    /// Advantage actor-critic (Mnih et al. 2016, arXiv 1602.01783, synchronous): one step on `horizon` steps of
    /// each environment; at λ = 1 with n-step returns, as in the paper.
    A2c {
        /// Steps of each environment a batch.
        horizon: u32,
        /// λ.
        gae_lambda: f64,
    },
    /// Schulman et al. 2017 (arXiv 1707.06347), algorithm 1.
    Ppo {
        /// Steps of each environment a batch.
        horizon: u32,
        /// λ.
        gae_lambda: f64,
        /// Passes over each batch.
        epochs: u64,
        /// Optimiser steps a pass.
        minibatches: usize,
        /// Bounds of the ratio.
        clip: Clip,
        /// ε of the value's clip; not clipped when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        value_clip: Option<f64>,
    },
}

impl Algorithm {
    /// How much is drawn for a batch.
    #[must_use]
    pub fn collect(&self) -> Collect {
        match *self {
            Self::Reinforce { .. } => Collect::Episodes,
            Self::A2c { horizon, .. } | Self::Ppo { horizon, .. } => Collect::Steps(horizon),
        }
    }

    /// Whether there is a value function.
    #[must_use]
    pub fn has_value(&self) -> bool {
        !matches!(self, Self::Reinforce { baseline: false })
    }

    /// Optimiser steps a batch.
    #[must_use]
    pub fn updates(&self) -> u64 {
        let (epochs, minibatches) = self.passes();
        epochs * minibatches as u64
    }

    fn passes(&self) -> (u64, usize) {
        match *self {
            Self::Ppo {
                epochs,
                minibatches,
                ..
            } => (epochs, minibatches),
            _ => (1, 1),
        }
    }

    fn gae_lambda(&self) -> f64 {
        match *self {
            Self::Reinforce { .. } => 1.0,
            Self::A2c { gae_lambda, .. } | Self::Ppo { gae_lambda, .. } => gae_lambda,
        }
    }

    fn loss(&self) -> (PolicyLoss, Option<f64>) {
        let (clip, value_clip) = match *self {
            Self::Ppo {
                clip, value_clip, ..
            } => (clip, value_clip),
            // Never reached in the one pass.
            _ => (Clip::symmetric(1.0), None),
        };
        let loss = PolicyLoss::Clipped {
            clip,
            ratio: RatioLevel::Token,
            reduction: Reduction::Token {},
        };
        (loss, value_clip)
    }
}

/// Settings of [`train()`].
#[derive(Clone, Copy, Debug)]
pub struct ControlConfig {
    /// The seed of environments and actions.
    pub seed: u64,
    /// Environments side by side.
    pub environments: usize,
    /// Batches.
    pub steps: u64,
    /// How the policy learns.
    pub algorithm: Algorithm,
    /// γ.
    pub gamma: f64,
    /// What is done to the advantages of a batch.
    pub whitening: Whitening,
    /// Weight of the entropy.
    pub entropy_coef: f64,
}

impl ControlConfig {
    /// Checks the settings.
    ///
    /// # Errors
    /// When one is outside its range.
    pub fn check(&self) -> Result<()> {
        let op = "control";
        let (epochs, minibatches) = self.algorithm.passes();
        let drawn = self.algorithm.collect() != Collect::Steps(0);
        ensure(
            self.environments > 0 && self.steps > 0 && drawn && epochs > 0 && minibatches > 0,
            op,
            || "environments, steps, horizon, epochs and minibatches must be above 0".into(),
        )?;
        for (name, x) in [
            ("gamma", self.gamma),
            ("gae_lambda", self.algorithm.gae_lambda()),
        ] {
            ensure((0.0..=1.0).contains(&x), op, || {
                format!("{name} is {x}, expected 0 to 1")
            })?;
        }
        ensure(self.entropy_coef.is_finite(), op, || {
            format!("entropy_coef is {}, expected a number", self.entropy_coef)
        })?;
        let (loss, value_clip) = self.algorithm.loss();
        ensure(value_clip.is_none_or(|c| c > 0.0), op, || {
            format!("value_clip is {value_clip:?}, expected above 0")
        })?;
        loss.check()
    }
}

/// A network with the stepper that holds its parameters.
#[derive(Debug)]
pub struct Learner {
    /// The network.
    pub network: Mlp,
    /// Its stepper.
    pub stepper: Stepper,
}

impl Learner {
    /// A network that learns.
    #[must_use]
    pub fn new(network: Mlp, adamw: AdamWConfig, config: StepperConfig) -> Self {
        Self {
            stepper: Stepper::new(network.parameters(), adamw, config),
            network,
        }
    }
}

/// Who learns: a policy, and a value function where the algorithm has one.
#[derive(Debug)]
pub struct Agent {
    /// π.
    pub policy: Learner,
    /// V.
    pub value: Option<Learner>,
}

impl Agent {
    /// Networks with random weights for an environment, as the algorithm asks for them, with hidden layers of the
    /// given widths; the value function learns at `value_lr`, otherwise like the policy.
    ///
    /// # Errors
    /// When a width is 0.
    pub fn new(
        environment: &impl Environment,
        hidden: &[usize],
        cfg: &ControlConfig,
        (adamw, config): (AdamWConfig, StepperConfig),
        value_lr: f64,
    ) -> Result<Self> {
        let widths = |outputs: usize| {
            let inputs = environment.observation_size();
            [&[inputs][..], hidden, &[outputs]].concat()
        };
        let network = |outputs: usize, gain: f64, seed: u64| {
            Mlp::new(&widths(outputs), gain, seed, Kind::Float)
        };
        let policy = network(environment.actions(), 0.01, cfg.seed)?;
        let value = if cfg.algorithm.has_value() {
            let config = StepperConfig {
                lr: value_lr,
                ..config
            };
            // A seed of its own, so that the two do not begin alike.
            let network = network(1, 1.0, cfg.seed ^ 0x7661_6c75)?;
            Some(Learner::new(network, adamw, config))
        } else {
            None
        };
        Ok(Self {
            policy: Learner::new(policy, adamw, config),
            value,
        })
    }

    pub(super) fn steppers_mut(&mut self) -> Vec<(&str, &mut Stepper)> {
        let value = self.value.as_mut().map(|v| ("value", &mut v.stepper));
        let policy = ("model", &mut self.policy.stepper);
        std::iter::once(policy).chain(value).collect()
    }

    pub(super) fn steppers(&self) -> Vec<(&str, &Stepper)> {
        let value = self.value.as_ref().map(|v| ("value", &v.stepper));
        let policy = ("model", &self.policy.stepper);
        std::iter::once(policy).chain(value).collect()
    }

    /// Learns from a batch, whose pieces give the advantages and whose steps the minibatches.
    pub(super) fn learn(&mut self, batch: &Batch, step: u64, cfg: &ControlConfig) -> Result<Seen> {
        let (values, after) = self.judge(batch)?;
        let discounts = (cfg.gamma, cfg.algorithm.gae_lambda());
        let known = advantages(batch, &values, &after, discounts, cfg.whitening)?;
        let whole = Part::whole(batch, &values, &known)?;
        let ((loss, value_clip), (epochs, minibatches)) =
            (cfg.algorithm.loss(), cfg.algorithm.passes());
        let mut seen = Seen::default();
        for epoch in 0..epochs {
            let order = Permutation::new(cfg.seed ^ step, batch.steps(), epoch);
            let order: Vec<i64> = (0..batch.steps()).map(|i| order.at(i) as i64).collect();
            for rows in order.chunks(batch.steps().div_ceil(minibatches)) {
                let value = self.value.as_ref().map(|v| &v.network);
                let (policy, value) = losses(
                    &whole.pick(rows)?,
                    &self.policy.network,
                    value,
                    &loss,
                    value_clip,
                    cfg.entropy_coef,
                )?;
                seen.policy.merge(&policy.stats);
                self.policy.stepper.accumulate(policy.loss)?;
                let report = self.policy.stepper.apply()?;
                (seen.loss, seen.grad_norm, seen.lr) = (report.loss, report.grad_norm, report.lr);
                if let (Some(out), Some(learner)) = (value, &mut self.value) {
                    seen.value.merge(&out.stats);
                    learner.stepper.accumulate(out.loss)?;
                    seen.value_loss = learner.stepper.apply()?.loss;
                }
            }
        }
        Ok(seen)
    }

    /// V of each step and of what was seen after each piece; 0 without a value function.
    fn judge(&self, batch: &Batch) -> Result<(rlhf_kernels::Ragged, Tensor)> {
        let _guard = tch::no_grad_guard();
        let of = |x: &Tensor| match &self.value {
            Some(v) => v.network.scalars(x),
            None => Ok(Tensor::zeros([x.size()[0]], (x.kind(), x.device()))),
        };
        let values = batch.rewards.with_values(of(&batch.observations)?)?;
        Ok((values, of(&batch.after)?))
    }
}

/// What is seen while learning from a batch.
#[derive(Debug, Default)]
pub(super) struct Seen {
    policy: PolicyStats,
    value: ValueStats,
    loss: f64,
    value_loss: f64,
    grad_norm: f64,
    lr: f64,
}

impl Seen {
    pub(super) fn metrics(&self, has_value: bool) -> Vec<(&'static str, f64)> {
        let mut all = vec![
            ("loss", self.loss),
            ("entropy", self.policy.entropy()),
            ("clip_fraction_low", self.policy.clip_fraction_low()),
            ("clip_fraction_high", self.policy.clip_fraction_high()),
            ("approx_kl", self.policy.approx_kl()),
            ("grad_norm", self.grad_norm),
            ("lr", self.lr),
        ];
        if has_value {
            all.extend([
                ("value_loss", self.value_loss),
                ("explained_variance", self.value.explained_variance()),
            ]);
        }
        all
    }
}

/// The returns of the last hundred episodes, and how many steps and episodes there were.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Tally {
    recent: VecDeque<f64>,
    steps: u64,
    episodes: u64,
}

impl Tally {
    pub(super) fn add(&mut self, batch: &Batch, finished: &[Finished]) {
        self.steps += batch.steps() as u64;
        self.episodes += finished.len() as u64;
        self.recent.extend(finished.iter().map(|f| f.total));
        while self.recent.len() > 100 {
            self.recent.pop_front();
        }
    }

    pub(super) fn metrics(&self) -> [(&'static str, f64); 3] {
        let mean = self.recent.iter().sum::<f64>() / self.recent.len() as f64;
        [
            ("return", mean),
            ("environment_steps", self.steps as f64),
            ("episodes", self.episodes as f64),
        ]
    }
}

/// What a run saves besides weights.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    lanes: Vec<Lane>,
    tally: Tally,
}

/// Trains `agent` on copies of `environment`.
///
/// # Errors
/// When a setting is outside its range, a network does not fit the environment, the loss stays non-finite, or a
/// file cannot be written.
pub fn train(
    environment: &impl Environment,
    agent: &mut Agent,
    cfg: &ControlConfig,
    session: &mut Session,
) -> Result<Flow> {
    cfg.check()?;
    let mut lanes = Lanes::new(environment, cfg.environments, cfg.seed, 0);
    let mut tally = Tally::default();
    let restored = session.resume::<State>(&mut agent.steppers_mut())?;
    let start = restored.as_ref().map_or(0, |r| r.step);
    if let Some(r) = restored {
        lanes.restore(&r.extra.lanes)?;
        tally = r.extra.tally;
    }
    for step in start..cfg.steps {
        let much = cfg.algorithm.collect();
        let drawn = lanes.collect(&agent.policy.network, much, Ends::Seen, Act::Sampled)?;
        tally.add(&drawn.batch, &drawn.finished);
        let seen = agent.learn(&drawn.batch, step, cfg)?;
        let metrics = [&tally.metrics()[..], &seen.metrics(agent.value.is_some())].concat();
        session.log(step, drawn.batch.steps(), &metrics)?;
        let state = State {
            lanes: lanes.state(),
            tally: tally.clone(),
        };
        if let Flow::Stop(signal) = session.after_step(step, &agent.steppers(), &state)? {
            return Ok(Flow::Stop(signal));
        }
    }
    Ok(Flow::Continue)
}

/// Returns of `episodes` episodes that no training has seen, each in an environment of its own.
///
/// # Errors
/// When the policy does not fit the environment.
pub fn evaluate(
    environment: &impl Environment,
    policy: &Mlp,
    act: Act,
    seed: u64,
    episodes: usize,
) -> Result<Vec<f64>> {
    const APART: u32 = 1 << 31;
    let mut lanes = Lanes::new(environment, episodes, seed, APART);
    let drawn = lanes.collect(policy, Collect::Episodes, Ends::Seen, act)?;
    Ok(drawn.finished.iter().map(|f| f.total).collect())
}
