//! GGUF files: a bounds-checked reader, and their import as a Hugging Face folder.
//!
//! The reader takes versions 2 and 3 with tensors in F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0,
//! Q4_K, Q5_K and Q6_K. The import gives tensors the names and the layout of the family (rows of
//! rotary projections, norms, transposed matrices) and rebuilds the tokenizer from the metadata. Its
//! output is a function of the file alone: same bytes every time.

mod architecture;
mod blocks;
mod config;
mod convert;
mod file;
mod json;
mod meta;
mod tokenizer;

use std::collections::HashMap;
use std::path::Path;

use tch::Kind;

use self::architecture::{Architecture, Heads};
use self::convert::Conversion;
use self::file::TensorPlace;
pub use self::file::{GgufFile, Meta};
use self::json::write_json;
use self::meta::MetaReader;
use super::safetensors::{Entry, write_safetensors};
use super::staging::{Staging, sync_write};
use crate::config::Config;
use crate::error::{Error, Result, TensorProblem};
use crate::trunk::trunk_specs;

/// Consumed by the configuration.
const ROPE_FREQS: &str = "rope_freqs.weight";
/// Beyond this many, missing tensors are counted instead of named.
const MAX_NAMED: usize = 4096;

/// What an import wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// How many tensors.
    pub tensors: usize,
    /// The licence that the file names.
    pub license: Option<String>,
}

/// Writes a GGUF as a Hugging Face folder (`config.json`, `generation_config.json`,
/// `model.safetensors`, `tokenizer.json`, `tokenizer_config.json`), all or nothing, with weights in
/// `kind`: f32, f16 or bf16.
///
/// Architectures: llama (Mistral too), qwen2, qwen3, gemma2, gemma3, gpt2, olmo2, phi3, smollm3. A
/// tokenizer that cannot be rebuilt from the file must lie in `out_dir` as `tokenizer.json`, and is
/// kept.
///
/// # Errors
/// [`Error::Io`] when a file cannot be read or written; [`Error::Format`] naming the metadata key or
/// tensor that is absent or not supported; [`Error::Tensors`] listing what is missing or misshapen;
/// [`Error::Argument`] for another `kind`.
pub fn import(file: &Path, out_dir: &Path, kind: Kind) -> Result<Imported> {
    let dtype = match kind {
        Kind::Float => "F32",
        Kind::Half => "F16",
        Kind::BFloat16 => "BF16",
        other => {
            return Err(Error::Argument(format!(
                "{other:?}: import to f32, f16 or bf16"
            )));
        }
    };
    let gguf = GgufFile::open(file)?;
    let reader = MetaReader { gguf: &gguf, file };
    let arch = Architecture::of(reader.text("general.architecture")?)
        .map_err(|m| reader.bad("general.architecture", m))?;
    let config = config::config(&reader, arch, kind)?;
    let conversions = conversions(&reader, arch, &config)?;
    let mut small = vec![
        ("config.json", config::config_json(&config)),
        ("generation_config.json", config.generation_json()),
    ];
    match tokenizer::obstacle(&reader)? {
        None => {
            let (json, more) = tokenizer::tokenizer(&reader, config.max_position_embeddings)?;
            small.extend([("tokenizer.json", json), ("tokenizer_config.json", more)]);
        }
        Some(_) if out_dir.join("tokenizer.json").is_file() => {}
        Some(m) => {
            return Err(Error::format(
                file,
                format!(
                    "{m}; put tokenizer.json and tokenizer_config.json of the original model into {} and import again",
                    out_dir.display()
                ),
            ));
        }
    }
    let entries: Vec<Entry<'_>> = conversions
        .iter()
        .map(|(place, name, conversion)| Entry {
            name,
            dtype,
            shape: shape(place, conversion).map(|d| d as u64).collect(),
            num_bytes: (conversion.rows * conversion.width * kind.elt_size_in_bytes()) as u64,
            bytes: Box::new(|| Ok(conversion.run(gguf.bytes(place)))),
        })
        .collect();
    let staging = Staging::new(out_dir)?;
    write_safetensors(&staging.path("model.safetensors"), &entries)?;
    for (name, value) in small {
        let mut text = String::new();
        write_json(&value, 0, &mut text);
        sync_write(&staging.path(name), text.as_bytes())?;
    }
    staging.commit()?;
    Ok(Imported {
        tensors: conversions.len(),
        license: reader.maybe_text("general.license")?.map(str::to_owned),
    })
}

/// The shape that a tensor has once it is converted.
fn shape<'a>(place: &'a TensorPlace, c: &Conversion) -> impl Iterator<Item = usize> + 'a {
    let n = place.shape.len();
    let flip = c.transposed;
    (0..n).map(move |i| place.shape[if flip { n - 1 - i } else { i }])
}

type Named<'a> = (&'a TensorPlace, String, Conversion);

/// Every tensor with its name and its conversion, checked against what the configuration asks for.
fn conversions<'a>(
    r: &MetaReader<'a>,
    arch: &Architecture,
    config: &Config,
) -> Result<Vec<Named<'a>>> {
    let head = (!config.tie_word_embeddings).then(|| {
        let shape = vec![config.vocab_size, config.hidden_size];
        ("lm_head.weight".to_owned(), shape)
    });
    let mut wanted: HashMap<String, Vec<i64>> = trunk_specs(config)
        .map(|s| (s.name, s.shape))
        .chain(head)
        .collect();
    let mut problems = Vec::new();
    let mut all = Vec::new();
    for place in r.gguf.places().iter().filter(|t| t.name != ROPE_FREQS) {
        let (name, change) = arch
            .tensor(&place.name)
            .map_err(|m| Error::format(r.file, m))?;
        let rows = match place.shape.as_slice() {
            [_] if change.paired.is_none() => 1,
            shape => shape.first().copied().unwrap_or(1),
        };
        let numel: usize = place.shape.iter().product();
        let conversion = Conversion {
            format: place.format,
            rows,
            width: numel.checked_div(rows).unwrap_or(0),
            heads: change.paired.map(|h| match h {
                Heads::Query => config.num_attention_heads as usize,
                Heads::Key => config.num_key_value_heads as usize,
            }),
            minus_one: change.minus_one,
            transposed: change.transposed,
            kind: config.dtype,
        };
        conversion
            .check(&place.shape)
            .map_err(|m| Error::format(r.file, format!("tensor {}: {m}", place.name)))?;
        match wanted.remove(&name) {
            None => {
                return Err(Error::format(
                    r.file,
                    format!("tensor {}: the metadata has no place for it", place.name),
                ));
            }
            Some(expected) => {
                let found: Vec<usize> = shape(place, &conversion).collect();
                if !found.iter().map(|&d| d as i64).eq(expected.iter().copied()) {
                    problems.push(TensorProblem::Shape {
                        name: name.clone(),
                        expected,
                        found,
                    });
                }
            }
        }
        all.push((place, name, conversion));
    }
    let mut missing: Vec<String> = wanted.into_keys().collect();
    missing.sort_unstable();
    let more = missing.len().saturating_sub(MAX_NAMED) as u64;
    missing.truncate(MAX_NAMED);
    problems.extend(
        missing
            .into_iter()
            .map(|name| TensorProblem::Missing { name }),
    );
    if more > 0 {
        problems.push(TensorProblem::More { missing: more });
    }
    if problems.is_empty() {
        return Ok(all);
    }
    Err(Error::Tensors {
        file: r.file.display().to_string(),
        problems,
    })
}
