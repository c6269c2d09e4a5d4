//! A matrix with a bias, its low-rank adapter, and its eight-bit form.

use rlhf_kernels::layer::linears;
use rlhf_kernels::recompute;
use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// y = x·Wᵀ + b, and what an adapter adds.
#[derive(Debug)]
pub(crate) struct Linear {
    /// The module's path in the Hugging Face model.
    pub(crate) name: String,
    weight: Weight,
    bias: Option<Tensor>,
    pub(crate) adapter: Option<LowRank>,
}

/// The matrix.
#[derive(Debug)]
enum Weight {
    /// As in the file: `[out, in]`.
    Rows(Tensor),
    /// As in the file: `[in, out]`.
    Columns(Tensor),
    /// Eight bits a weight and a scale for every row; frozen.
    Int8 {
        /// i8 `[out, in]`.
        codes: Tensor,
        /// `[out, 1]`, in the type that the product is computed in.
        scales: Tensor,
        /// The file has it `[in, out]`.
        transposed: bool,
    },
}

/// W' = W + s·B·A (LoRA); with a magnitude m, W' = m · (W + s·B·A) / ‖W + s·B·A‖ row by row (DoRA).
#[derive(Debug)]
pub(crate) struct LowRank {
    /// `[r, in]`.
    pub(crate) a: Tensor,
    /// `[out, r]`.
    pub(crate) b: Tensor,
    pub(crate) scale: f64,
    /// `[out]`.
    pub(crate) magnitude: Option<Tensor>,
}

impl LowRank {
    /// The same tensors once more.
    fn share(&self) -> Self {
        Self {
            a: self.a.shallow_clone(),
            b: self.b.shallow_clone(),
            scale: self.scale,
            magnitude: self.magnitude.as_ref().map(Tensor::shallow_clone),
        }
    }

    /// s·x·Aᵀ·Bᵀ, computed in the adapter's type.
    fn delta(&self, x: &Tensor) -> Tensor {
        let none = None::<Tensor>;
        let low = x.to_kind(self.a.kind()).linear(&self.a, none.as_ref());
        (low.linear(&self.b, none) * self.scale).to_kind(x.kind())
    }
}

impl Linear {
    /// `weight` as the file has it; of eight bits when there are `scales`.
    pub(crate) fn new(
        name: String,
        weight: Tensor,
        scales: Option<Tensor>,
        bias: Option<Tensor>,
        transposed: bool,
    ) -> Self {
        let weight = match scales {
            Some(scales) => Weight::Int8 {
                codes: weight,
                scales,
                transposed,
            },
            None if transposed => Weight::Columns(weight),
            None => Weight::Rows(weight),
        };
        Self {
            name,
            weight,
            bias,
            adapter: None,
        }
    }

    /// The same tensors once more.
    pub(crate) fn share(&self) -> Self {
        Self {
            name: self.name.clone(),
            weight: match &self.weight {
                Weight::Rows(w) => Weight::Rows(w.shallow_clone()),
                Weight::Columns(w) => Weight::Columns(w.shallow_clone()),
                Weight::Int8 {
                    codes,
                    scales,
                    transposed,
                } => Weight::Int8 {
                    codes: codes.shallow_clone(),
                    scales: scales.shallow_clone(),
                    transposed: *transposed,
                },
            },
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
            adapter: self.adapter.as_ref().map(LowRank::share),
        }
    }

    /// (out, in).
    pub(crate) fn size(&self) -> (i64, i64) {
        match &self.weight {
            Weight::Rows(w) | Weight::Int8 { codes: w, .. } => (w.size()[0], w.size()[1]),
            Weight::Columns(w) => (w.size()[1], w.size()[0]),
        }
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_ref();
        Ok(match &self.adapter {
            None => self.base(x, bias)?,
            Some(LowRank {
                magnitude: Some(m), ..
            }) => {
                // The norm counts as a constant in the gradient (DoRA, arXiv 2402.09353, §4.3).
                let turn = (m / self.row_norms().to_kind(m.kind())).to_kind(x.kind());
                let y = (self.base(x, None)? + self.delta(x)) * turn;
                match bias {
                    Some(bias) => y + bias,
                    None => y,
                }
            }
            Some(_) => self.base(x, bias)? + self.delta(x),
        })
    }

    /// The weight `[out, in]`, where the product with it is all there is.
    pub(crate) fn plain(&self) -> Option<&Tensor> {
        match &self.weight {
            Weight::Rows(w) if self.bias.is_none() && self.adapter.is_none() => Some(w),
            _ => None,
        }
    }

    fn delta(&self, x: &Tensor) -> Tensor {
        match &self.adapter {
            Some(adapter) => adapter.delta(x),
            None => x.zeros_like(),
        }
    }

