//! Whole trainings of a tiny model: every loss, held-out pairs, early stops, a resumed δ.

use std::path::Path;

use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_dpo::loss::{Divergence, PreferenceLoss, PreferenceMix, WeightedLoss};
use rlhf_dpo::train::{
    DpoConfig, HeldOut, PairData, evaluate_loss, pair_sums, reference_sums, train,
};
use rlhf_kernels::optim::AdamWConfig;
use rlhf_model::{CausalLm as _, Config, Transformer};
use rlhf_train::{LrSchedule, Session, SessionConfig, Stepper, StepperConfig, StopFlag};
use serde_json::Value;
use tch::{Device, Kind};

/// Completions that begin with 3 are preferred to those that begin with 5.
fn pairs(from: u32, n: u32) -> Vec<PromptGroup> {
    (from..from + n)
        .map(|i| PromptGroup {
            row: i.into(),
            prompt: vec![1, 2 + i % 5],
            completions: vec![
                Completion::whole(vec![3, 8 + i % 7], Finish::Stop),
                Completion::whole(vec![5, 8 + i % 11, 7], Finish::Stop),
            ],
        })
        .collect()
}

struct Run<'a> {
    loss: PreferenceMix,
    steps: u64,
    lr: f64,
    patience: Option<u64>,
    dir: &'a Path,
}

/// Trains and gives the model with the log.
fn run(r: &Run<'_>) -> (Transformer, Vec<Value>) {
    let shape = Config::new(24, 16, 1, 2, 64);
    let model = Transformer::init(shape, 1, Device::Cpu, Kind::Double).unwrap();
    let (data, test) = (pairs(0, 20), pairs(100, 12));
    let cfg = DpoConfig {
        loss: r.loss.clone(),
        seed: 3,
        steps: r.steps,
        batch_size: 4,
        micro_tokens: 16,
    };
    let reference = reference_sums(&model, &data, &cfg).unwrap();
    let test_reference = pair_sums(&model, &test, 64).unwrap();
    let held_out = HeldOut {
        data: PairData::new(&test, &test_reference),
        every: 2,
        patience: r.patience,
        samples: None,
    };
    let config = StepperConfig {
        lr: r.lr,
        schedule: LrSchedule::Constant {},
        warmup_steps: 0,
        total_steps: r.steps,
        max_grad_norm: None,
        max_bad_steps: 1,
    };
    let mut stepper = Stepper::new(model.parameters(), AdamWConfig::default(), config);
    let mut session = Session::open(SessionConfig {
        dir: r.dir.to_owned(),
        stage: "dpo".into(),
        total_steps: r.steps,
        checkpoint_every: 1,
        keep: 1,
        stop: StopFlag::default(),
    })
    .unwrap();
    train(
        &model,
        PairData::new(&data, &reference),
        &cfg,
        Some(&held_out),
        &mut stepper,
        &mut session,
    )
    .unwrap();
    session.finish().unwrap();
    let log = std::fs::read_to_string(r.dir.join("metrics.jsonl")).unwrap();
    (
        model,
        log.lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect(),
    )
}

fn number(v: &Value, key: &str) -> f64 {
    v[format!("dpo/{key}")]
        .as_f64()
        .unwrap_or_else(|| panic!("no {key}: {v}"))
}

#[test]
fn every_loss_learns_to_prefer() {
    for text in [
        r#"{"kind": "sigmoid", "beta": 0.5}"#,
        r#"{"kind": "sigmoid_per_token", "beta": 2.0}"#,
        r#"{"kind": "robust", "beta": 0.5, "label_smoothing": 0.1}"#,
        r#"{"kind": "dpo_positive", "beta": 0.5, "lambda": 5.0}"#,
        r#"{"kind": "cal_dpo", "beta": 0.5}"#,
        r#"{"kind": "hinge", "beta": 0.5}"#,
        r#"{"kind": "ipo", "beta": 0.2}"#,
        r#"{"kind": "ipo_per_token", "beta": 0.2}"#,
        r#"{"kind": "exo_pair", "beta": 0.5, "label_smoothing": 0.01}"#,
        r#"{"kind": "discopop", "beta": 0.5, "tau": 0.9}"#,
        r#"{"kind": "nca_pair", "beta": 0.5}"#,
        r#"{"kind": "bco_pair", "beta": 0.5}"#,
        r#"{"kind": "sppo_hard", "beta": 0.2}"#,
        r#"{"kind": "apo_zero", "beta": 0.5}"#,
        r#"{"kind": "apo_down", "beta": 0.5}"#,
        r#"{"kind": "aot", "beta": 0.5}"#,
        r#"{"kind": "aot_unpaired", "beta": 0.5}"#,
        r#"{"kind": "orpo", "lambda": 1.0}"#,
        r#"{"kind": "cpo", "beta": 0.5, "nll_coef": 1.0}"#,
        r#"{"kind": "simpo", "beta": 2.0, "gamma": 1.0}"#,
        r#"{"kind": "alphapo", "beta": 2.0, "gamma": 1.0, "alpha": 0.2}"#,
    ] {
        let loss: PreferenceLoss = serde_json::from_str(text).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (_, log) = run(&Run {
            loss: loss.into(),
            steps: 12,
            lr: 5e-3,
            patience: None,
            dir: dir.path(),
        });
        let (first, last) = (&log[1], &log[11]);
        assert!(
            number(last, "test_loss") < number(first, "test_loss"),
            "{text}: {first} {last}"
        );
        assert!(
            number(last, "test_margin") > number(first, "test_margin"),
            "{text}"
        );
        let error = number(last, "test_calibration_error");
        assert!((0.0..=1.0).contains(&error), "{text}");
        assert!(log[0].get("dpo/test_loss").is_none());
    }
}

