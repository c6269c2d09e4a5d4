//! On-policy distillation: the student completes prompts by itself, and a teacher says of each token how likely it
//! would have been (Agarwal et al. 2024, GKD, arXiv 2306.13649; Lu 2025, "On-policy distillation").
//!
//! Either by policy gradient on the tokens that were drawn, with A_t = log π_T − log π, or exactly, by the divergence
//! of the two distributions over the whole vocabulary at each place that the student came to. The expected gradient
//! of the first with a discount of 0 is that of the second with `reverse_kl`, both at held prefixes.

use std::time::Instant;

use rlhf_data::group::PromptGroup;
use rlhf_kernels::kl::Divergence;
use rlhf_kernels::{LossSum, discounted_returns};
use rlhf_model::{CausalLm, DeviceBatch, Transformer, target_divergence, target_logprobs};
use rlhf_train::{Flow, Session, Stepper};
use serde::{Deserialize, Serialize};
use tch::Kind;

use crate::collect::{Place, Rules, Samples, Source, drawing};
use crate::error::{Result, ensure};
use crate::grpo::Players;
use crate::learner::{
    PerToken, StepLog, gather, logprobs_of, mean_k3, mean_kl, micro_batches, on_host,
    sampler_logprobs, scatter, silence_cut, told,
};
use crate::loss::{PolicyInputs, PolicyLoss, PolicyStats};
use crate::rollout::RolloutConfig;

/// How the student is brought to the teacher.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Objective {
    /// Policy gradient with A_t = Σ_k discount^k (log π_T − log π)_{t+k} at the tokens drawn.
    Sampled {
        /// The surrogate.
        loss: PolicyLoss,
        /// 0 looks at the token itself, as published; 1 descends KL(π‖π_T) of whole completions.
        #[serde(default)]
        discount: f64,
    },
    /// The divergence over the whole vocabulary at each place, meant over tokens.
    Exact {
        /// Which divergence.
        divergence: TeacherDivergence,
    },
}

impl Objective {
    /// Checks the settings.
    ///
    /// # Errors
    /// When one is outside its range.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Sampled { loss, discount } => {
                ensure((0.0..=1.0).contains(discount), "opd", || {
                    format!("discount is {discount}, expected 0 to 1")
                })?;
                loss.check()
            }
            Self::Exact {
                divergence: TeacherDivergence::JensenShannon { beta },
            } => ensure(*beta > 0.0 && *beta < 1.0, "opd", || {
                format!("beta is {beta}, expected between 0 and 1")
            }),
            Self::Exact { .. } => Ok(()),
        }
    }
}

/// A divergence of student and teacher, both over the whole vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum TeacherDivergence {
    /// KL(student ‖ teacher).
    ReverseKl {},
    /// KL(teacher ‖ student).
    ForwardKl {},
    /// The generalised Jensen-Shannon divergence of GKD.
    JensenShannon {
        /// The teacher's share in the mixture.
        beta: f64,
    },
}

impl From<TeacherDivergence> for Divergence {
    fn from(d: TeacherDivergence) -> Self {
        match d {
            TeacherDivergence::ReverseKl {} => Self::Reverse,
            TeacherDivergence::ForwardKl {} => Self::Forward,
            TeacherDivergence::JensenShannon { beta } => Self::JensenShannon { beta },
        }
    }
}

/// Settings of [`train`].
#[derive(Clone, Debug)]
pub struct OpdConfig {
    /// How completions are drawn.
    pub rollouts: RolloutConfig,
    /// What is done with them before they are learned from.
    pub rules: Rules,
    /// Batches of rollouts.
    pub steps: u64,
    /// Passes over each batch, one optimiser step each.
    pub epochs: u64,
    /// Packed tokens a micro-batch.
    pub micro_tokens: usize,
    /// How the student is brought to the teacher.
    pub objective: Objective,
    /// Samples kept for the report.
    pub samples: Option<Samples>,
}

/// Trains the students among `players`, whose reference is the teacher.
///
/// # Errors
/// When settings contradict each other, a rollout exceeds `micro_tokens`, the vocabularies differ, the loss stays
/// non-finite, or a file cannot be read or written.
pub fn train(
    players: Players<'_>,
    teacher: &Transformer,
    cfg: &OpdConfig,
    stepper: &mut Stepper,
    session: &mut Session,
) -> Result<Flow> {
    drawing(players, &cfg.rollouts, &cfg.rules, cfg.steps, |source| {
        run(source, players, teacher, cfg, stepper, session)
    })
}

