//! Supervised fine-tuning: its losses exactly, its noise, its weights, whole trainings split and resumed.

use std::path::Path;

use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_data::pack::PackedBatch;
use rlhf_kernels::optim::AdamWConfig;
use rlhf_kernels::{Offsets, Ragged};
use rlhf_model::{CausalLm as _, Config, DeviceBatch, Transformer, target_logprobs};
use rlhf_policy::loss::SftLoss;
use rlhf_policy::sft::{Demonstrations, HeldOut, SftConfig, evaluate, noise, train};
use rlhf_train::{LrSchedule, Session, SessionConfig, Stepper, StepperConfig, StopFlag};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::golden_io::{gradient, run as run_golden};

const HIDDEN: i64 = 16;

fn rows(n: u32) -> Vec<PromptGroup> {
    (0..n)
        .map(|i| PromptGroup {
            row: u64::from(i),
            prompt: vec![1, 2 + i % 5],
            completions: vec![Completion::whole(
                (0..2 + i % 3).map(|j| 7 + (i + j) % 9).collect(),
                Finish::Stop,
            )],
        })
        .collect()
}

fn model() -> Transformer {
    Transformer::init(
        Config::new(24, HIDDEN, 2, 2, 64),
        1,
        Device::Cpu,
        Kind::Double,
    )
    .unwrap()
}

struct Run<'a> {
    cfg: SftConfig,
    weights: Option<&'a [f64]>,
    test: bool,
    dir: &'a Path,
}

fn config() -> SftConfig {
    SftConfig {
        seed: 5,
        steps: 6,
        batch_size: 5,
        micro_tokens: 64,
        loss: SftLoss::Nll {},
        neftune_alpha: None,
    }
}

/// Trains and gives the model with the log, times left out.
fn run(data: &[PromptGroup], r: &Run<'_>) -> (Transformer, Vec<Value>) {
    let model = model();
    let config = StepperConfig {
        lr: 5e-3,
        schedule: LrSchedule::Constant {},
        warmup_steps: 0,
        total_steps: r.cfg.steps,
        max_grad_norm: Some(1.0),
        max_bad_steps: 1,
    };
    let mut stepper = Stepper::new(model.parameters(), AdamWConfig::default(), config);
    let mut session = Session::open(SessionConfig {
        dir: r.dir.to_owned(),
        stage: "sft".into(),
        total_steps: r.cfg.steps,
        checkpoint_every: 1,
        keep: 1,
        stop: StopFlag::default(),
    })
    .unwrap();
    let test = rows(40)[30..].to_vec();
    let demonstrations = Demonstrations {
        rows: data,
        weights: r.weights,
        held_out: r.test.then_some(HeldOut {
            rows: &test,
            every: 2,
        }),
    };
    train(&model, &demonstrations, &r.cfg, &mut stepper, &mut session).unwrap();
    session.finish().unwrap();
    let log = std::fs::read_to_string(r.dir.join("metrics.jsonl")).unwrap();
    let log = log.lines().map(|l| {
        let mut v: Value = serde_json::from_str(l).unwrap();
        v.as_object_mut().unwrap().remove("seconds");
        v
    });
    (model, log.collect())
}

fn largest_gap(a: &Transformer, b: &Transformer) -> f64 {
    a.parameters()
        .iter()
        .zip(b.parameters())
        .map(|((_, x), (_, y))| (x - y).abs().max().double_value(&[]))
        .fold(0.0, f64::max)
}

/// The gradient of −Σ sg(p) log p is that of −Σ p: here by differences of the latter.
#[test]
fn dft_descends_the_probability_itself() {
    let logits = [0.3, -1.2, 0.8, 0.1, 0.0, 2.0, -0.5, 0.4, 1.1];
    let chosen = Tensor::from_slice(&[2i64, 0, 1]).view([3, 1]);
    let picked = |x: &Tensor| {
        x.view([3, 3])
            .log_softmax(1, Kind::Double)
            .gather(1, &chosen, false)
            .view([3])
    };
    let leaf = Tensor::from_slice(&logits).set_requires_grad(true);
    let logprobs = Ragged::new(picked(&leaf), Offsets::new(vec![0, 2, 3]).unwrap()).unwrap();
    let out = SftLoss::Dft {}.compute(&logprobs, None).unwrap();
    assert_eq!(out.weight, 3.0);
    // Its value: −Σ p log p of the three tokens.
    let p = picked(&leaf).detach().exp();
    let by_hand = -(&p * p.log()).sum(Kind::Double).double_value(&[]);
    assert!((out.sum.double_value(&[]) - by_hand).abs() < 1e-14);
    out.sum.backward();
    let got = Vec::<f64>::try_from(leaf.grad()).unwrap();
    for (i, got) in got.into_iter().enumerate() {
        let at = |h: f64| {
            let mut moved = logits;
            moved[i] += h;
            -picked(&Tensor::from_slice(&moved))
                .exp()
                .sum(Kind::Double)
                .double_value(&[])
        };
        let expected = (at(1e-6) - at(-1e-6)) / 2e-6;
        assert!((got - expected).abs() < 1e-9, "{i}: {got} {expected}");
    }
}