#[test]
fn what_is_logged_is_what_the_mix_says_of_the_model() {
    let loss = PreferenceMix {
        terms: vec![
            WeightedLoss {
                weight: 0.8,
                loss: PreferenceLoss::Sigmoid {
                    beta: 0.3,
                    label_smoothing: 0.0,
                },
            },
            WeightedLoss {
                weight: 0.5,
                loss: PreferenceLoss::Sft,
            },
        ],
        divergence: Divergence::JensenShannon,
        reference_free: false,
    };
    let dir = tempfile::tempdir().unwrap();
    let (model, log) = run(&Run {
        loss,
        steps: 4,
        lr: 5e-3,
        patience: None,
        dir: dir.path(),
    });
    let test = pairs(100, 12);
    let start = Transformer::init(Config::new(24, 16, 1, 2, 64), 1, Device::Cpu, Kind::Double);
    let reference = pair_sums(&start.unwrap(), &test, 64).unwrap();
    let policy = pair_sums(&model, &test, 64).unwrap();
    // Written out: β(f′(π/π₀) of the two), and the mean negative log-prob of a chosen token.
    let log_sigmoid = |z: f64| -(1.0 + (-z).exp()).ln();
    let mut sum = 0.0;
    for ((p, r), group) in policy.iter().zip(&reference).zip(&test) {
        let f = |d: f64| 2f64.ln() + log_sigmoid(d);
        let margin = 0.3 * (f(p.0 - r.0) - f(p.1 - r.1));
        let n = group.completions[0].ids.len() as f64;
        sum += 0.8 * -log_sigmoid(margin) + 0.5 * -p.0 / n;
    }
    let logged = number(&log[3], "test_loss");
    let expected = sum / test.len() as f64;
    assert!(
        (logged - expected).abs() < 1e-12 * expected.abs(),
        "{logged} {expected}"
    );
}

#[test]
fn no_progress_ends_it() {
    let loss = PreferenceLoss::Ipo { beta: 0.2 };
    let dir = tempfile::tempdir().unwrap();
    let stop = Run {
        loss: loss.into(),
        steps: 20,
        lr: 1e-300,
        patience: Some(2),
        dir: dir.path(),
    };
    // Looks after steps 2 (the best), 4 and 6.
    assert_eq!(run(&stop).1.len(), 6);
    // Resumed, it stays ended.
    assert_eq!(run(&stop).1.len(), 6);
}

#[test]
fn a_running_delta_goes_through_checkpoints() {
    let of = |dir: &Path, steps: &[u64]| {
        let mut last = Vec::new();
        for &steps in steps {
            let loss = PreferenceLoss::BcoPair { beta: 0.5 };
            last = run(&Run {
                loss: loss.into(),
                steps,
                lr: 5e-3,
                patience: None,
                dir,
            })
            .1;
        }
        last.iter()
            .map(|v| (number(v, "loss"), number(v, "margin")))
            .collect::<Vec<_>>()
    };
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // The references of 3 and of 8 steps are batched differently.
    for (whole, resumed) in of(a.path(), &[8]).iter().zip(of(b.path(), &[3, 8])) {
        let apart = (whole.0 - resumed.0).abs() + (whole.1 - resumed.1).abs();
        assert!(apart < 1e-12, "{whole:?} {resumed:?}");
    }
    // δ is there: without it the loss of the second step would be another.
    let test = pairs(100, 12);
    let sums: Vec<(f64, f64)> = (0..12).map(|i| (-2.0 - f64::from(i), -4.0)).collect();
    let zero = vec![(-4.0, -4.0); 12];
    let loss = PreferenceMix::from(PreferenceLoss::BcoPair { beta: 0.5 });
    let at = |delta| {
        evaluate_loss(&loss, PairData::new(&test, &zero), &sums, delta)
            .unwrap()
            .loss
    };
    assert!((at(0.0) - at(1.0)).abs() > 1e-3);
}
