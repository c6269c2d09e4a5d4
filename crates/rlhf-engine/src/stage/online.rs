//! The stage of online direct alignment.

use rlhf_data::group::PromptGroup;
use rlhf_dpo::online::{self, Candidates, OnlineConfig, OnlinePrompt, Players, ScorerError};
use rlhf_model::CausalLm as _;
use rlhf_reward::source::Judged;

use super::{Context, Ended};
use crate::recipe::OnlineDpo;

pub(super) fn run(ctx: &Context<'_>, name: &str, s: &OnlineDpo) -> anyhow::Result<Ended> {
    let policy = ctx.learner(&s.model, &s.memory)?;
    let data = ctx.inputs.prompts(&s.rollouts.data)?;
    let prompts: Vec<OnlinePrompt> = data
        .rows
        .iter()
        .map(|p| OnlinePrompt {
            row: p.row,
            ids: p.ids.clone(),
        })
        .collect();
    let rewards = ctx.rewards_of(&s.rollouts, s.micro_tokens)?;
    let tokenizer = ctx.tokenizer()?;
    let scorer = |candidates: &[Candidates<'_>]| -> Result<Vec<Vec<f64>>, ScorerError> {
        let texts = candidates
            .iter()
            .map(|c| {
                let completions = c.group.completions.iter();
                completions
                    .map(|c| tokenizer.decode(&c.ids, true))
                    .collect::<rlhf_data::Result<Vec<String>>>()
            })
            .collect::<rlhf_data::Result<Vec<_>>>()?;
        let items: Vec<Judged<'_>> = candidates
            .iter()
            .zip(&texts)
            .map(|(c, texts)| Judged {
                group: c.group,
                prompt: &data.rows[c.prompt].text,
                texts,
                fields: &data.rows[c.prompt].fields,
            })
            .collect();
        Ok(rewards.scores(&items)?.total)
    };
    let replay: Vec<PromptGroup> = match &s.replay {
        Some(r) => ctx.inputs.preference(&r.data)?.rows.clone(),
        None => Vec::new(),
    };
    let sampling = &s.rollouts.sampling;
    let cfg = OnlineConfig {
        method: s.method,
        seed: ctx.recipe.run.seed,
        steps: s.steps,
        prompts_per_step: s.rollouts.prompts_per_step,
        samples: s.rollouts.group_size,
        temperature: sampling.temperature,
        max_new_tokens: sampling.max_new_tokens,
        max_sequences: sampling.max_sequences,
        weights: sampling.weights,
        micro_tokens: s.micro_tokens,
        refresh_every: s.refresh_every,
        replay_per_step: s.replay.as_ref().map_or(0, |r| r.pairs_per_step),
    };
    let dir = ctx.dir.join(name);
    let mut stepper = ctx.stepper(policy.parameters(), &s.optim, &s.memory, s.steps);
    let mut session = ctx.session(name, s.steps)?;
    let players = Players {
        reference: policy.reference()?,
        policy: &policy,
        prompts: &prompts,
        eos_ids: tokenizer.eos_ids(),
        scorer: &scorer,
        replay: &replay,
        dir: &dir,
    };
    let flow = online::train(players, &cfg, &mut stepper, &mut session)?;
    let ended = ctx.finish(flow, session)?;
    ctx.save_policy(name, &policy)?;
    Ok(ended)
}
