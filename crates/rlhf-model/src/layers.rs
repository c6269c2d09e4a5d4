//! What a layer is made of.
//!
//! Invariant: the tensors are those of the files, untouched: nothing fused, nothing transposed,
//! nothing permuted.

use std::collections::HashMap;

use rlhf_kernels::decode::{decodes, rms_norm};
use rlhf_kernels::layer::{add_norm, norm_linears, silu_mul, silu_mul_linear};
use rlhf_kernels::{AttentionLayout, AttentionOptions, shared_prefix_attention};
use tch::Tensor;

use crate::config::{Activation, Config};
use crate::error::{Error, Result};
use crate::family::{NormKind, Part};
use crate::linear::{Linear, each, plain, together};
use crate::rope::Angles;

/// After a module's name: the scales of its weight, where that is kept in eight bits.
pub(crate) const SCALES: &str = ".weight_scale";

/// A norm over the last dimension.
#[derive(Debug)]
pub(crate) struct Norm {
    weight: Tensor,
    bias: Option<Tensor>,
    kind: NormKind,
    eps: f64,
}

impl Norm {
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let (n, w) = (self.weight.size()[0], Some(&self.weight));
        match self.kind {
            NormKind::Rms => x.rms_norm(n, w, self.eps),
            NormKind::RmsPlusOne => x.rms_norm(n, Some(&(&self.weight + 1.0)), self.eps),
            NormKind::Layer => x.layer_norm(n, w, self.bias.as_ref(), self.eps, false),
        }
    }

    /// The factors of a norm by the root of the mean square.
    fn rms(&self) -> Option<Tensor> {
        match self.kind {
            NormKind::Rms => Some(self.weight.shallow_clone()),
            NormKind::RmsPlusOne => Some(&self.weight + 1.0),
            NormKind::Layer => None,
        }
    }

    /// As [`Norm::forward`] without gradients, in one pass where there is a kernel for it.
    pub(crate) fn decode(&self, x: &Tensor) -> Result<Tensor> {
        if self.kind == NormKind::Rms && x.dim() == 2 && decodes(x) {
            return Ok(rms_norm(x, &self.weight, self.eps)?);
        }
        Ok(self.forward(x))
    }

    /// The same tensors once more.
    fn share(&self) -> Self {
        Self {
            weight: self.weight.shallow_clone(),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
            ..*self
        }
    }

    /// The same without gradients, the 1 added once and for all.
    pub(crate) fn frozen(&self) -> Self {
        let weight = self.weight.detach();
        let (weight, kind) = match self.kind {
            NormKind::RmsPlusOne => (weight + 1.0, NormKind::Rms),
            kind => (weight, kind),
        };
        Self {
            weight,
            bias: self.bias.as_ref().map(Tensor::detach),
            kind,
            eps: self.eps,
        }
    }
}

/// `x` through a norm that may not be there.
pub(crate) fn normed(norm: Option<&Norm>, x: Tensor) -> Tensor {
    match norm {
        Some(norm) => norm.forward(&x),
        None => x,
    }
}

/// The rows that are wanted.
pub(crate) fn at(x: Tensor, rows: Option<&Tensor>) -> Result<Tensor> {
    match rows {
        Some(rows) => Ok(x.f_index_select(0, rows)?),
        None => Ok(x),
    }
}

/// The residual stream, x + more or x itself, and what a block's first projections make of it through a norm that may
/// not be there.
fn read<const N: usize>(
    norm: Option<&Norm>,
    x: Tensor,
    more: Option<&Tensor>,
    first: [&Linear; N],
) -> Result<(Tensor, [Tensor; N])> {
    if let Some((norm, factors)) = norm.and_then(|n| Some((n, n.rms()?))) {
        if let Some(weights) = plain(first) {
            let (x, outs) = norm_linears(&x, more, &factors, norm.eps, &weights)?;
            return Ok((x, each(outs)?));
        }
        let (x, input) = add_norm(&x, more, &factors, norm.eps)?;
        return Ok((x, together(&input, first)?));
    }
    let x = more.map_or_else(|| x.shallow_clone(), |more| &x + more);
    let input = normed(norm, x.shallow_clone());
    Ok((x, together(&input, first)?))
}

/// The projections to queries, keys and values.
#[derive(Debug)]
pub(crate) enum Qkv {
    Apart(Box<[Linear; 3]>),
    /// One under the other.
    Together(Linear),
}

/// The feed-forward block.
#[derive(Debug)]
pub(crate) struct Mlp {
    pub(crate) first: First,
    pub(crate) down: Linear,
    pub(crate) activation: Activation,
}

/// Its first half.
#[derive(Debug)]
pub(crate) enum First {
    /// act(gate) · up.
    Gated { gate: Linear, up: Linear },
    /// The same from one matrix, the gate's rows first.
    GateUp(Linear),
    /// act(up).
    Plain(Linear),
}

