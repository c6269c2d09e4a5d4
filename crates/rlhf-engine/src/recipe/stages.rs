//! What a recipe says of each kind of stage.

use rlhf_data::conversation::Role;
use rlhf_data::synthetic::{critique, self_instruct};
use rlhf_data::tokenize::{Truncation, Turns};
use rlhf_dpo::loss::{Divergence, PreferenceLoss, PreferenceMix, WeightedLoss};
use rlhf_kernels::optim::{AdamWConfig, OptimizerConfig};
use rlhf_model::DecoderWeights;
use rlhf_policy::advantage::{AdvantageEstimator, Whitening};
use rlhf_policy::collect::{Dynamic, Overlong, Samples};
use rlhf_policy::environment::TalkLimits;
use rlhf_policy::grpo::{AdaptiveKl, OldPolicy};
use rlhf_policy::kl::{KlController, KlPenalty};
use rlhf_policy::loss::clipped::Clip;
use rlhf_policy::loss::mismatch::Correction;
use rlhf_policy::loss::{PolicyLoss, SftLoss};
use rlhf_policy::opd::Objective;
use rlhf_policy::reference::ReferencePolicy;
use rlhf_policy::rejection::{Match, Selection};
use rlhf_reward::labels::Rows;
use rlhf_reward::model::Combine;
use rlhf_reward::objective::{Mix, Objective as RewardObjective};
use rlhf_reward::source::{Gate, Normalize, Rule, Shaping};
use rlhf_reward::train::Bootstrap;
use rlhf_reward::verify::{Check, Pool, PoolConfig};
use rlhf_train::lr_schedule::LrSchedule;
use serde::{Deserialize, Serialize};

use super::judges::JudgePart;
use crate::memory::{Memory, is_default};

/// The optimiser of a stage.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optim {
    /// Peak learning rate.
    pub lr: f64,
    /// Its course, as in `{ kind = "cosine" }`.
    pub schedule: LrSchedule,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Decoupled weight decay (matrices only).
    pub weight_decay: f64,
    /// Gradients of a larger global norm are scaled down to it.
    pub max_grad_norm: f64,
    /// AdamW's β₂.
    #[serde(default = "default_beta2")]
    pub beta2: f64,
    /// How AdamW's moments are kept.
    #[serde(default, skip_serializing_if = "is_default")]
    pub state: MomentKind,
}

/// How AdamW keeps its moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MomentKind {
    /// f32: 8 bytes a parameter.
    #[default]
    F32,
    /// 8-bit codes in blocks of 256: 2.03 bytes a parameter.
    Int8,
}

fn default_beta2() -> f64 {
    0.999
}

impl Optim {
    /// The optimiser; `adamw` are its settings, most often [`Optim::adamw`].
    #[must_use]
    pub fn optimizer(&self, adamw: AdamWConfig) -> OptimizerConfig {
        match self.state {
            MomentKind::F32 => OptimizerConfig::AdamW(adamw),
            MomentKind::Int8 => OptimizerConfig::AdamW8bit(adamw),
        }
    }

    /// AdamW's settings.
    #[must_use]
    pub fn adamw(&self) -> AdamWConfig {
        AdamWConfig {
            beta2: self.beta2,
            weight_decay: self.weight_decay,
            ..AdamWConfig::default()
        }
    }
}

/// Which data a stage reads, and its limits in tokens.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// A file: Parquet, Arrow, JSON Lines, JSON, CSV; `shared:FILE` lies in the shared folder; `stage:NAME` is
    /// what a stage before wrote.
    pub path: String,
    /// The well-known dataset that the file is of, in its own columns: a name of `datasets/manifests`, or
    /// a manifest's file. Without it the file has the columns of its kind (docs/data.md).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset: Option<String>,
    /// The longest prompt; rows with longer ones are dropped unless `truncation` says otherwise.
    pub max_prompt: usize,
    /// The longest completion; longer ones lose their end unless `truncation` says otherwise.
    pub max_completion: usize,
    /// What becomes of longer ones: `{ prompt = "drop" | "keep_start" | "keep_end" | "drop_turns" |
    /// "refuse", completion = "keep_start" | "drop" | "refuse" }`. Every such row is counted.
    #[serde(default, skip_serializing_if = "is_default")]
    pub truncation: Truncation,
    /// Use only the first so many rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
}

