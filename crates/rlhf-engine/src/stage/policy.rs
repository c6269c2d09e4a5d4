//! The stages that learn from their own completions: GRPO and its kin, PPO, on-policy distillation.

use anyhow::Context as _;
use rlhf_model::{
    CausalLm as _, LoadOptions, Sampler, ScalarModel, ServerSampler, Transformer, ValueHead,
};
use rlhf_policy::advantage::AdvantageEstimator;
use rlhf_policy::collect::Rules;
use rlhf_policy::environment::{Calculator, Environment, Scene, TalkLimits};
use rlhf_policy::grpo::{self, GrpoConfig, Players};
use rlhf_policy::loss::ppo::PpoLoss;
use rlhf_policy::opd::{self, OpdConfig};
use rlhf_policy::ppo::{self, Learners, PpoConfig, Ptx, Value};
use rlhf_policy::reference::ReferencePolicy;
use rlhf_policy::rollout::{RolloutConfig, StepSource};
use rlhf_policy::steps::ModelSteps;
use rlhf_train::Session;
use tch::Kind;

use super::{Context, Ended};
use crate::recipe::{Grpo, Opd, Optim, Ppo, Rollouts, SHARED, Sampling, Scenery};
use rlhf::usage;

pub(super) fn rollout_config(
    seed: u64,
    s: &Sampling,
    prompts_per_step: usize,
    group_size: usize,
) -> RolloutConfig {
    RolloutConfig {
        seed,
        prompts_per_step,
        group_size,
        temperature: s.temperature,
        top_k: s.top_k,
        top_p: s.top_p,
        min_p: s.min_p,
        max_new_tokens: s.max_new_tokens,
        max_sequences: s.max_sequences,
        weights: s.weights,
    }
}

fn rollouts(ctx: &Context<'_>, r: &Rollouts) -> RolloutConfig {
    rollout_config(
        ctx.recipe.run.seed,
        &r.sampling,
        r.prompts_per_step,
        r.group_size,
    )
}

fn server(r: &Rollouts, policy: &Transformer) -> anyhow::Result<Option<ServerSampler>> {
    let connect = |s| crate::server::sampler(s, policy.config());
    r.server.as_ref().map(connect).transpose()
}

/// The rules with the folders of this run.
fn rules(ctx: &Context<'_>, name: &str, r: &Rollouts) -> anyhow::Result<Rules> {
    let mut rules = r.rules();
    let of_stage = |stage: &str| ctx.dir.join(stage).join("rollouts");
    rules.record = r.record.then(|| of_stage(name));
    if let Some(from) = &r.replay {
        let is_stage = ctx.recipe.stages.iter().any(|s| &s.name == from);
        let folder = if is_stage {
            of_stage(from)
        } else {
            crate::recipe::resolve(from, ctx.inputs.shared())
        };
        if !folder.is_dir() {
            return Err(usage(
                "there are no recorded rollouts",
                folder.display().to_string(),
                "name an earlier stage with rollouts.record = true, or the folder `rollouts` of one",
            )
            .into());
        }
        rules.replay = Some(folder);
    }
    Ok(rules)
}

/// The reward model that judges steps.
fn judge(ctx: &Context<'_>, r: &Rollouts) -> anyhow::Result<Option<ScalarModel>> {
    r.process.as_ref().map(|p| ctx.scalar(&p.model)).transpose()
}

fn steps<'a>(
    ctx: &'a Context<'_>,
    r: &Rollouts,
    judge: Option<&'a ScalarModel>,
    micro_tokens: usize,
) -> anyhow::Result<Option<ModelSteps<'a>>> {
    let Some((p, model)) = r.process.as_ref().zip(judge) else {
        return Ok(None);
    };
    Ok(Some(ModelSteps {
        name: p.model.clone(),
        model,
        tokenizer: ctx.tokenizer()?,
        ends: p.ends.clone(),
        weight: p.weight,
        micro_tokens,
    }))
}

/// The reference π₀, and a session that holds it where it moves.
fn tied(
    ctx: &Context<'_>,
    name: &str,
    (policy, steps): (&Transformer, u64),
    how: ReferencePolicy,
    ahead: u64,
) -> anyhow::Result<(Option<Transformer>, Session)> {
    let reference = match how {
        ReferencePolicy::None {} => None,
        _ => Some(policy.reference()?),
    };
    let mut session = ctx.session_keeping(name, steps, 2 + ahead as usize)?;
    if let Some(r) = reference.as_ref().filter(|_| how.moves()) {
        session.hold("reference", r.parameters());
    }
    Ok((reference, session))
}

