//! What a run finds, as files: `run.json`, and each evaluation's `eval.json`. The report reads these.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::interval::Interval;

/// `run.json`: written at the end of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunSummary {
    /// The recipe's title.
    pub title: String,
    /// The recipe's name.
    pub recipe: String,
    /// Version of this program.
    pub version: String,
    /// The git revision of the working folder, where there is one.
    pub git_revision: Option<String>,
    /// Where it was computed, and with how many threads.
    pub device: String,
    /// Weights of the model.
    pub parameters: u64,
    /// Wall time of all stages in seconds, over all resumes.
    pub seconds: f64,
    /// The most memory held, in bytes.
    pub peak_memory: Option<u64>,
    /// The stages in order.
    pub stages: Vec<StageSummary>,
    /// SHA-256 of each data file.
    pub data: BTreeMap<String, String>,
    /// SHA-256 of each stage's weights.
    pub models: BTreeMap<String, String>,
}

/// A finished stage (`done.json` in its folder).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StageSummary {
    /// Its name, also its folder.
    pub name: String,
    /// Its kind in the recipe.
    pub kind: String,
    /// Steps.
    pub steps: u64,
    /// Wall time in seconds.
    pub seconds: f64,
    /// Tokens learned from.
    pub tokens: u64,
    /// Metrics: means over the last steps, and what was measured at the end.
    #[serde(rename = "final")]
    pub last: BTreeMap<String, f64>,
}

/// `eval.json`: what an evaluation found.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Evaluation {
    /// The model that the others are compared with.
    pub baseline: String,
    /// One row a model.
    pub models: Vec<ModelRow>,
    /// The reward model's accuracy on held-out pairs, where there is one.
    pub reward_model_accuracy: Option<Interval>,
    /// For each held-out pair what the reward model gives for chosen less rejected, as log-odds (not
    /// normalised). May be empty.
    #[serde(default)]
    pub reward_margins: Vec<f64>,
    /// What was promised, and whether it holds.
    pub checks: Vec<Check>,
    /// Prompts with what each model wrote.
    pub samples: Vec<Sample>,
}

/// A model's measures.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModelRow {
    /// Its stage.
    pub name: String,
    /// Measures by key; see [`MEASURES`].
    pub measures: BTreeMap<String, Interval>,
}

/// A measure: key, heading, and whether more is better.
#[derive(Clone, Copy, Debug)]
pub struct Measure {
    /// Key in `eval.json`.
    pub key: &'static str,
    /// Heading in tables.
    pub heading: &'static str,
    /// Shown in percent.
    pub percent: bool,
}

const fn measure(key: &'static str, heading: &'static str, percent: bool) -> Measure {
    Measure {
        key,
        heading,
        percent,
    }
}

/// All measures, in the order of tables.
pub const MEASURES: &[Measure] = &[
    measure("return", "mean return", false),
    measure("gold", "gold score", false),
    measure("win_rate", "win rate", true),
    measure("kl", "KL, nats", false),
    measure("reward", "reward", false),
    measure("length", "length, tokens", false),
    measure("stopped", "ends itself", true),
    measure("distinct1", "distinct-1", false),
    measure("distinct2", "distinct-2", false),
    measure("distinct_words", "distinct words", true),
    measure("likelier", "chosen likelier", true),
    measure("pair_accuracy", "pairs right", true),
    measure("margin", "pair margin", false),
];

/// A promise and whether it holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Check {
    /// What was promised.
    pub what: String,
    /// The numbers.
    pub found: String,
    /// Whether it holds.
    pub ok: bool,
}

/// A prompt with what each model wrote.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// The user's text.
    pub prompt: String,
    /// One a model.
    pub answers: Vec<Answer>,
}

/// What a model wrote.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Answer {
    /// The model.
    pub model: String,
    /// Its tokens.
    pub tokens: Vec<Token>,
    /// The gold judge's score.
    pub gold: Option<f64>,
    /// The reward model's score.
    pub reward: Option<f64>,
}

/// A token with its log-probability under the model and under the baseline.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Token {
    /// Its text.
    pub text: String,
    /// Under the model that wrote it.
    pub logprob: f64,
    /// Under the baseline.
    pub baseline: f64,
}
