//! Recovery of the true rewards from all pairs in expectation.

use rlhf_reward::bradley_terry::{self, BradleyTerry};
use tch::{Kind, Tensor};

const TRUE: [f64; 6] = [0.0, 1.3, -0.8, 2.1, 0.4, -1.7];

/// Every ordered pair at the probability σ(r_i − r_j) that i is preferred.
fn labelled_pairs() -> (Tensor, Tensor, Tensor) {
    let (mut chosen, mut rejected, mut weights) = (Vec::new(), Vec::new(), Vec::new());
    for (i, better) in TRUE.iter().enumerate() {
        for (j, worse) in TRUE.iter().enumerate().filter(|(j, _)| *j != i) {
            chosen.push(i as i64);
            rejected.push(j as i64);
            weights.push(1.0 / (1.0 + (worse - better).exp()));
        }
    }
    (
        Tensor::from_slice(&chosen),
        Tensor::from_slice(&rejected),
        Tensor::from_slice(&weights),
    )
}

fn descend(centering: f64) -> Vec<f64> {
    let (chosen, rejected, weights) = labelled_pairs();
    let settings = BradleyTerry {
        weights: Some(&weights),
        centering,
        ..BradleyTerry::default()
    };
    let mut scores = Tensor::from_slice(&[5.0, 0.0, 0.0, 0.0, 0.0, 1.0]);
    for _ in 0..3000 {
        let leaf = scores.set_requires_grad(true);
        let loss = bradley_terry::loss_of_pairs(&leaf, &chosen, &rejected, &settings).unwrap();
        let gradient =
            Tensor::run_backward(&[loss.sum / loss.weight], &[&leaf], false, false).remove(0);
        scores = leaf.detach() - &gradient * 3.0;
        if gradient.abs().max().double_value(&[]) < 1e-12 {
            return Vec::<f64>::try_from(&scores).unwrap();
        }
    }
    panic!("the descent did not come to rest");
}

#[test]
fn all_pairs_recover_the_rewards_up_to_a_constant() {
    let scores = descend(0.0);
    let shift = scores[0] - TRUE[0];
    assert!(
        shift.abs() > 0.1,
        "the constant is free, and the start is off centre"
    );
    for (got, expected) in scores.iter().zip(TRUE) {
        assert!((got - expected - shift).abs() < 1e-6, "{scores:?}");
    }
}

#[test]
fn centring_pins_the_mean() {
    let scores = Tensor::from_slice(&descend(0.01));
    assert!(scores.mean(Kind::Double).double_value(&[]).abs() < 1e-6);
}
