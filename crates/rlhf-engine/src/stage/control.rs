//! The stage that learns control. Its model is a small network of its own, not a language model.

use std::collections::BTreeMap;

use anyhow::Context as _;
use rlhf_policy::control::preferences::{self, predictors};
use rlhf_policy::control::{Act, Agent, Environment as _, Mlp, evaluate, train};

use super::{Context, Ended, stepper_config};
use crate::recipe::{Control, Optim};
use rlhf::files::write_json;
use rlhf::interval::mean;
use rlhf::results::{Check, Evaluation, ModelRow};
use rlhf::terminal;

/// What the policy was before it learned, in the evaluation.
const BEFORE: &str = "untrained";

pub(super) fn run(ctx: &Context<'_>, name: &str, s: &Control) -> anyhow::Result<Ended> {
    // These networks are too small to share among threads, and one thread adds up in one order anywhere.
    let threads = tch::get_num_threads();
    tch::set_num_threads(1);
    let ended = learn(ctx, name, s);
    tch::set_num_threads(threads);
    ended
}

fn learn(ctx: &Context<'_>, name: &str, s: &Control) -> anyhow::Result<Ended> {
    let (seed, environment) = (ctx.recipe.run.seed, &s.environment);
    let cfg = s.config(seed);
    let optim = |o: &Optim, updates: u64| (o.adamw(), stepper_config(o, updates));
    let own = optim(&s.optim, s.steps * s.algorithm.updates());
    let value_lr = s.value_lr.unwrap_or(s.optim.lr);
    let mut agent = Agent::new(environment, &s.hidden, &cfg, own, value_lr)?;
    // Before a checkpoint is loaded into it.
    let before = returns(s, &agent.policy.network, seed)?;
    let mut session = ctx.session(name, s.steps)?;
    let flow = match (&s.preferences, &s.predictor) {
        (Some(p), Some(predictor)) => {
            let optim = optim(&predictor.optim, s.steps * u64::from(p.updates));
            let mut members = predictors(environment, &predictor.hidden, p, seed, optim)?;
            let settings = (&cfg, p);
            preferences::train(
                environment,
                &mut agent,
                &mut members,
                settings,
                &mut session,
            )?
        }
        _ => train(environment, &mut agent, &cfg, &mut session)?,
    };
    let mut ended = ctx.finish(flow, session)?;
    save(ctx, name, s, &agent)?;

    let after = returns(s, &agent.policy.network, seed)?;
    let found = evaluation(name, s, &before, &after);
    write_json(&ctx.dir.join(name).join("eval.json"), &found)?;
    ctx.say(&terminal::evaluation(&found));
    let summary = [
        ("test_return", mean(&after)),
        ("untrained_return", mean(&before)),
    ];
    ended
        .last
        .extend(summary.map(|(key, i)| (key.to_owned(), i.value)));
    Ok(ended)
}

fn returns(s: &Control, policy: &Mlp, seed: u64) -> rlhf_policy::Result<Vec<f64>> {
    evaluate(&s.environment, policy, Act::Sampled, seed, s.episodes)
}

fn evaluation(name: &str, s: &Control, before: &[f64], after: &[f64]) -> Evaluation {
    let row = |name: &str, returns: &[f64]| ModelRow {
        name: name.into(),
        measures: BTreeMap::from([("return".into(), mean(returns))]),
    };
    let own = mean(after);
    let check = |goal: f64| Check {
        what: format!(
            "{name} has a mean return of at least {goal} over {} episodes",
            own.n
        ),
        found: format!("{:.1} [{:.1}, {:.1}]", own.value, own.low, own.high),
        ok: own.value >= goal,
    };
    Evaluation {
        baseline: BEFORE.into(),
        models: vec![row(BEFORE, before), row(name, after)],
        checks: s.goal.map(check).into_iter().collect(),
        ..Evaluation::default()
    }
}

/// The networks as safetensors, and what they are of.
fn save(ctx: &Context<'_>, name: &str, s: &Control, agent: &Agent) -> anyhow::Result<()> {
    let dir = ctx.dir.join(name).join("model");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    agent.policy.network.save(&dir.join("model.safetensors"))?;
    if let Some(value) = &agent.value {
        value.network.save(&dir.join("value.safetensors"))?;
    }
    let config = serde_json::json!({
        "environment": s.environment,
        "inputs": s.environment.observation_size(),
        "hidden": s.hidden,
        "outputs": s.environment.actions(),
        "activation": "tanh",
    });
    write_json(&dir.join("config.json"), &config)
}
