//! Online methods: expected gradients by enumeration, Nash-MD's fixed point, whole trainings, what draws depend on.
//!
//! The problem is that of `exact`: nine completions of a tabular policy.

use std::cell::Cell;
use std::path::Path;

use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_dpo::loss::online::{exploration, nash_md};
use rlhf_dpo::loss::{PairLogprobs, PairValues, PreferenceLoss};
use rlhf_dpo::online::{
    Candidates, OnlineConfig, OnlineMethod, OnlinePrompt, Players, Preference, ScorerError, train,
};
use rlhf_kernels::optim::AdamWConfig;
use rlhf_model::{CausalLm as _, Config, DecoderWeights, Transformer};
use rlhf_train::{LrSchedule, Session, SessionConfig, Signal, Stepper, StepperConfig, StopFlag};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::exact::{BETA, REFERENCE, completions, preference, reference, total_variation};

/// Where the policy is while gradients are taken.
const POLICY: [f64; 12] = [
    -0.1, 0.4, 0.2, 0.6, -0.3, 0.0, 0.1, 0.5, -0.7, 0.3, 0.3, -0.2,
];

fn host(t: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(t).unwrap()
}

/// log π of the nine completions, in plain numbers.
fn plain(logits: &[f64]) -> Vec<f64> {
    host(&completions(&Tensor::from_slice(logits)))
}

/// The gradient of a plain function by central differences.
fn differences(f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let h = 1e-5;
    (0..POLICY.len())
        .map(|i| {
            let at = |by: f64| {
                let mut x = POLICY;
                x[i] += by;
                f(&x)
            };
            (at(h) - at(-h)) / (2.0 * h)
        })
        .collect()
}

fn gradient(loss: impl Fn(&Tensor) -> Tensor) -> Vec<f64> {
    let leaf = Tensor::from_slice(&POLICY).set_requires_grad(true);
    loss(&completions(&leaf)).backward();
    host(&leaf.grad())
}

fn near(a: &[f64], b: &[f64]) {
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() < 1e-9, "{a} against {b}");
    }
    assert!(a.iter().any(|x| x.abs() > 1e-3));
}

fn log_sigmoid(x: f64) -> f64 {
    -(-x).exp().ln_1p()
}

#[test]
fn xpos_expected_gradient_is_that_of_its_objective() {
    let (alpha, base) = (0.3, host(&reference()));
    let drawn: Vec<f64> = plain(&POLICY).iter().map(|x| x.exp()).collect();
    // Written out: pairs of π and π₀, labels by Bradley–Terry, and the bonus under π₀.
    let objective = |logits: &[f64]| {
        let own = plain(logits);
        let delta = |i: usize| own[i] - base[i];
        let mut sum = 0.0;
        for (i, of_policy) in drawn.iter().enumerate() {
            for (j, of_base) in base.iter().enumerate() {
                let z = BETA * (delta(i) - delta(j));
                let p = preference(i, j);
                let pair = -p * log_sigmoid(z) - (1.0 - p) * log_sigmoid(-z);
                sum += of_policy * of_base.exp() * (pair + alpha * own[j]);
            }
        }
        sum
    };
    let loss = PreferenceLoss::Sigmoid {
        beta: BETA,
        label_smoothing: 0.0,
    };
    let expected = |own: &Tensor| {
        let base_t = reference();
        let mut sum = Tensor::zeros([], (Kind::Double, Device::Cpu));
        for (i, of_policy) in drawn.iter().enumerate() {
            for (j, of_base) in base.iter().enumerate() {
                let weight = of_policy * of_base.exp();
                let one = |t: &Tensor, k: usize| t.narrow(0, k as i64, 1);
                for (c, r, p) in [(i, j, preference(i, j)), (j, i, preference(j, i))] {
                    let of = |t: &Tensor| PairValues::new(&one(t, c), &one(t, r)).unwrap();
                    let pairs = PairLogprobs::new(&of(own), &of(&base_t));
                    sum += loss.compute(&pairs.into()).unwrap().loss.sum * (weight * p);
                }
                sum += exploration(&one(own, j), alpha).unwrap().sum * weight;
            }
        }
        sum
    };
    near(&gradient(expected), &differences(objective));
    // The bonus by itself is −α KL(π₀‖π), up to a constant.
    let bonus = |own: &Tensor| (own * reference().exp()).sum(Kind::Double) * alpha;
    let kl = |logits: &[f64]| {
        let own = plain(logits);
        -alpha
            * (0..9)
                .map(|j| base[j].exp() * (base[j] - own[j]))
                .sum::<f64>()
    };
    near(&gradient(bonus), &differences(kl));
}

