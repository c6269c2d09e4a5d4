//! What the user typed: a recipe, its overlays and its errors.
//!
//! Invariant: every key is known (`deny_unknown_fields`); science knobs have no hidden defaults: a
//! recipe states them. Knows nothing of files' contents or sizes: that is `plan`. Losses check their own
//! settings.

mod algorithm;
mod align;
mod control;
mod judges;
mod preset;
mod stages;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use rlhf::{Usage, shipped, usage};
use serde::{Deserialize, Serialize};

use crate::memory::{Memory, WeightsKind};
use rlhf_policy::rejection::Selection;
use rlhf_reward::verify::Check;

pub use align::{Align, OnlineDpo, Ranked, Replay, Unpaired};
pub use control::{Control, Predictor};
pub use judges::{JudgePart, Style};
pub use stages::{
    Critique, Data, Dpo, Eval, Grpo, Members, MomentKind, Opd, Optim, Ppo, Process, Ptx, Rejection,
    Reward, RewardPart, Rollouts, Sampling, Scenery, SelfInstruct, Server, Sft, Share, Writer,
};

/// A whole recipe.
#[derive(Clone, Debug, Serialize)]
pub struct Recipe {
    /// What the run is.
    pub run: Run,
    /// The model that it begins with; absent where no stage has a language model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<Init>,
    /// The stages, in order.
    pub stages: Vec<Stage>,
}

/// What the run is.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// A line for the report.
    pub title: String,
    /// The seed of all randomness.
    pub seed: u64,
    /// Skip the run, with this word, when the file or folder is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub needs: Option<Needs>,
    /// Save a checkpoint every so many steps of a stage.
    pub checkpoint_every: u64,
}

/// What must be there for the recipe to run at all.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Needs {
    /// A file or folder.
    pub path: String,
    /// What to do when it is absent.
    pub mend: String,
}

/// The model to begin with: a folder in Hugging Face layout, or random weights of a given shape.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Init {
    /// A model folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// A tokenizer folder; the model's own by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// The shape of a Llama to train from scratch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<Scratch>,
}

/// The shape of a Llama with random weights.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scratch {
    /// Width H.
    pub hidden_size: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of the feed-forward part.
    pub intermediate_size: usize,
    /// Longest sequence.
    pub max_positions: usize,
    /// Standard deviation of the initial weights.
    pub initializer_range: f64,
}

/// A stage: a name that later stages refer to, and what it does.
#[derive(Clone, Debug, Serialize)]
pub struct Stage {
    /// Its name, also its folder.
    pub name: String,
    /// The preset that filled it in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// What it does.
    #[serde(flatten)]
    pub kind: StageKind,
}

/// What a stage does.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum StageKind {
    /// Supervised fine-tuning.
    Sft(Sft),
    /// A reward model.
    Reward(Reward),
    /// Direct preference optimisation.
    Dpo(Dpo),
    /// Direct alignment on thumbs: KTO and kin.
    Unpaired(Unpaired),
    /// Direct alignment on rankings.
    Ranked(Ranked),
    /// Direct alignment on pairs that are drawn while training.
    OnlineDpo(OnlineDpo),
    /// Group-relative policy optimisation.
    Grpo(Grpo),
    /// Proximal policy optimisation.
    Ppo(Ppo),
    /// On-policy distillation.
    Opd(Opd),
    /// Classic control, without a language model.
    Control(Box<Control>),
    /// Rejection sampling.
    Rejection(Rejection),
    /// New tasks by Self-Instruct.
    SelfInstruct(SelfInstruct),
    /// Better answers by critique and revision.
    Critique(Critique),
    /// Evaluation on held-out data.
    Eval(Eval),
}

impl StageKind {
    /// The kind's name in a recipe.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Sft(_) => "sft",
            Self::Reward(_) => "reward",
            Self::Dpo(_) => "dpo",
            Self::Unpaired(_) => "unpaired",
            Self::Ranked(_) => "ranked",
            Self::OnlineDpo(_) => "online_dpo",
            Self::Grpo(_) => "grpo",
            Self::Ppo(_) => "ppo",
            Self::Opd(_) => "opd",
            Self::Control(_) => "control",
            Self::Rejection(_) => "rejection",
            Self::SelfInstruct(_) => "self_instruct",
            Self::Critique(_) => "critique",
            Self::Eval(_) => "eval",
        }
    }
}

