//! The storage formats of numbers, and their decoding to f32.
//!
//! Layouts as GGML publishes them: a row is a sequence of blocks, each with its scales and packed
//! integers. Knows bytes and numbers only.

use half::{bf16, f16};
use rayon::prelude::*;
use tch::Kind;

/// How many numbers a task decodes at least.
const TASK: usize = 1 << 14;

/// The storage format of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

/// Format, its number in the file, its name, numbers and bytes of a block.
const FORMATS: [(Format, u32, &str, usize, usize); 11] = [
    (Format::F32, 0, "F32", 1, 4),
    (Format::F16, 1, "F16", 1, 2),
    (Format::Bf16, 30, "BF16", 1, 2),
    (Format::Q4_0, 2, "Q4_0", 32, 18),
    (Format::Q4_1, 3, "Q4_1", 32, 20),
    (Format::Q5_0, 6, "Q5_0", 32, 22),
    (Format::Q5_1, 7, "Q5_1", 32, 24),
    (Format::Q8_0, 8, "Q8_0", 32, 34),
    (Format::Q4K, 12, "Q4_K", 256, 144),
    (Format::Q5K, 13, "Q5_K", 256, 176),
    (Format::Q6K, 14, "Q6_K", 256, 210),
];

impl Format {
    /// The format that has this number in a file, or a message that lists those there are.
    pub(super) fn of(code: u32) -> Result<Self, String> {
        let found = FORMATS.iter().find(|f| f.1 == code).map(|f| f.0);
        found.ok_or_else(|| {
            let names: Vec<&str> = FORMATS.iter().map(|f| f.2).collect();
            format!(
                "ggml type {code} is not supported; supported: {}",
                names.join(", ")
            )
        })
    }

    /// Numbers and bytes of a block.
    pub(super) fn block(self) -> (usize, usize) {
        let found = FORMATS.iter().find(|f| f.0 == self);
        found.map_or((1, 4), |f| (f.3, f.4))
    }

