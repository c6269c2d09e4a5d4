//! Rewards from comparisons of clips: short stretches of behaviour, of which a person (or a rule) says which is
//! better.
//!
//! Christiano et al. 2017 (arXiv 1706.03741). A network predicts the reward of each step; the clip whose
//! predicted rewards sum to more is likelier to be preferred. Only differences of sums matter, so rewards of
//! clips of one length are known up to a constant. Several networks, each trained on a resample, say by their
//! disagreement what is worth asking next.

use rlhf_kernels::{LossSum, Ragged};
use tch::{Kind, Tensor};

use crate::checks::{self, at_least_f32, weighted};
use crate::error::{Result, ensure};

const OP: &str = "comparisons of clips";

/// Which clips were compared, and how it came out.
#[derive(Clone, Copy, Debug)]
pub struct Comparisons<'a> {
    /// i64 `[P]` the first clip of each comparison, in 0..S.
    pub first: &'a Tensor,
    /// i64 `[P]` the second.
    pub second: &'a Tensor,
    /// `[P]` μ: 1 where the first was preferred, 0 where the second, ½ where they are as good.
    pub preference: &'a Tensor,
    /// `[P]` weights, not negative; 1 where absent.
    pub weights: Option<&'a Tensor>,
}

/// L = −Σ w · [μ log P + (1−μ) log P′], P = (1−e) σ(d) + e/2, P′ = (1−e) σ(−d) + e/2, d = Σ r̂(first) − Σ
/// r̂(second); its weight is Σ w.
///
/// Christiano et al. 2017, section 2.2.3, with the second of its modifications: the labeller answers at random
/// with probability e, 0.1 in the paper, so that no single answer can cost more than −log(e/2). That is not label
/// smoothing, whose cost grows with d without end; at e = 0 it is [`bradley_terry`](crate::bradley_terry::loss) of
/// the sums.
///
/// # Shapes
/// `rewards` are those of the steps of S clips. Differentiable in them.
///
/// # Errors
/// When an index is not i64 or outside the clips, shapes differ, a preference is no probability, a weight is
/// negative, or `error_rate` is not in [0, 1).
pub fn loss(rewards: &Ragged, compared: &Comparisons<'_>, error_rate: f64) -> Result<LossSum> {
    ensure((0.0..1.0).contains(&error_rate), OP, || {
        format!("error_rate is {error_rate}, expected 0 <= error_rate < 1")
    })?;
    let lead = lead(rewards, compared.first, compared.second)?;
    checks::vectors(
        OP,
        &[
            ("leads", Some(&lead)),
            ("preference", Some(compared.preference)),
            ("weights", compared.weights),
        ],
    )?;
    checks::probabilities(OP, "preference", compared.preference)?;
    checks::weights(OP, compared.weights)?;
    let mu = compared.preference.detach().to_kind(lead.kind());
    let log_p = |d: &Tensor| {
        let right = d.log_sigmoid();
        if error_rate == 0.0 {
            return right;
        }
        // log((1−e) σ(d) + e/2) without leaving logarithms.
        let guess = right.full_like((error_rate / 2.0).ln());
        (right + (1.0 - error_rate).ln()).logaddexp(&guess)
    };
    let losses = -(&mu * log_p(&lead)) - (1.0 - &mu) * log_p(&-&lead);
    Ok(weighted(&losses, compared.weights))
}

/// `[P]` d, by how much the first clip's rewards sum to more than the second's; differentiable.
///
/// # Errors
/// When an index is not i64 `[P]` or lies outside the clips.
pub fn lead(rewards: &Ragged, first: &Tensor, second: &Tensor) -> Result<Tensor> {
    for index in [first, second] {
        let right = index.dim() == 1 && index.kind() == Kind::Int64;
        ensure(right && index.size() == first.size(), OP, || {
            format!(
                "an index is {:?} {:?}, expected Int64 [P]",
                index.kind(),
                index.size()
            )
        })?;
    }
    let sums = rewards.with_values(at_least_f32(rewards.values()))?.sum();
    Ok(sums.f_index_select(0, first)? - sums.f_index_select(0, second)?)
}

