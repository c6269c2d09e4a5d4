//! Optima on a problem that can be enumerated.
//!
//! Vocabulary 3, horizon 2: nine completions of a tabular policy, labelled by the Bradley–Terry probability
//! σ(r_i − r_j) in expectation. Newton's method descends each loss until its gradient vanishes, and
//! the policy it comes to rest at is compared with what the loss's paper says, computed here from rewards and
//! reference alone.

use rlhf_dpo::loss::plackett_luce::plackett_luce;
use rlhf_dpo::loss::unpaired::{ThumbWeights, UnpairedLogprobs, UnpairedLoss};
use rlhf_dpo::loss::{Divergence, PairLogprobs, PairValues, Pairs, PreferenceLoss, PreferenceMix};
use rlhf_kernels::{Offsets, Ragged};
use tch::{Device, Kind, Tensor};

use crate::device::{device, from_slice};

pub(super) const BETA: f64 = 0.5;
const REWARDS: [f64; 9] = [0.4, -0.3, 0.9, 0.0, 0.6, -0.8, 0.2, -0.1, 0.5];
/// Logits of the first token, then of the second after each first.
pub(super) const REFERENCE: [f64; 12] = [
    0.3, -0.2, 0.5, 0.1, 0.0, -0.6, 0.7, -0.4, 0.2, 0.0, 0.3, -0.5,
];

/// `[9]` log-probs of the completions.
pub(super) fn completions(logits: &Tensor) -> Tensor {
    let tables = logits.view([4, 3]).log_softmax(1, Kind::Double);
    (tables.get(0).unsqueeze(1) + tables.narrow(0, 1, 3)).view([9])
}

pub(super) fn reference() -> Tensor {
    completions(&from_slice(&REFERENCE))
}

pub(super) fn preference(i: usize, j: usize) -> f64 {
    1.0 / (1.0 + (REWARDS[j] - REWARDS[i]).exp())
}

/// π₀ e^x, normalised: what most papers' optima are.
fn tilted(x: &[f64; 9]) -> Tensor {
    (reference() + from_slice(x)).log_softmax(0, Kind::Double)
}

/// A labelled comparison: chosen, rejected, how often.
type Label = (usize, usize, f64);

/// Every ordered pair by the probability of that label.
fn all_pairs() -> Vec<Label> {
    let ordered = (0..9).flat_map(|i| (0..9).map(move |j| (i, j)));
    ordered
        .filter(|(i, j)| i != j)
        .map(|(i, j)| (i, j, preference(i, j)))
        .collect()
}

/// The expectation of a loss over labels.
fn expected(mix: &PreferenceMix, labels: &[Label], log_pi: &Tensor) -> Tensor {
    let index = |pick: fn(&Label) -> usize| {
        from_slice(&labels.iter().map(|l| pick(l) as i64).collect::<Vec<_>>())
    };
    let (chosen, rejected) = (index(|l| l.0), index(|l| l.1));
    let of = |t: &Tensor| {
        PairValues::new(&t.index_select(0, &chosen), &t.index_select(0, &rejected)).unwrap()
    };
    let pairs = Pairs {
        scores: Some(of(&from_slice(&REWARDS))),
        ..PairLogprobs::new(&of(log_pi), &of(&reference())).into()
    };
    let weights: Vec<f64> = labels.iter().map(|l| l.2).collect();
    (mix.compute(&pairs).unwrap().losses * from_slice(&weights)).sum(Kind::Double)
}

/// Newton's method, damped until every step descends, from the reference to where the gradient vanishes; gives log π.
fn descend(loss: impl Fn(&Tensor) -> Tensor) -> Tensor {
    let mut logits = from_slice(&REFERENCE);
    let n = REFERENCE.len() as i64;
    let mut damping = 1e-2;
    // A GPU adds in another order, and near the end a step up and one down look alike.
    let still = if device() == Device::Cpu { 1e-11 } else { 1e-9 };
    for _ in 0..500 {
        let leaf = logits.set_requires_grad(true);
        let value = loss(&completions(&leaf));
        let gradient = Tensor::run_backward(&[&value], &[&leaf], true, true).remove(0);
        logits = leaf.detach();
        if gradient.abs().max().double_value(&[]) < still {
            return completions(&logits);
        }
        let rows: Vec<Tensor> = (0..n)
            .map(|i| Tensor::run_backward(&[gradient.get(i)], &[&leaf], true, false).remove(0))
            .collect();
        let hessian = Tensor::stack(&rows, 0);
        let damped = hessian + Tensor::eye(n, (Kind::Double, device())) * damping;
        let next = &logits - Tensor::linalg_solve(&damped, &gradient.detach(), true);
        let descends = loss(&completions(&next)).double_value(&[]) <= value.double_value(&[]);
        damping = if descends {
            logits = next;
            (damping * 0.1f64).max(1e-10)
        } else {
            damping * 10.0
        };
    }
    panic!("the descent did not come to rest");
}

