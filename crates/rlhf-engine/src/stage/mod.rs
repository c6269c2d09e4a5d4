//! What runs: the stages of a plan, one after the other, each in a folder of its own.
//!
//! Invariant: a stage reads files (data, an earlier stage's `model/`) and writes its folder; nothing
//! is handed over in memory. So a finished stage is skipped on resume and any stage's result can be
//! used by itself.

mod align;
mod control;
mod eval;
mod judges;
pub(crate) mod measure;
mod online;
mod policy;
mod preference;
mod reference;
mod rejection;
mod reward;
mod synthetic;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use rlhf_data::tokenize::ChatTokenizer;
use rlhf_kernels::optim::AdamWConfig;
use rlhf_model::{LoadOptions, ScalarModel, Transformer, copy_tokenizer};
use rlhf_reward::model::RewardModel;
use rlhf_reward::source::{ModelSource, Part, RewardMix, RewardSource, Shaping};
use rlhf_train::{Flow, Session, SessionConfig, Signal, Stepper, StepperConfig, StopFlag};
use tch::{Device, Kind, Tensor};

use crate::inputs::Inputs;
use crate::memory::Memory;
use crate::plan::{Base, Plan};
use crate::recipe::{Optim, Recipe, RewardPart, Rollouts, Stage, StageKind};
use rlhf::exit::Interrupted;
use rlhf::files::write_json;
use rlhf::results::StageSummary;
use rlhf::usage;

/// Everything that stages share.
pub(crate) struct Context<'a> {
    pub recipe: &'a Recipe,
    pub plan: &'a Plan,
    pub inputs: &'a Inputs,
    pub dir: &'a Path,
    pub device: Device,
    pub stop: StopFlag,
    pub quiet: bool,
}

/// How a stage ended.
pub(crate) struct Ended {
    pub steps: u64,
    pub tokens: u64,
    pub last: BTreeMap<String, f64>,
}

