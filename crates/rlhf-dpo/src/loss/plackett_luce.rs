//! DPO of rankings: K completions of one prompt in order.

use rlhf_kernels::{LossSum, Ragged};
use tch::{Kind, Tensor};

use super::checks::positive;
use super::pairs::at_least_f32;
use crate::error::{Result, ensure};

/// What [`plackett_luce`] gives.
#[derive(Debug)]
pub struct RankedOutput {
    /// Sum over prompts; the weight is their number.
    pub loss: LossSum,
    /// The loss of each prompt's ranking, `[G]`, with its graph.
    pub losses: Tensor,
    /// Implicit rewards βΔ of all completions, `[S]`, without a graph.
    pub rewards: Tensor,
}

/// DPO under the Plackett–Luce model: L = Σ_k (log Σ_{j≥k} e^{βΔ_j} − βΔ_k), best first.
///
/// Rafailov et al. 2023 (arXiv 2305.18290), appendix A.3. Of two completions it is
/// [`sigmoid`](super::dpo::sigmoid); of one it is 0.
///
/// # Shapes
/// `ratios` are Δ of S completions with the offsets of their G prompts, in each prompt the best first;
/// losses `[G]`, rewards `[S]`.
///
/// # Errors
/// When `beta` is not above 0, or `ratios` are not floating point.
pub fn plackett_luce(ratios: &Ragged, beta: f64) -> Result<RankedOutput> {
    positive("plackett_luce", "beta", beta)?;
    let deltas = ratios.values();
    ensure(deltas.is_floating_point(), "plackett_luce", || {
        format!(
            "log-ratios are {:?}, expected floating point",
            deltas.kind()
        )
    })?;
    let rewards = ratios.with_values(at_least_f32(deltas) * beta)?;
    // Far below every reward and yet finite, so that no gradient is 0 times infinity.
    let padded = rewards.to_padded(-1e30);
    let longest = padded.size()[1];
    let present = rewards
        .with_values(rewards.values().ones_like())?
        .to_padded(0.0);
    let groups = ratios.offsets().num_segments();
    let mut losses = Tensor::zeros([groups], (padded.kind(), padded.device()));
    for k in 0..longest {
        let rest = padded.slice(1, k, None, 1).logsumexp(&[1i64][..], false);
        let here = present.select(1, k).to_kind(Kind::Bool);
        let lead = (rest - padded.select(1, k)).where_self(&here, &losses.zeros_like());
        losses += lead;
    }
    Ok(RankedOutput {
        loss: LossSum {
            sum: losses.sum(None),
            weight: losses.numel() as f64,
        },
        losses,
        rewards: rewards.values().detach(),
    })
}

/// The losses of rankings by name.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)
)]
#[non_exhaustive]
pub enum RankedLoss {
    /// [`plackett_luce`].
    PlackettLuce {
        /// Strength of the reference.
        beta: f64,
    },
}

impl RankedLoss {
    /// Computes the loss.
    ///
    /// # Errors
    /// As [`plackett_luce`].
    pub fn compute(&self, ratios: &Ragged) -> Result<RankedOutput> {
        match *self {
            Self::PlackettLuce { beta } => plackett_luce(ratios, beta),
        }
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// As [`plackett_luce`] where settings are at fault.
    pub fn check(&self) -> Result<()> {
        match *self {
            Self::PlackettLuce { beta } => positive("plackett_luce", "beta", beta),
        }
    }
}

#[cfg(test)]
mod tests {
    use rlhf_kernels::Offsets;

    use super::*;

    #[test]
    fn by_hand() {
        // βΔ = ln 1, ln 2, ln 3 ; then one alone ; then ln 3, ln 1; then none.
        let ratios = Tensor::from_slice(&[0.0, 2f64.ln(), 3f64.ln(), 5.0, 3f64.ln(), 0.0]) * 2.0;
        let ratios = ratios.set_requires_grad(true);
        let offsets = Offsets::new(vec![0, 3, 4, 6, 6]).unwrap();
        let ranked = Ragged::new(ratios.shallow_clone(), offsets).unwrap();
        let out = plackett_luce(&ranked, 0.5).unwrap();
        // 1/6 · 2/5 · 1, 1, 3/4, and nothing.
        let expected = [15f64.ln(), 0.0, (4f64 / 3.0).ln(), 0.0];
        for (i, e) in expected.iter().enumerate() {
            let got = out.losses.double_value(&[i as i64]);
            assert!((got - e).abs() < 1e-15, "{got} against {e}");
        }
        assert_eq!(out.loss.weight, 4.0);
        assert!((out.rewards.double_value(&[3]) - 5.0).abs() < 1e-15);
        out.loss.sum.backward();
        // The one alone has no gradient; the pair has that of DPO, β(1 - 3/4).
        let gradient = Vec::<f64>::try_from(&ratios.grad()).unwrap();
        assert_eq!(gradient[3], 0.0);
        assert!((gradient[4] + 0.125).abs() < 1e-15 && (gradient[5] - 0.125).abs() < 1e-15);
        assert!(gradient.iter().all(|g| g.is_finite()));
    }

    #[test]
    fn counts_are_no_log_ratios() {
        let ids = Ragged::new(
            Tensor::from_slice(&[1i64]),
            Offsets::new(vec![0, 1]).unwrap(),
        );
        assert!(plackett_luce(&ids.unwrap(), 0.5).is_err());
    }
}
