//! The training step, schedules, checkpoints, metrics, progress.
//!
//! Invariant: nothing here knows of models or data. A training loop is a plain loop in another crate;
//! it accumulates [`LossSum`](rlhf_kernels::LossSum)s into a [`Stepper`] and tells its [`Session`]
//! what happened.

pub mod checkpoint;
mod error;
mod files;
pub mod lr_schedule;
mod metrics;
mod progress;
mod session;
mod stepper;
mod stop;
mod tensorboard;
pub mod tensors;

pub use error::{Error, Result};
pub use files::{hash_file, peak_memory, write_whole};
pub use lr_schedule::LrSchedule;
pub use metrics::MetricsLog;
pub use progress::{Progress, Throughput};
pub use session::{Flow, Restored, Session, SessionConfig, Summary};
pub use stepper::{BadStep, StepReport, Stepper, StepperConfig};
pub use stop::{Signal, StopFlag};