    fn base(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        Ok(match (&self.weight, bias) {
            (Weight::Rows(w), Some(bias)) => x.linear(w, Some(bias)),
            (Weight::Rows(w), None) => {
                let [y] = each(linears(x, &[w])?)?;
                y
            }
            (Weight::Columns(w), Some(bias)) => bias.addmm(x, w),
            (Weight::Columns(w), None) => x.mm(w),
            (Weight::Int8 { codes, scales, .. }, bias) => {
                let (codes, scales) = (codes.shallow_clone(), scales.shallow_clone());
                // Backward widens the codes again: a wide copy of the base is never kept.
                let y = recompute(&[x], move |x| {
                    let w = codes.to_kind(scales.kind());
                    x[0].linear(&w, None::<&Tensor>) * scales.view(-1)
                })?;
                match bias {
                    Some(bias) => y + bias,
                    None => y,
                }
            }
        })
    }

    /// ‖row‖ of the weight with its adapter, `[out]`.
    fn row_norms(&self) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        let sum = self.sum();
        (&sum * &sum).sum_dim_intlist(1, false, None::<Kind>).sqrt()
    }

    /// W + s·B·A `[out, in]`, without gradients.
    fn sum(&self) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        let base = self.base_matrix();
        match &self.adapter {
            Some(l) => (base.to_kind(l.a.kind()) + l.b.mm(&l.a) * l.scale).to_kind(base.kind()),
            None => base,
        }
    }

    /// The weight without its adapter `[out, in]`, without gradients.
    fn base_matrix(&self) -> Tensor {
        match &self.weight {
            Weight::Rows(w) => w.detach(),
            Weight::Columns(w) => w.detach().tr(),
            Weight::Int8 { codes, scales, .. } => codes.to_kind(scales.kind()) * scales,
        }
    }

    /// The weight that this computes with, adapter included, `[out, in]`, without gradients.
    pub(crate) fn matrix(&self) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        let sum = self.sum();
        match self.adapter.as_ref().and_then(|l| l.magnitude.as_ref()) {
            Some(m) => {
                let turn = m / self.row_norms().to_kind(m.kind());
                (sum.to_kind(m.kind()) * turn.unsqueeze(1)).to_kind(sum.kind())
            }
            None => sum,
        }
    }

    /// What a file holds for the weight: as it is, or merged and widened where there is an adapter or
    /// eight bits.
    pub(crate) fn stored(&self) -> Option<Tensor> {
        match &self.weight {
            Weight::Int8 {
                transposed: true, ..
            } => Some(self.matrix().tr()),
            Weight::Int8 { .. } => Some(self.matrix()),
            _ if self.adapter.is_none() => None,
            Weight::Rows(_) => Some(self.matrix()),
            Weight::Columns(_) => Some(self.matrix().tr()),
        }
    }

    pub(crate) fn bias(&self) -> Option<Tensor> {
        self.bias.as_ref().map(Tensor::detach)
    }

    /// Starts an adapter: A as given `[r, in]`, B zero, the magnitude (where wanted) that of the
    /// weight's rows, so that nothing changes yet.
    pub(crate) fn adapt(&mut self, a: Tensor, scale: f64, dora: bool) -> Result<()> {
        let (out, _) = self.size();
        let b = Tensor::f_zeros([out, a.size()[0]], (a.kind(), a.device()))?;
        let magnitude = dora.then(|| leaf(&self.row_norms().to_kind(a.kind())));
        self.adapter = Some(LowRank {
            a: leaf(&a),
            b: leaf(&b),
            scale,
            magnitude,
        });
        Ok(())
    }
}

/// The weights of projections that are products and nothing else.
pub(crate) fn plain<const N: usize>(all: [&Linear; N]) -> Option<[&Tensor; N]> {
    let weights: Vec<&Tensor> = all.into_iter().map_while(Linear::plain).collect();
    weights.try_into().ok()
}

/// What several projections make of one input.
pub(crate) fn together<const N: usize>(x: &Tensor, all: [&Linear; N]) -> Result<[Tensor; N]> {
    let outs = match plain(all) {
        Some(weights) => linears(x, &weights)?,
        None => all.iter().map(|l| l.forward(x)).collect::<Result<_>>()?,
    };
    each(outs)
}

/// As many as there are projections.
pub(crate) fn each<const N: usize>(outs: Vec<Tensor>) -> Result<[Tensor; N]> {
    outs.try_into()
        .map_err(|_| Error::Argument(format!("{N} projections did not give as many results")))
}

/// A leaf that is trained.
fn leaf(t: &Tensor) -> Tensor {
    t.detach().set_requires_grad(true)
}

/// i8 codes `[out, in]` and scales `[out, 1]` of a matrix `[out, in]`: a row's largest magnitude is
/// 127, the rest is rounded to nearest, so no weight moves by more than 1/254 of it.
///
/// # Errors
/// [`Error::NonFinite`] when a weight is NaN or infinite.
pub(crate) fn quantise(name: &str, matrix: &Tensor) -> Result<(Tensor, Tensor)> {
    let _no_grad = tch::no_grad_guard();
    let wide = matrix.to_kind(Kind::Float);
    let largest = wide.abs().amax([1], true);
    if !largest.sum(None::<Kind>).double_value(&[]).is_finite() {
        return Err(Error::NonFinite {
            what: format!("weights of {name}"),
        });
    }
    let scales = largest.clamp_min(f64::from(f32::MIN_POSITIVE)) / 127.0;
    let codes = (&wide / &scales).round().to_kind(Kind::Int8);
    Ok((codes, scales.to_kind(matrix.kind())))
}
