//! What a recipe means: files read, sizes counted, before anything runs.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rlhf_data::tokenize::ChatTokenizer;
use rlhf_model::Config;
use serde::Serialize;

use crate::inputs::{Facts, Inputs};
use crate::recipe::{self, Data, Init, Recipe, Scratch, StageKind};
use rlhf::terminal;
use rlhf::usage;

/// A resolved recipe.
#[derive(Debug, Serialize)]
pub(crate) struct Plan {
    /// The recipe's name.
    pub name: String,
    /// What was typed to name it.
    pub recipe_arg: String,
    /// The recipe after overlays.
    pub recipe: Recipe,
    /// The model's `config.json`; null without a language model.
    pub model: serde_json::Value,
    /// Weights of the model; without a language model those of the largest policy.
    pub parameters: u64,
    /// Bytes of weights, gradients, AdamW's two moments and a reference copy, all f32.
    pub training_bytes: u64,
    /// The data.
    pub data: Vec<Facts>,
    /// The language model that the run begins with, if any stage has one.
    #[serde(skip)]
    pub base: Option<Base>,
}

/// The language model that a run begins with.
#[derive(Debug)]
pub(crate) struct Base {
    /// Its folder, when it is not made from scratch.
    pub from: Option<PathBuf>,
    /// The tokenizer's folder.
    pub tokenizer_dir: PathBuf,
    /// Its shape.
    pub config: Config,
}

/// Reads everything that `recipe` names.
pub(crate) fn resolve(
    name: &str,
    recipe_arg: &str,
    recipe: Recipe,
    shared: &Path,
    run_dir: &Path,
) -> anyhow::Result<(Plan, Inputs)> {
    let Some(init) = &recipe.init else {
        return Ok(without_model(name, recipe_arg, recipe, shared, run_dir));
    };
    let from = init.from.as_ref().map(|p| recipe::resolve(p, shared));
    let tokenizer_dir = tokenizer_dir(init, from.as_deref(), shared)?;
    let tokenizer = ChatTokenizer::load(&tokenizer_dir)
        .with_context(|| format!("loading the tokenizer of {}", tokenizer_dir.display()))?;
    let config = match (&from, &init.scratch) {
        (Some(dir), _) => {
            Config::load(dir).with_context(|| format!("reading the model in {}", dir.display()))?
        }
        (None, Some(scratch)) => from_scratch(scratch, &tokenizer)?,
        (None, None) => {
            return Err(usage("[init] is empty", name, "give `from` or `scratch`").into());
        }
    };
    if tokenizer.vocab_size() > config.vocab_size as usize {
        return Err(usage(
            format!(
                "the tokenizer has ids up to {}, the model a vocabulary of {}",
                tokenizer.vocab_size() - 1,
                config.vocab_size
            ),
            format!("{} and the model", tokenizer_dir.display()),
            "use the tokenizer that belongs to the model",
        )
        .into());
    }
    let context = config.max_position_embeddings as usize;
    let inputs = Inputs::new(Some(tokenizer), shared, run_dir, context);
    read_all(&recipe, &inputs)?;
    let parameters = config.num_parameters() as u64;
    let plan = Plan {
        name: name.into(),
        recipe_arg: recipe_arg.into(),
        model: config.to_json(),
        parameters,
        training_bytes: parameters * 4 * 5,
        data: inputs.facts(),
        base: Some(Base {
            from,
            tokenizer_dir,
            config,
        }),
        recipe,
    };
    Ok((plan, inputs))
}

/// The plan of a recipe that has control alone: no model, no tokenizer, no data.
fn without_model(
    name: &str,
    recipe_arg: &str,
    recipe: Recipe,
    shared: &Path,
    run_dir: &Path,
) -> (Plan, Inputs) {
    let of = |s: &recipe::Stage| match &s.kind {
        StageKind::Control(c) => c.parameters() as u64,
        _ => 0,
    };
    let parameters = recipe.stages.iter().map(of).max().unwrap_or(0);
    let plan = Plan {
        name: name.into(),
        recipe_arg: recipe_arg.into(),
        model: serde_json::Value::Null,
        parameters,
        // Policy and value function with gradients and moments.
        training_bytes: parameters * 4 * 4 * 2,
        data: Vec::new(),
        base: None,
        recipe,
    };
    (plan, Inputs::new(None, shared, run_dir, 0))
}

