//! Public datasets in their own formats: each row becomes rows of the canonical columns.
//!
//! Invariant: nothing else in the project knows a source format. A row that is not what its format says
//! is refused with its place, never half understood. What an importer leaves out, [`convert`] says.
//!
//! The canonical columns: `messages`, or `prompt` and `completion` (demonstrations; with `label`:
//! unpaired; with `ratings`: rated by attribute); `prompt`, `chosen`, `rejected`, `margin` (pairs);
//! `prompt`, `completions` with `scores` or `ranks` (ranked) or `labels` (step by step); `prompt` and
//! others (prompts). Every row may have `weight` and `source`, an object that says where it comes from.

mod canonical;
mod cell;
mod chat;
#[cfg(feature = "hub")]
pub mod hub;
mod manifest;
mod oasst;
mod pairs;
mod ranked;
mod read;
mod steps;

use serde_json::{Map, Value};

use crate::record::Fault;

pub use manifest::{Manifest, Split, shipped};
pub use read::{Import, OnBad, Skipped, preferences, read, records};

/// The formats that are understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Format {
    /// The canonical columns themselves.
    Canonical,
    /// `chosen` and `rejected` as one text each, with `Human:` and `Assistant:`.
    HhRlhf,
    /// `instruction`, `input`, `output`.
    Alpaca,
    /// `conversations` of `from` and `value`.
    ShareGpt,
    /// `messages` of `role` and `content`, perhaps with tool calls.
    OpenAiMessages,
    /// `question`, `answer` with `####` before the final one.
    Gsm8k,
    /// `instruction`, `completions` with annotations.
    UltraFeedback,
    /// `prompt`, `chosen`, `rejected` as whole conversations, `score_chosen`, `score_rejected`.
    UltraFeedbackBinarized,
    /// `prompt`, `response` and five attributes.
    HelpSteer2,
    /// `prompt`, `answers` with ranks.
    Nectar,
    /// `history`, `human_ref_A`, `human_ref_B`, `labels`.
    Shp,
    /// `question`, `answer_0`, `answer_1`, `score_0`, `score_1`.
    WebGptComparisons,
    /// `info`, `summaries`, `choice`.
    TldrComparisons,
    /// `question`, `label` with rated steps.
    Prm800k,
    /// `prompt`, `instruction_id_list`, `kwargs`.
    IfEval,
    /// Messages with `message_id`, `parent_id`, `message_tree_id`, or whole trees of them.
    Oasst1,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 16] = [
        Self::Canonical,
        Self::HhRlhf,
        Self::Alpaca,
        Self::ShareGpt,
        Self::OpenAiMessages,
        Self::Gsm8k,
        Self::UltraFeedback,
        Self::UltraFeedbackBinarized,
        Self::HelpSteer2,
        Self::Nectar,
        Self::Shp,
        Self::WebGptComparisons,
        Self::TldrComparisons,
        Self::Prm800k,
        Self::IfEval,
        Self::Oasst1,
    ];

    /// The name in recipes and manifests.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Canonical => "canonical",
            Self::HhRlhf => "hh-rlhf",
            Self::Alpaca => "alpaca",
            Self::ShareGpt => "sharegpt",
            Self::OpenAiMessages => "openai-messages",
            Self::Gsm8k => "gsm8k",
            Self::UltraFeedback => "ultrafeedback",
            Self::UltraFeedbackBinarized => "ultrafeedback-binarized",
            Self::HelpSteer2 => "helpsteer2",
            Self::Nectar => "nectar",
            Self::Shp => "shp",
            Self::WebGptComparisons => "webgpt-comparisons",
            Self::TldrComparisons => "tldr-comparisons",
            Self::Prm800k => "prm800k",
            Self::IfEval => "ifeval",
            Self::Oasst1 => "oasst1",
        }
    }

    /// The format of a name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.name() == name)
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The format that a row's columns tell, where they tell one.
///
/// What several formats share goes to the one that reads it right: `messages` are read as
/// [`Format::OpenAiMessages`], of which the canonical ones are a part.
#[must_use]
pub fn sniff(columns: &Map<String, Value>) -> Option<Format> {
    let has = |names: &[&str]| names.iter().all(|n| columns.contains_key(*n));
    let text = |name: &str| columns.get(name).is_some_and(Value::is_string);
    let list = |name: &str| columns.get(name).is_some_and(Value::is_array);
    let object = |name: &str| columns.get(name).is_some_and(Value::is_object);
    let final_answer = || {
        columns
            .get("answer")
            .and_then(Value::as_str)
            .is_some_and(|a| a.contains("####"))
    };
    let message_of_tree = ["message_id", "parent_id", "text", "role"];
    let table = [
        (
            text("message_tree_id") && (object("prompt") || has(&message_of_tree)),
            Format::Oasst1,
        ),
        (
            text("prompt")
                && list("chosen")
                && has(&["rejected", "score_chosen", "score_rejected"]),
            Format::UltraFeedbackBinarized,
        ),
        (
            !has(&["prompt"]) && text("chosen") && text("rejected"),
            Format::HhRlhf,
        ),
        (
            has(&["prompt", "response", "helpfulness", "verbosity"]),
            Format::HelpSteer2,
        ),
        (has(&["prompt"]) && list("answers"), Format::Nectar),
        (
            has(&["history", "human_ref_A", "human_ref_B", "labels"]),
            Format::Shp,
        ),
        (
            has(&["question", "answer_0", "answer_1", "score_0", "score_1"]),
            Format::WebGptComparisons,
        ),
        (
            object("info") && list("summaries") && has(&["choice"]),
            Format::TldrComparisons,
        ),
        (object("question") && object("label"), Format::Prm800k),
        (text("question") && final_answer(), Format::Gsm8k),
        (
            text("prompt") && list("instruction_id_list") && list("kwargs"),
            Format::IfEval,
        ),
        (
            has(&["instruction"]) && list("completions"),
            Format::UltraFeedback,
        ),
        (has(&["instruction", "output"]), Format::Alpaca),
        (list("conversations"), Format::ShareGpt),
        (list("messages"), Format::OpenAiMessages),
        (
            has(&["prompt"]) || has(&["chosen", "rejected"]) || text("text") || text("messages"),
            Format::Canonical,
        ),
    ];
    table.into_iter().find(|(is, _)| *is).map(|(_, f)| f)
}

