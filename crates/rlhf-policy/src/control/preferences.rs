//! Learning from comparisons alone: Christiano et al. 2017 (arXiv 1706.03741), "Deep reinforcement learning from
//! human preferences".
//!
//! Three things take turns, the paper's three processes: the policy acts and learns by the predicted reward; a
//! teacher compares clips on which the predictors disagree; the predictors learn from all comparisons so far. The
//! paper runs them beside each other; here each has its share of every step, so that a run can be repeated
//! and resumed bit by bit.
//!
//! Invariant: the true reward reaches the teacher's comparisons and the log, nothing else; the policy does not
//! see episodes end ([`Ends::Hidden`]).

use rlhf_data::seed::{Purpose, Stream};
use rlhf_kernels::optim::AdamWConfig;
use rlhf_kernels::{Offsets, Ragged};
use rlhf_reward::segments::{self, Comparisons, Scale};
use rlhf_train::{Flow, Session, Stepper, StepperConfig};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::batch::Batch;
use super::environment::Environment;
use super::lanes::{Act, Collect, Ends, Lane, Lanes};
use super::mlp::Mlp;
use super::train::{Agent, ControlConfig, Learner, Tally};
use crate::error::{Result, ensure};

/// Settings of [`train`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PreferenceConfig {
    /// Comparisons in all.
    pub comparisons: u32,
    /// Of them, those of the first batch's clips, by a policy that knows nothing.
    pub first: u32,
    /// And those of each later batch, until there are as many as `comparisons`.
    pub each: u32,
    /// Steps of a clip.
    pub clip_length: u32,
    /// Pairs looked at for every one that is asked; 1 asks at random.
    pub candidates: u32,
    /// Predictors.
    pub members: u32,
    /// e: how often the likelihood takes an answer for a random one.
    pub error_rate: f64,
    /// What the teacher takes off for an episode's end within a clip, since the environment shows none: the
    /// paper's penalty in place of the end (section 3.1.1).
    pub end_penalty: f64,
    /// Optimiser steps of each predictor a batch.
    pub updates: u32,
    /// Comparisons an optimiser step.
    pub batch_size: u32,
}

impl PreferenceConfig {
    /// Checks the settings.
    ///
    /// # Errors
    /// When one is outside its range.
    pub fn check(&self) -> Result<()> {
        let op = "preferences";
        let counts = [
            self.first,
            self.clip_length,
            self.candidates,
            self.members,
            self.updates,
            self.batch_size,
        ];
        ensure(counts.iter().all(|n| *n > 0), op, || {
            "first, clip_length, candidates, members, updates and batch_size must be above 0".into()
        })?;
        ensure(self.first <= self.comparisons, op, || {
            format!(
                "first is {}, expected at most comparisons, {}",
                self.first, self.comparisons
            )
        })?;
        ensure((0.0..1.0).contains(&self.error_rate), op, || {
            format!("error_rate is {}, expected 0 to below 1", self.error_rate)
        })?;
        ensure(self.end_penalty.is_finite(), op, || {
            format!("end_penalty is {}, expected a number", self.end_penalty)
        })
    }

    /// Comparisons asked for in batch `step`.
    fn wanted(&self, step: u64, asked: usize) -> usize {
        let now = if step == 0 { self.first } else { self.each };
        (now as usize).min((self.comparisons as usize).saturating_sub(asked))
    }
}

/// What was compared so far.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Compared {
    /// Both clips of each comparison, step by step: observation, then the action as a 1 among 0s.
    #[serde(with = "bits")]
    features: Vec<f32>,
    /// 1: the first is better; 0: the second; ½: neither.
    preferences: Vec<f64>,
}

/// Numbers through JSON, bit by bit.
mod bits {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(x: &[f32], to: S) -> Result<S::Ok, S::Error> {
        let bits: Vec<u32> = x.iter().map(|x| x.to_bits()).collect();
        bits.serialize(to)
    }

