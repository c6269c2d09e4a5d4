//! Rejection sampling: completions are drawn and scored, some are kept, and as many are drawn by lot beside.
//!
//! What was drawn lies in `drawn/`, a file for each part of the prompts, so that nothing is drawn twice.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use rlhf_data::conversation::{Message, Role, Text};
use rlhf_data::group::Finish;
use rlhf_data::record::{Annotated, SftRecord, Source, batch, schema_of};
use rlhf_data::source::{JsonlOut, ParquetOut};
use rlhf_policy::rejection::{BestOf, Pick, RewardMatrix};
use rlhf_policy::rollout::{self, Prompt, RolloutConfig, ScoredRollout};
use rlhf_reward::source::{Judged, RewardMix, RewardSource as _, Shaping};
use rlhf_train::Flow;
use serde::{Deserialize, Serialize};

use super::policy::rollout_config;
use super::{Context, Ended};
use crate::recipe::Rejection;
use rlhf::files::write_json;

/// What was drawn for a prompt.
#[derive(Debug, Serialize, Deserialize)]
struct Drawn {
    /// Row of the data.
    row: u64,
    texts: Vec<String>,
    rewards: Vec<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gold: Option<Vec<f64>>,
    lengths: Vec<usize>,
    stopped: Vec<bool>,
}

/// `best_of_n.json`.
#[derive(Debug, Serialize)]
struct Curves {
    /// Mean reward of the best of n by reward.
    reward: Vec<BestOf>,
    /// Mean gold score of the best of n by reward.
    #[serde(skip_serializing_if = "Option::is_none")]
    gold: Option<Vec<BestOf>>,
}

pub(super) fn run(ctx: &Context<'_>, name: &str, s: &Rejection) -> anyhow::Result<Ended> {
    let prompts = ctx.inputs.prompts(&s.data)?;
    let texts = ctx.inputs.prompt_texts(&s.data)?;
    let dir = ctx.dir.join(name);
    let folder = dir.join("drawn");
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    let chunks: Vec<&[Prompt]> = prompts.rows.chunks(s.prompts_at_once).collect();
    let mut session = ctx.session(name, chunks.len() as u64)?;
    let start = session
        .resume(&mut [])?
        .map_or(0, |r: rlhf_train::Restored<()>| r.step);
    let mut sampler = None;
    for step in start..chunks.len() as u64 {
        let part = chunks[step as usize];
        let file = folder.join(format!("{step:05}.jsonl"));
        if !file.exists() {
            if sampler.is_none() {
                sampler = Some(Drawer::new(ctx, s)?);
            }
            if let Some(d) = &sampler {
                keep(&file, &d.draw(part)?)?;
            }
        }
        let drawn = read(&file)?;
        let (tokens, metrics) = facts(&drawn);
        session.log(step, tokens, &metrics)?;
        let flow = session.after_step(step, &[], &())?;
        if flow != Flow::Continue {
            return ctx.finish(flow, session);
        }
    }
    let mut drawn = Vec::with_capacity(prompts.rows.len());
    for step in 0..chunks.len() {
        drawn.extend(read(&folder.join(format!("{step:05}.jsonl")))?);
    }
    let mut ended = ctx.finish(Flow::Continue, session)?;
    ended.last = finish(ctx, name, s, &drawn, &texts)?;
    Ok(ended)
}

/// Who draws and scores.
struct Drawer<'a> {
    ctx: &'a Context<'a>,
    recipe: &'a Rejection,
    policy: rlhf_model::Transformer,
    rewards: RewardMix,
    cfg: RolloutConfig,
}

impl<'a> Drawer<'a> {
    fn new(ctx: &'a Context<'a>, s: &'a Rejection) -> anyhow::Result<Self> {
        Ok(Self {
            ctx,
            recipe: s,
            policy: ctx.policy(&s.model)?,
            rewards: ctx.rewards(
                &s.reward,
                s.missing_eos_penalty,
                Shaping::default(),
                s.micro_tokens,
            )?,
            cfg: rollout_config(ctx.recipe.run.seed, &s.sampling, 1, s.samples),
        })
    }

