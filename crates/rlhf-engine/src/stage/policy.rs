//! The stages that learn from their own completions: GRPO and PPO.

use rlhf_model::{CausalLm as _, Sampler, ServerSampler, Transformer};
use rlhf_policy::grpo::{self, GrpoConfig, Players};
use rlhf_policy::loss::ppo::PpoLoss;
use rlhf_policy::ppo::{self, Learners, PpoConfig};
use rlhf_policy::rollout::RolloutConfig;

use super::{Context, Ended};
use crate::recipe::{Grpo, Optim, Ppo, Rollouts, Sampling};

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

pub(super) fn grpo(ctx: &Context<'_>, name: &str, s: &Grpo) -> anyhow::Result<Ended> {
    let policy = ctx.learner(&s.model, &s.memory)?;
    let reference = policy.reference()?;
    let prompts = ctx.inputs.prompts(&s.rollouts.data)?;
    let rewards = ctx.rewards(
        &s.rollouts.reward,
        s.rollouts.missing_eos_penalty,
        s.micro_tokens,
    )?;
    if let Some(warning) = s.kl.warning() {
        ctx.say(&format!("      note: {warning}"));
    }
    let server = server(&s.rollouts, &policy)?;
    let cfg = GrpoConfig {
        rollouts: rollouts(ctx, &s.rollouts),
        steps: s.steps,
        epochs: s.epochs,
        micro_tokens: s.micro_tokens,
        advantage: s.advantage,
        loss: s.loss,
        kl: s.kl,
        correction: s.correction,
    };
    let mut stepper = ctx.stepper(policy.parameters(), &s.optim, &s.memory, s.steps * s.epochs);
    let mut session = ctx.session(name, s.steps)?;
    let players = Players {
        policy: &policy,
        reference: &reference,
        tokenizer: ctx.tokenizer(),
        prompts: &prompts.rows,
        rewards: &rewards,
        server: server.as_ref().map(|s| s as &dyn Sampler),
    };
    let flow = grpo::train(players, &cfg, &mut stepper, &mut session)?;
    let ended = ctx.finish(flow, session)?;
    ctx.save_policy(name, &policy)?;
    Ok(ended)
}

pub(super) fn ppo(ctx: &Context<'_>, name: &str, s: &Ppo) -> anyhow::Result<Ended> {
    let policy = ctx.learner(&s.model, &s.memory)?;
    let reference = policy.reference()?;
    let value = ctx.scalar_learner(&s.value_model, &s.memory)?;
    let prompts = ctx.inputs.prompts(&s.rollouts.data)?;
    let rewards = ctx.rewards(
        &s.rollouts.reward,
        s.rollouts.missing_eos_penalty,
        s.micro_tokens,
    )?;
    let server = server(&s.rollouts, &policy)?;
    let cfg = PpoConfig {
        rollouts: rollouts(ctx, &s.rollouts),
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
        kl: s.kl,
        value_warmup_steps: s.value_warmup_steps,
    };
    let updates = s.steps * s.epochs * s.minibatches as u64;
    let mut policy_stepper = ctx.stepper(policy.parameters(), &s.optim, &s.memory, updates);
    let value_optim = Optim {
        lr: s.value_lr,
        ..s.optim.clone()
    };
    let mut value_stepper = ctx.stepper(value.parameters(), &value_optim, &s.memory, updates);
    let mut session = ctx.session(name, s.steps)?;
    let players = Players {
        policy: &policy,
        reference: &reference,
        tokenizer: ctx.tokenizer(),
        prompts: &prompts.rows,
        rewards: &rewards,
        server: server.as_ref().map(|s| s as &dyn Sampler),
    };
    let learners = Learners {
        value: &value,
        policy_stepper: &mut policy_stepper,
        value_stepper: &mut value_stepper,
    };
    let flow = ppo::train(players, learners, &cfg, &mut session)?;
    let ended = ctx.finish(flow, session)?;
    ctx.save_policy(name, &policy)?;
    Ok(ended)
}
