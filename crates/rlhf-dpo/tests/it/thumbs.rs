//! Whole trainings of a tiny model on thumbs and rankings, and pairs with scores: KTO's reference point by
//! hand, splits, resumes, and rankings of two beside DPO.

use std::path::Path;

use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_data::order::endless;
use rlhf_data::pack::PackedBatch;
use rlhf_dpo::loss::plackett_luce::RankedLoss;
use rlhf_dpo::loss::unpaired::{ThumbWeights, UnpairedLoss};
use rlhf_dpo::loss::{PreferenceLoss, PreferenceMix};
use rlhf_dpo::train::rankings::{self, RankedConfig, RankedData};
use rlhf_dpo::train::thumbs::{self, ThumbConfig, ThumbData, ThumbSums};
use rlhf_dpo::train::{
    DpoConfig, HeldOut, PairData, completion_sums, met_sums, reference_sums, train,
};
use rlhf_kernels::optim::AdamWConfig;
use rlhf_model::{CausalLm as _, Config, DeviceBatch, Transformer, target_logprobs};
use rlhf_train::{LrSchedule, Session, SessionConfig, Stepper, StepperConfig, StopFlag};
use serde_json::Value;
use tch::{Device, Kind};

fn model() -> Transformer {
    Transformer::init(Config::new(24, 16, 1, 2, 64), 1, Device::Cpu, Kind::Double).unwrap()
}

fn tools(model: &Transformer, dir: &Path, steps: u64) -> (Stepper, Session) {
    let config = StepperConfig {
        lr: 5e-3,
        schedule: LrSchedule::Constant {},
        warmup_steps: 0,
        total_steps: steps,
        max_grad_norm: None,
        max_bad_steps: 1,
    };
    let session = SessionConfig {
        dir: dir.to_owned(),
        stage: "t".into(),
        total_steps: steps,
        checkpoint_every: 1,
        keep: 1,
        stop: StopFlag::default(),
    };
    (
        Stepper::new(model.parameters(), AdamWConfig::default(), config),
        Session::open(session).unwrap(),
    )
}

fn log(dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect()
}

fn number(v: &Value, key: &str) -> f64 {
    v[format!("t/{key}")]
        .as_f64()
        .unwrap_or_else(|| panic!("no {key}: {v}"))
}

/// Completions that begin with 3 are good, those that begin with 5 bad; two bad to one good.
fn rows(from: u32, n: u32) -> (Vec<PromptGroup>, Vec<bool>) {
    (from..from + n)
        .map(|i| {
            let good = i % 3 == 0;
            let ids = if good {
                vec![3, 8 + i % 7]
            } else {
                vec![5, 8 + i % 11, 7]
            };
            let group = PromptGroup {
                row: i.into(),
                prompt: vec![1, 2 + i % 5],
                completions: vec![Completion::whole(ids, Finish::Stop)],
            };
            (group, good)
        })
        .unzip()
}

fn kto(beta: f64) -> UnpairedLoss {
    let weights = ThumbWeights {
        desirable: 2.0,
        undesirable: 1.0,
    };
    UnpairedLoss::Kto { beta, weights }
}

struct Run {
    loss: UnpairedLoss,
    steps: u64,
    micro_tokens: usize,
}

impl Run {
    fn config(&self) -> ThumbConfig {
        ThumbConfig {
            loss: self.loss,
            seed: 3,
            steps: self.steps,
            batch_size: 6,
            micro_tokens: self.micro_tokens,
        }
    }

    /// Trains and gives the model with the log.
    fn go(&self, dir: &Path) -> (Transformer, Vec<Value>) {
        let (model, cfg) = (model(), self.config());
        let ((groups, desirable), (test, test_labels)) = (rows(0, 20), rows(100, 12));
        let reference = thumbs::reference_sums(&model, &groups, &cfg).unwrap();
        let test_reference = thumbs::held_out_sums(&model, &test, &cfg).unwrap();
        let held_out = HeldOut {
            data: ThumbData {
                groups: &test,
                desirable: &test_labels,
                reference: &test_reference,
            },
            every: 2,
            patience: None,
            samples: None,
        };
        let data = ThumbData {
            groups: &groups,
            desirable: &desirable,
            reference: &reference,
        };
        let (mut stepper, mut session) = tools(&model, dir, self.steps);
        let (s, j) = (&mut stepper, &mut session);
        thumbs::train(&model, data, &cfg, Some(&held_out), s, j).unwrap();
        session.finish().unwrap();
        let log = log(dir);
        (model, log)
    }
}

