//! Losses of preferences: free functions of log-probabilities, and enums that name them.
//!
//! Notation: Δc = log π(y_c|x) − log π₀(y_c|x), the sum over the chosen completion's trained tokens;
//! Δr likewise for the rejected one; h = Δc − Δr; ℓ(z) = log σ(z); log p̄ = log π / n, the mean over the n
//! tokens of a completion.
//!
//! | labels | by name | functions |
//! | --- | --- | --- |
//! | pairs | [`PreferenceLoss`], mixed by [`PreferenceMix`] | [`dpo`], [`margin`], [`absolute`], [`aot`], [`likelihood`], [`nll`] |
//! | thumbs | [`UnpairedLoss`](unpaired::UnpairedLoss) | [`unpaired`] |
//! | rankings | [`RankedLoss`](plackett_luce::RankedLoss) | [`plackett_luce`] |
//!
//! Modifiers are functions of what goes in: [`Divergence`] (f-DPO), [`PairValues::per_token`] (length
//! normalisation), [`PairTokens::length_desensitized`] (LD-DPO), [`PairTokens::wpo_weights`] (WPO),
//! [`PairLogprobs::reference_free`]. A reference computed beforehand is just numbers in [`PairLogprobs`].
//!
//! Invariant: a loss sees tensors only, and gives a sum over pairs with the number of pairs, never a
//! mean, so that a step may be split into micro-batches in any way. (Exceptions say so: [`aot`], which
//! sorts, and [`nll::sft_batch_mean`].)

pub mod absolute;
pub mod aot;
mod checks;
mod divergence;
pub mod dpo;
pub mod likelihood;
pub mod margin;
pub mod nll;
pub mod online;
mod pairs;
pub mod plackett_luce;
mod preference;
mod tokens;
pub mod unpaired;

pub use divergence::Divergence;
pub use pairs::{PairLogprobs, PairValues, Pairs, PreferenceOutput};
pub use preference::{PreferenceLoss, PreferenceMix, WeightedLoss};
pub use tokens::PairTokens;
