//! Pairs of completions by their indices: all of a prompt in one group, each prompt counting once.
//!
//! Invariant: the weights of a group's pairs sum to 1, so a prompt with nine completions counts as much
//! as one with two. Knows nothing of scores that are learned: what is compared here are labels.

use rlhf_kernels::Offsets;
use tch::{Device, Kind, Tensor};

use crate::error::{Result, ensure};

const OP: &str = "pairs";

/// What becomes of two completions with the same label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "train", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "train", serde(rename_all = "snake_case"))]
pub enum Ties {
    /// A pair that is won with probability ½: it pulls the two scores together (WebGPT, Nakano et al.
    /// 2021, arXiv 2112.09332).
    Half,
    /// No pair.
    Dropped,
}

/// Pairs (chosen, rejected) of completions as indices into the scores of a batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pairs {
    /// The better one of each pair.
    pub chosen: Vec<i64>,
    /// The worse one.
    pub rejected: Vec<i64>,
    /// 1/C(K,2) of a group with K completions; where ties are dropped, 1 by the pairs that are left.
    pub weights: Vec<f64>,
    /// The probability that the chosen is preferred: 1, or ½ for a tie.
    pub preference: Vec<f64>,
}

/// [`Pairs`] as tensors.
#[derive(Debug)]
pub struct PairTensors {
    /// i64 `[P]`.
    pub chosen: Tensor,
    /// i64 `[P]`.
    pub rejected: Tensor,
    /// `[P]`.
    pub weights: Tensor,
    /// `[P]`.
    pub preference: Tensor,
}

impl Pairs {
    /// All pairs of groups whose completions stand best first.
    ///
    /// # Errors
    /// When a group has fewer than two completions.
    pub fn of_rankings(groups: &Offsets) -> Result<Self> {
        let places: Vec<f64> = (0..groups.num_values()).map(|i| -(i as f64)).collect();
        Self::of_labels(&places, groups, Ties::Dropped)
    }

    /// All pairs of groups by a label of each completion, of which more is better.
    ///
    /// # Errors
    /// When there is not one finite label for each completion, or a group has fewer than two completions.
    pub fn of_labels(labels: &[f64], groups: &Offsets, ties: Ties) -> Result<Self> {
        ensure(labels.len() as i64 == groups.num_values(), OP, || {
            format!(
                "{} labels of {} completions",
                labels.len(),
                groups.num_values()
            )
        })?;
        let mut out = Self::default();
        for (group, range) in groups.host().windows(2).enumerate() {
            let (start, end) = (range[0] as usize, range[1] as usize);
            ensure(end - start >= 2, OP, || {
                format!(
                    "group {group} has {} completions, expected at least 2",
                    end - start
                )
            })?;
            if let Some(i) = (start..end).find(|i| !labels[*i].is_finite()) {
                ensure(false, OP, || {
                    format!(
                        "group {group}: the label of completion {} is {}",
                        i - start,
                        labels[i]
                    )
                })?;
            }
            let before = out.chosen.len();
            for i in start..end {
                for j in i + 1..end {
                    let (better, worse) = if labels[j] > labels[i] {
                        (j, i)
                    } else {
                        (i, j)
                    };
                    let tied = labels[i] == labels[j];
                    if tied && ties == Ties::Dropped {
                        continue;
                    }
                    out.chosen.push(better as i64);
                    out.rejected.push(worse as i64);
                    out.preference.push(if tied { 0.5 } else { 1.0 });
                }
            }
            let weight = 1.0 / (out.chosen.len() - before).max(1) as f64;
            out.weights.resize(out.chosen.len(), weight);
        }
        Ok(out)
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.chosen.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.chosen.is_empty()
    }

    /// As tensors on `device`, numbers of kind `kind`.
    #[must_use]
    pub fn tensors(&self, kind: Kind, device: Device) -> PairTensors {
        let number = |v: &[f64]| Tensor::from_slice(v).to_kind(kind).to_device(device);
        PairTensors {
            chosen: Tensor::from_slice(&self.chosen).to_device(device),
            rejected: Tensor::from_slice(&self.rejected).to_device(device),
            weights: number(&self.weights),
            preference: number(&self.preference),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(lengths: &[i64]) -> Offsets {
        Offsets::from_lengths(lengths).unwrap()
    }

    #[test]
    fn each_group_weighs_one() {
        let pairs = Pairs::of_rankings(&groups(&[3, 2])).unwrap();
        assert_eq!(pairs.chosen, [0, 0, 1, 3]);
        assert_eq!(pairs.rejected, [1, 2, 2, 4]);
        // C(3,2) = 3 and C(2,2) = 1.
        assert_eq!(pairs.weights, [1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0, 1.0]);
        assert_eq!(pairs.preference, [1.0; 4]);
    }

    #[test]
    fn ties_are_half_or_gone() {
        let labels = [1.0, 3.0, 1.0];
        let half = Pairs::of_labels(&labels, &groups(&[3]), Ties::Half).unwrap();
        assert_eq!(half.chosen, [1, 0, 1]);
        assert_eq!(half.rejected, [0, 2, 2]);
        assert_eq!(half.preference, [1.0, 0.5, 1.0]);
        let dropped = Pairs::of_labels(&labels, &groups(&[3]), Ties::Dropped).unwrap();
        assert_eq!(dropped.chosen, [1, 1]);
        assert_eq!(dropped.weights, [0.5, 0.5]);
        // A group of equals has no pair at all, and the next one still weighs 1.
        let equal = Pairs::of_labels(&[2.0, 2.0, 1.0, 0.0], &groups(&[2, 2]), Ties::Dropped);
        assert_eq!(equal.unwrap().weights, [1.0]);
    }

    #[test]
    fn bad_rows_are_named() {
        let alone = Pairs::of_rankings(&groups(&[2, 1]))
            .unwrap_err()
            .to_string();
        assert!(alone.contains("group 1 has 1 completions"), "{alone}");
        let nan = Pairs::of_labels(&[1.0, 0.0, 1.0, f64::NAN], &groups(&[2, 2]), Ties::Half);
        let nan = nan.unwrap_err().to_string();
        assert!(
            nan.contains("group 1") && nan.contains("completion 1"),
            "{nan}"
        );
        assert!(Pairs::of_labels(&[1.0], &groups(&[2]), Ties::Half).is_err());
    }
}