    pub(super) fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<Vec<f32>, D::Error> {
        let bits = Vec::<u32>::deserialize(from)?;
        Ok(bits.into_iter().map(f32::from_bits).collect())
    }
}

/// What a run saves besides weights.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    lanes: Vec<Lane>,
    tally: Tally,
    compared: Compared,
}

/// The predictors: networks over (observation, action), whose mean, each scaled to mean 0 and deviation 1, is
/// the reward.
struct Ensemble<'a> {
    members: &'a mut [Learner],
    seed: u64,
    /// Steps a clip.
    length: i64,
    error_rate: f64,
}

impl Ensemble<'_> {
    /// `[K, M]` what each member says of each step.
    fn predict(&self, features: &Tensor) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let each: Result<Vec<Tensor>> = self
            .members
            .iter()
            .map(|m| m.network.scalars(features))
            .collect();
        Ok(Tensor::f_stack(&each?, 0)?)
    }

    /// The reward of each step: the members' mean, each on the scale that gives the compared steps mean 0 and
    /// deviation 1.
    fn rewards(&self, features: &Tensor, compared: &Tensor) -> Result<Tensor> {
        let (known, here) = (self.predict(compared)?, self.predict(features)?);
        let scaled: Vec<Tensor> = (0..self.members.len() as i64)
            .map(|k| Scale::of(&known.get(k)).apply(&here.get(k)))
            .collect();
        Ok(Tensor::f_stack(&scaled, 0)?.mean_dim(&[0i64][..], false, Kind::Double))
    }

    /// Lets each member learn from its resample of the comparisons; gives the mean loss.
    fn learn(&mut self, compared: &Compared, cfg: &PreferenceConfig, step: u64) -> Result<f64> {
        let (n, length) = (compared.preferences.len(), self.length);
        let draw = Stream::new(self.seed, Purpose::Subset);
        let (mut sum, mut updates) = (0.0, 0.0);
        for (k, member) in self.members.iter_mut().enumerate() {
            let mut rows = segments::resample(self.seed, k as u32, n);
            if rows.is_empty() {
                rows = (0..n).collect();
            }
            for update in 0..cfg.updates {
                let at = step * u64::from(cfg.updates) + u64::from(update);
                let picked: Vec<usize> = (0..cfg.batch_size)
                    .map(|i| rows[draw.below(rows.len() as u64, at, k as u32, i) as usize])
                    .collect();
                let (features, first, second, preference) = compared.clips(&picked, length)?;
                let offsets = Offsets::from_lengths(&vec![length; 2 * picked.len()])?;
                let rewards = Ragged::new(member.network.scalars(&features)?, offsets)?;
                let comparisons = Comparisons {
                    first: &first,
                    second: &second,
                    preference: &preference,
                    weights: None,
                };
                let loss = segments::loss(&rewards, &comparisons, self.error_rate)?;
                member.stepper.accumulate(loss)?;
                sum += member.stepper.apply()?.loss;
                updates += 1.0;
            }
        }
        Ok(sum / updates)
    }

    /// How often members are right about decided comparisons that they did not learn from; NaN without such.
    fn held_out_accuracy(&self, compared: &Compared) -> Result<f64> {
        let _guard = tch::no_grad_guard();
        let n = compared.preferences.len();
        let (mut right, mut of) = (0.0, 0.0);
        for (k, member) in self.members.iter().enumerate() {
            let mut out = vec![true; n];
            for i in segments::resample(self.seed, k as u32, n) {
                out[i] = false;
            }
            let rows: Vec<usize> = (0..n)
                .filter(|&i| out[i] && compared.preferences[i] != 0.5)
                .collect();
            if rows.is_empty() {
                continue;
            }
            let (features, _, _, _) = compared.clips(&rows, self.length)?;
            let sums = member.network.scalars(&features)?;
            let sums =
                sums.view([-1, 2, self.length])
                    .sum_dim_intlist(&[2i64][..], false, Kind::Double);
            let leads = Vec::<f64>::try_from(&(sums.select(1, 0) - sums.select(1, 1)))?;
            for (lead, &i) in leads.iter().zip(&rows) {
                right += f64::from(u8::from((*lead > 0.0) == (compared.preferences[i] == 1.0)));
            }
            of += rows.len() as f64;
        }
        Ok(right / of)
    }
}