impl Stage {
    /// The names that this stage takes from `init` or earlier stages, with the key that names each.
    fn inputs(&self) -> Vec<(&'static str, &str)> {
        fn rollouts<'a>(r: &'a Rollouts, into: &mut Vec<(&'static str, &'a str)>) {
            into.extend(
                r.reward
                    .iter()
                    .filter_map(|p| p.model.as_deref())
                    .map(|m| ("rollouts.reward.model", m)),
            );
            into.extend(
                r.process
                    .iter()
                    .map(|p| ("rollouts.process.model", p.model.as_str())),
            );
            let judges = r.reward.iter().filter_map(|p| p.judge.as_ref()?.stage());
            into.extend(judges.map(|m| ("rollouts.reward.judge.model", m)));
            into.extend(r.data.stage().map(|s| ("rollouts.data", s)));
        }
        let mut names = Vec::new();
        match &self.kind {
            StageKind::Sft(s) => {
                names.push(("model", s.model.as_str()));
                names.extend(s.data.stage().map(|n| ("data", n)));
            }
            StageKind::Reward(s) => {
                names.push(("model", s.model.as_str()));
                names.extend(s.data.stage().map(|n| ("data", n)));
            }
            StageKind::Dpo(s) => {
                names.push(("model", s.model.as_str()));
                names.extend(s.data.stage().map(|n| ("data", n)));
            }
            StageKind::Unpaired(s) => names.push(("model", s.model.as_str())),
            StageKind::Ranked(s) => names.push(("model", s.model.as_str())),
            StageKind::OnlineDpo(s) => {
                names.push(("model", s.model.as_str()));
                rollouts(&s.rollouts, &mut names);
            }
            StageKind::Rejection(s) => {
                names.push(("model", s.model.as_str()));
                names.extend(s.data.stage().map(|n| ("data", n)));
                let models = s.reward.iter().filter_map(|p| p.model.as_deref());
                names.extend(models.map(|m| ("reward.model", m)));
                let judges = s.reward.iter().filter_map(|p| p.judge.as_ref()?.stage());
                names.extend(judges.map(|m| ("reward.judge.model", m)));
            }
            StageKind::Grpo(s) => {
                names.push(("model", s.model.as_str()));
                rollouts(&s.rollouts, &mut names);
            }
            StageKind::Ppo(s) => {
                names.push(("model", s.model.as_str()));
                if s.value_model != SHARED {
                    names.push(("value_model", s.value_model.as_str()));
                }
                rollouts(&s.rollouts, &mut names);
            }
            StageKind::Opd(s) => {
                names.push(("model", s.model.as_str()));
                rollouts(&s.rollouts, &mut names);
            }
            StageKind::Control(_) => {}
            StageKind::SelfInstruct(s) => {
                names.extend(s.writer.model.as_deref().map(|m| ("writer.model", m)));
                names.extend(s.data.stage().map(|n| ("data", n)));
            }
            StageKind::Critique(s) => {
                names.extend(s.writer.model.as_deref().map(|m| ("writer.model", m)));
                names.extend(s.data.stage().map(|n| ("data", n)));
            }
            StageKind::Eval(s) => {
                names.extend(s.models.iter().map(|m| ("models", m.as_str())));
                names.push(("baseline", s.baseline.as_str()));
                names.extend(s.reward_model.as_deref().map(|m| ("reward_model", m)));
            }
        }
        names
    }
}

/// The value model that is a head on the policy's trunk.
pub(crate) const SHARED: &str = "shared";

/// A recipe's text with where it came from, and whether its `[smoke]` overlay is wanted.
#[derive(Clone, Debug)]
pub struct Source {
    /// The recipe's name: that of the shipped recipe or the file's stem.
    pub name: String,
    /// The TOML text.
    pub text: String,
    /// Where it came from, for messages.
    pub origin: String,
}

