//! Properties that hold for any input.

use proptest::prelude::*;
use rlhf_dpo::loss::plackett_luce::plackett_luce;
use rlhf_dpo::loss::unpaired::{RunningMoments, ThumbWeights, UnpairedLogprobs, UnpairedLoss};
use rlhf_dpo::loss::{
    Divergence, PairLogprobs, PairTokens, PairValues, Pairs, PreferenceLoss, PreferenceMix,
    PreferenceOutput, dpo,
};
use rlhf_kernels::{Offsets, Ragged};
use tch::Tensor;

use crate::device::from_slice;
use crate::every::every_loss;
use crate::golden_io::gradient;

/// log π of chosen and rejected, log π₀ of chosen and rejected.
type Pair = (f64, f64, f64, f64);

fn pairs() -> impl Strategy<Value = Vec<Pair>> {
    let logprob = || -50.0f64..-0.5;
    prop::collection::vec((logprob(), logprob(), logprob(), logprob()), 1..9)
}

fn column(pairs: &[Pair], pick: fn(&Pair) -> f64) -> Tensor {
    from_slice(&pairs.iter().map(pick).collect::<Vec<_>>())
}

/// Pairs with lengths, scores and weights that depend on their place among all.
fn inputs(pairs: &[Pair], from: usize, chosen: &Tensor) -> Pairs {
    let places: Vec<f64> = (from..from + pairs.len()).map(|i| i as f64).collect();
    let places = from_slice(&places);
    let logprobs = PairLogprobs {
        chosen: chosen.shallow_clone(),
        rejected: column(pairs, |p| p.1),
        ref_chosen: column(pairs, |p| p.2),
        ref_rejected: column(pairs, |p| p.3),
    };
    Pairs {
        lengths: Some(PairValues::new(&(&places + 1.0), &(&places * 2.0 + 1.0)).unwrap()),
        scores: Some(PairValues::new(&(&places + 0.5), &(&places * 0.5)).unwrap()),
        delta: 0.1,
        ..logprobs.into()
    }
}

fn compute(pairs: &[Pair], loss: PreferenceLoss) -> PreferenceOutput {
    let chosen = column(pairs, |p| p.0);
    loss.compute(&inputs(pairs, 0, &chosen)).unwrap()
}

fn host(t: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(t).unwrap()
}

fn apart(a: &Tensor, b: &Tensor) -> f64 {
    let scale = a.abs().max().double_value(&[]).max(1.0);
    (a - b).abs().max().double_value(&[]) / scale
}

