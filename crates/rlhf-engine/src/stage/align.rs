//! The stages of direct alignment on thumbs and rankings.

use std::path::Path;

use rlhf_data::group::PromptGroup;
use rlhf_data::tokenize::ChatTokenizer;
use rlhf_dpo::train::rankings::{self, RankedConfig, RankedData};
use rlhf_dpo::train::thumbs::{self, ThumbConfig, ThumbData, ThumbSums};
use rlhf_dpo::train::{HeldOut, Samples, TrainConfig, completion_sums, met_sums};
use rlhf_model::{CausalLm as _, Transformer};

use super::reference::{self, Asked};
use super::{Context, Ended};
use crate::recipe::{Align, Data, Ranked, Unpaired};

fn config<L: Clone>(ctx: &Context<'_>, s: &Align<L>) -> TrainConfig<L> {
    TrainConfig {
        loss: s.loss.clone(),
        seed: ctx.recipe.run.seed,
        steps: s.steps,
        batch_size: s.batch_size,
        micro_tokens: s.micro_tokens,
    }
}

/// The reference's sums of `groups`, kept in the run's folder; `all` or those that a training meets.
fn sums<L>(
    ctx: &Context<'_>,
    s: &Align<L>,
    cfg: &TrainConfig<L>,
    model: &Transformer,
    groups: &[PromptGroup],
    all: bool,
) -> anyhow::Result<Vec<f64>> {
    let positions = cfg.steps.saturating_mul(cfg.batch_size as u64);
    let some = !all && positions < groups.len() as u64;
    let asked = Asked {
        model: &ctx.model_dir(&s.model),
        memory: &s.memory,
        groups,
        micro_tokens: s.micro_tokens,
        met: some.then_some((positions, cfg.seed)),
    };
    reference::sums(ctx.dir, &asked, || {
        Ok(if some {
            met_sums(model, groups, cfg)?
        } else {
            completion_sums(model, groups, cfg.micro_tokens)?
        })
    })
}

/// The answers that are wanted at every look at held-out `groups`.
pub(super) fn samples<'a>(
    tokenizer: &'a ChatTokenizer,
    wanted: Option<usize>,
    test: Option<&Data>,
    groups: &'a [PromptGroup],
    dir: &'a Path,
) -> Option<Samples<'a>> {
    let (wanted, test) = wanted.zip(test)?;
    Some(Samples {
        groups: &groups[..groups.len().min(wanted)],
        tokenizer,
        max_new_tokens: test.max_completion,
        dir,
    })
}

/// Thumbs apart: groups and labels.
fn apart(rows: &[(PromptGroup, bool)]) -> (Vec<PromptGroup>, Vec<bool>) {
    rows.iter().cloned().unzip()
}

pub(super) fn unpaired(ctx: &Context<'_>, name: &str, s: &Unpaired) -> anyhow::Result<Ended> {
    let model = ctx.learner(&s.model, &s.memory)?;
    let (groups, desirable) = apart(&ctx.inputs.unpaired(&s.data)?.rows);
    let cfg: ThumbConfig = config(ctx, s);
    // Before the first step the model is the reference; on resume the checkpoint is loaded later.
    let reference_sums = |groups: &[PromptGroup], cfg: &ThumbConfig, all: bool| {
        let mismatched = if cfg.loss.asks_reference_point() {
            sums(ctx, s, cfg, &model, &thumbs::mismatched(groups, cfg), true)?
        } else {
            Vec::new()
        };
        let own = sums(ctx, s, cfg, &model, groups, all)?;
        anyhow::Ok(ThumbSums { own, mismatched })
    };
    let reference = reference_sums(&groups, &cfg, false)?;
    let test = s
        .test
        .as_ref()
        .map(|t| anyhow::Ok(apart(&ctx.inputs.unpaired(t)?.rows)))
        .transpose()?;
    let test_reference = test
        .as_ref()
        .map(|(groups, _)| reference_sums(groups, &thumbs::at_once(groups, &cfg), true))
        .transpose()?;
    let (dir, tokenizer) = (ctx.dir.join(name), ctx.tokenizer()?);
    let held_out = test.as_ref().zip(test_reference.as_ref());
    let held_out = held_out.map(|((groups, desirable), reference)| HeldOut {
        data: ThumbData {
            groups,
            desirable,
            reference,
        },
        every: s.test_every.unwrap_or(s.steps),
        patience: s.patience,
        samples: samples(tokenizer, s.samples, s.test.as_ref(), groups, &dir),
    });
    let data = ThumbData {
        groups: &groups,
        desirable: &desirable,
        reference: &reference,
    };
    let mut stepper = ctx.stepper(model.parameters(), &s.optim, &s.memory, s.steps);
    let mut session = ctx.session(name, s.steps)?;
    let flow = thumbs::train(
        &model,
        data,
        &cfg,
        held_out.as_ref(),
        &mut stepper,
        &mut session,
    )?;
    let ended = ctx.finish(flow, session)?;
    ctx.save_policy(name, &model)?;
    Ok(ended)
}

pub(super) fn ranked(ctx: &Context<'_>, name: &str, s: &Ranked) -> anyhow::Result<Ended> {
    let model = ctx.learner(&s.model, &s.memory)?;
    let data = ctx.inputs.ranked(&s.data)?;
    let cfg: RankedConfig = config(ctx, s);
    let reference = sums(ctx, s, &cfg, &model, &data.rows, false)?;
    let test = s.test.as_ref().map(|t| ctx.inputs.ranked(t)).transpose()?;
    let test_reference = test
        .as_ref()
        .map(|t| sums(ctx, s, &cfg, &model, &t.rows, true))
        .transpose()?;
    let (dir, tokenizer) = (ctx.dir.join(name), ctx.tokenizer()?);
    let held_out = test.as_ref().zip(test_reference.as_ref());
    let held_out = held_out.map(|(test, reference)| HeldOut {
        data: RankedData {
            groups: &test.rows,
            reference,
        },
        every: s.test_every.unwrap_or(s.steps),
        patience: s.patience,
        samples: samples(tokenizer, s.samples, s.test.as_ref(), &test.rows, &dir),
    });
    let data = RankedData {
        groups: &data.rows,
        reference: &reference,
    };
    let mut stepper = ctx.stepper(model.parameters(), &s.optim, &s.memory, s.steps);
    let mut session = ctx.session(name, s.steps)?;
    let flow = rankings::train(
        &model,
        data,
        &cfg,
        held_out.as_ref(),
        &mut stepper,
        &mut session,
    )?;
    let ended = ctx.finish(flow, session)?;
    ctx.save_policy(name, &model)?;
    Ok(ended)
}
