//! Properties that hold for any input.

use proptest::prelude::*;
use rlhf_kernels::{LossSum, Offsets, Ragged};
use rlhf_policy::advantage::{AdvantageEstimator, StdScope};
use rlhf_policy::kl::{KlEstimator, KlPenalty, KlPlacement};
use rlhf_policy::loss::ppo::{self, ValueInputs};
use rlhf_policy::loss::{Clip, KlTerm, PolicyInputs, PolicyStats, RatioLevel, Reduction, clipped};
use tch::{Kind, Tensor};

use crate::device::{device, from_slice};
use crate::golden_io::gradient;

/// Completions of 0 to 5 tokens with five numbers a token, and where to cut the batch.
#[derive(Clone, Debug)]
struct Batch {
    lengths: Vec<i64>,
    columns: [Vec<f64>; 5],
    cuts: Vec<bool>,
}

fn batch() -> impl Strategy<Value = Batch> {
    prop::collection::vec(0i64..6, 1..8).prop_flat_map(|lengths| {
        let n = lengths.iter().sum::<i64>() as usize;
        let column = || prop::collection::vec(-2.0f64..2.0, n);
        let columns = [column(), column(), column(), column(), column()];
        let cuts = prop::collection::vec(any::<bool>(), lengths.len() - 1);
        (Just(lengths), columns, cuts).prop_map(|(lengths, columns, cuts)| Batch {
            lengths,
            columns,
            cuts,
        })
    })
}

impl Batch {
    /// The micro-batches: ranges of completions with the first token of each.
    fn parts(&self) -> Vec<(std::ops::Range<usize>, i64)> {
        let mut parts = Vec::new();
        let (mut first, mut token) = (0, 0);
        for end in 1..=self.lengths.len() {
            if end == self.lengths.len() || self.cuts[end - 1] {
                parts.push((first..end, token));
                token += self.lengths[first..end].iter().sum::<i64>();
                first = end;
            }
        }
        parts
    }
}

