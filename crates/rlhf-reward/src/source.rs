//! Where rewards come from: reward models, rules, and weighted mixes of them.
//!
//! Invariant: a completion's score does not depend on what else is in the batch.

use rlhf_data::group::{Finish, PromptGroup};
use rlhf_data::pack::{PackedBatch, batches_by_tokens};
use rlhf_data::rubric;
use rlhf_model::{DeviceBatch, ScalarModel};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A prompt whose completions are to be scored: as tokens and as text.
#[derive(Clone, Copy, Debug)]
pub struct Judged<'a> {
    /// The tokens.
    pub group: &'a PromptGroup,
    /// The prompt's text as the user wrote it.
    pub prompt: &'a str,
    /// Each completion's text, special tokens left out.
    pub texts: &'a [String],
    /// What else the data says about the prompt (an answer, say).
    pub fields: &'a Map<String, Value>,
}

/// Something that scores completions.
pub trait RewardSource {
    /// A short name for metrics.
    fn name(&self) -> &str;

    /// One score for each completion of each item.
    ///
    /// # Errors
    /// Whatever keeps the source from scoring; the run stops, so a source that can lose single
    /// rows deals with them itself.
    fn scores(&self, items: &[Judged<'_>]) -> Result<Vec<Vec<f64>>>;

    /// What it counted since it was last asked (rows without a verdict, what a judge cost), by name, for the
    /// log.
    fn counted(&self) -> Vec<(String, f64)> {
        Vec::new()
    }
}

/// A rule that scores text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Rule {
    /// Distinct words of `positive` in the lower-cased text less distinct words of `negative`;
    /// words are runs of the letters a–z.
    Words {
        /// Words that add one.
        positive: Vec<String>,
        /// Words that take one.
        negative: Vec<String>,
    },
    /// The rubric of the shipped help task, 0 to 1: its gold judge.
    Help {},
    /// 1 where the completion, white space around it left out, is the text in the row's `field`; else 0.
    Exact {
        /// The column with the answer.
        field: String,
    },
}

impl Rule {
    /// The score of one completion.
    ///
    /// # Errors
    /// When the rule needs fields that the data do not have.
    pub fn score(
        &self,
        prompt: &str,
        completion: &str,
        fields: &Map<String, Value>,
    ) -> Result<f64> {
        Ok(match self {
            Self::Words { positive, negative } => {
                let lower = completion.to_lowercase();
                let words: std::collections::HashSet<&str> = lower
                    .split(|c: char| !c.is_ascii_lowercase())
                    .filter(|w| !w.is_empty())
                    .collect();
                let count = |list: &[String]| {
                    list.iter()
                        .collect::<std::collections::HashSet<_>>()
                        .iter()
                        .filter(|w| words.contains(w.as_str()))
                        .count()
                };
                count(positive) as f64 - count(negative) as f64
            }
            Self::Help {} => rubric::judge(prompt, completion, fields)?.score,
            Self::Exact { field } => {
                let answer = fields.get(field).and_then(Value::as_str);
                let answer = answer.ok_or_else(|| Error::Argument {
                    op: "exact",
                    what: format!(
                        "the row has no text in `{field}`; name the column with the answer"
                    ),
                })?;
                f64::from(u8::from(completion.trim() == answer.trim()))
            }
        })
    }
}

impl RewardSource for Rule {
    fn name(&self) -> &str {
        match self {
            Self::Words { .. } => "words",
            Self::Help {} => "help",
            Self::Exact { .. } => "exact",
        }
    }

    fn scores(&self, items: &[Judged<'_>]) -> Result<Vec<Vec<f64>>> {
        items
            .iter()
            .map(|i| {
                i.texts
                    .iter()
                    .map(|t| self.score(i.prompt, t, i.fields))
                    .collect()
            })
            .collect()
    }
}

/// A reward model as a source, normalised to mean 0 and deviation 1 on its reference completions.
#[derive(Debug)]
pub struct ModelSource {
    name: String,
    model: ScalarModel,
    micro_tokens: usize,
}

impl ModelSource {
    /// A source called `name` that runs `model` on at most `micro_tokens` packed tokens at once.
    #[must_use]
    pub fn new(name: impl Into<String>, model: ScalarModel, micro_tokens: usize) -> Self {
        Self {
            name: name.into(),
            model,
            micro_tokens,
        }
    }
}

impl RewardSource for ModelSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn scores(&self, items: &[Judged<'_>]) -> Result<Vec<Vec<f64>>> {
        let groups: Vec<&PromptGroup> = items.iter().map(|i| i.group).collect();
        let flat = model_scores(&self.model, &groups, self.micro_tokens)?;
        let mut flat = flat.into_iter();
        Ok(groups
            .iter()
            .map(|g| flat.by_ref().take(g.completions.len()).collect())
            .collect())
    }
}

/// Scores of every completion of `groups`, in order, without gradients.
///
/// # Errors
/// When a group exceeds `micro_tokens` or the model fails.
pub fn model_scores(
    model: &ScalarModel,
    groups: &[&PromptGroup],
    micro_tokens: usize,
) -> Result<Vec<f64>> {
    let _guard = tch::no_grad_guard();
    let lengths: Vec<usize> = groups.iter().map(|g| g.num_tokens()).collect();
    let mut scores = Vec::new();
    for range in batches_by_tokens(&lengths, micro_tokens)? {
        let part: Vec<PromptGroup> = groups[range].iter().map(|g| (*g).clone()).collect();
        let batch = DeviceBatch::new(&PackedBatch::pack(&part)?, model.device())?;
        let s = model.scores(&batch)?.to_kind(tch::Kind::Double);
        scores.extend(Vec::<f64>::try_from(&s).map_err(Error::Torch)?);
    }
    Ok(scores)
}

/// A weighted sum of sources.
#[derive(Default)]
pub struct RewardMix {
    parts: Vec<(f64, Box<dyn RewardSource>)>,
    /// Added to the score of a completion that has no end of its own.
    missing_eos_penalty: f64,
}

impl std::fmt::Debug for RewardMix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts: Vec<_> = self.parts.iter().map(|(w, s)| (w, s.name())).collect();
        f.debug_struct("RewardMix")
            .field("parts", &parts)
            .field("missing_eos_penalty", &self.missing_eos_penalty)
            .finish()
    }
}

