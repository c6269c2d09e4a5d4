//! The Bradley–Terry loss: scores whose differences are the log-odds of being preferred.
//!
//! Invariant: only differences of scores matter, except to the centring term, which pins their mean.

use rlhf_kernels::LossSum;
use tch::{Kind, Tensor};

use crate::checks::{self, at_least_f32, weighted};
use crate::error::{Result, ensure};

const OP: &str = "bradley_terry";

/// Settings of [`loss`]; the default is the plain loss.
#[derive(Clone, Copy, Debug, Default)]
pub struct BradleyTerry<'a> {
    /// `[P]` m, by how much the chosen should lead; 0 where absent.
    pub margin: Option<&'a Tensor>,
    /// `[P]` w, the weight of each pair, not negative; 1 where absent. All pairs of a prompt with K
    /// completions at 1/C(K,2) make each prompt count once: [`Pairs`](crate::pairs::Pairs).
    pub weights: Option<&'a Tensor>,
    /// `[P]` p, the probability that the chosen is preferred; 1 where absent, ½ for a tie, whose
    /// margin is to be 0.
    pub preference: Option<&'a Tensor>,
    /// c, the weight of (r_c + r_r)², which keeps rewards centred.
    pub centering: f64,
    /// ε, the probability that a label is wrong, in [0, ½).
    pub label_smoothing: f64,
}

/// L = Σ w · [−q log σ(d) − (1−q) log σ(−d) + c (r_c + r_r)²], d = r_c − r_r − m, q = p (1−2ε) + ε; its
/// weight is Σ w.
///
/// Bradley and Terry 1952; with weights 1/C(K,2) Ouyang et al. 2022 (arXiv 2203.02155), equation 1;
/// the margin is Touvron et al. 2023 (arXiv 2307.09288), equation 2; the centring term is Eisenstein
/// et al. 2023 (arXiv 2312.09244); p = ½ for a tie is Nakano et al. 2021 (arXiv 2112.09332). A tie as an
/// outcome of its own (Rao and Kupper 1967) is [`ordinal`](crate::ordinal).
///
/// # Shapes
/// `chosen` and `rejected` `[P]` scores; likewise margin, weights and preference.
///
/// # Errors
/// When shapes differ, a margin is not finite, a weight is negative or not finite, a preference is no
/// probability, or a setting is outside its range; the message names the row.
///
/// # Deviations
/// None. TRL's `RewardTrainer` has the same loss without ε, p and w.
pub fn loss(chosen: &Tensor, rejected: &Tensor, settings: &BradleyTerry<'_>) -> Result<LossSum> {
    let BradleyTerry {
        margin,
        weights,
        preference,
        centering,
        label_smoothing,
    } = *settings;
    checks::vectors(
        OP,
        &[
            ("chosen", Some(chosen)),
            ("rejected", Some(rejected)),
            ("margin", margin),
            ("weights", weights),
            ("preference", preference),
        ],
    )?;
    ensure(centering >= 0.0 && centering.is_finite(), OP, || {
        format!("centering is {centering}, expected 0 or more")
    })?;
    ensure((0.0..0.5).contains(&label_smoothing), OP, || {
        format!("label_smoothing is {label_smoothing}, expected 0 <= label_smoothing < 0.5")
    })?;
    checks::weights(OP, weights)?;
    let (chosen, rejected) = (at_least_f32(chosen), at_least_f32(rejected));
    let lead = &chosen - &rejected;
    let gap = match margin {
        Some(m) => {
            checks::finite(OP, "margin", m)?;
            lead - m.detach().to_kind(chosen.kind())
        }
        None => lead,
    };
    let right = -gap.log_sigmoid();
    let smoothed = 1.0 - 2.0 * label_smoothing;
    let labelled = match preference {
        Some(p) => {
            checks::probabilities(OP, "preference", p)?;
            let p = p.detach().to_kind(chosen.kind()) * smoothed + label_smoothing;
            &p * right - (1.0 - &p) * (-&gap).log_sigmoid()
        }
        None if label_smoothing > 0.0 => {
            right * (1.0 - label_smoothing) - (-&gap).log_sigmoid() * label_smoothing
        }
        None => right,
    };
    let losses = if centering > 0.0 {
        labelled + (&chosen + &rejected).square() * centering
    } else {
        labelled
    };
    Ok(weighted(&losses, weights))
}

