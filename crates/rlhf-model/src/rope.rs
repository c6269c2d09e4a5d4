//! Rotary positions in the "halves" layout of the Hugging Face folders.
//!
//! A head's vector x of even width D is rotated by `x·cos + roll(x, D/2)·sin`, where the sign of the
//! rotation is folded into `sin`. cos and sin come from the positions of the batch at hand, so there
//! is no table whose size a configuration could inflate.

use tch::{Device, Kind, Tensor};

use crate::config::{Config, RopeScaling};
use crate::error::Result;

/// One way to rotate: D'/2 inverse frequencies, and what cos and sin are multiplied by.
#[derive(Debug)]
pub(crate) struct Rope {
    inverse_frequencies: Tensor,
    factor: f64,
}

impl Rope {
    /// The ropes of a configuration: the one of most layers, and that of layers with a sliding
    /// window where it differs.
    pub(crate) fn of(config: &Config, kind: Kind, device: Device) -> Vec<Self> {
        let main = Self::new(config, config.rope_theta, config.rope_scaling, kind, device);
        let local = config
            .local_rope_theta
            .map(|theta| Self::new(config, theta, RopeScaling::Default, kind, device));
        std::iter::once(main).chain(local).collect()
    }

    /// In f32 (f64 when `kind` is f64).
    fn new(config: &Config, theta: f64, scaling: RopeScaling, kind: Kind, device: Device) -> Self {
        let wide = kind == Kind::Double;
        let d = config.rotary_dim() as f64;
        let pairs = config.rotary_dim() / 2;
        let values: Vec<f64> = (0..pairs)
            .map(|i| {
                let exponent = 2.0 * i as f64 / d;
                // In f32 as the models were trained: a base 500000 rounds differently in f64.
                let plain = if wide {
                    1.0 / theta.powf(exponent)
                } else {
                    f64::from(1.0 / (theta as f32).powf(exponent as f32))
                };
                match scaling {
                    RopeScaling::Yarn { .. } => plain * yarn(scaling, theta, d, i as f64),
                    _ => scale(plain, scaling),
                }
            })
            .collect();
        let kind = if wide { Kind::Double } else { Kind::Float };
        Self {
            inverse_frequencies: Tensor::from_slice(&values).to_kind(kind).to_device(device),
            factor: match scaling {
                RopeScaling::Yarn {
                    attention_factor, ..
                } => attention_factor,
                _ => 1.0,
            },
        }
    }
}

/// cos and signed sin of a list of positions, `[N, 1, D']` each.
pub(crate) struct Angles {
    cos: Tensor,
    sin: Tensor,
}

impl Angles {
    /// For `positions` i64 `[N]`; computed in f32 (f64 for an f64 model) and stored as `kind`.
    pub(crate) fn new(rope: &Rope, positions: &Tensor, kind: Kind) -> Self {
        let frequencies = rope.inverse_frequencies.unsqueeze(0);
        let angles = positions.to_kind(frequencies.kind()).unsqueeze(1) * frequencies;
        let (cos, sin) = (angles.cos() * rope.factor, angles.sin() * rope.factor);
        // roll(x, D/2) = [x₂, x₁]; the first half turns by −sin·x₂, the second by +sin·x₁.
        let signed = Tensor::cat(&[&(-&sin), &sin], -1);
        Self {
            cos: Tensor::cat(&[&cos, &cos], -1).unsqueeze(1).to_kind(kind),
            sin: signed.unsqueeze(1).to_kind(kind),
        }
    }

    /// The rows `index` (i64) of these angles.
    pub(crate) fn select(&self, index: &Tensor) -> Self {
        Self {
            cos: self.cos.index_select(0, index),
            sin: self.sin.index_select(0, index),
        }
    }

    /// cos and signed sin, `[N, 1, D']` each.
    pub(crate) fn parts(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }

