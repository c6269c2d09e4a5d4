//! Where rewards come from: reward models, rules, and mixes of them.
//!
//! Invariant: a source's score of a completion does not depend on what else is in the batch. Nor does a
//! mix's, unless a part is normalised by what was seen so far: then that is its state, which is saved and
//! restored with the training ([`RewardMix::state`]).

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use rlhf_data::group::{Finish, PromptGroup};
use rlhf_data::rubric;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result, ensure};
use crate::model::RewardModel;

const OP: &str = "reward mix";

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
    model: RewardModel,
    micro_tokens: usize,
}

impl ModelSource {
    /// A source called `name` that runs `model` on at most `micro_tokens` packed tokens at once.
    #[must_use]
    pub fn new(name: impl Into<String>, model: RewardModel, micro_tokens: usize) -> Self {
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
        let flat = self.model.scores(&groups, self.micro_tokens)?;
        let mut flat = flat.into_iter();
        Ok(groups
            .iter()
            .map(|g| flat.by_ref().take(g.completions.len()).collect())
            .collect())
    }
}

/// How a part's scores are brought to one unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Normalize {
    /// They stay as they are.
    #[default]
    None,
    /// (s − mean) / std.
    Fixed {
        /// Subtracted.
        mean: f64,
        /// The divisor, above 0.
        std: f64,
    },
    /// By mean and standard deviation of all scores so far, those of the batch included (Welford 1962).
    Running {},
}

/// When a part counts: by the score of another part, a verifier say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Gate {
    /// Only where the other's score is at least so much.
    AtLeast {
        /// The other part's name.
        by: String,
        /// The least.
        least: f64,
        /// What stands in place of the part's normalised score elsewhere.
        otherwise: f64,
    },
    /// Times the other's score.
    Times {
        /// The other part's name.
        by: String,
    },
}

impl Gate {
    fn by(&self) -> &str {
        match self {
            Self::AtLeast { by, .. } | Self::Times { by } => by,
        }
    }
}

/// What distance from the reference costs beyond what is free.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KlBudget {
    /// Σ log(π/π₀) of a completion that is free, nats.
    pub nats: f64,
    /// What a nat beyond it costs.
    pub cost: f64,
}

/// What happens to the sum of all parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shaping {
    /// What every token of a completion costs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_cost: Option<f64>,
    /// What distance from the reference costs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_budget: Option<KlBudget>,
    /// Bounds of the sum, length and end counted, distance not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip: Option<[f64; 2]>,
}

/// A source with its place in a mix.
pub struct Part {
    source: Box<dyn RewardSource>,
    name: String,
    weight: f64,
    normalize: Normalize,
    clip: Option<[f64; 2]>,
    gate: Option<Gate>,
}

impl std::fmt::Debug for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Part")
            .field("name", &self.name)
            .field("weight", &self.weight)
            .field("normalize", &self.normalize)
            .field("clip", &self.clip)
            .field("gate", &self.gate)
            .finish_non_exhaustive()
    }
}

impl Part {
    /// A source at a weight, under its own name. A part that only opens another's gate has weight 0.
    #[must_use]
    pub fn new(weight: f64, source: Box<dyn RewardSource>) -> Self {
        Self {
            name: source.name().to_owned(),
            source,
            weight,
            normalize: Normalize::None,
            clip: None,
            gate: None,
        }
    }

    /// Another name, in the log and for gates.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// How its scores are brought to one unit.
    #[must_use]
    pub fn normalized(mut self, normalize: Normalize) -> Self {
        self.normalize = normalize;
        self
    }

    /// Bounds of its normalised scores.
    #[must_use]
    pub fn clipped(mut self, clip: Option<[f64; 2]>) -> Self {
        self.clip = clip;
        self
    }

    /// When it counts.
    #[must_use]
    pub fn gated(mut self, gate: Option<Gate>) -> Self {
        self.gate = gate;
        self
    }
}

