//! Groups of labelled rows: a prompt with any number of completions, and solutions in steps.
//!
//! Invariant: a group's row is the record's place, so labels are found again by it, whatever was dropped.

use rayon::prelude::*;

use super::limits::{Limits, LongCompletion, TokenizeReport, too_long};
use super::{ChatTokenizer, DropReason, Made, Parted};
use crate::conversation::Text;
use crate::error::Result;
use crate::group::{Completion, Finish, PromptGroup};
use crate::tokenize::Outcome;

/// A solution as ids, with the place of each step's last token.
#[derive(Clone, Debug, PartialEq)]
pub struct Steps {
    /// The prompt with the solution as its one completion.
    pub group: PromptGroup,
    /// Where each step ends in the completion's ids; of a solution that was cut, those steps that are whole.
    pub ends: Vec<usize>,
}

impl ChatTokenizer {
    /// Prompts with their completions as groups, in order, in parallel: `view` says what of a record is
    /// which. Completions keep their order; equal ones stay.
    ///
    /// # Errors
    /// The first row's error.
    pub fn completion_groups<R: Sync>(
        &self,
        records: &[R],
        limits: &Limits,
        view: impl for<'r> Fn(&'r R) -> (&'r Text, Vec<&'r Text>) + Sync,
    ) -> Result<(Vec<PromptGroup>, TokenizeReport)> {
        super::collect(records, |record| {
            let (prompt, completions) = view(record);
            self.answered(prompt, &completions, limits)
        })
    }

    /// Solutions as groups with the places of their steps' ends, in order, in parallel. Each step is
    /// tokenised by itself and followed by the tokens of `separator`, the last of which is its end, as in
    /// TRL's `PRMTrainer`; with an empty separator a step ends with its own last token.
    ///
    /// # Errors
    /// The first row's error.
    pub fn step_groups<R: Sync>(
        &self,
        records: &[R],
        separator: &str,
        limits: &Limits,
        view: impl for<'r> Fn(&'r R) -> (&'r Text, &'r [String]) + Sync,
    ) -> Result<(Vec<Steps>, TokenizeReport)> {
        let separator = self.fragment(separator)?;
        let rows: Vec<Result<(Parted<Made>, Vec<usize>)>> = records
            .par_iter()
            .map(|record| {
                let (prompt, steps) = view(record);
                self.steps(prompt, steps, &separator, limits)
            })
            .collect();
        let mut report = TokenizeReport::default();
        let mut kept = Vec::with_capacity(rows.len());
        for (row, made) in (0u64..).zip(rows) {
            let (made, ends) = made.map_err(|e| e.at_row(row))?;
            kept.extend(report.count(row, made).map(|group| Steps { group, ends }));
        }
        Ok((kept, report))
    }

    /// A step's or a separator's ids: text in the middle of other text, so nothing is put around it.
    fn fragment(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self
            .literal
            .encode_fast(text, false)
            .map_err(|e| self.failed(&e))?
            .get_ids()
            .to_vec())
    }

    /// The ids that end a step: the last one of `separator`, if it has one.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn step_end(&self, separator: &str) -> Result<Option<u32>> {
        Ok(self.fragment(separator)?.last().copied())
    }

    fn steps(
        &self,
        prompt: &Text,
        steps: &[String],
        separator: &[u32],
        limits: &Limits,
    ) -> Result<(Parted<Made>, Vec<usize>)> {
        let prompt = match self.prompt_within(prompt, limits)? {
            Outcome::Kept(ids) => (ids, false),
            Outcome::Truncated(ids) => (ids, true),
            Outcome::Dropped(reason) => return Ok((Err(reason), Vec::new())),
        };
        let (mut ids, mut ends) = (Vec::new(), Vec::new());
        for step in steps {
            let own = self.fragment(step)?;
            if own.is_empty() {
                return Ok((Err(DropReason::EmptyCompletion), Vec::new()));
            }
            ids.extend(own);
            ids.extend_from_slice(separator);
            ends.push(ids.len() - 1);
        }
        let longest = limits.max_completion.max(1);
        let cut = ids.len() > longest;
        if cut {
            match limits.truncation.completion {
                LongCompletion::KeepStart => {}
                LongCompletion::Drop => {
                    return Ok((Err(DropReason::CompletionTooLong), Vec::new()));
                }
                LongCompletion::Refuse => {
                    return Err(too_long("completion", ids.len(), longest));
                }
            }
            ids.truncate(longest);
            ends.retain(|end| *end < longest);
        }
        if ends.is_empty() {
            return Ok((Err(DropReason::NothingTrained), Vec::new()));
        }
        let made = Made {
            prompt: prompt.0,
            completions: vec![Completion::whole(ids, Finish::Cut)],
            cut,
            shortened: prompt.1,
            shared_boundary: false,
        };
        Ok((Ok(made), ends))
    }
}
