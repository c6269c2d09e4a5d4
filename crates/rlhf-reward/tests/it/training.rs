//! Training: every objective learns, whatever the split; bad rows are refused by number.

use std::collections::BTreeMap;
use std::path::Path;

use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_data::record::Grade;
use rlhf_kernels::optim::AdamWConfig;
use rlhf_reward::Error;
use rlhf_reward::difference::DifferenceLoss;
use rlhf_reward::labels::{Label, Labelled};
use rlhf_reward::model::{Combine, RewardModel, Spec};
use rlhf_reward::objective::{Mix, Objective, Said, StepClasses};
use rlhf_reward::pairs::Ties;
use rlhf_reward::process::{Aggregate, Neutral};
use rlhf_reward::train::{self, Bootstrap, HeldOut, RewardConfig};
use rlhf_train::{LrSchedule, Session, SessionConfig, Stepper, StepperConfig, StopFlag};
use tch::{Kind, Tensor};

use crate::models::net;

/// What is good about a completion here: how many of its tokens are 1. The others are noise above 9.
fn completion(row: u64, salt: u64, good: usize, length: usize) -> Completion {
    let noise = |i: usize| 10 + ((row * 7 + salt * 13 + i as u64 * 5) % 29) as u32;
    let ids = (0..length)
        .map(|i| if i < good { 1 } else { noise(i) })
        .collect();
    Completion::whole(ids, Finish::Stop)
}

fn row(row: u64, goods: &[usize], label: Label) -> Labelled {
    let group = PromptGroup {
        row,
        prompt: vec![2, 3, 4 + row as u32 % 5],
        completions: (0u64..)
            .zip(goods)
            .map(|(i, g)| completion(row, i, *g, 6))
            .collect(),
    };
    Labelled::new(group, label)
}

fn bt() -> Objective {
    Objective::BradleyTerry {
        centering: 0.01,
        label_smoothing: 0.0,
        margins: false,
        ties: Ties::Half,
    }
}

fn regression(mix: Mix) -> Objective {
    Objective::Regression {
        attributes: vec!["good".into(), "bad".into()],
        weights: None,
        huber: None,
        mix,
    }
}

fn pair(i: u64) -> Labelled {
    let (c, r) = [(4, 0), (3, 1), (5, 2), (2, 0)][i as usize % 4];
    let margin = Some((c - r) as f64);
    let label = Label::Pair {
        margin,
        preference: 1.0,
    };
    row(i, &[c, r], label)
}

fn ranking(i: u64) -> Labelled {
    let goods = [[4, 2, 0], [1, 5, 3]][i as usize % 2];
    let scores = Some(goods.iter().map(|g| *g as f64).collect());
    row(i, &goods, Label::Ranking { scores })
}

fn rated(i: u64) -> Labelled {
    let good = i as usize % 5;
    let mut ratings = BTreeMap::from([("good".to_owned(), good as f64)]);
    // The other rating is there in every second row only.
    if i.is_multiple_of(2) {
        ratings.insert("bad".into(), -2.0 * good as f64);
    }
    row(i, &[good], Label::Ratings(ratings))
}

fn outcome(i: u64) -> Labelled {
    let good = [0, 5][i as usize % 2];
    row(i, &[good], Label::Outcome(f64::from(u8::from(good > 2))))
}

/// Three steps of two tokens, each right when its first token is 1, neutral when it is 5.
fn solution(i: u64) -> Labelled {
    let firsts = [[1, 5, 9], [9, 1, 1], [5, 9, 1]][i as usize % 3];
    let ids = firsts
        .iter()
        .flat_map(|f| [*f, 10 + (i % 20) as u32])
        .collect();
    let grade = |f: u32| Grade::Number(f64::from(2 - (f as i32 / 4)) - 1.0);
    let label = Label::Steps {
        ends: vec![1, 3, 5],
        grades: firsts.iter().map(|f| grade(*f)).collect(),
    };
    let group = PromptGroup {
        row: i,
        prompt: vec![2, 3],
        completions: vec![Completion::whole(ids, Finish::Cut)],
    };
    Labelled::new(group, label)
}

fn model(objective: &Objective, heads: usize, kind: Kind) -> RewardModel {
    let spec = Spec {
        readout: objective.readout(None),
        heads,
        combine: Combine::Mean,
        thresholds: objective.first_thresholds(),
    };
    RewardModel::new(vec![net(spec.outputs(), 3, kind)], &spec).unwrap()
}

