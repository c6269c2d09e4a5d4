//! The words that top-p sampling keeps.

use tch::{Kind, Tensor};

use crate::error::{Result, ensure};
use crate::linear_logprobs::{check_logits, rows_of_budget};

/// The smallest set of likeliest words whose probabilities together reach p. No gradients.
#[derive(Debug)]
pub struct Nucleus {
    /// `[M]` their mass, p or more: what a log-probability under top-p sampling is to be lessened by is its
    /// logarithm.
    pub mass: Tensor,
    /// `[M]` i64: how many they are.
    pub size: Tensor,
    /// `[M]` the log-probability of the least likely of them: a word with less is outside.
    pub least: Tensor,
}

/// What top-p sampling keeps of softmax(logits) (Holtzman et al. 2020, arXiv 1904.09751, equation 2); ties at the
/// border are cut in libtorch's order of sorting. Rows are sorted some at a time.
///
/// # Shapes
/// `logits` `[M, V]`; results `[M]` in f32, or f64 for f64.
///
/// # Errors
/// When `logits` is not two-dimensional or p not in 0 < p ≤ 1.
pub fn nucleus(logits: &Tensor, p: f64) -> Result<Nucleus> {
    const OP: &str = "nucleus";
    let size = check_logits(OP, logits)?;
    ensure(p > 0.0 && p <= 1.0, OP, || {
        format!("p is {p}, expected 0 < p <= 1")
    })?;
    let kind = if logits.kind() == Kind::Double {
        Kind::Double
    } else {
        Kind::Float
    };
    // Sorted values, their places and the running sums are alive at once.
    let rows = rows_of_budget(logits, size[1], 6, None);
    let logits = logits.detach();
    let (mut mass, mut sizes, mut least) = (Vec::new(), Vec::new(), Vec::new());
    for start in (0..size[0]).step_by(rows as usize) {
        let part = logits.narrow(0, start, rows.min(size[0] - start));
        let (sorted, _) = part.f_log_softmax(1, kind)?.sort(1, true);
        let running = sorted.exp().cumsum(1, Kind::Double);
        // A word is in as long as those before it do not reach p; the first always is.
        let inside = running
            .lt(p)
            .sum_dim_intlist(&[1i64][..], true, Kind::Int64)
            + 1;
        let inside = inside.clamp_max(size[1]);
        let last = &inside - 1;
        mass.push(running.gather(1, &last, false).squeeze_dim(1).to_kind(kind));
        least.push(sorted.gather(1, &last, false).squeeze_dim(1));
        sizes.push(inside.squeeze_dim(1));
    }
    let joined = |parts: &[Tensor], kind| match parts {
        [] => Tensor::zeros([0], (kind, logits.device())),
        parts => Tensor::cat(parts, 0),
    };
    Ok(Nucleus {
        mass: joined(&mass, kind),
        size: joined(&sizes, Kind::Int64),
        least: joined(&least, kind),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(probabilities: &[f64], p: f64) -> (f64, i64, f64) {
        let logits = Tensor::from_slice(probabilities).log().unsqueeze(0);
        let n = nucleus(&logits, p).unwrap();
        let number = |t: &Tensor| t.double_value(&[0]);
        (
            number(&n.mass),
            n.size.int64_value(&[0]),
            number(&n.least).exp(),
        )
    }

    /// Probabilities 0.5, 0.3, 0.15, 0.05, in another order.
    #[test]
    fn by_hand() {
        let close = |a: (f64, i64, f64), b: (f64, i64, f64)| {
            assert!(
                (a.0 - b.0).abs() < 1e-12 && a.1 == b.1 && (a.2 - b.2).abs() < 1e-12,
                "{a:?} {b:?}"
            );
        };
        let x = [0.15, 0.5, 0.05, 0.3];
        close(of(&x, 0.4), (0.5, 1, 0.5));
        close(of(&x, 0.7), (0.8, 2, 0.3));
        close(of(&x, 0.94), (0.95, 3, 0.15));
        close(of(&x, 0.96), (1.0, 4, 0.05));
        close(of(&[1.0], 0.3), (1.0, 1, 1.0));
        // A word that cannot be is not needed.
        close(of(&[0.0, 1.0, 0.0], 0.9), (1.0, 1, 1.0));
    }

    #[test]
    fn ends() {
        let empty = Tensor::zeros([0, 3], (Kind::Float, tch::Device::Cpu));
        assert_eq!(nucleus(&empty, 0.5).unwrap().size.size(), [0]);
        for p in [0.0, 1.1, f64::NAN] {
            assert!(nucleus(&empty, p).is_err());
        }
        let narrow = Tensor::from_slice(&[0f32, 0.0])
            .view([1, 2])
            .to_kind(Kind::BFloat16);
        assert_eq!(nucleus(&narrow, 1.0).unwrap().mass.kind(), Kind::Float);
        assert!(nucleus(&empty.view([-1]), 0.5).is_err());
    }
}
