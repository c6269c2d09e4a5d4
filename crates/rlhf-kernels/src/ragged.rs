//! Per-token values of many sequences without padding: values and offsets.
//!
//! Invariant: `Ragged` replaces masks. There is no mask polarity, no pad id, no small number added to
//! a denominator; an empty sequence has sum 0 and mean 0.
//!
//! What is said of sequences of tokens holds for groups of completions too: rewards `[S]` with the offsets
//! of the prompts are a `Ragged`, whose mean, deviation and leave-one-out are each prompt's.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use crate::error::{Result, ensure};
use crate::ffi::{self, Segments, Statistic};
use crate::scan::{Direction, scan};

/// Where each of S sequences lies among M values: sequence s owns `offsets[s]..offsets[s+1]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offsets(Arc<[i64]>);

impl Offsets {
    /// Offsets from a list of S + 1 numbers.
    ///
    /// # Errors
    /// Unless the list begins with 0 and never decreases.
    pub fn new(offsets: Vec<i64>) -> Result<Self> {
        ensure(offsets.first() == Some(&0), "offsets", || {
            format!("the first is {:?}, expected 0", offsets.first())
        })?;
        ensure(offsets.windows(2).all(|w| w[0] <= w[1]), "offsets", || {
            "they decrease somewhere".into()
        })?;
        Ok(Self(offsets.into()))
    }

    /// Offsets of sequences of the given lengths.
    ///
    /// # Errors
    /// When a length is negative.
    pub fn from_lengths(lengths: &[i64]) -> Result<Self> {
        let mut offsets = vec![0];
        let mut end = 0;
        for n in lengths {
            end += n;
            offsets.push(end);
        }
        Self::new(offsets)
    }

    /// The S + 1 numbers.
    #[must_use]
    pub fn host(&self) -> &[i64] {
        &self.0
    }

    /// S.
    #[must_use]
    pub fn num_segments(&self) -> i64 {
        self.0.len() as i64 - 1
    }

    /// M.
    #[must_use]
    pub fn num_values(&self) -> i64 {
        self.0.last().copied().unwrap_or(0)
    }

    /// The length of each sequence.
    #[must_use]
    pub fn host_lengths(&self) -> Vec<i64> {
        self.0.windows(2).map(|w| w[1] - w[0]).collect()
    }

    /// Lengths, i64 `[S]`.
    pub fn lengths(&self, device: Device) -> Tensor {
        Tensor::from_slice(&self.host_lengths()).to_device(device)
    }

    /// The sequence of each value, i64 `[M]`.
    pub fn segment_ids(&self, device: Device) -> Tensor {
        Tensor::repeat_interleave(&self.lengths(device), self.num_values())
    }
}

/// Values `[M]` of S sequences.
#[derive(Debug)]
pub struct Ragged {
    values: Tensor,
    offsets: Offsets,
}

impl Clone for Ragged {
    fn clone(&self) -> Self {
        Self {
            values: self.values.shallow_clone(),
            offsets: self.offsets.clone(),
        }
    }
}

impl Ragged {
    /// Values with their offsets.
    ///
    /// # Errors
    /// Unless `values` is `[M]` with the offsets' M.
    pub fn new(values: Tensor, offsets: Offsets) -> Result<Self> {
        ensure(values.size() == [offsets.num_values()], "ragged", || {
            format!(
                "values are {:?}, expected [{}]",
                values.size(),
                offsets.num_values()
            )
        })?;
        Ok(Self { values, offsets })
    }

    /// From padded values `[B, T]` and a mask of the same shape that is true at real ones.
    ///
    /// # Errors
    /// When the shapes differ, are not two-dimensional, or the mask is not boolean.
    pub fn from_padded(values: &Tensor, mask: &Tensor) -> Result<Self> {
        ensure(
            values.dim() == 2 && values.size() == mask.size(),
            "ragged",
            || {
                format!(
                    "values are {:?} and the mask {:?}, expected the same [B, T]",
                    values.size(),
                    mask.size()
                )
            },
        )?;
        ensure(mask.kind() == Kind::Bool, "ragged", || {
            format!("the mask is {:?}, expected Bool", mask.kind())
        })?;
        let lengths = Vec::<i64>::try_from(mask.sum_dim_intlist(&[1i64][..], false, Kind::Int64))?;
        Self::new(
            values.f_masked_select(mask)?,
            Offsets::from_lengths(&lengths)?,
        )
    }

