//! What each loss is at rest: with every label at its true probability the truth comes back.

use rlhf_kernels::{Offsets, Ragged};
use rlhf_reward::bradley_terry::{self, BradleyTerry};
use rlhf_reward::distributional::{self, Normal};
use rlhf_reward::pairs::Pairs;
use rlhf_reward::{ordinal, plackett_luce, regression};
use tch::{Kind, Tensor};

use crate::device::{device, from_slice};
use crate::golden_io::gradient;

const TRUE: [f64; 6] = [0.0, 1.3, -0.8, 2.1, 0.4, -1.7];

/// Descends from `start` until the gradient is nothing.
fn descend(start: &[f64], rate: f64, loss: impl Fn(&Tensor) -> Tensor) -> Vec<f64> {
    let mut x = from_slice(start);
    for _ in 0..20_000 {
        let leaf = x.set_requires_grad(true);
        let slope = gradient(&loss(&leaf), &leaf);
        x = leaf.detach() - &slope * rate;
        if slope.abs().max().double_value(&[]) < 1e-12 {
            return Vec::<f64>::try_from(&x).unwrap();
        }
    }
    panic!("the descent did not come to rest");
}

/// The largest distance from `expected` after a shift that puts the first of both together.
fn distance_up_to_a_constant(got: &[f64], expected: &[f64]) -> f64 {
    let shift = got[0] - expected[0];
    got.iter()
        .zip(expected)
        .map(|(g, e)| (g - e - shift).abs())
        .fold(0.0, f64::max)
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Every ordered pair at the probability σ(r_i − r_j) that i is preferred.
fn labelled_pairs() -> (Tensor, Tensor, Tensor) {
    let (mut chosen, mut rejected, mut weights) = (Vec::new(), Vec::new(), Vec::new());
    for (i, better) in TRUE.iter().enumerate() {
        for (j, worse) in TRUE.iter().enumerate().filter(|(j, _)| *j != i) {
            chosen.push(i as i64);
            rejected.push(j as i64);
            weights.push(sigmoid(better - worse));
        }
    }
    (
        from_slice(&chosen),
        from_slice(&rejected),
        from_slice(&weights),
    )
}

fn bradley_terry_fit(centering: f64) -> Vec<f64> {
    let (chosen, rejected, weights) = labelled_pairs();
    let settings = BradleyTerry {
        weights: Some(&weights),
        centering,
        ..BradleyTerry::default()
    };
    descend(&[5.0, 0.0, 0.0, 0.0, 0.0, 1.0], 3.0, |scores| {
        let loss = bradley_terry::loss_of_pairs(scores, &chosen, &rejected, &settings).unwrap();
        loss.sum / loss.weight
    })
}

#[test]
fn all_pairs_recover_the_rewards_up_to_a_constant() {
    let scores = bradley_terry_fit(0.0);
    assert!(
        (scores[0] - TRUE[0]).abs() > 0.1,
        "the constant is free, and the start is off centre"
    );
    let distance = distance_up_to_a_constant(&scores, &TRUE);
    println!("Bradley-Terry: {distance:.1e}");
    assert!(distance < 1e-6, "{scores:?}");
}

#[test]
fn centring_pins_the_mean() {
    let scores = from_slice(&bradley_terry_fit(0.01));
    assert!(scores.mean(Kind::Double).double_value(&[]).abs() < 1e-6);
}

#[test]
fn prompts_of_any_size_recover_theirs() {
    // Two prompts, four completions and two: 1/C(K,2), and the truth as the probability of each pair.
    let groups = Offsets::from_lengths(&[4, 2]).unwrap();
    let pairs = Pairs::of_rankings(&groups).unwrap();
    let truth: Vec<f64> = pairs
        .chosen
        .iter()
        .zip(&pairs.rejected)
        .map(|(c, r)| sigmoid(TRUE[*c as usize] - TRUE[*r as usize]))
        .collect();
    let truth = from_slice(&truth);
    let pairs = pairs.tensors(Kind::Double, device());
    let settings = BradleyTerry {
        weights: Some(&pairs.weights),
        preference: Some(&truth),
        ..BradleyTerry::default()
    };
    let scores = descend(&[0.0; 6], 3.0, |scores| {
        let out = bradley_terry::loss_of_pairs(scores, &pairs.chosen, &pairs.rejected, &settings)
            .unwrap();
        assert_eq!((out.weight * 1e12).round(), 2e12);
        out.sum / out.weight
    });
    let first = distance_up_to_a_constant(&scores[..4], &TRUE[..4]);
    let second = distance_up_to_a_constant(&scores[4..], &TRUE[4..]);
    println!("Bradley-Terry by prompts: {:.1e}", first.max(second));
    assert!(first.max(second) < 1e-6, "{scores:?}");
}

#[test]
fn all_rankings_recover_the_rewards() {
    // Every order of four items at its probability under the truth.
    let truth = &TRUE[..4];
    let (mut index, mut weights) = (Vec::new(), Vec::new());
    for order in orders(4) {
        let mut p = 1.0;
        for k in 0..4 {
            let left: f64 = order[k..].iter().map(|i| truth[*i].exp()).sum();
            p *= truth[order[k]].exp() / left;
        }
        index.extend(order.iter().map(|i| *i as i64));
        weights.push(p);
    }
    assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    let offsets = Offsets::from_lengths(&vec![4; weights.len()]).unwrap();
    let (index, weights) = (from_slice(&index), from_slice(&weights));
    let scores = descend(&[1.0, 0.0, 0.0, 0.0], 1.0, |scores| {
        let ranked = Ragged::new(scores.index_select(0, &index), offsets.clone()).unwrap();
        plackett_luce::loss(&ranked, Some(&weights)).unwrap().sum
    });
    let distance = distance_up_to_a_constant(&scores, truth);
    println!("Plackett-Luce: {distance:.1e}");
    assert!(distance < 1e-6, "{scores:?}");
}

fn orders(n: usize) -> Vec<Vec<usize>> {
    if n == 0 {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for shorter in orders(n - 1) {
        for place in 0..n {
            let mut order = shorter.clone();
            order.insert(place, n - 1);
            all.push(order);
        }
    }
    all
}

#[test]
fn ties_recover_the_rewards_and_the_threshold() {
    // Rao and Kupper: worse, tie, better of each pair at thresholds −η, η.
    let eta = 0.9f64;
    let (mut first, mut second, mut labels, mut weights) = (vec![], vec![], vec![], vec![]);
    for (i, a) in TRUE[..4].iter().enumerate() {
        for (j, b) in TRUE[..i].iter().enumerate() {
            let d = a - b;
            let (better, worse) = (sigmoid(d - eta), sigmoid(-d - eta));
            for (label, p) in [(0i64, worse), (1, 1.0 - better - worse), (2, better)] {
                first.push(i as i64);
                second.push(j as i64);
                labels.push(label);
                weights.push(p);
            }
        }
    }
    let (first, second) = (from_slice(&first), from_slice(&second));
    let (labels, weights) = (from_slice(&labels), from_slice(&weights));
    let fit = descend(&[0.0; 5], 1.0, |x| {
        let scores = x.narrow(0, 0, 4);
        let lead = scores.index_select(0, &first) - scores.index_select(0, &second);
        let thresholds = ordinal::symmetric_thresholds(&x.narrow(0, 4, 1)).unwrap();
        let out = ordinal::loss(&lead, &labels, &thresholds, Some(&weights)).unwrap();
        out.sum / out.weight
    });
    let distance = distance_up_to_a_constant(&fit[..4], &TRUE[..4]);
    let learned = (1.0 + fit[4].exp()).ln();
    println!(
        "ties: {distance:.1e}, threshold {:.1e}",
        (learned - eta).abs()
    );
    assert!(distance < 1e-6 && (learned - eta).abs() < 1e-6, "{fit:?}");
}

#[test]
fn preferences_recover_the_mix_of_attributes() {
    let attributes =
        from_slice(&[1.0, 0.2, -0.5, 1.5, 0.3, -1.0, 2.0, 0.1, -0.7, 0.4]).view([5, 2]);
    let mix = [0.8, -0.4];
    let truth =
        Vec::<f64>::try_from(&regression::mix(&attributes, &from_slice(&mix)).unwrap()).unwrap();
    let pairs = Pairs::of_rankings(&Offsets::from_lengths(&[5]).unwrap()).unwrap();
    let p: Vec<f64> = pairs
        .chosen
        .iter()
        .zip(&pairs.rejected)
        .map(|(c, r)| sigmoid(truth[*c as usize] - truth[*r as usize]))
        .collect();
    let p = from_slice(&p);
    let pairs = pairs.tensors(Kind::Double, device());
    let settings = BradleyTerry {
        preference: Some(&p),
        ..BradleyTerry::default()
    };
    let fit = descend(&[0.0, 0.0], 1.0, |mix| {
        let scores = regression::mix(&attributes, mix).unwrap();
        let out = bradley_terry::loss_of_pairs(&scores, &pairs.chosen, &pairs.rejected, &settings);
        let out = out.unwrap();
        out.sum / out.weight
    });
    assert!((fit[0] - mix[0]).abs().max((fit[1] - mix[1]).abs()) < 1e-6);
}

#[test]
fn the_variance_is_how_far_labels_disagree() {
    // Labels 1, 2, 6: mean 3, variance (4 + 1 + 9)/3.
    let targets = from_slice(&[1.0, 2.0, 6.0]);
    let fit = descend(&[0.0, 0.0], 0.3, |x| {
        let (mean, log_variance) = (
            x.narrow(0, 0, 1).expand([3], false),
            x.narrow(0, 1, 1).expand([3], false),
        );
        let predicted = Normal {
            mean: &mean,
            log_variance: &log_variance,
        };
        let out = distributional::regression(predicted, &targets, None).unwrap();
        out.sum / out.weight
    });
    assert!((fit[0] - 3.0).abs() < 1e-6 && (fit[1].exp() - 14.0 / 3.0).abs() < 1e-6);
}

/// All ordered pairs of clips of two steps over four kinds of steps, each at the probability that the true
/// rewards give it: the fit gives the rewards of the steps back, up to a constant.
#[test]
fn all_pairs_of_clips_recover_the_rewards_of_steps() {
    use rlhf_reward::segments::{self, Comparisons};
    let truth = &TRUE[..4];
    let clips: Vec<(i64, i64)> = (0..4).flat_map(|a| (a..4).map(move |b| (a, b))).collect();
    let steps: Vec<i64> = clips.iter().flat_map(|&(a, b)| [a, b]).collect();
    let steps = from_slice(&steps);
    let offsets = Offsets::from_lengths(&vec![2; clips.len()]).unwrap();
    let sum = |c: &(i64, i64)| truth[c.0 as usize] + truth[c.1 as usize];
    for error_rate in [0.0, 0.1] {
        let (mut first, mut second, mut preference) = (Vec::new(), Vec::new(), Vec::new());
        for (i, a) in clips.iter().enumerate() {
            for (j, b) in clips.iter().enumerate().filter(|(j, _)| *j != i) {
                first.push(i as i64);
                second.push(j as i64);
                let p = sigmoid(sum(a) - sum(b));
                preference.push((1.0 - error_rate) * p + error_rate / 2.0);
            }
        }
        let (first, second) = (from_slice(&first), from_slice(&second));
        let preference = from_slice(&preference);
        let rewards = descend(&[1.0, -1.0, 0.5, 0.0], 1.0, |r| {
            let rewards = Ragged::new(r.index_select(0, &steps), offsets.clone()).unwrap();
            let compared = Comparisons {
                first: &first,
                second: &second,
                preference: &preference,
                weights: None,
            };
            let out = segments::loss(&rewards, &compared, error_rate).unwrap();
            out.sum / out.weight
        });
        let distance = distance_up_to_a_constant(&rewards, truth);
        println!("clips at error {error_rate}: {distance:.1e}");
        assert!(distance < 1e-6, "{rewards:?}");
        // Of one length, so that the constant is free: it stays where the start had it.
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        assert!((mean(&rewards) - 0.125).abs() < 1e-6);
    }
}