#[test]
fn every_loss_tells_good_from_bad() {
    let weights = r#""weights": {"desirable": 2.0, "undesirable": 1.0}"#;
    for text in [
        format!(r#"{{"kind": "kto", "beta": 0.5, {weights}}}"#),
        r#"{"kind": "bco", "beta": 0.5}"#.to_owned(),
        format!(r#"{{"kind": "apo_zero_unpaired", "beta": 0.5, {weights}}}"#),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let run = Run {
            loss: serde_json::from_str(&text).unwrap(),
            steps: 16,
            micro_tokens: 64,
        };
        let (_, log) = run.go(dir.path());
        let (first, last) = (&log[1], &log[15]);
        assert!(
            number(last, "test_loss") < number(first, "test_loss"),
            "{text}: {first} {last}"
        );
        assert!(number(last, "test_margin") > number(first, "test_margin"));
        assert_eq!(number(last, "test_auc"), 1.0, "{text}: {last}");
        let right = number(last, "test_accuracy");
        // Twelve rows, four of them good.
        let by_class = (4.0 * number(last, "test_accuracy_desirable")
            + 8.0 * number(last, "test_accuracy_undesirable"))
            / 12.0;
        assert!(
            (right - by_class).abs() < 1e-12 && right > 0.9,
            "{text}: {last}"
        );
        assert_eq!(number(last, "truncated"), 0.0);
    }
}

/// log π of the only completion of a group, computed alone.
fn alone(model: &Transformer, group: &PromptGroup) -> f64 {
    let _guard = tch::no_grad_guard();
    let packed = PackedBatch::pack(std::slice::from_ref(group)).unwrap();
    let batch = DeviceBatch::new(&packed, Device::Cpu).unwrap();
    let tokens = target_logprobs(model, &batch, 1.0, false).unwrap().logprobs;
    Vec::<f64>::try_from(tokens.values()).unwrap().iter().sum()
}

#[test]
fn ktos_reference_point_is_the_mean_of_the_steps_mismatched_pairs() {
    let beta = 0.5;
    let run = |steps, dir: &Path| {
        let run = Run {
            loss: kto(beta),
            steps,
            micro_tokens: 16,
        };
        run.go(dir)
    };
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (after_five, _) = run(5, a.path());
    let (_, log) = run(6, b.path());
    // The policy is still the reference.
    assert_eq!(number(&log[0], "baseline"), 0.0);
    // In the sixth step each prompt is given its successor's completion, the last the first's.
    let (groups, desirable) = rows(0, 20);
    let picks: Vec<usize> = (30..36).map(|i| endless(3, 20, i)).collect();
    let start = model();
    let mut sum = 0.0;
    for (k, &i) in picks.iter().enumerate() {
        let other = &groups[picks[(k + 1) % 6]];
        let group = PromptGroup {
            completions: other.completions.clone(),
            ..groups[i].clone()
        };
        sum += alone(&after_five, &group) - alone(&start, &group);
    }
    let z = (sum / 6.0).max(0.0);
    let logged = number(&log[5], "baseline");
    assert!((logged - beta * z).abs() < 1e-12, "{logged} {z}");
    // And the loss is the paper's with it: λ (1 − σ(±β(Δ − z))).
    let mut loss = 0.0;
    for &i in &picks {
        let delta = alone(&after_five, &groups[i]) - alone(&start, &groups[i]);
        let (lambda, sign) = if desirable[i] {
            (2.0, 1.0)
        } else {
            (1.0, -1.0)
        };
        loss += lambda * (1.0 - 1.0 / (1.0 + (-sign * beta * (delta - z)).exp()));
    }
    let logged = number(&log[5], "loss");
    assert!((logged - loss / 6.0).abs() < 1e-12, "{logged} {loss}");
}

#[test]
fn a_step_of_thumbs_does_not_depend_on_its_split_nor_on_a_resume() {
    let of = |micro_tokens, steps: &[u64]| {
        let dir = tempfile::tempdir().unwrap();
        let mut last = Vec::new();
        for &steps in steps {
            let run = Run {
                loss: kto(0.5),
                steps,
                micro_tokens,
            };
            last = run.go(dir.path()).1;
        }
        last
    };
    let whole = of(1000, &[6]);
    for other in [of(6, &[6]), of(1000, &[2, 6])] {
        assert_eq!(other.len(), whole.len());
        for (a, b) in whole.iter().zip(&other) {
            for key in ["loss", "grad_norm", "baseline", "accuracy", "length"] {
                let apart = (number(a, key) - number(b, key)).abs();
                assert!(apart < 1e-12, "{key}: {a} {b}");
            }
        }
    }
    assert!(whole.iter().any(|v| number(v, "baseline") > 0.0));
}

#[test]
fn what_is_missing_is_named() {
    let (model, dir) = (model(), tempfile::tempdir().unwrap());
    let (groups, desirable) = rows(0, 4);
    let cfg = |batch_size| ThumbConfig {
        loss: kto(0.5),
        seed: 3,
        steps: 1,
        batch_size,
        micro_tokens: 64,
    };
    let message = |batch_size, reference: &ThumbSums| {
        let (mut stepper, mut session) = tools(&model, dir.path(), 1);
        let data = ThumbData {
            groups: &groups,
            desirable: &desirable,
            reference,
        };
        thumbs::train(
            &model,
            data,
            &cfg(batch_size),
            None,
            &mut stepper,
            &mut session,
        )
        .unwrap_err()
        .to_string()
    };
    let own = vec![-1.0; 4];
    let sums = |mismatched| ThumbSums {
        own: own.clone(),
        mismatched,
    };
    assert!(message(2, &sums(Vec::new())).contains("mismatched"));
    assert!(message(1, &sums(vec![-1.0])).contains("at least 2"));
    assert!(message(2, &ThumbSums::default()).contains("0 sums"));
}

/// Rankings of `k` completions whose first tokens 3, 4, 5, … are worse and worse.
fn ranked(from: u32, n: u32, k: u32) -> Vec<PromptGroup> {
    (from..from + n)
        .map(|i| PromptGroup {
            row: i.into(),
            prompt: vec![1, 2 + i % 5],
            completions: (0..k)
                .map(|place| Completion::whole(vec![3 + place, 9 + i % 7, 7], Finish::Stop))
                .collect(),
        })
        .collect()
}

fn train_ranked(groups: &[PromptGroup], steps: u64, micro_tokens: usize) -> Vec<Value> {
    let (model, dir) = (model(), tempfile::tempdir().unwrap());
    let cfg = RankedConfig {
        loss: RankedLoss::PlackettLuce { beta: 0.5 },
        seed: 3,
        steps,
        batch_size: 4,
        micro_tokens,
    };
    let reference = met_sums(&model, groups, &cfg).unwrap();
    let test = ranked(200, 8, 4);
    let test_reference = completion_sums(&model, &test, 64).unwrap();
    let held_out = HeldOut {
        data: RankedData {
            groups: &test,
            reference: &test_reference,
        },
        every: 2,
        patience: None,
        samples: None,
    };
    let data = RankedData {
        groups,
        reference: &reference,
    };
    let (mut stepper, mut session) = tools(&model, dir.path(), steps);
    let (s, j) = (&mut stepper, &mut session);
    rankings::train(&model, data, &cfg, Some(&held_out), s, j).unwrap();
    log(dir.path())
}

#[test]
fn rankings_are_learned_and_split_in_any_way() {
    let groups = ranked(0, 20, 4);
    let log = train_ranked(&groups, 16, 100);
    let (first, last) = (&log[1], &log[15]);
    assert!(number(last, "test_loss") < number(first, "test_loss") - 0.1);
    assert!(number(last, "test_accuracy") > 0.9, "{last}");
    assert!(number(last, "test_best_first") > 0.8, "{last}");
    for (a, b) in log.iter().zip(train_ranked(&groups, 4, 14)) {
        let apart = (number(a, "loss") - number(&b, "loss")).abs();
        assert!(apart < 1e-12, "{a} {b}");
    }
}

fn train_pairs(
    loss: PreferenceLoss,
    groups: &[PromptGroup],
    scores: Option<&[(f64, f64)]>,
) -> Result<Vec<Value>, rlhf_dpo::Error> {
    let (model, dir) = (model(), tempfile::tempdir().unwrap());
    let cfg = DpoConfig {
        loss: PreferenceMix::from(loss),
        seed: 3,
        steps: 6,
        batch_size: 4,
        micro_tokens: 100,
    };
    let reference = reference_sums(&model, groups, &cfg)?;
    let data = PairData {
        scores,
        ..PairData::new(groups, &reference)
    };
    let (mut stepper, mut session) = tools(&model, dir.path(), 6);
    train(&model, data, &cfg, None, &mut stepper, &mut session)?;
    Ok(log(dir.path()))
}

#[test]
fn a_ranking_of_two_is_dpo() {
    let groups = ranked(0, 20, 2);
    let dpo = PreferenceLoss::Sigmoid {
        beta: 0.5,
        label_smoothing: 0.0,
    };
    let pairs = train_pairs(dpo, &groups, None).unwrap();
    for (a, b) in pairs.iter().zip(train_ranked(&groups, 6, 100)) {
        for key in ["loss", "grad_norm", "accuracy"] {
            let apart = (number(a, key) - number(&b, key)).abs();
            assert!(apart < 1e-10, "{key}: {a} {b}");
        }
    }
}

#[test]
fn scores_reach_the_losses_that_ask_for_them() {
    let groups = ranked(0, 20, 2);
    let scores: Vec<(f64, f64)> = (0..20).map(|i| (2.0 + f64::from(i % 4), 1.0)).collect();
    let first = |loss| {
        number(
            &train_pairs(loss, &groups, Some(&scores)).unwrap()[0],
            "loss",
        )
    };
    // The policy is the reference: h = 0, and the loss is that of the scores alone.
    let gaps: Vec<f64> = (0..4).map(|i| scores[endless(3, 20, i)].0 - 1.0).collect();
    let mean = |f: &dyn Fn(f64) -> f64| gaps.iter().map(|g| f(*g)).sum::<f64>() / 4.0;
    let rebel = first(PreferenceLoss::Rebel { eta: 2.0 });
    assert!((rebel - mean(&|g| g * g)).abs() < 1e-12, "{rebel}");
    let odpo = first(PreferenceLoss::Odpo {
        beta: 0.5,
        alpha: 1.0,
    });
    // −ℓ(−log g) = log(1 + g).
    assert!((odpo - mean(&|g| (1.0 + g).ln())).abs() < 1e-12, "{odpo}");
    let none = train_pairs(PreferenceLoss::Rebel { eta: 2.0 }, &groups, None).unwrap_err();
    assert!(none.to_string().contains("scores"), "{none}");
}