pub(super) fn total_variation(log_p: &Tensor, log_q: &Tensor) -> f64 {
    (log_p.exp() - log_q.exp())
        .abs()
        .sum(Kind::Double)
        .double_value(&[])
        / 2.0
}

fn reaches(name: &str, optimum: &Tensor, loss: impl Fn(&Tensor) -> Tensor) {
    let begun = total_variation(&reference(), optimum);
    assert!(begun > 0.05, "{name}: the optimum is where it began");
    let apart = total_variation(&descend(loss), optimum);
    println!("{name}: total variation {apart:.1e} from the optimum, {begun:.2} at the start");
    assert!(apart < 1e-6, "{name}: {apart}");
}

fn sigmoid(label_smoothing: f64) -> PreferenceMix {
    let beta = BETA;
    PreferenceLoss::Sigmoid {
        beta,
        label_smoothing,
    }
    .into()
}

/// Rafailov et al. 2023, section 4: π* ∝ π₀ exp(r/β).
#[test]
fn dpo() {
    let labels = all_pairs();
    reaches("dpo", &tilted(&REWARDS.map(|r| r / BETA)), |log_pi| {
        expected(&sigmoid(0.0), &labels, log_pi)
    });
}

/// Chowdhury et al. 2024: with labels flipped at rate ε it still reaches what DPO reaches without.
#[test]
fn robust_dpo_of_flipped_labels() {
    let (beta, label_smoothing) = (BETA, 0.2);
    let flipped: Vec<Label> = all_pairs()
        .into_iter()
        .map(|(i, j, p)| (i, j, p * 0.8 + (1.0 - p) * 0.2))
        .collect();
    let optimum = tilted(&REWARDS.map(|r| r / BETA));
    let mix = PreferenceLoss::Robust {
        beta,
        label_smoothing,
    }
    .into();
    reaches("robust", &optimum, |log_pi| {
        expected(&mix, &flipped, log_pi)
    });
    // DPO of the same labels does not.
    let misled = descend(|log_pi| expected(&sigmoid(0.0), &flipped, log_pi));
    assert!(total_variation(&misled, &optimum) > 1e-2);
}

/// Mitchell 2023, and Ji et al. 2024 for EXO: a certain label is taken for one of probability 1 − ε, so that
/// the optimum has σ(βh) = 1 − ε on every pair. Neighbours in a chain are compared: eight margins
/// that may be what they like.
#[test]
fn smoothed_labels() {
    let epsilon = 0.1f64;
    let step = ((1.0 - epsilon) / epsilon).ln() / BETA;
    let (mut labels, mut x) = (Vec::new(), [0.0; 9]);
    for i in 1..9 {
        let better = REWARDS[i] > REWARDS[i - 1];
        labels.push(if better {
            (i, i - 1, 1.0)
        } else {
            (i - 1, i, 1.0)
        });
        x[i] = x[i - 1] + if better { step } else { -step };
    }
    let optimum = tilted(&x);
    reaches("cdpo", &optimum, |log_pi| {
        expected(&sigmoid(epsilon), &labels, log_pi)
    });
    let exo = PreferenceLoss::ExoPair {
        beta: BETA,
        label_smoothing: epsilon,
    }
    .into();
    reaches("exo_pair", &optimum, |log_pi| {
        expected(&exo, &labels, log_pi)
    });
}

/// Azar et al. 2023, with Ψ the identity: π* ∝ π₀ exp(p(y ≻ μ)/τ), p(y ≻ μ) the probability to
/// beat a completion drawn evenly (itself: ½).
#[test]
fn ipo() {
    let optimum: [f64; 9] = std::array::from_fn(|i| {
        let wins: f64 = (0..9).map(|j| preference(i, j)).sum();
        wins / 9.0 / 0.1
    });
    let labels = all_pairs();
    let mix = PreferenceLoss::Ipo { beta: 0.1 }.into();
    reaches("ipo", &tilted(&optimum), |log_pi| {
        expected(&mix, &labels, log_pi)
    });
}

/// Gao et al. 2024: π* ∝ π₀ exp(ηr), from pairs without any label; and Adler et al. 2024, where η/β
/// stands for η.
#[test]
fn rewards_known() {
    let labels = all_pairs();
    let rebel = PreferenceLoss::Rebel { eta: 1.5 }.into();
    reaches("rebel", &tilted(&REWARDS.map(|r| r * 1.5)), |log_pi| {
        expected(&rebel, &labels, log_pi)
    });
    let beta = BETA;
    let aware = PreferenceLoss::RewardAware { beta, eta: 0.8 }.into();
    let optimum = tilted(&REWARDS.map(|r| r * 0.8 / BETA));
    reaches("reward_aware", &optimum, |log_pi| {
        expected(&aware, &labels, log_pi)
    });
}