/// Count, mean and sum of squared deviations of a part's scores so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Running {
    count: f64,
    mean: f64,
    squares: f64,
}

impl Running {
    fn add(&mut self, x: f64) {
        self.count += 1.0;
        let before = x - self.mean;
        self.mean += before / self.count;
        self.squares += before * (x - self.mean);
    }

    fn of(&self, x: f64) -> f64 {
        let std = (self.squares / self.count.max(1.0)).sqrt();
        (x - self.mean) / std.max(1e-6)
    }
}

/// What a mix has seen: of each part that is normalised by it, by name.
pub type MixState = BTreeMap<String, Running>;

/// A sum of sources, each weighted, normalised, clipped and gated, with penalties.
#[derive(Debug, Default)]
pub struct RewardMix {
    parts: Vec<Part>,
    /// Added to the score of a completion that has no end of its own.
    missing_eos_penalty: f64,
    shaping: Shaping,
    seen: Mutex<MixState>,
}

/// The scores of a [`RewardMix`].
#[derive(Clone, Debug, Default)]
pub struct Scores {
    /// The reward of each completion of each item.
    pub total: Vec<Vec<f64>>,
    /// Means over all completions, by name: of every part the score as its source gave it (`name`) and
    /// what it adds to the reward (`name_part`); of every penalty what it takes (`length_penalty`,
    /// `eos_penalty`); the share whose sum was out of bounds (`clipped`).
    pub part_means: Vec<(String, f64)>,
}

impl RewardMix {
    /// An empty mix.
    #[must_use]
    pub fn new(missing_eos_penalty: f64) -> Self {
        Self {
            missing_eos_penalty,
            ..Self::default()
        }
    }

    /// With penalties and bounds.
    ///
    /// # Errors
    /// When a cost is negative or bounds are the wrong way round.
    pub fn shaped(mut self, shaping: Shaping) -> Result<Self> {
        let finite = |x: f64| x >= 0.0 && x.is_finite();
        let cost = shaping.token_cost;
        ensure(cost.is_none_or(finite), OP, || {
            format!("token_cost is {cost:?}, expected 0 or more")
        })?;
        let budget = shaping.kl_budget;
        let right = budget.is_none_or(|b| finite(b.cost) && b.nats.is_finite());
        ensure(right, OP, || {
            format!("kl_budget is {budget:?}, expected a cost of 0 or more")
        })?;
        bounds(shaping.clip)?;
        self.shaping = shaping;
        Ok(self)
    }

    /// Adds a part.
    ///
    /// # Errors
    /// When its name is taken, a number is not finite, or its gate is by no earlier part.
    pub fn push(&mut self, part: Part) -> Result<()> {
        let name = &part.name;
        let known = |name: &str| self.parts.iter().any(|p| p.name == name);
        ensure(!known(name), OP, || {
            format!("two parts are called `{name}`; give one another name")
        })?;
        ensure(part.weight.is_finite(), OP, || {
            format!("the weight of `{name}` is {}", part.weight)
        })?;
        if let Normalize::Fixed { mean, std } = part.normalize {
            let right = mean.is_finite() && std > 0.0 && std.is_finite();
            ensure(right, OP, || {
                format!("`{name}` cannot be normalised by mean {mean} and std {std}")
            })?;
        }
        bounds(part.clip)?;
        if let Some(gate) = &part.gate {
            ensure(known(gate.by()), OP, || {
                format!(
                    "the gate of `{name}` is by `{}`, which is no earlier part",
                    gate.by()
                )
            })?;
        }
        self.parts.push(part);
        Ok(())
    }

    /// What the distances Σ log(π/π₀) of completions cost beyond the budget; nothing without one. They are known
    /// to the training only, so it says when, and takes it from the rewards.
    #[must_use]
    pub fn kl_charges(&self, kl: &[f64]) -> Option<Vec<f64>> {
        let KlBudget { nats, cost } = self.shaping.kl_budget?;
        Some(kl.iter().map(|kl| cost * (kl - nats).max(0.0)).collect())
    }