#[test]
fn a_row_of_weight_two_counts_as_two_rows() {
    let of = |offsets: Vec<i64>, x: &[f64], weights: Option<&[f64]>| {
        let x = Ragged::new(Tensor::from_slice(x), Offsets::new(offsets).unwrap()).unwrap();
        let w = weights.map(Tensor::from_slice);
        let out = SftLoss::Dft {}.compute(&x, w.as_ref()).unwrap();
        (out.sum.double_value(&[]), out.weight)
    };
    let twice = of(vec![0, 2, 3, 4], &[-0.5, -1.0, -2.0, -2.0], None);
    let weighted = of(vec![0, 2, 3], &[-0.5, -1.0, -2.0], Some(&[1.0, 2.0]));
    assert!((twice.0 - weighted.0).abs() < 1e-14);
    assert_eq!((twice.1, weighted.1), (4.0, 4.0));
    let x = Ragged::new(
        Tensor::from_slice(&[-1.0, -2.0]),
        Offsets::new(vec![0, 1, 2]).unwrap(),
    )
    .unwrap();
    let e = SftLoss::Nll {}.compute(&x, Some(&Tensor::from_slice(&[1.0])));
    assert!(e.unwrap_err().to_string().contains("2 rows"));
}

#[test]
fn noise_is_uniform_within_its_bound_and_keyed_by_row_and_step() {
    let data = rows(12);
    let all = PackedBatch::pack(&data).unwrap();
    let whole = noise(&all, 5.0, 16, 9, 3);
    assert_eq!(whole.size(), [all.num_tokens() as i64, 16]);
    // ±α/√(L H) for each row of the data, and of variance a third of the bound's square.
    let (mut sum, mut squares, mut n) = (0.0, 0.0, 0.0);
    let mut at = 0i64;
    for g in &data {
        let bound = 5.0 / ((g.num_tokens() * 16) as f64).sqrt();
        let part = whole
            .narrow(0, at, g.num_tokens() as i64)
            .to_kind(Kind::Double)
            / bound;
        assert!(part.abs().max().double_value(&[]) <= 1.0 + 1e-6);
        sum += part.sum(Kind::Double).double_value(&[]);
        squares += (&part * &part).sum(Kind::Double).double_value(&[]);
        n += part.numel() as f64;
        at += g.num_tokens() as i64;
    }
    assert!((sum / n).abs() < 4.0 / (3.0 * n).sqrt(), "{}", sum / n);
    assert!((squares / n - 1.0 / 3.0).abs() < 0.05, "{}", squares / n);
    // A row alone has the noise that it has in a crowd; another step has other noise.
    let alone = noise(&PackedBatch::pack(&data[4..5]).unwrap(), 5.0, 16, 9, 3);
    let before: i64 = data[..4].iter().map(|g| g.num_tokens() as i64).sum();
    let length = data[4].num_tokens() as i64;
    assert_eq!(alone, whole.narrow(0, before, length));
    assert_ne!(whole, noise(&all, 5.0, 16, 9, 4));
    assert_ne!(whole, noise(&all, 5.0, 16, 10, 3));
}

#[test]
fn noise_of_the_wrong_shape_is_refused() {
    let packed = PackedBatch::pack(&rows(1)).unwrap();
    let mut batch = DeviceBatch::new(&packed, Device::Cpu).unwrap();
    batch.embedding_noise = Some(Tensor::zeros([1, HIDDEN], (Kind::Double, Device::Cpu)));
    let e = target_logprobs(&model(), &batch, 1.0, false).unwrap_err();
    assert!(e.to_string().contains("embedding noise"), "{e}");
}

/// With noise, weights and DFT, a step is the same in one micro-batch and in many.
#[test]
fn a_step_does_not_depend_on_its_split() {
    let data = rows(20);
    let weights: Vec<f64> = (0..20).map(|i| 0.5 + f64::from(i % 4)).collect();
    let with = |micro_tokens| {
        let dir = tempfile::tempdir().unwrap();
        let cfg = SftConfig {
            micro_tokens,
            loss: SftLoss::Dft {},
            neftune_alpha: Some(5.0),
            ..config()
        };
        run(
            &data,
            &Run {
                cfg,
                weights: Some(&weights),
                test: false,
                dir: dir.path(),
            },
        )
        .0
    };
    let gap = largest_gap(&with(64), &with(6));
    assert!(gap < 1e-10, "{gap}");
}

