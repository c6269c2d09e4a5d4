//! GGUF files of the Llama family: a bounds-checked reader, and their import as a Hugging Face folder.
//!
//! The reader takes version 3 with tensors in F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0. The
//! import undoes the row order that GGUF uses for the rotary projections, and rebuilds the tokenizer
//! from the file's metadata. Its output is a function of the file alone: same bytes every time.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use half::{bf16, f16};
use memmap2::Mmap;
use serde_json::{Map, Value, json};
use tch::Kind;

use super::safetensors::{Entry, write_safetensors};
use super::staging::{Staging, sync_write};
use crate::error::{Error, Result};

/// No vocabulary is longer.
const MAX_LIST: usize = 1 << 24;

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

/// The storage format of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
}

impl Format {
    fn of(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            30 => Self::Bf16,
            _ => return None,
        })
    }

    /// Numbers and bytes of a block.
    fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
        }
    }
}

#[derive(Debug)]
struct TensorPlace {
    name: String,
    /// Outermost dimension first, as everywhere but in GGUF.
    shape: Vec<usize>,
    format: Format,
    range: std::ops::Range<usize>,
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
    /// 3, is cut, contradicts itself, or holds a tensor format that is not supported (named).
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
        let t = self.tensors.iter().find(|t| t.name == name)?;
        Some(self.dequantise(t))
    }

    fn dequantise(&self, t: &TensorPlace) -> Vec<f32> {
        dequantise(t.format, &self.map[t.range.clone()])
    }
}

/// A cursor that never leaves its bytes.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

type Parsed<T> = std::result::Result<T, String>;

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
                if n > MAX_LIST {
                    return Err(format!("byte {}: a list of {n} values", self.at));
                }
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
    if !bytes.starts_with(b"GGUF") {
        return Err("not a GGUF file (it does not start with GGUF)".into());
    }
    let mut c = Cursor { bytes, at: 4 };
    let version = c.u32()?;
    if version != 3 {
        return Err(format!("GGUF version {version} is not supported, only 3"));
    }
    // A tensor's entry takes at least 24 bytes, a metadata entry 13.
    let num_tensors = c.count(24)?;
    let num_meta = c.count(13)?;
    let mut meta = HashMap::new();
    for _ in 0..num_meta {
        let key = c.text()?;
        let code = c.u32()?;
        let value = c.meta(code, 0).map_err(|m| format!("{key}: {m}"))?;
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
        Some(other) => return Err(format!("general.alignment: {other:?}")),
    };
    let base = c.at.next_multiple_of(align);
    let mut tensors = Vec::new();
    let mut seen = HashSet::new();
    for (name, dims, code, offset) in entries {
        let place = locate(&dims, code, offset, base, bytes.len())
            .map_err(|m| format!("tensor {name}: {m}"))?;
        let (shape, format, range) = place;
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
    Ok((meta, tensors))
}

type Place = (Vec<usize>, Format, std::ops::Range<usize>);

