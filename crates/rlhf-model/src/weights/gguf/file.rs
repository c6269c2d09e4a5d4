//! The file: header, metadata, and where each tensor lies.
//!
//! Invariant: every range of a [`TensorPlace`] lies within the file, no two share a byte, and its
//! length is what shape and format need.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;

use super::blocks::Format;
use crate::error::{Error, Result};

/// No file has more values in lists: a vocabulary of 2¹⁸ tokens needs three or four times as many.
const MAX_VALUES: usize = 1 << 22;

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Meta {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// f32 or f64.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Meta>),
}

#[derive(Debug)]
pub(super) struct TensorPlace {
    pub(super) name: String,
    /// Outermost dimension first, as everywhere but in GGUF.
    pub(super) shape: Vec<usize>,
    pub(super) format: Format,
    range: Range<usize>,
}

/// A mapped GGUF file.
#[derive(Debug)]
pub struct GgufFile {
    map: Mmap,
    meta: HashMap<String, Meta>,
    tensors: Vec<TensorPlace>,
}

impl GgufFile {
    /// Maps and checks a file.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened; [`Error::Format`] when it is no GGUF file of version
    /// 2 or 3, is cut, contradicts itself, or holds a tensor format that is not supported (named).
    pub fn open(path: &Path) -> Result<Self> {
        let map = crate::ffi::map(path)?;
        let (meta, tensors) = parse(&map).map_err(|m| Error::format(path, m))?;
        Ok(Self { map, meta, tensors })
    }

    /// The metadata.
    #[must_use]
    pub fn meta(&self) -> &HashMap<String, Meta> {
        &self.meta
    }

    /// The tensors' names and shapes, in the file's order.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.tensors
            .iter()
            .map(|t| (t.name.as_str(), t.shape.as_slice()))
    }

    /// A tensor's numbers, row by row.
    #[must_use]
    pub fn values(&self, name: &str) -> Option<Vec<f32>> {
        let t = self.place(name)?;
        Some(t.format.decode_all(self.bytes(t)))
    }

    pub(super) fn places(&self) -> &[TensorPlace] {
        &self.tensors
    }

    pub(super) fn place(&self, name: &str) -> Option<&TensorPlace> {
        self.tensors.iter().find(|t| t.name == name)
    }

    pub(super) fn bytes(&self, t: &TensorPlace) -> &[u8] {
        &self.map[t.range.clone()]
    }
}

/// A cursor that never leaves its bytes.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    /// How many values the file's lists may still have.
    values: usize,
}

pub(super) type Parsed<T> = std::result::Result<T, String>;

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Parsed<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        if n > rest.len() {
            return Err(format!(
                "truncated at byte {}: {n} more bytes expected",
                self.at
            ));
        }
        self.at += n;
        Ok(&rest[..n])
    }

    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Parsed<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of things of which each takes at least `least` bytes.
    fn count(&mut self, least: usize) -> Parsed<usize> {
        let n = self.u64()?;
        let room = (self.bytes.len() - self.at) / least;
        usize::try_from(n)
            .ok()
            .filter(|&n| n <= room)
            .ok_or_else(|| format!("byte {}: a count of {n} cannot be right", self.at - 8))
    }

    fn text(&mut self) -> Parsed<String> {
        let n = self.count(1)?;
        let bytes = self.take(n)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| format!("byte {}: not UTF-8", self.at - n))
    }

    fn meta(&mut self, code: u32, depth: u32) -> Parsed<Meta> {
        Ok(match code {
            0 => Meta::Unsigned(self.array::<1>()?[0].into()),
            1 => Meta::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Meta::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Meta::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Meta::Unsigned(self.u32()?.into()),
            5 => Meta::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => Meta::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Meta::Bool(self.array::<1>()?[0] != 0),
            8 => Meta::Text(self.text()?),
            9 if depth < 4 => {
                let code = self.u32()?;
                let n = self.count(1)?;
                self.values = self.values.checked_sub(n).ok_or_else(|| {
                    format!("byte {}: more than {MAX_VALUES} values in lists", self.at)
                })?;
                // Grown as it is read: a hostile count of small things costs no memory beforehand.
                let mut list = Vec::new();
                for _ in 0..n {
                    list.push(self.meta(code, depth + 1)?);
                }
                Meta::List(list)
            }
            10 => Meta::Unsigned(self.u64()?),
            11 => Meta::Signed(i64::from_le_bytes(self.array()?)),
            12 => Meta::Float(f64::from_le_bytes(self.array()?)),
            _ => return Err(format!("byte {}: unknown value type {code}", self.at)),
        })
    }
}

