//! Environments side by side, and what is drawn from them.
//!
//! Invariant: a lane's episode depends on (seed, lane, episode) and on the actions alone, not on how many
//! other lanes there are.

use rlhf_data::seed::Purpose;
use rlhf_kernels::{Offsets, Ragged};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::batch::Batch;
use super::environment::{Environment, Noise};
use super::mlp::Mlp;
use crate::error::{Result, ensure};

/// How much is drawn at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collect {
    /// So many steps of each lane; episodes go on in the next batch.
    Steps(u32),
    /// One whole episode of each lane.
    Episodes,
}

/// Whether the learner sees episodes end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    /// The end of an episode is the end of its piece.
    Seen,
    /// The next episode follows as if nothing had happened (Christiano et al. 2017, section 3.1: an end that is
    /// seen tells what the reward should). Only for [`Collect::Steps`].
    Hidden,
}

/// How actions are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Drawn from the policy.
    Sampled,
    /// The likeliest.
    Greedy,
}

/// An episode that ended or was cut by its time limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Finished {
    /// Σ r, not discounted.
    pub total: f64,
    /// Steps.
    pub length: u32,
    /// Whether the time limit cut it.
    pub truncated: bool,
}

/// What [`Lanes::collect`] gives.
#[derive(Debug)]
pub struct Drawn {
    /// The steps.
    pub batch: Batch,
    /// Episodes that finished meanwhile, lane by lane.
    pub finished: Vec<Finished>,
}

/// Where a lane stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lane {
    episode: u32,
    step: u32,
    total: f64,
    state: Vec<f64>,
}

/// Environments side by side.
#[derive(Clone, Debug)]
pub struct Lanes<E> {
    seed: u64,
    first: u32,
    lanes: Vec<(E, Lane)>,
}

/// What one lane did in a batch.
#[derive(Default)]
struct Track {
    observations: Vec<f32>,
    actions: Vec<i64>,
    logprobs: Vec<f32>,
    rewards: Vec<f64>,
    terminated: Vec<bool>,
    pieces: Vec<i64>,
    after: Vec<f32>,
    open: Vec<bool>,
    finished: Vec<Finished>,
    done: bool,
}

impl Track {
    /// Ends the piece: `open` where the future goes on behind it.
    fn cut(&mut self, environment: &impl Environment, open: bool) {
        let begun: i64 = self.pieces.iter().sum();
        self.pieces.push(self.actions.len() as i64 - begun);
        environment.observe(&mut self.after);
        self.open.push(open);
    }
}

impl<E: Environment> Lanes<E> {
    /// `n` copies of an environment, each at the start of its first episode. They are numbered from `first`,
    /// and their noise by their number.
    #[must_use]
    pub fn new(environment: &E, n: usize, seed: u64, first: u32) -> Self {
        let lane = Lane {
            episode: 0,
            step: 0,
            total: 0.0,
            state: Vec::new(),
        };
        let mut all = Self {
            seed,
            first,
            lanes: vec![(environment.clone(), lane); n],
        };
        for i in 0..n {
            let noise = all.noise(i, Purpose::Noise);
            all.lanes[i].0.reset(noise);
        }
        all
    }

    /// Where each lane stands.
    #[must_use]
    pub fn state(&self) -> Vec<Lane> {
        let at = |(e, lane): &(E, Lane)| Lane {
            state: e.state(),
            ..lane.clone()
        };
        self.lanes.iter().map(at).collect()
    }

    /// Goes back to where [`Lanes::state`] was taken.
    ///
    /// # Errors
    /// When there were more or fewer lanes.
    pub fn restore(&mut self, state: &[Lane]) -> Result<()> {
        ensure(state.len() == self.lanes.len(), "lanes", || {
            format!("{} were saved, expected {}", state.len(), self.lanes.len())
        })?;
        for ((environment, lane), saved) in self.lanes.iter_mut().zip(state) {
            environment.restore(&saved.state);
            *lane = saved.clone();
        }
        Ok(())
    }

    fn noise(&self, i: usize, purpose: Purpose) -> Noise {
        let lane = &self.lanes[i].1;
        let number = self.first + i as u32;
        Noise::new(self.seed, purpose, number, lane.episode, lane.step)
    }

    /// Lets `policy` act in all lanes.
    ///
    /// # Errors
    /// When the policy does not fit the environment, or ends are to be hidden in whole episodes.
    pub fn collect(&mut self, policy: &Mlp, much: Collect, ends: Ends, act: Act) -> Result<Drawn> {
        ensure(
            ends == Ends::Seen || much != Collect::Episodes,
            "collecting",
            || "whole episodes show their ends".into(),
        )?;
        ensure(!self.lanes.is_empty(), "collecting", || {
            "there are no environments".into()
        })?;
        let _guard = tch::no_grad_guard();
        let mut tracks: Vec<Track> = self.lanes.iter().map(|_| Track::default()).collect();
        let mut steps = 0;
        loop {
            let active: Vec<usize> = (0..tracks.len()).filter(|&i| !tracks[i].done).collect();
            if active.is_empty() || much == Collect::Steps(steps) {
                break;
            }
            self.advance(policy, ends, act, &active, &mut tracks)?;
            for &i in &active {
                tracks[i].done = much == Collect::Episodes && !tracks[i].finished.is_empty();
            }
            steps += 1;
        }
        for ((environment, _), track) in self.lanes.iter().zip(&mut tracks) {
            if track.pieces.iter().sum::<i64>() < track.actions.len() as i64 {
                track.cut(environment, true);
            }
        }
        self.gather(tracks, policy.kind())
    }