#[test]
fn a_resumed_training_goes_on_bit_by_bit() {
    let data = rows(20);
    let of = |parts: &[u64]| {
        let dir = tempfile::tempdir().unwrap();
        let mut last = None;
        for &steps in parts {
            let cfg = SftConfig {
                steps,
                neftune_alpha: Some(5.0),
                ..config()
            };
            last = Some(run(
                &data,
                &Run {
                    cfg,
                    weights: None,
                    test: false,
                    dir: dir.path(),
                },
            ));
        }
        last.unwrap()
    };
    let (whole, resumed) = (of(&[6]), of(&[2, 6]));
    assert_eq!(whole.1, resumed.1);
    assert_eq!(whole.1.len(), 6);
    assert_eq!(largest_gap(&whole.0, &resumed.0), 0.0);
}

#[test]
fn noise_helps_itself_to_training_only() {
    let data = rows(20);
    let dir = tempfile::tempdir().unwrap();
    let cfg = SftConfig {
        neftune_alpha: Some(10.0),
        ..config()
    };
    let (trained, log) = run(
        &data,
        &Run {
            cfg,
            weights: None,
            test: true,
            dir: dir.path(),
        },
    );
    // Looked at after steps 2, 4 and 6.
    let seen: Vec<bool> = log
        .iter()
        .map(|l| l.get("sft/test_loss").is_some())
        .collect();
    assert_eq!(seen, [false, true, false, true, false, true]);
    // What is logged is −Σ log p / M by the model's logits, without noise.
    let test = rows(40)[30..].to_vec();
    let packed = PackedBatch::pack(&test).unwrap();
    let batch = DeviceBatch::new(&packed, Device::Cpu).unwrap();
    let all = tch::no_grad(|| trained.logits(&batch).unwrap()).log_softmax(1, Kind::Double);
    let picked =
        all.index_select(0, &batch.target_rows)
            .gather(1, &batch.target_ids.view([-1, 1]), false);
    let by_hand = -picked.mean(Kind::Double).double_value(&[]);
    let logged = log[5]["sft/test_loss"].as_f64().unwrap();
    assert!((logged - by_hand).abs() < 1e-10, "{logged} {by_hand}");
    assert_eq!(evaluate(&trained, &test, 64).unwrap(), logged);
    // In training there is noise: without it the first loss is another.
    let plain = tempfile::tempdir().unwrap();
    let (_, without) = run(
        &data,
        &Run {
            cfg: config(),
            weights: None,
            test: true,
            dir: plain.path(),
        },
    );
    assert_ne!(log[0]["sft/loss"], without[0]["sft/loss"]);
    assert!(
        without[5]["sft/test_loss"].as_f64() < without[1]["sft/test_loss"].as_f64(),
        "nothing was learned"
    );
}

#[test]
fn weights_that_cannot_count_are_refused() {
    let data = rows(3);
    let model = model();
    let refuse = |weights: &[f64], cfg: &SftConfig| {
        let dir = tempfile::tempdir().unwrap();
        let config = StepperConfig {
            lr: 1e-3,
            schedule: LrSchedule::Constant {},
            warmup_steps: 0,
            total_steps: 1,
            max_grad_norm: None,
            max_bad_steps: 1,
        };
        let mut stepper = Stepper::new(model.parameters(), AdamWConfig::default(), config);
        let mut session = Session::open(SessionConfig {
            dir: dir.path().to_owned(),
            stage: "sft".into(),
            total_steps: 1,
            checkpoint_every: 1,
            keep: 1,
            stop: StopFlag::default(),
        })
        .unwrap();
        let demonstrations = Demonstrations {
            rows: &data,
            weights: Some(weights),
            held_out: None,
        };
        train(&model, &demonstrations, cfg, &mut stepper, &mut session)
            .unwrap_err()
            .to_string()
    };
    assert!(refuse(&[1.0, 1.0], &config()).contains("2 weights for 3 rows"));
    assert!(refuse(&[1.0, 0.0, 1.0], &config()).contains("row 1"));
    assert!(refuse(&[1.0, 1.0, f64::NAN], &config()).contains("row 2"));
    let cfg = SftConfig {
        neftune_alpha: Some(-1.0),
        ..config()
    };
    assert!(refuse(&[1.0; 3], &cfg).contains("neftune_alpha"));
}

/// TRL's `SFTTrainer.compute_loss`, both losses, with its own and with a given number of tokens.
#[test]
fn losses_are_those_of_trl() {
    let unknown = run_golden(&["c/sft_"], |case| {
        let loss = match case.text("loss_type") {
            Some("nll") => SftLoss::Nll {},
            Some("dft") => SftLoss::Dft {},
            _ => return false,
        };
        let leaf = case.input("policy_logps").set_requires_grad(true);
        let mask = case.mask("completion_mask").narrow(1, 1, leaf.size()[1]);
        let out = loss
            .compute(&Ragged::from_padded(&leaf, &mask).unwrap(), None)
            .unwrap();
        let mean = out.sum / case.number("num_items").unwrap_or(out.weight);
        case.check("loss", &mean);
        case.check("grad_policy_logps", &gradient(&mean, &leaf));
        true
    });
    assert!(unknown.is_empty());
}