pub(super) fn grpo(ctx: &Context<'_>, name: &str, s: &Grpo) -> anyhow::Result<Ended> {
    let policy = ctx.learner(&s.model, &s.memory)?;
    let learner = (&policy, s.steps);
    let (reference, mut session) = tied(ctx, name, learner, s.reference, s.rollouts.ahead)?;
    let judge = judge(ctx, &s.rollouts)?;
    let steps = steps(ctx, &s.rollouts, judge.as_ref(), s.micro_tokens)?;
    let prompts = ctx.inputs.prompts(&s.rollouts.data)?;
    let rewards = ctx.rewards_of(&s.rollouts, s.micro_tokens)?;
    if let Some(warning) = s.kl.warning().filter(|_| s.kl.coef > 0.0) {
        ctx.say(&format!("      note: {warning}"));
    }
    let server = server(&s.rollouts, &policy)?;
    let cfg = GrpoConfig {
        rollouts: rollouts(ctx, &s.rollouts),
        rules: Rules {
            greedy: matches!(s.advantage, AdvantageEstimator::Greedy {}),
            ..rules(ctx, name, &s.rollouts)?
        },
        steps: s.steps,
        epochs: s.epochs,
        minibatches: s.minibatches,
        micro_tokens: s.micro_tokens,
        advantage: s.advantage,
        loss: s.loss,
        kl: s.kl,
        adaptive_kl: s.adaptive_kl,
        reference: s.reference,
        entropy_coef: s.entropy_coef,
        max_kl: s.max_kl,
        old: s.old,
        correction: s.correction,
        samples: s.rollouts.samples,
    };
    let updates = s.steps * s.epochs * s.minibatches as u64;
    let mut stepper = ctx.stepper(policy.parameters(), &s.optim, &s.memory, updates);
    let talk = talk(&s.rollouts);
    let players = Players {
        policy: &policy,
        reference: reference.as_ref(),
        tokenizer: ctx.tokenizer()?,
        prompts: &prompts.rows,
        rewards: &rewards,
        steps: steps.as_ref().map(|s| s as &dyn StepSource),
        server: server.as_ref().map(|s| s as &dyn Sampler),
        scene: talk.as_ref().map(Talk::scene),
    };
    let flow = grpo::train(players, &cfg, &mut stepper, &mut session)?;
    let ended = ctx.finish(flow, session)?;
    said_if_short(ctx, &ended, s.steps);
    ctx.save_policy(name, &policy)?;
    Ok(ended)
}

/// An environment of a recipe.
struct Talk {
    environment: Box<dyn Environment>,
    limits: TalkLimits,
}

impl Talk {
    fn scene(&self) -> Scene<'_> {
        Scene {
            environment: &*self.environment,
            limits: self.limits,
        }
    }
}

fn talk(r: &Rollouts) -> Option<Talk> {
    r.environment.as_ref().map(|e| match e {
        Scenery::Calculator {
            field,
            role,
            limits,
        } => Talk {
            environment: Box::new(Calculator {
                field: field.clone(),
                role: *role,
            }),
            limits: *limits,
        },
    })
}

/// A training that stayed short of its steps did so because of its KL.
fn said_if_short(ctx: &Context<'_>, ended: &Ended, steps: u64) {
    if ended.steps < steps {
        ctx.say(&format!(
            "      the KL exceeded max_kl: the result is the checkpoint after {} of {steps} steps",
            ended.steps
        ));
    }
}

