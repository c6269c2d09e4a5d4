//! Policy gradients of groups: GRPO (Shao et al. 2024) and its kin by their settings: DAPO, Dr.GRPO, GSPO, CISPO,
//! RLOO, REINFORCE and REINFORCE++, ReMax, MaxRL and others.
//!
//! Each step: draw K completions of each prompt, score them, compare them, and take `epochs` policy-gradient steps on
//! the batch.

use std::time::Instant;

use rlhf_data::group::PromptGroup;
use rlhf_data::order::Permutation;
use rlhf_data::tokenize::ChatTokenizer;
use rlhf_kernels::Ragged;
use rlhf_model::{Mismatch, Sampler, Transformer, target_logprobs, target_logprobs_and_kl};
use rlhf_reward::source::RewardMix;
use rlhf_train::{Flow, Session, Stepper};
use serde::{Deserialize, Serialize};
use tch::Kind;

use crate::advantage::{AdvantageEstimator, Earned};
use crate::collect::{Harvest, Place, Rules, Samples, Source, drawing};
use crate::environment::{self, Scene};
use crate::error::{Error, Result};
use crate::kl::{KlController, KlEstimator, KlPenalty, KlPlacement};
use crate::learner::{
    PerToken, StepLog, each_kl, gather, logprobs_of, mean_k3, mean_kl, micro_batches, mismatch,
    on_host, penalties, pick, sampler_logprobs, scatter, silence_cut, step_rewards, told,
};
use crate::loss::mismatch::Correction;
use crate::loss::{KlTerm, PolicyInputs, PolicyLoss, PolicyStats};
use crate::reference::ReferencePolicy;
use crate::rollout::{self, Prompt, Rollout, RolloutConfig, StepSource};

/// Settings of [`train`].
#[derive(Clone, Debug)]
pub struct GrpoConfig {
    /// How completions are drawn.
    pub rollouts: RolloutConfig,
    /// What is done with them before they are learned from.
    pub rules: Rules,
    /// Batches of rollouts.
    pub steps: u64,
    /// Passes over each batch.
    pub epochs: u64,
    /// Optimiser steps of a pass, each on as many whole groups. With more than one the old policy's log-probs are
    /// computed before the first.
    pub minibatches: usize,
    /// Packed tokens a micro-batch.
    pub micro_tokens: usize,
    /// How rewards become advantages.
    pub advantage: AdvantageEstimator,
    /// The surrogate: clipping and reduction.
    pub loss: PolicyLoss,
    /// The penalty on the distance from the reference; its coefficient is where the controller begins.
    pub kl: KlPenalty,
    /// What sets the coefficient from then on; fixed when absent.
    pub adaptive_kl: Option<AdaptiveKl>,
    /// What becomes of the reference.
    pub reference: ReferencePolicy,
    /// The entropy bonus: what a token's entropy takes from its loss, reduced as the loss is; 0 for none.
    pub entropy_coef: f64,
    /// Ends the training when the KL from the reference exceeds so many nats a completion; the result is the last
    /// checkpoint before that.
    pub max_kl: Option<f64>,
    /// What the ratio is against.
    pub old: OldPolicy,
    /// How completions are weighed that a sampler with other probabilities drew; not at all when absent.
    pub correction: Option<Correction>,
    /// Samples kept for the report.
    pub samples: Option<Samples>,
}

/// Target and pace of [`KlController::Adaptive`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdaptiveKl {
    /// The KL aimed at, in nats a completion.
    pub target: f64,
    /// Completions over which the coefficient may change by 20 %.
    pub horizon: f64,
}

/// Whose probabilities the ratio π/π_old is against.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OldPolicy {
    /// The learner's own at the start of the batch; a sampler's mismatch is mended by the correction.
    #[default]
    Learner,
    /// The sampler's as recorded: the ratio itself mends the mismatch, within the clip.
    Sampler,
}