fn run(
    mut source: Source<'_>,
    players: Players<'_>,
    teacher: &Transformer,
    cfg: &OpdConfig,
    stepper: &mut Stepper,
    session: &mut Session,
) -> Result<Flow> {
    let policy = players.policy;
    let (device, temperature) = (policy.device(), cfg.rollouts.temperature);
    let start = match session.resume::<Place>(&mut [("model", stepper)])? {
        Some(restored) => {
            source.restore(restored.extra)?;
            restored.step
        }
        None => 0,
    };
    let mut place = Place::default();
    for step in start..cfg.steps {
        let mut harvest = source.rollouts(step)?;
        let began = Instant::now();
        if cfg.rules.filter_cut {
            silence_cut(&mut harvest.scored);
        }
        let groups: Vec<&PromptGroup> = harvest.scored.iter().map(|s| &s.rollout.group).collect();
        let sampler = sampler_logprobs(&groups);
        let theirs = logprobs_of(teacher, &groups, temperature, cfg.micro_tokens, device)?;
        let advantages = match cfg.objective {
            Objective::Sampled { discount, .. } => advantages(&sampler, &theirs, discount)?,
            Objective::Exact { .. } => sampler.iter().map(|s| vec![0.0; s.len()]).collect(),
        };
        let mut log = StepLog::new(&harvest);
        log.add(&[
            ("kl_teacher", mean_kl(&sampler, &theirs)),
            ("kl_teacher_k3", mean_k3(&sampler, &theirs)),
        ]);
        let (mut stats, mut ratios) = (PolicyStats::default(), Vec::new());
        for epoch in 0..cfg.epochs {
            for micro in micro_batches(&groups, cfg.micro_tokens)? {
                let packed = micro.pack(&groups, device)?;
                if packed.offsets.num_values() == 0 {
                    continue;
                }
                let loss = match &cfg.objective {
                    Objective::Exact { divergence } => {
                        exact(policy, teacher, &packed, *divergence, temperature)?
                    }
                    Objective::Sampled { loss, .. } => {
                        let now = target_logprobs(policy, &packed, temperature, true)?;
                        let list = |lists: &PerToken| {
                            let here = lists[micro.completions.clone()].iter();
                            gather(here, &packed.offsets, Kind::Float, device)
                        };
                        let (before, own) = (list(&sampler)?, list(&advantages)?);
                        if epoch + 1 == cfg.epochs {
                            let log_ratio = now.logprobs.values().detach() - before.values();
                            let r = log_ratio.exp().to_kind(Kind::Double);
                            ratios.extend(Vec::<f64>::try_from(&r.to_device(tch::Device::Cpu))?);
                        }
                        let mut inputs = PolicyInputs::new(&now.logprobs, &before, &own);
                        inputs.entropy = now.entropy.as_ref();
                        let out = loss.compute(&inputs)?;
                        stats.merge(&out.stats);
                        out.loss
                    }
                };
                stepper.accumulate(loss)?;
            }
            let report = stepper.apply()?;
            if epoch + 1 == cfg.epochs {
                log.add(&[
                    ("loss", report.loss),
                    ("grad_norm", report.grad_norm),
                    ("lr", report.lr),
                ]);
            }
        }
        if matches!(cfg.objective, Objective::Sampled { .. }) {
            log.policy(&stats, ratios, &advantages);
        }
        log.speed(&harvest, cfg.epochs, began.elapsed().as_secs_f64());
        if let Some(samples) = &cfg.samples {
            let told = told(&advantages, &sampler, Some(&theirs));
            samples.after_step(session, &players, &harvest, &told)?;
        }
        session.log(step, harvest.facts.stats.tokens, &log.values())?;
        if session.due(step) {
            place = source.place()?;
        }
        if let Flow::Stop(signal) = session.after_step(step, &[("model", stepper)], &place)? {
            return Ok(Flow::Stop(signal));
        }
    }
    Ok(Flow::Continue)
}

/// A_t = Σ_k discount^k (log π_T − log π)_{t+k}.
fn advantages(policy: &PerToken, teacher: &PerToken, discount: f64) -> Result<PerToken> {
    let policy = on_host(policy)?;
    let rewards = policy.with_values(on_host(teacher)?.values() - policy.values())?;
    scatter(&discounted_returns(&rewards, discount)?)
}

/// Σ over the batch's trained tokens of the divergence between the two next-token distributions, with the number of
/// those tokens. No gradient goes to the teacher.
///
/// # Errors
/// When the two do not have one vocabulary, or the batch does not fit.
pub fn exact(
    policy: &dyn CausalLm,
    teacher: &dyn CausalLm,
    batch: &DeviceBatch,
    divergence: TeacherDivergence,
    temperature: f64,
) -> Result<LossSum> {
    let at_tokens = target_divergence(policy, teacher, batch, divergence.into(), temperature)?;
    let at_tokens = at_tokens.values();
    Ok(LossSum {
        sum: at_tokens.sum(at_tokens.kind()),
        weight: at_tokens.numel() as f64,
    })
}