impl Data {
    /// The stage that writes the file (`stage:NAME`, `stage:NAME/FILE`), where one does.
    #[must_use]
    pub fn stage(&self) -> Option<&str> {
        let rest = self.path.strip_prefix("stage:")?;
        Some(rest.split_once('/').map_or(rest, |(name, _)| name))
    }
}

/// Supervised fine-tuning.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sft {
    /// `init` or an earlier stage.
    pub model: String,
    /// Demonstrations.
    pub data: Data,
    /// What of them is trained: the assistant's `last` turn, `all` its turns, or `everything`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub turns: Turns,
    /// What is minimised: `{ kind = "nll" }` or `{ kind = "dft" }`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub loss: SftLoss,
    /// Noise of this α on the embeddings (NEFTune, arXiv 2310.05914); 5 to 15 in the paper.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub neftune_alpha: Option<f64>,
    /// Held-out demonstrations, looked at after training, and after every `test_every` steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<Data>,
    /// Look at the held-out demonstrations after every so many steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test_every: Option<u64>,
    /// Optimiser steps.
    pub steps: u64,
    /// Rows a step.
    pub batch_size: usize,
    /// Packed tokens a micro-batch.
    pub micro_tokens: usize,
    /// The optimiser.
    pub optim: Optim,
    /// How memory is saved.
    #[serde(default, skip_serializing_if = "is_default")]
    pub memory: Memory,
}

/// A reward model.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reward {
    /// `init` or an earlier stage: the trunk.
    pub model: String,
    /// Labelled rows.
    pub data: Data,
    /// Held-out rows, looked at after training, and after every `test_every` steps.
    pub test: Data,
    /// Look at the held-out rows after every so many steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test_every: Option<u64>,
    /// What is learned, by its name in docs/losses.md: `{ kind = "bradley_terry", centering = 0.01 }`.
    pub loss: RewardObjective,
    /// The kind of rows, where the loss takes several; its usual one by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<Rows>,
    /// Preference pairs from which a mix of attributes is learned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mix_data: Option<Data>,
    /// Several models as one: `{ count = 4, share = "trunk", combine = { kind = "min" } }`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ensemble: Option<Members>,
    /// Optimiser steps.
    pub steps: u64,
    /// Rows a step.
    pub batch_size: usize,
    /// Packed tokens a micro-batch.
    pub micro_tokens: usize,
    /// The optimiser.
    pub optim: Optim,
    /// How memory is saved.
    #[serde(default, skip_serializing_if = "is_default")]
    pub memory: Memory,
}

impl Reward {
    /// The kind of rows that are read.
    #[must_use]
    pub fn rows(&self) -> Rows {
        self.rows.unwrap_or(self.loss.rows()[0])
    }

    /// What is wrong with it, if anything.
    pub(crate) fn problem(&self) -> Option<String> {
        if let Err(e) = self.loss.check() {
            return Some(format!("loss: {e}"));
        }
        if let Some(rows) = self.rows.filter(|r| !self.loss.rows().contains(r)) {
            let names: Vec<&str> = self.loss.rows().iter().map(|r| r.name()).collect();
            return Some(format!(
                "rows = \"{}\": the loss learns from {}",
                rows.name(),
                names.join(" or ")
            ));
        }
        let learned = matches!(
            self.loss,
            RewardObjective::Regression {
                mix: Mix::Learned { .. },
                ..
            }
        );
        if learned != self.mix_data.is_some() {
            return Some("a learned mix of attributes and mix_data go together".into());
        }
        let count = self.ensemble.as_ref().map_or(1, |e| e.count);
        if !(1..=64).contains(&count) {
            return Some(format!("ensemble.count is {count}, expected 1 to 64"));
        }
        None
    }
}