/// The scores of a [`RewardMix`].
#[derive(Clone, Debug, Default)]
pub struct Scores {
    /// The weighted sum, for each completion of each item.
    pub total: Vec<Vec<f64>>,
    /// The mean of each part before weighting, by name.
    pub part_means: Vec<(String, f64)>,
}

impl RewardMix {
    /// An empty mix.
    #[must_use]
    pub fn new(missing_eos_penalty: f64) -> Self {
        Self {
            parts: Vec::new(),
            missing_eos_penalty,
        }
    }

    /// Adds a source with its weight.
    pub fn push(&mut self, weight: f64, source: Box<dyn RewardSource>) {
        self.parts.push((weight, source));
    }

    /// Scores `items`.
    ///
    /// # Errors
    /// When a source fails, or gives a score that is not finite.
    pub fn scores(&self, items: &[Judged<'_>]) -> Result<Scores> {
        let penalty = |f: Finish| {
            if f == Finish::Stop {
                0.0
            } else {
                self.missing_eos_penalty
            }
        };
        let mut out = Scores {
            total: items
                .iter()
                .map(|i| {
                    i.group
                        .completions
                        .iter()
                        .map(|c| penalty(c.finish))
                        .collect()
                })
                .collect(),
            part_means: Vec::new(),
        };
        for (weight, source) in &self.parts {
            let scores = source.scores(items)?;
            let (mut sum, mut count) = (0.0, 0usize);
            for ((total, part), item) in out.total.iter_mut().zip(&scores).zip(items) {
                for (t, s) in total.iter_mut().zip(part) {
                    if !s.is_finite() {
                        return Err(Error::NotFinite {
                            what: format!(
                                "score of `{}` for row {}",
                                source.name(),
                                item.group.row
                            ),
                        });
                    }
                    *t += weight * s;
                    sum += s;
                    count += 1;
                }
            }
            out.part_means
                .push((source.name().to_owned(), sum / count.max(1) as f64));
            let counted = source.counted().into_iter();
            out.part_means
                .extend(counted.map(|(what, n)| (format!("{}_{what}", source.name()), n)));
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_counted_once_and_whole() {
        let rule = Rule::Words {
            positive: vec!["happy".into(), "fun".into()],
            negative: vec!["sad".into()],
        };
        // happy (twice, counts once) + fun − sad = 1; "funny" is another word.
        assert_eq!(
            rule.score("", "Happy, happy fun! Not sad.", &Map::new())
                .unwrap(),
            1.0
        );
        assert_eq!(rule.score("", "funny sadness", &Map::new()).unwrap(), 0.0);
    }

    #[test]
    fn exact_is_equality_but_for_white_space_around() {
        let rule = Rule::Exact {
            field: "answer".into(),
        };
        let mut fields = Map::new();
        fields.insert("answer".into(), "sun cat".into());
        let score = |text: &str| rule.score("", text, &fields).unwrap();
        assert_eq!(score(" sun cat\n"), 1.0);
        assert_eq!(score("sun  cat"), 0.0);
        assert_eq!(score("sun cat."), 0.0);
        let e = rule.score("", "x", &Map::new()).unwrap_err().to_string();
        assert!(e.contains("`answer`"), "{e}");
    }

    #[test]
    fn a_mix_adds_weighted_parts_and_the_penalty() {
        let rule = Rule::Words {
            positive: vec!["fun".into()],
            negative: vec![],
        };
        let mut mix = RewardMix::new(-3.0);
        mix.push(2.0, Box::new(rule.clone()));
        mix.push(0.5, Box::new(rule));
        let completion = |finish| rlhf_data::group::Completion::whole(vec![1], finish);
        let group = PromptGroup {
            row: 0,
            prompt: vec![1],
            completions: vec![completion(Finish::Stop), completion(Finish::Length)],
        };
        let texts = ["fun".to_owned(), "dull".to_owned()];
        let fields = Map::new();
        let s = mix
            .scores(&[Judged {
                group: &group,
                prompt: "",
                texts: &texts,
                fields: &fields,
            }])
            .unwrap();
        // 2·1 + 0.5·1 and 0 − 3.
        assert_eq!(s.total, [[2.5, -3.0]]);
        assert_eq!(s.part_means[0], ("words".to_owned(), 0.5));
    }
}
