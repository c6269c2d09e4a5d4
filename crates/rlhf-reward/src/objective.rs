//! What a reward model is trained for: one name for each kind of label, with its loss and its settings.
//!
//! Invariant: every objective is a sum over rows with a weight, so a step does not depend on how it was
//! split. A row that does not fit is refused with its number before anything is trained. The losses
//! themselves are the crate's free functions; here rows become their tensors.

use std::collections::BTreeMap;

use rlhf_data::record::Grade;
use rlhf_kernels::{LossSum, Offsets, Ragged};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::bradley_terry::{self, BradleyTerry};
use crate::difference::{self, DifferenceLoss};
use crate::distributional::{self, Normal};
use crate::error::{Error, Result};
use crate::labels::{Label, Labelled, Rows};
use crate::model::Readout;
use crate::outcome::{self, Pool};
use crate::pairs::{Pairs, Ties};
use crate::process::{self, Aggregate, Neutral};
use crate::regression::{self, Regression};
use crate::{ordinal, plackett_luce};

/// A kind of label with the loss that learns from it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Objective {
    /// Pairs and rankings: [`bradley_terry`], all pairs of a prompt at 1/C(K,2).
    BradleyTerry {
        /// Weight of (r_c + r_r)².
        centering: f64,
        /// The probability that a label is wrong.
        #[serde(default)]
        label_smoothing: f64,
        /// Take labelled margins, and differences of scores, as by how much the chosen should lead.
        #[serde(default)]
        margins: bool,
        /// What becomes of completions of one score.
        #[serde(default = "half")]
        ties: Ties,
    },
    /// Rankings: [`plackett_luce`].
    PlackettLuce {},
    /// Pairs with margins, rankings with scores: [`difference`].
    Difference {
        /// What a difference says.
        form: DifferenceLoss,
    },
    /// A completion's place on a scale: [`ordinal`], thresholds learned.
    Likert {
        /// The rating that is the place.
        attribute: String,
        /// The lowest place.
        low: i64,
        /// The highest place.
        high: i64,
    },
    /// A pair's place on a scale from a tie (margin 0) to the clearest (margin `steps`): [`ordinal`] on the
    /// difference of scores, thresholds learned and the same for both directions.
    LikertPairs {
        /// Places beyond the tie.
        steps: i64,
    },
    /// Ratings of attributes: [`regression`].
    Regression {
        /// Which ratings, in the order of the outputs.
        attributes: Vec<String>,
        /// The weight of each in the loss; 1 where absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        weights: Option<Vec<f64>>,
        /// δ of the Huber loss; squared throughout where absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        huber: Option<f64>,
        /// How they make one reward.
        mix: Mix,
    },
    /// Right and wrong answers: [`outcome`].
    Outcome {
        /// Where it is said.
        said: Said,
    },
    /// Right and wrong steps: [`process`].
    Process {
        /// What a step can be.
        steps: StepClasses,
        /// What stands between steps, and ends each. Of completions to be scored every such token ends a
        /// step, and so does the last.
        separator: String,
        /// One number of a solution's steps.
        aggregate: Aggregate,
    },
    /// Pairs and rankings of rewards with a variance: [`distributional::pairwise`].
    MeanVariancePairs {},
    /// A rating of rewards with a variance: [`distributional::regression`].
    MeanVarianceRatings {
        /// The rating.
        attribute: String,
    },
}

fn half() -> Ties {
    Ties::Half
}

/// How ratings of attributes make one reward.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Mix {
    /// A weight for each attribute.
    Given {
        /// In the order of the attributes.
        weights: Vec<f64>,
    },
    /// The weights that explain preferences best, found when the training is over: logistic regression of
    /// the pairs on the differences of predicted ratings.
    Learned {
        /// λ of the penalty ½ λ |m|².
        ridge: f64,
    },
}

/// Where an outcome is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// At every token; scores are the last one's.
    PerToken,
    /// At the last token.
    Last,
    /// By the mean over tokens.
    Mean,
}