impl Compared {
    /// The chosen comparisons: steps of clips 0, 1, 2, … (each comparison's first and second), which clips are
    /// first and second, and the answers.
    fn clips(&self, rows: &[usize], length: i64) -> Result<(Tensor, Tensor, Tensor, Tensor)> {
        let each = self.features.len() / self.preferences.len().max(1);
        let mut picked = Vec::with_capacity(rows.len() * each);
        for &i in rows {
            picked.extend_from_slice(&self.features[i * each..(i + 1) * each]);
        }
        let features = Tensor::from_slice(&picked).f_view([2 * length * rows.len() as i64, -1])?;
        let clip = |which: i64| (0..rows.len() as i64).map(move |i| 2 * i + which);
        let index = |which: i64| Tensor::from_slice(&clip(which).collect::<Vec<i64>>());
        let answers: Vec<f64> = rows.iter().map(|&i| self.preferences[i]).collect();
        let answers = Tensor::from_slice(&answers).to_kind(Kind::Float);
        Ok((features, index(0), index(1), answers))
    }

    /// Every step of every clip.
    fn steps(&self, width: i64) -> Result<Tensor> {
        Ok(Tensor::from_slice(&self.features).f_view([-1, width])?)
    }
}

/// (observation, action) of each step, `[M, D + actions]`, in f32.
fn features(batch: &Batch, actions: i64) -> Result<Tensor> {
    let one_hot = batch.actions.f_one_hot(actions)?.to_kind(Kind::Float);
    Ok(Tensor::f_cat(
        &[batch.observations.to_kind(Kind::Float), one_hot],
        1,
    )?)
}

/// Predictors with random weights for an environment, with hidden layers of the given widths.
///
/// # Errors
/// When a width is 0.
pub fn predictors(
    environment: &impl Environment,
    hidden: &[usize],
    cfg: &PreferenceConfig,
    seed: u64,
    (adamw, config): (AdamWConfig, StepperConfig),
) -> Result<Vec<Learner>> {
    let inputs = environment.observation_size() + environment.actions();
    let widths = [&[inputs][..], hidden, &[1]].concat();
    (0..u64::from(cfg.members))
        .map(|k| {
            let own = seed ^ 0x7265_7761 ^ (k << 32);
            let network = Mlp::new(&widths, 1.0, own, Kind::Float)?;
            Ok(Learner::new(network, adamw, config))
        })
        .collect()
}

/// Where clips of some steps begin. They are laid backward from every end of an episode and from the last step, each
/// stretch until the end before it, and the first clip of a stretch may reach over that: a clip shows how an episode
/// ended, never what came after it, or the predictors would take the first steps of an episode for what was wrong.
fn clip_starts(steps: std::ops::Range<i64>, terminated: &[bool], length: i64) -> Vec<i64> {
    let (mut starts, mut begin) = (Vec::new(), steps.start);
    for step in steps.clone() {
        if !(terminated[step as usize] || step + 1 == steps.end) {
            continue;
        }
        let mut start = step + 1 - length;
        if start >= steps.start {
            starts.push(start);
        }
        while start - length >= begin {
            start -= length;
            starts.push(start);
        }
        begin = step + 1;
    }
    starts
}

