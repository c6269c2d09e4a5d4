//! Groups laid end to end without padding: the prompt once, then its completions.
//!
//! Invariant: a token that is not trained is not among the targets at all, so there is no mask.
//! Positions restart after the prompt for each completion. Knows nothing of devices.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::error::{Error, Result};
use crate::group::PromptGroup;
use crate::order::Permutation;

/// Where one group lies in a [`PackedBatch`], as ranges of packed rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupSpan {
    /// The prompt's rows; may be empty.
    pub prompt: Range<usize>,
    /// Each completion's rows.
    pub completions: Vec<Range<usize>>,
}

/// Many groups as one sequence of N packed rows with M targets over S completions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedBatch {
    /// `[N]` token ids: `[prompt₀ c₀₀ c₀₁ … | prompt₁ c₁₀ …]`.
    pub token_ids: Vec<i64>,
    /// `[N]` positions within (prompt, completion).
    pub positions: Vec<i64>,
    /// Where each group lies.
    pub groups: Vec<GroupSpan>,
    /// `[M]` rows whose *next* token is trained. The last row of a prompt stands here once for each
    /// of its completions.
    pub target_rows: Vec<i64>,
    /// `[M]` that next token.
    pub target_ids: Vec<i64>,
    /// `[S+1]` completion `s` owns targets `offsets[s]..offsets[s+1]`.
    pub offsets: Vec<i64>,
    /// Source row of each group.
    pub rows: Vec<u64>,
}

impl PackedBatch {
    /// Packs `groups` in their order.
    ///
    /// The first token of a completion is predicted by the last row of its prompt; with an empty
    /// prompt nothing predicts it, and it is no target.
    ///
    /// # Errors
    /// [`Error::Invalid`] when `groups` is empty or a group breaks its invariants.
    pub fn pack(groups: &[PromptGroup]) -> Result<Self> {
        if groups.is_empty() {
            return Err(Error::Invalid {
                what: "a batch of no groups".into(),
                mend: "give at least one prompt with a completion".into(),
            });
        }
        let n = groups.iter().map(PromptGroup::num_tokens).sum();
        let mut batch = Self {
            token_ids: Vec::with_capacity(n),
            positions: Vec::with_capacity(n),
            groups: Vec::with_capacity(groups.len()),
            target_rows: Vec::with_capacity(n),
            target_ids: Vec::with_capacity(n),
            offsets: vec![0],
            rows: Vec::with_capacity(groups.len()),
        };
        for group in groups {
            group.validate()?;
            batch.push(group);
        }
        Ok(batch)
    }

    fn push(&mut self, group: &PromptGroup) {
        let prompt = self.append(&group.prompt, 0);
        let mut completions = Vec::with_capacity(group.completions.len());
        for completion in &group.completions {
            let rows = self.append(&completion.ids, group.prompt.len());
            for at in completion.trained.iter().cloned().flatten() {
                let before = match (at, prompt.is_empty()) {
                    (0, true) => continue,
                    (0, false) => prompt.end - 1,
                    _ => rows.start + at - 1,
                };
                self.target_rows.push(before as i64);
                self.target_ids.push(i64::from(completion.ids[at]));
            }
            self.offsets.push(self.target_rows.len() as i64);
            completions.push(rows);
        }
        self.groups.push(GroupSpan {
            prompt,
            completions,
        });
        self.rows.push(group.row);
    }

    fn append(&mut self, ids: &[u32], first_position: usize) -> Range<usize> {
        let start = self.token_ids.len();
        self.token_ids.extend(ids.iter().map(|&id| i64::from(id)));
        self.positions
            .extend((0..ids.len()).map(|i| (first_position + i) as i64));
        start..self.token_ids.len()
    }

    /// N: packed rows.
    #[must_use]
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// M: trained tokens.
    #[must_use]
    pub fn num_targets(&self) -> usize {
        self.target_rows.len()
    }