    /// `[S, longest]`, with `fill` where a sequence has ended.
    pub fn to_padded(&self, fill: f64) -> Tensor {
        let longest = self.offsets.host_lengths().into_iter().max().unwrap_or(0);
        let out = Tensor::full(
            [self.offsets.num_segments(), longest],
            fill,
            (self.values.kind(), self.values.device()),
        );
        let columns = Tensor::arange(longest, (Kind::Int64, self.values.device())).unsqueeze(0);
        let mask = columns.lt_tensor(&self.offsets.lengths(self.values.device()).unsqueeze(1));
        out.masked_scatter(&mask, &self.values)
    }

    /// `[M]` the values.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// The offsets.
    #[must_use]
    pub fn offsets(&self) -> &Offsets {
        &self.offsets
    }

    /// Other values for the same sequences.
    ///
    /// # Errors
    /// Unless `values` is `[M]`.
    pub fn with_values(&self, values: Tensor) -> Result<Self> {
        Self::new(values, self.offsets.clone())
    }

    /// `[S]` the sum of each sequence, differentiable; on the CPU added up in f64.
    ///
    /// # Panics
    /// When libtorch fails.
    pub fn sum(&self) -> Tensor {
        self.segments(&self.values, Segments::Sum)
    }

    /// `[S]` the mean of each sequence, 0 for an empty one; differentiable.
    pub fn mean(&self) -> Tensor {
        self.sum() / self.counts().clamp_min(1.0)
    }

    /// `[M]` one value of each sequence, `[S]`, repeated over its tokens; differentiable.
    ///
    /// # Panics
    /// Unless `per_segment` is `[S]`.
    pub fn broadcast(&self, per_segment: &Tensor) -> Tensor {
        assert_eq!(
            per_segment.size(),
            [self.offsets.num_segments()],
            "broadcast: one value a sequence"
        );
        self.segments(per_segment, Segments::Repeat)
    }

    /// `[S]` the last value of each sequence, `fill` for an empty one; differentiable.
    pub fn last(&self, fill: f64) -> Tensor {
        let host = self.offsets.host();
        let index: Vec<i64> = host.windows(2).map(|w| (w[1] - 1).max(0)).collect();
        let empty: Vec<bool> = host.windows(2).map(|w| w[0] == w[1]).collect();
        let device = self.values.device();
        if self.values.numel() == 0 {
            let size = [self.offsets.num_segments()];
            return Tensor::full(size, fill, (self.values.kind(), device));
        }
        self.values
            .index_select(0, &Tensor::from_slice(&index).to_device(device))
            .masked_fill(&Tensor::from_slice(&empty).to_device(device), fill)
    }

    /// Values held within `low..=high`; differentiable inside.
    #[must_use]
    pub fn clamp(&self, low: f64, high: f64) -> Self {
        self.same(self.values.clamp(low, high))
    }

