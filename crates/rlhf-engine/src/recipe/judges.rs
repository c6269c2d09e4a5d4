//! What a recipe says of verifiers and judges in a reward.

use rlhf_reward::judge::{Against, Settings};
use serde::{Deserialize, Serialize};

use crate::memory::is_default;

/// A judge: a model behind an OpenAI-compatible server, or one of the recipe's own.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JudgePart {
    /// The server's address, as in `http://localhost:8000/v1`; without it `model` is `init` or an earlier
    /// stage, whose log-probabilities of "A" and "B" judge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// The model's name there, or the stage.
    pub model: String,
    /// The environment variable that holds the server's key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_env: Option<String>,
    /// Whether completions are rated one by one or compared.
    #[serde(default, skip_serializing_if = "is_default")]
    pub style: Style,
    /// What completions are compared with, in the style `pairwise`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub against: Against,
    /// Its texts, the length of its answers, and prices.
    #[serde(default, skip_serializing_if = "is_default")]
    pub settings: Settings,
    /// The score of a completion without a verdict.
    #[serde(default, skip_serializing_if = "is_default")]
    pub failure_score: f64,
    /// Questions at once.
    #[serde(default = "eight")]
    pub at_once: usize,
    /// Seconds that one try may take.
    #[serde(default = "two_minutes")]
    pub timeout_s: f64,
    /// How often a question is asked before it counts as unanswered.
    #[serde(default = "five")]
    pub tries: usize,
    /// The folder where answers are kept, so that nothing is asked twice; by default `judge/` in the run's
    /// folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<String>,
}

/// How a judge is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Style {
    /// Each completion gets a rating.
    #[default]
    Rubric,
    /// Completions are compared, in both orders.
    Pairwise,
}

fn eight() -> usize {
    8
}

fn two_minutes() -> f64 {
    120.0
}

fn five() -> usize {
    5
}

impl JudgePart {
    /// The stage whose model judges, where there is no server.
    #[must_use]
    pub fn stage(&self) -> Option<&str> {
        self.url.is_none().then_some(self.model.as_str())
    }

    /// What makes no sense, if anything.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        if let Err(e) = self.settings.prompts.check() {
            return Some(format!("judge.settings: {e}"));
        }
        if self.url.is_none() && self.style == Style::Rubric {
            return Some(
                "a judge without `url` compares, by log-probabilities: set style = \"pairwise\", or give a server's `url`"
                    .into(),
            );
        }
        if self.style == Style::Rubric && self.against != Against::RoundRobin {
            return Some("judge.against belongs to style = \"pairwise\"".into());
        }
        if self.at_once == 0 || self.tries == 0 || !(self.timeout_s > 0.0 && self.timeout_s < 1e6) {
            return Some("judge.at_once, tries and timeout_s must be above 0".into());
        }
        (!self.failure_score.is_finite()).then(|| "judge.failure_score must be a number".into())
    }
}
