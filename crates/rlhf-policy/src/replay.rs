//! Rollouts on disk: a run records what it learned from, step by step, and another learns from it again.
//!
//! Invariant: what is read is what was written, bit by bit: tokens, trained ranges, the sampler's log-probabilities,
//! rewards, the version of the policy that drew. A step's file appears whole or not at all.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::builder::{Float32Builder, Float64Builder, ListBuilder, UInt32Builder};
use arrow_array::{ArrayRef, Float64Array, RecordBatch, StringArray, UInt64Array};
use arrow_schema::{Field, Schema};
use rlhf_data::group::{Completion, Finish, PromptGroup, SamplerRecord};
use rlhf_data::source::{self, ParquetOut};
use rlhf_data::tokenize::ChatTokenizer;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::collect::{Facts, Harvest};
use crate::error::{Error, Result};
use crate::rollout::{Prompt, Rollout, ScoredRollout, StepRewards};

/// A group as it is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Kept {
    prompt: u64,
    row: u64,
    prompt_ids: Vec<u32>,
    completions: Vec<KeptCompletion>,
    #[serde(default)]
    earned: Vec<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct KeptCompletion {
    ids: Vec<u32>,
    trained: Vec<std::ops::Range<usize>>,
    finish: Finish,
    /// In f64, which holds each f32 exactly and goes through JSON bit by bit.
    logprobs: Option<Vec<f64>>,
    version: u64,
}

impl Kept {
    pub(crate) fn of(rollout: &Rollout) -> Self {
        let completion = |c: &Completion| KeptCompletion {
            ids: c.ids.clone(),
            trained: c.trained.clone(),
            finish: c.finish,
            logprobs: c
                .sampler
                .as_ref()
                .map(|s| s.logprobs.iter().map(|x| f64::from(*x)).collect()),
            version: c.sampler.as_ref().map_or(0, |s| s.policy_version),
        };
        Self {
            prompt: rollout.prompt as u64,
            row: rollout.group.row,
            prompt_ids: rollout.group.prompt.clone(),
            completions: rollout.group.completions.iter().map(completion).collect(),
            earned: rollout.earned.clone(),
        }
    }

    pub(crate) fn rollout(self, tokenizer: &ChatTokenizer) -> Result<Rollout> {
        let completion = |c: KeptCompletion| Completion {
            ids: c.ids,
            trained: c.trained,
            finish: c.finish,
            sampler: c.logprobs.map(|l| SamplerRecord {
                logprobs: l.into_iter().map(|x| x as f32).collect(),
                policy_version: c.version,
                top: Vec::new(),
            }),
        };
        let group = PromptGroup {
            row: self.row,
            prompt: self.prompt_ids,
            completions: self.completions.into_iter().map(completion).collect(),
        };
        group.validate()?;
        let texts = group
            .completions
            .iter()
            .map(|c| tokenizer.decode(&c.ids, true))
            .collect::<rlhf_data::Result<_>>()?;
        Ok(Rollout {
            prompt: self.prompt as usize,
            group,
            texts,
            earned: self.earned,
        })
    }
}

/// The file of a step.
fn file(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("step-{step:08}.parquet"))
}

/// Writes what a step learned from to `dir`.
///
/// # Errors
/// When the file cannot be written.
pub fn record(dir: &Path, harvest: &Harvest) -> Result<()> {
    std::fs::create_dir_all(dir)
        .map_err(|e| bad(dir, &e, "make room, or choose another folder"))?;
    let path = file(dir, harvest.step);
    let (schema, batch) = table(harvest).map_err(|e| bad(&path, &e, "this is a mistake here"))?;
    let mut out = ParquetOut::create(&path, schema)?;
    out.write(&batch)?;
    out.finish()?;
    Ok(())
}

