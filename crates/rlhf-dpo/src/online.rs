//! Online direct alignment: completions are drawn, scored, and trained on as pairs, step by step.
//!
//! Invariant: what is drawn is a function of (seed, step, prompt, sample) and the weights, never of the other
//! prompts; so a resumed training is the unbroken one. Knows nothing of who scores: a reward model, a verifier,
//! a judge.

use std::path::{Path, PathBuf};

use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_data::order::endless;
use rlhf_data::pack::{PackedBatch, batches_by_tokens};
use rlhf_kernels::LossSum;
use rlhf_model::{
    Decoder, DecoderWeights, DeviceBatch, GenerateLimits, GenerateRequest, LoadOptions,
    LocalSampler, Sampler, SamplingConfig, Transformer, target_logprobs,
};
use rlhf_train::{Flow, Restored, Session, Stepper};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::error::{Error, Result, ensure};
use crate::loss::online::{exploration, nash_md};
use crate::loss::{PairLogprobs, PairValues, Pairs, PreferenceLoss};
use crate::train::{Seen, Sums, completion_sums, host, prefers};

/// Makes the noise of a second sampler another one.
const OTHER: u64 = 0x6f74_6865_7221;

/// What is drawn, and what is learned from it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum OnlineMethod {
    /// Online DPO (Guo et al. 2024, arXiv 2402.04792): K completions of the policy, the best against the worst.
    BestWorst {
        /// The loss of the pair; one that asks for scores gets them.
        loss: PreferenceLoss,
    },
    /// XPO (Xie et al. 2024, arXiv 2405.21046): K completions of the policy, each against one of the reference,
    /// and a bonus for leaving what the reference says ([`exploration`]).
    Xpo {
        /// The loss of the pairs; the paper's is `sigmoid`.
        loss: PreferenceLoss,
        /// Strength of the bonus.
        alpha: f64,
    },
    /// Nash-MD (Munos et al. 2023, arXiv 2312.00886): K completions of the policy, each against one of the
    /// geometric mixture of policy and reference ([`nash_md`]).
    NashMd {
        /// Strength of the reference, τ.
        tau: f64,
        /// The reference's share in the mixture, 0 to 1.
        mixture: f64,
        /// What scores say of preferences.
        preference: Preference,
    },
}

/// How likely one of two completions is preferred, from their scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Preference {
    /// Certainly the higher; ½ at a tie. For verifiers and judges.
    Higher,
    /// σ of the difference. For reward models.
    BradleyTerry,
}

impl Preference {
    fn of(self, first: f64, second: f64) -> f64 {
        match self {
            Self::Higher => prefers(first, second),
            Self::BradleyTerry => 1.0 / (1.0 + (second - first).exp()),
        }
    }
}

impl OnlineMethod {
    /// The loss of pairs, where there is one.
    #[must_use]
    pub fn pair_loss(&self) -> Option<PreferenceLoss> {
        match *self {
            Self::BestWorst { loss } | Self::Xpo { loss, .. } => Some(loss),
            Self::NashMd { .. } => None,
        }
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// When a loss refuses its settings, or a number is out of its range.
    pub fn check(&self) -> Result<()> {
        if let Some(loss) = self.pair_loss() {
            crate::loss::PreferenceMix::from(loss).check()?;
        }
        let zero = Tensor::from_slice(&[0.0]);
        match *self {
            Self::BestWorst { .. } => Ok(()),
            Self::Xpo { alpha, .. } => exploration(&zero, alpha).map(drop),
            Self::NashMd { tau, mixture, .. } => {
                ensure((0.0..=1.0).contains(&mixture), "nash_md", || {
                    format!("mixture is {mixture}, expected 0 to 1")
                })?;
                nash_md(&zero, &zero, &zero, tau).map(drop)
            }
        }
    }
}

/// A prompt to draw completions for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnlinePrompt {
    /// Row of the data: part of the noise's key.
    pub row: u64,
    /// Its token ids.
    pub ids: Vec<u32>,
}