/// What a step can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum StepClasses {
    /// Right with a probability: one output.
    Binary {},
    /// Wrong or right: two outputs, as TRL's `PRMTrainer`.
    Two {},
    /// Wrong, neutral or right: three outputs.
    Three {
        /// What neutral counts as in scores.
        neutral: Neutral,
    },
}

impl StepClasses {
    /// How many outputs.
    #[must_use]
    pub fn outputs(self) -> usize {
        match self {
            Self::Binary {} => 1,
            Self::Two {} => 2,
            Self::Three { .. } => 3,
        }
    }
}

/// Sums by name, each with what it is to be divided by.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tally(BTreeMap<&'static str, (f64, f64)>);

impl Tally {
    /// Adds to a sum.
    pub fn put(&mut self, name: &'static str, sum: f64, weight: f64) {
        let at = self.0.entry(name).or_default();
        at.0 += sum;
        at.1 += weight;
    }

    /// Adds all of another's.
    pub fn add(&mut self, other: &Self) {
        for (&name, (sum, weight)) in &other.0 {
            self.put(name, *sum, *weight);
        }
    }

    /// The means, in the order of names.
    pub fn means(&self) -> impl Iterator<Item = (&'static str, f64)> + '_ {
        self.0
            .iter()
            .map(|(name, (sum, weight))| (*name, sum / weight.max(f64::MIN_POSITIVE)))
    }
}

/// What a batch gives: the loss, and facts for the log.
#[derive(Debug)]
pub struct Step {
    /// The loss.
    pub loss: LossSum,
    /// `accuracy`, `margin` and the like.
    pub tally: Tally,
}

/// Pairs of a batch as tensors.
struct Compared {
    chosen: Tensor,
    rejected: Tensor,
    weights: Tensor,
    preference: Tensor,
    /// Whether every pair is certain: the loss has a shorter way then.
    certain: bool,
    /// By how much, where all say so.
    differences: Option<Tensor>,
}

impl Objective {
    /// The kinds of rows that it learns from, the usual one first.
    #[must_use]
    pub fn rows(&self) -> &'static [Rows] {
        match self {
            Self::BradleyTerry { .. } | Self::Difference { .. } | Self::MeanVariancePairs {} => {
                &[Rows::Preference, Rows::Ranked]
            }
            Self::PlackettLuce {} => &[Rows::Ranked, Rows::Preference],
            Self::LikertPairs { .. } => &[Rows::Preference],
            Self::Likert { .. } | Self::Regression { .. } | Self::MeanVarianceRatings { .. } => {
                &[Rows::Rated]
            }
            Self::Outcome { .. } => &[Rows::Unpaired],
            Self::Process { .. } => &[Rows::Stepwise],
        }
    }

    /// How outputs become scores. `step_end` is the token that ends a step.
    #[must_use]
    pub fn readout(&self, step_end: Option<u32>) -> Readout {
        match self {
            Self::BradleyTerry { .. }
            | Self::PlackettLuce {}
            | Self::Difference { .. }
            | Self::Likert { .. }
            | Self::LikertPairs { .. } => Readout::First { outputs: 1 },
            Self::MeanVariancePairs {} | Self::MeanVarianceRatings { .. } => {
                Readout::First { outputs: 2 }
            }
            Self::Regression {
                attributes, mix, ..
            } => Readout::Mix {
                attributes: attributes.clone(),
                weights: match mix {
                    Mix::Given { weights } => weights.clone(),
                    Mix::Learned { .. } => vec![1.0 / attributes.len() as f64; attributes.len()],
                },
            },
            Self::Outcome { said: Said::Mean } => Readout::MeanOfTokens {},
            Self::Outcome { .. } => Readout::First { outputs: 1 },
            Self::Process {
                steps, aggregate, ..
            } => Readout::Steps {
                steps: *steps,
                aggregate: *aggregate,
                end: step_end,
            },
        }
    }