fn locate(dims: &[u64], code: u32, offset: u64, base: usize, len: usize) -> Parsed<Place> {
    let format = Format::of(code).ok_or_else(|| {
        format!(
            "ggml type {code} is not supported; supported: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0"
        )
    })?;
    let (numbers, block_bytes) = format.block();
    let total = dims
        .iter()
        .try_fold(1_u64, |n, &d| n.checked_mul(d))
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

fn dequantise(format: Format, bytes: &[u8]) -> Vec<f32> {
    let (numbers, size) = format.block();
    let mut out = Vec::with_capacity(bytes.len() / size * numbers);
    let half_at = |b: &[u8], i: usize| f16::from_le_bytes([b[i], b[i + 1]]).to_f32();
    let low_then_high = |packed: &[u8]| {
        let mut q = [0_u8; 32];
        for (i, b) in packed.iter().enumerate() {
            q[i] = b & 15;
            q[i + 16] = b >> 4;
        }
        q
    };
    let fifth_bits = |b: &[u8], q: &mut [u8; 32]| {
        let high = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        for (i, q) in q.iter_mut().enumerate() {
            *q |= ((high >> i & 1) as u8) << 4;
        }
    };
    for b in bytes.chunks_exact(size) {
        match format {
            Format::F32 => out.push(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Format::F16 => out.push(half_at(b, 0)),
            Format::Bf16 => out.push(bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            Format::Q8_0 => {
                let d = half_at(b, 0);
                out.extend(b[2..].iter().map(|&q| d * f32::from(q.cast_signed())));
            }
            Format::Q4_0 => {
                let d = half_at(b, 0);
                out.extend(low_then_high(&b[2..]).map(|q| d * (f32::from(q) - 8.0)));
            }
            Format::Q4_1 => {
                let (d, m) = (half_at(b, 0), half_at(b, 2));
                out.extend(low_then_high(&b[4..]).map(|q| d * f32::from(q) + m));
            }
            Format::Q5_0 => {
                let d = half_at(b, 0);
                let mut q = low_then_high(&b[6..]);
                fifth_bits(&b[2..6], &mut q);
                out.extend(q.map(|q| d * (f32::from(q) - 16.0)));
            }
            Format::Q5_1 => {
                let (d, m) = (half_at(b, 0), half_at(b, 2));
                let mut q = low_then_high(&b[8..]);
                fifth_bits(&b[4..8], &mut q);
                out.extend(q.map(|q| d * f32::from(q) + m));
            }
        }
    }
    out
}

/// Little-endian bytes of `values` as `kind`, rounded to nearest even.
fn encode(values: &[f32], kind: Kind) -> Vec<u8> {
    match kind {
        Kind::BFloat16 => values
            .iter()
            .flat_map(|&x| bf16::from_f32(x).to_le_bytes())
            .collect(),
        Kind::Half => values
            .iter()
            .flat_map(|&x| f16::from_f32(x).to_le_bytes())
            .collect(),
        _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

/// What an import wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// How many tensors.
    pub tensors: usize,
    /// The licence that the file names.
    pub license: Option<String>,
}

/// Writes a Llama-family GGUF as a Hugging Face folder (`config.json`, `generation_config.json`,
/// `model.safetensors`, `tokenizer.json`, `tokenizer_config.json`), all or nothing, with weights in
/// `kind`: f32, f16 or bf16.
///
/// # Errors
/// [`Error::Io`] when a file cannot be read or written; [`Error::Format`] naming the metadata key or
/// tensor that is absent or not supported; [`Error::Argument`] for another `kind`.
pub fn import(file: &Path, out_dir: &Path, kind: Kind) -> Result<Imported> {
    let (dtype, torch_dtype) = match kind {
        Kind::Float => ("F32", "float32"),
        Kind::Half => ("F16", "float16"),
        Kind::BFloat16 => ("BF16", "bfloat16"),
        other => {
            return Err(Error::Argument(format!(
                "{other:?}: import to f32, f16 or bf16"
            )));
        }
    };
    let gguf = GgufFile::open(file)?;
    let reader = MetaReader { gguf: &gguf, file };
    reader.supported()?;
    let tied = !gguf.tensors.iter().any(|t| t.name == "output.weight");
    let config = reader.config(torch_dtype, tied)?;
    let generation = json!({
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
    });
    let (tokenizer, tokenizer_config) = reader.tokenizer()?;
    let heads = reader.unsigned("llama.attention.head_count")? as usize;
    let kv_heads = reader.unsigned("llama.attention.head_count_kv")? as usize;
    let names = gguf
        .tensors
        .iter()
        .map(|t| hugging_face_name(&t.name).map_err(|m| Error::format(file, m)))
        .collect::<Result<Vec<_>>>()?;
    let mut entries = Vec::new();
    for (t, name) in gguf.tensors.iter().zip(&names) {
        let heads = match t.name.rsplit('.').nth(1) {
            Some("attn_q") => Some(heads),
            Some("attn_k") => Some(kv_heads),
            _ => None,
        };
        let rows = t.shape.first().copied().unwrap_or(0);
        if heads.is_some_and(|h| h == 0 || t.shape.len() != 2 || rows % (2 * h) != 0) {
            return Err(Error::format(
                file,
                format!(
                    "tensor {}: shape {:?} does not split into {heads:?} heads",
                    t.name, t.shape
                ),
            ));
        }
        let numel: usize = t.shape.iter().product();
        let gguf = &gguf;
        entries.push(Entry {
            name,
            dtype,
            shape: t.shape.iter().map(|&d| d as u64).collect(),
            num_bytes: (numel * kind.elt_size_in_bytes()) as u64,
            bytes: Box::new(move || {
                let values = gguf.dequantise(t);
                let values = match heads {
                    Some(h) => halves(&values, rows, h),
                    None => values,
                };
                Ok(encode(&values, kind))
            }),
        });
    }
    let staging = Staging::new(out_dir)?;
    write_safetensors(&staging.path("model.safetensors"), &entries)?;
    for (name, value) in [
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", tokenizer_config),
    ] {
        let mut text = String::new();
        write_json(&value, 0, &mut text);
        sync_write(&staging.path(name), text.as_bytes())?;
    }
    staging.commit()?;
    let license = match gguf.meta.get("general.license") {
        Some(Meta::Text(t)) => Some(t.clone()),
        _ => None,
    };
    Ok(Imported {
        tensors: gguf.tensors.len(),
        license,
    })
}

/// GGUF stores a head's rotary rows in pairs (0, D/2, 1, D/2 + 1, …); Hugging Face in halves.
fn halves(values: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    let width = values.len() / rows;
    let half = rows / heads / 2;
    let mut out = Vec::with_capacity(values.len());
    for head in 0..heads {
        for part in 0..2 {
            for pair in 0..half {
                let row = head * 2 * half + pair * 2 + part;
                out.extend_from_slice(&values[row * width..(row + 1) * width]);
            }
        }
    }
    out
}

fn hugging_face_name(name: &str) -> Parsed<String> {
    let unknown = || format!("tensor {name} is unknown in the Llama family");
    let stem = name.strip_suffix(".weight").ok_or_else(unknown)?;
    let mapped = match stem {
        "token_embd" => "model.embed_tokens".to_owned(),
        "output_norm" => "model.norm".to_owned(),
        "output" => "lm_head".to_owned(),
        _ => {
            let (layer, part) = stem
                .strip_prefix("blk.")
                .and_then(|s| s.split_once('.'))
                .ok_or_else(unknown)?;
            let layer: u32 = layer.parse().map_err(|_| unknown())?;
            let part = match part {
                "attn_q" => "self_attn.q_proj",
                "attn_k" => "self_attn.k_proj",
                "attn_v" => "self_attn.v_proj",
                "attn_output" => "self_attn.o_proj",
                "ffn_gate" => "mlp.gate_proj",
                "ffn_up" => "mlp.up_proj",
                "ffn_down" => "mlp.down_proj",
                "attn_norm" => "input_layernorm",
                "ffn_norm" => "post_attention_layernorm",
                _ => return Err(unknown()),
            };
            format!("model.layers.{layer}.{part}")
        }
    };
    Ok(format!("{mapped}.weight"))
}

/// Reads metadata with errors that name file and key.
struct MetaReader<'a> {
    gguf: &'a GgufFile,
    file: &'a Path,
}

impl MetaReader<'_> {
    fn bad(&self, key: &str, message: impl std::fmt::Display) -> Error {
        Error::format(self.file, format!("{key}: {message}"))
    }

    fn get(&self, key: &str) -> Result<&Meta> {
        self.gguf
            .meta
            .get(key)
            .ok_or_else(|| self.bad(key, "missing in the metadata"))
    }

    fn unsigned(&self, key: &str) -> Result<u64> {
        match self.get(key)? {
            Meta::Unsigned(n) => Ok(*n),
            Meta::Signed(n) if *n >= 0 => Ok(n.unsigned_abs()),
            _ => Err(self.bad(key, "not a non-negative integer")),
        }
    }

    fn float(&self, key: &str) -> Result<f64> {
        match self.get(key)? {
            Meta::Float(x) if x.is_finite() => Ok(*x),
            _ => Err(self.bad(key, "not a finite number")),
        }
    }

    fn text(&self, key: &str) -> Result<&str> {
        match self.get(key)? {
            Meta::Text(t) => Ok(t),
            _ => Err(self.bad(key, "not text")),
        }
    }

    fn texts(&self, key: &str) -> Result<Vec<&str>> {
        let Meta::List(list) = self.get(key)? else {
            return Err(self.bad(key, "not a list"));
        };
        list.iter()
            .map(|m| match m {
                Meta::Text(t) => Ok(t.as_str()),
                _ => Err(self.bad(key, "not a list of texts")),
            })
            .collect()
    }

    /// What would be imported wrongly is refused.
    fn supported(&self) -> Result<()> {
        for (key, wanted) in [
            ("general.architecture", "llama"),
            ("tokenizer.ggml.model", "gpt2"),
            ("tokenizer.ggml.pre", "smollm"),
        ] {
            let found = self.text(key)?;
            if found != wanted {
                return Err(self.bad(key, format!("{found:?} is not supported, only {wanted:?}")));
            }
        }
        match self.gguf.meta.get("llama.rope.scaling.type") {
            None => Ok(()),
            Some(Meta::Text(t)) if t == "none" => Ok(()),
            Some(other) => Err(self.bad(
                "llama.rope.scaling.type",
                format!("{other:?} is not supported"),
            )),
        }
    }

    fn config(&self, torch_dtype: &str, tied: bool) -> Result<Value> {
        let n = |key: &str| self.unsigned(&format!("llama.{key}"));
        let eps = self.float("llama.attention.layer_norm_rms_epsilon")?;
        // Stored as f32; six digits give back the decimal number that was meant.
        let eps: f64 = format!("{eps:.5e}")
            .parse()
            .map_err(|_| self.bad("llama.attention.layer_norm_rms_epsilon", "not a number"))?;
        Ok(json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": n("embedding_length")?,
            "intermediate_size": n("feed_forward_length")?,
            "num_hidden_layers": n("block_count")?,
            "num_attention_heads": n("attention.head_count")?,
            "num_key_value_heads": n("attention.head_count_kv")?,
            "head_dim": n("rope.dimension_count")?,
            "max_position_embeddings": n("context_length")?,
            "rms_norm_eps": eps,
            "rope_theta": self.float("llama.rope.freq_base")?,
            "vocab_size": n("vocab_size")?,
            "tie_word_embeddings": tied,
            "hidden_act": "silu",
            "attention_bias": false,
            "mlp_bias": false,
            "attention_dropout": 0.0,
            // 1/24: what the SmolLM2 family was started with; the metadata does not say.
            "initializer_range": 0.041_666_666_666_666_664,
            "bos_token_id": self.unsigned("tokenizer.ggml.bos_token_id")?,
            "eos_token_id": self.unsigned("tokenizer.ggml.eos_token_id")?,
            "pad_token_id": self.unsigned("tokenizer.ggml.padding_token_id")?,
            "torch_dtype": torch_dtype,
            "use_cache": true,
        }))
    }

    /// `tokenizer.json` and `tokenizer_config.json`.
    fn tokenizer(&self) -> Result<(Value, Value)> {
        const CONTROL: i64 = 3;
        let tokens = self.texts("tokenizer.ggml.tokens")?;
        let kinds = match self.get("tokenizer.ggml.token_type")? {
            Meta::List(kinds) if kinds.len() == tokens.len() => kinds,
            _ => return Err(self.bad("tokenizer.ggml.token_type", "not one type a token")),
        };
        let added: Vec<Value> = tokens
            .iter()
            .zip(kinds)
            .enumerate()
            .filter(|(_, (_, kind))| {
                matches!(kind, Meta::Signed(k) if *k == CONTROL)
                    || matches!(kind, Meta::Unsigned(k) if *k == CONTROL.unsigned_abs())
            })
            .map(|(id, (token, _))| {
                json!({"id": id, "content": token, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true})
            })
            .collect();
        let vocab: Map<String, Value> = tokens
            .iter()
            .enumerate()
            .map(|(id, t)| ((*t).to_owned(), json!(id)))
            .collect();
        let tokenizer = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": null,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": true},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                    "use_regex": true},
            ]},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
                "use_regex": true},
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": false,
                "vocab": vocab,
                "merges": self.texts("tokenizer.ggml.merges")?,
            },
        });
        let token = |name: &str| -> Result<&str> {
            let key = format!("tokenizer.ggml.{name}_token_id");
            let id = self.unsigned(&key)?;
            let found = usize::try_from(id)
                .ok()
                .and_then(|i| tokens.get(i).copied());
            found.ok_or_else(|| self.bad(&key, format!("{id} is not in the vocabulary")))
        };
        let (bos, eos) = (token("bos")?, token("eos")?);
        let config = json!({
            "add_prefix_space": false,
            "bos_token": bos,
            "eos_token": eos,
            "unk_token": token("unknown")?,
            "pad_token": token("padding")?,
            "additional_special_tokens": [bos, eos],
            "chat_template": self.text("tokenizer.chat_template")?,
            "clean_up_tokenization_spaces": false,
            "model_max_length": self.unsigned("llama.context_length")?,
            "tokenizer_class": "GPT2Tokenizer",
        });
        Ok((tokenizer, config))
    }
}

