//! The rollouts of a step: drawn now, drawn ahead on a thread of its own, or read from a record; scored, shaped and
//! chosen.
//!
//! Invariant: which prompts a step has, and which version of the policy completes them, is fixed by the step and the
//! state that a checkpoint holds, never by timing.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Scope;
use std::time::Instant;

use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_data::order::endless;
use rlhf_model::{CausalLm as _, Transformer};
use rlhf_reward::source::{MixState, RewardMix};
use rlhf_train::Session;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::error::{Error, Result, ensure};
use crate::grpo::Players;
use crate::replay::{Kept, record, replay};
use crate::rollout::{self, Rollout, RolloutConfig, RolloutStats, ScoredRollout};

/// What is done with rollouts before they are learned from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rules {
    /// Draw until enough groups have contrast.
    pub dynamic: Option<Dynamic>,
    /// Shape the reward by length.
    pub overlong: Option<Overlong>,
    /// Completions that were cut off teach nothing: none of their tokens is trained. Their rewards are compared all
    /// the same.
    pub filter_cut: bool,
    /// Where the rollouts of each step are recorded.
    pub record: Option<PathBuf>,
    /// Where rollouts are read from instead of being drawn.
    pub replay: Option<PathBuf>,
    /// How many steps ahead of the learner a thread of its own draws; 0 draws when they are needed.
    pub ahead: u64,
    /// Whether a greedy completion of each prompt is drawn and scored too (ReMax).
    pub greedy: bool,
}

impl Rules {
    /// Checks what can be together.
    ///
    /// # Errors
    /// When two settings contradict each other or one is outside its range.
    pub fn check(&self, max_new_tokens: usize) -> Result<()> {
        let op = "rollouts";
        if let Some(o) = &self.overlong {
            ensure(o.buffer > 0 && o.buffer <= max_new_tokens, op, || {
                format!(
                    "overlong.buffer is {}, expected 1 to max_new_tokens = {max_new_tokens}",
                    o.buffer
                )
            })?;
            ensure(o.penalty > 0.0 && o.penalty.is_finite(), op, || {
                format!("overlong.penalty is {}, expected above 0", o.penalty)
            })?;
        }
        ensure(self.dynamic.is_none_or(|d| d.max_rounds > 0), op, || {
            "dynamic.max_rounds is 0, expected 1 or more".into()
        })?;
        let one_of = |a: bool, b: bool, what: &str| ensure(!(a && b), op, || what.into());
        let (dynamic, ahead) = (self.dynamic.is_some(), self.ahead > 0);
        one_of(
            dynamic,
            ahead,
            "dynamic sampling asks for the rewards before it draws again, drawing ahead does not wait for them; leave one out",
        )?;
        one_of(
            dynamic,
            self.greedy,
            "dynamic sampling chooses by contrast within a group, a greedy baseline needs none; leave dynamic out",
        )?;
        one_of(
            self.replay.is_some(),
            ahead,
            "replayed rollouts are not drawn; leave `ahead` out",
        )
    }
}

/// DAPO's dynamic sampling (Yu et al. 2025, arXiv 2503.14476, section 3.2): groups whose rewards are all equal are
/// replaced by those of further prompts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dynamic {
    /// Rounds of drawing a step at most; the step then goes on with the groups that it has.
    pub max_rounds: u32,
}

/// DAPO's soft overlong punishment (equation 13): 0 up to `buffer` tokens before the limit, falling evenly to
/// −`penalty` at the limit, and −`penalty` for completions that were cut.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Overlong {
    /// L_cache, in tokens.
    pub buffer: usize,
    /// What is taken at the limit (1 in the paper).
    pub penalty: f64,
}

impl Overlong {
    /// What is added to the reward of a completion.
    #[must_use]
    pub fn of(&self, completion: &Completion, max_new_tokens: usize) -> f64 {
        if completion.finish != Finish::Stop {
            return -self.penalty;
        }
        let past = completion
            .ids
            .len()
            .saturating_sub(max_new_tokens - self.buffer);
        -self.penalty * (past as f64 / self.buffer as f64).min(1.0)
    }
}

/// What is known of a step's rollouts besides those that are learned from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// Of all groups that were drawn.
    pub stats: RolloutStats,
    /// The mean of each part of the reward, by name.
    pub parts: Vec<(String, f64)>,
    /// Groups that were drawn.
    pub drawn: u64,
    /// Rounds of drawing.
    pub rounds: u64,
}

