//! Sums of whole completions under a reference.

use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_dpo::loss::PreferenceLoss;
use rlhf_dpo::train::{DpoConfig, pair_sums, reference_sums};
use rlhf_model::{Config, Transformer};
use tch::{Device, Kind};

fn config(steps: u64) -> DpoConfig {
    DpoConfig {
        loss: PreferenceLoss::Sigmoid {
            beta: 0.1,
            label_smoothing: 0.0,
        }
        .into(),
        seed: 3,
        steps,
        batch_size: 4,
        micro_tokens: 64,
    }
}

/// The sums do not depend on how many pairs are asked for, and those never met are not computed.
#[test]
fn only_what_is_met_is_computed() {
    let shape = Config::new(24, 16, 1, 2, 64);
    let model = Transformer::init(shape, 1, Device::Cpu, Kind::Double).unwrap();
    let data: Vec<PromptGroup> = (0..20u32)
        .map(|i| PromptGroup {
            row: i.into(),
            prompt: vec![1, 2 + i % 5],
            completions: vec![
                Completion::whole(vec![3 + i % 7, 4], Finish::Stop),
                Completion::whole(vec![5, i, 7], Finish::Stop),
            ],
        })
        .collect();
    let whole = pair_sums(&model, &data, 64).unwrap();
    let met = reference_sums(&model, &data, &config(3)).unwrap();
    let mut computed = 0;
    for (a, b) in whole.iter().zip(&met) {
        if b.0.is_nan() {
            assert!(b.1.is_nan());
        } else {
            computed += 1;
            assert!((a.0 - b.0).abs() < 1e-12 && (a.1 - b.1).abs() < 1e-12);
        }
    }
    assert_eq!(computed, 12);
    assert_eq!(reference_sums(&model, &data, &config(6)).unwrap(), whole);
}
