//! The data of a run, read and tokenised once for all stages that use it.
//!
//! Invariant: everything that a recipe names is read before the first stage runs, so a bad file is
//! found at once and not after an hour of training.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use anyhow::Context as _;
use rlhf_data::conversation::Text;
use rlhf_data::group::PromptGroup;
use rlhf_data::import::{self, Format, Manifest};
use rlhf_data::record::{
    Annotated, Fault, JudgedPairRecord, PreferenceRecord, PromptRecord, RankedRecord, Record,
    SftRecord, UnpairedRecord,
};
use rlhf_data::source;
use rlhf_data::tokenize::{ChatTokenizer, Limits, Outcome, TokenizeReport, Turns};
use rlhf_policy::rollout::Prompt;
use rlhf_reward::labels::{self, Labelled, Rows};
use rlhf_reward::objective::Objective;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::recipe::{self, Data};
use rlhf::usage;

/// A tokenised file.
#[derive(Debug)]
pub(crate) struct Table<T> {
    pub rows: Vec<T>,
    /// The weight of each row, where any is not 1.
    pub weights: Option<Vec<f64>>,
    pub facts: Facts,
}

/// What is known of a tokenised file.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Facts {
    pub path: String,
    pub sha256: String,
    pub rows: usize,
    pub kept: usize,
    pub dropped: serde_json::Value,
    pub tokens: usize,
}

type Shelf<T> = RefCell<HashMap<String, Rc<Table<T>>>>;

/// All inputs of a run.
pub(crate) struct Inputs {
    /// Absent where the run has no language model.
    tokenizer: Option<ChatTokenizer>,
    shared: PathBuf,
    /// Where stages write.
    run_dir: PathBuf,
    context: usize,
    sft: Shelf<PromptGroup>,
    preference: Shelf<PromptGroup>,
    unpaired: Shelf<(PromptGroup, bool)>,
    ranked: Shelf<PromptGroup>,
    labelled: Shelf<Labelled>,
    prompts: Shelf<Prompt>,
}

impl Inputs {
    pub(crate) fn new(
        tokenizer: Option<ChatTokenizer>,
        shared: &Path,
        run_dir: &Path,
        context: usize,
    ) -> Self {
        Self {
            tokenizer,
            shared: shared.to_owned(),
            run_dir: run_dir.to_owned(),
            context,
            sft: Shelf::default(),
            preference: Shelf::default(),
            unpaired: Shelf::default(),
            ranked: Shelf::default(),
            labelled: Shelf::default(),
            prompts: Shelf::default(),
        }
    }

