//! A step does not depend on how it was split; tensors and states survive a file bit by bit.

use proptest::prelude::*;
use rlhf_kernels::LossSum;
use rlhf_kernels::optim::AdamWConfig;
use rlhf_train::{LrSchedule, StepReport, Stepper, StepperConfig, tensors};
use tch::{Kind, Tensor};

/// Parameters, gradients and reports of three steps of a two-layer model. `rows[i]` weighs
/// `weights[i]`; `cuts` are where micro-batches begin.
fn train(
    rows: &[[f64; 3]],
    weights: &[f64],
    cuts: &[bool],
    max_grad_norm: Option<f64>,
) -> (Vec<f64>, Vec<StepReport>) {
    let leaf = |values: &[f64], size: &[i64]| {
        Tensor::from_slice(values)
            .view(size)
            .set_requires_grad(true)
    };
    let first = leaf(
        &[
            0.3, -0.2, 0.5, 0.1, 0.4, -0.6, 0.2, -0.3, 0.7, -0.1, 0.6, -0.5,
        ],
        &[3, 4],
    );
    let second = leaf(&[0.5, -0.4, 0.3, 0.2], &[4]);
    let mut stepper = Stepper::new(
        vec![
            ("first".into(), first.shallow_clone()),
            ("second".into(), second.shallow_clone()),
        ],
        AdamWConfig {
            weight_decay: 0.1,
            eps: 1e-3,
            ..AdamWConfig::default()
        },
        StepperConfig {
            lr: 0.01,
            schedule: LrSchedule::Linear {},
            warmup_steps: 1,
            total_steps: 4,
            max_grad_norm,
            max_bad_steps: 1,
        },
    );
    let (mut reports, mut grads) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let mut from = 0;
        for to in 1..=rows.len() {
            if to < rows.len() && !cuts[to] {
                continue;
            }
            let x = Tensor::from_slice(&rows[from..to].concat()).view([-1, 3]);
            let w = Tensor::from_slice(&weights[from..to]);
            let error = x.matmul(&first).tanh().matmul(&second) - 0.7;
            stepper
                .accumulate(LossSum {
                    sum: (w * &error * &error).sum(None),
                    weight: weights[from..to].iter().sum(),
                })
                .unwrap();
            from = to;
        }
        let total: f64 = weights.iter().sum();
        for p in [&first, &second] {
            grads.extend(Vec::<f64>::try_from((p.grad() / total).flatten(0, -1)).unwrap());
        }
        reports.push(stepper.apply().unwrap());
    }
    for p in [&first, &second] {
        grads.extend(Vec::<f64>::try_from(p.flatten(0, -1).detach()).unwrap());
    }
    (grads, reports)
}

/// Rows, their weights, where to cut, where to clip.
type Step = (Vec<([f64; 3], f64, bool)>, Option<f64>);

fn step() -> impl Strategy<Value = Step> {
    let row = (prop::array::uniform3(-2.0..2.0), 0.5..4.0, any::<bool>());
    (
        prop::collection::vec(row, 1..12),
        prop::option::of(0.01..1.0),
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_step_does_not_depend_on_its_split((rows, clip) in step()) {
        let x: Vec<_> = rows.iter().map(|r| r.0).collect();
        let w: Vec<_> = rows.iter().map(|r| r.1).collect();
        let cuts: Vec<_> = rows.iter().map(|r| r.2).collect();
        let (whole, whole_reports) = train(&x, &w, &vec![false; x.len()], clip);
        let (split, split_reports) = train(&x, &w, &cuts, clip);
        for (a, b) in whole.iter().zip(&split) {
            prop_assert!((a - b).abs() < 1e-12, "{} {}", a, b);
        }
        for (a, b) in whole_reports.iter().zip(&split_reports) {
            prop_assert!((a.loss - b.loss).abs() < 1e-12 && (a.grad_norm - b.grad_norm).abs() < 1e-12);
            prop_assert!((a.weight - b.weight).abs() < 1e-12 && a.applied && b.applied);
        }
    }

    #[test]
    fn tensors_survive_a_file(
        bits in prop::collection::vec(any::<u64>(), 0..40),
        columns in 1usize..4,
    ) {
        let rows = (bits.len() / columns) as i64;
        let shape = [rows, columns as i64];
        let bytes: Vec<u8> = bits.iter().take(shape.iter().product::<i64>() as usize)
            .flat_map(|b| b.to_le_bytes()).collect();
        // Every bit pattern of every kind, NaNs with payload included.
        let kinds = [(Kind::Float, 2), (Kind::Double, 1), (Kind::BFloat16, 4), (Kind::Half, 4), (Kind::Int64, 1), (Kind::Uint8, 8)];
        let saved: Vec<(String, Tensor)> = kinds.iter().map(|&(kind, times)| {
            let t = Tensor::from_data_size(&bytes, &[rows * times, shape[1]], kind);
            (format!("{kind:?}"), t)
        }).chain([("scalar".into(), Tensor::from(1.5f64))]).collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        tensors::save(&path, &saved).unwrap();
        let loaded = tensors::load(&path).unwrap();
        prop_assert_eq!(loaded.len(), saved.len());
        for (name, t) in &saved {
            let raw = |t: &Tensor| {
                let mut out = vec![0; t.numel() * t.kind().elt_size_in_bytes()];
                t.copy_data_u8(&mut out, t.numel());
                out
            };
            prop_assert_eq!(loaded[name].kind(), t.kind());
            prop_assert_eq!(loaded[name].size(), t.size());
            prop_assert_eq!(raw(&loaded[name]), raw(t), "{}", name);
        }
    }
}

#[test]
fn tensors_are_written_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.safetensors");
    let good = vec![("a".to_owned(), Tensor::from_slice(&[1f32, 2.0]))];
    tensors::save(&path, &good).unwrap();
    let before = std::fs::read(&path).unwrap();
    // A transposed tensor is written in its own order.
    let t = Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0, 5.0, 6.0]).view([2, 3]);
    tensors::save(&dir.path().join("u"), &[("t".into(), t.transpose(0, 1))]).unwrap();
    let u = &tensors::load(&dir.path().join("u")).unwrap()["t"];
    assert_eq!(u.size(), [3, 2]);
    assert_eq!(
        Vec::<f32>::try_from(u.flatten(0, -1)).unwrap(),
        [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]
    );
    // What cannot be written leaves the old file, and nothing beside it.
    let bools = ("b".to_owned(), Tensor::from_slice(&[true]));
    let twice = ("a".to_owned(), Tensor::from_slice(&[1i64]));
    for (bad, word) in [(bools, "Bool"), (twice, "twice")] {
        let all = [good[0].0.clone(), bad.0.clone()];
        let list = vec![(all[0].clone(), good[0].1.shallow_clone()), bad];
        let e = tensors::save(&path, &list).unwrap_err().to_string();
        assert!(e.contains(word), "{e}");
    }
    assert_eq!(std::fs::read(&path).unwrap(), before);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    // Nor does a rename that fails leave its half behind: here the name is a folder's.
    std::fs::create_dir(dir.path().join("folder")).unwrap();
    let e = tensors::save(&dir.path().join("folder"), &good).unwrap_err();
    assert!(e.to_string().contains("folder"), "{e}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
    // A torn file is an error, not a tensor.
    std::fs::write(&path, &before[..before.len() - 3]).unwrap();
    assert!(tensors::load(&path).is_err());
}
