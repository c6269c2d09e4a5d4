//! From one kind of preference data to another.

use super::{PreferenceRecord, RankedRecord, RatedRecord, UnpairedRecord};
use crate::conversation::Text;
use crate::seed::{Purpose, Stream};

/// Which pairs a ranking gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pairing {
    /// Every two of different score: K(K−1)/2 (InstructGPT, Ouyang et al. 2022).
    All,
    /// The best against one of the worse, drawn at random (UltraFeedback binarized, Tunstall et al. 2023).
    BestVsRandom,
    /// Each against the next worse one.
    Adjacent,
}

/// The pairs of a ranking, one at a time: K completions give up to K(K−1)/2. The margin is the difference
/// of the scores. A tie gives no pair. `seed` and `row` (the ranking's place in its file) decide what is
/// drawn at random.
pub fn ranked_to_pairs(
    r: &RankedRecord,
    pairing: Pairing,
    seed: u64,
    row: u64,
) -> impl Iterator<Item = PreferenceRecord> + '_ {
    let worth = r.worth();
    let mut order: Vec<usize> = (0..r.completions.len().min(worth.len())).collect();
    // Stable: completions of one score stay in their order.
    order.sort_by(|&a, &b| worth[b].total_cmp(&worth[a]));
    let k = order.len();
    // The first completion that is worse than the best.
    let worse = order.partition_point(|&i| worth[i] >= worth[order[0]]);
    let drawn = (worse < k).then(|| {
        let stream = Stream::new(seed, Purpose::Pairing);
        worse + stream.below((k - worse) as u64, row, 0, 0) as usize
    });
    let last = move |i: usize| match pairing {
        Pairing::All => k,
        Pairing::Adjacent => (i + 2).min(k),
        Pairing::BestVsRandom => drawn.filter(|_| i == 0).map_or(0, |d| d + 1),
    };
    let first = move |i: usize| match pairing {
        Pairing::All | Pairing::Adjacent => i + 1,
        Pairing::BestVsRandom => drawn.unwrap_or(k),
    };
    (0..k)
        .flat_map(move |i| (first(i)..last(i)).map(move |j| (i, j)))
        .map(move |(i, j)| (order[i], order[j]))
        .filter(move |&(a, b)| worth[a] > worth[b])
        .map(|(chosen, rejected)| PreferenceRecord {
            prompt: r.prompt.clone(),
            chosen: r.completions[chosen].clone(),
            rejected: r.completions[rejected].clone(),
            margin: r
                .scores
                .as_ref()
                .map(|scores| scores[chosen] - scores[rejected]),
        })
}

/// A pair as a thumb up and a thumb down.
#[must_use]
pub fn pair_to_unpaired(p: &PreferenceRecord) -> [UnpairedRecord; 2] {
    [(&p.chosen, true), (&p.rejected, false)].map(|(completion, label)| UnpairedRecord {
        prompt: p.prompt.clone(),
        completion: completion.clone(),
        label,
    })
}

/// Pairs from thumbs: for each prompt its first good completion with its first bad one, the second with
/// the second, and so on; what is left over gives no pair. In the order in which the later half came.
#[must_use]
pub fn unpaired_to_pairs(rows: &[UnpairedRecord]) -> Vec<PreferenceRecord> {
    let mut waiting: std::collections::HashMap<&Text, [std::collections::VecDeque<&Text>; 2]> =
        std::collections::HashMap::new();
    let mut pairs = Vec::new();
    for r in rows {
        let queues = waiting.entry(&r.prompt).or_default();
        let other = &mut queues[usize::from(!r.label)];
        match other.pop_front() {
            None => queues[usize::from(r.label)].push_back(&r.completion),
            Some(mate) => {
                let (chosen, rejected) = if r.label {
                    (&r.completion, mate)
                } else {
                    (mate, &r.completion)
                };
                pairs.push(PreferenceRecord {
                    prompt: r.prompt.clone(),
                    chosen: chosen.clone(),
                    rejected: rejected.clone(),
                    margin: None,
                });
            }
        }
    }
    pairs
}

/// A scale from "A is much better" (1) to "B is much better" (the last point).
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Likert {
    /// 1 to 5; 3 is a tie.
    Five,
    /// 1 to 8; there is no tie (Bai et al. 2022).
    Eight,
}

impl Likert {
    /// Distance from the middle: 2 to −2, or 3.5 to −3.5; positive when A is better. `None` off the
    /// scale.
    #[must_use]
    pub fn strength(self, value: i64) -> Option<f64> {
        let points = match self {
            Self::Five => 5,
            Self::Eight => 8,
        };
        (1..=points)
            .contains(&value)
            .then(|| (points + 1) as f64 / 2.0 - value as f64)
    }
}

/// A judgement of A and B on a scale as a pair whose margin is its strength; a tie, or a value off the
/// scale, gives none.
#[must_use]
pub fn likert_to_pair(
    prompt: &Text,
    a: &Text,
    b: &Text,
    scale: Likert,
    value: i64,
) -> Option<PreferenceRecord> {
    let strength = scale.strength(value).filter(|s| *s != 0.0)?;
    let (chosen, rejected) = if strength > 0.0 { (a, b) } else { (b, a) };
    Some(PreferenceRecord {
        prompt: prompt.clone(),
        chosen: chosen.clone(),
        rejected: rejected.clone(),
        margin: Some(strength.abs()),
    })
}

/// A rated completion as a thumb: up when `attribute` is at least `threshold`; `None` without it.
#[must_use]
pub fn rated_to_unpaired(
    r: &RatedRecord,
    attribute: &str,
    threshold: f64,
) -> Option<UnpairedRecord> {
    Some(UnpairedRecord {
        prompt: r.prompt.clone(),
        completion: r.completion.clone(),
        label: *r.ratings.get(attribute)? >= threshold,
    })
}

/// Rated completions as rankings by `attribute`, one for each prompt with at least two of them, in the
/// order of the prompts' first rows. Rows without the attribute are left out.
#[must_use]
pub fn rated_to_ranked(rows: &[RatedRecord], attribute: &str) -> Vec<RankedRecord> {
    let mut at: std::collections::HashMap<&Text, usize> = std::collections::HashMap::new();
    let mut all: Vec<RankedRecord> = Vec::new();
    for r in rows {
        let Some(score) = r.ratings.get(attribute) else {
            continue;
        };
        let i = *at.entry(&r.prompt).or_insert_with(|| {
            all.push(RankedRecord {
                prompt: r.prompt.clone(),
                completions: Vec::new(),
                scores: Some(Vec::new()),
            });
            all.len() - 1
        });
        all[i].completions.push(r.completion.clone());
        if let Some(scores) = &mut all[i].scores {
            scores.push(*score);
        }
    }
    all.retain(|r| r.completions.len() > 1);
    all
}