/// A preference that is no order: each beats the next four of a circle, the first ones more surely.
fn circular(i: usize, j: usize) -> f64 {
    match (j + 9 - i) % 9 {
        0 => 0.5,
        1..=4 => 0.98 - 0.04 * i as f64 - 0.005 * j as f64,
        _ => 1.0 - circular(j, i),
    }
}

/// π^(1−share) π₀^share, normalised.
fn mixture(own: &[f64], share: f64) -> Vec<f64> {
    let base = host(&reference());
    let log: Vec<f64> = (0..9)
        .map(|i| (1.0 - share) * own[i] + share * base[i])
        .collect();
    let total: f64 = log.iter().map(|x| x.exp()).sum();
    log.iter().map(|x| x.exp() / total).collect()
}

/// Nash-MD's loss in expectation over the policy's and the opponent's completions.
fn expected_nash(own: &Tensor, opponent: &[f64], tau: f64) -> Tensor {
    let (base, drawn) = (reference(), own.detach().exp());
    let mut sum = Tensor::zeros([], (Kind::Double, Device::Cpu));
    for (j, q) in opponent.iter().enumerate() {
        let preferred: Vec<f64> = (0..9).map(|i| circular(i, j)).collect();
        let preferred = Tensor::from_slice(&preferred);
        for i in 0..9 {
            let one = |t: &Tensor| t.narrow(0, i, 1);
            let loss = nash_md(&one(own), &one(&base), &one(&preferred), tau).unwrap();
            sum += loss.sum * one(&drawn).squeeze_dim(0) * *q;
        }
    }
    sum
}

#[test]
fn nash_mds_expected_gradient_is_that_of_the_regularised_game() {
    let (tau, base) = (0.2, host(&reference()));
    let opponent = mixture(&plain(&POLICY), 0.4);
    let objective = |logits: &[f64]| {
        let own = plain(logits);
        let mut sum = 0.0;
        for i in 0..9 {
            let wins: f64 = (0..9).map(|j| opponent[j] * circular(i, j)).sum();
            sum += own[i].exp() * (-wins + tau * (own[i] - base[i]));
        }
        sum
    };
    near(
        &gradient(|own| expected_nash(own, &opponent, tau)),
        &differences(objective),
    );
}

#[test]
fn nash_md_comes_to_rest_at_the_equilibrium() {
    // Where nobody gains by moving: π ∝ π₀ exp(P(·≻π′)/τ), π′ the mixture (share 0: the Nash equilibrium of the
    // regularised game, Munos et al. 2023).
    for share in [0.0, 0.4] {
        let tau = 0.2;
        let mut logits = Tensor::from_slice(&REFERENCE);
        for _ in 0..1500 {
            let leaf = logits.set_requires_grad(true);
            let own = completions(&leaf);
            let opponent = mixture(&host(&own.detach()), share);
            // The loss is linear in the preference: its mean over the opponent serves.
            let wins: Vec<f64> = (0..9)
                .map(|i| (0..9).map(|j| opponent[j] * circular(i, j)).sum())
                .collect();
            let (base, drawn, wins) = (reference(), own.detach().exp(), Tensor::from_slice(&wins));
            let mut sum = Tensor::zeros([], (Kind::Double, Device::Cpu));
            for i in 0..9 {
                let one = |t: &Tensor| t.narrow(0, i, 1);
                let loss = nash_md(&one(&own), &one(&base), &one(&wins), tau).unwrap();
                sum += loss.sum * one(&drawn).squeeze_dim(0);
            }
            sum.backward();
            logits = leaf.detach() - leaf.grad() * 4.0;
        }
        let own = completions(&logits);
        let opponent = mixture(&host(&own), share);
        let tilt: Vec<f64> = (0..9)
            .map(|i| (0..9).map(|j| opponent[j] * circular(i, j)).sum::<f64>() / tau)
            .collect();
        let best = (reference() + Tensor::from_slice(&tilt)).log_softmax(0, Kind::Double);
        let apart = total_variation(&own, &best);
        assert!(apart < 1e-6, "share {share}: {apart}");
        assert!(total_variation(&reference(), &best) > 0.05);
    }
}

fn model() -> Transformer {
    let mut config = Config::new(12, 16, 1, 2, 32);
    config.initializer_range = 0.2;
    Transformer::init(config, 1, Device::Cpu, Kind::Double).unwrap()
}

