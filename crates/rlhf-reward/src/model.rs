//! Reward models: what a head's numbers mean, ensembles, and the normalisation of scores.
//!
//! Invariant: a completion's score is a function of its prompt and itself. A member's score is normalised
//! first, then members are combined, then the result is normalised, so that on the reference completions
//! the scores have mean 0 and variance 1 whatever the ensemble. All of it is stored with the weights.
//!
//! Files: one net is a folder in the layout of `AutoModelForSequenceClassification` with a label an output
//! (other tools see the raw head); several are such folders `member-0`, `member-1`, … beside `reward.json`.

use std::path::{Path, PathBuf};

use rlhf_data::group::PromptGroup;
use rlhf_data::pack::{PackedBatch, batches_by_tokens};
use rlhf_kernels::{Offsets, Ragged};
use rlhf_model::{DeviceBatch, LoadOptions, RewardNorm, ScalarModel};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::objective::StepClasses;
use crate::outcome::{self, Pool};
use crate::process::{self, Aggregate, Neutral};
use crate::regression;

const OP: &str = "reward model";
const LIST: &str = "reward.json";

/// How a member's outputs become a completion's score.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Readout {
    /// The first of so many numbers at the last token.
    First {
        /// How many numbers.
        outputs: usize,
    },
    /// The one number's mean over the completion's tokens.
    MeanOfTokens {},
    /// Σ m_a r_a at the last token: several attributes as one reward.
    Mix {
        /// The attributes, one an output.
        attributes: Vec<String>,
        /// m.
        weights: Vec<f64>,
    },
    /// One number of the probabilities that the steps are right.
    Steps {
        /// What a step can be.
        steps: StepClasses,
        /// The number.
        aggregate: Aggregate,
        /// The token that ends a step; the last token does in any case.
        end: Option<u32>,
    },
}

impl Readout {
    /// How many outputs a member has.
    #[must_use]
    pub fn outputs(&self) -> usize {
        match self {
            Self::First { outputs } => *outputs,
            Self::MeanOfTokens {} => 1,
            Self::Mix { attributes, .. } => attributes.len(),
            Self::Steps { steps, .. } => steps.outputs(),
        }
    }

    /// The rows of a packed batch that are looked at, and how many of them are each completion's.
    fn places(&self, batch: &PackedBatch) -> (Vec<i64>, Vec<i64>) {
        let (mut places, mut lengths) = (Vec::new(), Vec::new());
        for span in batch.completion_rows() {
            let before = places.len();
            let last = span.end - 1;
            match self {
                Self::First { .. } | Self::Mix { .. } => places.push(last as i64),
                Self::MeanOfTokens {} => places.extend(span.map(|r| r as i64)),
                Self::Steps { end, .. } => {
                    let ends = |r: &usize| {
                        *r == last || end.is_some_and(|e| batch.token_ids[*r] == i64::from(e))
                    };
                    places.extend(span.filter(ends).map(|r| r as i64));
                }
            }
            lengths.push((places.len() - before) as i64);
        }
        (places, lengths)
    }

    /// A member's score of each completion, from its outputs `[R, W]` at [`Readout::places`].
    fn scores(&self, outputs: &Tensor, lengths: &[i64]) -> Result<Tensor> {
        let ragged = |values: Tensor| Ragged::new(values, Offsets::from_lengths(lengths)?);
        Ok(match self {
            Self::First { .. } => outputs.select(1, 0),
            Self::MeanOfTokens {} => {
                outcome::pool_logits(&ragged(outputs.select(1, 0))?, Pool::Mean)?
            }
            Self::Mix { weights, .. } => regression::mix(
                outputs,
                &Tensor::from_slice(weights)
                    .to_kind(outputs.kind())
                    .to_device(outputs.device()),
            )?,
            Self::Steps {
                steps, aggregate, ..
            } => {
                let right = match steps {
                    StepClasses::Binary {} => outputs.select(1, 0).sigmoid(),
                    StepClasses::Two {} => process::step_probabilities(outputs, Neutral::Wrong)?,
                    StepClasses::Three { neutral } => {
                        process::step_probabilities(outputs, *neutral)?
                    }
                };
                process::aggregate(&ragged(right)?, *aggregate)?
            }
        })
    }
}