/// Asks the teacher about the clips of a batch on which the members disagree most.
fn ask(
    batch: &Batch,
    features: &Tensor,
    ensemble: &Ensemble<'_>,
    cfg: &PreferenceConfig,
    (wanted, step): (usize, u64),
    compared: &mut Compared,
) -> Result<()> {
    let (length, width) = (ensemble.length, features.size()[1]);
    let draw = Stream::new(ensemble.seed, Purpose::Pairing);
    let starts: Vec<i64> = batch
        .rewards
        .offsets()
        .host()
        .windows(2)
        .flat_map(|w| clip_starts(w[0]..w[1], &batch.terminated, length))
        .collect();
    let n = starts.len() as u64;
    ensure(n > 1, "preferences", || {
        format!("a batch holds {n} clips of {length} steps, expected at least two")
    })?;
    // Σ r̂ of each clip under each member, and what the teacher sees of it.
    let predicted = ensemble.predict(features)?;
    let sum = |&at: &i64| {
        predicted
            .narrow(1, at, length)
            .sum_dim_intlist(&[1i64][..], false, Kind::Double)
    };
    let sums = Tensor::f_stack(&starts.iter().map(sum).collect::<Vec<_>>(), 1)?;
    let rewards = Vec::<f64>::try_from(&batch.rewards.values().to_kind(Kind::Double))?;
    let truth = |at: i64| -> f64 {
        let steps = at as usize..(at + length) as usize;
        let ends = batch.terminated[steps.clone()]
            .iter()
            .filter(|t| **t)
            .count();
        rewards[steps].iter().sum::<f64>() - cfg.end_penalty * ends as f64
    };
    // Pairs of two clips, the most disputed first; a pair is asked once.
    let mut pairs: Vec<(i64, i64)> = (0..wanted as u64 * u64::from(cfg.candidates))
        .map(|i| {
            let at = step << 32 | i;
            let first = draw.below(n, at, 0, 0);
            let second = (first + 1 + draw.below(n - 1, at, 1, 0)) % n;
            (first as i64, second as i64)
        })
        .collect();
    let mut met = std::collections::HashSet::new();
    pairs.retain(|(a, b)| met.insert((*a.min(b), *a.max(b))));
    let side = |which: fn(&(i64, i64)) -> i64| {
        let index: Vec<i64> = pairs.iter().map(which).collect();
        sums.index_select(1, &Tensor::from_slice(&index))
    };
    let disputed = segments::disagreement(&(side(|p| p.0) - side(|p| p.1)))?;
    let disputed = Vec::<f64>::try_from(&disputed)?;
    let mut order: Vec<usize> = (0..pairs.len()).collect();
    order.sort_by(|a, b| disputed[*b].total_cmp(&disputed[*a]));
    for (a, b) in order.into_iter().take(wanted).map(|i| pairs[i]) {
        let (a, b) = (starts[a as usize], starts[b as usize]);
        let difference = truth(a) - truth(b);
        compared.preferences.push(match difference {
            d if d > 0.0 => 1.0,
            d if d < 0.0 => 0.0,
            _ => 0.5,
        });
        for at in [a, b] {
            let clip = features.narrow(0, at, length).reshape([length * width]);
            compared.features.extend(Vec::<f32>::try_from(&clip)?);
        }
    }
    Ok(())
}

/// The steppers of all networks, by name.
fn steppers<'a>(
    agent: &'a mut Agent,
    members: &'a mut [Learner],
    names: &'a [String],
) -> Vec<(&'a str, &'a mut Stepper)> {
    let members = members.iter_mut().zip(names);
    let members = members.map(|(m, name)| (name.as_str(), &mut m.stepper));
    agent.steppers_mut().into_iter().chain(members).collect()
}