/// Several reward models as one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Members {
    /// How many.
    pub count: usize,
    /// What they share: the `trunk`, with a head each, or `nothing`.
    pub share: Share,
    /// How they make one score.
    pub combine: Combine,
    /// How much rows count for each of them.
    #[serde(default, skip_serializing_if = "is_default")]
    pub bootstrap: Bootstrap,
}

impl Default for Members {
    fn default() -> Self {
        Self {
            count: 1,
            share: Share::Trunk,
            combine: Combine::Mean,
            bootstrap: Bootstrap::None,
        }
    }
}

/// What the members of an ensemble share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Share {
    /// A trunk, with a head each.
    Trunk,
    /// Nothing: each is trained by itself.
    Nothing,
}

/// Direct preference optimisation.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dpo {
    /// `init` or an earlier stage: policy and reference.
    pub model: String,
    /// Preference pairs.
    pub data: Data,
    /// Held-out pairs, evaluated after training, and after every `test_every` steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<Data>,
    /// Look at the held-out pairs after every so many steps.
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
    /// Pairs a step.
    pub batch_size: usize,
    /// Packed tokens a micro-batch.
    pub micro_tokens: usize,
    /// The loss, by its name in docs/losses.md: `{ kind = "sigmoid", beta = 0.1, label_smoothing = 0.0 }`.
    pub loss: PreferenceLoss,
    /// Losses added to it: `[{ weight = 1.0, loss = { kind = "sft" } }]`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub plus: Vec<WeightedLoss>,
    /// What ties the policy to the reference: `{ kind = "reverse_kl" }` and kin.
    #[serde(default, skip_serializing_if = "is_default")]
    pub divergence: Divergence,
    /// Leave the reference out.
    #[serde(default, skip_serializing_if = "is_default")]
    pub reference_free: bool,
    /// The optimiser.
    pub optim: Optim,
    /// How memory is saved.
    #[serde(default, skip_serializing_if = "is_default")]
    pub memory: Memory,
}

impl Dpo {
    /// Whether the loss asks for scores of the completions.
    #[must_use]
    pub fn asks_scores(&self) -> bool {
        self.mix().terms.iter().any(|t| t.loss.asks_scores())
    }

    /// The loss with all that belongs to it.
    #[must_use]
    pub fn mix(&self) -> PreferenceMix {
        let mut mix = PreferenceMix::from(self.loss);
        mix.terms.extend(&self.plus);
        mix.divergence = self.divergence;
        mix.reference_free = self.reference_free;
        mix
    }
}

/// How completions are drawn.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f64,
    /// Keeps the k likeliest tokens. This and the next two are for evaluation and rejection sampling: policy losses
    /// take completions to be drawn from the whole distribution.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// Keeps the likeliest tokens that together reach this probability.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// Keeps tokens at least this fraction as likely as the likeliest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f64>,
    /// Longest completion in tokens.
    pub max_new_tokens: usize,
    /// Sequences decoded together.
    pub max_sequences: usize,
    /// `"bf16"` samples from weights rounded to bf16: faster, and off the policy by that rounding
    /// (`sampler_gap` in the metrics).
    #[serde(default, skip_serializing_if = "is_default")]
    pub weights: DecoderWeights,
}

impl Sampling {
    /// Whether some tokens are never drawn.
    pub(crate) fn filtered(&self) -> bool {
        (self.top_k, self.top_p, self.min_p) != (None, None, None)
    }

    /// What is wrong with it.
    pub(crate) fn problem(&self) -> Option<String> {
        let outside = |p: Option<f64>| p.is_some_and(|p| !(p > 0.0 && p <= 1.0));
        if self.max_new_tokens == 0 {
            return Some("sampling.max_new_tokens must be above 0".into());
        }
        if outside(self.top_p) || outside(self.min_p) || self.top_k == Some(0) {
            return Some("sampling: top_p and min_p lie in 0 < p <= 1, top_k is above 0".into());
        }
        None
    }
}