/// One score of several members' scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Combine {
    /// Their mean.
    #[default]
    Mean,
    /// The least: what any member doubts is doubted (Coste et al. 2023, arXiv 2310.02743, worst case).
    Min,
    /// Mean − k · std, the standard deviation over members (Coste et al. 2023, uncertainty-weighted, with
    /// the deviation in place of the variance).
    MeanMinusStd {
        /// k.
        k: f64,
    },
}

impl Combine {
    /// The score of one completion from those of all members.
    #[must_use]
    pub fn of(self, scores: &[f64]) -> f64 {
        let (mean, std) = moments(scores);
        match self {
            Self::Mean => mean,
            Self::Min => scores.iter().copied().fold(f64::INFINITY, f64::min),
            Self::MeanMinusStd { k } => mean - k * std,
        }
    }
}

/// Mean and standard deviation (of the numbers themselves, not of a population).
fn moments(x: &[f64]) -> (f64, f64) {
    let n = x.len().max(1) as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    (mean, variance.sqrt())
}

/// What a reward model's outputs are.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// How a member's outputs become a score.
    pub readout: Readout,
    /// Members on each net's trunk.
    pub heads: usize,
    /// How members make one score.
    pub combine: Combine,
    /// Where a member's learned thresholds begin, for ordinal labels.
    pub thresholds: Option<Vec<f64>>,
}

impl Spec {
    /// One member.
    #[must_use]
    pub fn single(readout: Readout) -> Self {
        Self {
            readout,
            heads: 1,
            combine: Combine::Mean,
            thresholds: None,
        }
    }

    /// How many outputs a net has.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.readout.outputs() * self.heads
    }
}

/// A reward model: one net or several, each with one head or several.
#[derive(Debug)]
pub struct RewardModel {
    nets: Vec<ScalarModel>,
    readout: Readout,
    heads: usize,
    combine: Combine,
    /// Of each member, in the order of nets, where there are any.
    thresholds: Vec<Tensor>,
    norms: Vec<RewardNorm>,
    norm: RewardNorm,
}

impl From<ScalarModel> for RewardModel {
    /// A model whose first output at the last token is the score, with the norm that it has.
    fn from(net: ScalarModel) -> Self {
        let readout = Readout::First {
            outputs: net.num_outputs(),
        };
        Self {
            norm: net.norm(),
            nets: vec![net],
            readout,
            heads: 1,
            combine: Combine::Mean,
            thresholds: Vec::new(),
            norms: vec![RewardNorm::default()],
        }
    }
}

impl RewardModel {
    /// A model of `nets`, not normalised.
    ///
    /// # Errors
    /// When there is no net, or one has another number of outputs than `spec` says.
    pub fn new(nets: Vec<ScalarModel>, spec: &Spec) -> Result<Self> {
        let bad = |what: String| Err(Error::Argument { op: OP, what });
        if nets.is_empty() || spec.heads == 0 {
            return bad("no members".into());
        }
        if let Some(net) = nets.iter().find(|n| n.num_outputs() != spec.outputs()) {
            return bad(format!(
                "a net of {} outputs, expected {}",
                net.num_outputs(),
                spec.outputs()
            ));
        }
        let members = nets.len() * spec.heads;
        let device = nets[0].device();
        let thresholds = spec.thresholds.iter().flat_map(|raw| {
            (0..members).map(move |_| {
                Tensor::from_slice(raw)
                    .to_kind(Kind::Float)
                    .to_device(device)
                    .set_requires_grad(true)
            })
        });
        Ok(Self {
            thresholds: thresholds.collect(),
            nets,
            readout: spec.readout.clone(),
            heads: spec.heads,
            combine: spec.combine,
            norms: vec![RewardNorm::default(); members],
            norm: RewardNorm::default(),
        })
    }