fn compute(
    batch: &Batch,
    leaf: &Tensor,
    range: std::ops::Range<usize>,
    first: i64,
    level: RatioLevel,
    reduction: Reduction,
) -> (LossSum, PolicyStats) {
    let lengths = &batch.lengths[range];
    let n = lengths.iter().sum::<i64>();
    let offsets = Offsets::from_lengths(lengths).unwrap();
    let part = |x: &Tensor| Ragged::new(x.narrow(0, first, n), offsets.clone()).unwrap();
    let column = |i: usize| part(&from_slice(&batch.columns[i]));
    let (logprobs, old, advantages, reference, weights) =
        (part(leaf), column(1), column(2), column(3), column(4));
    let penalty = KlPenalty {
        estimator: KlEstimator::K3,
        placement: KlPlacement::InLoss,
        coef: 0.1,
    };
    let inputs = PolicyInputs {
        weights: Some(&weights),
        kl: Some(KlTerm {
            exact: None,
            ref_logprobs: &reference,
            penalty,
        }),
        entropy: Some(&weights),
        ..PolicyInputs::new(&logprobs, &old, &advantages)
    };
    let out = clipped::surrogate(
        &inputs,
        Clip {
            epsilon_low: 0.2,
            epsilon_high: 0.3,
            dual: Some(3.0),
        },
        level,
        reduction,
    )
    .unwrap();
    (out.loss, out.stats)
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-10 * a.abs().max(b.abs()).max(1.0)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// A step's gradient does not depend on how it is split.
    #[test]
    fn any_split_gives_the_same_step(batch in batch()) {
        for level in [RatioLevel::Token, RatioLevel::SequenceMean] {
            for reduction in [Reduction::Token {}, Reduction::Sequence {}, Reduction::FixedLength { length: 7 }] {
                let leaf = from_slice(&batch.columns[0]).set_requires_grad(true);
                let (whole, whole_stats) = compute(&batch, &leaf, 0..batch.lengths.len(), 0, level, reduction);
                let mut sum = Tensor::zeros([], (Kind::Double, device()));
                let (mut weight, mut stats) = (0.0, PolicyStats::default());
                for (range, first) in batch.parts() {
                    let (loss, s) = compute(&batch, &leaf, range, first, level, reduction);
                    sum += loss.sum;
                    weight += loss.weight;
                    stats.merge(&s);
                }
                prop_assert!(near(weight, whole.weight));
                prop_assert!(near(sum.double_value(&[]), whole.sum.double_value(&[])));
                let apart = (gradient(&sum, &leaf) - gradient(&whole.sum, &leaf)).abs();
                prop_assert!(apart.numel() == 0 || apart.max().double_value(&[]) < 1e-9);
                for (a, b) in [
                    (stats.clip_fraction_low(), whole_stats.clip_fraction_low()),
                    (stats.clip_fraction_high(), whole_stats.clip_fraction_high()),
                    (stats.ratio_mean(), whole_stats.ratio_mean()),
                    (stats.ratio_max, whole_stats.ratio_max),
                    (stats.approx_kl(), whole_stats.approx_kl()),
                    (stats.kl(), whole_stats.kl()),
                    (stats.entropy(), whole_stats.entropy()),
                ] {
                    prop_assert!(near(a, b), "{a} {b}");
                }
            }
        }
    }

    #[test]
    fn any_split_gives_the_same_value_loss(batch in batch()) {
        let whole = |range: std::ops::Range<usize>, first: i64| {
            let lengths = &batch.lengths[range];
            let offsets = Offsets::from_lengths(lengths).unwrap();
            let column = |i: usize| Ragged::new(from_slice(&batch.columns[i]).narrow(0, first, offsets.num_values()), offsets.clone()).unwrap();
            let (values, old_values, returns) = (column(0), column(1), column(2));
            ppo::value_loss(&ValueInputs { values: &values, old_values: &old_values, returns: &returns }, Some(0.3)).unwrap()
        };
        let all = whole(0..batch.lengths.len(), 0);
        let mut stats = ppo::ValueStats::default();
        let mut sum = 0.0;
        for (range, first) in batch.parts() {
            let part = whole(range, first);
            sum += part.loss.sum.double_value(&[]);
            stats.merge(&part.stats);
        }
        prop_assert!(near(sum, all.loss.sum.double_value(&[])));
        prop_assert!(near(stats.tokens, all.loss.weight));
        prop_assert!(near(stats.explained_variance(), all.stats.explained_variance()));
    }

    /// Adding a constant to a prompt's rewards changes no advantage; advantages of a group sum to 0.
    #[test]
    fn only_differences_of_rewards_count(rewards in prop::collection::vec(-5.0f64..5.0, 6), shift in -1e3f64..1e3) {
        for estimator in [
            AdvantageEstimator::GroupNormalized { std_epsilon: 1e-4, scope: StdScope::Group },
            AdvantageEstimator::GroupCentered {},
            AdvantageEstimator::LeaveOneOut {},
        ] {
            let a = estimator.advantages(&rewards, &[4, 2]).unwrap();
            let moved: Vec<f64> = rewards.iter().map(|r| r + shift).collect();
            let b = estimator.advantages(&moved, &[4, 2]).unwrap();
            prop_assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-8), "{a:?} {b:?}");
            prop_assert!(a[..4].iter().sum::<f64>().abs() < 1e-12 && (a[4] + a[5]).abs() < 1e-12);
        }
    }

    /// However large, equal rewards carry exactly nothing.
    #[test]
    fn equal_rewards_carry_nothing(reward in -1e12f64..1e12, n in 1usize..9) {
        let normalised = AdvantageEstimator::GroupNormalized { std_epsilon: 0.0, scope: StdScope::Group };
        for estimator in [normalised, AdvantageEstimator::GroupCentered {}, AdvantageEstimator::LeaveOneOut {}] {
            prop_assert_eq!(estimator.advantages(&vec![reward; n], &[n]).unwrap(), vec![0.0; n]);
        }
    }
}