    /// Where learned thresholds begin (evenly spaced by 1 about 0), for objectives that have any.
    #[must_use]
    pub fn first_thresholds(&self) -> Option<Vec<f64>> {
        // softplus(x) = 1.
        let one = (std::f64::consts::E - 1.0).ln();
        match self {
            Self::Likert { low, high, .. } => {
                let n = usize::try_from(high - low).unwrap_or(0);
                let mut raw = vec![one; n];
                raw[0] = -0.5 * (n as f64 - 1.0);
                Some(raw)
            }
            Self::LikertPairs { steps } => Some(vec![one; usize::try_from(*steps).unwrap_or(0)]),
            _ => None,
        }
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// [`Error::Argument`] with what is wrong.
    pub fn check(&self) -> Result<()> {
        let bad = |what: String| {
            Err(Error::Argument {
                op: "objective",
                what,
            })
        };
        let positive = |name: &str, x: f64| {
            if x > 0.0 && x.is_finite() {
                Ok(())
            } else {
                bad(format!("{name} is {x}, expected more than 0"))
            }
        };
        match self {
            Self::BradleyTerry {
                centering,
                label_smoothing,
                ..
            } => {
                if !(*centering >= 0.0 && centering.is_finite()) {
                    return bad(format!("centering is {centering}, expected 0 or more"));
                }
                if !(0.0..0.5).contains(label_smoothing) {
                    return bad(format!(
                        "label_smoothing is {label_smoothing}, expected 0 <= label_smoothing < 0.5"
                    ));
                }
            }
            Self::Difference {
                form: DifferenceLoss::Soft { temperature },
            } => positive("temperature", *temperature)?,
            Self::Likert { low, high, .. } if !(1..=1000).contains(&(high - low)) => {
                return bad(format!("a scale from {low} to {high} has no two places"));
            }
            Self::LikertPairs { steps } if !(1..=1000).contains(steps) => {
                return bad(format!("steps is {steps}, expected 1 or more"));
            }
            Self::Regression {
                attributes,
                weights,
                huber,
                mix,
            } => {
                let n = attributes.len();
                if n == 0 {
                    return bad("no attributes".into());
                }
                if let Some(a) = attributes
                    .iter()
                    .enumerate()
                    .find_map(|(i, a)| attributes[..i].contains(a).then_some(a))
                {
                    return bad(format!("attribute `{a}` is named twice"));
                }
                if let Some(d) = huber {
                    positive("huber", *d)?;
                }
                let given = match mix {
                    Mix::Given { weights } => Some(weights),
                    Mix::Learned { ridge } => {
                        positive("mix.ridge", *ridge)?;
                        None
                    }
                };
                for (name, list) in [("weights", weights.as_ref()), ("mix.weights", given)] {
                    let Some(list) = list else { continue };
                    if list.len() != n || list.iter().any(|w| !w.is_finite()) {
                        return bad(format!(
                            "{name} is {list:?}, expected a finite number for each of {n} attributes"
                        ));
                    }
                }
                if weights.iter().flatten().any(|w| *w < 0.0) {
                    return bad("weights: one is negative".into());
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Checks that every row has the labels that the objective asks for.
    ///
    /// # Errors
    /// [`Error::Row`] for the first that has not, with its number in the file.
    pub fn check_rows(&self, rows: &[Labelled]) -> Result<()> {
        rows.iter().try_for_each(|row| {
            let what = if row.weight >= 0.0 && row.weight.is_finite() {
                self.problem(row)
            } else {
                Some(format!("the weight is {}, expected 0 or more", row.weight))
            };
            match what {
                None => Ok(()),
                Some(what) => Err(Error::Row {
                    row: row.group.row,
                    what,
                }),
            }
        })
    }

    /// What is wrong with a row, if anything.
    fn problem(&self, row: &Labelled) -> Option<String> {
        let completions = row.group.completions.len();
        if completions
            != match &row.label {
                Label::Pair { .. } => 2,
                Label::Ranking { scores } => scores.as_ref().map_or(completions, Vec::len),
                Label::Ratings(_) | Label::Outcome(_) | Label::Steps { .. } => 1,
            }
        {
            return Some(format!("{completions} completions do not fit the label"));
        }
        match (self, &row.label) {
            (
                Self::BradleyTerry { .. }
                | Self::PlackettLuce {}
                | Self::Difference { .. }
                | Self::MeanVariancePairs {}
                | Self::LikertPairs { .. },
                Label::Pair { margin, preference },
            ) => self.pair_problem(*margin, *preference),
            (
                Self::BradleyTerry { .. }
                | Self::PlackettLuce {}
                | Self::Difference { .. }
                | Self::MeanVariancePairs {},
                Label::Ranking { scores },
            ) => self.ranking_problem(completions, scores.as_deref()),
            (
                Self::Likert {
                    attribute,
                    low,
                    high,
                },
                Label::Ratings(ratings),
            ) => match ratings.get(attribute) {
                None => Some(format!("no rating `{attribute}`")),
                Some(x) if x.fract() != 0.0 || *x < *low as f64 || *x > *high as f64 => {
                    Some(format!(
                        "`{attribute}` is {x}, outside its scale: a whole number from {low} to {high}"
                    ))
                }
                Some(_) => None,
            },
            (Self::MeanVarianceRatings { attribute }, Label::Ratings(ratings)) => {
                match ratings.get(attribute) {
                    Some(x) if x.is_finite() => None,
                    Some(x) => Some(format!("`{attribute}` is {x}, expected a finite number")),
                    None => Some(format!("no rating `{attribute}`")),
                }
            }
            (Self::Regression { attributes, .. }, Label::Ratings(ratings)) => {
                let there = |a: &&String| ratings.contains_key(*a);
                if !attributes.iter().any(|a| there(&a)) {
                    return Some(format!("none of the ratings {}", attributes.join(", ")));
                }
                attributes
                    .iter()
                    .filter(there)
                    .find(|a| !ratings[*a].is_finite())
                    .map(|a| format!("`{a}` is {}, expected a finite number", ratings[a]))
            }
            (Self::Outcome { .. }, Label::Outcome(p)) => (!(0.0..=1.0).contains(p))
                .then(|| format!("the label is {p}, expected a probability, 0 to 1")),
            (Self::Process { steps, .. }, Label::Steps { ends, grades }) => {
                let length = row.group.completions[0].ids.len();
                if ends.is_empty() || ends.len() != grades.len() {
                    return Some(format!("{} steps with {} labels", ends.len(), grades.len()));
                }
                if ends.iter().any(|e| *e >= length) {
                    return Some(format!("a step ends beyond the solution's {length} tokens"));
                }
                grades
                    .iter()
                    .position(|g| grade(*steps, *g).is_none())
                    .map(|i| {
                        let scale = match steps {
                            StepClasses::Binary {} => "true, false, or a probability, 0 to 1",
                            StepClasses::Two {} => "true or false, 1 or 0",
                            StepClasses::Three { .. } => "−1, 0 or 1, true or false",
                        };
                        format!(
                            "the label of step {i} is {:?}, outside its scale: {scale}",
                            grades[i]
                        )
                    })
            }
            (_, label) => Some(format!(
                "the row is {}, the objective asks for {}",
                label_kind(label),
                self.rows()
                    .iter()
                    .map(|r| r.name())
                    .collect::<Vec<_>>()
                    .join(" or ")
            )),
        }
    }

    fn pair_problem(&self, margin: Option<f64>, preference: f64) -> Option<String> {
        if let Some(m) = margin.filter(|m| !m.is_finite()) {
            return Some(format!("the margin is {m}, expected a finite number"));
        }
        if !(0.0..=1.0).contains(&preference) {
            return Some(format!(
                "the preference is {preference}, expected a probability, 0 to 1"
            ));
        }
        match (self, margin) {
            (Self::BradleyTerry { margins: false, .. } | Self::MeanVariancePairs {}, _) => None,
            (Self::PlackettLuce {}, _) => {
                (preference != 1.0).then(|| "an uncertain pair is no ranking".into())
            }
            (_, None) => Some("no margin, which the objective asks for".into()),
            (Self::LikertPairs { steps }, Some(m)) => (m.fract() != 0.0
                || m < 0.0
                || m > *steps as f64)
                .then(|| format!("the margin is {m}, outside its scale: a whole number from 0 (a tie) to {steps}")),
            (
                Self::Difference {
                    form: DifferenceLoss::Scaled {},
                },
                Some(m),
            ) if m < 0.0 => Some(format!("the margin is {m}: exchange chosen and rejected")),
            _ => None,
        }
    }

    fn ranking_problem(&self, completions: usize, scores: Option<&[f64]>) -> Option<String> {
        if completions < 2 {
            return Some(format!(
                "a ranking of {completions} completion, expected at least 2"
            ));
        }
        let scored = match self {
            Self::Difference { .. } => true,
            Self::BradleyTerry { margins, .. } => *margins,
            _ => false,
        };
        let Some(scores) = scores else {
            return scored.then(|| "no scores, which the objective asks for".into());
        };
        if let Some(x) = scores.iter().find(|x| !x.is_finite()) {
            return Some(format!("a score is {x}, expected a finite number"));
        }
        let mut sorted = scores.to_vec();
        sorted.sort_by(f64::total_cmp);
        let tied = sorted.windows(2).any(|w| w[0] == w[1]);
        (tied && *self == Self::PlackettLuce {}).then(|| {
            "two completions have one score; a ranking has no ties (bradley_terry has)".into()
        })
    }

    /// Which rows of a packed batch it looks at, and how many of them are each completion's. `spans` are the
    /// completions' rows in the batch.
    pub(crate) fn places(
        &self,
        rows: &[&Labelled],
        spans: impl Iterator<Item = std::ops::Range<usize>>,
    ) -> (Vec<i64>, Vec<i64>) {
        let every_token = matches!(
            self,
            Self::Outcome {
                said: Said::PerToken | Said::Mean
            }
        );
        let labels = rows
            .iter()
            .flat_map(|r| std::iter::repeat_n(&r.label, r.group.completions.len()));
        let (mut places, mut lengths) = (Vec::new(), Vec::new());
        for (span, label) in spans.zip(labels) {
            let before = places.len();
            match label {
                Label::Steps { ends, .. } => {
                    places.extend(ends.iter().map(|e| (span.start + e) as i64));
                }
                _ if every_token => places.extend(span.map(|r| r as i64)),
                _ => places.push(span.end as i64 - 1),
            }
            lengths.push((places.len() - before) as i64);
        }
        (places, lengths)
    }

    /// The loss of `rows`, whose completions' outputs are `outputs` `[R, W]` at [`Objective::places`],
    /// `lengths` of them a completion; `weights` counts each row.
    pub(crate) fn step(
        &self,
        rows: &[&Labelled],
        outputs: &Tensor,
        lengths: &[i64],
        thresholds: Option<&Tensor>,
        weights: &[f64],
    ) -> Result<Step> {
        let number = |v: &[f64]| {
            Tensor::from_slice(v)
                .to_kind(outputs.kind())
                .to_device(outputs.device())
        };
        let whole = |v: &[i64]| Tensor::from_slice(v).to_device(outputs.device());
        let column = |i: i64| outputs.select(1, i);
        let mut tally = Tally::default();
        let loss = match self {
            Self::BradleyTerry {
                centering,
                label_smoothing,
                margins,
                ties,
            } => {
                let pairs = compared(rows, weights, *ties, &number, &whole)?;
                let scores = column(0);
                let (c, r) = pairs.both(&scores);
                count_pairs(&c, &r, &pairs.preference, &mut tally);
                let settings = BradleyTerry {
                    margin: pairs.differences.as_ref().filter(|_| *margins),
                    weights: Some(&pairs.weights),
                    preference: (!pairs.certain).then_some(&pairs.preference),
                    centering: *centering,
                    label_smoothing: *label_smoothing,
                };
                bradley_terry::loss(&c, &r, &settings)?
            }
            Self::PlackettLuce {} => {
                let (order, sizes) = best_first(rows);
                let scores = column(0).index_select(0, &whole(&order));
                let pairs = compared(rows, weights, Ties::Dropped, &number, &whole)?;
                let (c, r) = pairs.both(&column(0));
                count_pairs(&c, &r, &pairs.preference, &mut tally);
                plackett_luce::loss(
                    &Ragged::new(scores, Offsets::from_lengths(&sizes)?)?,
                    Some(&number(weights)),
                )?
            }
            Self::Difference { form } => {
                let pairs = compared(rows, weights, Ties::Half, &number, &whole)?;
                let (c, r) = pairs.both(&column(0));
                count_pairs(&c, &r, &pairs.preference, &mut tally);
                let differences = pairs.differences.as_ref().ok_or(Error::NotPairs)?;
                difference::loss(&c, &r, differences, *form, Some(&pairs.weights))?
            }
            Self::MeanVariancePairs {} => {
                let pairs = compared(rows, weights, Ties::Dropped, &number, &whole)?;
                let ((mc, mr), (vc, vr)) = (pairs.both(&column(0)), pairs.both(&column(1)));
                count_pairs(&mc, &mr, &pairs.preference, &mut tally);
                let deviation = (column(1).detach() * 0.5).exp();
                tally.put("std", total(&deviation), deviation.numel() as f64);
                let normal = |mean, log_variance| Normal { mean, log_variance };
                // p log Φ(z) + (1−p) log Φ(−z), each direction with its share of the weight.
                let forth = &pairs.preference * &pairs.weights;
                let back = (1.0 - &pairs.preference) * &pairs.weights;
                let a = distributional::pairwise(normal(&mc, &vc), normal(&mr, &vr), Some(&forth))?;
                let b = distributional::pairwise(normal(&mr, &vr), normal(&mc, &vc), Some(&back))?;
                LossSum {
                    sum: a.sum + b.sum,
                    weight: a.weight + b.weight,
                }
            }
            Self::LikertPairs { steps } => {
                let pairs = compared(rows, weights, Ties::Half, &number, &whole)?;
                let (c, r) = pairs.both(&column(0));
                count_pairs(&c, &r, &pairs.preference, &mut tally);
                let differences = pairs.differences.as_ref().ok_or(Error::NotPairs)?;
                let labels = (differences + *steps as f64).to_kind(Kind::Int64);
                let theta = ordinal::symmetric_thresholds(thresholds.ok_or(Error::NotPairs)?)?;
                let location = c - r;
                count_labels(&location, &labels, &theta, &mut tally)?;
                ordinal::loss(&location, &labels, &theta, Some(&pairs.weights))?
            }
            Self::Likert { attribute, low, .. } => {
                let labels: Vec<i64> = ratings(rows)
                    .map(|r| r.get(attribute).map_or(0, |x| *x as i64) - low)
                    .collect();
                let labels = whole(&labels);
                let theta = ordinal::thresholds(thresholds.ok_or(Error::NotPairs)?)?;
                count_labels(&column(0), &labels, &theta, &mut tally)?;
                ordinal::loss(&column(0), &labels, &theta, Some(&number(weights)))?
            }
            Self::Regression {
                attributes,
                weights: attribute_weights,
                huber,
                ..
            } => {
                let size = [rows.len() as i64, attributes.len() as i64];
                let cells =
                    ratings(rows).flat_map(|r| attributes.iter().map(|a| r.get(a).copied()));
                let (present, targets): (Vec<bool>, Vec<f64>) =
                    cells.map(|c| (c.is_some(), c.unwrap_or(0.0))).unzip();
                let present = Tensor::from_slice(&present)
                    .view(size)
                    .to_device(outputs.device());
                let targets = number(&targets).view(size);
                let error =
                    (outputs.detach() - &targets).square() * present.to_kind(outputs.kind());
                tally.put("mse", total(&error), total(&present));
                let (row_weights, per) =
                    (number(weights), attribute_weights.as_deref().map(number));
                regression::loss(
                    outputs,
                    &targets,
                    &Regression {
                        present: Some(&present),
                        attribute_weights: per.as_ref(),
                        weights: Some(&row_weights),
                        huber: *huber,
                    },
                )?
            }
            Self::MeanVarianceRatings { attribute } => {
                let targets: Vec<f64> = ratings(rows)
                    .map(|r| r.get(attribute).copied().unwrap_or(0.0))
                    .collect();
                let targets = number(&targets);
                let error = (column(0).detach() - &targets).square();
                tally.put("mse", total(&error), error.numel() as f64);
                let (mean, log_variance) = (column(0), column(1));
                let deviation = (log_variance.detach() * 0.5).exp();
                tally.put("std", total(&deviation), deviation.numel() as f64);
                let predicted = Normal {
                    mean: &mean,
                    log_variance: &log_variance,
                };
                distributional::regression(predicted, &targets, Some(&number(weights)))?
            }
            Self::Outcome { said } => {
                let correct: Vec<f64> = rows
                    .iter()
                    .map(|r| match r.label {
                        Label::Outcome(p) => p,
                        _ => 0.0,
                    })
                    .collect();
                let correct = number(&correct);
                let logits = Ragged::new(column(0), Offsets::from_lengths(lengths)?)?;
                let pool = if *said == Said::Mean {
                    Pool::Mean
                } else {
                    Pool::Last
                };
                let one = outcome::pool_logits(&logits, pool)?;
                count_binary(&one, &correct, &mut tally);
                let weights = number(weights);
                match said {
                    Said::PerToken => outcome::per_token(&logits, &correct, Some(&weights))?,
                    Said::Last | Said::Mean => {
                        outcome::pooled(&logits, &correct, pool, Some(&weights))?
                    }
                }
            }
            Self::Process { steps, .. } => {
                let (mut labels, mut per_step) = (Vec::new(), Vec::new());
                for (row, w) in rows.iter().zip(weights) {
                    if let Label::Steps { grades, .. } = &row.label {
                        labels.extend(grades.iter().filter_map(|g| grade(*steps, *g)));
                        per_step.resize(labels.len(), *w);
                    }
                }
                let per_step = number(&per_step);
                match steps {
                    StepClasses::Binary {} => {
                        let labels = number(&labels);
                        count_binary(&column(0), &labels, &mut tally);
                        process::binary_loss(&column(0), &labels, Some(&per_step))?
                    }
                    StepClasses::Two {} | StepClasses::Three { .. } => {
                        let labels = whole(&labels.iter().map(|l| *l as i64).collect::<Vec<_>>());
                        let said = outputs.argmax(1, false).eq_tensor(&labels);
                        tally.put("accuracy", total(&said), said.numel() as f64);
                        process::loss(outputs, &labels, Some(&per_step))?
                    }
                }
            }
        };
        Ok(Step { loss, tally })
    }
}

/// The class of a grade (worst first), or its probability of being right where steps are binary.
fn grade(steps: StepClasses, grade: Grade) -> Option<f64> {
    match (steps, grade) {
        (StepClasses::Binary {} | StepClasses::Two {}, Grade::Flag(right)) => {
            Some(f64::from(u8::from(right)))
        }
        (StepClasses::Binary {}, Grade::Number(p)) => (0.0..=1.0).contains(&p).then_some(p),
        (StepClasses::Two {}, Grade::Number(x)) => (x == 0.0 || x == 1.0).then_some(x),
        (StepClasses::Three { .. }, Grade::Flag(right)) => Some(if right { 2.0 } else { 0.0 }),
        (StepClasses::Three { .. }, Grade::Number(x)) => {
            [-1.0, 0.0, 1.0].contains(&x).then_some(x + 1.0)
        }
    }
}

fn label_kind(label: &Label) -> &'static str {
    match label {
        Label::Pair { .. } => Rows::Preference,
        Label::Ranking { .. } => Rows::Ranked,
        Label::Ratings(_) => Rows::Rated,
        Label::Outcome(_) => Rows::Unpaired,
        Label::Steps { .. } => Rows::Stepwise,
    }
    .name()
}

fn ratings<'a>(rows: &'a [&Labelled]) -> impl Iterator<Item = &'a BTreeMap<String, f64>> + 'a {
    rows.iter().filter_map(|r| match &r.label {
        Label::Ratings(ratings) => Some(ratings),
        _ => None,
    })
}

/// Completions of each ranking as indices, best first, and how many there are.
fn best_first(rows: &[&Labelled]) -> (Vec<i64>, Vec<i64>) {
    let (mut order, mut sizes, mut start) = (Vec::new(), Vec::new(), 0);
    for row in rows {
        let n = row.group.completions.len();
        let mut own: Vec<usize> = (0..n).collect();
        if let Label::Ranking { scores: Some(s) } = &row.label {
            own.sort_by(|&a, &b| s[b].total_cmp(&s[a]));
        }
        order.extend(own.iter().map(|i| (start + i) as i64));
        sizes.push(n as i64);
        start += n;
    }
    (order, sizes)
}

/// All pairs of a batch.
fn compared(
    rows: &[&Labelled],
    row_weights: &[f64],
    ties: Ties,
    number: &impl Fn(&[f64]) -> Tensor,
    whole: &impl Fn(&[i64]) -> Tensor,
) -> Result<Compared> {
    let (mut chosen, mut rejected) = (Vec::new(), Vec::new());
    let (mut weights, mut preference, mut differences) = (Vec::new(), Vec::new(), Vec::new());
    let mut start = 0i64;
    for (row, w) in rows.iter().zip(row_weights) {
        let n = row.group.completions.len() as i64;
        match &row.label {
            Label::Pair {
                margin,
                preference: p,
            } => {
                chosen.push(start);
                rejected.push(start + 1);
                weights.push(*w);
                preference.push(*p);
                differences.extend(*margin);
            }
            Label::Ranking { scores } => {
                let worth: Vec<f64> = match scores {
                    Some(s) => s.clone(),
                    None => (0..n).map(|i| (n - i) as f64).collect(),
                };
                let own = Pairs::of_labels(&worth, &Offsets::from_lengths(&[n])?, ties)?;
                if scores.is_some() {
                    differences.extend(
                        own.chosen
                            .iter()
                            .zip(&own.rejected)
                            .map(|(c, r)| worth[*c as usize] - worth[*r as usize]),
                    );
                }
                chosen.extend(own.chosen.iter().map(|i| start + i));
                rejected.extend(own.rejected.iter().map(|i| start + i));
                weights.extend(own.weights.iter().map(|x| x * w));
                preference.extend(own.preference);
            }
            _ => return Err(Error::NotPairs),
        }
        start += n;
    }
    let all = differences.len() == chosen.len();
    Ok(Compared {
        certain: preference.iter().all(|p| *p == 1.0),
        chosen: whole(&chosen),
        rejected: whole(&rejected),
        weights: number(&weights),
        preference: number(&preference),
        differences: all.then(|| number(&differences)),
    })
}

impl Compared {
    /// A number of each pair's chosen and rejected.
    fn both(&self, of: &Tensor) -> (Tensor, Tensor) {
        (
            of.index_select(0, &self.chosen),
            of.index_select(0, &self.rejected),
        )
    }
}

fn total(t: &Tensor) -> f64 {
    t.sum(Kind::Double).double_value(&[])
}

/// Accuracy over pairs that lean to one side, and the mean lead of the chosen.
fn count_pairs(chosen: &Tensor, rejected: &Tensor, preference: &Tensor, into: &mut Tally) {
    let gap = (chosen.detach() - rejected.detach()).to_kind(Kind::Double);
    let lean = (preference - 0.5).sign();
    let leaning = lean.abs();
    let right = (gap.sign() * &lean + 1.0) * 0.5 * &leaning;
    into.put("accuracy", total(&right), total(&leaning));
    into.put("margin", total(&gap), gap.numel() as f64);
}

/// How often the likelier side of a probability is the labelled one.
fn count_binary(logits: &Tensor, labels: &Tensor, into: &mut Tally) {
    let right = (logits.detach().sign() * (labels - 0.5).sign() + 1.0) * 0.5;
    into.put("accuracy", total(&right), right.numel() as f64);
}

/// How often the likeliest label is the right one.
fn count_labels(
    location: &Tensor,
    labels: &Tensor,
    thresholds: &Tensor,
    into: &mut Tally,
) -> Result<()> {
    let said = ordinal::probabilities(&location.detach(), thresholds)?.argmax(1, false);
    let right = said.eq_tensor(labels);
    into.put("label_accuracy", total(&right), right.numel() as f64);
    Ok(())
}