fn parse(bytes: &[u8]) -> Parsed<(HashMap<String, Meta>, Vec<TensorPlace>)> {
    if bytes.starts_with(b"version https://git-lfs") {
        return Err("this is a Git LFS pointer, not the weights; run `git lfs pull`".into());
    }
    if !bytes.starts_with(b"GGUF") {
        return Err("not a GGUF file (it does not start with GGUF)".into());
    }
    let mut c = Cursor {
        bytes,
        at: 4,
        values: MAX_VALUES,
    };
    let version = c.u32()?;
    // 2 and 3 differ only in that 3 allows big-endian files, whose version reads as 3 << 24 here.
    if !(2..=3).contains(&version) {
        return Err(format!(
            "GGUF version {version} is not supported, only 2 and 3, little-endian"
        ));
    }
    // A tensor's entry takes at least 24 bytes, a metadata entry 13.
    let num_tensors = c.count(24)?;
    let num_meta = c.count(13)?;
    let mut meta = HashMap::new();
    for _ in 0..num_meta {
        let key = c.text()?;
        let code = c.u32()?;
        let value = c.meta(code, 0).map_err(|m| format!("{key}: {m}"))?;
        if meta.contains_key(&key) {
            return Err(format!("key {key} stands twice"));
        }
        meta.insert(key, value);
    }
    let mut entries = Vec::new();
    for _ in 0..num_tensors {
        let name = c.text()?;
        let dims = c.u32()?;
        if dims > 4 {
            return Err(format!("tensor {name}: {dims} dimensions"));
        }
        let shape = (0..dims).map(|_| c.u64()).collect::<Parsed<Vec<u64>>>()?;
        entries.push((name, shape, c.u32()?, c.u64()?));
    }
    let align = match meta.get("general.alignment") {
        None => 32,
        Some(Meta::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n as usize,
        Some(other) => return Err(format!("general.alignment: {other:?} is no power of two")),
    };
    let base = c.at.next_multiple_of(align);
    let mut tensors = Vec::new();
    let mut seen = HashSet::new();
    for (name, dims, code, offset) in entries {
        let (shape, format, range) = locate(&dims, code, offset, base, bytes.len())
            .map_err(|m| format!("tensor {name}: {m}"))?;
        if !seen.insert(name.clone()) {
            return Err(format!("tensor {name} stands twice"));
        }
        tensors.push(TensorPlace {
            name,
            shape,
            format,
            range,
        });
    }
    check_apart(&tensors)?;
    Ok((meta, tensors))
}

/// Tensors that share bytes would make a small file large.
fn check_apart(tensors: &[TensorPlace]) -> Parsed<()> {
    let mut order: Vec<&TensorPlace> = tensors.iter().collect();
    order.sort_unstable_by_key(|t| (t.range.start, t.range.end));
    for pair in order.windows(2) {
        if pair[1].range.start < pair[0].range.end {
            let (a, b) = (&pair[0].name, &pair[1].name);
            return Err(format!("tensor {b}: shares bytes with {a}"));
        }
    }
    Ok(())
}

type Place = (Vec<usize>, Format, Range<usize>);

fn locate(dims: &[u64], code: u32, offset: u64, base: usize, len: usize) -> Parsed<Place> {
    let format = Format::of(code)?;
    let (numbers, block_bytes) = format.block();
    // No dimension may exceed what torch can count, also where another is zero.
    let total = dims
        .iter()
        .try_fold(1_u64, |n, &d| n.checked_mul(d.max(1)))
        .filter(|&n| i64::try_from(n).is_ok())
        .map(|_| dims.iter().product::<u64>())
        .and_then(|n| usize::try_from(n).ok())
        .ok_or_else(|| format!("shape {dims:?} overflows"))?;
    let row = dims.first().copied().unwrap_or(1);
    if row % numbers as u64 != 0 {
        return Err(format!(
            "rows of {row} numbers do not fill blocks of {numbers}"
        ));
    }
    let range = (total / numbers)
        .checked_mul(block_bytes)
        .zip(
            usize::try_from(offset)
                .ok()
                .and_then(|o| o.checked_add(base)),
        )
        .and_then(|(size, start)| Some(start..start.checked_add(size)?))
        .filter(|r| r.end <= len)
        .ok_or_else(|| format!("its data lie beyond the file's {len} bytes (truncated?)"))?;
    Ok((
        dims.iter().rev().map(|&d| d as usize).collect(),
        format,
        range,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(version: u32, tensors: u64, meta: u64) -> Vec<u8> {
        let mut f = b"GGUF".to_vec();
        f.extend(version.to_le_bytes());
        f.extend(tensors.to_le_bytes());
        f.extend(meta.to_le_bytes());
        f
    }

    fn tensor(f: &mut Vec<u8>, name: u8, dims: &[u64], code: u32, offset: u64) {
        f.extend(1_u64.to_le_bytes());
        f.push(name);
        f.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| f.extend(d.to_le_bytes()));
        f.extend(code.to_le_bytes());
        f.extend(offset.to_le_bytes());
    }

    fn error(f: &[u8]) -> String {
        parse(f).unwrap_err()
    }

    #[test]
    fn hostile_files_are_refused() {
        assert!(error(b"GGML").contains("not a GGUF"));
        assert!(error(b"version https://git-lfs.github.com/spec/v1").contains("git lfs pull"));
        assert!(error(&head(1, 0, 0)).contains("version 1"));
        assert!(error(&head(3 << 24, 0, 0)).contains("little-endian"));
        assert!(error(&head(3, u64::MAX, 0)).contains("cannot be right"));
        assert!(error(&head(3, 0, 1 << 60)).contains("cannot be right"));
        for dims in [[1 << 62, 8], [0, 1 << 63]] {
            let mut f = head(3, 1, 0);
            tensor(&mut f, b'x', &dims, 0, 0);
            assert!(error(&f).contains("overflows"));
        }
        let mut f = head(3, 1, 0);
        tensor(&mut f, b'x', &[33], 2, 0);
        assert!(error(&f).contains("do not fill blocks of 32"));
        let mut f = head(3, 1, 0);
        tensor(&mut f, b'x', &[32], 99, 0);
        assert!(error(&f).contains("type 99 is not supported; supported: F32, F16"));
    }

    #[test]
    fn shared_bytes_are_refused() {
        let two = |second: u64| {
            let mut f = head(2, 2, 0);
            tensor(&mut f, b'a', &[16], 0, 0);
            tensor(&mut f, b'b', &[8], 0, second);
            f.resize(f.len().next_multiple_of(32) + 96, 0);
            f
        };
        assert!(error(&two(32)).contains("tensor b: shares bytes with a"));
        let (_, tensors) = parse(&two(64)).unwrap();
        assert_eq!(tensors[1].range.len(), 32);
    }

    #[test]
    fn keys_stand_once_and_lists_are_bounded() {
        let key = |f: &mut Vec<u8>| {
            f.extend(1_u64.to_le_bytes());
            f.push(b'k');
        };
        let mut f = head(3, 0, 2);
        for _ in 0..2 {
            key(&mut f);
            f.extend([7, 0, 0, 0, 1]);
        }
        assert!(error(&f).contains("key k stands twice"));
        let mut f = head(3, 0, 1);
        key(&mut f);
        f.extend([9, 0, 0, 0, 0, 0, 0, 0]);
        f.extend((MAX_VALUES as u64 + 1).to_le_bytes());
        f.resize(f.len() + MAX_VALUES + 1, 0);
        assert!(error(&f).contains("values in lists"));
    }
}