/// [`loss`] of pairs given as indices of completions: K completions of a prompt are scored once and
/// may form many pairs.
///
/// # Shapes
/// `scores` `[S]`; `chosen` and `rejected` i64 `[P]`, each in 0..S.
///
/// # Errors
/// As [`loss`]; also when an index is not i64 or outside the scores.
pub fn loss_of_pairs(
    scores: &Tensor,
    chosen: &Tensor,
    rejected: &Tensor,
    settings: &BradleyTerry<'_>,
) -> Result<LossSum> {
    ensure(scores.dim() == 1, OP, || {
        format!("scores are {:?}, expected [S]", scores.size())
    })?;
    for index in [chosen, rejected] {
        ensure(index.dim() == 1 && index.kind() == Kind::Int64, OP, || {
            format!(
                "an index is {:?} {:?}, expected Int64 [P]",
                index.kind(),
                index.size()
            )
        })?;
    }
    loss(
        &scores.f_index_select(0, chosen)?,
        &scores.f_index_select(0, rejected)?,
        settings,
    )
}

/// How a batch of pairs is ordered by its scores.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PairStats {
    /// How many pairs.
    pub pairs: f64,
    /// How many of them have the chosen ahead.
    pub right: f64,
    /// How many have equal scores.
    pub tied: f64,
    /// Σ (r_c − r_r).
    pub margin: f64,
}

impl PairStats {
    /// Of the scores of pairs, without gradients.
    ///
    /// # Shapes
    /// `chosen` and `rejected` `[P]`.
    ///
    /// # Errors
    /// When shapes differ.
    pub fn of(chosen: &Tensor, rejected: &Tensor) -> Result<Self> {
        checks::vectors(
            OP,
            &[("chosen", Some(chosen)), ("rejected", Some(rejected))],
        )?;
        let gap = (chosen.detach() - rejected.detach()).to_kind(Kind::Double);
        let count = |mask: Tensor| mask.sum(Kind::Double).double_value(&[]);
        Ok(Self {
            pairs: gap.numel() as f64,
            right: count(gap.gt(0.0)),
            tied: count(gap.eq(0.0)),
            margin: gap.sum(Kind::Double).double_value(&[]),
        })
    }

    /// Adds another batch's.
    pub fn add(&mut self, other: &Self) {
        self.pairs += other.pairs;
        self.right += other.right;
        self.tied += other.tied;
        self.margin += other.margin;
    }

    /// The share of pairs in the right order; a tie is half right.
    #[must_use]
    pub fn accuracy(&self) -> f64 {
        (self.right + 0.5 * self.tied) / self.pairs.max(1.0)
    }

