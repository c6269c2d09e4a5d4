//! Groups one by one: a chunk of records is tokenised while the next is read.

use std::fmt;

use rayon::prelude::*;

use super::limits::{Limits, TokenizeReport};
use super::{ChatTokenizer, Made, Parted};
use crate::error::{Error, Result};
use crate::group::PromptGroup;

/// Rows that are read while as many before them are tokenised.
const STREAM_ROWS: usize = 256;

/// Groups in the order of their records, which are read as the groups are asked for. The first error, of
/// reading or of tokenising, comes after the groups before it and is the last item.
pub struct GroupStream<'a, R, I> {
    tokenizer: &'a ChatTokenizer,
    one: fn(&ChatTokenizer, &R, &Limits) -> Result<Parted<Made>>,
    limits: Limits,
    records: std::iter::Fuse<I>,
    /// Records that are read and not yet tokenised, and what ended the reading.
    chunk: Vec<R>,
    failed: Option<Error>,
    ready: std::vec::IntoIter<PromptGroup>,
    report: TokenizeReport,
    rows: u64,
    done: bool,
}

impl<R, I> fmt::Debug for GroupStream<'_, R, I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupStream")
            .field("rows", &self.rows)
            .field("report", &self.report)
            .finish_non_exhaustive()
    }
}

impl<'a, R: Send + Sync, I: Iterator<Item = Result<R>> + Send> GroupStream<'a, R, I> {
    pub(super) fn new(
        tokenizer: &'a ChatTokenizer,
        one: fn(&ChatTokenizer, &R, &Limits) -> Result<Parted<Made>>,
        records: I,
        limits: &Limits,
    ) -> Self {
        let mut records = records.fuse();
        let (chunk, failed) = read(&mut records);
        Self {
            tokenizer,
            one,
            limits: *limits,
            records,
            chunk,
            failed,
            ready: Vec::new().into_iter(),
            report: TokenizeReport::default(),
            rows: 0,
            done: false,
        }
    }

    /// What became of the rows whose groups were given so far, and of those up to a chunk after them.
    #[must_use]
    pub fn report(&self) -> &TokenizeReport {
        &self.report
    }

    /// Rows tokenised so far, kept or dropped.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Tokenises a chunk and reads the next. The error of either that the groups lead up to.
    fn advance(&mut self) -> Option<Error> {
        let chunk = std::mem::take(&mut self.chunk);
        let ended = self.failed.take();
        let (tokenizer, one, limits) = (self.tokenizer, self.one, &self.limits);
        let records = &mut self.records;
        let ((next, failed), made) = rayon::join(
            || match &ended {
                None => read(records),
                Some(_) => (Vec::new(), None),
            },
            || -> Vec<_> {
                chunk
                    .par_iter()
                    .map(|record| one(tokenizer, record, limits))
                    .collect()
            },
        );
        (self.chunk, self.failed) = (next, failed);
        let mut groups = Vec::with_capacity(made.len());
        let mut wrong = None;
        for made in made {
            match made {
                Ok(made) => groups.extend(self.report.count(self.rows, made)),
                Err(e) => {
                    wrong = Some(e.at_row(self.rows));
                    break;
                }
            }
            self.rows += 1;
        }
        self.ready = groups.into_iter();
        wrong.or(ended)
    }
}

/// Up to a chunk of records, and the error that came instead of the next.
fn read<R>(records: &mut impl Iterator<Item = Result<R>>) -> (Vec<R>, Option<Error>) {
    let mut chunk = Vec::with_capacity(STREAM_ROWS);
    for record in records.take(STREAM_ROWS) {
        match record {
            Ok(record) => chunk.push(record),
            Err(e) => return (chunk, Some(e)),
        }
    }
    (chunk, None)
}

impl<R: Send + Sync, I: Iterator<Item = Result<R>> + Send> Iterator for GroupStream<'_, R, I> {
    type Item = Result<PromptGroup>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(group) = self.ready.next() {
                return Some(Ok(group));
            }
            if self.done {
                return self.failed.take().map(Err);
            }
            match self.advance() {
                Some(e) => (self.done, self.failed) = (true, Some(e)),
                None => self.done = self.chunk.is_empty() && self.failed.is_none(),
            }
        }
    }
}