pub(super) fn ppo(ctx: &Context<'_>, name: &str, s: &Ppo) -> anyhow::Result<Ended> {
    let policy = ctx.learner(&s.model, &s.memory)?;
    let learner = (&policy, s.steps);
    let (reference, mut session) = tied(ctx, name, learner, s.reference, s.rollouts.ahead)?;
    let judge = judge(ctx, &s.rollouts)?;
    let steps = steps(ctx, &s.rollouts, judge.as_ref(), s.micro_tokens)?;
    let prompts = ctx.inputs.prompts(&s.rollouts.data)?;
    let rewards = ctx.rewards_of(&s.rollouts, s.micro_tokens)?;
    let server = server(&s.rollouts, &policy)?;
    let cfg = PpoConfig {
        rollouts: rollouts(ctx, &s.rollouts),
        rules: rules(ctx, name, &s.rollouts)?,
        steps: s.steps,
        epochs: s.epochs,
        minibatches: s.minibatches,
        micro_tokens: s.micro_tokens,
        loss: PpoLoss {
            clip: s.clip,
            value_clip: s.value_clip,
        },
        gamma: s.gamma,
        gae_lambda: s.gae_lambda,
        whitening: s.whitening,
        whiten_rewards: s.whiten_rewards,
        kl: s.kl,
        reference: s.reference,
        max_kl: s.max_kl,
        value_warmup_steps: s.value_warmup_steps,
        samples: s.rollouts.samples,
    };
    let texts = s
        .ptx
        .as_ref()
        .map(|p| ctx.inputs.sft(&p.data, p.turns))
        .transpose()?;
    let ptx = s.ptx.as_ref().zip(texts.as_ref()).map(|(p, texts)| Ptx {
        data: &texts.rows,
        batch_size: p.batch_size,
        coef: p.coef,
    });
    let talk = talk(&s.rollouts);
    let players = Players {
        policy: &policy,
        reference: reference.as_ref(),
        tokenizer: ctx.tokenizer()?,
        prompts: &prompts.rows,
        rewards: &rewards,
        steps: steps.as_ref().map(|s| s as &dyn StepSource),
        server: server.as_ref().map(|s| s as &dyn Sampler),
        scene: talk.as_ref().map(Talk::scene),
    };
    let updates = s.steps * s.epochs * s.minibatches as u64;
    let flow = if s.value_model == SHARED {
        let head = ValueHead::new(&policy)?;
        let mut parameters = policy.parameters();
        parameters.extend(head.parameters());
        let mut policy_stepper = ctx.stepper(parameters, &s.optim, &s.memory, updates);
        let learners = Learners {
            value: Value::Shared {
                head: &head,
                coef: s.value_coef.unwrap_or_default(),
            },
            policy_stepper: &mut policy_stepper,
            ptx,
        };
        ppo::train(players, learners, &cfg, &mut session)?
    } else {
        let value = ctx.scalar_learner(&s.value_model, &s.memory)?;
        let mut policy_stepper = ctx.stepper(policy.parameters(), &s.optim, &s.memory, updates);
        let value_optim = Optim {
            lr: s.value_lr.unwrap_or(s.optim.lr),
            ..s.optim.clone()
        };
        let mut stepper = ctx.stepper(value.parameters(), &value_optim, &s.memory, updates);
        let learners = Learners {
            value: Value::Separate {
                model: &value,
                stepper: &mut stepper,
            },
            policy_stepper: &mut policy_stepper,
            ptx,
        };
        ppo::train(players, learners, &cfg, &mut session)?
    };
    let ended = ctx.finish(flow, session)?;
    said_if_short(ctx, &ended, s.steps);
    ctx.save_policy(name, &policy)?;
    Ok(ended)
}

pub(super) fn opd(ctx: &Context<'_>, name: &str, s: &Opd) -> anyhow::Result<Ended> {
    let policy = ctx.learner(&s.model, &s.memory)?;
    let folder = ctx.model_or_folder(&s.teacher);
    if !folder.is_dir() {
        return Err(usage(
            format!("there is no teacher `{}`", s.teacher),
            folder.display().to_string(),
            "name init, an earlier stage, or a model folder",
        )
        .into());
    }
    let options = LoadOptions {
        device: ctx.device,
        kind: Kind::Float,
    };
    let teacher = Transformer::load(&folder, &options)
        .with_context(|| format!("loading the teacher in {}", folder.display()))?;
    let (theirs, own) = (teacher.config().vocab_size, policy.config().vocab_size);
    if theirs != own {
        return Err(usage(
            format!("the teacher has a vocabulary of {theirs}, the student of {own}"),
            folder.display().to_string(),
            "take a teacher with the student's tokenizer",
        )
        .into());
    }
    let prompts = ctx.inputs.prompts(&s.rollouts.data)?;
    let rewards = ctx.rewards_of(&s.rollouts, s.micro_tokens)?;
    let server = server(&s.rollouts, &policy)?;
    let cfg = OpdConfig {
        rollouts: rollouts(ctx, &s.rollouts),
        rules: rules(ctx, name, &s.rollouts)?,
        steps: s.steps,
        epochs: s.epochs,
        micro_tokens: s.micro_tokens,
        objective: s.objective,
        samples: s.rollouts.samples,
    };
    let mut stepper = ctx.stepper(policy.parameters(), &s.optim, &s.memory, s.steps * s.epochs);
    let mut session = ctx.session(name, s.steps)?;
    let talk = talk(&s.rollouts);
    let players = Players {
        policy: &policy,
        reference: None,
        tokenizer: ctx.tokenizer()?,
        prompts: &prompts.rows,
        rewards: &rewards,
        steps: None,
        server: server.as_ref().map(|s| s as &dyn Sampler),
        scene: talk.as_ref().map(Talk::scene),
    };
    let flow = opd::train(players, &teacher, &cfg, &mut stepper, &mut session)?;
    let ended = ctx.finish(flow, session)?;
    ctx.save_policy(name, &policy)?;
    Ok(ended)
}
