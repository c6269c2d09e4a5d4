//! Verifiers on threads, with deadlines.
//!
//! Invariant: [`Pool::run`] comes back. A call that is not through at its deadline is left behind with its
//! thread, its row gets the score of failures, and another thread takes its place; when too many are left
//! behind and still run, no more are begun. Every row's verdict is its own: it does not depend on the others,
//! on their order or on the number of threads.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{FailureKind, Sample, Verdict, Verifier, bad};
use crate::error::Result;

/// Threads that hang and are still there: with more, nothing new is begun.
const MOST_LEFT: usize = 64;
/// A verifier with a limit of its own gets this much more to clean up.
const GRACE: Duration = Duration::from_secs(2);

/// How verifiers are run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PoolConfig {
    /// Calls at once.
    pub workers: usize,
    /// Seconds that one call may take.
    pub deadline_s: f64,
    /// The score of a row without a verdict.
    pub failure_score: f64,
    /// Longer completions, in bytes, get no verdict.
    pub max_bytes: usize,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            workers: 2,
            deadline_s: 10.0,
            failure_score: 0.0,
            max_bytes: 1 << 20,
        }
    }
}

/// Rows without a verdict, by what kept it.
pub type FailureCounts = BTreeMap<FailureKind, u64>;

/// A row to be looked at.
#[derive(Clone, Debug)]
pub struct Job {
    /// The prompt's text.
    pub prompt: Arc<str>,
    /// The completion's text.
    pub completion: String,
    /// The data's other fields.
    pub fields: Arc<Map<String, Value>>,
    /// The completion's length in tokens, where it is known.
    pub tokens: Option<usize>,
}

/// A verifier with its threads.
#[derive(Debug)]
pub struct Pool {
    verifier: Arc<dyn Verifier>,
    config: PoolConfig,
    deadline: Duration,
    failures: Mutex<FailureCounts>,
    left: Arc<AtomicUsize>,
}

impl Pool {
    /// A pool for `verifier`.
    ///
    /// # Errors
    /// When a setting makes no sense.
    pub fn new(verifier: Arc<dyn Verifier>, config: PoolConfig) -> Result<Self> {
        let wrong = |what| Err(bad(verifier.name(), what));
        if config.workers == 0 || config.workers > 1024 {
            return wrong("`workers` lies in 1 to 1024");
        }
        if !(config.deadline_s > 0.0 && config.deadline_s <= 86_400.0) {
            return wrong("`deadline_s` lies above 0 and within a day");
        }
        if !config.failure_score.is_finite() || config.max_bytes == 0 {
            return wrong("`failure_score` is a number and `max_bytes` above 0");
        }
        let own = verifier.own_limit().map(|l| l + GRACE);
        let deadline = Duration::from_secs_f64(config.deadline_s).max(own.unwrap_or_default());
        Ok(Self {
            verifier,
            config,
            deadline,
            failures: Mutex::default(),
            left: Arc::default(),
        })
    }

    /// The verifier.
    #[must_use]
    pub fn verifier(&self) -> &dyn Verifier {
        &*self.verifier
    }

    /// Rows without a verdict so far.
    #[must_use]
    pub fn failures(&self) -> FailureCounts {
        self.lock().clone()
    }

    /// Threads that were left behind and still run.
    #[must_use]
    pub fn left_behind(&self) -> usize {
        self.left.load(Ordering::SeqCst)
    }

    /// A verdict on every job, in their order.
    ///
    /// # Errors
    /// The first job's for which the verifier gives one; when no thread can be started.
    pub fn run(&self, jobs: Vec<Job>) -> Result<Vec<Verdict>> {
        self.each(jobs)?.into_iter().collect()
    }

    /// As [`Pool::run`], with each job's own error.
    pub(super) fn each(&self, jobs: Vec<Job>) -> Result<Vec<Result<Verdict>>> {
        let shared = Arc::new(Shared {
            verifier: Arc::clone(&self.verifier),
            max_bytes: self.config.max_bytes,
            left: Arc::clone(&self.left),
            desk: Mutex::new(Desk {
                next: 0,
                at_work: 0,
                workers: Vec::new(),
                done: jobs.iter().map(|_| None).collect(),
            }),
            changed: Condvar::new(),
            jobs,
        });
        self.oversee(&shared)?;
        let done = std::mem::take(&mut shared.lock().done);
        let mut verdicts: Vec<Result<Verdict>> = done
            .into_iter()
            .map(|v| {
                v.unwrap_or_else(|| Ok(Verdict::failed(FailureKind::NotBegun, "too many hang")))
            })
            .collect();
        let mut counts = self.lock();
        for v in verdicts.iter_mut().flatten() {
            if let Some(kind) = v.failure {
                v.score = self.config.failure_score;
                *counts.entry(kind).or_default() += 1;
            }
        }
        drop(counts);
        Ok(verdicts)
    }