    /// The noise is keyed by the rows: how prompts are parted does not matter.
    fn draw(&self, part: &[Prompt]) -> anyhow::Result<Vec<Drawn>> {
        let all: Vec<usize> = (0..part.len()).collect();
        let sampler = self.cfg.local(&self.policy)?;
        let tokenizer = self.ctx.tokenizer()?;
        let rollouts = rollout::draw(&sampler, tokenizer, part, &all, &self.cfg, 0)
            .context("drawing completions")?;
        let (scored, _) = rollout::score(rollouts, part, &self.rewards)?;
        let gold = match &self.recipe.judge {
            Some(rule) => {
                let items: Vec<Judged<'_>> = scored
                    .iter()
                    .map(|s| Judged {
                        group: &s.rollout.group,
                        prompt: &part[s.rollout.prompt].text,
                        texts: &s.rollout.texts,
                        fields: &part[s.rollout.prompt].fields,
                    })
                    .collect();
                rule.scores(&items)?.into_iter().map(Some).collect()
            }
            None => vec![None; scored.len()],
        };
        let of = |(s, gold): (ScoredRollout, Option<Vec<f64>>)| Drawn {
            row: s.rollout.group.row,
            lengths: s
                .rollout
                .group
                .completions
                .iter()
                .map(|c| c.ids.len())
                .collect(),
            stopped: s
                .rollout
                .group
                .completions
                .iter()
                .map(|c| c.finish == Finish::Stop)
                .collect(),
            texts: s.rollout.texts,
            rewards: s.rewards,
            gold,
        };
        Ok(scored.into_iter().zip(gold).map(of).collect())
    }
}

fn keep(file: &Path, drawn: &[Drawn]) -> anyhow::Result<()> {
    let mut out = JsonlOut::create(file)?;
    for d in drawn {
        out.write(d)?;
    }
    Ok(out.finish()?)
}

fn read(file: &Path) -> anyhow::Result<Vec<Drawn>> {
    let place = || format!("reading {}", file.display());
    let text = std::fs::read_to_string(file).with_context(place)?;
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(place))
        .collect()
}