/// More 3s, fewer 5s.
fn score(ids: &[u32]) -> f64 {
    let count = |id: u32| ids.iter().filter(|i| **i == id).count() as f64;
    count(3) - count(5)
}

fn scorer(candidates: &[Candidates<'_>]) -> Result<Vec<Vec<f64>>, ScorerError> {
    let of = |c: &Candidates<'_>| c.group.completions.iter().map(|c| score(&c.ids)).collect();
    Ok(candidates.iter().map(of).collect())
}

struct Run {
    method: OnlineMethod,
    steps: u64,
    micro_tokens: usize,
    refresh_every: Option<u64>,
    replay_per_step: usize,
}

fn fixed_pairs() -> Vec<PromptGroup> {
    (0..5)
        .map(|i| PromptGroup {
            row: i,
            prompt: vec![1, 6],
            completions: [3, 5]
                .map(|id| Completion::whole(vec![id, 7], Finish::Stop))
                .into(),
        })
        .collect()
}

impl Run {
    fn new(method: OnlineMethod) -> Self {
        Self {
            method,
            steps: 24,
            micro_tokens: 1000,
            refresh_every: None,
            replay_per_step: 0,
        }
    }

    /// Trains, stopped after so many steps of each part.
    fn in_parts(&self, dir: &Path, parts: &[usize]) -> Vec<Value> {
        for &steps in parts {
            self.part(dir, Some(steps));
        }
        self.go(dir)
    }

    fn go(&self, dir: &Path) -> Vec<Value> {
        self.part(dir, None)
    }

    fn part(&self, dir: &Path, most: Option<usize>) -> Vec<Value> {
        let (stop, calls) = (StopFlag::default(), Cell::new(0));
        let scorer = |candidates: &[Candidates<'_>]| {
            calls.set(calls.get() + 1);
            if most == Some(calls.get()) {
                stop.raise(Signal::Interrupt);
            }
            scorer(candidates)
        };
        let model = model();
        let cfg = OnlineConfig {
            method: self.method,
            seed: 5,
            steps: self.steps,
            prompts_per_step: 6,
            samples: 3,
            temperature: 1.0,
            max_new_tokens: 4,
            max_sequences: 64,
            weights: DecoderWeights::AsLoaded,
            micro_tokens: self.micro_tokens,
            refresh_every: self.refresh_every,
            replay_per_step: self.replay_per_step,
        };
        let config = StepperConfig {
            lr: 1e-2,
            schedule: LrSchedule::Constant {},
            warmup_steps: 0,
            total_steps: self.steps,
            max_grad_norm: None,
            max_bad_steps: 1,
        };
        let mut stepper = Stepper::new(model.parameters(), AdamWConfig::default(), config);
        let mut session = Session::open(SessionConfig {
            dir: dir.to_owned(),
            stage: "t".into(),
            total_steps: self.steps,
            checkpoint_every: 1,
            keep: 1,
            stop: stop.clone(),
        })
        .unwrap();
        let prompts: Vec<OnlinePrompt> = (0..8)
            .map(|i| OnlinePrompt {
                row: i,
                ids: vec![1, 6 + i as u32 % 4],
            })
            .collect();
        let replay = fixed_pairs();
        let players = Players {
            policy: &model,
            reference: model.reference().unwrap(),
            prompts: &prompts,
            eos_ids: &[2],
            scorer: &scorer,
            replay: &replay,
            dir,
        };
        train(players, &cfg, &mut stepper, &mut session).unwrap();
        let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
        text.lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect()
    }
}

fn number(v: &Value, key: &str) -> f64 {
    v[format!("t/{key}")]
        .as_f64()
        .unwrap_or_else(|| panic!("no {key}: {v}"))
}

fn methods() -> [OnlineMethod; 3] {
    let loss = PreferenceLoss::Sigmoid {
        beta: 0.1,
        label_smoothing: 0.0,
    };
    [
        OnlineMethod::BestWorst { loss },
        OnlineMethod::Xpo { loss, alpha: 1e-3 },
        OnlineMethod::NashMd {
            tau: 0.01,
            mixture: 0.5,
            preference: Preference::BradleyTerry,
        },
    ]
}

#[test]
fn every_method_learns_to_score() {
    for method in methods() {
        let dir = tempfile::tempdir().unwrap();
        let log = Run::new(method).go(dir.path());
        let mean = |of: &[Value]| of.iter().map(|v| number(v, "reward")).sum::<f64>() / 4.0;
        let (first, last) = (mean(&log[..4]), mean(&log[20..]));
        assert!(last > first + 0.5, "{method:?}: {first} {last}");
        let e = number(&log[0], "log_ratio").abs();
        assert!(
            e < 1e-12,
            "{method:?}: the policy is still the reference, {e}"
        );
    }
}

#[test]
fn steps_do_not_depend_on_splits_and_resumes() {
    for method in methods() {
        let replay_per_step = if method.pair_loss().is_some() { 2 } else { 0 };
        let of = |micro_tokens, parts: &[usize]| {
            let dir = tempfile::tempdir().unwrap();
            let run = Run {
                steps: 8,
                micro_tokens,
                refresh_every: Some(3),
                replay_per_step,
                ..Run::new(method)
            };
            let log = run.in_parts(dir.path(), parts);
            assert!(!dir.path().join("reference-000003").exists());
            log
        };
        let whole = of(1000, &[]);
        assert_eq!(whole.len(), 8);
        // Stopped before, at and after a refresh.
        for other in [of(30, &[]), of(1000, &[2, 1, 1, 3])] {
            assert_eq!(whole.len(), other.len());
            for (a, b) in whole.iter().zip(&other) {
                for key in ["loss", "grad_norm", "reward", "log_ratio"] {
                    let apart = (number(a, key) - number(b, key)).abs();
                    assert!(apart < 1e-10, "{method:?} {key}: {a} {b}");
                }
            }
        }
        // A fresh reference is the policy, an older one is not.
        for (step, at) in whole.iter().enumerate() {
            let fresh = number(at, "log_ratio").abs() < 1e-12;
            assert_eq!(fresh, step % 3 == 0, "{method:?}: {at}");
        }
    }
}

#[test]
fn a_step_without_contrast_is_passed_over() {
    let mut dir = tempfile::tempdir().unwrap();
    let nothing = |candidates: &[Candidates<'_>]| -> Result<Vec<Vec<f64>>, ScorerError> {
        let of = |c: &Candidates<'_>| vec![1.0; c.group.completions.len()];
        Ok(candidates.iter().map(of).collect())
    };
    let [method, ..] = methods();
    let model = model();
    let prompts = [OnlinePrompt {
        row: 0,
        ids: vec![1, 6],
    }];
    let go = |dir: &Path, scorer: &rlhf_dpo::online::Scorer<'_>, samples: usize| {
        let cfg = OnlineConfig {
            method,
            seed: 5,
            steps: 2,
            prompts_per_step: 2,
            samples,
            temperature: 1.0,
            max_new_tokens: 4,
            max_sequences: 64,
            weights: DecoderWeights::AsLoaded,
            micro_tokens: 100,
            refresh_every: None,
            replay_per_step: 0,
        };
        let config = StepperConfig {
            lr: 1e-2,
            schedule: LrSchedule::Constant {},
            warmup_steps: 0,
            total_steps: 2,
            max_grad_norm: None,
            max_bad_steps: 1,
        };
        let mut stepper = Stepper::new(model.parameters(), AdamWConfig::default(), config);
        let mut session = Session::open(SessionConfig {
            dir: dir.to_owned(),
            stage: "t".into(),
            total_steps: 2,
            checkpoint_every: 10,
            keep: 1,
            stop: StopFlag::default(),
        })
        .unwrap();
        let players = Players {
            policy: &model,
            reference: model.reference().unwrap(),
            prompts: &prompts,
            eos_ids: &[2],
            scorer,
            replay: &[],
            dir,
        };
        train(players, &cfg, &mut stepper, &mut session).map(drop)
    };
    go(dir.path(), &nothing, 2).unwrap();
    let text = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!(number(&first, "no_contrast"), 1.0);
    assert!(first.get("t/loss").is_none());
    // What a scorer does wrong is named.
    dir = tempfile::tempdir().unwrap();
    let short = |_: &[Candidates<'_>]| -> Result<Vec<Vec<f64>>, ScorerError> { Ok(Vec::new()) };
    let e = go(dir.path(), &short, 2).unwrap_err().to_string();
    assert!(e.contains("every completion a score"), "{e}");
    let fails = |_: &[Candidates<'_>]| -> Result<Vec<Vec<f64>>, ScorerError> {
        Err("judge is away".into())
    };
    let e = go(dir.path(), &fails, 2).unwrap_err().to_string();
    assert!(e.contains("judge is away"), "{e}");
    let e = go(dir.path(), &nothing, 1).unwrap_err().to_string();
    assert!(e.contains("at least 1, and 2"), "{e}");
}