    /// The members of several models as one, each with the norm that it has.
    ///
    /// # Errors
    /// When there is none, one is an ensemble itself, or they read their outputs in different ways.
    pub fn ensemble(models: Vec<Self>, combine: Combine) -> Result<Self> {
        let bad = |what: &str| {
            Err(Error::Argument {
                op: OP,
                what: what.into(),
            })
        };
        let mut models = models.into_iter();
        let Some(mut all) = models.next() else {
            return bad("no members");
        };
        if all.members() != 1 {
            return bad("a member is an ensemble itself");
        }
        all.norms = vec![all.norm];
        all.norm = RewardNorm::default();
        all.combine = combine;
        for model in models {
            if model.members() != 1 {
                return bad("a member is an ensemble itself");
            }
            // The mixes of attributes may differ: each member has learned its own.
            if std::mem::discriminant(&model.readout) != std::mem::discriminant(&all.readout)
                || model.readout.outputs() != all.readout.outputs()
            {
                return bad("members read their outputs in different ways");
            }
            all.norms.push(model.norm);
            all.nets.extend(model.nets);
            all.thresholds.extend(model.thresholds);
        }
        Ok(all)
    }

    /// Loads what [`RewardModel::save`] wrote, or any folder of `AutoModelForSequenceClassification`.
    ///
    /// # Errors
    /// As [`ScalarModel::load`]; [`Error::File`] when what stands beside the weights is damaged.
    pub fn load(dir: &Path, options: &LoadOptions) -> Result<Self> {
        let list = dir.join(LIST);
        if list.is_file() {
            return Self::load_members(dir, &list, options);
        }
        let net = ScalarModel::load(dir, options)?;
        if net.note().is_null() {
            return Ok(net.into());
        }
        let note: Note = serde_json::from_value(net.note().clone())
            .map_err(|e| damaged(dir.join("config.json"), format!("rlhf_reward: {e}")))?;
        if note.readout.outputs() * note.heads != net.num_outputs()
            || note.heads == 0
            || note.norms.len() != note.heads
            || !(note.thresholds.is_empty() || note.thresholds.len() == note.heads)
            || !note.norms.iter().chain([&note.norm]).all(normalises)
            || matches!(&note.readout, Readout::Mix { attributes, weights } if attributes.len() != weights.len())
        {
            return Err(damaged(
                dir.join("config.json"),
                format!(
                    "rlhf_reward does not fit a head of {} outputs",
                    net.num_outputs()
                ),
            ));
        }
        let spec = Spec {
            readout: note.readout,
            heads: note.heads,
            combine: note.combine,
            thresholds: None,
        };
        let (device, own) = (net.device(), net.norm());
        let mut model = Self::new(vec![net], &spec)?;
        model.thresholds = note
            .thresholds
            .iter()
            .map(|raw| {
                Tensor::from_slice(raw)
                    .to_kind(Kind::Float)
                    .to_device(device)
                    .set_requires_grad(true)
            })
            .collect();
        model.norms = note.norms.iter().map(|n| norm(*n)).collect();
        model.norm = if note.heads == 1 {
            own
        } else {
            norm(note.norm)
        };
        Ok(model)
    }

    fn load_members(dir: &Path, list: &Path, options: &LoadOptions) -> Result<Self> {
        let bad = |what: String| damaged(list.to_owned(), what);
        let text = std::fs::read_to_string(list).map_err(|e| bad(e.to_string()))?;
        let note: List = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
        if note.members == 0 || !normalises(&note.norm) {
            return Err(bad("no members, or a norm that cannot normalise".into()));
        }
        let members = (0..note.members)
            .map(|i| Self::load(&member(dir, i), options))
            .collect::<Result<_>>()?;
        let mut all = Self::ensemble(members, note.combine)?;
        all.norm = norm(note.norm);
        Ok(all)
    }