impl Context<'_> {
    /// Runs every stage that is not finished yet.
    pub(crate) fn run_all(&self) -> anyhow::Result<Vec<StageSummary>> {
        let n = self.recipe.stages.len();
        let mut all = Vec::new();
        for (i, stage) in self.recipe.stages.iter().enumerate() {
            let path = self.dir.join(&stage.name).join("done.json");
            if let Ok(text) = std::fs::read_to_string(&path) {
                let done: StageSummary = serde_json::from_str(&text)
                    .with_context(|| format!("{} is damaged", path.display()))?;
                self.say(&format!(
                    "[{}/{n}] {} ({}): already done",
                    i + 1,
                    stage.name,
                    stage.kind.name()
                ));
                all.push(done);
                continue;
            }
            self.say(&format!(
                "[{}/{n}] {} ({})",
                i + 1,
                stage.name,
                stage.kind.name()
            ));
            let began = Instant::now();
            let ended = self
                .run(stage)
                .with_context(|| format!("stage `{}`", stage.name))?;
            let done = StageSummary {
                name: stage.name.clone(),
                kind: stage.kind.name().into(),
                steps: ended.steps,
                seconds: began.elapsed().as_secs_f64(),
                tokens: ended.tokens,
                last: ended.last,
            };
            self.say(&format!(
                "      done in {:.1} s{}",
                done.seconds,
                headline(&done)
            ));
            write_json(&path, &done)?;
            all.push(done);
        }
        Ok(all)
    }

    fn run(&self, stage: &Stage) -> anyhow::Result<Ended> {
        let dir = self.dir.join(&stage.name);
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        match &stage.kind {
            StageKind::Sft(s) => preference::sft(self, &stage.name, s),
            StageKind::Reward(s) => reward::run(self, &stage.name, s),
            StageKind::Dpo(s) => preference::dpo(self, &stage.name, s),
            StageKind::Unpaired(s) => align::unpaired(self, &stage.name, s),
            StageKind::Ranked(s) => align::ranked(self, &stage.name, s),
            StageKind::OnlineDpo(s) => online::run(self, &stage.name, s),
            StageKind::Grpo(s) => policy::grpo(self, &stage.name, s),
            StageKind::Ppo(s) => policy::ppo(self, &stage.name, s),
            StageKind::Opd(s) => policy::opd(self, &stage.name, s),
            StageKind::Control(s) => control::run(self, &stage.name, s),
            StageKind::Rejection(s) => rejection::run(self, &stage.name, s),
            StageKind::SelfInstruct(s) => synthetic::self_instruct(self, &stage.name, s),
            StageKind::Critique(s) => synthetic::critique(self, &stage.name, s),
            StageKind::Eval(s) => eval::run(self, &stage.name, s),
        }
    }

    /// A line for a person to read, on stderr.
    #[allow(clippy::print_stderr, reason = "progress goes to stderr")]
    pub(crate) fn say(&self, line: &str) {
        if !self.quiet {
            eprintln!("{line}");
        }
    }

    /// The folder of the model that a stage name stands for.
    pub(crate) fn model_dir(&self, name: &str) -> PathBuf {
        match (name, &self.plan.base) {
            (
                "init",
                Some(Base {
                    from: Some(from), ..
                }),
            ) => from.clone(),
            _ => self.dir.join(name).join("model"),
        }
    }

    /// The folder of a model that is `init`, a stage, or lies elsewhere.
    pub(crate) fn model_or_folder(&self, name: &str) -> PathBuf {
        let stage = |s: &Stage| s.name == name;
        if name == "init" || self.recipe.stages.iter().any(stage) {
            return self.model_dir(name);
        }
        crate::recipe::resolve(name, self.inputs.shared())
    }

    /// The optimiser steps that the model of a stage name has had in that stage, where it is known.
    pub(crate) fn policy_version(&self, name: &str) -> Option<u64> {
        let text = std::fs::read_to_string(self.dir.join(name).join("done.json")).ok()?;
        let done: StageSummary = serde_json::from_str(&text).ok()?;
        Some(done.steps)
    }

    /// A digest of the weights and the configuration of the model of a stage name.
    pub(crate) fn model_digest(&self, name: &str) -> anyhow::Result<String> {
        reference::model_digest(&self.model_dir(name))
    }

    fn load_options(&self, kind: Kind) -> LoadOptions {
        LoadOptions {
            device: self.device,
            kind,
        }
    }

    /// Loads the policy that a stage name stands for.
    pub(crate) fn policy(&self, name: &str) -> anyhow::Result<Transformer> {
        self.policy_in(name, Kind::Float)
    }

    fn policy_in(&self, name: &str, kind: Kind) -> anyhow::Result<Transformer> {
        let dir = self.model_dir(name);
        Transformer::load(&dir, &self.load_options(kind))
            .with_context(|| format!("loading {}", dir.display()))
    }

    /// Loads the policy that a stage is to train.
    pub(crate) fn learner(&self, name: &str, memory: &Memory) -> anyhow::Result<Transformer> {
        Ok(memory.policy(
            self.policy_in(name, memory.weights.kind())?,
            self.recipe.run.seed,
        )?)
    }

    /// Loads the reward or value model that a stage is to train.
    pub(crate) fn scalar_learner(
        &self,
        name: &str,
        memory: &Memory,
    ) -> anyhow::Result<ScalarModel> {
        Ok(memory.scalar(
            self.scalar_in(name, memory.weights.kind())?,
            self.recipe.run.seed,
        )?)
    }

    /// Loads the trunk that a reward stage is to train, with a new head of so many outputs.
    pub(crate) fn reward_learner(
        &self,
        name: &str,
        memory: &Memory,
        outputs: usize,
        seed: u64,
    ) -> anyhow::Result<ScalarModel> {
        let policy = self.policy_in(name, memory.weights.kind())?;
        Ok(memory.scalar(ScalarModel::with_outputs(policy, outputs, seed)?, seed)?)
    }

    /// Loads the reward model of a stage.
    pub(crate) fn reward_model(&self, name: &str) -> anyhow::Result<RewardModel> {
        if self.is_reward(name) {
            return self.reward_model_in(&self.model_dir(name));
        }
        Ok(self.scalar_in(name, Kind::Float)?.into())
    }

    /// Loads the reward model in a folder.
    pub(crate) fn reward_model_in(&self, dir: &Path) -> anyhow::Result<RewardModel> {
        RewardModel::load(dir, &self.load_options(Kind::Float))
            .with_context(|| format!("loading {}", dir.display()))
    }

    /// Loads a reward model of one number, or puts a new scalar head on a policy.
    pub(crate) fn scalar(&self, name: &str) -> anyhow::Result<ScalarModel> {
        self.scalar_in(name, Kind::Float)
    }

    fn is_reward(&self, name: &str) -> bool {
        let stage = self.recipe.stages.iter().find(|s| s.name == name);
        stage.is_some_and(|s| matches!(s.kind, StageKind::Reward(_)))
    }

    fn scalar_in(&self, name: &str, kind: Kind) -> anyhow::Result<ScalarModel> {
        let dir = self.model_dir(name);
        if self.is_reward(name) {
            return ScalarModel::load(&dir, &self.load_options(kind))
                .with_context(|| format!("loading {}", dir.display()));
        }
        Ok(ScalarModel::from_trunk(
            self.policy_in(name, kind)?,
            self.recipe.run.seed,
        )?)
    }

    /// The mix of rewards of rollouts.
    pub(crate) fn rewards_of(
        &self,
        r: &Rollouts,
        micro_tokens: usize,
    ) -> anyhow::Result<RewardMix> {
        self.rewards(&r.reward, r.missing_eos_penalty, r.shaping, micro_tokens)
    }

    /// The mix of rewards that a recipe's parts describe.
    pub(crate) fn rewards(
        &self,
        parts: &[RewardPart],
        missing_eos_penalty: f64,
        shaping: Shaping,
        micro_tokens: usize,
    ) -> anyhow::Result<RewardMix> {
        let mut mix = RewardMix::new(missing_eos_penalty).shaped(shaping)?;
        for part in parts {
            let mut described = Part::new(part.weight, self.source(part, micro_tokens)?)
                .normalized(part.normalize)
                .clipped(part.clip)
                .gated(part.gate.clone());
            if let Some(name) = &part.name {
                described = described.named(name);
            }
            mix.push(described)?;
        }
        Ok(mix)
    }

    fn source(
        &self,
        part: &RewardPart,
        micro_tokens: usize,
    ) -> anyhow::Result<Box<dyn RewardSource>> {
        if let Some(source) = self.verdict_source(part, micro_tokens)? {
            return Ok(source);
        }
        match (&part.model, &part.rule) {
            (Some(name), _) => Ok(Box::new(self.reward_source(name, micro_tokens)?)),
            (None, Some(rule)) => Ok(Box::new(rule.clone())),
            (None, None) => Err(usage(
                "a reward part without model, rule, verifier or judge",
                "the recipe",
                "give one",
            )
            .into()),
        }
    }

    pub(crate) fn reward_source(
        &self,
        name: &str,
        micro_tokens: usize,
    ) -> anyhow::Result<ModelSource> {
        let model = self.reward_model(name)?;
        Ok(ModelSource::new(name, model, micro_tokens))
    }

    pub(crate) fn stepper(
        &self,
        parameters: Vec<(String, Tensor)>,
        optim: &Optim,
        memory: &Memory,
        steps: u64,
    ) -> Stepper {
        let config = stepper_config(optim, steps);
        let adamw = AdamWConfig {
            narrow: memory.weights.step(),
            ..optim.adamw()
        };
        Stepper::new(parameters, optim.optimizer(adamw), config)
    }

    pub(crate) fn session(&self, name: &str, steps: u64) -> anyhow::Result<Session> {
        self.session_keeping(name, steps, 2)
    }

    /// As [`Context::session`], with so many checkpoints kept.
    pub(crate) fn session_keeping(
        &self,
        name: &str,
        steps: u64,
        keep: usize,
    ) -> anyhow::Result<Session> {
        let config = SessionConfig {
            dir: self.dir.join(name),
            stage: name.to_owned(),
            total_steps: steps,
            checkpoint_every: self.recipe.run.checkpoint_every,
            keep,
            stop: self.stop.clone(),
        };
        Ok(Session::open(config)?)
    }

    /// The error that a signal makes of a run.
    pub(crate) fn interrupted(&self, signal: Signal) -> anyhow::Error {
        Interrupted {
            code: signal.exit_code(),
            go_on: format!(
                "rlhf run {} --out {} --resume",
                self.plan.recipe_arg,
                self.dir.display()
            ),
        }
        .into()
    }

    /// Turns a trainer's end into an error when a signal stopped it.
    pub(crate) fn finish(&self, flow: Flow, session: Session) -> anyhow::Result<Ended> {
        if let Flow::Stop(signal) = flow {
            return Err(self.interrupted(signal));
        }
        let summary = session.finish()?;
        Ok(Ended {
            steps: summary.steps,
            tokens: summary.tokens,
            last: summary.last,
        })
    }

    /// Saves a policy with its tokenizer as the stage's `model/`, an adapter merged and also by itself
    /// as its `adapter/`.
    pub(crate) fn save_policy(&self, name: &str, model: &Transformer) -> anyhow::Result<()> {
        let dir = self.model_dir(name);
        if model.adapter().is_some() {
            model.save_adapter(&self.dir.join(name).join("adapter"), None)?;
        }
        model.save(&dir)?;
        copy_tokenizer(&self.plan.base()?.tokenizer_dir, &dir)?;
        Ok(())
    }

    pub(crate) fn tokenizer(&self) -> anyhow::Result<&ChatTokenizer> {
        self.inputs.tokenizer()
    }
}

fn stepper_config(optim: &Optim, steps: u64) -> StepperConfig {
    StepperConfig {
        lr: optim.lr,
        schedule: optim.schedule,
        warmup_steps: optim.warmup_steps,
        total_steps: steps,
        max_grad_norm: Some(optim.max_grad_norm),
        max_bad_steps: 5,
    }
}

fn headline(done: &StageSummary) -> String {
    let keys = [
        "accuracy",
        "test_accuracy",
        "test_mse",
        "test_return",
        "reward",
        "kl",
        "loss",
    ];
    let shown: Vec<String> = keys
        .iter()
        .filter_map(|k| done.last.get(*k).map(|v| format!("{k} {v:.3}")))
        .collect();
    if shown.is_empty() {
        String::new()
    } else {
        format!(" ({})", shown.join(", "))
    }
}