    /// Decodes whole blocks into `out`, which holds as many numbers as they do.
    pub(super) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        let (numbers, size) = self.block();
        let blocks = out.chunks_exact_mut(numbers).zip(bytes.chunks_exact(size));
        match self {
            Self::F32 => {
                for (y, b) in blocks {
                    y[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            Self::F16 => blocks.for_each(|(y, b)| y[0] = half_at(b, 0)),
            Self::Bf16 => {
                blocks.for_each(|(y, b)| y[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32());
            }
            Self::Q8_0 => {
                for (y, b) in blocks {
                    let d = half_at(b, 0);
                    for (y, q) in y.iter_mut().zip(&b[2..]) {
                        *y = d * f32::from(q.cast_signed());
                    }
                }
            }
            Self::Q4_0 => {
                blocks
                    .for_each(|(y, b)| nibbles(y, &b[2..], [0; 4], half_at(b, 0), Offset::Less(8)));
            }
            Self::Q4_1 => {
                for (y, b) in blocks {
                    nibbles(
                        y,
                        &b[4..],
                        [0; 4],
                        half_at(b, 0),
                        Offset::Plus(half_at(b, 2)),
                    );
                }
            }
            Self::Q5_0 => {
                for (y, b) in blocks {
                    let fifth = [b[2], b[3], b[4], b[5]];
                    nibbles(y, &b[6..], fifth, half_at(b, 0), Offset::Less(16));
                }
            }
            Self::Q5_1 => {
                for (y, b) in blocks {
                    let fifth = [b[4], b[5], b[6], b[7]];
                    nibbles(
                        y,
                        &b[8..],
                        fifth,
                        half_at(b, 0),
                        Offset::Plus(half_at(b, 2)),
                    );
                }
            }
            Self::Q4K => blocks.for_each(|(y, b)| super_block(y, b, &b[16..], None)),
            Self::Q5K => blocks.for_each(|(y, b)| super_block(y, b, &b[48..], Some(&b[16..48]))),
            Self::Q6K => blocks.for_each(|(y, b)| six_bits(y, b)),
        }
    }

    /// All numbers of a tensor, decoded in parallel.
    pub(super) fn decode_all(self, bytes: &[u8]) -> Vec<f32> {
        let (numbers, size) = self.block();
        let mut out = vec![0.0; bytes.len() / size * numbers];
        let blocks = TASK.div_ceil(numbers);
        out.par_chunks_mut(blocks * numbers)
            .zip(bytes.par_chunks(blocks * size))
            .for_each(|(out, bytes)| self.decode(bytes, out));
        out
    }
}

fn half_at(b: &[u8], i: usize) -> f32 {
    f16::from_le_bytes([b[i], b[i + 1]]).to_f32()
}

/// What is done to an integer before or after it is scaled.
#[derive(Clone, Copy)]
enum Offset {
    /// d · (q − n).
    Less(u8),
    /// d · q + m.
    Plus(f32),
}

/// 32 numbers of four or five bits: low halves of the bytes first, then high halves; number i has
/// its fifth bit at i of `fifth`.
fn nibbles(y: &mut [f32], packed: &[u8], fifth: [u8; 4], d: f32, offset: Offset) {
    let fifth = u32::from_le_bytes(fifth);
    for (i, y) in y.iter_mut().enumerate() {
        let low = packed[i % 16] >> (4 * (i / 16)) & 15;
        let q = low | ((fifth >> i & 1) as u8) << 4;
        *y = match offset {
            Offset::Less(n) => d * (f32::from(q) - f32::from(n)),
            Offset::Plus(m) => d * f32::from(q) + m,
        };
    }
}

/// Q4_K and Q5_K: eight groups of 32 numbers, each with a scale and a minimum of six bits. Two
/// groups share 32 bytes of `packed`, one in the low halves, one in the high ones; bit g of a byte
/// of `fifth` is the fifth bit of group g.
fn super_block(y: &mut [f32], b: &[u8], packed: &[u8], fifth: Option<&[u8]>) {
    let (d, dmin) = (half_at(b, 0), half_at(b, 2));
    let scales = &b[4..16];
    for (g, y) in y.chunks_exact_mut(32).enumerate() {
        // The first four groups keep six bits whole; the others' upper two lie in what those leave.
        let (scale, min) = if g < 4 {
            (scales[g] & 63, scales[g + 4] & 63)
        } else {
            (
                scales[g + 4] & 15 | scales[g - 4] >> 6 << 4,
                scales[g + 4] >> 4 | scales[g] >> 6 << 4,
            )
        };
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        let packed = &packed[g / 2 * 32..][..32];
        for (i, y) in y.iter_mut().enumerate() {
            let low = packed[i] >> (4 * (g % 2)) & 15;
            let high = fifth.map_or(0, |f| f[i] >> g & 1);
            *y = scale * f32::from(low | high << 4) - min;
        }
    }
}

/// Q6_K: sixteen groups of 16 numbers with a scale of eight bits each; within each half of 128
/// numbers the lower four bits of numbers i and i + 64 share a byte, and the upper two of i, i + 32,
/// i + 64 and i + 96 another.
fn six_bits(y: &mut [f32], b: &[u8]) {
    let (low, high, scales, d) = (&b[..128], &b[128..192], &b[192..208], half_at(b, 208));
    for (n, y) in y.iter_mut().enumerate() {
        let (half, i) = (n / 128, n % 128);
        let four = low[half * 64 + i % 64] >> (4 * (i / 64)) & 15;
        let two = high[half * 32 + i % 32] >> (2 * (i / 32)) & 3;
        let scale = d * f32::from(scales[n / 16].cast_signed());
        *y = scale * (f32::from(four | two << 4) - 32.0);
    }
}

/// Little-endian bytes of `values` as `kind`, rounded to nearest even, into `out`.
pub(super) fn encode(values: &[f32], kind: Kind, out: &mut [u8]) {
    match kind {
        Kind::BFloat16 => {
            for (x, out) in values.iter().zip(out.chunks_exact_mut(2)) {
                out.copy_from_slice(&bf16::from_f32(*x).to_le_bytes());
            }
        }
        Kind::Half => {
            for (x, out) in values.iter().zip(out.chunks_exact_mut(2)) {
                out.copy_from_slice(&f16::from_f32(*x).to_le_bytes());
            }
        }
        _ => {
            for (x, out) in values.iter().zip(out.chunks_exact_mut(4)) {
                out.copy_from_slice(&x.to_le_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn half(x: f32) -> [u8; 2] {
        f16::from_f32(x).to_le_bytes()
    }

    /// A block: the parts given, then zeros up to its size.
    fn block(format: Format, parts: &[&[u8]]) -> Vec<f32> {
        let mut b = parts.concat();
        b.resize(format.block().1, 0);
        format.decode_all(&b)
    }

    #[test]
    fn plain_numbers() {
        let bytes = [1.5_f32.to_le_bytes(), (-2.0_f32).to_le_bytes()].concat();
        assert_eq!(Format::F32.decode_all(&bytes), [1.5, -2.0]);
        let bytes = [half(0.25), half(-3.0)].concat();
        assert_eq!(Format::F16.decode_all(&bytes), [0.25, -3.0]);
        // 0x3fc0 is the upper half of 1.5.
        assert_eq!(Format::Bf16.decode_all(&[0xc0, 0x3f]), [1.5]);
    }

    #[test]
    fn blocks_of_32() {
        // Scale ½; bytes 1, −2, then zeros.
        let q = block(Format::Q8_0, &[&half(0.5), &[1, 254]]);
        assert_eq!(q[..3], [0.5, -1.0, 0.0]);
        // Nibbles of 0x9f: low 15 at 0, high 9 at 16. ½ · (15 − 8), ½ · (9 − 8), ½ · (0 − 8).
        let q = block(Format::Q4_0, &[&half(0.5), &[0x9f]]);
        assert_eq!((q[0], q[16], q[1]), (3.5, 0.5, -4.0));
        // ½ · 15 + 1, ½ · 9 + 1, 1.
        let q = block(Format::Q4_1, &[&half(0.5), &half(1.0), &[0x9f]]);
        assert_eq!((q[0], q[16], q[1]), (8.5, 5.5, 1.0));
        // Fifth bits: number 0 gets 16 (15 + 16 = 31), number 16 none.
        let q = block(Format::Q5_0, &[&half(0.5), &1_u32.to_le_bytes(), &[0x9f]]);
        assert_eq!((q[0], q[16], q[1]), (7.5, -3.5, -8.0));
        let fifth = (1_u32 << 16).to_le_bytes();
        let q = block(Format::Q5_1, &[&half(0.5), &half(1.0), &fifth, &[0x9f]]);
        assert_eq!((q[0], q[16], q[1]), (8.5, 13.5, 1.0));
    }

    #[test]
    fn blocks_of_256() {
        // d = ½, dmin = ¼. Group 0: scale 3, minimum 2 (bytes 0 and 4). Group 4: lower bits of its
        // scale and minimum in byte 8 (5 and 6), upper ones in the top of bytes 0 and 4 (2 and 1):
        // scale 5 + 32 = 37, minimum 6 + 16 = 22.
        let mut scales = [0_u8; 12];
        scales[0] = 3 | 2 << 6;
        scales[4] = 2 | 1 << 6;
        scales[8] = 5 | 6 << 4;
        // Numbers 0 and 32 share byte 0, 128 and 160 byte 64.
        let mut packed = [0_u8; 128];
        packed[0] = 0x9f;
        packed[64] = 0x37;
        let head = [&half(0.5)[..], &half(0.25), &scales].concat();
        let q = block(Format::Q4K, &[&head, &packed]);
        // ½ · 3 · 15 − ¼ · 2; group 1 has scale and minimum 0; ½ · 37 · 7 − ¼ · 22.
        assert_eq!((q[0], q[1], q[32]), (22.0, -0.5, 0.0));
        assert_eq!((q[128], q[129], q[160]), (124.0, -5.5, 0.0));
        // Fifth bits of group 0 (bit 0) at 1, of group 4 (bit 4) at 0.
        let mut fifth = [0_u8; 32];
        fifth[0] = 1 << 4;
        fifth[1] = 1;
        let q = block(Format::Q5K, &[&head, &fifth, &packed]);
        // ½ · 3 · 16 − ½; ½ · 37 · (7 + 16) − 5.5.
        assert_eq!((q[0], q[1], q[128]), (22.0, 23.5, 420.0));
    }

    #[test]
    fn blocks_of_six_bits() {
        let (mut low, mut high, mut scales) = ([0_u8; 128], [0_u8; 64], [0_u8; 16]);
        // Numbers 0 and 64 share byte 0 of `low`; 0, 32, 64, 96 byte 0 of `high`.
        (low[0], high[0]) = (0x5a, 0b11_10_01_00);
        // The second half begins at byte 64 of `low` and byte 32 of `high`.
        (low[64], high[32]) = (0x0f, 0b11);
        // Groups of 16: 0, 2 (32…), 4 (64…), 6 (96…), 8 (128…).
        for (i, s) in [(0, 1_i8), (2, 2), (4, -3), (6, 4), (8, 5)] {
            scales[i] = s.cast_unsigned();
        }
        let q = block(Format::Q6K, &[&low, &high, &scales, &half(0.5)]);
        // ½·1·(10 − 32); ½·2·(16 − 32); ½·−3·(5 + 32 − 32); ½·4·(48 − 32); ½·5·(63 − 32).
        assert_eq!((q[0], q[32], q[64]), (-11.0, -16.0, -7.5));
        assert_eq!((q[96], q[128]), (32.0, 77.5));
    }

    #[test]
    fn parts_in_parallel_are_the_whole() {
        // More than one task's numbers, the last task a part.
        let bytes: Vec<u8> = (0..(TASK * 5 / 2) as u32)
            .flat_map(|i| (i as f32).to_le_bytes())
            .collect();
        let all = Format::F32.decode_all(&bytes);
        assert_eq!(all.len(), TASK * 5 / 2);
        assert!(all.iter().enumerate().all(|(i, x)| *x == i as f32));
    }
}
