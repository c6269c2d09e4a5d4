//! Named tensors as a safetensors file and back, bit by bit.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

const KINDS: [(Kind, Dtype, usize); 5] = [
    (Kind::Float, Dtype::F32, 4),
    (Kind::Double, Dtype::F64, 8),
    (Kind::BFloat16, Dtype::BF16, 2),
    (Kind::Half, Dtype::F16, 2),
    (Kind::Int64, Dtype::I64, 8),
];

/// Writes named tensors to a new file and syncs it.
///
/// # Errors
/// When the file cannot be written or a tensor's type is none of f32, f64, bf16, f16, i64.
pub fn save(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let bad = |what: String| Error::Checkpoint {
        path: path.to_owned(),
        what,
    };
    let mut buffers = Vec::with_capacity(tensors.len());
    for (name, t) in tensors {
        let (_, dtype, size) = KINDS
            .into_iter()
            .find(|k| k.0 == t.kind())
            .ok_or_else(|| bad(format!("`{name}` is {:?}", t.kind())))?;
        let t = t.detach().to_device(Device::Cpu).contiguous();
        let mut bytes = vec![0u8; t.numel() * size];
        t.f_copy_data_u8(&mut bytes, t.numel())?;
        let shape: Vec<usize> = t.size().iter().map(|&d| d as usize).collect();
        buffers.push((name.clone(), dtype, shape, bytes));
    }
    let views = buffers
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            Ok((
                name.clone(),
                TensorView::new(*dtype, shape.clone(), bytes).map_err(|e| bad(e.to_string()))?,
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    let bytes = safetensors::serialize(views, None).map_err(|e| bad(e.to_string()))?;
    crate::files::write_synced(path, &bytes)
}

/// Reads a file that [`save`] wrote.
///
/// # Errors
/// When the file is unreadable or damaged.
pub fn load(path: &Path) -> Result<HashMap<String, Tensor>> {
    let bytes = std::fs::read(path).map_err(Error::read(path))?;
    let bad = |what: String| Error::Checkpoint {
        path: path.to_owned(),
        what,
    };
    let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(e.to_string()))?;
    let mut out = HashMap::new();
    for (name, view) in file.tensors() {
        let (kind, _, _) = KINDS
            .into_iter()
            .find(|k| k.1 == view.dtype())
            .ok_or_else(|| bad(format!("`{name}` is {:?}", view.dtype())))?;
        let shape: Vec<i64> = view.shape().iter().map(|&d| d as i64).collect();
        out.insert(name, Tensor::f_from_data_size(view.data(), &shape, kind)?);
    }
    Ok(out)
}
