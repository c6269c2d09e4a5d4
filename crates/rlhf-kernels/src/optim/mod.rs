//! Optimisers whose state can be saved by name, and gradient norms.
//!
//! [`Optimizer`] is any of them by an [`OptimizerConfig`]; [`AdamW`] alone is the same as its variant.
//!
//! Invariant: a parameter without a gradient is left alone, and so is its state. Decay acts on tensors of
//! two or more dimensions ([`decays`]).

mod adafactor;
mod adamw;
mod adamw8;
mod each;
mod muon;
mod rmsprop;

use std::collections::HashMap;

use tch::{Kind, Tensor};

pub use adafactor::AdafactorConfig;
pub use adamw::{AdamW, AdamWConfig, NarrowStep, decays};
pub use muon::{MuonConfig, MuonScale, is_hidden_matrix};
pub use rmsprop::RmsPropConfig;

use crate::error::Result;
use crate::ffi;
use each::{Each, Rule};

/// Which optimiser, with its settings but for the learning rate, which each step brings along.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum OptimizerConfig {
    /// Loshchilov & Hutter 2019, algorithm 2.
    AdamW(AdamWConfig),
    /// AdamW with the largest second moment so far (Reddi et al. 2018, AMSGrad), as PyTorch has it.
    AmsGrad(AdamWConfig),
    /// AdamW whose moments are 8-bit codes in blocks of 256 (Dettmers et al. 2022, arXiv 2110.02861): about
    /// a quarter of the state. Tensors of fewer than 4096 numbers keep f32 moments.
    AdamW8bit(AdamWConfig),
    /// Shazeer & Stern 2018 (arXiv 1804.04235): a matrix's second moments from its rows' and columns'.
    Adafactor(AdafactorConfig),
    /// Tieleman & Hinton 2012, as PyTorch has it.
    RmsProp(RmsPropConfig),
    /// Jordan et al. 2024: orthogonalised momentum for hidden matrices, AdamW for the rest.
    Muon(MuonConfig),
}

impl From<AdamWConfig> for OptimizerConfig {
    fn from(config: AdamWConfig) -> Self {
        Self::AdamW(config)
    }
}

/// An optimiser of named parameters.
#[derive(Debug)]
pub struct Optimizer(Inner);

#[derive(Debug)]
enum Inner {
    AdamW(AdamW),
    Each(Each),
}

impl Optimizer {
    /// An optimiser of `parameters`, which share storage with the model's. Parameters that want no gradient
    /// are left alone.
    #[must_use]
    pub fn new(parameters: Vec<(String, Tensor)>, config: OptimizerConfig) -> Self {
        let rule = match config {
            OptimizerConfig::AdamW(c) => {
                return Self(Inner::AdamW(AdamW::new(parameters, c)));
            }
            OptimizerConfig::AmsGrad(c) => Rule::AmsGrad(c),
            OptimizerConfig::AdamW8bit(c) => Rule::AdamW8bit(c),
            OptimizerConfig::Adafactor(c) => Rule::Adafactor(c),
            OptimizerConfig::RmsProp(c) => Rule::RmsProp(c),
            OptimizerConfig::Muon(c) => Rule::Muon(c),
        };
        Self(Inner::Each(Each::new(parameters, rule)))
    }