/// Trains `agent` on copies of `environment` by the reward that `members`, the predictors, learn from a teacher's
/// comparisons. The teacher prefers the clip with the higher true return.
///
/// # Errors
/// When a setting is outside its range, a network does not fit the environment, the algorithm wants whole
/// episodes, a loss stays non-finite, or a file cannot be written.
pub fn train(
    environment: &impl Environment,
    agent: &mut Agent,
    members: &mut [Learner],
    (cfg, preferences): (&ControlConfig, &PreferenceConfig),
    session: &mut Session,
) -> Result<Flow> {
    cfg.check()?;
    preferences.check()?;
    let much = cfg.algorithm.collect();
    ensure(much != Collect::Episodes, "preferences", || {
        "whole episodes show their ends: use a2c or ppo".into()
    })?;
    ensure(
        members.len() == preferences.members as usize,
        "preferences",
        || {
            format!(
                "{} predictors, expected {}",
                members.len(),
                preferences.members
            )
        },
    )?;
    let names: Vec<String> = (0..members.len()).map(|k| format!("reward_{k}")).collect();
    let mut lanes = Lanes::new(environment, cfg.environments, cfg.seed, 0);
    let (mut tally, mut compared) = (Tally::default(), Compared::default());
    let restored = session.resume::<State>(&mut steppers(agent, members, &names))?;
    let start = restored.as_ref().map_or(0, |r| r.step);
    if let Some(r) = restored {
        lanes.restore(&r.extra.lanes)?;
        (tally, compared) = (r.extra.tally, r.extra.compared);
    }
    let mut ensemble = Ensemble {
        members,
        seed: cfg.seed,
        length: i64::from(preferences.clip_length),
        error_rate: preferences.error_rate,
    };
    for step in start..cfg.steps {
        let mut drawn = lanes.collect(&agent.policy.network, much, Ends::Hidden, Act::Sampled)?;
        tally.add(&drawn.batch, &drawn.finished);
        let features = features(&drawn.batch, environment.actions() as i64)?;
        let wanted = preferences.wanted(step, compared.preferences.len());
        if wanted > 0 {
            let (batch, asked) = (&drawn.batch, (wanted, step));
            ask(
                batch,
                &features,
                &ensemble,
                preferences,
                asked,
                &mut compared,
            )?;
        }
        let reward_loss = ensemble.learn(&compared, preferences, step)?;
        let known = compared.steps(features.size()[1])?;
        let rewards = ensemble.rewards(&features, &known)?;
        drawn.batch.rewards = drawn.batch.rewards.with_values(rewards)?;
        let seen = agent.learn(&drawn.batch, step, cfg)?;

        let ties = compared.preferences.iter().filter(|p| **p == 0.5).count();
        let asked = compared.preferences.len() as f64;
        let own = [
            ("comparisons", asked),
            ("ties", ties as f64 / asked),
            ("reward_loss", reward_loss),
            ("accuracy", ensemble.held_out_accuracy(&compared)?),
        ];
        let metrics = [
            &tally.metrics()[..],
            &own,
            &seen.metrics(agent.value.is_some()),
        ]
        .concat();
        session.log(step, drawn.batch.steps(), &metrics)?;
        let state = State {
            lanes: lanes.state(),
            tally: tally.clone(),
            compared: compared.clone(),
        };
        let members = ensemble.members.iter().zip(&names);
        let members = members.map(|(m, name)| (name.as_str(), &m.stepper));
        let all: Vec<(&str, &Stepper)> = agent.steppers().into_iter().chain(members).collect();
        if let Flow::Stop(signal) = session.after_step(step, &all, &state)? {
            return Ok(Flow::Stop(signal));
        }
    }
    Ok(Flow::Continue)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ends after steps 4 and 13 of twenty, a stretch of six left over.
    #[test]
    fn clips_do_not_show_what_comes_after_an_end() {
        let mut terminated = vec![false; 30];
        (terminated[14], terminated[23]) = (true, true);
        let mut starts = clip_starts(10..30, &terminated, 4);
        starts.sort_unstable();
        // [11, 15) ends at the first end; [16, 20) and [20, 24) at the second; [26, 30) at the last step.
        assert_eq!(starts, [11, 16, 20, 26]);
        // The first end is too early for a clip of six, the second's reaches over nothing.
        assert_eq!(clip_starts(10..30, &terminated, 6), [18, 24]);
        // Without ends: backward from the last step.
        assert_eq!(clip_starts(0..9, &[false; 9], 4), [5, 1]);
    }
}