pub(crate) fn activate(activation: Activation, x: &Tensor) -> Tensor {
    match activation {
        Activation::Silu => x.silu(),
        Activation::GeluTanh => x.gelu("tanh"),
        Activation::Gelu => x.gelu("none"),
        Activation::Relu => x.relu(),
    }
}

impl Mlp {
    /// The residual stream x + more and what the block adds to it, read through `norm`.
    fn forward(&self, norm: Option<&Norm>, x: Tensor, more: &Tensor) -> Result<(Tensor, Tensor)> {
        let more = Some(more);
        Ok(match &self.first {
            First::Gated { gate, up } => {
                let (x, [gate, up]) = read(norm, x, more, [gate, up])?;
                (x, self.gated(&gate, &up)?)
            }
            First::GateUp(both) => {
                let (x, [both]) = read(norm, x, more, [both])?;
                let half = both.size()[1] / 2;
                let (gate, up) = (both.narrow(1, 0, half), both.narrow(1, half, half));
                (x, self.gated(&gate, &up)?)
            }
            First::Plain(up) => {
                let (x, [up]) = read(norm, x, more, [up])?;
                (x, self.down.forward(&activate(self.activation, &up))?)
            }
        })
    }

    /// down(act(gate) · up)
    fn gated(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        match (self.activation, self.down.plain()) {
            (Activation::Silu, Some(down)) => Ok(silu_mul_linear(gate, up, down)?),
            (Activation::Silu, None) => self.down.forward(&silu_mul(gate, up)?),
            (activation, _) => self.down.forward(&(activate(activation, gate) * up)),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) input_norm: Option<Norm>,
    pub(crate) qkv: Qkv,
    pub(crate) q_norm: Option<Norm>,
    pub(crate) k_norm: Option<Norm>,
    pub(crate) o: Linear,
    pub(crate) attention_norm: Option<Norm>,
    pub(crate) mlp_norm: Option<Norm>,
    pub(crate) mlp: Mlp,
    pub(crate) mlp_out_norm: Option<Norm>,
    pub(crate) options: AttentionOptions,
    /// Which of the trunk's rotations it uses.
    pub(crate) rope: Option<usize>,
}

impl Layer {
    /// Layer `n`, its tensors taken out of `tensors`.
    pub(crate) fn assemble(
        config: &Config,
        n: i64,
        tensors: &mut HashMap<String, Tensor>,
    ) -> Result<Self> {
        let shape = config.family.shape();
        let name = |part| {
            shape
                .name(part)
                .map(|p| format!("{}.{n}.{p}", shape.layers))
        };
        let absent = |name: &str| Error::Argument(format!("no tensor {name}"));
        let mut linear = |part| -> Result<Linear> {
            let name = name(part).ok_or_else(|| absent(&format!("{part:?}")))?;
            let weight = format!("{name}.weight");
            Ok(Linear::new(
                name.clone(),
                tensors.remove(&weight).ok_or_else(|| absent(&weight))?,
                tensors.remove(&format!("{name}{SCALES}")),
                tensors.remove(&format!("{name}.bias")),
                shape.transposed,
            ))
        };
        let has = |part| shape.name(part).is_some();
        let qkv = if has(Part::Qkv) {
            Qkv::Together(linear(Part::Qkv)?)
        } else {
            Qkv::Apart(Box::new([
                linear(Part::Q)?,
                linear(Part::K)?,
                linear(Part::V)?,
            ]))
        };
        let o = linear(Part::O)?;
        let first = if has(Part::GateUp) {
            First::GateUp(linear(Part::GateUp)?)
        } else if has(Part::Gate) {
            First::Gated {
                gate: linear(Part::Gate)?,
                up: linear(Part::Up)?,
            }
        } else {
            First::Plain(linear(Part::Up)?)
        };
        let mlp = Mlp {
            first,
            down: linear(Part::Down)?,
            activation: config.activation,
        };
        let mut norm = |part| match name(part) {
            Some(name) => take_norm(config, &name, tensors).map(Some),
            None => Ok(None),
        };
        let window = config.window(n);
        let local = window.is_some() && config.local_rope_theta.is_some();
        Ok(Self {
            input_norm: norm(Part::InputNorm)?,
            qkv,
            q_norm: norm(Part::QNorm)?,
            k_norm: norm(Part::KNorm)?,
            o,
            attention_norm: norm(Part::AttentionNorm)?,
            mlp_norm: norm(Part::MlpNorm)?,
            mlp,
            mlp_out_norm: norm(Part::MlpOutNorm)?,
            options: AttentionOptions {
                scale: config.attention_scale(),
                softcap: config.attention_softcap,
                window,
            },
            rope: config.rotates(n).then_some(usize::from(local)),
        })
    }