/// One source row as rows of the canonical columns.
///
/// - Alpaca: the user says the instruction and, after an empty line, the input where there is one.
/// - GSM8K: `messages` for training, `prompt` and `answer` (what follows `####`, as it is written:
///   `1,000` keeps its comma) for checking.
/// - UltraFeedback: a completion's score is the mean of its aspect ratings; where it has none, its
///   `fine-grained_score`, then its `overall_score`. Fewer than two completions give no row.
/// - UltraFeedback binarized: the margin is the difference of the scores.
/// - Nectar: rank 1 is the best; the score is the rank, negated.
/// - SHP: `labels` 1 prefers A. WebGPT: the margin is the difference of the scores; a tie gives no row.
/// - TL;DR: plain text; only Reddit posts are understood, not the news articles of its other splits.
/// - PRM800K: one row a path: for each step, one for every rated completion that was not taken, and the
///   taken path at the end. Neutral counts as good, and so does a step that the labeller wrote.
/// - OASST1: one row for each message of the prompter with two or more ranked replies; rank 0 is the
///   best, the score is the rank, negated. Messages that are deleted or were found bad, and what follows
///   them, are left out. Only a whole tree gives rows: [`read`] puts single messages together, which
///   must stand tree by tree.
/// - OpenAI messages: every other column is kept but `prompt`, which `messages` begins with.
/// - Canonical: text that must be a number, a truth value, a list or an object, as in CSV, is read as one.
/// - What names a person, a model, a dataset or an id goes to `source`; but for the last two formats,
///   other columns are left out.
///
/// # Errors
/// What is wrong with the row.
pub fn convert(format: Format, row: Map<String, Value>) -> Result<Vec<Map<String, Value>>, Fault> {
    let one = |r: Map<String, Value>| vec![r];
    match format {
        Format::Canonical => canonical::canonical(row).map(one),
        Format::HhRlhf => pairs::hh_rlhf(&row).map(one),
        Format::Alpaca => chat::alpaca(&row).map(one),
        Format::ShareGpt => chat::sharegpt(&row).map(one),
        Format::OpenAiMessages => chat::openai(row).map(one),
        Format::Gsm8k => chat::gsm8k(&row).map(one),
        Format::UltraFeedback => ranked::ultrafeedback(&row),
        Format::UltraFeedbackBinarized => pairs::ultrafeedback_binarized(&row).map(one),
        Format::HelpSteer2 => ranked::helpsteer2(&row).map(one),
        Format::Nectar => ranked::nectar(&row).map(one),
        Format::Shp => pairs::shp(&row).map(one),
        Format::WebGptComparisons => pairs::webgpt(&row),
        Format::TldrComparisons => pairs::tldr(&row).map(one),
        Format::Prm800k => steps::prm800k(&row),
        Format::IfEval => chat::ifeval(&row).map(one),
        Format::Oasst1 => oasst::nested(&row),
    }
}
