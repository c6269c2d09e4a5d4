//! A matrix packed for products with few rows, as decoding has them.
//!
//! A product of B rows with a matrix of I·O numbers reads every number once and is bound by that as long
//! as B is small; a general product first copies the matrix into blocks, which costs more than the
//! product. Here the copy is made once. While one panel is multiplied, the next is fetched from memory.

use tch::{Device, Kind, Tensor};

use crate::error::{Result, ensure};
use crate::ffi;

/// A matrix `[O, I]` in panels of 32 of its rows.
#[derive(Debug)]
pub struct Panels {
    /// `[⌈O/32⌉, I, 32]`, the last panel filled with zeros.
    data: Tensor,
    out: i64,
}

impl Panels {
    /// Packs `weight` `[O, I]`, which must be f32 or bf16 on the CPU. bf16 is kept and widened as it is
    /// read: half the bytes, products and sums in f32 all the same.
    ///
    /// # Errors
    /// When the weight is no such matrix, or memory does not suffice.
    pub fn pack(weight: &Tensor) -> Result<Self> {
        const OP: &str = "Panels::pack";
        let size = weight.size();
        ensure(
            size.len() == 2 && weight.device() == Device::Cpu,
            OP,
            || {
                format!(
                    "the weight is {size:?} on {:?}, expected [O, I] on the CPU",
                    weight.device()
                )
            },
        )?;
        ensure(
            matches!(weight.kind(), Kind::Float | Kind::BFloat16),
            OP,
            || format!("the weight is {:?}, expected f32 or bf16", weight.kind()),
        )?;
        Ok(Self {
            data: ffi::pack_panels(&weight.detach())?,
            out: size[0],
        })
    }

    /// x·Wᵀ in f32, without gradients.
    ///
    /// # Shapes
    /// `x` f32 `[B, I]` on the CPU; result `[B, O]`, whose rows may lie further apart than O.
    ///
    /// # Errors
    /// When `x` is no such matrix.
    pub fn product(&self, x: &Tensor) -> Result<Tensor> {
        let (size, from) = (x.size(), self.data.size()[1]);
        ensure(
            size.len() == 2
                && size[1] == from
                && x.kind() == Kind::Float
                && x.device() == Device::Cpu,
            "Panels::product",
            || {
                format!(
                    "x is {:?} {size:?} on {:?}, expected f32 [B, {from}] on the CPU",
                    x.kind(),
                    x.device()
                )
            },
        )?;
        let x = x.detach();
        let x = if x.stride()[1] == 1 {
            x
        } else {
            x.contiguous()
        };
        Ok(ffi::panel_product(&x, &self.data)?.narrow(1, 0, self.out))
    }
}
