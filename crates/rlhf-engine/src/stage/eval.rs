//! The evaluation stage: every model on the same held-out prompts and pairs.

use std::collections::BTreeMap;

use rlhf_data::text_stats::distinct_n;
use rlhf_dpo::train::{evaluate, pair_sums};
use rlhf_model::Transformer;
use rlhf_reward::source::RewardSource;
use rlhf_reward::train::pair_scores;

use super::measure::{Judges, Written, write};
use super::policy::rollout_config;
use super::{Context, Ended};
use crate::recipe::{Eval, StageKind};
use rlhf::files::write_json;
use rlhf::interval::{Interval, bootstrap, mean, share};
use rlhf::results::{Answer, Check, Evaluation, ModelRow, Sample, Token};
use rlhf::terminal;

/// Resamples for the intervals of distinct-n.
const ROUNDS: u32 = 200;

pub(super) fn run(ctx: &Context<'_>, name: &str, s: &Eval) -> anyhow::Result<Ended> {
    let baseline = ctx.policy(&s.baseline)?;
    let mut found = Evaluation {
        baseline: s.baseline.clone(),
        ..Evaluation::default()
    };
    let reward = s
        .reward_model
        .as_ref()
        .map(|r| ctx.reward_source(r, s.micro_tokens))
        .transpose()?;

    let mut written: Vec<(String, Written)> = Vec::new();
    for model_name in &s.models {
        let model = ctx.policy(model_name)?;
        let mut measures = BTreeMap::new();
        if let (Some(data), Some(sampling)) = (&s.prompts, &s.sampling) {
            let prompts = ctx.inputs.prompts(data)?;
            // A seed of its own: the noise of training must not be met again.
            let cfg = rollout_config(ctx.recipe.run.seed ^ 0x6576_616c, sampling, 1, 1);
            let judges = Judges {
                tokenizer: ctx.tokenizer(),
                baseline: &baseline,
                gold: s.judge.as_ref(),
                reward: reward.as_ref().map(|r| r as &dyn RewardSource),
                micro_tokens: s.micro_tokens,
            };
            let w = write(&model, &prompts.rows, &cfg, judges)?;
            measure(
                &w,
                written.iter().find(|x| x.0 == s.baseline).map(|x| &x.1),
                ctx.recipe.run.seed,
                &mut measures,
            );
            written.push((model_name.clone(), w));
        }
        if s.pairs.is_some() {
            pairs(ctx, s, model_name, &model, &baseline, &mut measures)?;
        }
        found.models.push(ModelRow {
            name: model_name.clone(),
            measures,
        });
    }
    if let (Some(name), Some(data)) = (&s.reward_model, &s.pairs) {
        let pairs = ctx.inputs.preference(data)?;
        let scores = pair_scores(&ctx.scalar(name)?, &pairs.rows, s.micro_tokens)?;
        let right: f64 = scores.iter().map(|(c, r)| prefers(*c, *r)).sum();
        found.reward_model_accuracy = Some(share(right, scores.len()));
        // The norm divides scores; log-odds are in the units of the loss.
        let std = ctx.scalar(name)?.norm().std;
        found.reward_margins = scores.iter().map(|(c, r)| (c - r) * std).collect();
    }
    found.checks = checks(ctx, s, &found);
    if let Some(data) = &s.prompts {
        let prompts = ctx.inputs.prompts(data)?;
        found.samples = samples(ctx, &prompts.rows, &written, s.samples);
    }
    write_json(&ctx.dir.join(name).join("eval.json"), &found)?;
    ctx.say(&terminal::evaluation(&found));
    let mut last = BTreeMap::new();
    for row in &found.models {
        for key in ["gold", "win_rate", "kl", "pair_accuracy"] {
            if let Some(i) = row.measures.get(key) {
                last.insert(format!("{}_{key}", row.name), i.value);
            }
        }
    }
    Ok(Ended {
        steps: 0,
        tokens: 0,
        last,
    })
}

/// Distinct n-grams as a share of all n-grams of all texts.
fn distinct(texts: &[&&str], n: usize) -> f64 {
    distinct_n(&texts.iter().map(|t| **t).collect::<Vec<&str>>(), n)
}

fn prefers(a: f64, b: f64) -> f64 {
    if a > b {
        1.0
    } else if a == b {
        0.5
    } else {
        0.0
    }
}

fn measure(
    w: &Written,
    baseline: Option<&Written>,
    seed: u64,
    into: &mut BTreeMap<String, Interval>,
) {
    let mut put = |key: &str, i: Interval| {
        into.insert(key.into(), i);
    };
    put("kl", mean(&w.kl()));
    put("length", mean(&w.lengths()));
    let stopped = w.stopped();
    put("stopped", share(stopped.iter().sum(), stopped.len()));
    for n in [1, 2] {
        put(
            &format!("distinct{n}"),
            bootstrap(&w.texts(), ROUNDS, seed, |t| distinct(t, n)),
        );
    }
    if let Some(r) = &w.reward {
        put("reward", mean(r));
    }
    if let Some(gold) = &w.gold {
        put("gold", mean(gold));
        if let Some(base) = baseline.and_then(|b| b.gold.as_ref()) {
            let wins: f64 = gold.iter().zip(base).map(|(a, b)| prefers(*a, *b)).sum();
            put("win_rate", share(wins, gold.len()));
        }
    }
}