/// Who takes part: the policy, its reference, tokenizer, prompts and rewards.
#[derive(Clone, Copy)]
pub struct Players<'a> {
    /// The policy, whose parameters the stepper holds.
    pub policy: &'a Transformer,
    /// The reference π₀, where there is one.
    pub reference: Option<&'a Transformer>,
    /// The tokenizer.
    pub tokenizer: &'a ChatTokenizer,
    /// The prompts.
    pub prompts: &'a [Prompt],
    /// The rewards.
    pub rewards: &'a RewardMix,
    /// Who judges steps, if anybody.
    pub steps: Option<&'a dyn StepSource>,
    /// Who draws completions, where that is not the policy itself.
    pub server: Option<&'a dyn Sampler>,
    /// Whom the policy talks with; without it a completion is one turn.
    pub scene: Option<Scene<'a>>,
}

impl std::fmt::Debug for Players<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Players")
            .field("prompts", &self.prompts.len())
            .field("rewards", &self.rewards)
            .field("steps", &self.steps.map(StepSource::name))
            .field("server", &self.server)
            .field("scene", &self.scene)
            .finish_non_exhaustive()
    }
}

impl Players<'_> {
    /// Draws completions of the chosen prompts for step `step`.
    pub(crate) fn draw(
        &self,
        cfg: &RolloutConfig,
        chosen: &[usize],
        step: u64,
    ) -> Result<Vec<Rollout>> {
        let draw = |sampler: &dyn Sampler| match self.scene {
            None => rollout::draw(sampler, self.tokenizer, self.prompts, chosen, cfg, step),
            Some(scene) => {
                let prompts = (self.prompts, chosen);
                environment::play(sampler, self.tokenizer, scene, prompts, cfg, step)
            }
        };
        match self.server {
            Some(server) => draw(server),
            None => draw(&cfg.local(self.policy)?),
        }
    }
}

/// What a run saves besides weights.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    place: Place,
    kl: KlController,
    /// b of [`AdvantageEstimator::Running`].
    running: f64,
}

/// Trains the policy.
///
/// # Errors
/// When settings contradict each other, a rollout exceeds `micro_tokens`, a reward fails, the loss stays non-finite,
/// or a file cannot be read or written.
pub fn train(
    players: Players<'_>,
    cfg: &GrpoConfig,
    stepper: &mut Stepper,
    session: &mut Session,
) -> Result<Flow> {
    drawing(players, &cfg.rollouts, &cfg.rules, cfg.steps, |source| {
        run(source, players, cfg, stepper, session)
    })
}