/// What a step learns from.
#[derive(Clone, Debug)]
pub struct Harvest {
    /// The step.
    pub step: u64,
    /// Which policy drew: the steps that it had done.
    pub version: u64,
    /// The groups.
    pub scored: Vec<ScoredRollout>,
    /// The reward of each prompt's greedy completion, where asked for.
    pub greedy: Option<Vec<f64>>,
    /// What else is known.
    pub facts: Facts,
    /// Seconds spent on drawing.
    pub seconds: f64,
}

/// Where in the prompts a training is, and what was drawn ahead: part of its checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Place {
    /// With dynamic sampling: the next prompt of the endless walk.
    next: u64,
    /// Drawn, not learned from yet.
    ahead: Vec<Parked>,
    /// What the rewards are normalised by.
    #[serde(default)]
    rewards: MixState,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Parked {
    step: u64,
    version: u64,
    groups: Vec<Kept>,
    greedy: Option<Vec<Kept>>,
}

/// Completions without rewards.
#[derive(Debug)]
struct Drawn {
    step: u64,
    version: u64,
    rollouts: Vec<Rollout>,
    greedy: Option<Vec<Rollout>>,
    seconds: f64,
}

/// Where rollouts come from.
#[derive(Debug)]
pub(crate) struct Source<'a> {
    players: Players<'a>,
    cfg: &'a RolloutConfig,
    rules: &'a Rules,
    worker: Option<Worker>,
    /// What was drawn ahead, in order of steps.
    waiting: VecDeque<Drawn>,
    next: u64,
    steps: u64,
}

/// Gives `work` the rollouts of `steps` steps. Drawing ahead halves libtorch's threads; they are whole again after.
pub(crate) fn drawing<'a, T>(
    players: Players<'a>,
    cfg: &'a RolloutConfig,
    rules: &'a Rules,
    steps: u64,
    work: impl FnOnce(Source<'a>) -> Result<T>,
) -> Result<T> {
    let threads = tch::get_num_threads();
    let done = std::thread::scope(|scope| work(Source::new(scope, players, cfg, rules, steps)?));
    tch::set_num_threads(threads);
    done
}

