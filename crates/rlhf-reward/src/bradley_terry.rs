//! The Bradley–Terry loss: scores whose differences are the log-odds of being preferred.
//!
//! Invariant: only differences of scores matter, except to the centring term, which pins their mean.

use rlhf_kernels::LossSum;
use tch::{Kind, Tensor};

use crate::error::{Result, ensure};

const OP: &str = "bradley_terry";

/// Settings of [`loss`]; the default is the plain loss.
#[derive(Clone, Copy, Debug, Default)]
pub struct BradleyTerry<'a> {
    /// `[P]` m, by how much the chosen should lead; 0 where absent.
    pub margin: Option<&'a Tensor>,
    /// `[P]` w, the weight of each pair, not negative; 1 where absent. All pairs of a prompt with K
    /// completions at 1/C(K,2) make each prompt count once.
    pub weights: Option<&'a Tensor>,
    /// c, the weight of (r_c + r_r)², which keeps rewards centred.
    pub centering: f64,
    /// ε, the probability that a label is wrong, in [0, ½).
    pub label_smoothing: f64,
}

/// L = Σ w · [−(1−ε) log σ(d) − ε log σ(−d) + c (r_c + r_r)²], d = r_c − r_r − m; its weight is Σ w.
///
/// Bradley and Terry 1952; with weights 1/C(K,2) Ouyang et al. 2022 (arXiv 2203.02155), equation 1;
/// the margin is Touvron et al. 2023 (arXiv 2307.09288), equation 2; the centring term is Eisenstein
/// et al. 2023 (arXiv 2312.09244).
///
/// # Shapes
/// `chosen` and `rejected` `[P]` scores; likewise margin and weights.
///
/// # Errors
/// When shapes differ, a margin is not finite, a weight is negative or not finite, or a setting is
/// outside its range.
///
/// # Deviations
/// None. TRL's `RewardTrainer` has the same loss without ε and w.
pub fn loss(chosen: &Tensor, rejected: &Tensor, settings: &BradleyTerry<'_>) -> Result<LossSum> {
    let BradleyTerry {
        margin,
        weights,
        centering,
        label_smoothing,
    } = *settings;
    for (name, t) in [
        ("chosen", Some(chosen)),
        ("rejected", Some(rejected)),
        ("margin", margin),
        ("weights", weights),
    ] {
        let Some(t) = t else { continue };
        ensure(
            t.dim() == 1 && t.size() == chosen.size() && t.is_floating_point(),
            OP,
            || {
                format!(
                    "{name}: {:?} {:?}, expected floating point [P] as the chosen's {:?}",
                    t.kind(),
                    t.size(),
                    chosen.size()
                )
            },
        )?;
    }
    ensure(centering >= 0.0 && centering.is_finite(), OP, || {
        format!("centering is {centering}, expected 0 or more")
    })?;
    ensure((0.0..0.5).contains(&label_smoothing), OP, || {
        format!("label_smoothing is {label_smoothing}, expected 0 <= label_smoothing < 0.5")
    })?;
    let (chosen, rejected) = (at_least_f32(chosen), at_least_f32(rejected));
    let lead = &chosen - &rejected;
    let gap = match margin {
        Some(m) => {
            ensure(all(&m.isfinite()), OP, || "a margin is not finite".into())?;
            lead - m.detach().to_kind(chosen.kind())
        }
        None => lead,
    };
    let right = -gap.log_sigmoid();
    let labelled = if label_smoothing > 0.0 {
        right * (1.0 - label_smoothing) - (-&gap).log_sigmoid() * label_smoothing
    } else {
        right
    };
    let losses = if centering > 0.0 {
        labelled + (&chosen + &rejected).square() * centering
    } else {
        labelled
    };
    let Some(w) = weights else {
        return Ok(LossSum {
            sum: losses.sum(None),
            weight: losses.numel() as f64,
        });
    };
    ensure(all(&w.isfinite().logical_and(&w.ge(0.0))), OP, || {
        "a weight is negative or not finite".into()
    })?;
    let sum = (losses * w.detach().to_kind(chosen.kind())).sum(None);
    Ok(LossSum {
        sum,
        weight: w.sum(Kind::Double).double_value(&[]),
    })
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

fn all(mask: &Tensor) -> bool {
    mask.all().int64_value(&[]) != 0
}

/// f16 and bf16 become f32; the graph is kept.
fn at_least_f32(x: &Tensor) -> Tensor {
    if matches!(x.kind(), Kind::Half | Kind::BFloat16) {
        x.to_kind(Kind::Float)
    } else {
        x.shallow_clone()
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
            .contains("margin")
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
            .contains("weight")
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