fn table(
    harvest: &Harvest,
) -> std::result::Result<(Arc<Schema>, RecordBatch), arrow_schema::ArrowError> {
    let (mut step, mut prompt, mut row, mut version, mut group) =
        (vec![], vec![], vec![], vec![], vec![]);
    let (mut finish, mut reward, mut greedy, mut facts) = (vec![], vec![], vec![], vec![]);
    let mut prompt_ids = ListBuilder::new(UInt32Builder::new());
    let mut ids = ListBuilder::new(UInt32Builder::new());
    let mut trained = ListBuilder::new(UInt32Builder::new());
    let mut logprobs = ListBuilder::new(Float32Builder::new());
    let mut places = ListBuilder::new(UInt32Builder::new());
    let mut steps = ListBuilder::new(Float64Builder::new());
    for (g, s) in harvest.scored.iter().enumerate() {
        for (i, c) in s.rollout.group.completions.iter().enumerate() {
            step.push(harvest.step);
            group.push(g as u64);
            prompt.push(s.rollout.prompt as u64);
            row.push(s.rollout.group.row);
            version.push(c.sampler.as_ref().map_or(0, |s| s.policy_version));
            finish.push(match c.finish {
                Finish::Stop => "stop",
                Finish::Length => "length",
                Finish::Cut => "cut",
            });
            reward.push((!s.rewards[i].is_nan()).then_some(s.rewards[i]));
            greedy.push(harvest.greedy.as_ref().map(|g2| g2[g]));
            let first = facts.is_empty();
            facts.push(first.then(|| serde_json::to_string(&harvest.facts).unwrap_or_default()));
            prompt_ids.append_value(s.rollout.group.prompt.iter().copied().map(Some));
            ids.append_value(c.ids.iter().copied().map(Some));
            let bounds = c.trained.iter().flat_map(|r| [r.start, r.end]);
            trained.append_value(bounds.map(|b| Some(b as u32)));
            logprobs.append_option(
                c.sampler
                    .as_ref()
                    .map(|s| s.logprobs.iter().copied().map(Some)),
            );
            let own = s.steps.get(i).map_or(&[][..], Vec::as_slice);
            places.append_value(own.iter().map(|s| Some(s.0 as u32)));
            steps.append_value(own.iter().map(|s| Some(s.1)));
        }
    }
    let list = |a: &dyn arrow_array::Array| a.data_type().clone();
    let columns: Vec<(&str, ArrayRef, bool)> = vec![
        ("step", Arc::new(UInt64Array::from(step)), false),
        ("group", Arc::new(UInt64Array::from(group)), false),
        ("prompt", Arc::new(UInt64Array::from(prompt)), false),
        ("row", Arc::new(UInt64Array::from(row)), false),
        (
            "policy_version",
            Arc::new(UInt64Array::from(version)),
            false,
        ),
        ("prompt_ids", Arc::new(prompt_ids.finish()), false),
        ("ids", Arc::new(ids.finish()), false),
        ("trained", Arc::new(trained.finish()), false),
        ("finish", Arc::new(StringArray::from(finish)), false),
        ("logprobs", Arc::new(logprobs.finish()), true),
        ("reward", Arc::new(Float64Array::from(reward)), true),
        ("step_places", Arc::new(places.finish()), false),
        ("step_rewards", Arc::new(steps.finish()), false),
        ("greedy_reward", Arc::new(Float64Array::from(greedy)), true),
        ("facts", Arc::new(StringArray::from(facts)), true),
    ];
    let fields: Vec<Field> = columns
        .iter()
        .map(|(name, array, nullable)| Field::new(*name, list(array.as_ref()), *nullable))
        .collect();
    let schema = Arc::new(Schema::new(fields));
    let arrays = columns.into_iter().map(|c| c.1).collect();
    Ok((schema.clone(), RecordBatch::try_new(schema, arrays)?))
}

fn bad(path: &Path, what: &dyn std::fmt::Display, mend: &'static str) -> Error {
    Error::Recording {
        path: path.to_owned(),
        what: what.to_string(),
        mend,
    }
}

const OTHER: &str =
    "name the rollouts that a stage with `record = true` wrote, with the prompts it had";