/// Settings of [`train`].
#[derive(Clone, Debug)]
pub struct OnlineConfig {
    /// What is drawn, and what is learned from it.
    pub method: OnlineMethod,
    /// Seed of the prompts' order and of the sampling noise.
    pub seed: u64,
    /// Optimiser steps.
    pub steps: u64,
    /// Prompts a step.
    pub prompts_per_step: usize,
    /// K: completions of the policy for each prompt.
    pub samples: usize,
    /// Sampling temperature. The log-probs of losses are at 1 whatever it is.
    pub temperature: f64,
    /// Longest completion in tokens.
    pub max_new_tokens: usize,
    /// Sequences decoded together.
    pub max_sequences: usize,
    /// How the sampler keeps the policy's weights.
    pub weights: DecoderWeights,
    /// Packed tokens a micro-batch.
    pub micro_tokens: usize,
    /// The policy becomes the reference before every so many steps: iterative DPO.
    pub refresh_every: Option<u64>,
    /// Fixed pairs that join each step.
    pub replay_per_step: usize,
}

/// Completions of one prompt that are to be scored.
#[derive(Clone, Copy, Debug)]
pub struct Candidates<'a> {
    /// Index into the prompts.
    pub prompt: usize,
    /// The prompt with its completions.
    pub group: &'a PromptGroup,
}

/// What a scorer fails with.
pub type ScorerError = Box<dyn std::error::Error + Send + Sync>;

