//! One tensor from its storage format to bytes of another type, row by row and in parallel.
//!
//! Beside the mapped file and the result there is a row for each thread; only a transposed matrix is
//! decoded as a whole.

use rayon::prelude::*;
use tch::Kind;

use super::blocks::{Format, encode};
use super::file::Parsed;

/// How many numbers a task converts at least.
const TASK: usize = 1 << 14;

/// A tensor's way from a file to another.
#[derive(Clone, Copy, Debug)]
pub(super) struct Conversion {
    pub(super) format: Format,
    pub(super) rows: usize,
    pub(super) width: usize,
    /// Heads whose rows go from pairs to halves.
    pub(super) heads: Option<usize>,
    pub(super) minus_one: bool,
    pub(super) transposed: bool,
    pub(super) kind: Kind,
}

impl Conversion {
    /// Checks that rows split into heads, and that rows are what the format can be cut into.
    pub(super) fn check(&self, shape: &[usize]) -> Parsed<()> {
        if self.transposed && shape.len() != 2 {
            return Err(format!("shape {shape:?} is no matrix"));
        }
        let Some(heads) = self.heads else {
            return Ok(());
        };
        if heads == 0 || !self.rows.is_multiple_of(2 * heads) {
            return Err(format!("shape {shape:?} does not split into {heads} heads"));
        }
        if !self.width.is_multiple_of(self.format.block().0) {
            return Err(format!(
                "{:?} cannot be cut into {} rows",
                self.format, self.rows
            ));
        }
        Ok(())
    }

    /// The converted bytes.
    pub(super) fn run(&self, bytes: &[u8]) -> Vec<u8> {
        let size = self.kind.elt_size_in_bytes();
        let mut out = vec![0_u8; self.rows * self.width * size];
        if out.is_empty() {
            return out;
        }
        if self.transposed {
            let values = self.format.decode_all(bytes);
            let (rows, width) = (self.width, self.rows);
            out.par_chunks_mut(width * size)
                .with_min_len(TASK.div_ceil(width))
                .enumerate()
                .for_each_init(Vec::new, |row, (n, out)| {
                    row.clear();
                    row.extend(values.iter().skip(n).step_by(rows));
                    encode(row, self.kind, out);
                });
            return out;
        }
        let (numbers, block) = self.format.block();
        let row_bytes = self.width / numbers * block;
        out.par_chunks_mut(self.width * size)
            .with_min_len(TASK.div_ceil(self.width))
            .enumerate()
            .for_each_init(
                || vec![0.0; self.width],
                |row, (n, out)| {
                    let from = self.source(n);
                    self.format
                        .decode(&bytes[from * row_bytes..][..row_bytes], row);
                    if self.minus_one {
                        row.iter_mut().for_each(|x| *x -= 1.0);
                    }
                    encode(row, self.kind, out);
                },
            );
        out
    }

    /// The stored row that becomes row `n`.
    fn source(&self, n: usize) -> usize {
        let Some(heads) = self.heads else {
            return n;
        };
        let head = self.rows / heads;
        let (first, i) = (n / head * head, n % head);
        first + i % (head / 2) * 2 + i / (head / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(rows: usize, width: usize) -> Conversion {
        Conversion {
            format: Format::F32,
            rows,
            width,
            heads: None,
            minus_one: false,
            transposed: false,
            kind: Kind::Float,
        }
    }

    fn run(c: Conversion, values: &[f32]) -> Vec<f32> {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Format::F32.decode_all(&c.run(&bytes))
    }

    #[test]
    fn rotary_rows_become_halves() {
        // Two heads of 4 rows, width 1: each stored as 0 2 1 3.
        let c = Conversion {
            heads: Some(2),
            ..plain(8, 1)
        };
        assert!(c.check(&[8]).is_ok());
        assert_eq!(
            run(c, &[0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]),
            [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
        );
    }

    #[test]
    fn rows_become_columns_and_lose_one() {
        let c = Conversion {
            transposed: true,
            ..plain(2, 3)
        };
        assert_eq!(
            run(c, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
            [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]
        );
        let c = Conversion {
            minus_one: true,
            ..plain(1, 2)
        };
        assert_eq!(run(c, &[1.0, 3.0]), [0.0, 2.0]);
        assert_eq!(run(plain(0, 3), &[]), [] as [f32; 0]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let heads = |heads, c| Conversion {
            heads: Some(heads),
            ..c
        };
        let e = heads(3, plain(8, 1)).check(&[8, 1]).unwrap_err();
        assert!(e.contains("[8, 1] does not split into 3 heads"), "{e}");
        assert!(heads(0, plain(8, 1)).check(&[8, 1]).is_err());
        let blocks = Conversion {
            format: Format::Q8_0,
            ..heads(2, plain(32, 1))
        };
        assert!(blocks.check(&[32]).unwrap_err().contains("cannot be cut"));
        let matrix = Conversion {
            transposed: true,
            ..plain(1, 8)
        };
        assert!(matrix.check(&[8]).unwrap_err().contains("no matrix"));
    }
}