fn run(
    mut source: Source<'_>,
    players: Players<'_>,
    cfg: &GrpoConfig,
    stepper: &mut Stepper,
    session: &mut Session,
) -> Result<Flow> {
    let policy = players.policy;
    let (device, temperature) = (policy.device(), cfg.rollouts.temperature);
    let mut state = State {
        place: Place::default(),
        kl: cfg.kl_controller(),
        running: 0.0,
    };
    let start = match session.resume::<State>(&mut [("model", stepper)])? {
        Some(restored) => {
            state = restored.extra;
            source.restore(std::mem::take(&mut state.place))?;
            restored.step
        }
        None => {
            if cfg.max_kl.is_some() {
                session.before_first(&[("model", stepper)], &state)?;
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
            log.add(&[
                ("kl", kl),
                ("kl_k3", mean_k3(&sampler, base)),
                ("kl_coef", state.kl.coef()),
            ]);
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
            session.rewind::<State>(before, &mut [("model", stepper)])?;
            return Ok(Flow::Continue);
        }
        let penalties = penalties(&cfg.kl, state.kl.coef(), &sampler, base.as_ref())?;
        let advantages = cfg.advantages(&harvest, &penalties, state.running)?;
        state.update(cfg, &harvest, kl);

        let batch = Batch {
            step,
            reference: players.reference,
            groups: &groups,
            sampler: &sampler,
            base: base.as_ref(),
            advantages: &advantages,
            kl_coef: state.kl.coef(),
        };
        let learned = learn(policy, cfg, &batch, stepper)?;
        if let Some(reference) = players.reference {
            cfg.reference
                .after_step(step + 1, reference, policy, stepper)?;
        }
        log.add(&learned.metrics);
        log.policy(&learned.stats, learned.ratios, &advantages);
        log.speed(&harvest, cfg.epochs, began.elapsed().as_secs_f64());
        if let Some(samples) = &cfg.samples {
            let told = told(&advantages, &sampler, base.as_ref());
            samples.after_step(session, &players, &harvest, &told)?;
        }
        session.log(step, harvest.facts.stats.tokens, &log.values())?;
        if session.due(step) {
            state.place = source.place()?;
        }
        if let Flow::Stop(signal) = session.after_step(step, &[("model", stepper)], &state)? {
            return Ok(Flow::Stop(signal));
        }
    }
    Ok(Flow::Continue)
}

impl GrpoConfig {
    fn kl_controller(&self) -> KlController {
        let coef = self.kl.coef;
        match self.adaptive_kl {
            None => KlController::Fixed { coef },
            Some(AdaptiveKl { target, horizon }) => KlController::Adaptive {
                coef,
                target,
                horizon,
            },
        }
    }

    fn advantages(&self, harvest: &Harvest, penalties: &Ragged, running: f64) -> Result<PerToken> {
        let scores: Vec<f64> = harvest
            .scored
            .iter()
            .flat_map(|s| s.rewards.iter().copied())
            .collect();
        let sizes: Vec<usize> = harvest.scored.iter().map(|s| s.rewards.len()).collect();
        let steps = step_rewards(&harvest.scored)
            .map(|s| on_host(&s))
            .transpose()?;
        scatter(&self.advantage.of_tokens(&Earned {
            scores: &scores,
            group_sizes: &sizes,
            penalties,
            steps: steps.as_ref(),
            greedy: harvest.greedy.as_deref(),
            running,
        })?)
    }
}

impl State {
    fn update(&mut self, cfg: &GrpoConfig, harvest: &Harvest, kl: Option<f64>) {
        let completions: usize = harvest.scored.iter().map(|s| s.rewards.len()).sum();
        if let Some(kl) = kl {
            self.kl.update(kl, completions as u64);
        }
        if let AdvantageEstimator::Running { decay } = cfg.advantage {
            self.running = decay * self.running + (1.0 - decay) * harvest.facts.stats.reward;
        }
    }
}

/// What is known of a batch of rollouts, for each token of each completion.
struct Batch<'a> {
    step: u64,
    reference: Option<&'a Transformer>,
    groups: &'a [&'a PromptGroup],
    sampler: &'a PerToken,
    base: Option<&'a PerToken>,
    advantages: &'a PerToken,
    kl_coef: f64,
}