    /// One step of the `active` lanes.
    fn advance(
        &mut self,
        policy: &Mlp,
        ends: Ends,
        act: Act,
        active: &[usize],
        tracks: &mut [Track],
    ) -> Result<()> {
        let width = self.lanes[0].0.observation_size();
        let mut seen = Vec::with_capacity(active.len() * width);
        for &i in active {
            self.lanes[i].0.observe(&mut seen);
        }
        let x = Tensor::from_slice(&seen).view([active.len() as i64, width as i64]);
        let logits = policy.forward(&x.to_kind(policy.kind()))?;
        let logprobs = logits.f_log_softmax(1, Kind::Double)?;
        let actions = logprobs.size()[1] as usize;
        ensure(actions == self.lanes[0].0.actions(), "collecting", || {
            format!(
                "the policy knows {actions} actions, expected {}",
                self.lanes[0].0.actions()
            )
        })?;
        let logprobs = Vec::<f64>::try_from(&logprobs.reshape([-1]))?;
        for (row, &i) in active.iter().enumerate() {
            let own = &logprobs[row * actions..(row + 1) * actions];
            let action = match act {
                Act::Greedy => largest(own),
                Act::Sampled => draw(own, self.noise(i, Purpose::Sample).uniform(0)),
            };
            let track = &mut tracks[i];
            track
                .observations
                .extend(&seen[row * width..(row + 1) * width]);
            track.actions.push(action as i64);
            track.logprobs.push(own[action] as f32);
            self.lanes[i].1.step += 1;
            let noise = self.noise(i, Purpose::Noise);
            let (environment, lane) = &mut self.lanes[i];
            let outcome = environment.step(action, noise);
            lane.total += outcome.reward;
            track.rewards.push(outcome.reward);
            track.terminated.push(outcome.terminated);
            let cut = environment.time_limit().is_some_and(|n| lane.step >= n);
            if !(outcome.terminated || cut) {
                continue;
            }
            if ends == Ends::Seen {
                track.cut(environment, !outcome.terminated);
            }
            track.finished.push(Finished {
                total: lane.total,
                length: lane.step,
                truncated: !outcome.terminated,
            });
            (lane.episode, lane.step, lane.total) = (lane.episode + 1, 0, 0.0);
            let noise = self.noise(i, Purpose::Noise);
            self.lanes[i].0.reset(noise);
        }
        Ok(())
    }

    /// The tracks end to end.
    fn gather(&self, tracks: Vec<Track>, kind: Kind) -> Result<Drawn> {
        let width = self.lanes.first().map_or(0, |l| l.0.observation_size()) as i64;
        let mut all = Track::default();
        for t in tracks {
            all.observations.extend(t.observations);
            all.actions.extend(t.actions);
            all.logprobs.extend(t.logprobs);
            all.rewards.extend(t.rewards);
            all.terminated.extend(t.terminated);
            all.pieces.extend(t.pieces);
            all.after.extend(t.after);
            all.open.extend(t.open);
            all.finished.extend(t.finished);
        }
        let offsets = Offsets::from_lengths(&all.pieces)?;
        let matrix = |x: &[f32]| Tensor::from_slice(x).view([-1, width]).to_kind(kind);
        let logprobs = Tensor::from_slice(&all.logprobs).to_kind(kind);
        let batch = Batch {
            observations: matrix(&all.observations),
            actions: Tensor::from_slice(&all.actions),
            logprobs: Ragged::new(logprobs, offsets.clone())?,
            rewards: Ragged::new(Tensor::from_slice(&all.rewards), offsets)?,
            after: matrix(&all.after),
            open: all.open,
            terminated: all.terminated,
        };
        Ok(Drawn {
            batch,
            finished: all.finished,
        })
    }
}

fn largest(logprobs: &[f64]) -> usize {
    let better = |best: usize, i: usize| {
        if logprobs[i] > logprobs[best] {
            i
        } else {
            best
        }
    };
    (0..logprobs.len()).fold(0, better)
}

/// The action where the running sum of probabilities passes `u`.
fn draw(logprobs: &[f64], u: f64) -> usize {
    let mut sum = 0.0;
    let passed = logprobs.iter().position(|lp| {
        sum += lp.exp();
        u < sum
    });
    passed.unwrap_or(logprobs.len() - 1)
}