    /// The residual stream `[N, H]` after this layer, or of it `rows` (i64 `[R]`) alone, which spares what follows the
    /// attention for the others. `capture` sees the rotated keys and the values, `[N, Hkv, D]` each.
    pub(crate) fn forward(
        &self,
        config: &Config,
        x: Tensor,
        angles: &[Angles],
        layout: &AttentionLayout,
        rows: Option<&Tensor>,
        capture: &mut dyn FnMut(&Tensor, &Tensor),
    ) -> Result<Tensor> {
        let (x, [q, k, v]) = self.heads(config, x)?;
        let rotate = |t: Tensor| match self.rope {
            Some(which) => angles[which].rotate(&t),
            None => Ok(t),
        };
        let (q, k) = (rotate(q)?, rotate(k)?);
        capture(&k, &v);
        let seen = shared_prefix_attention(&q, &k, &v, layout, &self.options)?;
        let (x, seen) = (at(x, rows)?, at(seen.flatten(1, 2), rows)?);
        let seen = self.o.forward(&seen)?;
        let seen = normed(self.attention_norm.as_ref(), seen);
        let (x, out) = self.mlp.forward(self.mlp_norm.as_ref(), x, &seen)?;
        Ok(normed(self.mlp_out_norm.as_ref(), out) + x)
    }

    /// The residual stream, and of it queries, keys and values `[N, heads, D]`, normed where the family does, not yet
    /// rotated.
    fn heads(&self, c: &Config, x: Tensor) -> Result<(Tensor, [Tensor; 3])> {
        let (d, hq, hkv) = (c.head_dim, c.num_attention_heads, c.num_key_value_heads);
        let whole = c.family.shape().whole_qk_norm;
        let split = |t: Tensor, norm: Option<&Norm>, heads: i64| {
            let (before, after) = if whole { (norm, None) } else { (None, norm) };
            normed(after, normed(before, t).view([-1, heads, d]))
        };
        let norm = self.input_norm.as_ref();
        let (x, [q, k, v]) = match &self.qkv {
            Qkv::Apart(three) => read(norm, x, None, three.each_ref())?,
            Qkv::Together(all) => {
                let (x, [all]) = read(norm, x, None, [all])?;
                let part = |from: i64, heads: i64| all.narrow(1, from * d, heads * d);
                (x, [part(0, hq), part(hq, hkv), part(hq + hkv, hkv)])
            }
        };
        let q = split(q, self.q_norm.as_ref(), hq);
        let k = split(k, self.k_norm.as_ref(), hkv);
        Ok((x, [q, k, split(v, None, hkv)]))
    }

    /// The same tensors once more.
    pub(crate) fn share(&self) -> Self {
        let norm = |n: &Option<Norm>| n.as_ref().map(Norm::share);
        let first = match &self.mlp.first {
            First::Gated { gate, up } => First::Gated {
                gate: gate.share(),
                up: up.share(),
            },
            First::GateUp(both) => First::GateUp(both.share()),
            First::Plain(up) => First::Plain(up.share()),
        };
        Self {
            input_norm: norm(&self.input_norm),
            qkv: match &self.qkv {
                Qkv::Apart(three) => Qkv::Apart(Box::new(three.each_ref().map(Linear::share))),
                Qkv::Together(all) => Qkv::Together(all.share()),
            },
            q_norm: norm(&self.q_norm),
            k_norm: norm(&self.k_norm),
            o: self.o.share(),
            attention_norm: norm(&self.attention_norm),
            mlp_norm: norm(&self.mlp_norm),
            mlp: Mlp {
                first,
                down: self.mlp.down.share(),
                activation: self.mlp.activation,
            },
            mlp_out_norm: norm(&self.mlp_out_norm),
            options: self.options,
            rope: self.rope,
        }
    }

    /// Its matrices, in the order of its parameters.
    pub(crate) fn linears(&self) -> Vec<&Linear> {
        let mut all = match &self.qkv {
            Qkv::Apart(three) => three.iter().collect(),
            Qkv::Together(one) => vec![one],
        };
        all.push(&self.o);
        match &self.mlp.first {
            First::Gated { gate, up } => all.extend([gate, up]),
            First::GateUp(one) | First::Plain(one) => all.push(one),
        }
        all.push(&self.mlp.down);
        all
    }

    /// The same, to be changed.
    pub(crate) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all = match &mut self.qkv {
            Qkv::Apart(three) => three.iter_mut().collect(),
            Qkv::Together(one) => vec![one],
        };
        all.push(&mut self.o);
        match &mut self.mlp.first {
            First::Gated { gate, up } => all.extend([gate, up]),
            First::GateUp(one) | First::Plain(one) => all.push(one),
        }
        all.push(&mut self.mlp.down);
        all
    }
}

/// Takes a norm out of `tensors`.
pub(crate) fn take_norm(
    config: &Config,
    name: &str,
    tensors: &mut HashMap<String, Tensor>,
) -> Result<Norm> {
    let weight = format!("{name}.weight");
    Ok(Norm {
        weight: tensors
            .remove(&weight)
            .ok_or_else(|| Error::Argument(format!("no tensor {weight}")))?,
        bias: tensors.remove(&format!("{name}.bias")),
        kind: config.family.shape().norm,
        eps: config.norm_eps,
    })
}