/// Reads what [`record`] wrote of `step`.
///
/// # Errors
/// [`Error::Recording`] when the step was not recorded, the file is of something else, or its prompts are not
/// `prompts`.
pub fn replay(
    dir: &Path,
    step: u64,
    tokenizer: &ChatTokenizer,
    prompts: &[Prompt],
) -> Result<Harvest> {
    let path = file(dir, step);
    if !path.is_file() {
        let what = format!("step {step} was not recorded");
        return Err(bad(&path, &what, "lower `steps` to what was recorded"));
    }
    let mut groups: Vec<(Kept, Vec<f64>, Vec<StepRewards>)> = Vec::new();
    let (mut greedy, mut facts) = (Vec::new(), None);
    for read in source::rows(&path)? {
        let read = read?;
        let row = Cells {
            path: &path,
            place: &read.place,
            columns: &read.columns,
        };
        if let Value::String(text) = row.get("facts") {
            let read = serde_json::from_str::<Facts>(text);
            facts = Some(read.map_err(|e| bad(&path, &e, OTHER))?);
        }
        if row.int("group")? == groups.len() as u64 {
            let kept = Kept {
                prompt: row.int("prompt")?,
                row: row.int("row")?,
                prompt_ids: row.ints("prompt_ids")?,
                completions: Vec::new(),
                earned: Vec::new(),
            };
            let known = prompts.get(kept.prompt as usize);
            if known.is_none_or(|p| p.ids != kept.prompt_ids) {
                let what = format!("{}: the prompt is not the one of these data", read.place);
                return Err(bad(&path, &what, OTHER));
            }
            groups.push((kept, Vec::new(), Vec::new()));
            greedy.push(row.get("greedy_reward").as_f64());
        }
        let Some((kept, rewards, steps)) = groups.last_mut() else {
            return Err(bad(&path, &"it does not begin with its first group", OTHER));
        };
        let bounds = row.ints("trained")?;
        kept.completions.push(KeptCompletion {
            ids: row.ints("ids")?,
            trained: bounds
                .chunks_exact(2)
                .map(|b| b[0] as usize..b[1] as usize)
                .collect(),
            finish: serde_json::from_value(row.get("finish").clone())
                .map_err(|e| bad(&path, &e, OTHER))?,
            logprobs: match row.get("logprobs") {
                Value::Null => None,
                _ => Some(row.numbers("logprobs")?),
            },
            version: row.int("policy_version")?,
        });
        rewards.push(row.get("reward").as_f64().unwrap_or(f64::NAN));
        let places = row.ints("step_places")?;
        let values = row.numbers("step_rewards")?;
        steps.push(places.into_iter().map(|p| p as usize).zip(values).collect());
    }
    let facts = facts.ok_or_else(|| bad(&path, &"no facts of the step", OTHER))?;
    let scored = groups
        .into_iter()
        .map(|(kept, rewards, steps)| {
            Ok(ScoredRollout {
                rollout: kept.rollout(tokenizer)?,
                rewards,
                steps,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let version = scored
        .iter()
        .flat_map(|s| &s.rollout.group.completions)
        .find_map(|c| c.sampler.as_ref())
        .map_or(step, |s| s.policy_version);
    Ok(Harvest {
        step,
        version,
        scored,
        greedy: greedy.into_iter().collect(),
        facts,
        seconds: 0.0,
    })
}

struct Cells<'a> {
    path: &'a Path,
    place: &'a str,
    columns: &'a serde_json::Map<String, Value>,
}

impl Cells<'_> {
    fn get(&self, name: &str) -> &Value {
        self.columns.get(name).unwrap_or(&Value::Null)
    }

    fn wrong(&self, name: &str) -> Error {
        let what = format!(
            "{}: column `{name}` is missing or of another kind",
            self.place
        );
        bad(self.path, &what, OTHER)
    }

    fn int(&self, name: &str) -> Result<u64> {
        self.get(name).as_u64().ok_or_else(|| self.wrong(name))
    }

    fn list<T>(&self, name: &str, of: impl Fn(&Value) -> Option<T>) -> Result<Vec<T>> {
        let all = self.get(name).as_array().ok_or_else(|| self.wrong(name))?;
        let items: Option<Vec<T>> = all.iter().map(of).collect();
        items.ok_or_else(|| self.wrong(name))
    }

    fn ints(&self, name: &str) -> Result<Vec<u32>> {
        self.list(name, |v| u32::try_from(v.as_u64()?).ok())
    }

    fn numbers(&self, name: &str) -> Result<Vec<f64>> {
        self.list(name, Value::as_f64)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Map;

    use super::*;
    use crate::rollout::RolloutStats;

    #[test]
    fn what_is_read_is_what_was_written() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let tokenizer = ChatTokenizer::load(&root.join("datasets/help/tokenizer")).unwrap();
        let completion = |ids: Vec<u32>, finish, logprob: f32| Completion {
            trained: vec![0..1, 2..3],
            sampler: Some(SamplerRecord {
                logprobs: vec![logprob, -1.0 / 3.0, f32::MIN_POSITIVE],
                policy_version: 6,
                top: Vec::new(),
            }),
            ..Completion::whole(ids, finish)
        };
        let completions = vec![
            completion(vec![10, 11, 12], Finish::Stop, -1e-30),
            completion(vec![13, 14, 15], Finish::Length, -0.1),
        ];
        let texts = completions
            .iter()
            .map(|c| tokenizer.decode(&c.ids, true).unwrap())
            .collect();
        let prompt = |ids: Vec<u32>| Prompt {
            row: 3,
            ids,
            text: String::new(),
            fields: Map::new(),
        };
        let prompts = [prompt(vec![1]), prompt(vec![7, 8])];
        let harvest = Harvest {
            step: 7,
            version: 6,
            scored: vec![ScoredRollout {
                rollout: Rollout {
                    prompt: 1,
                    group: PromptGroup {
                        row: 3,
                        prompt: vec![7, 8],
                        completions,
                    },
                    texts,
                    earned: Vec::new(),
                },
                rewards: vec![0.1 + 0.2, f64::NAN],
                steps: vec![vec![(2, 1.0 / 3.0)], Vec::new()],
            }],
            greedy: Some(vec![-0.7]),
            facts: Facts {
                stats: RolloutStats {
                    reward: 1.0 / 7.0,
                    ..RolloutStats::default()
                },
                parts: vec![("words".into(), 2.0 / 3.0)],
                drawn: 4,
                rounds: 2,
            },
            seconds: 9.0,
        };
        let dir = tempfile::tempdir().unwrap();
        record(dir.path(), &harvest).unwrap();
        let back = replay(dir.path(), 7, &tokenizer, &prompts).unwrap();
        assert_eq!((back.step, back.version), (7, 6));
        assert_eq!(
            (&back.greedy, &back.facts),
            (&harvest.greedy, &harvest.facts)
        );
        let (a, b) = (&back.scored[0], &harvest.scored[0]);
        assert_eq!(
            (&a.rollout.group, &a.rollout.texts, &a.steps),
            (&b.rollout.group, &b.rollout.texts, &b.steps)
        );
        assert!(a.rewards[0] == b.rewards[0] && a.rewards[1].is_nan());
        // Another step, other prompts, another file.
        let bad = |step, prompts: &[Prompt]| {
            let e = replay(dir.path(), step, &tokenizer, prompts).unwrap_err();
            e.to_string()
        };
        assert!(bad(8, &prompts).contains("step 8 was not recorded"));
        assert!(bad(7, &prompts[..1]).contains("not the one of these data"));
        std::fs::copy(
            root.join("datasets/help/prompts/test.parquet"),
            dir.path().join("step-00000008.parquet"),
        )
        .unwrap();
        assert!(bad(8, &prompts).contains("column `group`"));
    }
}
