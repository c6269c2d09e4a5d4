//! Reverse scans over each completion: generalised advantages and discounted returns.

use tch::{Kind, Tensor};

use crate::error::{Result, ensure};
use crate::ragged::Ragged;

/// Generalised advantage estimation (Schulman et al. 2016, equation 16) over each sequence, which ends
/// in a terminal state: δ_t = r_t + γV_{t+1} − V_t, A_t = δ_t + γλA_{t+1}. Gives (advantages,
/// returns = advantages + values).
///
/// # Shapes
/// Both arguments and both results hold M values in the same S sequences; no gradients.
///
/// # Errors
/// When the offsets differ.
pub fn gae(rewards: &Ragged, values: &Ragged, gamma: f64, lambda: f64) -> Result<(Ragged, Ragged)> {
    ensure(rewards.offsets() == values.offsets(), "gae", || {
        "rewards and values have different offsets".into()
    })?;
    let (r, v) = (host(rewards)?, host(values)?);
    let mut advantages = vec![0.0; r.len()];
    for w in rewards.offsets().host().windows(2) {
        let (mut next_value, mut next_advantage) = (0.0, 0.0);
        for t in (w[0] as usize..w[1] as usize).rev() {
            let delta = r[t] + gamma * next_value - v[t];
            next_advantage = delta + gamma * lambda * next_advantage;
            next_value = v[t];
            advantages[t] = next_advantage;
        }
    }
    let returns: Vec<f64> = advantages.iter().zip(&v).map(|(a, v)| a + v).collect();
    Ok((like(rewards, &advantages)?, like(rewards, &returns)?))
}

/// Discounted returns G_t = r_t + γG_{t+1} over each sequence.
///
/// # Shapes
/// As the argument; no gradients.
///
/// # Errors
/// When libtorch fails.
pub fn discounted_returns(rewards: &Ragged, gamma: f64) -> Result<Ragged> {
    let r = host(rewards)?;
    let mut returns = vec![0.0; r.len()];
    for w in rewards.offsets().host().windows(2) {
        let mut next = 0.0;
        for t in (w[0] as usize..w[1] as usize).rev() {
            next = r[t] + gamma * next;
            returns[t] = next;
        }
    }
    like(rewards, &returns)
}

fn host(x: &Ragged) -> Result<Vec<f64>> {
    Ok(Vec::<f64>::try_from(
        &x.values()
            .detach()
            .to_kind(Kind::Double)
            .to_device(tch::Device::Cpu),
    )?)
}

fn like(x: &Ragged, values: &[f64]) -> Result<Ragged> {
    x.with_values(
        Tensor::from_slice(values)
            .to_kind(x.values().kind())
            .to_device(x.values().device()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ragged::Offsets;

    #[test]
    fn gae_by_hand() {
        let o = Offsets::new(vec![0, 2, 3]).unwrap();
        let r = Ragged::new(Tensor::from_slice(&[0f64, 1., 2.]), o.clone()).unwrap();
        let v = Ragged::new(Tensor::from_slice(&[0.5f64, 0.25, 1.]), o).unwrap();
        // δ₁ = 1 − .25 = .75; δ₀ = .9·.25 − .5 = −.275; A₀ = −.275 + .9·.5·.75 = .0625.
        let (a, g) = gae(&r, &v, 0.9, 0.5).unwrap();
        let a = Vec::<f64>::try_from(a.values()).unwrap();
        assert!(
            (a[0] - 0.0625).abs() < 1e-12
                && (a[1] - 0.75).abs() < 1e-12
                && (a[2] - 1.0).abs() < 1e-12
        );
        assert!((g.values().double_value(&[0]) - 0.5625).abs() < 1e-12);
        let d = discounted_returns(&r, 0.5).unwrap();
        assert_eq!(Vec::<f64>::try_from(d.values()).unwrap(), [0.5, 1.0, 2.0]);
    }
}
