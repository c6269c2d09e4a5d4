//! Per-token values of many sequences without padding: values and offsets.
//!
//! Invariant: `Ragged` replaces masks. There is no mask polarity, no pad id, no small number added to
//! a denominator; an empty sequence has sum 0 and mean 0.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use crate::error::{Result, ensure};

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
        let mut ids = Vec::with_capacity(self.num_values() as usize);
        for (s, n) in self.host_lengths().into_iter().enumerate() {
            ids.extend(std::iter::repeat_n(s as i64, n as usize));
        }
        Tensor::from_slice(&ids).to_device(device)
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

    /// `[S]` the sum of each sequence, differentiable.
    pub fn sum(&self) -> Tensor {
        let ids = self.offsets.segment_ids(self.values.device());
        let zeros = Tensor::zeros(
            [self.offsets.num_segments()],
            (self.values.kind(), self.values.device()),
        );
        zeros.index_add(0, &ids, &self.values)
    }

    /// `[S]` the mean of each sequence, 0 for an empty one; differentiable.
    pub fn mean(&self) -> Tensor {
        let lengths = self
            .offsets
            .lengths(self.values.device())
            .clamp_min(1)
            .to_kind(self.values.kind());
        self.sum() / lengths
    }

    /// `[M]` one value of each sequence, `[S]`, repeated over its tokens; differentiable.
    pub fn broadcast(&self, per_segment: &Tensor) -> Tensor {
        per_segment.index_select(0, &self.offsets.segment_ids(self.values.device()))
    }
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
