//! One safetensors file: its header parsed and checked, its data mapped; and the writer.
//!
//! The header is parsed here rather than by the format's own crate so that every error names the
//! tensor at fault and no arithmetic on a hostile header can overflow; the tests compare both.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

/// The format's own limit on the header.
const MAX_HEADER: u64 = 100_000_000;
const DTYPES: [(&str, u64); 20] = [
    ("BOOL", 8),
    ("F4", 4),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("U8", 8),
    ("I8", 8),
    ("F8_E5M2", 8),
    ("F8_E4M3", 8),
    ("F8_E8M0", 8),
    ("I16", 16),
    ("U16", 16),
    ("F16", 16),
    ("BF16", 16),
    ("I32", 32),
    ("U32", 32),
    ("F32", 32),
    ("C64", 64),
    ("F64", 64),
    ("I64", 64),
    ("U64", 64),
];

/// What the header says about a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The type of its numbers, as the format spells it (`F32`, `BF16`, …).
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its bytes within the file.
    range: std::ops::Range<usize>,
}

/// A mapped safetensors file.
#[derive(Debug)]
pub struct WeightFile {
    path: PathBuf,
    map: Mmap,
    tensors: BTreeMap<String, TensorInfo>,
}

#[derive(Deserialize)]
struct RawInfo {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl WeightFile {
    /// Maps and checks a file.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened; [`Error::Format`] when it is no safetensors file, is
    /// cut, or contradicts itself, naming the tensor where there is one.
    pub fn open(path: &Path) -> Result<Self> {
        let map = crate::ffi::map(path)?;
        let tensors = parse_header(&map).map_err(|m| Error::format(path, m))?;
        Ok(Self {
            path: path.to_owned(),
            map,
            tensors,
        })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its tensors by name.
    #[must_use]
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// Copies a tensor to `device`, converted to `kind`.
    ///
    /// # Errors
    /// [`Error::Format`] when there is no such tensor or its type is not F64, F32, F16, BF16 or an
    /// integer type that torch has; [`Error::Torch`] when memory does not suffice.
    pub fn read(&self, name: &str, device: Device, kind: Kind) -> Result<Tensor> {
        let info = self
            .tensors
            .get(name)
            .ok_or_else(|| Error::format(&self.path, format!("no tensor {name}")))?;
        let stored = kind_of(&info.dtype).ok_or_else(|| {
            Error::format(
                &self.path,
                format!("{name}: type {} is not supported", info.dtype),
            )
        })?;
        let shape: Vec<i64> = info.shape.iter().map(|&d| d as i64).collect();
        let bytes = &self.map[info.range.clone()];
        Ok(Tensor::f_from_data_size(bytes, &shape, stored)?
            .f_to_kind(kind)?
            .f_to_device(device)?)
    }
}

/// The torch kind of a safetensors type, for those that torch can hold plainly.
fn kind_of(dtype: &str) -> Option<Kind> {
    Some(match dtype {
        "F64" => Kind::Double,
        "F32" => Kind::Float,
        "F16" => Kind::Half,
        "BF16" => Kind::BFloat16,
        "I64" => Kind::Int64,
        "I32" => Kind::Int,
        "I16" => Kind::Int16,
        "I8" => Kind::Int8,
        "U8" => Kind::Uint8,
        "BOOL" => Kind::Bool,
        _ => return None,
    })
}

/// The safetensors type of a torch kind.
fn dtype_of(kind: Kind) -> Option<&'static str> {
    Some(match kind {
        Kind::Double => "F64",
        Kind::Float => "F32",
        Kind::Half => "F16",
        Kind::BFloat16 => "BF16",
        Kind::Int64 => "I64",
        Kind::Int => "I32",
        Kind::Int16 => "I16",
        Kind::Int8 => "I8",
        Kind::Uint8 => "U8",
        Kind::Bool => "BOOL",
        _ => return None,
    })
}

fn parse_header(file: &[u8]) -> std::result::Result<BTreeMap<String, TensorInfo>, String> {
    if file.starts_with(b"version https://git-lfs") {
        return Err("this is a Git LFS pointer, not the weights; run `git lfs pull`".into());
    }
    if file.is_empty() {
        return Err("the file is empty".into());
    }
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err("truncated: shorter than the 8 bytes of a safetensors header length".into());
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(format!("not a safetensors file: header length {length}"));
    }
    let length = length as usize;
    if length > rest.len() {
        return Err(format!(
            "truncated: the header has {length} bytes, the file {}",
            file.len()
        ));
    }
    let (header, data) = rest.split_at(length);
    let header = std::str::from_utf8(header).map_err(|_| "the header is not UTF-8".to_owned())?;
    let header: BTreeMap<String, Value> =
        serde_json::from_str(header).map_err(|e| format!("the header is not JSON: {e}"))?;
    let mut tensors = BTreeMap::new();
    for (name, value) in header {
        if name == "__metadata__" {
            continue;
        }
        let raw = RawInfo::deserialize(value).map_err(|e| format!("tensor {name}: {e}"))?;
        let info =
            check(&raw, 8 + length, data.len()).map_err(|m| format!("tensor {name}: {m}"))?;
        tensors.insert(name, info);
    }
    check_cover(&tensors, 8 + length, file.len())?;
    Ok(tensors)
}