struct Learned {
    stats: PolicyStats,
    ratios: Vec<f64>,
    metrics: Vec<(&'static str, f64)>,
}

/// The passes over a batch.
fn learn(
    policy: &Transformer,
    cfg: &GrpoConfig,
    batch: &Batch<'_>,
    stepper: &mut Stepper,
) -> Result<Learned> {
    let mut learned = Learned {
        stats: PolicyStats::default(),
        ratios: Vec::new(),
        metrics: Vec::new(),
    };
    if batch.advantages.iter().all(Vec::is_empty) {
        // Every completion was cut off: nothing to learn.
        return Ok(learned);
    }
    // The first pass runs on the weights that the old policy has, unless it takes several steps.
    let (n, one_step) = (batch.groups.len(), cfg.minibatches <= 1);
    let (temperature, device) = (cfg.rollouts.temperature, policy.device());
    let mut old: PerToken = if one_step {
        Vec::new()
    } else {
        logprobs_of(policy, batch.groups, temperature, cfg.micro_tokens, device)?
    };
    let mut gap = Mismatch::default();
    let mut last = None;
    for epoch in 0..cfg.epochs {
        let whole_ratios = epoch + 1 == cfg.epochs;
        let first = epoch == 0 && one_step;
        let shuffled = Permutation::new(cfg.rollouts.seed ^ batch.step, n, epoch);
        let at = |i| if one_step { i } else { shuffled.at(i) };
        let order: Vec<usize> = (0..n).map(at).collect();
        for part in order.chunks(n.div_ceil(cfg.minibatches.max(1)).max(1)) {
            let (picked, completions) = pick(batch.groups, part);
            let mut trained = false;
            for micro in micro_batches(&picked, cfg.micro_tokens)? {
                let packed = micro.pack(&picked, device)?;
                let here = &completions[micro.completions.clone()];
                if packed.offsets.num_values() == 0 {
                    if first {
                        old.extend(here.iter().map(|_| Vec::new()));
                    }
                    continue;
                }
                trained = true;
                let in_loss = cfg.kl.placement != KlPlacement::InReward && batch.kl_coef > 0.0;
                let (now, exact) = if in_loss && cfg.kl.estimator == KlEstimator::Exact {
                    let reference = batch.reference.ok_or_else(no_reference)?;
                    let (now, kl) =
                        target_logprobs_and_kl(policy, reference, &packed, temperature, true)?;
                    (now, Some(kl))
                } else {
                    let now = target_logprobs(policy, &packed, temperature, true)?;
                    (now, None)
                };
                if first {
                    old.extend(scatter(&now.logprobs)?);
                }
                let list = |lists: &PerToken| {
                    let rows = here.iter().map(|&i| &lists[i]);
                    gather(rows, &packed.offsets, Kind::Float, device)
                };
                let before = match cfg.old {
                    OldPolicy::Sampler => list(batch.sampler)?,
                    OldPolicy::Learner if first => {
                        now.logprobs.with_values(now.logprobs.values().detach())?
                    }
                    OldPolicy::Learner => list(&old)?,
                };
                if whole_ratios {
                    let log_ratio = now.logprobs.values().detach() - before.values();
                    let ratios = log_ratio.exp().to_kind(Kind::Double);
                    learned
                        .ratios
                        .extend(Vec::<f64>::try_from(&ratios.to_device(tch::Device::Cpu))?);
                }
                let advantages = list(batch.advantages)?;
                let mut inputs = PolicyInputs::new(&now.logprobs, &before, &advantages);
                inputs.entropy = now.entropy.as_ref();
                inputs.entropy_coef = cfg.entropy_coef;
                let weights = match &cfg.correction {
                    Some(c) => Some(c.weights(&before, &list(batch.sampler)?)?),
                    None => None,
                };
                inputs.weights = weights.as_ref();
                let ref_logprobs = batch.base.map(list).transpose()?;
                if in_loss {
                    inputs.kl = Some(KlTerm {
                        exact: exact.as_ref(),
                        ref_logprobs: ref_logprobs.as_ref().ok_or_else(no_reference)?,
                        penalty: KlPenalty {
                            coef: batch.kl_coef,
                            ..cfg.kl
                        },
                    });
                }
                let out = cfg.loss.compute(&inputs)?;
                learned.stats.merge(&out.stats);
                stepper.accumulate(out.loss)?;
            }
            if trained {
                last = Some(stepper.apply()?);
            }
        }
        if epoch == 0 {
            gap = mismatch(&old, batch.sampler);
        }
    }
    if let Some(report) = last {
        learned.metrics = vec![
            ("loss", report.loss),
            ("grad_norm", report.grad_norm),
            ("lr", report.lr),
            ("sampler_gap", gap.largest),
            ("sampler_kl", gap.kl),
        ];
    }
    Ok(learned)
}

fn no_reference() -> Error {
    Error::Argument {
        op: "grpo",
        what: "a KL penalty needs a reference".into(),
    }
}