/// An OpenAI-compatible server that draws completions, such as vLLM. It keeps the weights that it has: the
/// further the policy moves from them, the more `sampler_kl` in the metrics and `correction` matter.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    /// Its address, as in `http://localhost:8000/v1`.
    pub url: String,
    /// The model's name there.
    pub model: String,
    /// The environment variable that holds the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_env: Option<String>,
    /// Whether its log-probabilities are those of the distribution that it draws from (vLLM with
    /// `--logprobs-mode processed_logprobs`), not the model's. Matters at temperatures other than 1.
    #[serde(default, skip_serializing_if = "is_default")]
    pub processed_logprobs: bool,
}

/// A part of the reward.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardPart {
    /// A reward-model stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// A rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<Rule>,
    /// A verifier, by its name in docs/verifiers.md: `{ kind = "math", answer = "answer" }`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verifier: Option<Check>,
    /// How the verifier is run: `{ workers = 4, deadline_s = 10.0, failure_score = 0.0 }`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<PoolConfig>,
    /// A judge: `{ url = "http://localhost:8000/v1", model = "…", style = "rubric" }`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judge: Option<JudgePart>,
    /// Its weight in the sum; 0 for what only opens a gate.
    pub weight: f64,
    /// Its name in metrics and gates; its model's, rule's, verifier's or judge's by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// How its scores are brought to one unit: `{ kind = "running" }`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub normalize: Normalize,
    /// Bounds of its scores, normalised.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip: Option<[f64; 2]>,
    /// When it counts, by an earlier part: `{ kind = "times", by = "math" }`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gate: Option<Gate>,
}

impl RewardPart {
    /// What makes no sense where what a norm has seen is not kept for a resume.
    pub(crate) fn unkept(&self) -> Option<String> {
        matches!(self.normalize, Normalize::Running {}).then(|| {
            "reward: normalize = { kind = \"running\" } is for stages of kind grpo, ppo and opd, which save it; take `fixed`".into()
        })
    }

    /// What makes no sense, if anything.
    pub(crate) fn problem(&self) -> Option<String> {
        let given = [
            self.model.is_some(),
            self.rule.is_some(),
            self.verifier.is_some(),
            self.judge.is_some(),
        ];
        if given.iter().filter(|g| **g).count() != 1 {
            return Some(
                "each part of rollouts.reward has one of `model`, `rule`, `verifier` and `judge`"
                    .into(),
            );
        }
        if self.pool.is_some() && self.verifier.is_none() {
            return Some("`pool` belongs to a part with a `verifier`".into());
        }
        if let Some(check) = &self.verifier {
            let built = check
                .build()
                .and_then(|v| Pool::new(v, self.pool.unwrap_or_default()));
            return built.err().map(|e| format!("rollouts.reward: {e}"));
        }
        let judge = self.judge.as_ref()?;
        judge.problem().map(|p| format!("rollouts.reward: {p}"))
    }
}

/// An environment by its name. Programs have others by implementing `rlhf_policy::environment::Environment`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Scenery {
    /// A turn that begins with `calc ` asks a calculator; any other is the answer, worth 1 where it is that of the
    /// row's `field`.
    Calculator {
        /// The column with the answer.
        field: String,
        /// Who speaks for the calculator: `user` where the chat template knows no tools.
        #[serde(default = "tool")]
        role: Role,
        /// How long a talk may be; `sampling.max_new_tokens` is a turn's.
        limits: TalkLimits,
    },
}

fn one() -> usize {
    1
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks for a reference"
)]
fn is_one(n: &usize) -> bool {
    *n == 1
}

fn tool() -> Role {
    Role::Tool
}