impl<'a> Source<'a> {
    /// Rollouts of `steps` steps. With [`Rules::ahead`] a thread of `scope` draws.
    fn new<'scope>(
        scope: &'scope Scope<'scope, 'a>,
        players: Players<'a>,
        cfg: &'a RolloutConfig,
        rules: &'a Rules,
        steps: u64,
    ) -> Result<Self> {
        rules.check(cfg.max_new_tokens)?;
        ensure(
            rules.ahead == 0 || players.server.is_none(),
            "rollouts",
            || "drawing ahead is for the policy's own weights, not for a server".into(),
        )?;
        ensure(
            rules.ahead == 0 || players.scene.is_none(),
            "rollouts",
            || "talks are not drawn ahead; leave `ahead` or the environment out".into(),
        )?;
        let worker = (rules.ahead > 0)
            .then(|| Worker::spawn(scope, players, cfg, rules.greedy))
            .transpose()?;
        Ok(Self {
            players,
            cfg,
            rules,
            worker,
            waiting: VecDeque::new(),
            next: 0,
            steps,
        })
    }

    /// Goes on where `place` says.
    pub(crate) fn restore(&mut self, place: Place) -> Result<()> {
        self.next = place.next;
        self.players.rewards.restore(place.rewards);
        let tokenizer = self.players.tokenizer;
        let read = |kept: Vec<Kept>| -> Result<Vec<Rollout>> {
            kept.into_iter().map(|k| k.rollout(tokenizer)).collect()
        };
        for parked in place.ahead {
            self.waiting.push_back(Drawn {
                step: parked.step,
                version: parked.version,
                rollouts: read(parked.groups)?,
                greedy: parked.greedy.map(read).transpose()?,
                seconds: 0.0,
            });
        }
        Ok(())
    }

    /// Where a training that stops now goes on. Waits for what is being drawn.
    pub(crate) fn place(&mut self) -> Result<Place> {
        while let Some(worker) = self.worker.as_mut().filter(|w| w.busy > 0) {
            self.waiting.push_back(worker.receive()?);
        }
        let keep = |rollouts: &[Rollout]| rollouts.iter().map(Kept::of).collect();
        let ahead = self.waiting.iter().map(|d| Parked {
            step: d.step,
            version: d.version,
            groups: keep(&d.rollouts),
            greedy: d.greedy.as_deref().map(keep),
        });
        Ok(Place {
            next: self.next,
            ahead: ahead.collect(),
            rewards: self.players.rewards.state(),
        })
    }

    /// The rollouts of `step`, with the policy as it is after `step` steps.
    pub(crate) fn rollouts(&mut self, step: u64) -> Result<Harvest> {
        let harvest = match &self.rules.replay {
            Some(dir) => replay(dir, step, self.players.tokenizer, self.players.prompts)?,
            None => self.fresh(step)?,
        };
        if let Some(dir) = &self.rules.record {
            record(dir, &harvest)?;
        }
        Ok(harvest)
    }

    fn fresh(&mut self, step: u64) -> Result<Harvest> {
        let Some(dynamic) = self.rules.dynamic else {
            let drawn = match self.worker {
                Some(_) => self.drawn_ahead(step)?,
                None => {
                    let chosen =
                        rollout::prompts_of_step(self.cfg, self.players.prompts.len(), step);
                    self.draw(&chosen, step)?
                }
            };
            return self.score(drawn).map(|(harvest, _)| harvest);
        };
        // Each round draws as many prompts as seem to be missing, never one twice.
        let (wanted, prompts) = (self.cfg.prompts_per_step, self.players.prompts.len());
        let mut all: Option<Harvest> = None;
        let mut completions = 0;
        let mut ask = wanted;
        for round in 1..=u64::from(dynamic.max_rounds) {
            let seen = all.as_ref().map_or(0, |a| a.facts.drawn as usize);
            ask = ask.min(prompts.saturating_sub(seen));
            if ask == 0 {
                break;
            }
            let chosen: Vec<usize> = (self.next..self.next + ask as u64)
                .map(|i| endless(self.cfg.seed, prompts, i))
                .collect();
            self.next += ask as u64;
            let drawn = self.draw(&chosen, step)?;
            let (new, n) = self.score(drawn)?;
            let so_far = match all.take() {
                None => new,
                Some(before) => before.with(new, (completions, n)),
            };
            completions += n;
            let with_contrast = so_far
                .scored
                .iter()
                .filter(|s| rollout::has_contrast(s))
                .count();
            let missing = wanted.saturating_sub(with_contrast);
            let share = (with_contrast as f64 / so_far.facts.drawn as f64).max(0.25);
            ask = ((missing as f64 / share).ceil() as usize).min(wanted);
            let mut so_far = so_far;
            so_far.facts.rounds = round;
            all = Some(so_far);
        }
        let mut all = all.ok_or_else(|| Error::Argument {
            op: "rollouts",
            what: "there are no prompts".into(),
        })?;
        if all.scored.iter().any(rollout::has_contrast) {
            all.scored.retain(rollout::has_contrast);
        }
        all.scored.truncate(wanted);
        Ok(all)
    }

    fn draw(&self, chosen: &[usize], step: u64) -> Result<Drawn> {
        let began = Instant::now();
        let rollouts = self.players.draw(self.cfg, chosen, step)?;
        let greedy = self
            .rules
            .greedy
            .then(|| self.players.draw(&greedy(self.cfg), chosen, step))
            .transpose()?;
        Ok(Drawn {
            step,
            version: step,
            rollouts,
            greedy,
            seconds: began.elapsed().as_secs_f64(),
        })
    }

    /// Orders the step that is `ahead` steps away from the policy as it is, and waits for this one.
    fn drawn_ahead(&mut self, step: u64) -> Result<Drawn> {
        let Some(worker) = &mut self.worker else {
            return Err(lost());
        };
        let known = self.waiting.back().map(|d| d.step + 1);
        let first = worker.ordered.or(known).unwrap_or(step).max(step);
        let last = (step + self.rules.ahead).min(self.steps.saturating_sub(1));
        for due in first..=last {
            let chosen = rollout::prompts_of_step(self.cfg, self.players.prompts.len(), due);
            worker.order(self.players.policy, due, step, chosen)?;
        }
        let began = Instant::now();
        let mut drawn = match self.waiting.pop_front() {
            Some(drawn) => drawn,
            None => worker.receive()?,
        };
        // What the learner waited for.
        drawn.seconds = began.elapsed().as_secs_f64();
        Ok(drawn)
    }

    /// Also gives the number of completions.
    fn score(&self, drawn: Drawn) -> Result<(Harvest, usize)> {
        let (prompts, rewards) = (self.players.prompts, self.players.rewards);
        let (mut scored, parts) = rollout::score(drawn.rollouts, prompts, rewards)?;
        if let Some(source) = self.players.steps {
            rollout::score_steps(&mut scored, prompts, source)?;
        }
        let greedy = match drawn.greedy {
            Some(g) => {
                let (mut g, _) = rollout::score(g, prompts, rewards)?;
                self.shape(&mut g);
                Some(g.iter().map(|s| s.rewards[0]).collect())
            }
            None => None,
        };
        self.shape(&mut scored);
        let facts = Facts {
            stats: rollout::stats(&scored),
            parts,
            drawn: scored.len() as u64,
            rounds: 1,
        };
        let n = scored.iter().map(|s| s.rewards.len()).sum();
        let harvest = Harvest {
            step: drawn.step,
            version: drawn.version,
            scored,
            greedy,
            facts,
            seconds: drawn.seconds,
        };
        Ok((harvest, n))
    }

    fn shape(&self, scored: &mut [ScoredRollout]) {
        let Some(overlong) = &self.rules.overlong else {
            return;
        };
        for s in scored {
            for (r, c) in s.rewards.iter_mut().zip(&s.rollout.group.completions) {
                *r += overlong.of(c, self.cfg.max_new_tokens);
            }
        }
    }
}

