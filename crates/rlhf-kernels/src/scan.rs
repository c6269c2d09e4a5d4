//! Scans over each completion: generalised advantages, discounted returns, running sums.
//!
//! On the CPU sequences run in parallel and each is one pass in f64; on other devices a scan doubles its
//! reach, log₂ of the longest sequence times, and never waits for the host.

use crate::error::{Result, ensure};
use crate::ffi;
use crate::ragged::Ragged;

/// Generalised advantage estimation (Schulman et al. 2016, equation 16) over each sequence, which ends
/// in a terminal state: δ_t = r_t + γV_{t+1} − V_t, A_t = δ_t + γλA_{t+1}. Gives (advantages,
/// returns = advantages + values).
///
/// # Shapes
/// Both arguments and both results hold M values in the same S sequences; no gradients.
///
/// # Errors
/// When the offsets differ, or devices or types do not fit.
pub fn gae(rewards: &Ragged, values: &Ragged, gamma: f64, lambda: f64) -> Result<(Ragged, Ragged)> {
    ensure(rewards.offsets() == values.offsets(), "gae", || {
        "rewards and values have different offsets".into()
    })?;
    let (r, v) = (rewards.values(), values.values());
    ensure(r.device() == v.device(), "gae", || {
        format!(
            "rewards are on {:?} and values on {:?}",
            r.device(),
            v.device()
        )
    })?;
    let (a, g) = ffi::gae(r, v, rewards.offsets().host(), (gamma, lambda), false)?;
    Ok((rewards.with_values(a)?, rewards.with_values(g)?))
}

/// Discounted returns G_t = r_t + γG_{t+1} over each sequence.
///
/// # Shapes
/// As the argument; no gradients.
///
/// # Errors
/// When libtorch fails.
pub fn discounted_returns(rewards: &Ragged, gamma: f64) -> Result<Ragged> {
    scan(
        &rewards.with_values(rewards.values().detach())?,
        gamma,
        Direction::Backward,
    )
}

/// Which neighbour a scan takes up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// y_t = x_t + a·y_{t−1}.
    Forward,
    /// y_t = x_t + a·y_{t+1}.
    Backward,
}

/// The linear scan y_t = x_t + decay·y_{t∓1} within each sequence; with a decay of 1 the running sum.
///
/// # Shapes
/// As the argument; differentiable, to any order: the gradient of a scan is the scan in the other direction.
///
/// # Errors
/// When libtorch fails.
pub fn scan(x: &Ragged, decay: f64, direction: Direction) -> Result<Ragged> {
    let reverse = direction == Direction::Backward;
    x.with_values(ffi::scan(x.values(), x.offsets().host(), decay, reverse)?)
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

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

    /// The way of other devices: doubling, here over lengths about the powers of two.
    #[test]
    fn doubling_is_the_same() {
        let o = Offsets::from_lengths(&[0, 1, 2, 3, 4, 5, 0, 8, 9, 33, 0]).unwrap();
        let wave = |step: f64| {
            let n = Tensor::arange(o.num_values(), (tch::Kind::Double, tch::Device::Cpu));
            (n * step).sin()
        };
        let (r, v) = (wave(0.7), wave(1.9));
        let run = |doubling| ffi::gae(&r, &v, o.host(), (0.97, 0.9), doubling).unwrap();
        let ((a, g), (b, h)) = (run(false), run(true));
        assert!(
            (a - b).abs().max().double_value(&[]) < 1e-13
                && (g - h).abs().max().double_value(&[]) < 1e-13
        );
        // Half precision takes it too; whole numbers make it exact.
        let narrow = Tensor::ones([o.num_values()], (tch::Kind::Half, tch::Device::Cpu));
        let x = Ragged::new(narrow, o.clone()).unwrap();
        for direction in [Direction::Forward, Direction::Backward] {
            let y = scan(&x, 1.0, direction).unwrap();
            let expected: Vec<f64> = o
                .host_lengths()
                .iter()
                .flat_map(|&n| {
                    (1..=n).map(move |i| match direction {
                        Direction::Forward => i as f64,
                        Direction::Backward => (n + 1 - i) as f64,
                    })
                })
                .collect();
            let y = Vec::<f64>::try_from(y.values().to_kind(tch::Kind::Double)).unwrap();
            assert_eq!(y, expected);
        }
    }
}