    /// The parameters in their order.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        let (adamw, each) = match &self.0 {
            Inner::AdamW(o) => (Some(o.parameters()), None),
            Inner::Each(o) => (None, Some(o.parameters())),
        };
        adamw
            .into_iter()
            .flatten()
            .chain(each.into_iter().flatten())
    }

    /// The gradients that are defined, in the parameters' order.
    #[must_use]
    pub fn grads(&self) -> Vec<Tensor> {
        self.parameters()
            .map(|(_, p)| p.grad())
            .filter(Tensor::defined)
            .collect()
    }

    /// One step with the learning rate `lr`. A parameter without a gradient is left alone.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn step(&mut self, lr: f64) -> Result<()> {
        self.step_by(lr, 1.0)
    }

    /// As [`Optimizer::step`] with gradients times `factor`, which scales and clips them without a pass of its own.
    /// Whether the gradients themselves are multiplied is not said.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn step_by(&mut self, lr: f64, factor: f64) -> Result<()> {
        match &mut self.0 {
            Inner::AdamW(o) => o.step_by(lr, factor),
            Inner::Each(o) => o.step_by(lr, factor),
        }
    }

    /// Begins the state anew, as before the first step.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn forget_moments(&mut self) -> Result<()> {
        match &mut self.0 {
            Inner::AdamW(o) => o.forget_moments(),
            Inner::Each(o) => {
                o.forget_moments();
                Ok(())
            }
        }
    }

    /// Forgets all gradients: the next backward keeps its own instead of adding to zeros, and until then they take
    /// no memory.
    pub fn zero_grad(&mut self) {
        forget_grads(self.parameters().map(|(_, p)| p));
    }

    /// The state by name, `KIND.NAME`, between two steps: `step` for each parameter, and
    /// - AdamW, AMSGrad, and what Muon leaves to AdamW: `exp_avg`, `exp_avg_sq` (and `max_exp_avg_sq`);
    /// - 8-bit AdamW: the same as codes, with `exp_avg_absmax`, `exp_avg_sq_absmax`;
    /// - Adafactor: `exp_avg_sq_row`, `exp_avg_sq_col`, or of vectors `exp_avg_sq`;
    /// - RMSprop: `square_avg` (and `grad_avg`, `momentum_buffer`);
    /// - Muon: `momentum_buffer`.
    ///
    /// The tensors share storage with the live ones.
    #[must_use]
    pub fn state(&self) -> Vec<(String, Tensor)> {
        match &self.0 {
            Inner::AdamW(o) => o.state(),
            Inner::Each(o) => o.state(),
        }
    }

    /// Takes over a state that [`Optimizer::state`] gave.
    ///
    /// # Errors
    /// When a tensor is missing, or has another shape or (codes) another type; nothing is changed then.
    pub fn load_state(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        match &mut self.0 {
            Inner::AdamW(o) => o.load_state(state),
            Inner::Each(o) => o.load_state(state),
        }
    }

    /// Bytes of the state.
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        let bytes = |t: &Tensor| t.numel() * t.kind().elt_size_in_bytes();
        self.state().iter().map(|(_, t)| bytes(t)).sum()
    }
}

/// Leaves tensors without gradients.
fn forget_grads<'a>(tensors: impl Iterator<Item = &'a Tensor>) {
    let all: Vec<&Tensor> = tensors.collect();
    // Nothing in it can fail.
    let _ = ffi::forget_grads(&all);
}

/// Which norm gradients are clipped by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    /// √Σ x².
    Two,
    /// max |x|.
    Max,
}

/// The largest magnitude in `tensors`; 0 of none. One host synchronisation.
///
/// # Errors
/// When libtorch fails.
pub fn max_norm(tensors: &[Tensor]) -> Result<f64> {
    let tops = tensors
        .iter()
        .filter(|t| t.numel() > 0)
        .map(|t| Ok(t.f_abs()?.f_max()?.f_to_kind(Kind::Double)?))
        .collect::<Result<Vec<_>>>()?;
    if tops.is_empty() {
        return Ok(0.0);
    }
    Ok(Tensor::f_stack(&tops, 0)?.f_max()?.f_double_value(&[])?)
}

/// The global 2-norm of `tensors`: √Σ x². One pass, one host synchronisation.
///
/// # Errors
/// When libtorch fails.
pub fn global_norm(tensors: &[Tensor]) -> Result<f64> {
    ffi::global_norm(&tensors.iter().collect::<Vec<_>>())
}

/// Multiplies all `tensors` by `factor` in place.
///
/// # Errors
/// When libtorch fails.
pub fn scale(tensors: &[Tensor], factor: f64) -> Result<()> {
    ffi::scale(&tensors.iter().collect::<Vec<_>>(), factor)
}

/// [`clip_grad_norm`] by either norm.
///
/// # Errors
/// When libtorch fails.
pub fn clip_grad_norm_by(grads: &[Tensor], max_norm: f64, norm: Norm) -> Result<f64> {
    let size = match norm {
        Norm::Two => global_norm(grads)?,
        Norm::Max => self::max_norm(grads)?,
    };
    let factor = max_norm / (size + 1e-6);
    if size.is_finite() && factor < 1.0 {
        scale(grads, factor)?;
    }
    Ok(size)
}

/// Scales gradients down to the global norm `max_norm` where theirs is larger, by
/// max_norm / (norm + 1e-6); gives the norm before. A norm that is not finite scales nothing: the
/// caller drops such a step.
///
/// # Errors
/// When libtorch fails.
pub fn clip_grad_norm(grads: &[Tensor], max_norm: f64) -> Result<f64> {
    clip_grad_norm_by(grads, max_norm, Norm::Two)
}