/// Wang et al. 2023: β f′(π*/π₀) = r − λ, with λ such that π* is a distribution.
#[test]
fn other_divergences() {
    type Inverse = fn(f64) -> f64;
    // (f′)⁻¹, and where it ends.
    let cases: [(Divergence, Inverse, f64); 3] = [
        (Divergence::ForwardKl, |s| 1.0 / (1.0 - s), 1.0),
        (
            Divergence::JensenShannon,
            |s| s.exp() / (2.0 - s.exp()),
            std::f64::consts::LN_2,
        ),
        (
            Divergence::Alpha { alpha: 0.5 },
            |s| (1.0 - 0.5 * s).powi(-2),
            2.0,
        ),
    ];
    let labels = all_pairs();
    let start = Vec::<f64>::try_from(reference().exp()).unwrap();
    for (divergence, inverse, end) in cases {
        let policy = |lambda: f64| -> Vec<f64> {
            let ratio = |r: f64| inverse((r - lambda) / BETA);
            REWARDS
                .iter()
                .zip(&start)
                .map(|(r, p)| p * ratio(*r))
                .collect()
        };
        let best = REWARDS.iter().copied().fold(f64::MIN, f64::max);
        let (mut low, mut high) = (best - BETA * end, best + 1e3);
        for _ in 0..200 {
            let middle = (low + high) / 2.0;
            if policy(middle).iter().sum::<f64>() > 1.0 {
                low = middle;
            } else {
                high = middle;
            }
        }
        let optimum = from_slice(&policy(high)).log();
        let mix = PreferenceMix {
            divergence,
            ..sigmoid(0.0)
        };
        reaches(&format!("{divergence:?}"), &optimum, |log_pi| {
            expected(&mix, &labels, log_pi)
        });
    }
}

/// Rafailov et al. 2023, appendix A.3: rankings of three, in expectation, lead where pairs do.
#[test]
fn plackett_luce_of_three() {
    let (mut order, mut weights) = (Vec::new(), Vec::new());
    let strength = REWARDS.map(f64::exp);
    for a in 0..9 {
        for b in (0..9).filter(|b| *b != a) {
            for c in (0..9).filter(|c| *c != a && *c != b) {
                let (sa, sb, sc) = (strength[a], strength[b], strength[c]);
                order.extend([a as i64, b as i64, c as i64]);
                weights.push(sa / (sa + sb + sc) * sb / (sb + sc));
            }
        }
    }
    let offsets = Offsets::from_lengths(&vec![3; weights.len()]).unwrap();
    let (order, weights) = (from_slice(&order), from_slice(&weights));
    reaches(
        "plackett_luce",
        &tilted(&REWARDS.map(|r| r / BETA)),
        |log_pi| {
            let ratios = (log_pi - reference()).index_select(0, &order);
            let ranked = Ragged::new(ratios, offsets.clone()).unwrap();
            let losses = plackett_luce(&ranked, BETA).unwrap().losses;
            (losses * &weights).sum(Kind::Double)
        },
    );
}

/// Ethayarajh et al. 2024, section 4: of contradictory thumbs KTO's optimum takes the majority's side
/// without reserve. Here one completion has it: all mass goes there. The optimum is at infinity, where
/// Newton never comes to rest; steps by the gradient's sign go there straight.
#[test]
fn kto_follows_the_majority() {
    let likes = [0.4, 0.3, 0.45, 0.2, 0.7, 0.1, 0.4, 0.35, 0.45];
    let kto = UnpairedLoss::Kto {
        beta: BETA,
        weights: ThumbWeights::default(),
    };
    let thumbs = |log_pi: &Tensor, good: bool| {
        let completions = UnpairedLogprobs {
            logprobs: log_pi.shallow_clone(),
            ref_logprobs: reference(),
            desirable: Tensor::full([9], i64::from(good), (Kind::Bool, device())),
        };
        kto.compute(&completions, 0.3).unwrap().losses
    };
    let likes = from_slice(&likes);
    let mut logits = from_slice(&REFERENCE);
    for _ in 0..400 {
        let leaf = logits.set_requires_grad(true);
        let log_pi = completions(&leaf);
        let loss = thumbs(&log_pi, true) * &likes + thumbs(&log_pi, false) * (-&likes + 1.0);
        let loss = loss.sum(Kind::Double);
        let gradient = Tensor::run_backward(&[loss], &[&leaf], false, false).remove(0);
        logits = leaf.detach() - gradient.sign() * 0.1;
    }
    let all_there = completions(&logits).exp().double_value(&[4]);
    println!(
        "kto: total variation {:.1e} from the optimum",
        1.0 - all_there
    );
    assert!(1.0 - all_there < 1e-6, "{all_there}");
}
