//! Named tensors as a safetensors file and back, bit by bit.
//!
//! Invariant: one tensor at a time is copied, so that a checkpoint needs no second copy of the model in
//! memory; a file appears whole or not at all.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

const KINDS: [(Kind, Dtype); 6] = [
    (Kind::Float, Dtype::F32),
    (Kind::Double, Dtype::F64),
    (Kind::BFloat16, Dtype::BF16),
    (Kind::Half, Dtype::F16),
    (Kind::Int64, Dtype::I64),
    (Kind::Uint8, Dtype::U8),
];

/// Writes named tensors to a file under a temporary name, syncs and renames it.
///
/// # Errors
/// When the file cannot be written, a tensor's type is none of f32, f64, bf16, f16, i64, u8, or two have
/// one name. A file that was there before stays as it was.
pub fn save(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let order = in_order(tensors);
    let header = header(path, &order)?;
    let mut name = std::ffi::OsString::from(".new-");
    name.push(path.file_name().unwrap_or_default());
    let temporary = path.with_file_name(name);
    let written = write(&temporary, path, &header, &order)
        .and_then(|()| std::fs::rename(&temporary, path).map_err(Error::write(path)));
    if written.is_err() {
        // It may not even have been made; the error that counts is the first.
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

/// The tensors in the order of their data: the widest first, so that each is aligned.
fn in_order(tensors: &[(String, Tensor)]) -> Vec<&(String, Tensor)> {
    let mut order: Vec<&(String, Tensor)> = tensors.iter().collect();
    order.sort_by(|(a, t), (b, u)| {
        let width = |t: &Tensor| t.kind().elt_size_in_bytes();
        width(u).cmp(&width(t)).then_with(|| a.cmp(b))
    });
    order
}

/// The file's header.
fn header(path: &Path, order: &[&(String, Tensor)]) -> Result<Vec<u8>> {
    let bad = |what: String| Error::Checkpoint {
        path: path.to_owned(),
        what,
        mend: "this is a mistake in the program that saves it",
    };
    let mut seen = std::collections::HashSet::new();
    let mut infos = Vec::with_capacity(order.len());
    let mut at = 0;
    for (name, t) in order {
        if !seen.insert(name) {
            return Err(bad(format!("`{name}` is there twice")));
        }
        let (_, dtype) = KINDS
            .into_iter()
            .find(|k| k.0 == t.kind())
            .ok_or_else(|| bad(format!("`{name}` is {:?}", t.kind())))?;
        let end = at + t.numel() * t.kind().elt_size_in_bytes();
        let info = TensorInfo {
            dtype,
            shape: t.size().iter().map(|&d| d as usize).collect(),
            data_offsets: (at, end),
        };
        infos.push((name.clone(), info));
        at = end;
    }
    let metadata = Metadata::new(None, infos).map_err(|e| bad(e.to_string()))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|e| bad(e.to_string()))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    Ok(header)
}

/// Fills `temporary`; an error names `path`, which the user knows.
fn write(
    temporary: &Path,
    path: &Path,
    header: &[u8],
    tensors: &[&(String, Tensor)],
) -> Result<()> {
    let fail = |e| Error::write(path)(e);
    let mut file = BufWriter::new(File::create(temporary).map_err(fail)?);
    file.write_all(header).map_err(fail)?;
    for (_, t) in tensors {
        let t = t.detach().to_device(Device::Cpu).contiguous();
        let mut bytes = vec![0u8; t.numel() * t.kind().elt_size_in_bytes()];
        t.f_copy_data_u8(&mut bytes, t.numel())?;
        file.write_all(&bytes).map_err(fail)?;
    }
    let file = file.into_inner().map_err(|e| fail(e.into_error()))?;
    file.sync_all().map_err(fail)
}

/// Reads a file that [`save`] wrote.
///
/// # Errors
/// When the file is unreadable or damaged.
pub fn load(path: &Path) -> Result<HashMap<String, Tensor>> {
    let bytes = std::fs::read(path).map_err(Error::read(path))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| Error::damaged(path, e))?;
    let mut out = HashMap::new();
    for (name, view) in file.tensors() {
        let (kind, _) = KINDS
            .into_iter()
            .find(|k| k.1 == view.dtype())
            .ok_or_else(|| Error::damaged(path, format!("`{name}` is {:?}", view.dtype())))?;
        let shape: Vec<i64> = view.shape().iter().map(|&d| d as i64).collect();
        out.insert(name, Tensor::f_from_data_size(view.data(), &shape, kind)?);
    }
    Ok(out)
}
