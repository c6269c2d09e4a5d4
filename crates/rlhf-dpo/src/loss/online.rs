//! What online methods add to the losses of pairs: XPO's exploration, Nash-MD's policy gradient.

use rlhf_kernels::LossSum;
use tch::Tensor;

use super::checks::{not_negative, positive};
use super::pairs::at_least_f32;
use crate::error::{Result, ensure};

/// XPO's bonus: L = α log π(ỹ) of completions ỹ that the reference drew.
///
/// Xie et al. 2024 (arXiv 2405.21046), algorithm 1: beside DPO's loss on pairs of which one side is drawn by the
/// policy. In expectation it is −α KL(π₀‖π) and a constant: descending moves the policy away from where the
/// reference already is.
///
/// # Shapes
/// `logprobs` `[P]`, sums over completions; the weight is P.
///
/// # Errors
/// When `alpha` is negative, or `logprobs` is no floating-point `[P]`.
pub fn exploration(logprobs: &Tensor, alpha: f64) -> Result<LossSum> {
    not_negative("online::exploration", "alpha", alpha)?;
    columns("online::exploration", &[logprobs])?;
    Ok(LossSum {
        sum: at_least_f32(logprobs).sum(None) * alpha,
        weight: logprobs.numel() as f64,
    })
}

/// Nash-MD's policy gradient: L = −sg(P(y ≻ y′) − ½ − τ log π(y)/π₀(y)) log π(y), y of the policy, y′ of the
/// geometric mixture of policy and reference.
///
/// Munos et al. 2023 (arXiv 2312.00886), section 7. Its expected gradient is that of −P(π ≻ π′) + τ KL(π‖π₀)
/// with the opponent π′ held fixed; the baseline ½ changes nothing but the variance.
///
/// # Shapes
/// `[P]` three times: sums over completions y, and how likely y is preferred to y′, 0 to 1. The weight is P.
///
/// # Errors
/// When shapes differ, `tau` is not above 0, or a preference is outside 0 to 1.
pub fn nash_md(
    logprobs: &Tensor,
    ref_logprobs: &Tensor,
    preferred: &Tensor,
    tau: f64,
) -> Result<LossSum> {
    let op = "online::nash_md";
    positive(op, "tau", tau)?;
    columns(op, &[logprobs, ref_logprobs, preferred])?;
    let (least, most) = (preferred.min(), preferred.max());
    ensure(
        least.double_value(&[]) >= 0.0 && most.double_value(&[]) <= 1.0,
        op,
        || "a preference is outside 0 to 1".into(),
    )?;
    let logprobs = at_least_f32(logprobs);
    let ratios = (&logprobs - at_least_f32(ref_logprobs)).detach();
    let advantage = preferred.detach() - 0.5 - ratios * tau;
    Ok(LossSum {
        sum: -(advantage * &logprobs).sum(None),
        weight: logprobs.numel() as f64,
    })
}

fn columns(op: &'static str, all: &[&Tensor]) -> Result<()> {
    let size = all[0].size();
    let fit = |t: &&Tensor| t.dim() == 1 && t.size() == size && t.is_floating_point();
    ensure(all.iter().all(fit) && size[0] > 0, op, || {
        let found: Vec<_> = all.iter().map(|t| (t.kind(), t.size())).collect();
        format!("columns are {found:?}, expected floating point of one [P] above 0")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let own = Tensor::from_slice(&[-1.0, -3.0]).set_requires_grad(true);
        let bonus = exploration(&own, 0.5).unwrap();
        assert_eq!((bonus.sum.double_value(&[]), bonus.weight), (-2.0, 2.0));
        let base = Tensor::from_slice(&[-2.0, -2.0]);
        let preferred = Tensor::from_slice(&[1.0, 0.25]);
        let loss = nash_md(&own, &base, &preferred, 0.1).unwrap();
        // Advantages ½ − 0.1 and −¼ + 0.1.
        loss.sum.backward();
        let gradient = Vec::<f64>::try_from(&own.grad()).unwrap();
        assert!((gradient[0] + 0.4).abs() < 1e-15 && (gradient[1] - 0.15).abs() < 1e-15);
        assert!(nash_md(&own, &base, &(preferred + 1.0), 0.1).is_err());
        assert!(exploration(&base, -1.0).is_err());
    }
}
