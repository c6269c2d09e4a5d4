//! What several processes do with their tensors together: a group of them over Gloo (c10d), on the CPU.
//!
//! Invariant: a tensor that takes part is owned by its [`Pending`] until that was waited for. Every process of a
//! group calls the same operations in the same order. Nothing here reads environment variables: a binary that is
//! started by `torchrun` makes a [`Rendezvous`] of them.
//!
//! | variable | field |
//! | --- | --- |
//! | `MASTER_ADDR`, `MASTER_PORT` | `host`, `port` |
//! | `RANK`, `WORLD_SIZE` | `rank`, `size` |
//! | `TORCHELASTIC_USE_AGENT_STORE=True` | `listens: false`, for the launcher listens already |
//! | `TORCHELASTIC_RESTART_COUNT` | part of `prefix`, so that a restarted group does not meet its former self |

use std::time::Duration;

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result, ensure};
use crate::ffi;

/// Where the processes of a group find each other.
#[derive(Clone, Debug)]
pub struct Rendezvous {
    /// The host of the process that listens, as the others reach it.
    pub host: String,
    /// The port that it listens on.
    pub port: u16,
    /// This process's number, from 0.
    pub rank: usize,
    /// How many processes there are.
    pub size: usize,
    /// Whether this process listens; one does, most often rank 0 (see [`Rendezvous::new`]).
    pub listens: bool,
    /// Groups of different prefixes share a listener without meeting.
    pub prefix: String,
    /// The network interface (`eth0`); by default the one of the host's own name, or the loopback.
    pub interface: Option<String>,
    /// How long to wait for the others: when the group is made, and in each operation.
    pub timeout: Duration,
    /// Compare before each operation what the processes are about to do, and give an error where they differ (a
    /// tensor's size, say), where otherwise Gloo ends the process. Costs a small message, and every process waits
    /// for the others to arrive.
    pub verify: bool,
}

impl Rendezvous {
    /// Rank 0 listens; half an hour of patience, as in PyTorch; verified.
    pub fn new(host: impl Into<String>, port: u16, rank: usize, size: usize) -> Self {
        Self {
            host: host.into(),
            port,
            rank,
            size,
            listens: rank == 0,
            prefix: "rlhf".into(),
            interface: None,
            timeout: Duration::from_secs(1800),
            verify: true,
        }
    }
}

/// How numbers of several processes become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    /// Their sum.
    Sum,
    /// The least.
    Min,
    /// The largest.
    Max,
}

/// A group of processes. Dropping it leaves the group.
#[derive(Debug)]
pub struct Group {
    raw: ffi::RawGroup,
    rank: usize,
    size: usize,
    timeout: Duration,
    verify: bool,
}

/// An operation under way.
#[must_use = "an operation is not done before it was waited for"]
#[derive(Debug)]
pub struct Pending {
    op: &'static str,
    raw: ffi::RawPending,
    /// What comes out, and what goes in.
    result: Tensor,
    _source: Option<Tensor>,
    timeout: Duration,
}

impl Pending {
    /// Whether waiting would not block.
    pub fn is_done(&self) -> bool {
        self.raw.is_done()
    }

    /// The result, once it is there.
    ///
    /// # Errors
    /// [`Error::Timeout`] when a process did not take part in time, [`Error::Shim`] when one went away. The group
    /// is of no use after either.
    pub fn wait(self) -> Result<Tensor> {
        self.raw
            .wait(self.op)
            .map_err(|e| timed_out(e, self.timeout))?;
        Ok(self.result)
    }
}

/// c10d and Gloo say so in words only.
fn timed_out(error: Error, after: Duration) -> Error {
    match error {
        Error::Shim { op, message } if is_timeout(&message) => {
            Error::Timeout { op, after, message }
        }
        other => other,
    }
}

fn is_timeout(message: &str) -> bool {
    let message = message.to_lowercase();
    ["timed out", "timeout", "failed to pass monitoredbarrier"]
        .iter()
        .any(|words| message.contains(words))
}

impl Group {
    /// Meets the others over Gloo. Returns when all are there.
    ///
    /// # Errors
    /// [`Error::Timeout`] when not all came in time; [`Error::Argument`] for a rank outside the group or a
    /// time-out of nothing; [`Error::Shim`] when the port is taken or the interface unknown.
    pub fn gloo(at: &Rendezvous) -> Result<Self> {
        const OP: &str = "Group::gloo";
        ensure(at.rank < at.size, OP, || {
            format!("rank {} of {} processes", at.rank, at.size)
        })?;
        ensure(i32::try_from(at.size).is_ok(), OP, || {
            format!("{} processes", at.size)
        })?;
        ensure(at.timeout >= Duration::from_millis(1), OP, || {
            "the time-out is less than a millisecond".into()
        })?;
        for (name, text) in [("host", &at.host), ("prefix", &at.prefix)] {
            ensure(!text.contains('\0'), OP, || {
                format!("the {name} {text:?} contains a NUL")
            })?;
        }
        ensure(
            at.interface.as_ref().is_none_or(|i| !i.contains('\0')),
            OP,
            || format!("the interface {:?} contains a NUL", at.interface),
        )?;
        let raw = ffi::RawGroup::new(OP, at).map_err(|e| timed_out(e, at.timeout))?;
        Ok(Self {
            raw,
            rank: at.rank,
            size: at.size,
            timeout: at.timeout,
            verify: at.verify,
        })
    }

