//! The evaluation stage: every model on the same held-out prompts and pairs.

use std::collections::BTreeMap;

use rlhf_data::text_stats::distinct_n;
use rlhf_data::tokenize::ChatTokenizer;
use rlhf_dpo::train::{PairSums, evaluate, pair_sums};
use rlhf_reward::source::RewardSource;
use rlhf_reward::train::pair_scores;
use rlhf_reward::verify::{PoolConfig, VerifierSource};

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

    let verifier = match &s.verifier {
        Some(check) => Some(VerifierSource::new(check.build()?, PoolConfig::default())?),
        None => None,
    };
    let gold = match (&s.judge, &verifier) {
        (Some(rule), _) => Some(rule as &dyn RewardSource),
        (None, Some(verifier)) => Some(verifier as &dyn RewardSource),
        (None, None) => None,
    };

    let base_sums = match &s.pairs {
        Some(data) => {
            let pairs = ctx.inputs.preference(data)?;
            Some((pair_sums(&baseline, &pairs.rows, s.micro_tokens)?, pairs))
        }
        None => None,
    };
    let mut written: Vec<(String, Written)> = Vec::new();
    for model_name in &s.models {
        let model = ctx.policy(model_name)?;
        let mut measures = BTreeMap::new();
        if let (Some(data), Some(sampling)) = (&s.prompts, &s.sampling) {
            let prompts = ctx.inputs.prompts(data)?;
            // A seed of its own: the noise of training must not be met again.
            let cfg = rollout_config(ctx.recipe.run.seed ^ 0x6576_616c, sampling, 1, 1);
            let judges = Judges {
                tokenizer: ctx.tokenizer()?,
                baseline: &baseline,
                gold,
                reward: reward.as_ref().map(|r| r as &dyn RewardSource),
                micro_tokens: s.micro_tokens,
            };
            let w = write(&model, &prompts.rows, &cfg, judges)?;
            measure(&w, ctx.recipe.run.seed, &mut measures);
            if s.min_distinct_words.is_some() {
                let shares: Vec<f64> = w.texts().iter().map(|t| distinct(&[t], 1)).collect();
                measures.insert("distinct_words".into(), mean(&shares));
            }
            written.push((model_name.clone(), w));
        }
        if let Some((base, pairs)) = &base_sums {
            if model_name == &s.baseline {
                compare_pairs(base, None, &mut measures);
            } else {
                let own = pair_sums(&model, &pairs.rows, s.micro_tokens)?;
                compare_pairs(&own, Some(base), &mut measures);
            }
        }
        found.models.push(ModelRow {
            name: model_name.clone(),
            measures,
        });
    }
    win_rates(&s.baseline, &written, &mut found.models);
    if let (Some(name), Some(data)) = (&s.reward_model, &s.pairs) {
        let pairs = ctx.inputs.preference(data)?;
        let model = ctx.reward_model(name)?;
        let scores = pair_scores(&model, &pairs.rows, s.micro_tokens)?;
        let right: f64 = scores.iter().map(|(c, r)| prefers(*c, *r)).sum();
        found.reward_model_accuracy = Some(share(right, scores.len()));
        // The norm divides scores; log-odds are in the units of the loss.
        let std = model.unit();
        found.reward_margins = scores.iter().map(|(c, r)| (c - r) * std).collect();
    }
    found.checks = checks(ctx, s, &found);
    if let Some(data) = &s.prompts {
        let prompts = ctx.inputs.prompts(data)?;
        found.samples = samples(ctx.tokenizer()?, &prompts.rows, &written, s.samples);
    }
    write_json(&ctx.dir.join(name).join("eval.json"), &found)?;
    ctx.say(&terminal::evaluation(&found));
    let mut last = BTreeMap::new();
    for row in &found.models {
        for key in ["gold", "win_rate", "kl", "likelier", "pair_accuracy"] {
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

fn measure(w: &Written, seed: u64, into: &mut BTreeMap<String, Interval>) {
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
        // A judge that says right or wrong gives a share.
        let decided = gold.iter().all(|g| *g == 0.0 || *g == 1.0);
        put(
            "gold",
            if decided {
                share(gold.iter().sum(), gold.len())
            } else {
                mean(gold)
            },
        );
    }
}

/// How often the gold judge prefers each model's reply to the baseline's.
fn win_rates(baseline: &str, written: &[(String, Written)], rows: &mut [ModelRow]) {
    let gold = |name: &str| {
        let of = written.iter().find(|w| w.0 == name)?;
        of.1.gold.as_deref()
    };
    let Some(base) = gold(baseline) else { return };
    for row in rows.iter_mut().filter(|r| r.name != baseline) {
        if let Some(own) = gold(&row.name) {
            let wins: f64 = own.iter().zip(base).map(|(a, b)| prefers(*a, *b)).sum();
            row.measures
                .insert("win_rate".into(), share(wins, own.len()));
        }
    }
}

/// What the sums of pairs say: of a model alone, and against its baseline.
fn compare_pairs(
    own: &PairSums,
    baseline: Option<&PairSums>,
    into: &mut BTreeMap<String, Interval>,
) {
    let e = evaluate(own, baseline.unwrap_or(own));
    let of_all = |share_of: f64| share(share_of * own.len() as f64, own.len());
    into.insert("likelier".into(), of_all(e.logprob_accuracy));
    // Against itself a model has no implicit reward.
    let Some(base) = baseline else { return };
    into.insert("pair_accuracy".into(), of_all(e.accuracy));
    let margins: Vec<f64> = own
        .iter()
        .zip(base)
        .map(|((pc, pr), (rc, rr))| (pc - rc) - (pr - rr))
        .collect();
    into.insert("margin".into(), mean(&margins));
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
        if let (Some(min), Some(own)) = (s.min_distinct_words, row.measures.get("distinct_words")) {
            checks.push(Check {
                what: format!(
                    "at least {:.0} % of {}'s words differ",
                    min * 100.0,
                    row.name
                ),
                found: format!("{:.1} % of a completion's", own.value * 100.0),
                ok: own.value >= min,
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
            StageKind::Unpaired(s) => Some(s.data.path.clone()),
            StageKind::Ranked(s) => Some(s.data.path.clone()),
            StageKind::OnlineDpo(s) => Some(s.rollouts.data.path.clone()),
            StageKind::Grpo(s) => Some(s.rollouts.data.path.clone()),
            StageKind::Ppo(s) => Some(s.rollouts.data.path.clone()),
            StageKind::Opd(s) => Some(s.rollouts.data.path.clone()),
            StageKind::Rejection(s) => Some(s.data.path.clone()),
            StageKind::SelfInstruct(s) => Some(s.data.path.clone()),
            StageKind::Critique(s) => Some(s.data.path.clone()),
            StageKind::Control(_) | StageKind::Eval(_) => None,
        })
        .collect()
}

fn samples(
    tokenizer: &ChatTokenizer,
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
                    let pieces = tokenizer.pieces(&w.rollouts[i].group.completions[0].ids);
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