impl Harvest {
    /// Takes from each completion's reward what its distance Σ log(π/π₀) costs beyond the budget of `rewards`, and
    /// gives the mean of that; nothing without a budget.
    pub(crate) fn charge_kl(&mut self, rewards: &RewardMix, kl: &[f64]) -> Option<f64> {
        let charges = rewards.kl_charges(kl)?;
        let all = self.scored.iter_mut().flat_map(|s| &mut s.rewards);
        for (reward, charge) in all.zip(&charges) {
            *reward -= charge;
        }
        Some(charges.iter().sum::<f64>() / charges.len().max(1) as f64)
    }

    /// The groups of all prompts.
    pub(crate) fn groups(&self) -> Vec<&PromptGroup> {
        self.scored.iter().map(|s| &s.rollout.group).collect()
    }

    /// With the groups of a further round; `completions` are those of both.
    fn with(mut self, other: Self, completions: (usize, usize)) -> Self {
        let total = (completions.0 + completions.1).max(1) as f64;
        for (mine, theirs) in self.facts.parts.iter_mut().zip(&other.facts.parts) {
            mine.1 = (mine.1 * completions.0 as f64 + theirs.1 * completions.1 as f64) / total;
        }
        self.facts.drawn += other.facts.drawn;
        self.scored.extend(other.scored);
        self.facts.stats = rollout::stats(&self.scored);
        self.seconds += other.seconds;
        self
    }
}

fn greedy(cfg: &RolloutConfig) -> RolloutConfig {
    RolloutConfig {
        temperature: 0.0,
        group_size: 1,
        ..cfg.clone()
    }
}

fn lost() -> Error {
    Error::Argument {
        op: "rollouts",
        what: "the thread that draws is gone".into(),
    }
}

/// A thread that draws with weights of its own.
#[derive(Debug)]
struct Worker {
    jobs: Sender<Job>,
    results: Receiver<Result<Drawn>>,
    busy: usize,
    /// The step after the last one that was ordered.
    ordered: Option<u64>,
}

struct Job {
    step: u64,
    version: u64,
    weights: Vec<Tensor>,
    chosen: Vec<usize>,
}