/// What GRPO and PPO share.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rollouts {
    /// Prompts.
    pub data: Data,
    /// Prompts a step.
    pub prompts_per_step: usize,
    /// Completions of each prompt.
    pub group_size: usize,
    /// How they are drawn.
    pub sampling: Sampling,
    /// Who draws them, where it is not the policy itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<Server>,
    /// Whom the policy talks with, turn by turn; without it a completion is one turn:
    /// `{ kind = "calculator", field = "answer", limits = { max_turns = 4, max_tokens = 64 } }`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub environment: Option<Scenery>,
    /// The reward: a weighted sum, added to what an environment gives.
    #[serde(default)]
    pub reward: Vec<RewardPart>,
    /// Added to the score of a completion that was cut off before its end-of-sequence token.
    #[serde(default)]
    pub missing_eos_penalty: f64,
    /// What tokens and distance from the reference cost, and bounds of the sum:
    /// `{ token_cost = 0.01, kl_budget = { nats = 20.0, cost = 0.1 }, clip = [-5.0, 5.0] }`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub shaping: Shaping,
    /// Rewards of the steps of a completion, beside those of the whole:
    /// `{ model = "rm", ends = ["\n"], weight = 1.0 }`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<Process>,
    /// Draw until `prompts_per_step` groups have rewards that differ: `{ max_rounds = 4 }`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dynamic: Option<Dynamic>,
    /// Take from the reward of completions that come near the limit: `{ buffer = 16, penalty = 1.0 }`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlong: Option<Overlong>,
    /// Completions that were cut off teach nothing.
    #[serde(default, skip_serializing_if = "is_default")]
    pub filter_cut: bool,
    /// Draw so many steps ahead of the learner, on a thread of its own.
    #[serde(default, skip_serializing_if = "is_default")]
    pub ahead: u64,
    /// Record what each step learns from, in the stage's folder `rollouts/`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub record: bool,
    /// Learn from recorded rollouts instead of drawing: an earlier stage with `record = true`, or a folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<String>,
    /// Keep samples in the stage's `samples.parquet`: `{ every = 10, prompts = 4 }`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<Samples>,
}

/// A reward model that judges steps.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// A reward-model stage.
    pub model: String,
    /// Texts that end a step.
    pub ends: Vec<String>,
    /// What its number is multiplied by.
    pub weight: f64,
}

/// Group-relative policy optimisation.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grpo {
    /// `init` or an earlier stage: policy and reference.
    pub model: String,
    /// Prompts, sampling and reward.
    pub rollouts: Rollouts,
    /// Optimiser steps of sampling (each with `epochs` passes).
    pub steps: u64,
    /// Passes over each batch of rollouts.
    pub epochs: u64,
    /// Optimiser steps of a pass, each on as many whole groups.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub minibatches: usize,
    /// Packed tokens a micro-batch.
    pub micro_tokens: usize,
    /// How rewards become advantages.
    pub advantage: AdvantageEstimator,
    /// The surrogate, by its name in docs/losses.md: `{ kind = "clipped", clip = { … }, ratio = "token",
    /// reduction = { kind = "token" } }`.
    pub loss: PolicyLoss,
    /// The penalty on the distance from the reference; its coefficient is where `adaptive_kl` begins.
    pub kl: KlPenalty,
    /// Lets the coefficient follow a KL aimed at: `{ target = 6.0, horizon = 10000.0 }`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adaptive_kl: Option<AdaptiveKl>,
    /// The entropy bonus: what a token's entropy takes from its loss.
    #[serde(default, skip_serializing_if = "is_default")]
    pub entropy_coef: f64,
    /// Ends the training when the KL from the reference exceeds so many nats a completion; the result is the last
    /// checkpoint before that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_kl: Option<f64>,
    /// What becomes of the reference: `{ kind = "fixed" }`, `{ kind = "none" }`, `{ kind = "sync", every = 64, mix = 0.6 }`,
    /// `{ kind = "reset", every = 200 }`, `{ kind = "ema", decay = 0.99 }`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub reference: ReferencePolicy,
    /// What the ratio is against: the `learner`'s probabilities at the start of the batch, or the `sampler`'s.
    #[serde(default, skip_serializing_if = "is_default")]
    pub old: OldPolicy,
    /// Weights of the policy's probabilities over the sampler's, where the two differ (`weights = "bf16"`, a
    /// server): `{ level = "token", bound = { kind = "truncate", max = 2.0 } }`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correction: Option<Correction>,
    /// The optimiser.
    pub optim: Optim,
    /// How memory is saved.
    #[serde(default, skip_serializing_if = "is_default")]
    pub memory: Memory,
}