/// Gives every completion of every prompt a finite score, more is better.
pub type Scorer<'a> =
    dyn Fn(&[Candidates<'_>]) -> std::result::Result<Vec<Vec<f64>>, ScorerError> + 'a;

/// Who takes part.
#[expect(missing_debug_implementations, reason = "a scorer is a closure")]
pub struct Players<'a> {
    /// The policy, whose parameters the stepper holds.
    pub policy: &'a Transformer,
    /// The reference π₀, with weights of its own or the policy's frozen ones.
    pub reference: Transformer,
    /// Prompts; at least one.
    pub prompts: &'a [OnlinePrompt],
    /// Tokens that end a completion.
    pub eos_ids: &'a [u32],
    /// Who scores.
    pub scorer: &'a Scorer<'a>,
    /// Fixed pairs (completion 0 chosen, 1 rejected) to be mixed in.
    pub replay: &'a [PromptGroup],
    /// Where a refreshed reference is kept until the training ends.
    pub dir: &'a Path,
}

/// What is learned of one prompt.
struct Lesson {
    /// Pairs: chosen and rejected in turn. Nash-MD: the policy's completions.
    group: PromptGroup,
    /// The scores of its completions; empty for replayed pairs.
    scores: Vec<f64>,
    /// Pairs: whether both sides differ in score, for each. Nash-MD: how likely each completion is preferred.
    weights: Vec<f64>,
    /// Which completions the reference drew.
    explored: Vec<usize>,
}

/// Trains the policy.
///
/// # Errors
/// When sizes do not fit, the sampler or the scorer fails, a prompt with its completions exceeds `micro_tokens`,
/// the loss stays non-finite, or a file cannot be written.
pub fn train(
    mut players: Players<'_>,
    cfg: &OnlineConfig,
    stepper: &mut Stepper,
    session: &mut Session,
) -> Result<Flow> {
    check(&players, cfg)?;
    let start = session
        .resume(&mut [("model", stepper)])?
        .map_or(0, |r: Restored<()>| r.step);
    players.restore_reference(cfg, start)?;
    for step in start..cfg.steps {
        players.refresh_reference(cfg, step)?;
        let mut seen = Seen::default();
        let mut lessons = players.lessons(cfg, step, &mut seen)?;
        lessons.extend(replayed(players.replay, cfg, step));
        let mut metrics = learn(&players, cfg, &lessons, stepper, &mut seen)?;
        metrics.extend(seen.means());
        let tokens = lessons.iter().map(|l| l.group.num_tokens()).sum();
        session.log(step, tokens, &metrics)?;
        if let Flow::Stop(signal) = session.after_step(step, &[("model", stepper)], &())? {
            return Ok(Flow::Stop(signal));
        }
    }
    players.forget_references(cfg)?;
    Ok(Flow::Continue)
}

fn check(players: &Players<'_>, cfg: &OnlineConfig) -> Result<()> {
    let need = |ok: bool, what: &str| ensure(ok, "online training", || what.to_owned());
    cfg.method.check()?;
    need(!players.prompts.is_empty(), "there are no prompts")?;
    need(
        cfg.samples > usize::from(matches!(cfg.method, OnlineMethod::BestWorst { .. })),
        "samples must be at least 1, and 2 where the best is set against the worst",
    )?;
    need(
        cfg.temperature > 0.0,
        "temperature must be above 0: greedy completions are all the same",
    )?;
    need(
        cfg.refresh_every != Some(0),
        "refresh_every must be above 0",
    )?;
    if cfg.replay_per_step == 0 {
        return Ok(());
    }
    need(!players.replay.is_empty(), "there are no pairs to replay")?;
    let loss = cfg.method.pair_loss();
    need(
        loss.is_some_and(|l| !l.asks_scores()),
        "only losses of pairs without scores can replay fixed pairs",
    )
}

/// Accumulates the losses of all lessons and takes the step; passed over where nothing is to be learned.
fn learn(
    players: &Players<'_>,
    cfg: &OnlineConfig,
    lessons: &[Lesson],
    stepper: &mut Stepper,
    seen: &mut Seen,
) -> Result<Vec<(&'static str, f64)>> {
    if lessons.is_empty() {
        return Ok(Vec::new());
    }
    let policy = players.policy;
    let groups: Vec<PromptGroup> = lessons.iter().map(|l| l.group.clone()).collect();
    let lengths: Vec<usize> = groups.iter().map(PromptGroup::num_tokens).collect();
    let mut reference = completion_sums(&players.reference, &groups, cfg.micro_tokens)?.into_iter();
    for range in batches_by_tokens(&lengths, cfg.micro_tokens)? {
        let batch = DeviceBatch::new(&PackedBatch::pack(&groups[range.clone()])?, policy.device())?;
        let own = Sums::of(&target_logprobs(policy, &batch, 1.0, false)?.logprobs);
        let n = own.logprobs.size()[0] as usize;
        let base: Vec<f64> = reference.by_ref().take(n).collect();
        for (p, q) in host(&own.logprobs)?.iter().zip(&base) {
            seen.add("log_ratio", p - q);
        }
        let loss = loss_of(cfg.method, &lessons[range.clone()], &own, base, seen)?;
        stepper.note_rows(groups[range].iter().map(|g| g.row));
        stepper.accumulate(loss)?;
    }
    let report = stepper.apply()?;
    Ok(vec![
        ("loss", report.loss),
        ("grad_norm", report.grad_norm),
        ("lr", report.lr),
    ])
}

/// The loss of a micro-batch of lessons.
fn loss_of(
    method: OnlineMethod,
    lessons: &[Lesson],
    own: &Sums,
    base: Vec<f64>,
    seen: &mut Seen,
) -> Result<LossSum> {
    let weights: Vec<f64> = lessons.iter().flat_map(|l| l.weights.clone()).collect();
    let reference = own.column(base);
    let Some(loss) = method.pair_loss() else {
        let OnlineMethod::NashMd { tau, .. } = method else {
            return Err(Error::Argument {
                op: "online training",
                what: format!("{method:?} has no loss"),
            });
        };
        return nash_md(&own.logprobs, &reference, &own.column(weights), tau);
    };
    let sides = |t: &Tensor| PairValues::new(&t.slice(0, 0, None, 2), &t.slice(0, 1, None, 2));
    let scores = loss
        .asks_scores()
        .then(|| sides(&own.column(lessons.iter().flat_map(|l| l.scores.clone()))));
    let pairs = Pairs {
        lengths: Some(sides(&own.lengths)?),
        scores: scores.transpose()?,
        weights: weights
            .iter()
            .any(|w| *w != 1.0)
            .then(|| own.column(weights.iter().copied())),
        ..PairLogprobs::new(&sides(&own.logprobs)?, &sides(&reference)?).into()
    };
    let out = loss.compute(&pairs)?;
    let (chosen, rejected) = (host(&out.chosen_rewards)?, host(&out.rejected_rewards)?);
    for ((c, r), _) in chosen
        .iter()
        .zip(&rejected)
        .zip(&weights)
        .filter(|(_, w)| **w > 0.0)
    {
        seen.add("accuracy", prefers(*c, *r));
        seen.add("margin", c - r);
        seen.add("chosen_rewards", *c);
        seen.add("rejected_rewards", *r);
    }
    let OnlineMethod::Xpo { alpha, .. } = method else {
        return Ok(out.loss);
    };
    let mut at = 0;
    let mut rows: Vec<i64> = Vec::new();
    for lesson in lessons {
        rows.extend(lesson.explored.iter().map(|i| (at + i) as i64));
        at += lesson.group.completions.len();
    }
    if rows.is_empty() {
        return Ok(out.loss);
    }
    let rows = Tensor::from_slice(&rows).to_device(own.logprobs.device());
    let bonus = exploration(&own.logprobs.index_select(0, &rows), alpha)?;
    Ok(LossSum {
        sum: out.loss.sum + bonus.sum,
        weight: out.loss.weight,
    })
}

/// The fixed pairs of a step.
fn replayed(pairs: &[PromptGroup], cfg: &OnlineConfig, step: u64) -> Vec<Lesson> {
    let n = cfg.replay_per_step as u64;
    (0..n)
        .map(|i| Lesson {
            group: pairs[endless(cfg.seed ^ OTHER, pairs.len(), step * n + i)].clone(),
            scores: Vec::new(),
            weights: vec![1.0],
            explored: Vec::new(),
        })
        .collect()
}

impl Players<'_> {
    /// Draws and scores the completions of a step, and makes lessons of them.
    fn lessons(&self, cfg: &OnlineConfig, step: u64, seen: &mut Seen) -> Result<Vec<Lesson>> {
        let first = step * cfg.prompts_per_step as u64;
        let picks: Vec<usize> = (0..cfg.prompts_per_step as u64)
            .map(|i| endless(cfg.seed, self.prompts.len(), first + i))
            .collect();
        let local = |decoder| LocalSampler {
            decoder,
            limits: GenerateLimits {
                max_batch_sequences: cfg.max_sequences,
                ..GenerateLimits::default()
            },
        };
        let own = || Decoder::with_weights(self.policy, cfg.weights);
        let mut groups = self.draw(&local(own()?), cfg, &picks, step, cfg.seed)?;
        let other = match cfg.method {
            OnlineMethod::BestWorst { .. } => None,
            OnlineMethod::Xpo { .. } => Some(Decoder::with_weights(&self.reference, cfg.weights)?),
            OnlineMethod::NashMd { mixture, .. } => {
                Some(own()?.mixed_with(&self.reference, mixture)?)
            }
        };
        if let Some(other) = other {
            let more = self.draw(&local(other), cfg, &picks, step, cfg.seed ^ OTHER)?;
            for (group, more) in groups.iter_mut().zip(more) {
                group.completions.extend(more.completions);
            }
        }
        let scores = self.score(&picks, &groups)?;
        for (group, scores) in groups.iter().zip(&scores) {
            for (c, score) in group.completions.iter().zip(scores).take(cfg.samples) {
                seen.add("reward", *score);
                seen.add("length", c.ids.len() as f64);
                seen.add("stopped", f64::from(u8::from(c.finish == Finish::Stop)));
            }
        }
        let both = groups.into_iter().zip(scores);
        Ok(both
            .filter_map(|(group, scores)| lesson(cfg, group, scores, seen))
            .collect())
    }

    fn draw(
        &self,
        sampler: &dyn Sampler,
        cfg: &OnlineConfig,
        picks: &[usize],
        step: u64,
        seed: u64,
    ) -> Result<Vec<PromptGroup>> {
        let requests: Vec<GenerateRequest> = picks
            .iter()
            .map(|&i| GenerateRequest {
                prompt: self.prompts[i].ids.clone(),
                prompt_key: step << 32 | (self.prompts[i].row & 0xffff_ffff),
                samples: cfg.samples,
                max_new_tokens: None,
            })
            .collect();
        let sampling = SamplingConfig {
            temperature: cfg.temperature,
            max_new_tokens: cfg.max_new_tokens,
            eos_ids: self.eos_ids.to_vec(),
            seed,
            policy_version: step,
            ..SamplingConfig::default()
        };
        let mut groups = sampler.sample(&requests, &sampling)?;
        for (group, &i) in groups.iter_mut().zip(picks) {
            group.row = self.prompts[i].row;
        }
        Ok(groups)
    }

    fn score(&self, picks: &[usize], groups: &[PromptGroup]) -> Result<Vec<Vec<f64>>> {
        let candidates: Vec<Candidates<'_>> = picks
            .iter()
            .zip(groups)
            .map(|(&prompt, group)| Candidates { prompt, group })
            .collect();
        let scores = (self.scorer)(&candidates).map_err(Error::Scorer)?;
        let whole = scores.len() == groups.len()
            && scores
                .iter()
                .zip(groups)
                .all(|(s, g)| s.len() == g.completions.len());
        ensure(whole, "online training", || {
            "the scorer did not give every completion a score".into()
        })?;
        for (of, group) in scores.iter().zip(groups) {
            ensure(of.iter().all(|s| s.is_finite()), "online training", || {
                format!("a score of row {} is not finite: {of:?}", group.row)
            })?;
        }
        Ok(scores)
    }

    /// The folder of the reference that was taken before `step`.
    fn snapshot(&self, step: u64) -> PathBuf {
        self.dir.join(format!("reference-{step:06}"))
    }

    fn refresh_reference(&mut self, cfg: &OnlineConfig, step: u64) -> Result<()> {
        let due = cfg.refresh_every.is_some_and(|n| step.is_multiple_of(n)) && step > 0;
        if !due {
            return Ok(());
        }
        let (whole, part) = (self.snapshot(step), self.dir.join("reference.part"));
        if !whole.exists() {
            let io = |e: std::io::Error| {
                Error::Model(rlhf_model::Error::Argument(format!(
                    "cannot write {}: {e}; free some room",
                    whole.display()
                )))
            };
            if part.exists() {
                std::fs::remove_dir_all(&part).map_err(io)?;
            }
            self.policy.save(&part)?;
            std::fs::rename(&part, &whole).map_err(io)?;
        }
        if self.policy.adapter().is_some() {
            self.reference = self.policy.merged()?;
            return Ok(());
        }
        Ok(self.reference.copy_from(self.policy)?)
    }

    /// The reference that a training stopped before `step` had.
    fn restore_reference(&mut self, cfg: &OnlineConfig, step: u64) -> Result<()> {
        let Some(every) = cfg.refresh_every else {
            return Ok(());
        };
        // A refresh that is due at `step` itself is still to come.
        let last = step.saturating_sub(1) / every * every;
        if last > 0 {
            let options = LoadOptions {
                device: self.policy.device(),
                kind: self.reference.kind(),
            };
            self.reference = Transformer::load(&self.snapshot(last), &options)?;
        }
        Ok(())
    }

    fn forget_references(&self, cfg: &OnlineConfig) -> Result<()> {
        let Some(every) = cfg.refresh_every else {
            return Ok(());
        };
        for step in (every..cfg.steps).step_by(every as usize) {
            // What cannot be removed only takes room.
            let _ = std::fs::remove_dir_all(self.snapshot(step));
        }
        Ok(())
    }
}

