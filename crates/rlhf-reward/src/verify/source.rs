//! Verifiers as a source of rewards.

use std::sync::{Arc, Mutex, PoisonError};

use super::{FailureCounts, Job, Pool, PoolConfig, Verdict, Verifier};
use crate::error::{Error, Result};
use crate::source::{Judged, RewardSource};

/// A verifier whose verdicts are rewards.
#[derive(Debug)]
pub struct VerifierSource {
    pool: Pool,
    /// Failures that the log knows of.
    told: Mutex<FailureCounts>,
}

impl VerifierSource {
    /// A source that runs `verifier` as `config` says.
    ///
    /// # Errors
    /// As [`Pool::new`].
    pub fn new(verifier: Arc<dyn Verifier>, config: PoolConfig) -> Result<Self> {
        Ok(Self {
            pool: Pool::new(verifier, config)?,
            told: Mutex::default(),
        })
    }

    /// Its threads, which know the rows without a verdict.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The verdicts with their reasons, for each completion of each item.
    ///
    /// # Errors
    /// The first row's whose data are not what the verifier needs; the message names the row.
    pub fn verdicts(&self, items: &[Judged<'_>]) -> Result<Vec<Vec<Verdict>>> {
        let jobs = |item: &Judged<'_>| {
            let (prompt, fields) = (Arc::from(item.prompt), Arc::new(item.fields.clone()));
            let tokens = |i: usize| item.group.completions.get(i).map(|c| c.ids.len());
            let job = |(i, text): (usize, &String)| Job {
                prompt: Arc::clone(&prompt),
                completion: text.clone(),
                fields: Arc::clone(&fields),
                tokens: tokens(i),
            };
            item.texts.iter().enumerate().map(job).collect::<Vec<_>>()
        };
        let mut verdicts = self
            .pool
            .each(items.iter().flat_map(jobs).collect())?
            .into_iter();
        let row = |item: &Judged<'_>| {
            let of_row = verdicts.by_ref().take(item.texts.len());
            let of_row: Result<Vec<Verdict>> = of_row.collect();
            of_row.map_err(|e| located(e, item.group.row))
        };
        items.iter().map(row).collect()
    }
}

fn located(error: Error, row: u64) -> Error {
    match error {
        Error::Verifier { verifier, what } => Error::Verifier {
            verifier,
            what: format!("row {row}: {what}"),
        },
        other => other,
    }
}

impl RewardSource for VerifierSource {
    fn name(&self) -> &str {
        self.pool.verifier().name()
    }

    fn scores(&self, items: &[Judged<'_>]) -> Result<Vec<Vec<f64>>> {
        let verdicts = self.verdicts(items)?;
        let scores = |row: Vec<Verdict>| row.into_iter().map(|v| v.score).collect();
        Ok(verdicts.into_iter().map(scores).collect())
    }

    fn counted(&self) -> Vec<(String, f64)> {
        let now = self.pool.failures();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let new = |(kind, n): (&super::FailureKind, &u64)| {
            let n = n - told.get(kind).unwrap_or(&0);
            (format!("failed_{}", kind.name()), n as f64)
        };
        let counted = now.iter().map(new).collect();
        *told = now;
        counted
    }
}
