//! The stage that trains a reward model, of any kind of label, alone or as an ensemble.

use std::rc::Rc;

use rlhf_data::group::PromptGroup;
use rlhf_model::copy_tokenizer;
use rlhf_reward::labels::{Labelled, Rows};
use rlhf_reward::model::{RewardModel, Spec};
use rlhf_reward::objective::{Mix, Objective};
use rlhf_reward::train::{self, HeldOut, RewardConfig};

use super::{Context, Ended};
use crate::inputs::Table;
use crate::recipe::{Members, Reward, Share};
use crate::reward_eval::{measure, write_all};

/// Reference completions of a norm come from at most so many training rows.
const REFERENCE_ROWS: usize = 512;

/// What a member is trained on.
struct Lesson<'a> {
    spec: Spec,
    data: Rc<Table<Labelled>>,
    test: Rc<Table<Labelled>>,
    s: &'a Reward,
}

pub(super) fn run(ctx: &Context<'_>, name: &str, s: &Reward) -> anyhow::Result<Ended> {
    let members = s.ensemble.clone().unwrap_or_default();
    let step_end = match &s.loss {
        Objective::Process { separator, .. } => ctx.tokenizer()?.step_end(separator)?,
        _ => None,
    };
    let nets = match members.share {
        Share::Trunk => 1,
        Share::Nothing => members.count,
    };
    let lesson = Lesson {
        spec: Spec {
            readout: s.loss.readout(step_end),
            heads: members.count / nets,
            combine: members.combine,
            thresholds: s.loss.first_thresholds(),
        },
        data: ctx.inputs.labelled(&s.data, s.rows(), &s.loss)?,
        test: ctx.inputs.labelled(&s.test, s.rows(), &s.loss)?,
        s,
    };
    let (mut model, mut ended) = if nets == 1 {
        lesson.train(ctx, name, &members, 0)?
    } else {
        one_by_one(ctx, name, &lesson, &members)?
    };
    let reference: Vec<&PromptGroup> = lesson
        .data
        .rows
        .iter()
        .take(REFERENCE_ROWS)
        .map(|r| &r.group)
        .collect();
    model.normalize_on(&reference, s.micro_tokens)?;
    let dir = ctx.model_dir(name);
    model.save(&dir)?;
    copy_tokenizer(&ctx.plan.base()?.tokenizer_dir, &dir)?;
    ended.last.retain(|key, _| !key.starts_with("test_"));
    let found = train::evaluate(&model, &s.loss, &lesson.test.rows, s.micro_tokens)?;
    ended.last.extend(found);
    if s.rows() == Rows::Preference {
        let mut found = measure(&model, &lesson.test.rows, |_| None, s.micro_tokens)?;
        found.model = name.to_owned();
        found.data.clone_from(&s.test.path);
        let keys = [
            ("test_accuracy", Some(found.accuracy.value)),
            ("calibration_error", found.calibration_error),
            (
                "at_equal_length",
                found.length.map(|l| l.at_equal_length.value),
            ),
        ];
        for (key, x) in keys {
            ended.last.extend(x.map(|x| (key.to_owned(), x)));
        }
        write_all(&found, &ctx.dir.join(name))?;
    }
    Ok(ended)
}

impl Lesson<'_> {
    /// Trains one net, the `first`-th member or, with several heads, all of them.
    fn train(
        &self,
        ctx: &Context<'_>,
        name: &str,
        members: &Members,
        first: u32,
    ) -> anyhow::Result<(RewardModel, Ended)> {
        let s = self.s;
        // A member of its own begins with another head, meets other rows first and is adapted anew.
        let seed = ctx.recipe.run.seed.wrapping_add(u64::from(first));
        let net = ctx.reward_learner(&s.model, &s.memory, self.spec.outputs(), seed)?;
        let mut model = RewardModel::new(vec![net], &self.spec)?;
        let cfg = RewardConfig {
            objective: s.loss.clone(),
            seed,
            steps: s.steps,
            batch_size: s.batch_size,
            micro_tokens: s.micro_tokens,
            bootstrap: members.bootstrap,
            first_member: first,
        };
        let held_out = s.test_every.map(|every| HeldOut {
            data: &self.test.rows,
            every,
        });
        let mut stepper = ctx.stepper(model.parameters()?, &s.optim, &s.memory, s.steps);
        let mut session = ctx.session(name, s.steps)?;
        let flow = train::train(
            &model,
            &self.data.rows,
            &cfg,
            held_out.as_ref(),
            &mut stepper,
            &mut session,
        )?;
        let ended = ctx.finish(flow, session)?;
        if let (
            Objective::Regression {
                mix: Mix::Learned { ridge },
                ..
            },
            Some(data),
        ) = (&s.loss, &s.mix_data)
        {
            let pairs = ctx.inputs.mix_pairs(data)?;
            let mix = train::learn_mix(&model, &pairs.rows, *ridge, s.micro_tokens)?;
            model.set_mix(mix)?;
        }
        Ok((model, ended))
    }
}

/// Trains nets one after the other, each in a folder of its own, where a finished one is found again.
fn one_by_one(
    ctx: &Context<'_>,
    name: &str,
    lesson: &Lesson<'_>,
    members: &Members,
) -> anyhow::Result<(RewardModel, Ended)> {
    let mut all = Ended {
        steps: 0,
        tokens: 0,
        last: Default::default(),
    };
    let folder = |i: usize| format!("{name}/member-{i}");
    for i in 0..members.count {
        let (mut model, ended) = lesson.train(ctx, &folder(i), members, i as u32)?;
        model.save(&ctx.model_dir(&folder(i)))?;
        all.steps += ended.steps;
        all.tokens += ended.tokens;
        for (key, x) in ended.last {
            *all.last.entry(key).or_default() += x / members.count as f64;
        }
    }
    let models = (0..members.count)
        .map(|i| ctx.reward_model_in(&ctx.model_dir(&folder(i))))
        .collect::<anyhow::Result<_>>()?;
    Ok((RewardModel::ensemble(models, members.combine)?, all))
}
