//! Solutions judged step by step: PRM800K.

use serde_json::Value;

use super::cell::{Cell, Columns, cell, optional, provenance, row};
use crate::record::Fault;

/// Bytes that the paths of one problem may have together: each repeats what it goes on from.
const MAX_BYTES: usize = 64 << 20;

pub(super) fn prm800k(from: &Columns) -> Result<Vec<Columns>, Fault> {
    let problem = cell(from, "question")?.field("problem")?.filled()?;
    let mut taken: Vec<(String, bool)> = Vec::new();
    let (mut rows, mut bytes) = (Vec::new(), 0);
    // Whether a row that was made already holds all of the taken path.
    let mut covered = true;
    for step in cell(from, "label")?.field("steps")?.items()? {
        let completions = match step.maybe("completions") {
            Some(list) => list.items()?,
            None => Vec::new(),
        };
        let chosen = match step.maybe("chosen_completion") {
            Some(i) => Some(i.index(completions.len())?),
            None => None,
        };
        for (i, other) in completions.iter().enumerate() {
            if Some(i) != chosen
                && let Some(judged) = judged(other)?
            {
                let path: Vec<_> = taken.iter().cloned().chain([judged]).collect();
                bytes += problem.len() + path.iter().map(|(t, _)| t.len() + 64).sum::<usize>();
                if bytes > MAX_BYTES {
                    let what = format!("paths of more than {} MiB together", MAX_BYTES >> 20);
                    return Err(step.fault("over_long", what));
                }
                rows.push(path_row(from, problem, &path));
                covered = true;
            }
        }
        let next = match chosen.and_then(|i| completions.get(i)) {
            Some(c) => judged(c)?,
            None => match step.maybe("human_completion") {
                Some(written) => Some((written.field("text")?.text()?.to_owned(), true)),
                None => None,
            },
        };
        // What nobody went on from is the end.
        let Some(next) = next else { break };
        taken.push(next);
        covered = false;
    }
    if !covered {
        rows.push(path_row(from, problem, &taken));
    }
    Ok(rows)
}

/// A step's text and whether it is good, unless it was not rated.
fn judged(completion: &Cell<'_>) -> Result<Option<(String, bool)>, Fault> {
    let Some(rating) = completion.maybe("rating") else {
        return Ok(None);
    };
    let good = match rating.number()? {
        1.0 | 0.0 => true,
        -1.0 => false,
        other => {
            return Err(rating.fault("out_of_range", format!("{other}, expected -1, 0 or 1")));
        }
    };
    Ok(Some((completion.field("text")?.text()?.to_owned(), good)))
}

fn path_row(from: &Columns, problem: &str, path: &[(String, bool)]) -> Columns {
    let mut to = row([
        ("prompt", problem.into()),
        (
            "completions",
            path.iter().map(|(t, _)| Value::from(t.as_str())).collect(),
        ),
        (
            "labels",
            path.iter().map(|(_, good)| Value::from(*good)).collect(),
        ),
    ]);
    provenance(&mut to, from, &[("labeler", "annotator")]);
    if let Some(answer) = optional(from, "question").and_then(|q| q.maybe("ground_truth_answer")) {
        to.insert("answer".into(), answer.value().clone());
    }
    to
}