    /// This process's number.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many processes there are.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Every process's tensor becomes the reduction over all of them, in place.
    ///
    /// # Errors
    /// When the tensor is not on the CPU or of a type that Gloo cannot reduce; when the processes' tensors differ
    /// in size or type (see [`Rendezvous::verify`]).
    pub fn all_reduce(&self, tensor: Tensor, reduce: Reduce) -> Result<Pending> {
        let op = "all_reduce";
        self.prepare(op, &tensor, &[0, reduce as i64])?;
        self.start(op, ffi::Collective::AllReduce, tensor, None, reduce, 0)
    }

    /// Every process's tensor becomes that of process `from`, in place.
    ///
    /// # Errors
    /// As [`Group::all_reduce`], and when there is no process `from`.
    pub fn broadcast(&self, tensor: Tensor, from: usize) -> Result<Pending> {
        let op = "broadcast";
        ensure(from < self.size, op, || {
            format!("from {from} of {} processes", self.size)
        })?;
        self.prepare(op, &tensor, &[1, from as i64])?;
        let kind = ffi::Collective::Broadcast;
        self.start(op, kind, tensor, None, Reduce::Sum, from)
    }

    /// All processes' tensors, laid end to end in order of rank.
    ///
    /// # Shapes
    /// `[N, …]` each, the same for all; the result `[size · N, …]`.
    ///
    /// # Errors
    /// As [`Group::all_reduce`]. Gloo does not gather tensors of unequal sizes: pad them, or broadcast them.
    pub fn all_gather(&self, tensor: &Tensor) -> Result<Pending> {
        let op = "all_gather";
        let tensor = tensor.detach().contiguous();
        let mut size = tensor.size();
        ensure(!size.is_empty(), op, || "the tensor has no axis".into())?;
        self.prepare(op, &tensor, &[2, 0])?;
        size[0] *= self.size as i64;
        let out = Tensor::empty(size.as_slice(), (tensor.kind(), Device::Cpu));
        let kind = ffi::Collective::AllGather;
        self.start(op, kind, tensor, Some(out), Reduce::Sum, 0)
    }

    /// The reduction of all processes' tensors, of which each keeps its own part: the inverse of
    /// [`Group::all_gather`].
    ///
    /// # Shapes
    /// `[size · N, …]` each; the result `[N, …]`.
    ///
    /// # Errors
    /// As [`Group::all_reduce`], and when the first axis is no multiple of the number of processes.
    pub fn reduce_scatter(&self, tensor: &Tensor, reduce: Reduce) -> Result<Pending> {
        let op = "reduce_scatter";
        let tensor = tensor.detach().contiguous();
        let (mut size, parts) = (tensor.size(), self.size as i64);
        ensure(size.first().is_some_and(|n| n % parts == 0), op, || {
            format!(
                "the tensor is {size:?}, expected a first axis that {parts} divides: parts of unequal sizes are not supported, pad it"
            )
        })?;
        self.prepare(op, &tensor, &[3, reduce as i64])?;
        size[0] /= parts;
        let out = Tensor::empty(size.as_slice(), (tensor.kind(), Device::Cpu));
        let kind = ffi::Collective::ReduceScatter;
        self.start(op, kind, tensor, Some(out), reduce, 0)
    }

    /// Returns when all processes have called it. Rank 0's error names those that did not.
    ///
    /// # Errors
    /// [`Error::Timeout`] when not all came in time.
    pub fn barrier(&self) -> Result<()> {
        self.raw.barrier().map_err(|e| timed_out(e, self.timeout))
    }

    fn prepare(&self, op: &'static str, tensor: &Tensor, call: &[i64; 2]) -> Result<()> {
        ensure(tensor.device() == Device::Cpu, op, || {
            format!(
                "the tensor is on {:?}, and Gloo works on the CPU",
                tensor.device()
            )
        })?;
        ensure(tensor.is_contiguous(), op, || {
            "the tensor is not contiguous, and would not be changed in place".into()
        })?;
        if !self.verify {
            return Ok(());
        }
        let of = |what: &[i64]| -> Vec<i64> {
            [call[0], call[1], tensor.kind() as i64]
                .into_iter()
                .chain(what.iter().copied())
                .collect()
        };
        let mine = of(&[tensor.numel() as i64]);
        let sent = Tensor::from_slice(&mine);
        let all = Tensor::empty(
            [mine.len() as i64 * self.size as i64],
            (Kind::Int64, Device::Cpu),
        );
        let kind = ffi::Collective::AllGather;
        let all = self
            .start(op, kind, sent, Some(all), Reduce::Sum, 0)?
            .wait()?;
        let all = Vec::<i64>::try_from(all)?;
        for (rank, theirs) in all.chunks(mine.len()).enumerate() {
            ensure(theirs == mine, op, || {
                let same = theirs[..3] == mine[..3];
                if same {
                    format!(
                        "process {} has {} numbers and process {rank} has {}; unequal sizes are not supported",
                        self.rank, mine[3], theirs[3]
                    )
                } else {
                    format!(
                        "process {} and process {rank} are not about to do the same (operation, its argument, type): {:?}, {:?}",
                        self.rank,
                        &mine[..3],
                        &theirs[..3]
                    )
                }
            })?;
        }
        Ok(())
    }

    fn start(
        &self,
        op: &'static str,
        kind: ffi::Collective,
        tensor: Tensor,
        out: Option<Tensor>,
        reduce: Reduce,
        root: usize,
    ) -> Result<Pending> {
        let raw = self
            .raw
            .start(op, kind, &tensor, out.as_ref(), reduce as i32, root as i64)
            .map_err(|e| timed_out(e, self.timeout))?;
        let (result, source) = match out {
            Some(out) => (out, Some(tensor)),
            None => (tensor, None),
        };
        Ok(Pending {
            op,
            raw,
            result,
            _source: source,
            timeout: self.timeout,
        })
    }
}