fn config(objective: &Objective, steps: u64) -> RewardConfig {
    RewardConfig {
        objective: objective.clone(),
        seed: 5,
        steps,
        batch_size: 8,
        micro_tokens: 1000,
        bootstrap: Bootstrap::None,
        first_member: 0,
    }
}

fn stepper(model: &RewardModel, steps: u64) -> Stepper {
    let config = StepperConfig {
        lr: 1e-2,
        schedule: LrSchedule::Constant {},
        warmup_steps: 0,
        total_steps: steps,
        max_grad_norm: Some(1.0),
        max_bad_steps: 1,
    };
    Stepper::new(model.parameters().unwrap(), AdamWConfig::default(), config)
}

fn session(dir: &Path, steps: u64) -> Session {
    Session::open(SessionConfig {
        dir: dir.to_owned(),
        stage: "rm".into(),
        total_steps: steps,
        checkpoint_every: 1000,
        keep: 1,
        stop: StopFlag::default(),
    })
    .unwrap()
}

fn fit(
    model: &RewardModel,
    cfg: &RewardConfig,
    data: &[Labelled],
    test: Option<&HeldOut<'_>>,
) -> rlhf_reward::Result<BTreeMap<String, f64>> {
    let dir = tempfile::tempdir().unwrap();
    let mut session = session(dir.path(), cfg.steps);
    train::train(
        model,
        data,
        cfg,
        test,
        &mut stepper(model, cfg.steps),
        &mut session,
    )?;
    Ok(session.finish().unwrap().last)
}

#[test]
fn every_objective_learns() {
    let rows = |f: fn(u64) -> Labelled| -> Vec<Labelled> { (0..24).map(f).collect() };
    let process = |steps, grades: fn(Grade) -> Grade| {
        let mut data = rows(solution);
        for r in &mut data {
            if let Label::Steps { grades: own, .. } = &mut r.label {
                own.iter_mut().for_each(|g| *g = grades(*g));
            }
        }
        let objective = Objective::Process {
            steps,
            separator: "\n".into(),
            aggregate: Aggregate::Min,
        };
        (objective, data)
    };
    let flag = |g| Grade::Flag(g == Grade::Number(1.0));
    let difference = |form| (Objective::Difference { form }, rows(pair));
    let neutral = Neutral::Wrong;
    let cases: Vec<(Objective, Vec<Labelled>)> = vec![
        (bt(), rows(pair)),
        (bt(), rows(ranking)),
        (Objective::PlackettLuce {}, rows(ranking)),
        difference(DifferenceLoss::Squared {}),
        difference(DifferenceLoss::Soft { temperature: 1.0 }),
        (
            Objective::Difference {
                form: DifferenceLoss::Scaled {},
            },
            rows(ranking),
        ),
        (
            Objective::Likert {
                attribute: "good".into(),
                low: 0,
                high: 4,
            },
            rows(rated),
        ),
        (Objective::LikertPairs { steps: 4 }, rows(pair)),
        (
            regression(Mix::Given {
                weights: vec![1.0, -0.5],
            }),
            rows(rated),
        ),
        (
            Objective::Outcome {
                said: Said::PerToken,
            },
            rows(outcome),
        ),
        (Objective::Outcome { said: Said::Last }, rows(outcome)),
        (Objective::Outcome { said: Said::Mean }, rows(outcome)),
        process(StepClasses::Binary {}, flag),
        process(StepClasses::Two {}, flag),
        process(StepClasses::Three { neutral }, |g| g),
        (Objective::MeanVariancePairs {}, rows(pair)),
        (
            Objective::MeanVarianceRatings {
                attribute: "good".into(),
            },
            rows(rated),
        ),
    ];
    for (objective, data) in cases {
        let m = model(&objective, 2, Kind::Float);
        let before: BTreeMap<String, f64> = train::evaluate(&m, &objective, &data, 1000)
            .unwrap()
            .into_iter()
            .collect();
        let held_out = HeldOut {
            data: &data,
            every: 1000,
        };
        fit(&m, &config(&objective, 50), &data, Some(&held_out)).unwrap();
        let after: BTreeMap<String, f64> = train::evaluate(&m, &objective, &data, 1000)
            .unwrap()
            .into_iter()
            .collect();
        assert!(
            after["test_loss"] < before["test_loss"] - 0.2,
            "{objective:?}: {before:?} {after:?}"
        );
        for (name, x) in &after {
            if name.ends_with("accuracy") {
                // Thresholds learn at the rate of all else, and labels lie close: more than chance is enough.
                let least = if name.contains("label") { 0.4 } else { 0.8 };
                assert!(*x > least, "{objective:?}: {name} {x}");
            }
        }
    }
}