impl Source {
    /// Finds a recipe by shipped name or file path.
    ///
    /// # Errors
    /// A usage error that lists the shipped recipes.
    pub fn find(name: &str) -> Result<Self, Usage> {
        if let Some(s) = shipped::find(name) {
            return Ok(Self {
                name: name.into(),
                text: s.text.into(),
                origin: format!("recipe {name}"),
            });
        }
        let path = Path::new(name);
        if path.extension().is_some_and(|e| e == "toml") || path.exists() {
            let text = std::fs::read_to_string(path).map_err(|e| {
                usage(
                    format!("cannot read the recipe: {e}"),
                    name,
                    "give the path of a TOML file, or a name from `rlhf recipes`",
                )
            })?;
            let stem = path
                .file_stem()
                .map_or_else(|| "recipe".into(), |s| s.to_string_lossy().into_owned());
            return Ok(Self {
                name: stem,
                text,
                origin: name.into(),
            });
        }
        Err(usage(
            format!("no recipe named `{name}`"),
            "the command line",
            format!(
                "use one of {}, or the path of a .toml file",
                shipped::names()
            ),
        ))
    }

    /// Parses the recipe with its overlays: `[smoke]` when `smoke`, then each `key=value` of `sets`.
    ///
    /// # Errors
    /// A usage error naming the place and the valid keys.
    pub fn parse(&self, smoke: bool, sets: &[String]) -> Result<Recipe, Usage> {
        let mut table: toml::Table = toml::from_str(&self.text)
            .map_err(|e| usage(first_lines(&e.to_string()), &self.origin, "mend the TOML"))?;
        let overlay = table.remove("smoke");
        if smoke {
            let Some(toml::Value::Table(overlay)) = overlay else {
                return Err(usage(
                    "the recipe has no [smoke] overlay",
                    &self.origin,
                    "run it without --smoke",
                ));
            };
            for (key, value) in overlay {
                self.set(&mut table, &key, value)?;
            }
        }
        for set in sets {
            let Some((key, value)) = set.split_once('=') else {
                return Err(usage(
                    format!("--set {set}: no `=`"),
                    "the command line",
                    "write --set key=value",
                ));
            };
            self.set(&mut table, key.trim(), scalar(value.trim()))?;
        }
        self.build(table)
    }

    /// Sets a dotted key; `stages.NAME.key` finds the stage by its name.
    fn set(&self, table: &mut toml::Table, key: &str, value: toml::Value) -> Result<(), Usage> {
        let bad = |what: String, mend: String| usage(what, &self.origin, mend);
        let mut parts = key.split('.').peekable();
        let mut at: &mut toml::Value = &mut toml::Value::Boolean(false);
        let mut first = Some(table);
        while let Some(part) = parts.next() {
            let map = match first.take() {
                Some(t) => t,
                None => match at {
                    toml::Value::Table(t) => t,
                    toml::Value::Array(stages) => {
                        let names: Vec<String> = stages.iter().map(stage_name).collect();
                        let Some(i) = names.iter().position(|n| n == part) else {
                            return Err(bad(
                                format!("`{key}`: no stage named `{part}`"),
                                format!("the stages are {}", names.join(", ")),
                            ));
                        };
                        at = &mut stages[i];
                        continue;
                    }
                    _ => {
                        return Err(bad(
                            format!("`{key}`: `{part}` lies below a plain value"),
                            "shorten the key".into(),
                        ));
                    }
                },
            };
            if parts.peek().is_none() {
                map.insert(part.into(), value);
                return Ok(());
            }
            at = map
                .entry(part)
                .or_insert_with(|| toml::Value::Table(toml::Table::new()));
        }
        Err(bad(
            format!("`{key}` names a whole stage"),
            "name one of its keys, as in stages.sft.steps".into(),
        ))
    }