    /// Writes the folder. Several nets are written one after the other and `reward.json` last, without
    /// which the folder is no ensemble.
    ///
    /// # Errors
    /// As [`ScalarModel::save`].
    pub fn save(&mut self, dir: &Path) -> Result<()> {
        let thresholds = self
            .thresholds
            .iter()
            .map(|t| Ok(Vec::<f64>::try_from(&t.detach().to_kind(Kind::Double))?))
            .collect::<Result<Vec<_>>>()?;
        let note = |norms: &[RewardNorm], thresholds: &[Vec<f64>], whole: RewardNorm| Note {
            readout: self.readout.clone(),
            heads: self.heads,
            combine: self.combine,
            norms: norms.iter().map(|n| [n.mean, n.std]).collect(),
            norm: [whole.mean, whole.std],
            thresholds: thresholds.to_vec(),
        };
        let identity = RewardNorm::default();
        if self.nets.len() == 1 {
            let note = note(&self.norms, &thresholds, self.norm);
            // Of one output the norm is where it always was.
            let own = if self.heads == 1 { self.norm } else { identity };
            let net = &mut self.nets[0];
            net.set_note(serde_json::to_value(note).unwrap_or(Value::Null));
            net.set_norm(own)?;
            return Ok(net.save(dir)?);
        }
        let notes: Vec<Note> = (0..self.nets.len())
            .map(|i| {
                let own = thresholds.get(i).map(std::slice::from_ref);
                note(&[identity], own.unwrap_or(&[]), self.norms[i])
            })
            .collect();
        for (i, (net, note)) in self.nets.iter_mut().zip(notes).enumerate() {
            net.set_note(serde_json::to_value(note).unwrap_or(Value::Null));
            net.set_norm(self.norms[i])?;
            net.save(&member(dir, i))?;
        }
        let list = List {
            members: self.nets.len(),
            combine: self.combine,
            norm: [self.norm.mean, self.norm.std],
        };
        let text = serde_json::to_string_pretty(&json!(list)).unwrap_or_default();
        rlhf_train::write_whole(&dir.join(LIST), text.as_bytes())?;
        Ok(())
    }

    /// How many members there are: nets times heads.
    #[must_use]
    pub fn members(&self) -> usize {
        self.nets.len() * self.heads
    }

    /// How a member's outputs become a score.
    #[must_use]
    pub fn readout(&self) -> &Readout {
        &self.readout
    }

    /// How members make one score.
    #[must_use]
    pub fn combine(&self) -> Combine {
        self.combine
    }

    /// Sets how members make one score. The norm is of what was combined before: normalise again.
    pub fn set_combine(&mut self, combine: Combine) {
        self.combine = combine;
    }

    /// The normalisation of the combined score.
    #[must_use]
    pub fn norm(&self) -> RewardNorm {
        self.norm
    }

    /// Sets the weights of the attributes.
    ///
    /// # Errors
    /// When outputs are no attributes, or there is not one finite weight for each.
    pub fn set_mix(&mut self, weights: Vec<f64>) -> Result<()> {
        let n = self.readout.outputs();
        match &mut self.readout {
            Readout::Mix { weights: own, .. }
                if weights.len() == n && weights.iter().all(|w| w.is_finite()) =>
            {
                *own = weights;
                Ok(())
            }
            _ => Err(Error::Argument {
                op: OP,
                what: format!("{weights:?} is no mix of {n} attributes"),
            }),
        }
    }

    /// Where the weights are.
    #[must_use]
    pub fn device(&self) -> Device {
        self.nets[0].device()
    }

    /// The only net of a model that has one.
    #[must_use]
    pub fn net(&self) -> Option<&ScalarModel> {
        match &self.nets[..] {
            [net] => Some(net),
            _ => None,
        }
    }