    /// Starts threads, leaves behind those that are late, and comes back when nobody is at work any more.
    fn oversee(&self, shared: &Arc<Shared>) -> Result<()> {
        let mut desk = shared.lock();
        for _ in 0..self.config.workers.min(shared.jobs.len()) {
            if self.left_behind() < MOST_LEFT {
                self.start(shared, &mut desk)?;
            }
        }
        while desk.at_work > 0 {
            let mut first: Option<Duration> = None;
            for worker in 0..desk.workers.len() {
                let At::Job(job, since) = desk.workers[worker] else {
                    continue;
                };
                let rest = self.deadline.saturating_sub(since.elapsed());
                if rest > Duration::ZERO {
                    first = Some(first.map_or(rest, |f| f.min(rest)));
                    continue;
                }
                desk.workers[worker] = At::Left;
                desk.at_work -= 1;
                let reason = format!("not through in {} s", self.deadline.as_secs_f64());
                desk.done[job] = Some(Ok(Verdict::failed(FailureKind::Deadline, reason)));
                let left = self.left.fetch_add(1, Ordering::SeqCst) + 1;
                if left >= MOST_LEFT {
                    desk.next = shared.jobs.len();
                } else if desk.next < shared.jobs.len() {
                    self.start(shared, &mut desk)?;
                }
            }
            if desk.at_work > 0 {
                let patience = first.unwrap_or(self.deadline);
                let waited = shared.changed.wait_timeout(desk, patience);
                desk = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        Ok(())
    }

    fn start(&self, shared: &Arc<Shared>, desk: &mut Desk) -> Result<()> {
        let (worker, own) = (desk.workers.len(), Arc::clone(shared));
        std::thread::Builder::new()
            .name(format!("verify-{worker}"))
            .spawn(move || work(&own, worker))
            .map_err(|e| {
                bad(
                    self.verifier.name(),
                    format!("no thread can be started: {e}"),
                )
            })?;
        desk.workers.push(At::Idle);
        desk.at_work += 1;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, FailureCounts> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What all threads of a run see.
#[derive(Debug)]
struct Shared {
    verifier: Arc<dyn Verifier>,
    jobs: Vec<Job>,
    max_bytes: usize,
    left: Arc<AtomicUsize>,
    desk: Mutex<Desk>,
    /// Told when the desk changes.
    changed: Condvar,
}

/// Who is at what, and what is done.
#[derive(Debug)]
struct Desk {
    next: usize,
    /// Threads that are waited for.
    at_work: usize,
    workers: Vec<At>,
    done: Vec<Option<Result<Verdict>>>,
}

/// What a thread is at.
#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    /// Between two jobs, or ended.
    Idle,
    /// A job, since.
    Job(usize, Instant),
    /// Left behind: whatever it brings comes too late.
    Left,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Desk> {
        // Every change is whole: a panic elsewhere does not spoil it.
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes jobs until there are no more, or until it was left behind.
fn work(shared: &Shared, worker: usize) {
    let mut desk = shared.lock();
    loop {
        let job = desk.next;
        let Some(given) = shared.jobs.get(job) else {
            break;
        };
        desk.next += 1;
        desk.workers[worker] = At::Job(job, Instant::now());
        drop(desk);
        shared.changed.notify_all();
        let verdict = look(shared, given);
        desk = shared.lock();
        if desk.workers[worker] == At::Left {
            shared.left.fetch_sub(1, Ordering::SeqCst);
            return;
        }
        desk.done[job] = Some(verdict);
        desk.workers[worker] = At::Idle;
    }
    desk.at_work -= 1;
    drop(desk);
    shared.changed.notify_all();
}

fn look(shared: &Shared, job: &Job) -> Result<Verdict> {
    if job.completion.len() > shared.max_bytes {
        let reason = format!(
            "{} bytes, of {} at most",
            job.completion.len(),
            shared.max_bytes
        );
        return Ok(Verdict::failed(FailureKind::TooLong, reason));
    }
    let sample = Sample {
        prompt: &job.prompt,
        completion: &job.completion,
        fields: &job.fields,
        tokens: job.tokens,
    };
    // What a verifier left half-done when it panicked is its own; the next call sees it or not.
    let verdict = std::panic::catch_unwind(AssertUnwindSafe(|| shared.verifier.verify(&sample)));
    verdict.unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
        let said = said.or_else(|| panic.downcast_ref::<String>().cloned());
        let reason = format!("panicked: {}", super::short(&said.unwrap_or_default()));
        Ok(Verdict::failed(FailureKind::Panicked, reason))
    })
}
