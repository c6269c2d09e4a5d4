//! Counter-based randomness: noise is a function of (seed, purpose, counters), never a state.
//!
//! Invariant: the same key and counters give the same bits on every platform, in any order, in any
//! batch. So nothing is saved in a checkpoint and nothing is restored.
//!
//! The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
//! SC 2011).

/// What a stream of noise is for. Streams of different purposes are independent under one seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Purpose {
    /// Order of the training data.
    Order = 1,
    /// Drawing tokens while generating.
    Sample = 2,
    /// Initial weights.
    Init = 3,
    /// Splitting data.
    Split = 4,
    /// Generating the shipped data sets.
    Synth = 5,
    /// Noise added to inputs or labels.
    Noise = 6,
    /// Resampling for intervals.
    Bootstrap = 7,
    /// Choosing a subset (of prompts, say).
    Subset = 8,
    /// Choosing pairs out of rankings.
    Pairing = 9,
    /// Mixing data sets.
    Mixture = 10,
}

/// A stream of noise: a seed and a purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    key: [u32; 2],
}

impl Stream {
    /// The stream of `seed` for `purpose`.
    #[must_use]
    pub fn new(seed: u64, purpose: Purpose) -> Self {
        // One Philox round trip mixes the purpose into the whole key, so that neighbouring seeds
        // and purposes share no structure.
        let lo = seed as u32;
        let hi = (seed >> 32) as u32;
        let mixed = philox4x32([lo, hi], [purpose as u32, 0x524c_4846, 0, 0]);
        Self {
            key: [mixed[0], mixed[1]],
        }
    }

    /// 128 random bits at the counters `(a, b, c)`.
    #[must_use]
    pub fn bits(&self, a: u64, b: u32, c: u32) -> [u32; 4] {
        philox4x32(self.key, [a as u32, (a >> 32) as u32, b, c])
    }

    /// A uniform number in the open interval (0, 1), 53 bits.
    #[must_use]
    pub fn uniform(&self, a: u64, b: u32, c: u32) -> f64 {
        let w = self.bits(a, b, c);
        unit(w[0], w[1])
    }

    /// A uniform integer in `0..n`; 0 when `n` is 0. The bias is below 2⁻⁶⁴ · n.
    #[must_use]
    pub fn below(&self, n: u64, a: u64, b: u32, c: u32) -> u64 {
        let w = self.bits(a, b, c);
        let x = (u64::from(w[0]) << 32) | u64::from(w[1]);
        ((u128::from(x) * u128::from(n)) >> 64) as u64
    }

    /// Two independent standard normal numbers (Box–Muller).
    #[must_use]
    pub fn normal_pair(&self, a: u64, b: u32, c: u32) -> (f64, f64) {
        let w = self.bits(a, b, c);
        let radius = (-2.0 * unit(w[0], w[1]).ln()).sqrt();
        let angle = std::f64::consts::TAU * unit(w[2], w[3]);
        (radius * angle.cos(), radius * angle.sin())
    }
}

fn unit(hi: u32, lo: u32) -> f64 {
    let bits = (u64::from(hi) << 32 | u64::from(lo)) >> 11;
    (bits as f64 + 0.5) * (1.0 / 9_007_199_254_740_992.0)
}

/// Philox4x32 with ten rounds: a bijection of the counter under the key.
#[must_use]
pub fn philox4x32(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    const M: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const W: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    let (mut k, mut x) = (key, counter);
    for round in 0..10 {
        if round > 0 {
            k = [k[0].wrapping_add(W[0]), k[1].wrapping_add(W[1])];
        }
        let p0 = u64::from(M[0]) * u64::from(x[0]);
        let p1 = u64::from(M[1]) * u64::from(x[2]);
        x = [
            (p1 >> 32) as u32 ^ x[1] ^ k[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ x[3] ^ k[1],
            p0 as u32,
        ];
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers published with the Random123 library.
    #[test]
    fn philox_known_answers() {
        assert_eq!(
            philox4x32([0, 0], [0; 4]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32([u32::MAX; 2], [u32::MAX; 4]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32(
                [0xa409_3822, 0x299f_31d0],
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn streams_differ_by_seed_purpose_and_counter() {
        let s = Stream::new(7, Purpose::Order);
        assert_eq!(
            s.bits(1, 2, 3),
            Stream::new(7, Purpose::Order).bits(1, 2, 3)
        );
        assert_ne!(
            s.bits(1, 2, 3),
            Stream::new(7, Purpose::Sample).bits(1, 2, 3)
        );
        assert_ne!(
            s.bits(1, 2, 3),
            Stream::new(8, Purpose::Order).bits(1, 2, 3)
        );
        assert_ne!(s.bits(1, 2, 3), s.bits(1, 2, 4));
    }

    #[test]
    fn uniform_and_normal_moments() {
        let s = Stream::new(1, Purpose::Noise);
        let n = 20_000;
        let mean = (0..n).map(|i| s.uniform(i, 0, 0)).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        let (mut m, mut v) = (0.0, 0.0);
        for i in 0..n {
            let (a, b) = s.normal_pair(i, 0, 0);
            m += a + b;
            v += a * a + b * b;
        }
        assert!((m / (2.0 * n as f64)).abs() < 0.02);
        assert!((v / (2.0 * n as f64) - 1.0).abs() < 0.03);
        assert_eq!(s.below(0, 1, 1, 1), 0);
        assert!((0..1000).all(|i| s.below(7, i, 0, 0) < 7));
    }
}