/// One step in one micro-batch and in many: the same weights after it, for heads with weights of their own.
#[test]
fn a_step_does_not_depend_on_its_split() {
    let rows = |f: fn(u64) -> Labelled| -> Vec<Labelled> { (0..8).map(f).collect() };
    for (objective, data) in [
        (bt(), rows(ranking)),
        (Objective::PlackettLuce {}, rows(ranking)),
        (
            regression(Mix::Given {
                weights: vec![1.0, 1.0],
            }),
            rows(rated),
        ),
        (Objective::LikertPairs { steps: 4 }, rows(pair)),
        (
            Objective::Outcome {
                said: Said::PerToken,
            },
            rows(outcome),
        ),
    ] {
        let after = |micro_tokens| {
            let m = model(&objective, 2, Kind::Double);
            let cfg = RewardConfig {
                micro_tokens,
                bootstrap: Bootstrap::Bayesian,
                ..config(&objective, 2)
            };
            fit(&m, &cfg, &data, None).unwrap();
            m.parameters().unwrap()
        };
        for ((name, a), (_, b)) in after(1000).iter().zip(&after(30)) {
            let gap = (a - b).abs().max().double_value(&[]);
            assert!(gap < 1e-7, "{objective:?} {name}: {gap}");
        }
    }
}

/// With the Bayesian bootstrap two heads that begin alike part; without it they stay alike.
#[test]
fn members_part_by_what_rows_count() {
    let data: Vec<Labelled> = (0..16).map(pair).collect();
    for (bootstrap, part) in [(Bootstrap::None, false), (Bootstrap::Bayesian, true)] {
        let m = model(&bt(), 2, Kind::Double);
        let parameters = m.parameters().unwrap();
        let head = &parameters.iter().find(|p| p.0 == "score.weight").unwrap().1;
        tch::no_grad(|| head.get(1).copy_(&head.get(0)));
        let cfg = RewardConfig {
            bootstrap,
            ..config(&bt(), 3)
        };
        fit(&m, &cfg, &data, None).unwrap();
        let gap = (head.get(0) - head.get(1)).abs().max().double_value(&[]);
        assert_eq!(gap > 1e-4, part, "{bootstrap:?} {gap}");
    }
}

#[test]
fn a_mix_is_learned_from_preferences() {
    // Outputs are attributes; the preferred completion has the higher first attribute less half the second.
    let objective = regression(Mix::Learned { ridge: 1e-3 });
    let m = model(&objective, 1, Kind::Double);
    let truth = [1.0, -0.5];
    let groups: Vec<PromptGroup> = (0..200).map(|i| crate::models::group(i, &[5, 7])).collect();
    let data: Vec<Labelled> = groups
        .into_iter()
        .map(|g| {
            let packed = rlhf_data::pack::PackedBatch::pack(std::slice::from_ref(&g)).unwrap();
            let batch = rlhf_model::DeviceBatch::new(&packed, tch::Device::Cpu).unwrap();
            let out = &m.outputs(&batch, &packed.last_rows()).unwrap()[0];
            let weights = Tensor::from_slice(&truth);
            let scores = Vec::<f64>::try_from(&out.detach().matmul(&weights)).unwrap();
            // Not certain labels but their probabilities: then the mix is found exactly.
            let preference = 1.0 / (1.0 + (scores[1] - scores[0]).exp());
            Labelled::new(
                g,
                Label::Pair {
                    margin: None,
                    preference,
                },
            )
        })
        .collect();
    let mix = train::learn_mix(&m, &data, 1e-9, 1000).unwrap();
    for (found, true_) in mix.iter().zip(truth) {
        assert!((found - true_).abs() < 1e-5, "{mix:?}");
    }
    let wrong = train::learn_mix(&m, &[rated(3)], 1.0, 1000).unwrap_err();
    assert!(wrong.to_string().contains("row 3"), "{wrong}");
}