    /// Every weight that is trained, by name; of a model of one net.
    ///
    /// # Errors
    /// When there are several nets: each is trained by itself.
    pub fn parameters(&self) -> Result<Vec<(String, Tensor)>> {
        let net = self.net().ok_or_else(|| Error::Argument {
            op: OP,
            what: "the nets of an ensemble are trained one by one".into(),
        })?;
        let mut all = net.parameters();
        for (i, t) in self.thresholds.iter().enumerate() {
            all.push((format!("reward.thresholds.{i}"), t.shallow_clone()));
        }
        Ok(all)
    }

    /// A member's learned thresholds before they are made to increase.
    pub(crate) fn thresholds(&self, member: usize) -> Option<&Tensor> {
        self.thresholds.get(member)
    }

    /// The raw outputs `[R, W]` of every member at rows of a batch, differentiable.
    ///
    /// # Errors
    /// As [`ScalarModel::outputs`].
    pub fn outputs(&self, batch: &DeviceBatch, rows: &[i64]) -> Result<Vec<Tensor>> {
        let rows = Tensor::from_slice(rows).to_device(self.device());
        let width = self.readout.outputs() as i64;
        let mut all = Vec::with_capacity(self.members());
        for net in &self.nets {
            let outputs = net.outputs(batch, &rows)?;
            all.extend((0..self.heads as i64).map(|h| outputs.narrow(1, h * width, width)));
        }
        Ok(all)
    }

    /// Each member's score of every completion of `groups`, in order, before any norm; no gradients.
    ///
    /// On the CPU every completion is computed alone with its prompt: a matrix product of other rows gives a
    /// row other last bits, and a score is to have the same bits whatever else is scored. Elsewhere prompts
    /// are computed once and scores agree to rounding.
    ///
    /// # Errors
    /// When a group exceeds `micro_tokens` or the model fails.
    pub fn raw_scores(
        &self,
        groups: &[&PromptGroup],
        micro_tokens: usize,
    ) -> Result<Vec<Vec<f64>>> {
        let _guard = tch::no_grad_guard();
        let lengths: Vec<usize> = groups.iter().map(|g| g.num_tokens()).collect();
        let mut all = vec![Vec::new(); self.members()];
        for range in batches_by_tokens(&lengths, micro_tokens)? {
            let part = groups[range].iter().map(|g| (*g).clone());
            let batches: Vec<Vec<PromptGroup>> = if self.device() == Device::Cpu {
                let alone = |g: PromptGroup| {
                    let (row, prompt) = (g.row, g.prompt);
                    g.completions.into_iter().map(move |c| {
                        vec![PromptGroup {
                            row,
                            prompt: prompt.clone(),
                            completions: vec![c],
                        }]
                    })
                };
                part.flat_map(alone).collect()
            } else {
                vec![part.collect()]
            };
            for batch in batches {
                let packed = PackedBatch::pack(&batch)?;
                let batch = DeviceBatch::new(&packed, self.device())?;
                let (rows, sizes) = self.readout.places(&packed);
                for (into, outputs) in all.iter_mut().zip(self.outputs(&batch, &rows)?) {
                    let scores = self.readout.scores(&outputs, &sizes)?.to_kind(Kind::Double);
                    into.extend(Vec::<f64>::try_from(&scores)?);
                }
            }
        }
        Ok(all)
    }

    /// Each member's normalised score of every completion.
    ///
    /// # Errors
    /// As [`RewardModel::raw_scores`].
    pub fn member_scores(
        &self,
        groups: &[&PromptGroup],
        micro_tokens: usize,
    ) -> Result<Vec<Vec<f64>>> {
        Ok(self.normalized(&self.raw_scores(groups, micro_tokens)?))
    }

    /// Members' scores, each normalised by its own norm.
    #[must_use]
    pub fn normalized(&self, raw: &[Vec<f64>]) -> Vec<Vec<f64>> {
        raw.iter()
            .zip(&self.norms)
            .map(|(scores, n)| scores.iter().map(|s| (s - n.mean) / n.std).collect())
            .collect()
    }