    pub(crate) fn tokenizer(&self) -> anyhow::Result<&ChatTokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            usage(
                "the run has no language model",
                "the recipe",
                "add [init], which names one",
            )
            .into()
        })
    }

    /// Where files named `shared:…` lie.
    pub(crate) fn shared(&self) -> &Path {
        &self.shared
    }

    /// Demonstrations.
    pub(crate) fn sft(&self, data: &Data, turns: Turns) -> anyhow::Result<Rc<Table<PromptGroup>>> {
        let tokenizer = self.tokenizer()?.clone().with_turns(turns);
        self.cached(
            &self.sft,
            (data, turns),
            |path, limits| {
                let seen = Arc::new(Mutex::new(Vec::new()));
                let weights = Arc::clone(&seen);
                let records = records::<Weighted>(path, data)?
                    .take(data.limit.unwrap_or(usize::MAX))
                    .map(move |r| {
                        r.map(|Weighted { record, weight }| {
                            lock(&weights).push(weight);
                            record
                        })
                    });
                let mut stream = tokenizer.sft_stream(records, limits);
                let mut rows = stream.by_ref().collect::<Result<Vec<_>, _>>()?;
                let weights = lock(&seen);
                let weight = |g: &PromptGroup| weights[g.row as usize];
                rows.retain(|g| weight(g) > 0.0);
                let weights = rows.iter().map(weight).collect();
                Ok(Read {
                    weights: Some(weights),
                    ..Read::new(rows, stream.report().clone(), stream.rows() as usize)
                })
            },
            PromptGroup::num_tokens,
        )
    }

    /// Preference pairs: completion 0 chosen, 1 rejected.
    pub(crate) fn preference(&self, data: &Data) -> anyhow::Result<Rc<Table<PromptGroup>>> {
        self.cached(
            &self.preference,
            (data, Turns::default()),
            |path, limits| {
                let records: Records<PreferenceRecord> = match format(data)? {
                    Some(format) => Box::new(import::preferences(path, format)?),
                    None => records(path, data)?,
                };
                let records = records.take(data.limit.unwrap_or(usize::MAX));
                let mut stream = self.tokenizer()?.preference_stream(records, limits);
                let rows = stream.by_ref().collect::<Result<Vec<_>, _>>()?;
                Ok(Read::new(
                    rows,
                    stream.report().clone(),
                    stream.rows() as usize,
                ))
            },
            PromptGroup::num_tokens,
        )
    }

    /// By how much the chosen of each pair of [`Inputs::preference`] scores higher than the rejected: columns
    /// `score_chosen` and `score_rejected`, or `margin`.
    pub(crate) fn scores(&self, data: &Data) -> anyhow::Result<Vec<f64>> {
        let path = self.path(data);
        let limit = data.limit.unwrap_or(usize::MAX);
        let gaps: Vec<Option<f64>> = match format(data)? {
            Some(format) => import::preferences(&path, format)?
                .take(limit)
                .map(|r| Ok(r?.margin))
                .collect::<anyhow::Result<_>>()?,
            None => source::rows(&path)?
                .take(limit)
                .map(|r| Ok(gap(&r?.columns)))
                .collect::<anyhow::Result<_>>()?,
        };
        self.preference(data)?
            .rows
            .iter()
            .map(|group| {
                let gap = gaps.get(group.row as usize).copied().flatten();
                gap.filter(|g| g.is_finite()).ok_or_else(|| {
                    usage(
                        format!("row {} has no scores, and the loss asks for them", group.row),
                        path.display().to_string(),
                        "add columns `score_chosen` and `score_rejected` (or `margin`) with finite numbers, or choose another loss",
                    )
                    .into()
                })
            })
            .collect()
    }

    /// Thumbs: groups of one completion, and whether it is good.
    pub(crate) fn unpaired(&self, data: &Data) -> anyhow::Result<Rc<Table<(PromptGroup, bool)>>> {
        self.cached(
            &self.unpaired,
            (data, Turns::default()),
            |path, limits| {
                let records = collect::<UnpairedRecord>(records(path, data)?, data.limit)?;
                let (groups, report) = self.tokenizer()?.unpaired_groups(&records, limits)?;
                let label = |g: PromptGroup| {
                    let good = records[g.row as usize].label;
                    (g, good)
                };
                Ok(Read::new(
                    groups.into_iter().map(label).collect(),
                    report,
                    records.len(),
                ))
            },
            |(group, _)| group.num_tokens(),
        )
    }

    /// Rankings, best first.
    pub(crate) fn ranked(&self, data: &Data) -> anyhow::Result<Rc<Table<PromptGroup>>> {
        self.cached(
            &self.ranked,
            (data, Turns::default()),
            |path, limits| {
                let records = collect::<RankedRecord>(records(path, data)?, data.limit)?;
                let (groups, report) = self.tokenizer()?.ranked_groups(&records, limits)?;
                Ok(Read::new(groups, report, records.len()))
            },
            PromptGroup::num_tokens,
        )
    }

    /// Labelled rows that fit an objective.
    pub(crate) fn labelled(
        &self,
        data: &Data,
        rows: Rows,
        objective: &Objective,
    ) -> anyhow::Result<Rc<Table<Labelled>>> {
        let separator = match objective {
            Objective::Process { separator, .. } => separator.as_str(),
            _ => "",
        };
        let table = self.labelled_as(data, rows, separator)?;
        let place = || self.path(data).display().to_string();
        objective.check_rows(&table.rows).with_context(place)?;
        Ok(table)
    }

    /// The pairs that a mix of attributes is learned from.
    pub(crate) fn mix_pairs(&self, data: &Data) -> anyhow::Result<Rc<Table<Labelled>>> {
        self.labelled_as(data, Rows::Preference, "")
    }

    fn labelled_as(
        &self,
        data: &Data,
        rows: Rows,
        separator: &str,
    ) -> anyhow::Result<Rc<Table<Labelled>>> {
        self.cached(
            &self.labelled,
            (data, (rows, separator)),
            |path, limits| {
                let t = self.tokenizer()?;
                let n = data.limit;
                let ((rows, report), read) = match rows {
                    Rows::Preference => {
                        let records: Records<Annotated<JudgedPairRecord>> = match format(data)? {
                            Some(format) => Box::new(
                                import::preferences(path, format)?
                                    .map(|r| r.map(|r| Annotated::from(JudgedPairRecord::from(r)))),
                            ),
                            None => records(path, data)?,
                        };
                        let records = collect(records, n)?;
                        (labels::pairs(t, &records, limits)?, records.len())
                    }
                    Rows::Ranked => {
                        let records = collect(records(path, data)?, n)?;
                        (labels::rankings(t, &records, limits)?, records.len())
                    }
                    Rows::Rated => {
                        let records = collect(records(path, data)?, n)?;
                        (labels::ratings(t, &records, limits)?, records.len())
                    }
                    Rows::Unpaired => {
                        let records = collect(records(path, data)?, n)?;
                        (labels::outcomes(t, &records, limits)?, records.len())
                    }
                    Rows::Stepwise => {
                        let records = collect(records(path, data)?, n)?;
                        let rows = labels::steps(t, &records, separator, limits)?;
                        (rows, records.len())
                    }
                };
                Ok(Read::new(rows, report, read))
            },
            |r| r.group.num_tokens(),
        )
    }

    /// Prompts.
    pub(crate) fn prompts(&self, data: &Data) -> anyhow::Result<Rc<Table<Prompt>>> {
        let tokenizer = self.tokenizer()?;
        self.cached(
            &self.prompts,
            (data, Turns::default()),
            |path, limits| {
                let records = collect::<PromptRecord>(records(path, data)?, data.limit)?;
                let mut report = TokenizeReport::default();
                let mut rows = Vec::new();
                for (row, record) in records.iter().enumerate() {
                    let ids = match tokenizer.prompt_within(&record.prompt, limits)? {
                        Outcome::Kept(ids) => ids,
                        Outcome::Truncated(ids) => {
                            report.shortened_prompts += 1;
                            ids
                        }
                        Outcome::Dropped(reason) => {
                            report.drop(row as u64, reason);
                            continue;
                        }
                    };
                    rows.push(Prompt {
                        row: row as u64,
                        ids,
                        text: plain_text(&record.prompt),
                        fields: record.fields.clone(),
                    });
                }
                Ok(Read::new(rows, report, records.len()))
            },
            |p| p.ids.len(),
        )
    }

    /// The prompts as the file has them, by row.
    pub(crate) fn prompt_texts(&self, data: &Data) -> anyhow::Result<BTreeMap<u64, Text>> {
        let records = collect::<PromptRecord>(records(&self.path(data), data)?, data.limit)?;
        Ok((0..).zip(records.into_iter().map(|r| r.prompt)).collect())
    }

    /// The file that a recipe means: `stage:NAME` is `selected.parquet` of that stage's folder, `stage:NAME/X` its
    /// `X.parquet`.
    fn path(&self, data: &Data) -> PathBuf {
        match data.path.strip_prefix("stage:") {
            Some(rest) => {
                let (stage, file) = rest.split_once('/').unwrap_or((rest, "selected"));
                self.run_dir.join(stage).join(format!("{file}.parquet"))
            }
            None => recipe::resolve(&data.path, &self.shared),
        }
    }

    fn cached<T>(
        &self,
        shelf: &Shelf<T>,
        (data, how): (&Data, impl Serialize),
        read: impl FnOnce(&Path, &Limits) -> anyhow::Result<Read<T>>,
        tokens: fn(&T) -> usize,
    ) -> anyhow::Result<Rc<Table<T>>> {
        let key = serde_json::to_string(&(data, how))?;
        if let Some(table) = shelf.borrow().get(&key) {
            return Ok(table.clone());
        }
        let path = self.path(data);
        let place = path.display().to_string();
        if !path.is_file() {
            let mend = if data.stage().is_some() {
                "name a stage that writes rows, and a file of its folder".to_owned()
            } else if data.path.starts_with("shared:") {
                "set RLHF_SHARED to the folder that holds it".to_owned()
            } else if let Some(name) = &data.dataset {
                let m = Manifest::named(name)?;
                format!(
                    "get it from {} ({}), or correct the path",
                    m.source, m.licence
                )
            } else {
                "run from the project's root, or correct the path".to_owned()
            };
            return Err(usage("no such file", place, mend).into());
        }
        if data.max_prompt + data.max_completion > self.context {
            return Err(usage(
                format!(
                    "max_prompt {} + max_completion {} exceed the model's context of {} tokens",
                    data.max_prompt, data.max_completion, self.context
                ),
                place,
                "lower the limits",
            )
            .into());
        }
        let limits = Limits {
            truncation: data.truncation,
            ..Limits::new(data.max_prompt, data.max_completion)
        };
        let Read {
            rows,
            weights,
            report,
            read: read_rows,
        } = read(&path, &limits)?;
        if rows.is_empty() {
            let what = if read_rows == 0 {
                "no rows".to_owned()
            } else {
                format!("no rows left of {read_rows}: {report}")
            };
            return Err(usage(
                what,
                place,
                "look at the file with `rlhf data check`, or raise the limits",
            )
            .into());
        }
        let facts = Facts {
            sha256: rlhf_train::hash_file(&path).with_context(|| format!("hashing {place}"))?,
            path: data.path.clone(),
            rows: read_rows,
            kept: rows.len(),
            dropped: serde_json::to_value(&report)?,
            tokens: rows.iter().map(tokens).sum(),
        };
        let weights = weights.filter(|w| w.iter().any(|w| *w != 1.0));
        let table = Rc::new(Table {
            rows,
            weights,
            facts,
        });
        shelf.borrow_mut().insert(key, table.clone());
        Ok(table)
    }

    /// Facts of every file read so far, in order of path.
    pub(crate) fn facts(&self) -> Vec<Facts> {
        let mut all: Vec<Facts> = Vec::new();
        all.extend(self.sft.borrow().values().map(|t| t.facts.clone()));
        all.extend(self.preference.borrow().values().map(|t| t.facts.clone()));
        all.extend(self.unpaired.borrow().values().map(|t| t.facts.clone()));
        all.extend(self.ranked.borrow().values().map(|t| t.facts.clone()));
        all.extend(self.labelled.borrow().values().map(|t| t.facts.clone()));
        all.extend(self.prompts.borrow().values().map(|t| t.facts.clone()));
        all.sort_by(|a, b| (&a.path, a.rows).cmp(&(&b.path, b.rows)));
        // A file that is read for its pairs and for its labels is one file.
        all.dedup_by(|a, b| (&a.path, a.rows, a.tokens) == (&b.path, b.rows, b.tokens));
        all
    }

    /// Prompts (as token ids) of every table used for training, to compare with a test split.
    pub(crate) fn seen_prompts(&self, paths: &[String]) -> std::collections::HashSet<Vec<u32>> {
        let mut seen = std::collections::HashSet::new();
        let used = |f: &Facts| paths.contains(&f.path);
        for shelf in [&self.sft, &self.preference, &self.ranked] {
            for table in shelf.borrow().values().filter(|t| used(&t.facts)) {
                seen.extend(table.rows.iter().map(|g| g.prompt.clone()));
            }
        }
        for table in self.unpaired.borrow().values().filter(|t| used(&t.facts)) {
            seen.extend(table.rows.iter().map(|(g, _)| g.prompt.clone()));
        }
        for table in self.labelled.borrow().values().filter(|t| used(&t.facts)) {
            seen.extend(table.rows.iter().map(|r| r.group.prompt.clone()));
        }
        for table in self.prompts.borrow().values().filter(|t| used(&t.facts)) {
            seen.extend(table.rows.iter().map(|p| p.ids.clone()));
        }
        seen
    }
}