/// JSON indented by one space, with numbers spelled as Python spells them: the format that tools of
/// this ecosystem write, so that a folder can be compared by its bytes.
fn write_json(value: &Value, depth: usize, out: &mut String) {
    let line = |depth: usize, out: &mut String| {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', depth));
    };
    match value {
        Value::Array(items) if !items.is_empty() => {
            for (i, item) in items.iter().enumerate() {
                out.push(if i == 0 { '[' } else { ',' });
                line(depth + 1, out);
                write_json(item, depth + 1, out);
            }
            line(depth, out);
            out.push(']');
        }
        Value::Object(map) if !map.is_empty() => {
            for (i, (key, item)) in map.iter().enumerate() {
                out.push(if i == 0 { '{' } else { ',' });
                line(depth + 1, out);
                out.push_str(&Value::String(key.clone()).to_string());
                out.push_str(": ");
                write_json(item, depth + 1, out);
            }
            line(depth, out);
            out.push('}');
        }
        Value::Number(n) => match n.as_f64().filter(|_| n.is_f64()) {
            Some(x) => out.push_str(&python_float(x)),
            None => out.push_str(&n.to_string()),
        },
        other => out.push_str(&other.to_string()),
    }
}

/// The shortest decimal that reads back as `x`, as Python's `repr` lays it out.
fn python_float(x: f64) -> String {
    let scientific = format!("{x:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    match exponent.parse::<i32>() {
        Ok(e) if (-4..16).contains(&e) => format!("{x:?}"),
        Ok(e) => format!("{digits}e{}{:02}", if e < 0 { '-' } else { '+' }, e.abs()),
        Err(_) => scientific,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_spelled_as_python_does() {
        for (x, text) in [
            (0.0, "0.0"),
            (1e-5, "1e-05"),
            (0.0001, "0.0001"),
            (100_000.0, "100000.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e-7, "1.5e-07"),
            (1.0 / 24.0, "0.041666666666666664"),
            (2.5e300, "2.5e+300"),
        ] {
            assert_eq!(python_float(x), text);
        }
    }

    #[test]
    fn json_is_laid_out_as_python_does() {
        let mut out = String::new();
        write_json(
            &json!({"a": [1, "é\n"], "b": {}, "c": [], "d": null}),
            0,
            &mut out,
        );
        assert_eq!(
            out,
            "{\n \"a\": [\n  1,\n  \"é\\n\"\n ],\n \"b\": {},\n \"c\": [],\n \"d\": null\n}"
        );
    }

    #[test]
    fn blocks_decode_to_hand_worked_numbers() {
        let half = |x: f32| f16::from_f32(x).to_le_bytes();
        // Q8_0: scale ½; bytes 1, −2, then zeros.
        let mut b = half(0.5).to_vec();
        b.extend([1, 254]);
        b.resize(34, 0);
        assert_eq!(dequantise(Format::Q8_0, &b)[..3], [0.5, -1.0, 0.0]);
        // Nibbles of 0x9f: low 15 at 0, high 9 at 16.
        let nibbles = |head: &[u8], size: usize| {
            let mut b = head.to_vec();
            b.push(0x9f);
            b.resize(size, 0);
            b
        };
        let q = dequantise(Format::Q4_0, &nibbles(&half(0.5), 18));
        assert_eq!((q[0], q[16], q[1]), (3.5, 0.5, -4.0));
        let q = dequantise(Format::Q4_1, &nibbles(&[half(0.5), half(1.0)].concat(), 20));
        assert_eq!((q[0], q[16], q[1]), (8.5, 5.5, 1.0));
        // Fifth bits: number 0 gets 16 (15 + 16 = 31), number 16 none.
        let head = [&half(0.5)[..], &1_u32.to_le_bytes()].concat();
        let q = dequantise(Format::Q5_0, &nibbles(&head, 22));
        assert_eq!((q[0], q[16], q[1]), (7.5, -3.5, -8.0));
        let head = [&half(0.5)[..], &half(1.0), &(1_u32 << 16).to_le_bytes()].concat();
        let q = dequantise(Format::Q5_1, &nibbles(&head, 24));
        assert_eq!((q[0], q[16], q[1]), (8.5, 13.5, 1.0));
    }

    #[test]
    fn rotary_rows_become_halves() {
        // One head of 4 rows, width 1: pairs (0, 2), (1, 3) stored as 0 2 1 3.
        assert_eq!(halves(&[0.0, 2.0, 1.0, 3.0], 4, 1), [0.0, 1.0, 2.0, 3.0]);
    }

    #[test]
    fn hostile_files_are_refused() {
        assert!(parse(b"GGML").unwrap_err().contains("not a GGUF"));
        let head = |version: u32, tensors: u64, meta: u64| {
            let mut f = b"GGUF".to_vec();
            f.extend(version.to_le_bytes());
            f.extend(tensors.to_le_bytes());
            f.extend(meta.to_le_bytes());
            f
        };
        assert!(parse(&head(2, 0, 0)).unwrap_err().contains("version 2"));
        assert!(
            parse(&head(3, u64::MAX, 0))
                .unwrap_err()
                .contains("cannot be right")
        );
        assert!(
            parse(&head(3, 0, 1 << 60))
                .unwrap_err()
                .contains("cannot be right")
        );
        let mut f = head(3, 1, 0);
        f.extend(1_u64.to_le_bytes());
        f.push(b'x');
        f.extend(2_u32.to_le_bytes());
        f.extend((1_u64 << 62).to_le_bytes());
        f.extend(8_u64.to_le_bytes());
        f.extend(0_u32.to_le_bytes());
        f.extend(0_u64.to_le_bytes());
        assert!(parse(&f).unwrap_err().contains("overflows"));
    }
}