fn tokenizer_dir(init: &Init, from: Option<&Path>, shared: &Path) -> anyhow::Result<PathBuf> {
    let dir = match (&init.tokenizer, from) {
        (Some(t), _) => recipe::resolve(t, shared),
        (None, Some(from)) => from.to_owned(),
        (None, None) => {
            return Err(usage(
                "[init] has no tokenizer",
                "the recipe",
                "name a folder with tokenizer.json",
            )
            .into());
        }
    };
    if !dir.is_dir() {
        return Err(usage(
            "no such folder",
            dir.display().to_string(),
            "run from the project's root, or correct [init]",
        )
        .into());
    }
    Ok(dir)
}

fn from_scratch(s: &Scratch, tokenizer: &ChatTokenizer) -> anyhow::Result<Config> {
    let config = Config {
        num_key_value_heads: s.kv_heads as i64,
        intermediate_size: s.intermediate_size as i64,
        initializer_range: s.initializer_range,
        eos_token_ids: tokenizer.eos_ids().to_vec(),
        ..Config::new(
            tokenizer.vocab_size() as i64,
            s.hidden_size as i64,
            s.layers as i64,
            s.heads as i64,
            s.max_positions as i64,
        )
    };
    config.validate().context("the shape in [init.scratch]")?;
    Ok(config)
}

/// Reads all tables but those that a stage is still to write.
fn read_all(recipe: &Recipe, inputs: &Inputs) -> anyhow::Result<()> {
    let there = |d: &&Data| d.stage().is_none();
    let prompts = |d: &Data| {
        Some(d)
            .filter(there)
            .map_or(Ok(()), |d| inputs.prompts(d).map(drop))
    };
    let pairs = |d: &Data| {
        Some(d)
            .filter(there)
            .map_or(Ok(()), |d| inputs.preference(d).map(drop))
    };
    let sft = |d: &Data, turns| {
        Some(d)
            .filter(there)
            .map_or(Ok(()), |d| inputs.sft(d, turns).map(drop))
    };
    for stage in &recipe.stages {
        let read = || -> anyhow::Result<()> {
            match &stage.kind {
                StageKind::Sft(s) => {
                    sft(&s.data, s.turns)?;
                    s.test.as_ref().map_or(Ok(()), |t| sft(t, s.turns))
                }
                StageKind::Reward(s) => {
                    for data in [&s.data, &s.test].into_iter().filter(there) {
                        inputs.labelled(data, s.rows(), &s.loss)?;
                    }
                    let mix = s.mix_data.as_ref().filter(there);
                    mix.map_or(Ok(()), |d| inputs.mix_pairs(d).map(drop))
                }
                StageKind::Dpo(s) => {
                    for data in std::iter::once(&s.data).chain(&s.test).filter(there) {
                        inputs.preference(data)?;
                        if s.asks_scores() {
                            inputs.scores(data)?;
                        }
                    }
                    Ok(())
                }
                StageKind::Unpaired(s) => {
                    inputs.unpaired(&s.data)?;
                    s.test.as_ref().map(|t| inputs.unpaired(t)).transpose()?;
                    Ok(())
                }
                StageKind::Ranked(s) => {
                    inputs.ranked(&s.data)?;
                    s.test.as_ref().map(|t| inputs.ranked(t)).transpose()?;
                    Ok(())
                }
                StageKind::OnlineDpo(s) => {
                    prompts(&s.rollouts.data)?;
                    s.replay.as_ref().map_or(Ok(()), |r| pairs(&r.data))
                }
                StageKind::Rejection(s) => prompts(&s.data),
                StageKind::SelfInstruct(s) => prompts(&s.data),
                StageKind::Critique(s) => {
                    let file = recipe::resolve(&s.principles, inputs.shared());
                    rlhf_data::synthetic::critique::read_principles(&file)?;
                    prompts(&s.data)
                }
                StageKind::Grpo(s) => prompts(&s.rollouts.data),
                StageKind::Ppo(s) => {
                    prompts(&s.rollouts.data)?;
                    s.ptx.as_ref().map_or(Ok(()), |p| sft(&p.data, p.turns))
                }
                StageKind::Opd(s) => prompts(&s.rollouts.data),
                StageKind::Control(_) => Ok(()),
                StageKind::Eval(s) => {
                    s.prompts.as_ref().map_or(Ok(()), prompts)?;
                    s.pairs.as_ref().map_or(Ok(()), pairs)
                }
            }
        };
        read().with_context(|| format!("data of stage `{}`", stage.name))?;
    }
    Ok(())
}