/// Rejection sampling: draw, score, keep. A later stage reads what was kept as `path = "stage:NAME"`, and as
/// many completions drawn by lot as `path = "stage:NAME/control"`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rejection {
    /// `init` or an earlier stage: who draws.
    pub model: String,
    /// Prompts.
    pub data: Data,
    /// Completions of each prompt.
    pub samples: usize,
    /// Prompts drawn together; what was drawn is kept each time.
    #[serde(default = "default_prompts_at_once")]
    pub prompts_at_once: usize,
    /// How they are drawn.
    pub sampling: Sampling,
    /// The reward: a weighted sum.
    pub reward: Vec<RewardPart>,
    /// Added to the score of a completion that was cut off before its end-of-sequence token.
    pub missing_eos_penalty: f64,
    /// What is kept: `{ kind = "top_per_prompt", keep = 1 }` or `{ kind = "top_overall", keep = 100 }`.
    pub select: Selection,
    /// The control has as many completions of each prompt (`"per_prompt"`) or in all (`"overall"`).
    #[serde(default = "default_control")]
    pub control: Match,
    /// A gold judge, for the curve of best-of-n.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judge: Option<Rule>,
    /// Packed tokens a batch of a reward model.
    pub micro_tokens: usize,
}

fn default_prompts_at_once() -> usize {
    64
}

fn default_control() -> Match {
    Match::PerPrompt
}

/// Who writes synthetic data: a stage's model, or a chat model behind a server.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Writer {
    /// `init` or an earlier stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// An OpenAI-compatible server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<Server>,
    /// Sequences of a model here that are decoded together.
    #[serde(default = "default_max_sequences")]
    pub max_sequences: usize,
}

fn default_max_sequences() -> usize {
    64
}

/// Self-Instruct: new tasks from a few, with instances. A later stage reads the rows as `path = "stage:NAME"`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SelfInstruct {
    /// Who writes.
    pub writer: Writer,
    /// Seed tasks: prompts.
    pub data: Data,
    /// `{ rounds, lists, rows, shown_seeds, shown_own, max_rouge, max_tokens, temperature }`.
    pub settings: self_instruct::SelfInstruct,
}

/// Critique and revision by principles. A later stage reads the rows as `path = "stage:NAME"`, the pairs as
/// `path = "stage:NAME/preferences"`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Critique {
    /// Who writes.
    pub writer: Writer,
    /// Prompts to be answered.
    pub data: Data,
    /// A TOML file of `[[principles]]` with `name`, `critique` and `revision`.
    pub principles: String,
    /// `{ rounds, max_tokens, temperature }`.
    pub settings: critique::Critique,
}

