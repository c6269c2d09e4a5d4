//! Numbers that are none and texts without end, in any column.

use serde_json::{Map, Value};

/// Columns that hold scores by convention. A margin that is no number already stops a preference row.
pub(crate) const SCORES: [&str; 13] = [
    "score",
    "scores",
    "score_chosen",
    "score_rejected",
    "chosen_score",
    "rejected_score",
    "rating",
    "ratings",
    "chosen_rating",
    "rejected_rating",
    "reward",
    "rewards",
    "margin",
];

/// The first value of a score that is not finite, as text. JSON has no such numbers: they come as text
/// from Parquet and from some writers of JSON.
fn not_finite(v: &Value) -> Option<&str> {
    match v {
        Value::String(s) => s
            .trim()
            .parse::<f64>()
            .is_ok_and(|x| !x.is_finite())
            .then_some(s.as_str()),
        Value::Array(list) => list.iter().find_map(not_finite),
        Value::Object(map) => map.values().find_map(not_finite),
        _ => None,
    }
}

/// Score columns with a value that is not finite, and that value.
pub(super) fn not_finite_columns(row: &Map<String, Value>) -> Vec<(&'static str, String)> {
    SCORES
        .into_iter()
        .filter_map(|c| Some((c, not_finite(row.get(c)?)?.to_owned())))
        .collect()
}

fn characters(v: &Value) -> usize {
    match v {
        Value::String(s) => s.chars().count(),
        Value::Array(list) => list.iter().map(characters).sum(),
        Value::Object(map) => map.values().map(characters).sum(),
        _ => 0,
    }
}

/// Columns with more than `limit` characters, and how many.
pub(super) fn over_long(row: &Map<String, Value>, limit: usize) -> Vec<(String, usize)> {
    row.iter()
        .map(|(c, v)| (c.clone(), characters(v)))
        .filter(|(_, n)| *n > limit)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_scores_are_judged_and_only_what_is_no_number() {
        let row = json!({"score_chosen": "NaN", "scores": [1.0, "-inf"], "rating": null, "reward": "5", "prompt": "nan"});
        assert_eq!(
            not_finite_columns(row.as_object().unwrap()),
            [
                ("scores", "-inf".to_owned()),
                ("score_chosen", "NaN".to_owned())
            ]
        );
        let row = json!({"prompt": "äöü", "messages": [{"role": "user", "content": "ab"}]});
        assert_eq!(over_long(row.as_object().unwrap(), 6), []);
        assert_eq!(
            over_long(row.as_object().unwrap(), 5),
            [("messages".to_owned(), 6)]
        );
    }
}