/// What was read of a file.
struct Read<T> {
    rows: Vec<T>,
    weights: Option<Vec<f64>>,
    report: TokenizeReport,
    /// How many rows the file has.
    read: usize,
}

impl<T> Read<T> {
    fn new(rows: Vec<T>, report: TokenizeReport, read: usize) -> Self {
        Self {
            rows,
            weights: None,
            report,
            read,
        }
    }
}

/// A demonstration with the column `weight`; of all else that may stand beside it nothing is asked.
struct Weighted {
    record: SftRecord,
    weight: f64,
}

impl Record for Weighted {
    const KIND: &'static str = SftRecord::KIND;

    fn from_row(mut row: Map<String, Value>) -> Result<Self, Fault> {
        let weight = match row.remove("weight") {
            None | Some(Value::Null) => 1.0,
            Some(v) => v
                .as_f64()
                .filter(|w| *w >= 0.0 && w.is_finite())
                .ok_or_else(|| Fault {
                    rule: "weight",
                    column: "weight".into(),
                    what: format!("{v}, expected a number of at least 0"),
                    mend: "correct the weight or drop the column".into(),
                })?,
        };
        Ok(Self {
            record: SftRecord::from_row(row)?,
            weight,
        })
    }

    fn to_row(&self) -> Map<String, Value> {
        let mut row = self.record.to_row();
        row.insert("weight".into(), self.weight.into());
        row
    }
}