/// Proximal policy optimisation.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ppo {
    /// `init` or an earlier stage: policy and reference.
    pub model: String,
    /// The value model begins as this reward model or policy stage; `shared` puts a head on the policy's trunk.
    pub value_model: String,
    /// Prompts, sampling and reward.
    pub rollouts: Rollouts,
    /// Batches of rollouts.
    pub steps: u64,
    /// Passes over each batch.
    pub epochs: u64,
    /// Optimiser steps a pass.
    pub minibatches: usize,
    /// Packed tokens a micro-batch.
    pub micro_tokens: usize,
    /// Bounds of the ratio π/π_old.
    pub clip: Clip,
    /// ε of the value's clip; not clipped when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_clip: Option<f64>,
    /// Discount.
    pub gamma: f64,
    /// GAE's λ.
    pub gae_lambda: f64,
    /// What is done to advantages over the batch: `remove_mean`, `keep_mean` or `none`.
    #[serde(default = "remove_mean")]
    pub whitening: Whitening,
    /// Bring rewards of tokens to a deviation of 1 about their mean first.
    #[serde(default, skip_serializing_if = "is_default")]
    pub whiten_rewards: bool,
    /// Weight of the KL penalty in the reward of each token, fixed or adaptive.
    pub kl: KlController,
    /// As in GRPO.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_kl: Option<f64>,
    /// As in GRPO.
    #[serde(default, skip_serializing_if = "is_default")]
    pub reference: ReferencePolicy,
    /// Learning rate of the value model; not with `value_model = "shared"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_lr: Option<f64>,
    /// Weight of the value's loss, with `value_model = "shared"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_coef: Option<f64>,
    /// Text mixed in (PPO-ptx).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ptx: Option<Ptx>,
    /// Steps at the start in which only the value model learns.
    pub value_warmup_steps: u64,
    /// The policy's optimiser.
    pub optim: Optim,
    /// How memory is saved.
    #[serde(default, skip_serializing_if = "is_default")]
    pub memory: Memory,
}

fn remove_mean() -> Whitening {
    Whitening::RemoveMean
}

/// Text mixed into PPO.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ptx {
    /// Demonstrations or texts.
    pub data: Data,
    /// What of them is trained.
    #[serde(default, skip_serializing_if = "is_default")]
    pub turns: Turns,
    /// Rows a minibatch.
    pub batch_size: usize,
    /// Weight of −log π meant over their trained tokens.
    pub coef: f64,
}

/// On-policy distillation.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Opd {
    /// `init` or an earlier stage: the student.
    pub model: String,
    /// `init`, an earlier stage, or a model folder with the same tokenizer.
    pub teacher: String,
    /// Prompts and sampling; rewards are only logged.
    pub rollouts: Rollouts,
    /// Batches of rollouts.
    pub steps: u64,
    /// Passes over each batch of rollouts.
    pub epochs: u64,
    /// Packed tokens a micro-batch.
    pub micro_tokens: usize,
    /// How the student is brought to the teacher: `{ kind = "sampled", loss = { … }, discount = 0.0 }` or
    /// `{ kind = "exact", divergence = { kind = "reverse_kl" } }`.
    pub objective: Objective,
    /// The optimiser.
    pub optim: Optim,
    /// How memory is saved.
    #[serde(default, skip_serializing_if = "is_default")]
    pub memory: Memory,
}

/// Evaluation on held-out data.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Eval {
    /// Stages to compare.
    pub models: Vec<String>,
    /// The stage that the others are compared with; also the reference of the KL.
    pub baseline: String,
    /// Held-out prompts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompts: Option<Data>,
    /// The gold judge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judge: Option<Rule>,
    /// A verifier as the gold judge, by its name in docs/verifiers.md: `{ kind = "math", answer = "answer" }`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verifier: Option<Check>,
    /// How completions are drawn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling: Option<Sampling>,
    /// A reward model whose scores are reported beside the gold judge's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward_model: Option<String>,
    /// Held-out pairs: accuracy of each model's implicit reward, and of the reward model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pairs: Option<Data>,
    /// The largest KL that counts as near the reference, nats a completion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_kl: Option<f64>,
    /// The least distinct-2 as a share of the baseline's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_distinct2: Option<f64>,
    /// The least share of a completion's words that differ, on average: it falls when texts become lists of the
    /// words that a reward likes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_distinct_words: Option<f64>,
    /// Packed tokens a batch.
    pub micro_tokens: usize,
    /// Prompts shown in the report.
    pub samples: usize,
}