/// Those that say so in their documentation: they are of the batch.
fn is_of_the_batch(loss: &PreferenceLoss) -> bool {
    matches!(
        loss,
        PreferenceLoss::Aot { .. }
            | PreferenceLoss::AotUnpaired { .. }
            | PreferenceLoss::SftBatchMean
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// A step's loss and gradient do not depend on how it is split.
    #[test]
    fn any_split_gives_the_same_step(pairs in pairs(), cut in any::<prop::sample::Index>()) {
        let cut = cut.index(pairs.len());
        for loss in every_loss().into_iter().filter(|l| !is_of_the_batch(l)) {
            let leaf = column(&pairs, |p| p.0).set_requires_grad(true);
            let part = |from: usize, to: usize| {
                let inputs = inputs(&pairs[from..to], from, &leaf.slice(0, from as i64, to as i64, 1));
                loss.compute(&inputs).unwrap().loss
            };
            let (whole, first, second) = (part(0, pairs.len()), part(0, cut), part(cut, pairs.len()));
            prop_assert_eq!(first.weight + second.weight, whole.weight);
            let sum = first.sum + second.sum;
            prop_assert!(apart(&sum, &whole.sum) < 1e-13, "{:?}", loss);
            prop_assert!(apart(&gradient(&sum, &leaf), &gradient(&whole.sum, &leaf)) < 1e-13, "{:?}", loss);
        }
    }

    /// Only log-ratios count where there is a reference: what both models lose is nothing.
    #[test]
    fn policy_and_reference_move_together(pairs in pairs(), a in -5.0f64..5.0, b in -5.0f64..5.0) {
        let moved: Vec<Pair> = pairs.iter().map(|p| (p.0 + a, p.1 + b, p.2 + a, p.3 + b)).collect();
        for loss in every_loss() {
            // AOT subtracts sorted columns, not pairs; one shift for both leaves it, too.
            let both: Vec<Pair> = pairs.iter().map(|p| (p.0 + a, p.1 + a, p.2 + a, p.3 + a)).collect();
            let moved = if matches!(loss, PreferenceLoss::Aot { .. }) { &both } else { &moved };
            if loss.has_reference() {
                prop_assert!(apart(&compute(&pairs, loss).losses, &compute(moved, loss).losses) < 1e-9, "{:?}", loss);
            }
        }
    }

    /// The losses of the margin do not see what chosen and rejected gain together; those of absolute
    /// rewards do.
    #[test]
    fn only_absolute_losses_see_a_common_gain(pairs in pairs(), gain in 1.0f64..5.0) {
        let moved: Vec<Pair> = pairs.iter().map(|p| (p.0 + gain, p.1 + gain, p.2, p.3)).collect();
        for loss in every_loss() {
            let change = apart(&compute(&pairs, loss).losses, &compute(&moved, loss).losses);
            match loss {
                PreferenceLoss::Sigmoid { .. }
                | PreferenceLoss::Robust { .. }
                | PreferenceLoss::Odpo { .. }
                | PreferenceLoss::Hinge { .. }
                | PreferenceLoss::Ipo { .. }
                | PreferenceLoss::ExoPair { .. }
                | PreferenceLoss::Rebel { .. }
                | PreferenceLoss::RewardAware { .. }
                | PreferenceLoss::Aot { .. }
                | PreferenceLoss::AotUnpaired { .. } => prop_assert!(change < 1e-10, "{:?} {}", loss, change),
                // Its exponential magnifies the rounding of the margin.
                PreferenceLoss::Discopop { .. } => prop_assert!(change < 1e-8, "{}", change),
                PreferenceLoss::CalDpo { .. } | PreferenceLoss::SppoHard { .. } => {
                    prop_assert!(change > 1e-12, "{:?} {}", loss, change);
                }
                _ => {}
            }
        }
    }

    /// Exchanging chosen and rejected turns the margin's sign and exchanges the rewards.
    #[test]
    fn exchange_turns_the_margin(pairs in pairs(), label_smoothing in 0.0f64..0.49) {
        let loss = PreferenceLoss::Sigmoid { beta: 0.3, label_smoothing };
        let turned: Vec<Pair> = pairs.iter().map(|p| (p.1, p.0, p.3, p.2)).collect();
        let (a, b) = (compute(&pairs, loss), compute(&turned, loss));
        prop_assert_eq!(host(&a.margins()), host(&-b.margins()));
        prop_assert_eq!(host(&a.chosen_rewards), host(&b.rejected_rewards));
        prop_assert_eq!(host(&a.accuracies()), host(&(-b.accuracies() + 1.0)));
        // The two losses differ by (1 - 2ε) of the margin: -ℓ(z) + ℓ(-z) = -z.
        for ((la, lb), m) in host(&a.losses).iter().zip(host(&b.losses)).zip(host(&a.margins())) {
            prop_assert!((lb - la - (1.0 - 2.0 * label_smoothing) * m).abs() < 1e-10);
        }
    }

    /// A mixture is the weighted sum of its terms, whatever the weights of pairs.
    #[test]
    fn a_mixture_is_a_sum(pairs in pairs(), w in prop::collection::vec(-1.0f64..2.0, 3)) {
        let losses = [
            PreferenceLoss::Sigmoid { beta: 0.3, label_smoothing: 0.0 },
            PreferenceLoss::BcoPair { beta: 0.3 },
            PreferenceLoss::Sft,
        ];
        let chosen = column(&pairs, |p| p.0);
        let factors = column(&pairs, |p| p.3.abs());
        let inputs = Pairs { weights: Some(factors.shallow_clone()), ..inputs(&pairs, 0, &chosen) };
        let mut mix = PreferenceMix::default();
        let mut expected = chosen.zeros_like();
        for (loss, weight) in losses.into_iter().zip(&w) {
            mix.terms.push(rlhf_dpo::loss::WeightedLoss { weight: *weight, loss });
            expected += compute(&pairs, loss).losses * *weight * &factors;
        }
        let out = mix.compute(&inputs).unwrap();
        prop_assert!(apart(&expected, &out.losses) < 1e-13);
        prop_assert_eq!(out.loss.weight, pairs.len() as f64);
        prop_assert_eq!(host(&out.chosen_rewards), host(&compute(&pairs, losses[0]).chosen_rewards));
    }

    /// The α-divergence lies between the reverse and the forward KL.
    #[test]
    fn alpha_joins_the_two(pairs in prop::collection::vec((-3.0f64..3.0, -3.0f64..3.0), 1..5)) {
        let split = |pick: fn(&(f64, f64)) -> f64| from_slice(&pairs.iter().map(pick).collect::<Vec<_>>());
        let ratios = PairValues::new(&split(|p| p.0), &split(|p| p.1)).unwrap();
        let of = |d: Divergence| d.of_ratios(&ratios).unwrap();
        let near = |a: PairValues, b: PairValues| apart(a.chosen(), b.chosen()).max(apart(a.rejected(), b.rejected()));
        let alpha = |alpha: f64| of(Divergence::Alpha { alpha });
        prop_assert!(near(of(Divergence::ReverseKl), alpha(1e-9)) < 1e-7);
        prop_assert!(near(of(Divergence::ForwardKl), alpha(1.0)) < 1e-15);
    }

    /// A ranking does not see what all completions of a prompt gain, and any split of prompts is the same step.
    #[test]
    fn rankings_shift_and_split(first in prop::collection::vec(-9.0f64..9.0, 1..6), second in prop::collection::vec(-9.0f64..9.0, 1..6), gain in -5.0f64..5.0) {
        let ranked = |groups: &[&[f64]]| {
            let lengths: Vec<i64> = groups.iter().map(|g| g.len() as i64).collect();
            let values = from_slice(&groups.concat());
            plackett_luce(&Ragged::new(values, Offsets::from_lengths(&lengths).unwrap()).unwrap(), 0.5).unwrap()
        };
        let gained: Vec<f64> = first.iter().map(|x| x + gain).collect();
        let whole = ranked(&[&first, &second]);
        prop_assert!(apart(&whole.losses, &ranked(&[&gained, &second]).losses) < 1e-12);
        let (a, b) = (ranked(&[&first]).loss, ranked(&[&second]).loss);
        prop_assert_eq!(a.weight + b.weight, whole.loss.weight);
        prop_assert!(apart(&(a.sum + b.sum), &whole.loss.sum) < 1e-12);
    }

    /// Thumbs: any split, given one baseline; and exchanging the thumbs mirrors Δ about it.
    #[test]
    fn thumbs_split_and_mirror(rows in prop::collection::vec((-9.0f64..9.0, any::<bool>()), 2..9), z in 0.0f64..3.0) {
        let thumbs = |rows: &[(f64, bool)]| UnpairedLogprobs {
            logprobs: from_slice(&rows.iter().map(|r| r.0 - 20.0).collect::<Vec<_>>()),
            ref_logprobs: from_slice(&vec![-20.0; rows.len()]),
            desirable: from_slice(&rows.iter().map(|r| r.1).collect::<Vec<_>>()),
        };
        let weights = ThumbWeights::default();
        for loss in [UnpairedLoss::Kto { beta: 0.4, weights }, UnpairedLoss::Bco { beta: 0.4 }] {
            let (whole, a, b) = (
                loss.compute(&thumbs(&rows), z).unwrap(),
                loss.compute(&thumbs(&rows[..1]), z).unwrap().loss,
                loss.compute(&thumbs(&rows[1..]), z).unwrap().loss,
            );
            prop_assert_eq!(a.weight + b.weight, whole.loss.weight);
            prop_assert!(apart(&(a.sum + b.sum), &whole.loss.sum) < 1e-13);
        }
        let mirrored: Vec<_> = rows.iter().map(|r| (2.0 * z - r.0, !r.1)).collect();
        let kto = UnpairedLoss::Kto { beta: 0.4, weights };
        let (a, b) = (kto.compute(&thumbs(&rows), z).unwrap(), kto.compute(&thumbs(&mirrored), z).unwrap());
        prop_assert!(apart(&a.losses, &b.losses) < 1e-13);
    }

    /// δ does not depend on the steps in which rewards arrive.
    #[test]
    fn moments_do_not_see_the_steps(x in prop::collection::vec(-50.0f64..50.0, 2..20), cut in any::<prop::sample::Index>()) {
        let cut = cut.index(x.len());
        let of = |parts: &[&[f64]]| {
            let mut m = RunningMoments::default();
            for part in parts {
                m.update(&from_slice(part)).unwrap();
            }
            (m.mean(), m.std())
        };
        let (whole, parts) = (of(&[&x]), of(&[&x[..cut], &x[cut..]]));
        prop_assert!((whole.0 - parts.0).abs() < 1e-11 && (whole.1 - parts.1).abs() < 1e-11);
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let var = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (x.len() - 1) as f64;
        prop_assert!((whole.0 - mean).abs() < 1e-11 && (whole.1 - var.sqrt()).abs() < 1e-11);
    }

    /// LD-DPO lies between cutting to one length and not at all; equal lengths know no difference.
    #[test]
    fn length_desensitising(x in prop::collection::vec(-5.0f64..0.0, 4..12), alpha in 0.0f64..1.0) {
        let n = x.len() as i64;
        let ragged = |lengths: &[i64]| Ragged::new(from_slice(&x), Offsets::from_lengths(lengths).unwrap()).unwrap();
        let tokens = PairTokens::new(&ragged(&[n - 1, 1]), &ragged(&[2, n - 2])).unwrap();
        let at = |a: f64| tokens.length_desensitized(a).unwrap();
        let between = at(0.0).chosen() * (1.0 - alpha) + at(1.0).chosen() * alpha;
        prop_assert!(apart(&between, at(alpha).chosen()) < 1e-13);
        prop_assert!(apart(at(1.0).rejected(), tokens.sums().unwrap().rejected()) < 1e-13);
        let equal = PairTokens::new(&ragged(&[2, n - 2]), &ragged(&[2, n - 2])).unwrap();
        let (cut, whole) = (equal.length_desensitized(0.0).unwrap(), equal.sums().unwrap());
        prop_assert!(apart(cut.chosen(), whole.chosen()) < 1e-13);
    }
}

/// What is asked for and not given is named.
#[test]
fn missing_columns_are_named() {
    let pairs = [(-1.0, -2.0, -1.0, -2.0)];
    let chosen = column(&pairs, |p| p.0);
    let bare = || Pairs {
        lengths: None,
        scores: None,
        ..inputs(&pairs, 0, &chosen)
    };
    let message = |loss: PreferenceLoss, p: &Pairs| loss.compute(p).unwrap_err().to_string();
    assert!(message(PreferenceLoss::Sft, &bare()).contains("lengths"));
    assert!(message(PreferenceLoss::Rebel { eta: 1.0 }, &bare()).contains("scores"));
    let weighted = Pairs {
        weights: Some(from_slice(&[1.0])),
        ..bare()
    };
    let aot = PreferenceLoss::Aot {
        beta: 1.0,
        label_smoothing: 0.0,
    };
    assert!(message(aot, &weighted).contains("sorts"));
    let mix = PreferenceMix {
        divergence: Divergence::ForwardKl,
        ..aot.into()
    };
    let complaint = mix.compute(&bare()).unwrap_err().to_string();
    assert!(complaint.contains("ForwardKl says nothing"), "{complaint}");
    let none = PreferenceMix::default().compute(&bare());
    assert!(none.unwrap_err().to_string().contains("no terms"));
}

/// Two bodies of one formula: of two completions a ranking is a pair.
#[test]
fn a_ranking_of_two_is_dpo() {
    let ratios = [0.3, -0.4, -2.0, 1.5, 12.0, -30.0];
    let ranked = Ragged::new(from_slice(&ratios), Offsets::new(vec![0, 2, 4, 6]).unwrap()).unwrap();
    let out = plackett_luce(&ranked, 0.7).unwrap();
    let column = |i| from_slice(&ratios).slice(0, i, None, 2);
    let pairs = PairValues::new(&column(0), &column(1)).unwrap();
    let expected = dpo::sigmoid(&pairs, 0.7, 0.0).unwrap();
    let apart = (out.losses - expected.losses).abs().max();
    assert!(apart.double_value(&[]) < 1e-14);
}