/// `[P]` how much the K members of an ensemble disagree about each comparison: the variance over members
/// (divisor K) of σ(d), the probability that the first clip is preferred. Those of the highest are asked
/// (section 2.2.4).
///
/// # Shapes
/// `leads` `[K, P]`.
///
/// # Errors
/// Unless `leads` is floating point with two dimensions.
pub fn disagreement(leads: &Tensor) -> Result<Tensor> {
    let right = leads.dim() == 2 && leads.is_floating_point();
    ensure(right, "disagreement", || {
        format!(
            "leads are {:?} {:?}, expected floating point [K, P]",
            leads.kind(),
            leads.size()
        )
    })?;
    let p = leads.detach().sigmoid();
    Ok(p.f_var_correction(&[0i64][..], 0i64, false)?)
}

/// The comparisons that member `member` learns from: a bootstrap resample of `0..n` that grows with the data.
/// Row i is there Poisson(1) times, a function of (seed, member, i): for large n that is drawing n rows with
/// replacement (Oza and Russell 2001, "Online bagging and boosting"), and what was drawn stays when more is
/// compared. The share of e⁻¹ that is not there is the member's validation set, as in the paper.
#[cfg(feature = "train")]
#[must_use]
pub fn resample(seed: u64, member: u32, n: usize) -> Vec<usize> {
    use rlhf_data::seed::{Purpose, Stream};
    let stream = Stream::new(seed, Purpose::Bootstrap);
    let times = |i: usize| {
        let u = stream.uniform(i as u64, member, 0);
        let (mut times, mut p) = (0usize, (-1f64).exp());
        let mut below = p;
        while u > below && times < 20 {
            times += 1;
            p /= times as f64;
            below += p;
        }
        times
    };
    (0..n)
        .flat_map(|i| std::iter::repeat_n(i, times(i)))
        .collect()
}

/// Shift and scale that give predicted rewards mean 0 and deviation 1: the constant that comparisons leave open,
/// and a size that stays the same while the network learns (section 2.2.1).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// Mean.
    pub mean: f64,
    /// Standard deviation; 1 where the rewards do not vary.
    pub std: f64,
}

impl Scale {
    /// The scale of `rewards`.
    #[must_use]
    pub fn of(rewards: &Tensor) -> Self {
        let x = rewards.detach().to_kind(Kind::Double);
        if x.numel() == 0 {
            return Self {
                mean: 0.0,
                std: 1.0,
            };
        }
        let mean = x.mean(Kind::Double).double_value(&[]);
        let std = (&x - mean)
            .square()
            .mean(Kind::Double)
            .sqrt()
            .double_value(&[]);
        Self {
            mean,
            std: if std > 1e-8 { std } else { 1.0 },
        }
    }

    /// (r − mean)/std.
    pub fn apply(&self, rewards: &Tensor) -> Tensor {
        (rewards - self.mean) / self.std
    }
}

#[cfg(test)]
mod tests {
    use rlhf_kernels::Offsets;

    use super::*;

    fn clips(values: &[f64], lengths: &[i64]) -> Ragged {
        Ragged::new(
            Tensor::from_slice(values),
            Offsets::from_lengths(lengths).unwrap(),
        )
        .unwrap()
    }

    fn value(mu: f64, error_rate: f64, d: f64) -> f64 {
        let rewards = clips(&[d, 0.5, 0.5, 0.0], &[2, 2]);
        let (first, second) = (Tensor::from_slice(&[0i64]), Tensor::from_slice(&[1i64]));
        let compared = Comparisons {
            first: &first,
            second: &second,
            preference: &Tensor::from_slice(&[mu]),
            weights: None,
        };
        let out = loss(&rewards, &compared, error_rate).unwrap();
        assert_eq!(out.weight, 1.0);
        out.sum.double_value(&[])
    }