    /// S: completions.
    #[must_use]
    pub fn num_completions(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Each completion's rows, in completion order.
    pub fn completion_rows(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.groups
            .iter()
            .flat_map(|g| g.completions.iter().cloned())
    }

    /// `[S]` the last row of each completion (no pads exist, so it is a real token).
    #[must_use]
    pub fn last_rows(&self) -> Vec<i64> {
        self.completion_rows().map(|r| r.end as i64 - 1).collect()
    }
}

/// Splits consecutive groups into batches of at most `budget` packed tokens, at least one group
/// each. `tokens_per_group[i]` counts the prompt of group `i` once.
///
/// # Errors
/// [`Error::Invalid`] when a single group exceeds the budget, naming it, or the budget is 0.
pub fn batches_by_tokens(tokens_per_group: &[usize], budget: usize) -> Result<Vec<Range<usize>>> {
    let mut batches = Vec::new();
    let (mut start, mut sum) = (0, 0);
    for (i, &n) in tokens_per_group.iter().enumerate() {
        if n > budget {
            return Err(over_budget(i, n, budget));
        }
        if sum + n > budget {
            batches.push(start..i);
            (start, sum) = (i, 0);
        }
        sum += n;
    }
    if start < tokens_per_group.len() {
        batches.push(start..tokens_per_group.len());
    }
    Ok(batches)
}

/// Batches of at most `budget` packed tokens that are filled as well as possible: every group once, in
/// batches of groups that need not be neighbours.
///
/// The epoch's order is cut into windows of `window` groups; each is filled by best fit, longest first
/// (within 22 % of the fewest batches, Johnson et al. 1974; near them where groups are short beside the
/// budget), and the batches of all windows come in a shuffled order. A function of its arguments: to
/// resume, make it again and go on at the batch where it stopped. With a window of some thousand groups
/// the fill is at least 97 % unless groups are longer than a quarter of the budget.
///
/// # Errors
/// [`Error::Invalid`] when a single group exceeds the budget, naming it, or the budget is 0.
pub fn filled_batches(
    tokens_per_group: &[usize],
    budget: usize,
    window: usize,
    seed: u64,
    epoch: u64,
) -> Result<Vec<Vec<usize>>> {
    if let Some(i) = tokens_per_group.iter().position(|n| *n > budget) {
        return Err(over_budget(i, tokens_per_group[i], budget));
    }
    let order = Permutation::new(seed, tokens_per_group.len(), epoch);
    let rows: Vec<usize> = (0..tokens_per_group.len()).map(|i| order.at(i)).collect();
    let mut batches: Vec<Vec<usize>> = Vec::new();
    for rows in rows.chunks(window.max(1)) {
        let mut longest_first = rows.to_vec();
        longest_first.sort_by_key(|&i| std::cmp::Reverse(tokens_per_group[i]));
        // Batches of this window by the room that is left.
        let mut room: BTreeSet<(usize, usize)> = BTreeSet::new();
        for i in longest_first {
            let n = tokens_per_group[i];
            let (left, at) = match room.range((n, 0)..).next().copied() {
                Some(best) => {
                    room.remove(&best);
                    best
                }
                None => {
                    batches.push(Vec::new());
                    (budget, batches.len() - 1)
                }
            };
            batches[at].push(i);
            room.insert((left - n, at));
        }
    }
    let shuffled = Permutation::new(!seed, batches.len(), epoch);
    Ok((0..batches.len())
        .map(|i| std::mem::take(&mut batches[shuffled.at(i)]))
        .collect())
}

fn over_budget(group: usize, tokens: usize, budget: usize) -> Error {
    Error::Invalid {
        what: format!(
            "group {group} has {tokens} tokens, more than the budget of {budget} a micro-batch"
        ),
        mend: "raise the token budget or lower the length limits".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::{Completion, Finish};

    fn group(prompt: &[u32], completions: &[&[u32]]) -> PromptGroup {
        PromptGroup {
            row: 9,
            prompt: prompt.to_vec(),
            completions: completions
                .iter()
                .map(|c| Completion::whole(c.to_vec(), Finish::Stop))
                .collect(),
        }
    }

    #[test]
    fn two_groups_by_hand() {
        let b =
            PackedBatch::pack(&[group(&[1, 2], &[&[3, 4], &[5]]), group(&[], &[&[6, 7]])]).unwrap();
        assert_eq!(b.token_ids, [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(b.positions, [0, 1, 2, 3, 2, 0, 1]);
        // 3 is predicted by row 1 (prompt's last), 4 by row 2; 5 by row 1 again; 6 by nothing.
        assert_eq!(b.target_rows, [1, 2, 1, 5]);
        assert_eq!(b.target_ids, [3, 4, 5, 7]);
        assert_eq!(b.offsets, [0, 2, 3, 4]);
        assert_eq!(b.last_rows(), [3, 4, 6]);
        assert_eq!(b.rows, [9, 9]);
    }

    #[test]
    fn untrained_ranges_are_no_targets() {
        let mut g = group(&[1], &[&[2, 3, 4, 5]]);
        g.completions[0].trained = vec![1..2, 3..4];
        let b = PackedBatch::pack(&[g]).unwrap();
        assert_eq!(b.target_rows, [1, 3]);
        assert_eq!(b.target_ids, [3, 5]);
    }

    #[test]
    fn broken_groups_are_refused_with_their_row() {
        let mut g = group(&[1], &[&[2, 3]]);
        g.completions[0].trained = std::iter::once(1..3).collect();
        let e = PackedBatch::pack(&[g]).unwrap_err().to_string();
        assert!(e.contains("row 9") && e.contains("1..3"), "{e}");
        assert!(PackedBatch::pack(&[group(&[1], &[&[]])]).is_err());
        assert!(PackedBatch::pack(&[group(&[1], &[])]).is_err());
        assert!(PackedBatch::pack(&[]).is_err());
    }

    #[test]
    fn batches_fill_the_budget_in_order() {
        assert_eq!(batches_by_tokens(&[3, 3, 3, 10], 10).unwrap(), [0..3, 3..4]);
        assert_eq!(
            batches_by_tokens(&[], 10).unwrap(),
            Vec::<Range<usize>>::new()
        );
        let e = batches_by_tokens(&[3, 11], 10).unwrap_err().to_string();
        assert!(e.contains("group 1 has 11 tokens"), "{e}");
    }
}
