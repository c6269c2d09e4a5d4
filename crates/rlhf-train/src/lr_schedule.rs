//! The course of the learning rate: a factor of the peak, as a function of the step.

use serde::{Deserialize, Serialize};

/// A learning-rate schedule after `warmup` steps of linear warm-up from 0. Step 0 is the first.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum LrSchedule {
    /// 1 after warm-up.
    Constant {},
    /// From 1 down to 0 at the last step.
    Linear {},
    /// Half a cosine from 1 to `min_ratio`.
    Cosine {
        /// The factor at the end.
        #[serde(default)]
        min_ratio: f64,
    },
    /// Half a cosine from 1 to `min_ratio` after a warm-up that begins at `warmup_ratio`, not at 0, and
    /// reaches 1 one step earlier: at the last step of the warm-up.
    CosineFromFloor {
        /// The factor at the end.
        min_ratio: f64,
        /// The factor at step 0.
        warmup_ratio: f64,
    },
    /// `cycles` half cosines from 1 to 0, each beginning anew.
    CosineRestarts {
        /// How many.
        cycles: u32,
    },
    /// (1 − progress)^power from 1 to `end_ratio`.
    Polynomial {
        /// The exponent.
        power: f64,
        /// The factor at the end and after it.
        end_ratio: f64,
    },
    /// 1/√(1 + (step − warmup)/warmup): the transformer's original course.
    InverseSqrt {},
    /// Warm-up, stable, decay: 1 until `decay_steps` before the end (or for `stable_steps`), then down
    /// to `min_ratio`.
    Wsd {
        /// Steps of decay.
        decay_steps: u64,
        /// Steps at 1; by default all that are left between warm-up and decay.
        #[serde(default)]
        stable_steps: Option<u64>,
        /// The form of the decay.
        #[serde(default)]
        shape: DecayShape,
        /// The factor at the end.
        #[serde(default)]
        min_ratio: f64,
    },
}

/// How a [`LrSchedule::Wsd`] decays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecayShape {
    /// 1 − progress.
    Linear,
    /// Half a cosine.
    #[default]
    Cosine,
    /// 1 − √progress.
    OneMinusSqrt,
}

impl LrSchedule {
    /// The factor at `step` of `total` with `warmup` steps of warm-up.
    #[must_use]
    pub fn factor(&self, step: u64, warmup: u64, total: u64) -> f64 {
        let (s, w, t) = (step as f64, warmup as f64, total as f64);
        let progress = (s - w) / (t - w).max(1.0);
        if step < warmup {
            return match *self {
                Self::CosineFromFloor { warmup_ratio, .. } => {
                    warmup_ratio + (1.0 - warmup_ratio) * s / (w - 1.0).max(1.0)
                }
                // As in transformers, WSD with a floor begins at it.
                Self::Wsd { min_ratio, .. } => min_ratio + (1.0 - min_ratio) * s / w.max(1.0),
                _ => s / w.max(1.0),
            };
        }
        let half_cosine = |x: f64| 0.5 * (1.0 + (std::f64::consts::PI * x).cos());
        match *self {
            Self::Constant {} => 1.0,
            Self::Linear {} => ((t - s) / (t - w).max(1.0)).max(0.0),
            Self::Cosine { min_ratio } => {
                (min_ratio + (1.0 - min_ratio) * half_cosine(progress)).max(0.0)
            }
            Self::CosineFromFloor { min_ratio, .. } => {
                let progress = (s - w + 1.0) / (t - w).max(1.0);
                (min_ratio + (1.0 - min_ratio) * half_cosine(progress)).max(0.0)
            }
            Self::CosineRestarts { cycles } => {
                if progress >= 1.0 {
                    0.0
                } else {
                    half_cosine((f64::from(cycles) * progress).fract())
                }
            }
            Self::Polynomial { power, end_ratio } => {
                if step > total {
                    end_ratio
                } else {
                    (1.0 - end_ratio) * (1.0 - progress).powf(power) + end_ratio
                }
            }
            Self::InverseSqrt {} => {
                let scale = if warmup == 0 { 10_000.0 } else { w };
                1.0 / ((s + scale - w) / scale).sqrt()
            }
            Self::Wsd {
                decay_steps,
                stable_steps,
                shape,
                min_ratio,
            } => {
                let stable = stable_steps.unwrap_or(total.saturating_sub(warmup + decay_steps));
                if step < warmup + stable {
                    return 1.0;
                }
                if step >= warmup + stable + decay_steps {
                    return min_ratio;
                }
                let p = (step - warmup - stable) as f64 / (decay_steps as f64).max(1.0);
                let f = match shape {
                    DecayShape::Linear => 1.0 - p,
                    DecayShape::Cosine => half_cosine(p),
                    DecayShape::OneMinusSqrt => 1.0 - p.sqrt(),
                };
                (f * (1.0 - min_ratio) + min_ratio).max(0.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_by_hand() {
        let linear = LrSchedule::Linear {};
        assert_eq!(linear.factor(0, 4, 12), 0.0);
        assert_eq!(linear.factor(2, 4, 12), 0.5);
        assert_eq!(linear.factor(4, 4, 12), 1.0);
        assert_eq!(linear.factor(8, 4, 12), 0.5);
        assert_eq!(linear.factor(13, 4, 12), 0.0);
        let cosine = LrSchedule::Cosine { min_ratio: 0.1 };
        assert!((cosine.factor(8, 4, 12) - 0.55).abs() < 1e-12);
        // Warm-up 0.2, 0.6, 1 at steps 0, 1, 2; one of eight steps of cosine is gone at step 3.
        let floor = LrSchedule::CosineFromFloor {
            min_ratio: 0.1,
            warmup_ratio: 0.2,
        };
        assert!((floor.factor(1, 3, 11) - 0.6).abs() < 1e-12);
        assert_eq!(floor.factor(2, 3, 11), 1.0);
        assert!((floor.factor(6, 3, 11) - 0.55).abs() < 1e-12);
        let wsd = LrSchedule::Wsd {
            decay_steps: 4,
            stable_steps: None,
            shape: DecayShape::Linear,
            min_ratio: 0.2,
        };
        assert_eq!(wsd.factor(7, 2, 12), 1.0);
        assert!((wsd.factor(10, 2, 12) - 0.6).abs() < 1e-12);
        assert_eq!(wsd.factor(12, 2, 12), 0.2);
    }

    #[test]
    fn recipes_write_them_as_tables() {
        let s: LrSchedule =
            serde_json::from_str(r#"{"kind": "cosine", "min_ratio": 0.1}"#).unwrap();
        assert_eq!(s, LrSchedule::Cosine { min_ratio: 0.1 });
        assert!(serde_json::from_str::<LrSchedule>(r#"{"kind": "cosine", "min": 0.1}"#).is_err());
    }
}