fn facts(drawn: &[Drawn]) -> (usize, [(&'static str, f64); 4]) {
    let n = drawn.iter().map(|d| d.rewards.len()).sum::<usize>().max(1) as f64;
    let tokens: usize = drawn.iter().flat_map(|d| &d.lengths).sum();
    let best = |d: &Drawn| d.rewards.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let stopped = drawn
        .iter()
        .flat_map(|d| &d.stopped)
        .filter(|s| **s)
        .count();
    let metrics = [
        (
            "reward",
            drawn.iter().flat_map(|d| &d.rewards).sum::<f64>() / n,
        ),
        (
            "reward_best",
            drawn.iter().map(best).sum::<f64>() / drawn.len().max(1) as f64,
        ),
        ("length", tokens as f64 / n),
        ("stopped", stopped as f64 / n),
    ];
    (tokens, metrics)
}

/// Selects, draws the control, writes both with the curves, and gives the stage's numbers.
fn finish(
    ctx: &Context<'_>,
    name: &str,
    s: &Rejection,
    drawn: &[Drawn],
    texts: &BTreeMap<u64, Text>,
) -> anyhow::Result<BTreeMap<String, f64>> {
    let dir = ctx.dir.join(name);
    let matrix = RewardMatrix::new(drawn.iter().map(|d| d.rewards.clone()).collect())?;
    let gold: Option<Vec<Vec<f64>>> = drawn.iter().map(|d| d.gold.clone()).collect();
    let gold = gold.map(RewardMatrix::new).transpose()?;
    let selected = matrix.select(s.select)?;
    let control = matrix.control(&selected, s.control, ctx.recipe.run.seed)?;
    for (file, picks) in [("selected", &selected), ("control", &control)] {
        let rows = rows(ctx, s, drawn, texts, picks)?;
        write_rows(&dir.join(format!("{file}.parquet")), &rows)?;
    }
    let curves = Curves {
        reward: matrix.curve(None)?,
        gold: gold.as_ref().map(|g| matrix.curve(Some(g))).transpose()?,
    };
    write_json(&dir.join("best_of_n.json"), &curves)?;
    ctx.say(&table(&curves));
    let mean = |x: &mut dyn Iterator<Item = f64>, n: usize| x.sum::<f64>() / n.max(1) as f64;
    let of = |picks: &[Pick]| mean(&mut picks.iter().map(|p| p.reward), picks.len());
    let mut last = BTreeMap::from([
        ("reward".to_owned(), curves.reward[0].mean),
        ("selected".to_owned(), selected.len() as f64),
        ("selected_reward".to_owned(), of(&selected)),
        ("control_reward".to_owned(), of(&control)),
    ]);
    if let Some(g) = &gold {
        let of = |picks: &[Pick]| {
            let scores = picks.iter().map(|p| g.rewards()[p.prompt][p.sample]);
            mean(&mut scores.into_iter(), picks.len())
        };
        last.insert("selected_gold".into(), of(&selected));
        last.insert("control_gold".into(), of(&control));
    }
    Ok(last)
}

/// Best-of-n at powers of two.
fn table(curves: &Curves) -> String {
    let mut out = "      best of n, KL in nats, reward ± standard error".to_owned();
    if curves.gold.is_some() {
        out += ", gold";
    }
    for (i, p) in curves.reward.iter().enumerate() {
        if !p.n.is_power_of_two() && p.n != curves.reward.len() {
            continue;
        }
        out += &format!(
            "\n      {:>4}  {:.3}  {:.3} ±{:.3}",
            p.n, p.kl, p.mean, p.standard_error
        );
        if let Some(g) = &curves.gold {
            out += &format!("  {:.3} ±{:.3}", g[i].mean, g[i].standard_error);
        }
    }
    out
}

/// Picks as demonstrations with their provenance. Blank completions teach nothing and are left out.
fn rows(
    ctx: &Context<'_>,
    s: &Rejection,
    drawn: &[Drawn],
    texts: &BTreeMap<u64, Text>,
    picks: &[Pick],
) -> anyhow::Result<Vec<Annotated<SftRecord>>> {
    let sampler = |d: &Drawn| {
        let mut m = serde_json::Map::new();
        m.insert("temperature".into(), s.sampling.temperature.into());
        m.insert("max_new_tokens".into(), s.sampling.max_new_tokens.into());
        m.insert("samples".into(), d.texts.len().into());
        m.insert("seed".into(), ctx.recipe.run.seed.into());
        m
    };
    let version = ctx.policy_version(&s.model);
    let mut out = Vec::with_capacity(picks.len());
    for p in picks {
        let d = &drawn[p.prompt];
        let text = &d.texts[p.sample];
        if text.trim().is_empty() {
            continue;
        }
        let prompt = texts
            .get(&d.row)
            .with_context(|| format!("row {} of the prompts is gone", d.row))?;
        let completion = match prompt {
            Text::Plain(_) => Text::Plain(text.clone()),
            Text::Messages(_) => Text::Messages(vec![Message::new(Role::Assistant, text.clone())]),
        };
        let mut other = serde_json::Map::new();
        other.insert("row".into(), d.row.into());
        other.insert("sample".into(), p.sample.into());
        other.insert("score".into(), p.reward.into());
        if let Some(g) = &d.gold {
            other.insert("gold".into(), g[p.sample].into());
        }
        out.push(Annotated {
            record: SftRecord {
                prompt: Some(prompt.clone()),
                completion,
            },
            weight: None,
            source: Some(Source {
                dataset: Some(s.data.path.clone()),
                model: Some(s.model.clone()),
                policy_version: version,
                sampler: Some(sampler(d)),
                other: Some(other),
                ..Source::default()
            }),
        });
    }
    anyhow::ensure!(!out.is_empty(), "every completion that was kept is blank");
    Ok(out)
}

/// Writes rows of one form as Parquet.
pub(super) fn write_rows<R: rlhf_data::record::Record>(
    file: &Path,
    rows: &[R],
) -> anyhow::Result<()> {
    let Some(first) = rows.first() else {
        anyhow::bail!("no rows for {}", file.display());
    };
    let schema = schema_of(first);
    let mut out = ParquetOut::create(file, schema.clone())?;
    for part in rows.chunks(1024) {
        out.write(&batch(&schema, part)?)?;
    }
    Ok(out.finish()?)
}