/// Checks one tensor against the size of the data.
fn check(raw: &RawInfo, base: usize, data_len: usize) -> std::result::Result<TensorInfo, String> {
    let Some((_, bits)) = DTYPES.iter().find(|(name, _)| *name == raw.dtype) else {
        return Err(format!("unknown dtype {:?}", raw.dtype));
    };
    let (start, end) = raw.data_offsets;
    if start > end {
        return Err(format!("data_offsets [{start}, {end}] run backwards"));
    }
    if end > data_len as u64 {
        return Err(format!(
            "data_offsets [{start}, {end}] lie beyond the file's {data_len} bytes of data (truncated?)"
        ));
    }
    let wanted = raw
        .shape
        .iter()
        .try_fold(*bits, |product, &d| product.checked_mul(d))
        .ok_or_else(|| format!("shape {:?} overflows", raw.shape))?;
    if wanted % 8 != 0 || wanted / 8 != end - start {
        return Err(format!(
            "shape {:?} of {} needs {} bytes, data_offsets [{start}, {end}] give {}",
            raw.shape,
            raw.dtype,
            wanted.div_ceil(8),
            end - start
        ));
    }
    if raw.shape.iter().any(|&d| i64::try_from(d).is_err()) {
        return Err(format!("shape {:?} overflows", raw.shape));
    }
    Ok(TensorInfo {
        dtype: raw.dtype.clone(),
        shape: raw.shape.iter().map(|&d| d as usize).collect(),
        range: base + start as usize..base + end as usize,
    })
}

/// The format allows neither overlap nor holes.
fn check_cover(
    tensors: &BTreeMap<String, TensorInfo>,
    base: usize,
    file_len: usize,
) -> std::result::Result<(), String> {
    let mut spans: Vec<(usize, usize, &str)> = tensors
        .iter()
        .map(|(n, t)| (t.range.start, t.range.end, n.as_str()))
        .collect();
    spans.sort_unstable();
    let mut at = base;
    for (start, end, name) in spans {
        match start.cmp(&at) {
            std::cmp::Ordering::Less => {
                return Err(format!("tensor {name}: shares bytes with another tensor"));
            }
            std::cmp::Ordering::Greater => {
                return Err(format!(
                    "tensor {name}: {} unused bytes before it",
                    start - at
                ));
            }
            std::cmp::Ordering::Equal => at = end,
        }
    }
    if at != file_len {
        return Err(format!("{} bytes after the last tensor", file_len - at));
    }
    Ok(())
}

