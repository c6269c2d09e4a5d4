//! Negative log-likelihood: alone (`sft`), and the term that keeps the chosen likely beside another loss.

use rlhf_kernels::{LossSum, Ragged};

use super::{PairValues, PreferenceOutput};
use crate::error::Result;

/// The NLL of each chosen as a mean over its tokens: L = −log π_c / n_c.
///
/// The term of Pang et al. 2024, iterative reasoning preference optimisation (arXiv 2404.19733). Rewards
/// are Δ, since there is no β.
///
/// # Shapes
/// `logprobs` sums log π, `lengths` and `ratios` Δ, `[P]`; losses `[P]`.
///
/// # Errors
/// When the columns are of other pairs.
pub fn sft(
    logprobs: &PairValues,
    lengths: &PairValues,
    ratios: &PairValues,
) -> Result<PreferenceOutput> {
    logprobs.fits("nll::sft", "ratios", ratios.chosen())?;
    let losses = -logprobs.per_token(lengths)?.chosen();
    Ok(PreferenceOutput::new(losses, ratios, 1.0))
}

/// TRL's form of [`sft`]: L = −Σ log π_c / Σ n_c, one mean over all tokens of the chosen of this call, the same
/// for every pair.
///
/// It depends on how a step is cut into micro-batches, and long completions weigh more.
///
/// # Shapes
/// As of [`sft`].
///
/// # Errors
/// When the columns are of other pairs.
pub fn sft_batch_mean(
    logprobs: &PairValues,
    lengths: &PairValues,
    ratios: &PairValues,
) -> Result<PreferenceOutput> {
    logprobs.fits("nll::sft_batch_mean", "lengths", lengths.chosen())?;
    logprobs.fits("nll::sft_batch_mean", "ratios", ratios.chosen())?;
    let tokens = lengths
        .chosen()
        .to_kind(logprobs.chosen().kind())
        .sum(None)
        .clamp_min(1.0);
    let mean = -logprobs.chosen().sum(None) / tokens;
    let losses = mean.expand(logprobs.chosen().size(), false);
    Ok(PreferenceOutput::new(losses, ratios, 1.0))
}

/// The NLL of whole completions: Σ −log π over tokens, with the number of tokens.
///
/// The gold completion's term of triple preference optimisation (Saeidi et al. 2024, arXiv 2405.16681), and
/// plain instruction tuning.
pub fn tokens(logprobs: &Ragged) -> LossSum {
    LossSum {
        sum: -logprobs.values().sum(None),
        weight: logprobs.values().numel() as f64,
    }
}

/// Dynamic fine-tuning: Σ −p log p over tokens with p taken as a constant, with the number of tokens.
///
/// Wu et al. 2025 (arXiv 2508.05629): tokens that the model finds unlikely pull less.
pub fn dynamic(logprobs: &Ragged) -> LossSum {
    let x = logprobs.values();
    LossSum {
        sum: -(x.detach().exp() * x).sum(None),
        weight: x.numel() as f64,
    }
}

#[cfg(test)]
mod tests {
    use rlhf_kernels::Offsets;
    use tch::Tensor;

    use super::*;

    #[test]
    fn by_hand() {
        let pair = |a: [f64; 2]| {
            let t = Tensor::from_slice(&a);
            PairValues::new(&t, &t).unwrap()
        };
        let (logprobs, lengths, ratios) = (pair([-6.0, -1.0]), pair([3.0, 1.0]), pair([0.5, 0.0]));
        let each = sft(&logprobs, &lengths, &ratios).unwrap();
        assert_eq!(Vec::<f64>::try_from(&each.losses).unwrap(), [2.0, 1.0]);
        assert_eq!(each.chosen_rewards.double_value(&[0]), 0.5);
        let batch = sft_batch_mean(&logprobs, &lengths, &ratios).unwrap();
        assert_eq!(Vec::<f64>::try_from(&batch.losses).unwrap(), [1.75, 1.75]);
        // p = ½ and ¼: ½ ln 2 + ¼ 2 ln 2, whose gradient is -p.
        let ln_2 = std::f64::consts::LN_2;
        let leaf = Tensor::from_slice(&[-ln_2, -2.0 * ln_2]).set_requires_grad(true);
        let ragged =
            Ragged::new(leaf.shallow_clone(), Offsets::new(vec![0, 1, 2]).unwrap()).unwrap();
        let dynamic = dynamic(&ragged);
        assert!((dynamic.sum.double_value(&[]) - ln_2).abs() < 1e-15);
        dynamic.sum.backward();
        assert_eq!(Vec::<f64>::try_from(&leaf.grad()).unwrap(), [-0.5, -0.25]);
        let plain = tokens(&ragged);
        assert_eq!(plain.weight, 2.0);
        assert!((plain.sum.double_value(&[]) - 3.0 * ln_2).abs() < 1e-15);
    }
}
