//! Rotary positions in the "halves" layout of the Hugging Face folders.
//!
//! A head's vector x of even width D is rotated by `x·cos + roll(x, D/2)·sin`, where the sign of the
//! rotation is folded into `sin`. cos and sin come from the positions of the batch at hand, so there
//! is no table whose size a configuration could inflate.

use tch::{Device, Kind, Tensor};

use crate::config::{Config, RopeScaling};

/// cos and signed sin of a list of positions, `[N, 1, D]` each.
pub(crate) struct Angles {
    cos: Tensor,
    sin: Tensor,
}

impl Angles {
    /// For `positions` i64 `[N]`; computed in f32 (f64 for an f64 model) and stored as `kind`.
    pub(crate) fn new(inverse_frequencies: &Tensor, positions: &Tensor, kind: Kind) -> Self {
        let frequencies = inverse_frequencies.unsqueeze(0);
        let angles = positions.to_kind(frequencies.kind()).unsqueeze(1) * frequencies;
        let (cos, sin) = (angles.cos(), angles.sin());
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

    /// Rotates `x` `[N, heads, D]`.
    pub(crate) fn rotate(&self, x: &Tensor) -> Tensor {
        let half = x.size().last().copied().unwrap_or(0) / 2;
        (x * &self.cos).addcmul(&x.roll(half, -1), &self.sin)
    }
}

/// The D/2 inverse frequencies θ_i of a configuration, f32 (f64 when `kind` is f64).
pub(crate) fn inverse_frequencies(config: &Config, kind: Kind, device: Device) -> Tensor {
    let wide = kind == Kind::Double;
    let d = config.head_dim as f64;
    let values: Vec<f64> = (0..config.head_dim / 2)
        .map(|i| {
            let exponent = 2.0 * i as f64 / d;
            // In f32 as the models were trained: a base 500000 rounds differently in f64.
            let plain = if wide {
                1.0 / config.rope_theta.powf(exponent)
            } else {
                f64::from(1.0 / (config.rope_theta as f32).powf(exponent as f32))
            };
            scale(plain, config.rope_scaling)
        })
        .collect();
    let kind = if wide { Kind::Double } else { Kind::Float };
    Tensor::from_slice(&values).to_kind(kind).to_device(device)
}

fn scale(frequency: f64, scaling: RopeScaling) -> f64 {
    match scaling {
        RopeScaling::Default => frequency,
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
        let f = inverse_frequencies(&config, Kind::Double, Device::Cpu);
        let angles = Angles::new(&f, &Tensor::from_slice(&[0_i64, 3]), Kind::Double);
        let x = Tensor::from_slice(&[1.0_f64, 0.0, 1.0, 0.0]).view([2, 1, 2]);
        let y: Vec<f64> = Vec::try_from(angles.rotate(&x).view(-1)).unwrap();
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
}