    /// The running sum within each sequence, its own value included; differentiable.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn cumsum(&self) -> Result<Self> {
        scan(self, 1.0, Direction::Forward)
    }

    /// Each value less the mean of its sequence; differentiable. Equal values give exactly 0.
    #[must_use]
    pub fn centred(&self) -> Self {
        if let Some((values, _)) = self.statistics(Statistic::Centred, 0.0, 1.0) {
            return self.same(values);
        }
        // Less the first value first: what is left of equal ones is 0, and of large ones loses nothing.
        let host = self.offsets.host();
        let firsts: Vec<i64> = host
            .windows(2)
            .map(|w| w[0].min(self.offsets.num_values() - 1))
            .collect();
        if self.values.numel() == 0 {
            return self.clone();
        }
        let index = Tensor::from_slice(&firsts).to_device(self.values.device());
        let origins = self.values.detach().index_select(0, &index);
        let shifted = self.same(&self.values - self.broadcast(&origins));
        let means = shifted.mean();
        shifted.same(&shifted.values - shifted.broadcast(&means))
    }

    /// `[S]` the standard deviation of each sequence with divisor n − `correction` (1: of a sample), 0
    /// where that is not positive; differentiable where it is not 0.
    pub fn std(&self, correction: f64) -> Tensor {
        if let Some((_, std)) = self.statistics(Statistic::Centred, 0.0, correction) {
            return std;
        }
        let squares = self.same(self.centred().values.square());
        let divisor = self.counts() - correction;
        let variance = squares.sum() / divisor.clamp_min(f64::MIN_POSITIVE);
        let none = divisor.le(0.0).logical_or(&variance.detach().eq(0.0));
        // A root's slope at 0 is infinite, and times 0 it would be NaN.
        variance
            .masked_fill(&none, 1.0)
            .sqrt()
            .masked_fill(&none, 0.0)
    }

    /// (x − mean)/(std + `epsilon`) within each sequence, with a sample's standard deviation; equal values,
    /// and one alone, give exactly 0. Over the completions of each prompt it is GRPO's advantage (Shao et
    /// al. 2024, arXiv 2402.03300, section 4.1.2).
    #[must_use]
    pub fn standardized(&self, epsilon: f64) -> Self {
        if let Some((values, _)) = self.statistics(Statistic::Standardized, epsilon, 1.0) {
            return self.same(values);
        }
        let centred = self.centred();
        let std = self.std(1.0);
        let none = std.detach().eq(0.0);
        let scale: Tensor = (std + epsilon).masked_fill(&none, 1.0).reciprocal();
        self.same(&centred.values * self.broadcast(&scale))
    }

    /// Each value less the mean of the *others* of its sequence, 0 for one alone; differentiable. Over the
    /// completions of each prompt it is RLOO's advantage (Ahmadian et al. 2024, arXiv 2402.14740, equation
    /// 8).
    #[must_use]
    pub fn leave_one_out(&self) -> Self {
        if let Some((values, _)) = self.statistics(Statistic::LeaveOneOut, 0.0, 1.0) {
            return self.same(values);
        }
        // x − (nm − x)/(n − 1) = n/(n − 1)·(x − m).
        let n = self.counts();
        let scale = &n / (&n - 1.0).clamp_min(1.0);
        self.same(self.centred().values * self.broadcast(&scale))
    }

    /// Whitens over all tokens of all sequences: (x − mean)/√(var + 1e-8) with a sample's variance (divisor
    /// M − 1), as TRL's `masked_whiten`; differentiable. A single value has variance 0.
    #[must_use]
    pub fn whitened(&self, mean: Mean) -> Self {
        let m = self.offsets.num_values();
        if m == 0 {
            return self.clone();
        }
        let origin = self.values.detach().get(0);
        let shifted = &self.values - &origin;
        let shift = shifted.mean(None::<Kind>);
        let centred = &shifted - &shift;
        let variance = centred.square().sum(None::<Kind>) / (m - 1).max(1) as f64;
        let white = centred * (variance + 1e-8).rsqrt();
        self.same(match mean {
            Mean::Removed => white,
            Mean::Kept => white + (shift + origin),
        })
    }

    /// Where no gradient is wanted, on the CPU and on GPUs that have kernels: one pass. Values and deviations.
    fn statistics(&self, op: Statistic, epsilon: f64, correction: f64) -> Option<(Tensor, Tensor)> {
        let x = &self.values;
        let plain = (x.device() == Device::Cpu || ffi::has_kernels(x))
            && matches!(x.kind(), Kind::Float | Kind::Double)
            && !x.requires_grad();
        plain
            .then(|| ffi::statistics(x, self.offsets.host(), op, epsilon, correction).ok())
            .flatten()
    }

    /// Lengths in the values' type.
    fn counts(&self) -> Tensor {
        self.offsets
            .lengths(self.values.device())
            .to_kind(self.values.kind())
    }

    /// Other values of the same number.
    fn same(&self, values: Tensor) -> Self {
        Self {
            values,
            offsets: self.offsets.clone(),
        }
    }

    #[allow(
        clippy::expect_used,
        reason = "as tch's own operators: the sizes are checked, only memory can fail"
    )]
    fn segments(&self, x: &Tensor, op: Segments) -> Tensor {
        ffi::segments(x, self.offsets.host(), op).expect("libtorch sums and repeats")
    }
}

/// What whitening does to the mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mean {
    /// It is 0 afterwards.
    Removed,
    /// It is what it was before: TRL's `shift_mean=False`, meant for rewards.
    Kept,
}

/// The sum of a loss over tokens, sequences or pairs, and how many there are (their weights' sum).
///
/// A loss never divides: the step divides once by the weight of all its micro-batches, so its
/// gradient does not depend on how it was split.
#[derive(Debug)]
pub struct LossSum {
    /// A scalar with its graph.
    pub sum: Tensor,
    /// What `sum` is to be divided by, over all micro-batches.
    pub weight: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ragged() -> Ragged {
        Ragged::new(
            Tensor::from_slice(&[1f64, 2., 3., 4.]),
            Offsets::new(vec![0, 1, 1, 4]).unwrap(),
        )
        .unwrap()
    }