    fn build(&self, mut table: toml::Table) -> Result<Recipe, Usage> {
        let stages = match table.remove("stages") {
            Some(toml::Value::Array(a)) if !a.is_empty() => a,
            _ => {
                return Err(usage(
                    "the recipe has no stages",
                    &self.origin,
                    "add at least one [[stages]] table",
                ));
            }
        };
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Head {
            run: Run,
            init: Option<Init>,
        }
        let head: Head = table.try_into().map_err(|e: toml::de::Error| {
            usage(
                first_lines(e.message()),
                &self.origin,
                "mend the key in [run] or [init]",
            )
        })?;
        let stages = stages
            .into_iter()
            .map(|v| self.stage(v))
            .collect::<Result<Vec<_>, _>>()?;
        let recipe = Recipe {
            run: head.run,
            init: head.init,
            stages,
        };
        self.check(&recipe)?;
        Ok(recipe)
    }

    fn stage(&self, value: toml::Value) -> Result<Stage, Usage> {
        let name = stage_name(&value);
        let place = format!("{}, stage `{name}`", self.origin);
        let toml::Value::Table(mut t) = value else {
            return Err(usage("a stage is a table", &place, "write [[stages]]"));
        };
        let text = |t: &mut toml::Table, key: &str| match t.remove(key) {
            Some(toml::Value::String(s)) => Ok(s),
            _ => Err(usage(
                format!("the stage has no `{key}`"),
                &place,
                format!("add {key} = \"…\""),
            )),
        };
        let name = text(&mut t, "name")?;
        let kind = text(&mut t, "kind")?;
        let preset = preset::apply(&mut t, &kind, &place)?;
        fn read<T: serde::de::DeserializeOwned>(t: toml::Table, place: &str) -> Result<T, Usage> {
            t.try_into().map_err(|e: toml::de::Error| {
                usage(
                    first_lines(e.message()),
                    place,
                    "mend the key; `rlhf recipes show quickstart` shows a whole recipe",
                )
            })
        }
        let kind = match kind.as_str() {
            "sft" => StageKind::Sft(read(t, &place)?),
            "reward" => StageKind::Reward(read(t, &place)?),
            "dpo" => StageKind::Dpo(read(t, &place)?),
            "unpaired" => StageKind::Unpaired(read(t, &place)?),
            "ranked" => StageKind::Ranked(read(t, &place)?),
            "online_dpo" => StageKind::OnlineDpo(read(t, &place)?),
            "grpo" => StageKind::Grpo(read(t, &place)?),
            "ppo" => StageKind::Ppo(read(t, &place)?),
            "opd" => StageKind::Opd(read(t, &place)?),
            "control" => StageKind::Control(read(t, &place)?),
            "rejection" => StageKind::Rejection(read(t, &place)?),
            "self_instruct" => StageKind::SelfInstruct(read(t, &place)?),
            "critique" => StageKind::Critique(read(t, &place)?),
            "eval" => StageKind::Eval(read(t, &place)?),
            other => {
                return Err(usage(
                    format!("unknown kind `{other}`"),
                    &place,
                    "use one of sft, reward, dpo, unpaired, ranked, online_dpo, grpo, ppo, opd, control, rejection, self_instruct, critique, eval",
                ));
            }
        };
        Ok(Stage { name, preset, kind })
    }

    fn check(&self, recipe: &Recipe) -> Result<(), Usage> {
        if recipe.run.checkpoint_every == 0 {
            return Err(usage(
                "run.checkpoint_every is 0",
                &self.origin,
                "give the steps between checkpoints, 1 or more",
            ));
        }
        self.check_init(recipe)?;
        let mut names: BTreeSet<&str> = BTreeSet::from(["init"]);
        // What later stages can take a language model from.
        let mut known = names.clone();
        for stage in &recipe.stages {
            let place = format!("{}, stage `{}`", self.origin, stage.name);
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            if stage.name.is_empty() || !stage.name.chars().all(plain) {
                return Err(usage(
                    "a stage's name is letters, digits, - and _",
                    &place,
                    "rename it",
                ));
            }
            for (key, name) in stage.inputs() {
                if !known.contains(name) {
                    let names: Vec<_> = known.iter().copied().collect();
                    return Err(usage(
                        format!("`{key}` names `{name}`, which no earlier stage makes"),
                        &place,
                        format!("use one of {}", names.join(", ")),
                    ));
                }
            }
            self.check_numbers(stage, &place)?;
            if !names.insert(&stage.name) {
                return Err(usage("two stages have this name", &place, "rename one"));
            }
            if !matches!(stage.kind, StageKind::Control(_)) {
                known.insert(&stage.name);
            }
        }
        Ok(())
    }