    /// Rotates the first D' dimensions of `x` `[N, heads, D]`.
    pub(crate) fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        Ok(rlhf_kernels::layer::rotate(x, &self.cos, &self.sin)?)
    }
}

/// What YaRN multiplies frequency `i` of d/2 by: 1 for those that turn often, 1/factor for those that
/// turn rarely.
fn yarn(scaling: RopeScaling, theta: f64, d: f64, i: f64) -> f64 {
    let RopeScaling::Yarn {
        factor,
        beta_fast,
        beta_slow,
        original_max_position_embeddings: original,
        truncate,
        ..
    } = scaling
    else {
        return 1.0;
    };
    // The dimension that turns `turns` times within the original context.
    let dimension =
        |turns: f64| d * (original / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(d - 1.0));
    if low == high {
        high += 0.001;
    }
    let divided = ((i - low) / (high - low)).clamp(0.0, 1.0);
    divided / factor + (1.0 - divided)
}

fn scale(frequency: f64, scaling: RopeScaling) -> f64 {
    match scaling {
        RopeScaling::Default | RopeScaling::Yarn { .. } => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: original,
        } => {
            let wavelength = std::f64::consts::TAU / frequency;
            if wavelength > original / low_freq_factor {
                frequency / factor
            } else if wavelength < original / high_freq_factor {
                frequency
            } else {
                let keep = (original / wavelength - low_freq_factor)
                    / (high_freq_factor - low_freq_factor);
                (1.0 - keep) * frequency / factor + keep * frequency
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_turn() {
        // D = 2 has one frequency, 1: at position p the pair (x, y) turns by p radians.
        let mut config = Config::new(8, 2, 1, 1, 8);
        config.head_dim = 2;
        let ropes = Rope::of(&config, Kind::Double, Device::Cpu);
        let angles = Angles::new(&ropes[0], &Tensor::from_slice(&[0_i64, 3]), Kind::Double);
        let x = Tensor::from_slice(&[1.0_f64, 0.0, 1.0, 0.0]).view([2, 1, 2]);
        let y: Vec<f64> = Vec::try_from(angles.rotate(&x).unwrap().view(-1)).unwrap();
        // (1, 0) by 3 rad is (cos 3, sin 3).
        for (a, b) in y.iter().zip([1.0, 0.0, 3.0_f64.cos(), 3.0_f64.sin()]) {
            assert!((a - b).abs() < 1e-15, "{a} {b}");
        }
    }

    #[test]
    fn llama3_keeps_high_and_divides_low_frequencies() {
        let s = RopeScaling::Llama3 {
            factor: 4.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64.0,
        };
        // Wavelength 2π < 64/4: kept. Wavelength 200π > 64: divided.
        assert_eq!(scale(1.0, s), 1.0);
        assert_eq!(scale(0.01, s), 0.0025);
        // Wavelength 32 lies between: keep = (64/32 − 1)/(4 − 1) = 1/3, f·(1/3 + 2/3/4) = f/2.
        let f = std::f64::consts::TAU / 32.0;
        assert!((scale(f, s) - f / 2.0).abs() < 1e-15);
        assert_eq!(scale(1.0, RopeScaling::Linear { factor: 2.0 }), 0.5);
    }

    #[test]
    fn yarn_keeps_what_turns_often() {
        let s = RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 1.0,
            original_max_position_embeddings: 2048.0,
            truncate: true,
        };
        // Of 64 dimensions with base 10000, 32 turns: 64·ln(2048/(32·2π))/(2·ln 10⁴) = 8.06, 1 turn:
        // 20.1; so the ramp runs from 8 to 21.
        let at = |i: f64| yarn(s, 10_000.0, 64.0, i);
        assert_eq!((at(0.0), at(8.0)), (1.0, 1.0));
        assert_eq!((at(21.0), at(31.0)), (0.25, 0.25));
        assert!((at(14.5) - 0.625).abs() < 1e-15);
    }
}