impl Worker {
    fn spawn<'scope, 'a>(
        scope: &'scope Scope<'scope, 'a>,
        players: Players<'a>,
        cfg: &'a RolloutConfig,
        with_greedy: bool,
    ) -> Result<Self> {
        let (jobs, orders) = channel::<Job>();
        let (done, results) = channel();
        let own = players.policy.duplicate()?;
        let (tokenizer, prompts) = (players.tokenizer, players.prompts);
        // Threads of a pool that two phases share would wait for each other: each phase has its own half.
        let threads = tch::get_num_threads();
        let share = (threads / 2).max(1);
        tch::set_num_threads((threads - share).max(1));
        scope.spawn(move || {
            tch::set_num_threads(share);
            for job in orders {
                let draw = |cfg: &RolloutConfig| {
                    rollout::draw(
                        &cfg.local(&own)?,
                        tokenizer,
                        prompts,
                        &job.chosen,
                        cfg,
                        job.step,
                    )
                };
                let work = || -> Result<Drawn> {
                    tch::no_grad(|| -> Result<()> {
                        for ((_, mut to), from) in own.parameters().into_iter().zip(&job.weights) {
                            to.f_copy_(from)?;
                        }
                        Ok(())
                    })?;
                    let mut rollouts = draw(cfg)?;
                    for c in rollouts.iter_mut().flat_map(|r| &mut r.group.completions) {
                        if let Some(s) = &mut c.sampler {
                            s.policy_version = job.version;
                        }
                    }
                    Ok(Drawn {
                        step: job.step,
                        version: job.version,
                        rollouts,
                        greedy: with_greedy.then(|| draw(&greedy(cfg))).transpose()?,
                        seconds: 0.0,
                    })
                };
                if done.send(work()).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            jobs,
            results,
            busy: 0,
            ordered: None,
        })
    }

    /// Has `step` drawn by `policy` as it is now, after `version` steps.
    fn order(
        &mut self,
        policy: &Transformer,
        step: u64,
        version: u64,
        chosen: Vec<usize>,
    ) -> Result<()> {
        let weights = policy
            .parameters()
            .iter()
            .map(|(_, p)| p.detach().copy())
            .collect();
        let job = Job {
            step,
            version,
            weights,
            chosen,
        };
        self.jobs.send(job).map_err(|_| lost())?;
        self.busy += 1;
        self.ordered = Some(step + 1);
        Ok(())
    }

    fn receive(&mut self) -> Result<Drawn> {
        let drawn = self.results.recv().map_err(|_| lost())?;
        self.busy -= 1;
        drawn
    }
}

/// Samples of a training: `samples.parquet` in the stage's folder.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Samples {
    /// Steps between.
    pub every: u64,
    /// Prompts each time, one completion of each.
    pub prompts: usize,
}

impl Samples {
    /// Adds to the samples when `step` is one of those.
    pub(crate) fn after_step(
        &self,
        session: &Session,
        players: &Players<'_>,
        harvest: &Harvest,
        told: &[Told],
    ) -> Result<()> {
        if !harvest.step.is_multiple_of(self.every.max(1)) {
            return Ok(());
        }
        let mut first = 0;
        let mut rows = Vec::new();
        for s in harvest.scored.iter().take(self.prompts) {
            if let (Some(t), Some(text)) = (told.get(first), s.rollout.texts.first()) {
                rows.push(crate::samples::Sample {
                    step: harvest.step,
                    prompt: players.prompts[s.rollout.prompt].text.clone(),
                    completion: text.clone(),
                    reward: s.rewards[0],
                    advantage: t.advantage,
                    kl: t.kl,
                    length: s.rollout.group.completions[0].ids.len() as u64,
                    ended: s.rollout.group.completions[0].finish == Finish::Stop,
                });
            }
            first += s.rewards.len();
        }
        crate::samples::append(&session.dir().join("samples.parquet"), harvest.step, rows)
    }
}

/// What a sample says of a completion besides its reward.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Told {
    /// Of its first token.
    pub(crate) advantage: f64,
    /// Σ (log μ − log π₀).
    pub(crate) kl: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_punishment_of_length_by_hand() {
        let o = Overlong {
            buffer: 4,
            penalty: 2.0,
        };
        let of = |n: usize, finish| o.of(&Completion::whole(vec![1; n], finish), 10);
        let ends: Vec<f64> = [1, 6, 7, 8, 10]
            .iter()
            .map(|n| of(*n, Finish::Stop))
            .collect();
        assert_eq!(ends, [0.0, 0.0, -0.5, -1.0, -2.0]);
        assert_eq!(of(10, Finish::Length), -2.0);
        // The context was full before the limit.
        assert_eq!(of(5, Finish::Length), -2.0);
    }

    #[test]
    fn rules_that_contradict_each_other_are_named() {
        let dynamic = Some(Dynamic { max_rounds: 2 });
        let bad = |rules: Rules| rules.check(10).unwrap_err().to_string();
        let ahead = Rules {
            dynamic,
            ahead: 1,
            ..Rules::default()
        };
        assert!(bad(ahead).contains("drawing ahead"));
        let greedy = Rules {
            dynamic,
            greedy: true,
            ..Rules::default()
        };
        assert!(bad(greedy).contains("greedy"));
        let replay = Rules {
            replay: Some("x".into()),
            ahead: 1,
            ..Rules::default()
        };
        assert!(bad(replay).contains("replayed"));
        let none = Rules {
            dynamic: Some(Dynamic { max_rounds: 0 }),
            ..Rules::default()
        };
        assert!(bad(none).contains("max_rounds"));
        assert!(Rules::default().check(10).is_ok());
    }
}