    /// A language model is named where a stage needs one, and nowhere else.
    fn check_init(&self, recipe: &Recipe) -> Result<(), Usage> {
        let of_language = |s: &&Stage| !matches!(s.kind, StageKind::Control(_));
        let init = match (&recipe.init, recipe.stages.iter().find(of_language)) {
            (Some(init), Some(_)) => init,
            (None, None) => return Ok(()),
            (None, Some(stage)) => {
                return Err(usage(
                    format!(
                        "there is no [init], the model that stage `{}` needs",
                        stage.name
                    ),
                    &self.origin,
                    "add [init] with `from` (a model folder) or `scratch` (a shape)",
                ));
            }
            (Some(_), None) => {
                return Err(usage(
                    "[init] names a language model, and no stage has one",
                    &self.origin,
                    "leave [init] out",
                ));
            }
        };
        if init.from.is_some() == init.scratch.is_some() {
            return Err(usage(
                "[init] needs either `from` (a model folder) or `scratch` (a shape), not both",
                &self.origin,
                "keep one of them",
            ));
        }
        if init.scratch.is_some() && init.tokenizer.is_none() {
            return Err(usage(
                "[init] from scratch needs a `tokenizer`",
                &self.origin,
                "name a folder with tokenizer.json",
            ));
        }
        Ok(())
    }