/// Rows that no loss can learn from are refused before a step is taken, with their number and the reason.
#[test]
fn bad_rows_are_refused_by_number() {
    let likert = Objective::Likert {
        attribute: "good".into(),
        low: 1,
        high: 5,
    };
    let process = |steps| Objective::Process {
        steps,
        separator: "\n".into(),
        aggregate: Aggregate::Mean,
    };
    let with = |mut r: Labelled, label: Label| {
        r.label = label;
        r
    };
    let margin = |m: f64| Label::Pair {
        margin: Some(m),
        preference: 1.0,
    };
    let scores = |s: &[f64]| Label::Ranking {
        scores: Some(s.to_vec()),
    };
    let rating = |x: f64| Label::Ratings(BTreeMap::from([("good".to_owned(), x)]));
    let grades = |g: Grade| Label::Steps {
        ends: vec![1, 3, 5],
        grades: vec![Grade::Flag(true), g, Grade::Flag(true)],
    };
    let scaled = Objective::Difference {
        form: DifferenceLoss::Scaled {},
    };
    let likert_pairs = Objective::LikertPairs { steps: 3 };
    let alone = row(6, &[1], Label::Ranking { scores: None });
    let unsaid = Label::Pair {
        margin: None,
        preference: 1.0,
    };
    let unsure = Label::Pair {
        margin: None,
        preference: 1.5,
    };
    let mut heavy = pair(9);
    heavy.weight = f64::NAN;
    let cases: Vec<(Objective, Labelled, u64, &str)> = vec![
        (bt(), with(pair(4), margin(f64::NAN)), 4, "NaN"),
        (bt(), alone.clone(), 6, "a ranking of 1 completion"),
        (bt(), heavy, 9, "weight"),
        (bt(), with(pair(2), unsure), 2, "1.5"),
        (
            bt(),
            rated(3),
            3,
            "rated, the objective asks for preference or ranked",
        ),
        (
            Objective::PlackettLuce {},
            alone,
            6,
            "a ranking of 1 completion",
        ),
        (
            Objective::PlackettLuce {},
            with(ranking(2), scores(&[1.0, 1.0, 0.0])),
            2,
            "no ties",
        ),
        (
            bt(),
            with(ranking(2), scores(&[1.0, f64::INFINITY, 0.0])),
            2,
            "inf",
        ),
        (bt(), with(ranking(2), scores(&[1.0, 0.0])), 2, "do not fit"),
        (scaled.clone(), with(pair(3), margin(-1.0)), 3, "exchange"),
        (scaled, with(pair(3), unsaid), 3, "no margin"),
        (
            likert_pairs.clone(),
            with(pair(3), margin(4.0)),
            3,
            "from 0 (a tie) to 3",
        ),
        (
            likert_pairs,
            with(pair(3), margin(1.5)),
            3,
            "outside its scale",
        ),
        (
            likert.clone(),
            with(rated(1), rating(6.0)),
            1,
            "from 1 to 5",
        ),
        (
            likert.clone(),
            with(rated(1), rating(2.5)),
            1,
            "outside its scale",
        ),
        (likert, outcome(2), 2, "unpaired"),
        (
            Objective::Outcome { said: Said::Last },
            with(outcome(2), Label::Outcome(2.0)),
            2,
            "probability",
        ),
        (
            process(StepClasses::Binary {}),
            with(solution(5), grades(Grade::Number(-1.0))),
            5,
            "step 1",
        ),
        (
            process(StepClasses::Two {}),
            with(solution(5), grades(Grade::Number(0.5))),
            5,
            "step 1",
        ),
        (
            process(StepClasses::Three {
                neutral: Neutral::Right,
            }),
            with(solution(5), grades(Grade::Number(2.0))),
            5,
            "−1, 0 or 1",
        ),
    ];
    for (objective, bad, number, reason) in cases {
        let m = model(&bt(), 1, Kind::Float);
        let before = m.parameters().unwrap()[0].1.copy();
        let e = fit(&m, &config(&objective, 1), &[bad], None).unwrap_err();
        assert!(
            matches!(e, Error::Row { row, .. } if row == number),
            "{objective:?}: {e}"
        );
        assert!(
            e.to_string().contains(reason) && e.is_input(),
            "{objective:?}: {e}"
        );
        assert_eq!(m.parameters().unwrap()[0].1, before);
    }
}

#[test]
fn settings_out_of_range_are_refused() {
    for (bad, reason) in [
        (
            Objective::BradleyTerry {
                centering: -1.0,
                label_smoothing: 0.0,
                margins: false,
                ties: Ties::Half,
            },
            "centering",
        ),
        (
            Objective::Likert {
                attribute: "x".into(),
                low: 3,
                high: 3,
            },
            "no two places",
        ),
        (Objective::LikertPairs { steps: 0 }, "steps"),
        (regression(Mix::Given { weights: vec![1.0] }), "mix.weights"),
        (regression(Mix::Learned { ridge: 0.0 }), "ridge"),
    ] {
        let e = bad.check().unwrap_err().to_string();
        assert!(e.contains(reason), "{bad:?}: {e}");
    }
}