    #[test]
    fn sums_and_means_by_hand() {
        assert_eq!(
            Vec::<f64>::try_from(&ragged().sum()).unwrap(),
            [1.0, 0.0, 9.0]
        );
        assert_eq!(
            Vec::<f64>::try_from(&ragged().mean()).unwrap(),
            [1.0, 0.0, 3.0]
        );
        let spread = ragged().broadcast(&Tensor::from_slice(&[5f64, 6., 7.]));
        assert_eq!(Vec::<f64>::try_from(&spread).unwrap(), [5.0, 7.0, 7.0, 7.0]);
    }

    /// Rewards (1, 2, 6) and (5, 5): less the mean (−2, −1, 3), sample deviation √7; less the others'
    /// mean 1 − 4, 2 − 3.5, 6 − 1.5. Equal rewards, and one alone, give exactly 0.
    #[test]
    fn groups_by_hand() {
        let offsets = Offsets::from_lengths(&[3, 2, 0, 1]).unwrap();
        let x = Ragged::new(Tensor::from_slice(&[1f64, 2., 6., 0.1, 0.1, 7.]), offsets).unwrap();
        let host = |t: &Tensor| Vec::<f64>::try_from(t).unwrap();
        let close = |a: Vec<f64>, b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-14);
        assert_eq!(host(x.centred().values()), [-2., -1., 3., 0., 0., 0.]);
        let root = 7f64.sqrt();
        assert!(close(host(&x.std(1.0)), &[root, 0., 0., 0.]));
        assert!(close(
            host(x.standardized(0.5).values()),
            &[
                -2. / (root + 0.5),
                -1. / (root + 0.5),
                3. / (root + 0.5),
                0.,
                0.,
                0.
            ]
        ));
        assert!(close(
            host(x.leave_one_out().values()),
            &[-3., -1.5, 4.5, 0., 0., 0.]
        ));
        assert_eq!(host(&x.last(-1.0)), [6., 0.1, -1., 7.]);
        assert_eq!(
            host(x.cumsum().unwrap().values()),
            [1., 3., 9., 0.1, 0.2, 7.]
        );
        assert_eq!(host(x.clamp(2., 6.).values()), [2., 2., 6., 2., 2., 6.]);
    }

    /// (1, 2, 6) has mean 3 and a sample's variance of 7.
    #[test]
    fn whitening_by_hand() {
        let offsets = Offsets::from_lengths(&[1, 2]).unwrap();
        let x = Ragged::new(Tensor::from_slice(&[1f64, 2., 6.]), offsets.clone()).unwrap();
        let scale = 1.0 / (7f64 + 1e-8).sqrt();
        for (mean, by) in [(Mean::Removed, 0.0), (Mean::Kept, 3.0)] {
            let got = Vec::<f64>::try_from(x.whitened(mean).values()).unwrap();
            for (got, d) in got.iter().zip([-2.0, -1.0, 3.0]) {
                assert!((got - d * scale - by).abs() < 1e-14);
            }
        }
        let equal = x.with_values(Tensor::from_slice(&[0.3f64; 3])).unwrap();
        assert_eq!(
            Vec::<f64>::try_from(equal.whitened(Mean::Removed).values()).unwrap(),
            [0.0; 3]
        );
    }

    #[test]
    fn padded_and_back() {
        let padded = ragged().to_padded(-1.0);
        assert_eq!(padded.size(), [3, 3]);
        let mask = padded.ne(-1.0);
        let back = Ragged::from_padded(&padded, &mask).unwrap();
        assert_eq!(back.offsets(), ragged().offsets());
        assert_eq!(
            Vec::<f64>::try_from(back.values()).unwrap(),
            [1.0, 2.0, 3.0, 4.0]
        );
    }

    #[test]
    fn wrong_shapes_are_refused() {
        assert!(Offsets::new(vec![1, 2]).is_err());
        assert!(Offsets::new(vec![0, 2, 1]).is_err());
        assert!(
            Ragged::new(
                Tensor::from_slice(&[1f64]),
                Offsets::new(vec![0, 2]).unwrap()
            )
            .is_err()
        );
        let e = Ragged::from_padded(
            &Tensor::zeros([2, 2], (Kind::Double, Device::Cpu)),
            &Tensor::zeros([2, 3], (Kind::Bool, Device::Cpu)),
        );
        assert!(e.unwrap_err().to_string().contains("[2, 3]"));
    }
}