    /// The mean of r_c − r_r.
    #[must_use]
    pub fn mean_margin(&self) -> f64 {
        self.margin / self.pairs.max(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(settings: &BradleyTerry<'_>) -> f64 {
        loss(
            &Tensor::from_slice(&[2.0]),
            &Tensor::from_slice(&[0.5]),
            settings,
        )
        .unwrap()
        .sum
        .double_value(&[])
    }

    #[test]
    fn by_hand() {
        // d = 1.5: -log σ(1.5) = ln(1 + e^-1.5) = .20141328; -log σ(-1.5) is 1.5 more.
        let plain = 0.201_413_277_982_752_4;
        assert!((value(&BradleyTerry::default()) - plain).abs() < 1e-15);
        // A margin of 1.5 leaves d = 0: ln 2.
        let margin = Tensor::from_slice(&[1.5]);
        let with = BradleyTerry {
            margin: Some(&margin),
            ..BradleyTerry::default()
        };
        assert!((value(&with) - std::f64::consts::LN_2).abs() < 1e-15);
        // (2 + .5)² = 6.25.
        let centred = BradleyTerry {
            centering: 0.01,
            ..BradleyTerry::default()
        };
        assert!((value(&centred) - plain - 0.0625).abs() < 1e-15);
        let smooth = BradleyTerry {
            label_smoothing: 0.2,
            ..BradleyTerry::default()
        };
        assert!((value(&smooth) - (0.8 * plain + 0.2 * (plain + 1.5))).abs() < 1e-15);
        // A tie: ½ ln(1 + e^-1.5) + ½ ln(1 + e^1.5).
        let tie = Tensor::from_slice(&[0.5]);
        let tied = BradleyTerry {
            preference: Some(&tie),
            ..BradleyTerry::default()
        };
        assert!((value(&tied) - (plain + 0.75)).abs() < 1e-15);
        let weight = Tensor::from_slice(&[0.25]);
        let weighted = BradleyTerry {
            weights: Some(&weight),
            ..BradleyTerry::default()
        };
        assert!((value(&weighted) - 0.25 * plain).abs() < 1e-15);
    }

    #[test]
    fn weights_sum_to_the_weight() {
        let (c, r) = (
            Tensor::from_slice(&[1.0, 0.0]),
            Tensor::from_slice(&[0.0, 1.0]),
        );
        let w = Tensor::from_slice(&[0.5, 1.25]);
        assert_eq!(
            loss(
                &c,
                &r,
                &BradleyTerry {
                    weights: Some(&w),
                    ..BradleyTerry::default()
                }
            )
            .unwrap()
            .weight,
            1.75
        );
        assert_eq!(loss(&c, &r, &BradleyTerry::default()).unwrap().weight, 2.0);
    }

    #[test]
    fn a_tie_is_half_right() {
        let (c, r) = (
            Tensor::from_slice(&[1.0, 0.0, 2.0]),
            Tensor::from_slice(&[0.0, 1.5, 2.0]),
        );
        let mut stats = PairStats::of(&c, &r).unwrap();
        assert_eq!((stats.right, stats.tied), (1.0, 1.0));
        assert_eq!(stats.accuracy(), 0.5);
        // 1 − 1.5 + 0.
        assert_eq!(stats.margin, -0.5);
        stats.add(&PairStats::of(&c.narrow(0, 0, 1), &r.narrow(0, 0, 1)).unwrap());
        assert_eq!(stats.accuracy(), 0.625);
        assert_eq!(stats.mean_margin(), 0.125);
    }

    #[test]
    fn bad_arguments_are_named() {
        let (c, r) = (Tensor::from_slice(&[1.0, 0.0]), Tensor::from_slice(&[0.0]));
        let message =
            |c: &Tensor, r: &Tensor, s: &BradleyTerry<'_>| loss(c, r, s).unwrap_err().to_string();
        assert!(message(&c, &r, &BradleyTerry::default()).contains("rejected: Double [1]"));
        let nan = Tensor::from_slice(&[0.0, f64::NAN]);
        assert!(
            message(
                &c,
                &c,
                &BradleyTerry {
                    margin: Some(&nan),
                    ..BradleyTerry::default()
                }
            )
            .contains("margin[1] is NaN")
        );
        let less = Tensor::from_slice(&[1.0, -1.0]);
        assert!(
            message(
                &c,
                &c,
                &BradleyTerry {
                    weights: Some(&less),
                    ..BradleyTerry::default()
                }
            )
            .contains("weights[1] is -1")
        );
        assert!(
            message(
                &c,
                &c,
                &BradleyTerry {
                    centering: -1.0,
                    ..BradleyTerry::default()
                }
            )
            .contains("centering")
        );
        let far = Tensor::from_slice(&[7i64]);
        assert!(loss_of_pairs(&c, &far, &far, &BradleyTerry::default()).is_err());
    }
}