    #[test]
    fn by_hand() {
        // Sums ln 3 + ½ and ½: σ(ln 3) = ¾. Nine answers in ten are meant: .9·.75 + .05 = .725.
        let d = 3f64.ln();
        assert!((value(1.0, 0.0, d) + 0.75f64.ln()).abs() < 1e-15);
        assert!((value(1.0, 0.1, d) + 0.725f64.ln()).abs() < 1e-15);
        assert!((value(0.0, 0.1, d) + 0.275f64.ln()).abs() < 1e-15);
        let half = -0.5 * (0.725f64.ln() + 0.275f64.ln());
        assert!((value(0.5, 0.1, d) - half).abs() < 1e-15);
        // An answer against all odds costs −log .05 and no more.
        assert!((value(0.0, 0.1, 1e4) + 0.05f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn members_that_agree_do_not_disagree() {
        // σ: ¾ and ¼ about ½, and twice ½.
        let d = 3f64.ln();
        let leads = Tensor::from_slice(&[d, 0.0, -d, 0.0]).view([2, 2]);
        let got = Vec::<f64>::try_from(&disagreement(&leads).unwrap()).unwrap();
        assert!((got[0] - 0.0625).abs() < 1e-15 && got[1] == 0.0, "{got:?}");
        assert!(disagreement(&leads.view([4])).is_err());
    }

    #[cfg(feature = "train")]
    #[test]
    fn a_resample_grows_and_leaves_a_share_of_1_in_e_out() {
        let n = 20_000;
        let (all, some) = (resample(3, 1, n), resample(3, 1, 500));
        assert_eq!(all[..some.len()], some[..]);
        assert_ne!(resample(3, 2, 500), some);
        assert!((all.len() as f64 / n as f64 - 1.0).abs() < 0.03);
        let mut there = all.clone();
        there.dedup();
        let left_out = 1.0 - there.len() as f64 / n as f64;
        assert!((left_out - (-1f64).exp()).abs() < 0.015, "{left_out}");
        // Twice: e⁻¹/2 of the rows.
        let twice = there
            .iter()
            .filter(|i| all.partition_point(|j| j <= i) - all.partition_point(|j| j < i) == 2)
            .count();
        assert!((twice as f64 / n as f64 - 0.5 * (-1f64).exp()).abs() < 0.015);
    }

    #[test]
    fn scaled_rewards_have_mean_0_and_deviation_1() {
        // 1 and 3: mean 2, deviation 1.
        let x = Tensor::from_slice(&[1.0, 3.0]);
        let scale = Scale::of(&x);
        assert_eq!((scale.mean, scale.std), (2.0, 1.0));
        assert_eq!(Vec::<f64>::try_from(&scale.apply(&x)).unwrap(), [-1.0, 1.0]);
        let flat = Scale::of(&Tensor::from_slice(&[0.3, 0.3]));
        assert_eq!(flat.std, 1.0);
    }

    #[test]
    fn bad_arguments_are_named() {
        let rewards = clips(&[0.0, 1.0], &[1, 1]);
        let (zero, one) = (Tensor::from_slice(&[0i64]), Tensor::from_slice(&[1i64]));
        let call = |first: &Tensor, preference: f64, error_rate: f64| {
            let preference = Tensor::from_slice(&[preference]);
            let compared = Comparisons {
                first,
                second: &one,
                preference: &preference,
                weights: None,
            };
            loss(&rewards, &compared, error_rate)
                .unwrap_err()
                .to_string()
        };
        assert!(call(&zero, 1.5, 0.1).contains("preference[0] is 1.5"));
        assert!(call(&zero, 1.0, 1.0).contains("error_rate is 1"));
        assert!(call(&zero.to_kind(Kind::Float), 1.0, 0.1).contains("Int64"));
        assert!(!call(&Tensor::from_slice(&[7i64]), 1.0, 0.1).is_empty());
    }
}
