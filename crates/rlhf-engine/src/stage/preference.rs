//! The stages that learn from fixed data: SFT, DPO.

use rlhf_dpo::train::{self as dpo_train, DpoConfig, HeldOut, PairData, PairSums};
use rlhf_model::CausalLm as _;
use rlhf_policy::sft::{self as sft_train, Demonstrations, HeldOut as HeldOutRows, SftConfig};

use super::align::samples;
use super::reference::{self, Asked};
use super::{Context, Ended};
use crate::recipe::{Data, Dpo, Sft};

pub(super) fn sft(ctx: &Context<'_>, name: &str, s: &Sft) -> anyhow::Result<Ended> {
    let model = ctx.learner(&s.model, &s.memory)?;
    let data = ctx.inputs.sft(&s.data, s.turns)?;
    let cfg = SftConfig {
        seed: ctx.recipe.run.seed,
        steps: s.steps,
        batch_size: s.batch_size,
        micro_tokens: s.micro_tokens,
        loss: s.loss,
        neftune_alpha: s.neftune_alpha,
    };
    let test = s.test.as_ref().map(|t| ctx.inputs.sft(t, s.turns));
    let test = test.transpose()?;
    let demonstrations = Demonstrations {
        rows: &data.rows,
        weights: data.weights.as_deref(),
        held_out: test.as_ref().map(|t| HeldOutRows {
            rows: &t.rows,
            every: s.test_every.unwrap_or(u64::MAX),
        }),
    };
    let mut stepper = ctx.stepper(model.parameters(), &s.optim, &s.memory, s.steps);
    let mut session = ctx.session(name, s.steps)?;
    let flow = sft_train::train(&model, &demonstrations, &cfg, &mut stepper, &mut session)?;
    let mut ended = ctx.finish(flow, session)?;
    if let Some(t) = &test {
        // Not the mean over the last steps, of which few had a look.
        let loss = sft_train::evaluate(&model, &t.rows, s.micro_tokens)?;
        ended.last.insert("test_loss".into(), loss);
    }
    ctx.save_policy(name, &model)?;
    Ok(ended)
}

pub(super) fn dpo(ctx: &Context<'_>, name: &str, s: &Dpo) -> anyhow::Result<Ended> {
    let model = ctx.learner(&s.model, &s.memory)?;
    let data = ctx.inputs.preference(&s.data)?;
    let cfg = DpoConfig {
        loss: s.mix(),
        seed: ctx.recipe.run.seed,
        steps: s.steps,
        batch_size: s.batch_size,
        micro_tokens: s.micro_tokens,
    };
    // Before the first step the model is the reference; on resume the checkpoint is loaded later.
    let folder = ctx.model_dir(&s.model);
    let asked = |groups, met| Asked {
        model: &folder,
        memory: &s.memory,
        groups,
        micro_tokens: s.micro_tokens,
        met,
    };
    let in_pairs = |sums: Vec<f64>| -> PairSums {
        let pairs = sums.chunks_exact(2);
        pairs.map(|both| (both[0], both[1])).collect()
    };
    let reference = if asks_reference(s) {
        let positions = s.steps.saturating_mul(s.batch_size as u64);
        let met = (positions < data.rows.len() as u64).then_some((positions, cfg.seed));
        in_pairs(reference::sums(
            ctx.dir,
            &asked(&data.rows[..], met),
            || Ok(dpo_train::met_sums(&model, &data.rows, &cfg)?),
        )?)
    } else {
        vec![(0.0, 0.0); data.rows.len()]
    };
    let test = s
        .test
        .as_ref()
        .map(|t| ctx.inputs.preference(t))
        .transpose()?;
    let test_reference = test
        .as_ref()
        .map(|t| {
            let sums = reference::sums(ctx.dir, &asked(&t.rows[..], None), || {
                Ok(dpo_train::completion_sums(&model, &t.rows, s.micro_tokens)?)
            })?;
            anyhow::Ok(in_pairs(sums))
        })
        .transpose()?;
    // Only differences of scores count.
    let scores = |data: &Data| -> anyhow::Result<Option<PairSums>> {
        let gaps = s
            .asks_scores()
            .then(|| ctx.inputs.scores(data))
            .transpose()?;
        Ok(gaps.map(|g| g.into_iter().map(|gap| (gap, 0.0)).collect()))
    };
    let (own_scores, test_scores) = (
        scores(&s.data)?,
        s.test.as_ref().map(scores).transpose()?.flatten(),
    );
    let (dir, tokenizer) = (ctx.dir.join(name), ctx.tokenizer()?);
    let held_out = test.as_ref().zip(test_reference.as_ref()).zip(s.test_every);
    let held_out = held_out.map(|((test, reference), every)| HeldOut {
        data: PairData {
            groups: &test.rows,
            reference,
            scores: test_scores.as_deref(),
        },
        every,
        patience: s.patience,
        samples: samples(tokenizer, s.samples, s.test.as_ref(), &test.rows, &dir),
    });
    let pairs = PairData {
        groups: &data.rows,
        reference: &reference,
        scores: own_scores.as_deref(),
    };
    let mut stepper = ctx.stepper(model.parameters(), &s.optim, &s.memory, s.steps);
    let mut session = ctx.session(name, s.steps)?;
    let flow = dpo_train::train(
        &model,
        pairs,
        &cfg,
        held_out.as_ref(),
        &mut stepper,
        &mut session,
    )?;
    let mut ended = ctx.finish(flow, session)?;
    if let (Some(test), Some(before)) = (&test, &test_reference) {
        let after = dpo_train::pair_sums(&model, &test.rows, s.micro_tokens)?;
        // Implicit rewards in nats, whatever the loss makes of them.
        let e = dpo_train::evaluate(&after, before);
        ended.last.insert("test_accuracy".into(), e.accuracy);
        ended.last.insert("test_margin".into(), e.margin);
    }
    ctx.save_policy(name, &model)?;
    Ok(ended)
}

/// Whether training needs the reference's sums.
fn asks_reference(s: &Dpo) -> bool {
    !s.reference_free && s.mix().terms.iter().any(|t| t.loss.has_reference())
}
