//! What a recipe says of direct alignment on thumbs, on rankings, and online.

use rlhf_dpo::loss::plackett_luce::RankedLoss;
use rlhf_dpo::loss::unpaired::UnpairedLoss;
use rlhf_dpo::online::OnlineMethod;
use serde::{Deserialize, Serialize};

use super::stages::{Data, Optim, Rollouts};
use crate::memory::{Memory, is_default};

/// Direct alignment on fixed rows by a loss `L`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Align<L> {
    /// `init` or an earlier stage: policy and reference.
    pub model: String,
    /// The rows.
    pub data: Data,
    /// Held-out rows, evaluated after training, and after every `test_every` steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<Data>,
    /// Look at the held-out rows after every so many steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test_every: Option<u64>,
    /// At every look, answer so many of the held-out prompts: `samples-000020.jsonl` in the stage's folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<usize>,
    /// Stop when the held-out loss was not lower than its lowest for so many looks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patience: Option<u64>,
    /// Optimiser steps.
    pub steps: u64,
    /// Rows a step.
    pub batch_size: usize,
    /// Packed tokens a micro-batch.
    pub micro_tokens: usize,
    /// The loss, by its name in docs/losses.md.
    pub loss: L,
    /// The optimiser.
    pub optim: Optim,
    /// How memory is saved.
    #[serde(default, skip_serializing_if = "is_default")]
    pub memory: Memory,
}

/// Thumbs: `loss = { kind = "kto", beta = 0.1, weights = { desirable = 1.0, undesirable = 1.0 } }` and kin.
pub type Unpaired = Align<UnpairedLoss>;

/// Rankings: `loss = { kind = "plackett_luce", beta = 0.1 }`.
pub type Ranked = Align<RankedLoss>;

impl<L> Align<L> {
    /// What is wrong with it, if anything, its loss and optimiser aside.
    pub(super) fn problem(&self) -> Option<&'static str> {
        looks(
            (self.steps, self.batch_size),
            self.test.is_some(),
            self.test_every,
            self.patience,
            self.samples,
        )
        .or_else(|| self.memory.problem())
    }
}

/// Online direct alignment: completions are drawn, scored and trained on as pairs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OnlineDpo {
    /// `init` or an earlier stage: policy and reference.
    pub model: String,
    /// Prompts, sampling and scores; `group_size` is the policy's completions of each prompt.
    pub rollouts: Rollouts,
    /// What is drawn and learned: `{ kind = "best_worst", loss = { kind = "sigmoid", beta = 0.1 } }`, `{ kind =
    /// "xpo", loss = …, alpha = 1e-5 }` or `{ kind = "nash_md", tau = 0.1, mixture = 0.5, preference = "higher" }`.
    pub method: OnlineMethod,
    /// Optimiser steps.
    pub steps: u64,
    /// Packed tokens a micro-batch.
    pub micro_tokens: usize,
    /// The policy becomes the reference before every so many steps: iterative DPO.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refresh_every: Option<u64>,
    /// Fixed pairs that join each step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Replay>,
    /// The optimiser.
    pub optim: Optim,
    /// How memory is saved.
    #[serde(default, skip_serializing_if = "is_default")]
    pub memory: Memory,
}

/// Fixed pairs beside those that are drawn.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replay {
    /// Preference pairs.
    pub data: Data,
    /// How many join each step.
    pub pairs_per_step: usize,
}

impl OnlineDpo {
    /// What is wrong with it, if anything, its rollouts and optimiser aside.
    pub(super) fn problem(&self) -> Option<String> {
        let scored = self.method.pair_loss().is_none_or(|l| l.asks_scores());
        let best_worst = matches!(self.method, OnlineMethod::BestWorst { .. });
        let plain = if self.steps == 0 || self.refresh_every == Some(0) {
            Some("steps and refresh_every must be above 0")
        } else if best_worst && self.rollouts.group_size < 2 {
            Some("group_size must be at least 2: one completion has no other to be set against")
        } else if self.rollouts.server.is_some() {
            Some(
                "rollouts.server is for grpo and ppo: here the policy's own completions are compared",
            )
        } else if self.replay.is_some() && scored {
            Some("replay needs a loss of pairs that asks for no scores")
        } else if self.replay.as_ref().is_some_and(|r| r.pairs_per_step == 0) {
            Some("replay.pairs_per_step must be above 0")
        } else {
            self.memory.problem()
        };
        plain
            .map(str::to_owned)
            .or_else(|| Some(format!("method: {}", self.method.check().err()?)))
    }
}

/// What is wrong with a stage's steps, rows a step and looks at held-out rows, if anything.
pub(super) fn looks(
    (steps, batch_size): (u64, usize),
    test: bool,
    every: Option<u64>,
    patience: Option<u64>,
    samples: Option<usize>,
) -> Option<&'static str> {
    if steps == 0 || batch_size == 0 {
        return Some("steps and batch_size must be above 0");
    }
    if !test && (every.is_some() || patience.is_some()) {
        return Some("test_every and patience need test");
    }
    let looked = patience.is_some() || samples.is_some();
    (looked && every.is_none()).then_some("patience and samples need test_every")
}