/// A tensor to be written: bytes are asked for only when their turn comes.
pub(crate) struct Entry<'a> {
    pub(crate) name: &'a str,
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<u64>,
    pub(crate) num_bytes: u64,
    pub(crate) bytes: Box<dyn Fn() -> Result<Vec<u8>> + 'a>,
}

impl<'a> Entry<'a> {
    /// A tensor's values, converted to `kind`.
    pub(crate) fn of_tensor(name: &'a str, tensor: &'a Tensor, kind: Kind) -> Result<Self> {
        let dtype = dtype_of(kind)
            .ok_or_else(|| Error::Argument(format!("{name}: {kind:?} cannot be saved")))?;
        let numel = tensor.numel();
        let num_bytes = numel * kind.elt_size_in_bytes();
        let bytes = move || {
            let host = tensor
                .f_detach()?
                .f_to_device(Device::Cpu)?
                .f_to_kind(kind)?
                .f_contiguous()?;
            let mut out = vec![0_u8; num_bytes];
            if numel > 0 {
                host.f_copy_data_u8(&mut out, numel)?;
            }
            Ok(out)
        };
        Ok(Self {
            name,
            dtype,
            shape: tensor.size().iter().map(|&d| d as u64).collect(),
            num_bytes: num_bytes as u64,
            bytes: Box::new(bytes),
        })
    }
}

/// Writes a safetensors file with its tensors in the given order, and syncs it.
pub(crate) fn write_safetensors(path: &Path, entries: &[Entry<'_>]) -> Result<()> {
    let mut header = Map::new();
    // What `transformers` looks for to know that the names are PyTorch's.
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut at = 0_u64;
    for e in entries {
        let end = at + e.num_bytes;
        header.insert(
            e.name.into(),
            json!({"dtype": e.dtype, "shape": e.shape, "data_offsets": [at, end]}),
        );
        at = end;
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let file = std::fs::File::create(path).map_err(Error::io(path))?;
    let mut out = std::io::BufWriter::with_capacity(1 << 20, file);
    let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(Error::io(path));
    put(&(text.len() as u64).to_le_bytes())?;
    put(&text)?;
    for e in entries {
        put(&(e.bytes)()?)?;
    }
    let file = out
        .into_inner()
        .map_err(|e| Error::io(path)(e.into_error()))?;
    file.sync_all().map_err(Error::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut f = (header.len() as u64).to_le_bytes().to_vec();
        f.extend(header.as_bytes());
        f.extend(vec![0; data]);
        f
    }

    fn error(header: &str, data: usize) -> String {
        parse_header(&file(header, data)).unwrap_err()
    }

    #[test]
    fn hostile_headers_are_refused_by_name() {
        let t = |dtype: &str, shape: &str, a: u64, b: u64| {
            format!(r#"{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{a},{b}]}}}}"#)
        };
        assert!(parse_header(&file(&t("F32", "[2]", 0, 8), 8)).is_ok());
        assert!(error(&t("Q7", "[2]", 0, 8), 8).contains("x: unknown dtype \"Q7\""));
        assert!(error(&t("F32", "[3]", 0, 8), 8).contains("needs 12 bytes"));
        assert!(error(&t("F32", "[2]", 0, 8), 4).contains("beyond the file"));
        assert!(error(&t("F32", "[2]", 8, 0), 8).contains("backwards"));
        assert!(error(&t("F32", "[4611686018427387904, 4]", 0, 8), 8).contains("overflows"));
        assert!(error(&t("F32", "[2]", 0, 8), 9).contains("after the last"));
        assert!(error(&t("F32", "[-1]", 0, 8), 8).contains("tensor x"));
        assert!(error("{", 0).contains("not JSON"));
        assert!(
            parse_header(&u64::MAX.to_le_bytes())
                .unwrap_err()
                .contains("header length")
        );
        assert!(parse_header(b"abc").unwrap_err().contains("truncated"));
    }

    #[test]
    fn overlap_is_refused() {
        let h = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
        assert!(error(h, 12).contains("b: shares bytes"));
    }
}