fn pairs(
    ctx: &Context<'_>,
    s: &Eval,
    name: &str,
    model: &Transformer,
    baseline: &Transformer,
    into: &mut BTreeMap<String, Interval>,
) -> anyhow::Result<()> {
    let Some(data) = &s.pairs else { return Ok(()) };
    let pairs = ctx.inputs.preference(data)?;
    let own = pair_sums(model, &pairs.rows, s.micro_tokens)?;
    let base = pair_sums(baseline, &pairs.rows, s.micro_tokens)?;
    // Against itself a model has no implicit reward: its log-probs alone decide.
    let is_baseline = name == s.baseline;
    let e = evaluate(&own, &base, 1.0);
    let accuracy = if is_baseline {
        e.logprob_accuracy
    } else {
        e.accuracy
    };
    into.insert(
        "pair_accuracy".into(),
        share(accuracy * own.len() as f64, own.len()),
    );
    let margins: Vec<f64> = own
        .iter()
        .zip(&base)
        .map(|((pc, pr), (rc, rr))| {
            if is_baseline {
                pc - pr
            } else {
                (pc - rc) - (pr - rr)
            }
        })
        .collect();
    into.insert("margin".into(), mean(&margins));
    Ok(())
}

/// What the recipe promises, with the numbers.
fn checks(ctx: &Context<'_>, s: &Eval, found: &Evaluation) -> Vec<Check> {
    let mut checks = Vec::new();
    let base = found.models.iter().find(|m| m.name == s.baseline);
    for row in found.models.iter().filter(|m| m.name != s.baseline) {
        let both = |key: &str| Some((row.measures.get(key)?, base?.measures.get(key)?));
        if let Some((own, base)) = both("gold") {
            checks.push(Check {
                what: format!(
                    "{} has a higher gold score than {}, intervals apart",
                    row.name, s.baseline
                ),
                found: format!(
                    "{:.3} [{:.3}, {:.3}] against {:.3} [{:.3}, {:.3}]",
                    own.value, own.low, own.high, base.value, base.low, base.high
                ),
                ok: own.low > base.high,
            });
        }
        if let (Some(max), Some(kl)) = (s.max_kl, row.measures.get("kl")) {
            checks.push(Check {
                what: format!("{} stays within {max} nats of {}", row.name, s.baseline),
                found: format!("{:.2} nats a completion", kl.value),
                ok: kl.value <= max,
            });
        }
        if let (Some(min), Some((own, base))) = (s.min_distinct2, both("distinct2")) {
            checks.push(Check {
                what: format!(
                    "{} keeps at least {:.0} % of {}'s distinct-2",
                    row.name,
                    min * 100.0,
                    s.baseline
                ),
                found: format!(
                    "{:.3} against {:.3}: {:.0} %",
                    own.value,
                    base.value,
                    100.0 * own.value / base.value
                ),
                ok: own.value >= min * base.value,
            });
        }
    }
    if let Some(Ok(test)) = s.prompts.as_ref().map(|d| ctx.inputs.prompts(d)) {
        let seen = ctx.inputs.seen_prompts(&training_files(ctx));
        let met = test.rows.iter().filter(|p| seen.contains(&p.ids)).count();
        checks.push(Check {
            what: "no test prompt was seen in training".into(),
            found: format!(
                "{met} of {} test prompts among {} training prompts",
                test.rows.len(),
                seen.len()
            ),
            ok: met == 0,
        });
    }
    checks
}

fn training_files(ctx: &Context<'_>) -> Vec<String> {
    ctx.recipe
        .stages
        .iter()
        .filter_map(|stage| match &stage.kind {
            StageKind::Sft(s) => Some(s.data.path.clone()),
            StageKind::Reward(s) => Some(s.data.path.clone()),
            StageKind::Dpo(s) => Some(s.data.path.clone()),
            StageKind::Grpo(s) => Some(s.rollouts.data.path.clone()),
            StageKind::Ppo(s) => Some(s.rollouts.data.path.clone()),
            StageKind::Eval(_) => None,
        })
        .collect()
}

fn samples(
    ctx: &Context<'_>,
    prompts: &[rlhf_policy::rollout::Prompt],
    written: &[(String, Written)],
    n: usize,
) -> Vec<Sample> {
    // Spread over the file: neighbouring rows may be alike.
    let stride = (prompts.len() / n.max(1)).max(1);
    (0..prompts.len())
        .step_by(stride)
        .take(n)
        .map(|i| Sample {
            prompt: prompts[i].text.clone(),
            answers: written
                .iter()
                .map(|(model, w)| {
                    let pieces = ctx
                        .tokenizer()
                        .pieces(&w.rollouts[i].group.completions[0].ids);
                    let tokens = pieces
                        .into_iter()
                        .zip(&w.logprobs[i])
                        .zip(&w.baseline_logprobs[i]);
                    Answer {
                        model: model.clone(),
                        tokens: tokens
                            .map(|((text, &logprob), &baseline)| Token {
                                text,
                                logprob,
                                baseline,
                            })
                            .collect(),
                        gold: w.gold.as_ref().map(|g| g[i]),
                        reward: w.reward.as_ref().map(|r| r[i]),
                    }
                })
                .collect(),
        })
        .collect()
}
