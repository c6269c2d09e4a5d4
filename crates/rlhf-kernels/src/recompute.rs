//! Activation checkpointing: keep a block's inputs, not its insides, and run it again in backward.

use tch::Tensor;

use crate::error::{Result, ensure};
use crate::ffi;

/// Runs `body(inputs)` without keeping its intermediate results; backward runs it again. Calls may
/// be nested.
///
/// Gradients reach `inputs` and, accumulating in `.grad` as `backward` does, every parameter that
/// `body` captures; they equal those of running it plainly. `body` must give the same result both
/// times, so it keeps no state; what it draws from libtorch's global generators (dropout) is drawn again
/// the second time, and the generators then go on where they were.
///
/// # Errors
/// When `inputs` is empty, `body` panics or libtorch fails. A panic of the second run makes
/// `backward` fail. A second derivative is not supported.
pub fn recompute(
    inputs: &[&Tensor],
    body: impl Fn(&[Tensor]) -> Tensor + 'static,
) -> Result<Tensor> {
    ensure(!inputs.is_empty(), "recompute", || "no inputs".into())?;
    ffi::recompute(inputs, Box::new(body))
}