    /// The score of every completion of `groups`, in order.
    ///
    /// # Errors
    /// As [`RewardModel::raw_scores`].
    pub fn scores(&self, groups: &[&PromptGroup], micro_tokens: usize) -> Result<Vec<f64>> {
        Ok(self.combined(&self.member_scores(groups, micro_tokens)?))
    }

    /// The scores that members' normalised scores make.
    #[must_use]
    pub fn combined(&self, members: &[Vec<f64>]) -> Vec<f64> {
        let n = members.first().map_or(0, Vec::len);
        let mut one = Vec::with_capacity(members.len());
        (0..n)
            .map(|i| {
                one.clear();
                one.extend(members.iter().map(|m| m[i]));
                (self.combine.of(&one) - self.norm.mean) / self.norm.std
            })
            .collect()
    }

    /// What a member's normalised score is to be multiplied by to be in the unit of the loss again, where
    /// there is one member: log-odds, for pairs.
    #[must_use]
    pub fn unit(&self) -> f64 {
        self.norm.std * self.norms[0].std
    }

    /// Sets the norms so that the scores of all completions of `groups` have mean 0 and variance 1, of each
    /// member and combined.
    ///
    /// # Errors
    /// When there are no completions, a score is not finite, a group exceeds `micro_tokens`, or the model
    /// fails.
    pub fn normalize_on(&mut self, groups: &[&PromptGroup], micro_tokens: usize) -> Result<()> {
        let raw = self.raw_scores(groups, micro_tokens)?;
        let several = self.members() > 1;
        let fit = |scores: &[f64]| -> Result<RewardNorm> {
            if scores.is_empty() {
                return Err(Error::Argument {
                    op: OP,
                    what: "no reference completions to normalise on".into(),
                });
            }
            if scores.iter().any(|s| !s.is_finite()) {
                return Err(Error::NotFinite {
                    what: "a score of a reference completion".into(),
                });
            }
            let (mean, std) = moments(scores);
            Ok(RewardNorm {
                mean,
                std: std.max(1e-6),
            })
        };
        self.norm = RewardNorm::default();
        self.norms = if several {
            raw.iter().map(|s| fit(s)).collect::<Result<_>>()?
        } else {
            vec![RewardNorm::default()]
        };
        self.norm = fit(&self.combined(&self.normalized(&raw)))?;
        Ok(())
    }
}

/// What stands beside a net's weights under `rlhf_reward`.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    readout: Readout,
    heads: usize,
    combine: Combine,
    norms: Vec<[f64; 2]>,
    norm: [f64; 2],
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    thresholds: Vec<Vec<f64>>,
}

/// `reward.json` of several nets.
#[derive(Debug, Serialize, Deserialize)]
struct List {
    members: usize,
    combine: Combine,
    norm: [f64; 2],
}

fn norm([mean, std]: [f64; 2]) -> RewardNorm {
    RewardNorm { mean, std }
}

fn normalises([mean, std]: &[f64; 2]) -> bool {
    mean.is_finite() && std.is_finite() && *std > 0.0
}

fn member(dir: &Path, i: usize) -> PathBuf {
    dir.join(format!("member-{i}"))
}

fn damaged(path: PathBuf, what: String) -> Error {
    Error::File {
        path,
        what,
        mend: "save the model again".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_combine_by_hand() {
        // Mean 2, deviation √(2/3).
        let s = [1.0, 2.0, 3.0];
        assert_eq!(Combine::Mean.of(&s), 2.0);
        assert_eq!(Combine::Min.of(&s), 1.0);
        let lower = Combine::MeanMinusStd { k: 2.0 }.of(&s);
        assert!((lower - (2.0 - 2.0 * (2.0f64 / 3.0).sqrt())).abs() < 1e-15);
    }
}