    fn check_numbers(&self, stage: &Stage, place: &str) -> Result<(), Usage> {
        let mut wrong: Option<String> = None;
        let mut need = |ok: bool, what: &str| {
            if !ok && wrong.is_none() {
                wrong = Some(what.to_owned());
            }
        };
        let mut optim = |o: &Optim, m: &Memory| {
            need(o.lr > 0.0 && o.lr.is_finite(), "optim.lr must be above 0");
            need(o.max_grad_norm > 0.0, "optim.max_grad_norm must be above 0");
            need(
                o.weight_decay >= 0.0,
                "optim.weight_decay must not be negative",
            );
            need(
                o.state == MomentKind::F32 || m.weights == WeightsKind::F32,
                "optim.state = \"int8\" is for weights in f32: leave one of it and memory.weights out",
            );
        };
        let memory = |m: &Memory, need: &mut dyn FnMut(bool, &str)| {
            let problem = m.problem();
            need(problem.is_none(), problem.unwrap_or_default());
        };
        let rollouts = |r: &Rollouts, need: &mut dyn FnMut(bool, &str)| {
            need(
                r.prompts_per_step > 0 && r.group_size > 0,
                "rollouts.prompts_per_step and group_size must be above 0",
            );
            let problem = r.reward.iter().find_map(RewardPart::problem);
            need(problem.is_none(), &problem.unwrap_or_default());
            need(
                r.sampling.temperature > 0.0,
                "rollouts.sampling.temperature must be above 0: greedy draws give no gradient",
            );
            let endless = |Scenery::Calculator { limits, .. }: &Scenery| {
                limits.max_turns == 0 || limits.max_tokens == 0
            };
            need(
                !r.environment.as_ref().is_some_and(endless),
                "rollouts.environment.limits: max_turns and max_tokens must be above 0",
            );
            need(
                r.ahead == 0 || r.environment.is_none(),
                "rollouts.ahead: talks are not drawn ahead; leave `ahead` or `environment` out",
            );
            let problem = r.sampling.problem();
            need(problem.is_none(), &problem.unwrap_or_default());
            need(
                !r.sampling.filtered(),
                "rollouts.sampling: the losses take completions to be drawn from the whole distribution; leave top_k, top_p and min_p to evaluation and rejection sampling",
            );
            need(
                !(r.record && r.replay.is_some()),
                "rollouts.record: replayed rollouts are recorded already; leave one of record and replay out",
            );
            need(
                r.samples.is_none_or(|s| s.every > 0 && s.prompts > 0),
                "rollouts.samples: every and prompts must be above 0",
            );
            need(
                r.ahead == 0 || r.server.is_none(),
                "rollouts.ahead draws with the policy's own weights; leave `ahead` or `server` out",
            );
            if let Err(e) = r.rules().check(r.sampling.max_new_tokens) {
                need(false, &e.to_string());
            }
        };
        match &stage.kind {
            StageKind::Sft(s) => {
                optim(&s.optim, &s.memory);
                memory(&s.memory, &mut need);
                need(
                    s.batch_size > 0 && s.steps > 0,
                    "steps and batch_size must be above 0",
                );
                need(
                    s.neftune_alpha.is_none_or(|a| a > 0.0 && a.is_finite()),
                    "neftune_alpha must be above 0; leave it out for no noise",
                );
                need(
                    s.test.is_some() || s.test_every.is_none(),
                    "test_every needs test",
                );
            }
            StageKind::Reward(s) => {
                optim(&s.optim, &s.memory);
                memory(&s.memory, &mut need);
                need(
                    s.batch_size > 0 && s.steps > 0,
                    "steps and batch_size must be above 0",
                );
                let problem = s.problem();
                need(problem.is_none(), &problem.unwrap_or_default());
            }
            StageKind::Dpo(s) => {
                optim(&s.optim, &s.memory);
                memory(&s.memory, &mut need);
                let size = (s.steps, s.batch_size);
                let looks =
                    align::looks(size, s.test.is_some(), s.test_every, s.patience, s.samples);
                need(looks.is_none(), looks.unwrap_or_default());
                let mix = s.mix();
                if let Err(e) = mix.check() {
                    need(false, &format!("loss: {e}"));
                }
            }
            StageKind::Unpaired(s) => {
                optim(&s.optim, &s.memory);
                let problem = s.problem();
                need(problem.is_none(), problem.unwrap_or_default());
                need(
                    s.batch_size > 1 || !s.loss.asks_reference_point(),
                    "batch_size must be at least 2: KTO mismatches the rows of a step",
                );
                if let Err(e) = s.loss.check() {
                    need(false, &format!("loss: {e}"));
                }
            }
            StageKind::OnlineDpo(s) => {
                optim(&s.optim, &s.memory);
                rollouts(&s.rollouts, &mut need);
                algorithm::online(&s.rollouts, &mut need);
                let problem = s.problem();
                need(problem.is_none(), &problem.unwrap_or_default());
            }
            StageKind::Ranked(s) => {
                optim(&s.optim, &s.memory);
                let problem = s.problem();
                need(problem.is_none(), problem.unwrap_or_default());
                if let Err(e) = s.loss.check() {
                    need(false, &format!("loss: {e}"));
                }
            }
            StageKind::Grpo(s) => {
                optim(&s.optim, &s.memory);
                memory(&s.memory, &mut need);
                rollouts(&s.rollouts, &mut need);
                algorithm::grpo(s, &mut need);
                if let Err(e) = s.loss.check() {
                    need(false, &format!("loss: {e}"));
                }
                if let Some(Err(e)) = s.correction.map(|c| c.bound.check()) {
                    need(false, &format!("correction: {e}"));
                }
                need(
                    s.steps > 0 && s.epochs > 0 && s.minibatches > 0,
                    "steps, epochs and minibatches must be above 0",
                );
            }
            StageKind::Ppo(s) => {
                optim(&s.optim, &s.memory);
                memory(&s.memory, &mut need);
                rollouts(&s.rollouts, &mut need);
                need(
                    s.steps > 0 && s.epochs > 0 && s.minibatches > 0,
                    "steps, epochs and minibatches must be above 0",
                );
                need(
                    (0.0..=1.0).contains(&s.gamma) && (0.0..=1.0).contains(&s.gae_lambda),
                    "gamma and gae_lambda lie in 0 to 1",
                );
                algorithm::ppo(s, &mut need);
            }
            StageKind::Opd(s) => {
                optim(&s.optim, &s.memory);
                memory(&s.memory, &mut need);
                rollouts(&s.rollouts, &mut need);
                need(
                    s.steps > 0 && s.epochs > 0,
                    "steps and epochs must be above 0",
                );
                if let Err(e) = s.objective.check() {
                    need(false, &format!("objective: {e}"));
                }
            }
            StageKind::Control(s) => {
                let all = || std::iter::once(&s.optim).chain(s.predictor.iter().map(|p| &p.optim));
                all().for_each(|o| optim(o, &Memory::default()));
                need(
                    all().all(|o| o.state == MomentKind::F32),
                    "optim.state = \"int8\" is for language models: leave it out",
                );
                let problem = s.problem();
                need(problem.is_none(), &problem.unwrap_or_default());
            }
            StageKind::Rejection(s) => {
                need(
                    s.samples > 0 && s.prompts_at_once > 0,
                    "samples and prompts_at_once must be above 0",
                );
                let problem = s.sampling.problem();
                need(problem.is_none(), &problem.unwrap_or_default());
                need(!s.reward.is_empty(), "reward must have at least one part");
                let problem = s.reward.iter().find_map(RewardPart::problem);
                need(problem.is_none(), &problem.unwrap_or_default());
                let unkept = s.reward.iter().find_map(RewardPart::unkept);
                need(unkept.is_none(), &unkept.unwrap_or_default());
                let (keep, most) = match s.select {
                    Selection::TopPerPrompt { keep } => (keep, s.samples),
                    Selection::TopOverall { keep } => (keep, usize::MAX),
                };
                need(
                    (1..=most).contains(&keep),
                    "select.keep must be above 0, and for each prompt at most `samples`",
                );
            }
            StageKind::SelfInstruct(SelfInstruct { writer, .. })
            | StageKind::Critique(Critique { writer, .. }) => {
                need(
                    writer.model.is_some() != writer.server.is_some(),
                    "writer has either `model` or `server`",
                );
                need(
                    writer.max_sequences > 0,
                    "writer.max_sequences must be above 0",
                );
            }
            StageKind::Eval(s) => {
                need(!s.models.is_empty(), "models must name at least one stage");
                need(
                    s.prompts.is_none() || s.sampling.is_some(),
                    "an evaluation with prompts needs `sampling`",
                );
                need(
                    s.judge.is_none() || s.verifier.is_none(),
                    "an evaluation has one gold judge: `judge` or `verifier`",
                );
                let built = s.verifier.as_ref().map(Check::build);
                let problem = built.and_then(Result::err).map(|e| e.to_string());
                need(problem.is_none(), &problem.unwrap_or_default());
                let problem = s.sampling.as_ref().and_then(Sampling::problem);
                need(problem.is_none(), &problem.unwrap_or_default());
            }
        }
        wrong.map_or(Ok(()), |what| Err(usage(what, place, "mend the value")))
    }
}

/// Resolves a path of a recipe: `shared:X` lies in the shared folder, others are as typed.
#[must_use]
pub fn resolve(path: &str, shared: &Path) -> PathBuf {
    path.strip_prefix("shared:")
        .map_or_else(|| PathBuf::from(path), |rest| shared.join(rest))
}

fn stage_name(v: &toml::Value) -> String {
    v.get("name")
        .and_then(toml::Value::as_str)
        .unwrap_or("?")
        .to_owned()
}

/// A `--set` value: TOML when it parses as such, else text.
fn scalar(text: &str) -> toml::Value {
    toml::from_str::<toml::Table>(&format!("v = {text}"))
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| toml::Value::String(text.into()))
}

fn first_lines(text: &str) -> String {
    text.trim().replace('\n', " ")
}