    /// What was seen so far, to be saved with the training.
    #[must_use]
    pub fn state(&self) -> MixState {
        self.seen().clone()
    }

    /// Goes on from a saved state.
    pub fn restore(&self, state: MixState) {
        *self.seen() = state;
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, MixState> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Scores `items`; a KL budget is charged later ([`RewardMix::kl_charges`]).
    ///
    /// # Errors
    /// When a source fails, gives another number of scores than there are completions, or one that is not
    /// finite.
    pub fn scores(&self, items: &[Judged<'_>]) -> Result<Scores> {
        let counts: Vec<usize> = items.iter().map(|i| i.group.completions.len()).collect();
        let n: usize = counts.iter().sum();
        let completions = || items.iter().flat_map(|i| &i.group.completions);
        let mut means: Vec<(String, f64)> = Vec::new();
        let mut note = |name: String, values: &[f64]| {
            let sum: f64 = values.iter().sum();
            means.push((name, sum / values.len().max(1) as f64));
        };
        let mut total = vec![0.0; n];
        let mut raw: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for part in &self.parts {
            let scores = part.raw(items, &counts)?;
            note(part.name.clone(), &scores);
            let adds = self.contribution(part, &scores, &raw);
            note(format!("{}_part", part.name), &adds);
            total.iter_mut().zip(&adds).for_each(|(t, a)| *t += a);
            for (what, n) in part.source.counted() {
                note(format!("{}_{what}", part.name), &[n]);
            }
            raw.insert(&part.name, scores);
        }
        let mut take = |name: &str, values: Vec<f64>| {
            total.iter_mut().zip(&values).for_each(|(t, v)| *t -= v);
            note(name.to_owned(), &values);
        };
        if self.missing_eos_penalty != 0.0 {
            let cost =
                |f: Finish| f64::from(u8::from(f != Finish::Stop)) * -self.missing_eos_penalty;
            take(
                "eos_penalty",
                completions().map(|c| cost(c.finish)).collect(),
            );
        }
        if let Some(cost) = self.shaping.token_cost {
            let all = completions().map(|c| cost * c.ids.len() as f64);
            take("length_penalty", all.collect());
        }
        if let Some([low, high]) = self.shaping.clip {
            let outside = |t: &f64| f64::from(u8::from(*t < low || *t > high));
            let clipped: Vec<f64> = total.iter().map(outside).collect();
            note("clipped".into(), &clipped);
            total.iter_mut().for_each(|t| *t = t.clamp(low, high));
        }
        let mut total = total.into_iter();
        Ok(Scores {
            total: counts
                .iter()
                .map(|&k| total.by_ref().take(k).collect())
                .collect(),
            part_means: means,
        })
    }

    /// What a part adds to each completion's reward.
    fn contribution(
        &self,
        part: &Part,
        scores: &[f64],
        raw: &BTreeMap<&str, Vec<f64>>,
    ) -> Vec<f64> {
        let normal: Vec<f64> = match part.normalize {
            Normalize::None => scores.to_vec(),
            Normalize::Fixed { mean, std } => scores.iter().map(|s| (s - mean) / std).collect(),
            Normalize::Running {} => {
                let mut seen = self.seen();
                let own = seen.entry(part.name.clone()).or_default();
                scores.iter().for_each(|s| own.add(*s));
                scores.iter().map(|s| own.of(*s)).collect()
            }
        };
        let bounded = |s: f64| part.clip.map_or(s, |[low, high]| s.clamp(low, high));
        let opens = part.gate.as_ref().and_then(|g| Some((g, raw.get(g.by())?)));
        normal
            .into_iter()
            .enumerate()
            .map(|(i, s)| {
                let s = bounded(s);
                part.weight
                    * match opens {
                        None => s,
                        Some((Gate::Times { .. }, by)) => s * by[i],
                        Some((
                            Gate::AtLeast {
                                least, otherwise, ..
                            },
                            by,
                        )) => {
                            if by[i] >= *least {
                                s
                            } else {
                                *otherwise
                            }
                        }
                    }
            })
            .collect()
    }
}

impl Part {
    /// The source's scores of all completions, in order.
    fn raw(&self, items: &[Judged<'_>], counts: &[usize]) -> Result<Vec<f64>> {
        let scores = self.source.scores(items)?;
        let given: Vec<usize> = scores.iter().map(Vec::len).collect();
        ensure(given == counts, OP, || {
            format!(
                "`{}` gave {given:?} scores for {counts:?} completions",
                self.name
            )
        })?;
        for (item, own) in items.iter().zip(&scores) {
            if own.iter().any(|s| !s.is_finite()) {
                return Err(Error::NotFinite {
                    what: format!("score of `{}` for row {}", self.name, item.group.row),
                });
            }
        }
        Ok(scores.concat())
    }
}

fn bounds(clip: Option<[f64; 2]>) -> Result<()> {
    let right = clip.is_none_or(|[low, high]| low < high);
    ensure(right, OP, || {
        format!("clip is {clip:?}, expected the lower bound first")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(positive: &[&str]) -> Rule {
        Rule::Words {
            positive: positive.iter().map(|w| (*w).to_owned()).collect(),
            negative: vec![],
        }
    }

    /// Scores of completions of one prompt: text, tokens, how it ends.
    fn scored(mix: &RewardMix, texts: &[(&str, usize, Finish)]) -> Result<Scores> {
        let completion = |n: usize, finish| rlhf_data::group::Completion::whole(vec![1; n], finish);
        let group = PromptGroup {
            row: 7,
            prompt: vec![1],
            completions: texts.iter().map(|t| completion(t.1, t.2)).collect(),
        };
        let texts: Vec<String> = texts.iter().map(|t| t.0.to_owned()).collect();
        let fields = Map::new();
        let item = Judged {
            group: &group,
            prompt: "",
            texts: &texts,
            fields: &fields,
        };
        mix.scores(&[item])
    }

    fn mean(s: &Scores, name: &str) -> f64 {
        s.part_means.iter().find(|p| p.0 == name).unwrap().1
    }

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
    fn a_mix_adds_weighted_parts_and_the_penalty() {
        let mut mix = RewardMix::new(-3.0);
        mix.push(Part::new(2.0, Box::new(words(&["fun"])))).unwrap();
        mix.push(Part::new(0.5, Box::new(words(&["fun"]))).named("again"))
            .unwrap();
        let texts = [("fun", 1, Finish::Stop), ("dull", 1, Finish::Length)];
        let s = scored(&mix, &texts).unwrap();
        // 2·1 + 0.5·1 and 0 − 3.
        assert_eq!(s.total, [[2.5, -3.0]]);
        assert_eq!((mean(&s, "words"), mean(&s, "words_part")), (0.5, 1.0));
        assert_eq!(
            (mean(&s, "again_part"), mean(&s, "eos_penalty")),
            (0.25, 1.5)
        );
    }

    #[test]
    fn gates_open_by_another_part() {
        let mut mix = RewardMix::new(0.0);
        mix.push(Part::new(0.0, Box::new(words(&["right"]))).named("verifier"))
            .unwrap();
        let part = || Part::new(2.0, Box::new(words(&["fun", "nice"])));
        let at_least = Gate::AtLeast {
            by: "verifier".into(),
            least: 1.0,
            otherwise: -1.0,
        };
        mix.push(part().gated(Some(at_least))).unwrap();
        let times = Gate::Times {
            by: "verifier".into(),
        };
        mix.push(part().named("product").gated(Some(times)))
            .unwrap();
        let texts = [
            ("right fun nice", 1, Finish::Stop),
            ("fun nice", 1, Finish::Stop),
        ];
        // 2·2 + 2·2·1, and 2·(−1) + 2·2·0.
        let s = scored(&mix, &texts).unwrap();
        assert_eq!(s.total, [[8.0, -2.0]]);
        assert_eq!(
            (mean(&s, "verifier"), mean(&s, "verifier_part")),
            (0.5, 0.0)
        );
        let late = Gate::Times { by: "later".into() };
        let e = mix.push(part().named("x").gated(Some(late))).unwrap_err();
        assert!(e.to_string().contains("no earlier part"), "{e}");
    }

    #[test]
    fn parts_are_normalised_and_clipped() {
        let mut mix = RewardMix::new(0.0);
        let fixed = Normalize::Fixed {
            mean: 1.0,
            std: 0.5,
        };
        let part = Part::new(1.0, Box::new(words(&["a", "b", "c"])));
        mix.push(part.normalized(fixed).clipped(Some([-1.5, 1.5])))
            .unwrap();
        let texts = [
            ("a b c", 1, Finish::Stop),
            ("a", 1, Finish::Stop),
            ("", 1, Finish::Stop),
        ];
        // (3 − 1)/½ = 4 → 1.5; 0; −2 → −1.5.
        let s = scored(&mix, &texts).unwrap();
        assert_eq!(s.total, [[1.5, 0.0, -1.5]]);
    }

    #[test]
    fn running_norms_go_on_from_their_state() {
        let make = || {
            let mut mix = RewardMix::new(0.0);
            let part = Part::new(1.0, Box::new(words(&["a", "b", "c"])));
            mix.push(part.normalized(Normalize::Running {})).unwrap();
            mix
        };
        let mix = make();
        let first = [("a b c", 1, Finish::Stop), ("a", 1, Finish::Stop)];
        // Scores 3 and 1: mean 2, deviation 1.
        let s = scored(&mix, &first).unwrap();
        assert_eq!(s.total, [[1.0, -1.0]]);
        let saved = serde_json::to_string(&mix.state()).unwrap();
        let second = [("a b", 1, Finish::Stop)];
        // 3, 1, 2: mean 2, so 2 is 0.
        let whole = scored(&mix, &second).unwrap().total;
        assert_eq!(whole, [[0.0]]);
        let again = make();
        again.restore(serde_json::from_str(&saved).unwrap());
        assert_eq!(scored(&again, &second).unwrap().total, whole);
    }

    #[test]
    fn length_distance_and_bounds_cost() {
        let shaping = Shaping {
            token_cost: Some(0.5),
            kl_budget: Some(KlBudget {
                nats: 3.0,
                cost: 2.0,
            }),
            clip: Some([-4.0, 4.0]),
        };
        let mut mix = RewardMix::new(0.0).shaped(shaping).unwrap();
        mix.push(Part::new(1.0, Box::new(words(&["a"])))).unwrap();
        let texts = [("a", 2, Finish::Stop), ("", 10, Finish::Stop)];
        // 1 − 1 = 0; 0 − 5 = −5, cut at −4.
        let s = scored(&mix, &texts).unwrap();
        assert_eq!(s.total, [[0.0, -4.0]]);
        assert_eq!(
            (mean(&s, "length_penalty"), mean(&s, "clipped")),
            (3.0, 0.5)
        );
        // Two nats are free of charge, five cost 2 · (5 − 3).
        assert_eq!(mix.kl_charges(&[2.0, 5.0]), Some(vec![0.0, 4.0]));
        assert_eq!(RewardMix::new(0.0).kl_charges(&[9.0]), None);
        for bad in [
            Shaping {
                clip: Some([1.0, 1.0]),
                ..Shaping::default()
            },
            Shaping {
                token_cost: Some(-1.0),
                ..Shaping::default()
            },
        ] {
            assert!(RewardMix::new(0.0).shaped(bad).is_err());
        }
    }
}