/// What is learned of a prompt's completions; nothing where the best is no better than the worst.
fn lesson(
    cfg: &OnlineConfig,
    group: PromptGroup,
    scores: Vec<f64>,
    seen: &mut Seen,
) -> Option<Lesson> {
    let take = |order: &[usize]| -> (PromptGroup, Vec<f64>) {
        let completions: Vec<Completion> = order
            .iter()
            .map(|&i| group.completions[i].clone())
            .collect();
        let group = PromptGroup {
            row: group.row,
            prompt: group.prompt.clone(),
            completions,
        };
        (group, order.iter().map(|&i| scores[i]).collect())
    };
    let k = cfg.samples;
    match cfg.method {
        OnlineMethod::BestWorst { .. } => {
            // The first of equals: `max_by` takes the last.
            let best = (0..k)
                .rev()
                .max_by(|&a, &b| scores[a].total_cmp(&scores[b]))?;
            let worst = (0..k).min_by(|&a, &b| scores[a].total_cmp(&scores[b]))?;
            let contrast = scores[best] > scores[worst];
            seen.add("no_contrast", f64::from(u8::from(!contrast)));
            let (group, scores) = take(&[best, worst]);
            contrast.then_some(Lesson {
                group,
                scores,
                weights: vec![1.0],
                explored: Vec::new(),
            })
        }
        OnlineMethod::Xpo { .. } => {
            let (mut order, mut weights, mut explored) = (Vec::new(), Vec::new(), Vec::new());
            for i in 0..k {
                let (own, other) = (i, k + i);
                let wins = prefers(scores[own], scores[other]);
                seen.add("wins", wins);
                seen.add("no_contrast", f64::from(u8::from(wins == 0.5)));
                let own_first = wins >= 0.5;
                explored.push(order.len() + usize::from(own_first));
                order.extend(if own_first {
                    [own, other]
                } else {
                    [other, own]
                });
                weights.push(if wins == 0.5 { 0.0 } else { 1.0 });
            }
            let (group, scores) = take(&order);
            Some(Lesson {
                group,
                scores,
                weights,
                explored,
            })
        }
        OnlineMethod::NashMd { preference, .. } => {
            let weights: Vec<f64> = (0..k)
                .map(|i| preference.of(scores[i], scores[k + i]))
                .collect();
            for p in &weights {
                seen.add("wins", *p);
            }
            let (group, scores) = take(&(0..k).collect::<Vec<_>>());
            Some(Lesson {
                group,
                scores,
                weights,
                explored: Vec::new(),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(method: OnlineMethod, samples: usize) -> OnlineConfig {
        OnlineConfig {
            method,
            seed: 1,
            steps: 1,
            prompts_per_step: 1,
            samples,
            temperature: 1.0,
            max_new_tokens: 4,
            max_sequences: 4,
            weights: DecoderWeights::AsLoaded,
            micro_tokens: 64,
            refresh_every: None,
            replay_per_step: 0,
        }
    }

    fn group(n: u32) -> PromptGroup {
        PromptGroup {
            row: 7,
            prompt: vec![1],
            completions: (0..n)
                .map(|i| Completion::whole(vec![10 + i], Finish::Stop))
                .collect(),
        }
    }

    fn ids(lesson: &Lesson) -> Vec<u32> {
        lesson.group.completions.iter().map(|c| c.ids[0]).collect()
    }

    #[test]
    fn lessons_by_hand() {
        let loss = PreferenceLoss::Sigmoid {
            beta: 0.1,
            label_smoothing: 0.0,
        };
        let mut seen = Seen::default();
        let cfg = config(OnlineMethod::BestWorst { loss }, 4);
        let made = lesson(&cfg, group(4), vec![0.0, 2.0, -1.0, 2.0], &mut seen).unwrap();
        assert_eq!((ids(&made), made.scores), (vec![11, 12], vec![2.0, -1.0]));
        assert!(lesson(&cfg, group(4), vec![1.0; 4], &mut seen).is_none());
        // The policy's 10 loses to the reference's 12, its 11 ties with 13.
        let cfg = config(OnlineMethod::Xpo { loss, alpha: 0.1 }, 2);
        let made = lesson(&cfg, group(4), vec![0.0, 1.0, 3.0, 1.0], &mut seen).unwrap();
        assert_eq!(ids(&made), [12, 10, 11, 13]);
        assert_eq!((made.weights, made.explored), (vec![1.0, 0.0], vec![0, 3]));
        let preference = Preference::BradleyTerry;
        let method = OnlineMethod::NashMd {
            tau: 0.1,
            mixture: 0.5,
            preference,
        };
        let scores = vec![3f64.ln(), 0.0, 0.0, 0.0];
        let made = lesson(&config(method, 2), group(4), scores, &mut seen).unwrap();
        assert_eq!(ids(&made), [10, 11]);
        assert!((made.weights[0] - 0.75).abs() < 1e-15 && made.weights[1] == 0.5);
    }
}
