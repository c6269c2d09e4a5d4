//! DPO's optimum on a problem that can be enumerated.
//!
//! Vocabulary 3, horizon 2: nine completions of a tabular policy. Every pair of completions is
//! compared once, labelled by the Bradley–Terry probability σ(r_i − r_j), in expectation.
//! Rafailov et al. 2023, section 4: the minimum is π* ∝ π₀ exp(r/β).

use rlhf_dpo::loss::{PairLogprobs, PreferenceLoss};
use tch::{Kind, Tensor};

const BETA: f64 = 0.5;
const REWARDS: [f64; 9] = [0.4, -0.3, 0.9, 0.0, 0.6, -0.8, 0.2, -0.1, 0.5];
/// Logits of the first token, then of the second after each first.
const REFERENCE: [f64; 12] = [
    0.3, -0.2, 0.5, 0.1, 0.0, -0.6, 0.7, -0.4, 0.2, 0.0, 0.3, -0.5,
];

/// `[9]` log-probs of the completions.
fn completions(logits: &Tensor) -> Tensor {
    let tables = logits.view([4, 3]).log_softmax(1, Kind::Double);
    (tables.get(0).unsqueeze(1) + tables.narrow(0, 1, 3)).view([9])
}

/// (chosen, rejected) of every ordered pair and the probability of that label.
fn labelled_pairs() -> (Tensor, Tensor, Tensor) {
    let (mut chosen, mut rejected, mut weights) = (Vec::new(), Vec::new(), Vec::new());
    for (i, better) in REWARDS.iter().enumerate() {
        for (j, worse) in REWARDS.iter().enumerate().filter(|(j, _)| *j != i) {
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

/// Descends the expected loss until its gradient vanishes; gives log π.
fn descend(loss: PreferenceLoss) -> Tensor {
    let (chosen, rejected, weights) = labelled_pairs();
    let reference = completions(&Tensor::from_slice(&REFERENCE));
    let mut logits = Tensor::from_slice(&REFERENCE);
    let mut velocity = logits.zeros_like();
    for _ in 0..4000 {
        let leaf = logits.set_requires_grad(true);
        let log_pi = completions(&leaf);
        let pairs = PairLogprobs {
            chosen: log_pi.index_select(0, &chosen),
            rejected: log_pi.index_select(0, &rejected),
            ref_chosen: reference.index_select(0, &chosen),
            ref_rejected: reference.index_select(0, &rejected),
        };
        let expected = (loss.compute(&pairs).unwrap().losses * &weights).sum(Kind::Double);
        let gradient = Tensor::run_backward(&[expected], &[&leaf], false, false).remove(0);
        let still = gradient.abs().max().double_value(&[]) < 1e-11;
        velocity = velocity * 0.9 - gradient * 0.3;
        logits = leaf.detach() + &velocity;
        if still {
            return completions(&logits);
        }
    }
    panic!("the descent did not come to rest");
}

fn total_variation(log_p: &Tensor, log_q: &Tensor) -> f64 {
    (log_p.exp() - log_q.exp())
        .abs()
        .sum(Kind::Double)
        .double_value(&[])
        / 2.0
}

#[test]
fn descent_reaches_the_tilted_reference() {
    let reference = completions(&Tensor::from_slice(&REFERENCE));
    let optimum = (&reference + Tensor::from_slice(&REWARDS) / BETA).log_softmax(0, Kind::Double);
    assert!(
        total_variation(&reference, &optimum) > 0.2,
        "the optimum is where it began"
    );
    let reached = descend(PreferenceLoss::Sigmoid {
        beta: BETA,
        label_smoothing: 0.0,
    });
    let apart = total_variation(&reached, &optimum);
    assert!(apart < 1e-6, "{apart}");
}

/// cDPO's minimum over one pair is where σ(βh) = 1 − ε (Mitchell 2023).
#[test]
fn smoothing_stops_at_its_confidence() {
    let zero = || Tensor::from_slice(&[0.0]);
    let gradient_at = |h: f64, eps: f64| {
        let leaf = Tensor::from_slice(&[h]).set_requires_grad(true);
        let pairs = PairLogprobs {
            chosen: leaf.shallow_clone(),
            rejected: zero(),
            ref_chosen: zero(),
            ref_rejected: zero(),
        };
        let out = PreferenceLoss::Sigmoid {
            beta: BETA,
            label_smoothing: eps,
        }
        .compute(&pairs)
        .unwrap();
        Tensor::run_backward(&[out.loss.sum], &[leaf], false, false)
            .remove(0)
            .double_value(&[0])
    };
    for eps in [0.1f64, 0.3] {
        let h = ((1.0 - eps) / eps).ln() / BETA;
        assert!(gradient_at(h, eps).abs() < 1e-15);
        assert!(gradient_at(h - 0.1, eps) < -1e-4 && gradient_at(h + 0.1, eps) > 1e-4);
        assert!(gradient_at(h, 0.0) < -1e-2, "without smoothing it goes on");
    }
}