fn lock<T>(of: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A list that is only added to is whole at every moment.
    of.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

type Records<R> = Box<dyn Iterator<Item = rlhf_data::Result<R>> + Send>;

/// By how much a row's chosen scores higher than its rejected.
fn gap(row: &serde_json::Map<String, serde_json::Value>) -> Option<f64> {
    let number = |name: &str| row.get(name)?.as_f64();
    let scores = number("score_chosen").zip(number("score_rejected"));
    scores.map_or_else(|| number("margin"), |(c, r)| Some(c - r))
}

/// The format of a file that is of a well-known dataset.
fn format(data: &Data) -> rlhf_data::Result<Option<Format>> {
    let manifest = data.dataset.as_deref().map(Manifest::named).transpose()?;
    manifest.map(|m| m.format()).transpose()
}

/// The rows of a file as records.
fn records<R: Record + Send + 'static>(path: &Path, data: &Data) -> rlhf_data::Result<Records<R>> {
    Ok(match format(data)? {
        Some(format) => Box::new(import::records(path, format)?),
        None => Box::new(source::read(path)?),
    })
}

fn collect<T>(
    rows: impl Iterator<Item = rlhf_data::Result<T>>,
    limit: Option<usize>,
) -> rlhf_data::Result<Vec<T>> {
    rows.take(limit.unwrap_or(usize::MAX)).collect()
}

/// What the user wrote: the last user message, or the plain text.
pub(crate) fn plain_text(prompt: &Text) -> String {
    match prompt {
        Text::Plain(s) => s.clone(),
        Text::Messages(m) => m
            .iter()
            .rev()
            .find(|m| m.role == rlhf_data::conversation::Role::User)
            .or(m.last())
            .map(|m| m.content.clone())
            .unwrap_or_default(),
    }
}