impl Plan {
    /// The language model that the run begins with.
    pub(crate) fn base(&self) -> anyhow::Result<&Base> {
        self.base.as_ref().ok_or_else(|| {
            let mend = "add [init], which names one";
            usage("the run has no language model", &self.name, mend).into()
        })
    }

    /// The plan as lines for a person.
    pub(crate) fn describe(&self) -> String {
        let mut out = format!(
            "{}\n  model      {} parameters, about {} of memory in training\n",
            self.recipe.run.title,
            terminal::count(self.parameters as f64),
            terminal::bytes(self.training_bytes),
        );
        for f in &self.data {
            out += &format!(
                "  data       {} · {} rows, {} kept, {} tokens\n",
                f.path,
                f.rows,
                f.kept,
                terminal::count(f.tokens as f64)
            );
        }
        for s in &self.recipe.stages {
            out += &format!(
                "  stage      {:<8} {:<7} {}\n",
                s.name,
                s.kind.name(),
                steps(&s.kind)
            );
        }
        out
    }
}

fn steps(kind: &StageKind) -> String {
    match kind {
        StageKind::Sft(s) => format!("{} steps of {} rows", s.steps, s.batch_size),
        StageKind::Reward(s) => format!(
            "{} steps of {} {} rows",
            s.steps,
            s.batch_size,
            s.rows().name()
        ),
        StageKind::Dpo(s) => format!("{} steps of {} pairs", s.steps, s.batch_size),
        StageKind::Unpaired(s) => format!("{} steps of {} rows", s.steps, s.batch_size),
        StageKind::Ranked(s) => format!("{} steps of {} rankings", s.steps, s.batch_size),
        StageKind::OnlineDpo(s) => format!(
            "{} steps of {} × {} completions",
            s.steps, s.rollouts.prompts_per_step, s.rollouts.group_size
        ),
        StageKind::Grpo(s) => format!(
            "{} steps of {} × {} completions",
            s.steps, s.rollouts.prompts_per_step, s.rollouts.group_size
        ),
        StageKind::Ppo(s) => format!(
            "{} steps of {} × {} completions",
            s.steps, s.rollouts.prompts_per_step, s.rollouts.group_size
        ),
        StageKind::Opd(s) => format!(
            "{} steps of {} × {} completions, taught by {}",
            s.steps, s.rollouts.prompts_per_step, s.rollouts.group_size, s.teacher
        ),
        StageKind::Control(s) => format!("{} steps of {} environments", s.steps, s.environments),
        StageKind::SelfInstruct(s) => format!(
            "up to {} rounds of {} lists",
            s.settings.rounds, s.settings.lists
        ),
        StageKind::Critique(s) => format!("{} revisions of each answer", s.settings.rounds),
        StageKind::Rejection(s) => format!("{} completions of each prompt", s.samples),
        StageKind::Eval(s) => format!("{} against {}", s.models.join(", "), s.baseline),
    }
}
