//! The architectures: what their tensors are called and how they are stored, against Hugging Face's
//! way.
//!
//! Names and storage are those that llama.cpp's converter writes. The parts of a layer have one name
//! for all architectures, so a family's own table of parts gives the rest.

use super::file::Parsed;
use crate::family::{Family, NormKind, Part, Shape};

/// An architecture that GGUF names.
#[derive(Debug)]
pub(super) struct Architecture {
    /// As `general.architecture` spells it.
    pub(super) name: &'static str,
    pub(super) family: Family,
    /// A head's rows of queries and keys stand in rotary pairs (0, D/2, 1, D/2 + 1, …), not in
    /// halves.
    paired: bool,
}

const fn halves(name: &'static str, family: Family) -> Architecture {
    Architecture {
        name,
        family,
        paired: false,
    }
}

const ALL: [Architecture; 9] = [
    Architecture {
        name: "llama",
        family: Family::Llama,
        paired: true,
    },
    halves("qwen2", Family::Qwen2),
    halves("qwen3", Family::Qwen3),
    halves("gemma2", Family::Gemma2),
    halves("gemma3", Family::Gemma3),
    halves("gpt2", Family::Gpt2),
    halves("olmo2", Family::Olmo2),
    halves("phi3", Family::Phi3),
    Architecture {
        name: "smollm3",
        family: Family::SmolLm3,
        paired: true,
    },
];

/// What GGUF calls the parts of a layer. Gate and up in one matrix stand under the name of up.
const PARTS: [(Part, &str); 15] = [
    (Part::InputNorm, "attn_norm"),
    (Part::Q, "attn_q"),
    (Part::K, "attn_k"),
    (Part::V, "attn_v"),
    (Part::Qkv, "attn_qkv"),
    (Part::QNorm, "attn_q_norm"),
    (Part::KNorm, "attn_k_norm"),
    (Part::O, "attn_output"),
    (Part::AttentionNorm, "post_attention_norm"),
    (Part::MlpNorm, "ffn_norm"),
    (Part::Gate, "ffn_gate"),
    (Part::Up, "ffn_up"),
    (Part::GateUp, "ffn_up"),
    (Part::Down, "ffn_down"),
    (Part::MlpOutNorm, "post_ffw_norm"),
];

/// What is to be done to a tensor's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    /// Rows of this part's heads go from pairs to halves.
    pub(super) paired: Option<Heads>,
    /// One is taken from every number.
    pub(super) minus_one: bool,
    /// Rows become columns.
    pub(super) transposed: bool,
}

/// Whose heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heads {
    Query,
    Key,
}

impl Architecture {
    /// The architecture of this name, or a message that lists those there are.
    pub(super) fn of(name: &str) -> Parsed<&'static Self> {
        ALL.iter().find(|a| a.name == name).ok_or_else(|| {
            let names: Vec<&str> = ALL.iter().map(|a| a.name).collect();
            format!("{name:?} is not supported; supported: {}", names.join(", "))
        })
    }

    /// The Hugging Face name of a tensor, and what has to be done to it.
    pub(super) fn tensor(&self, name: &str) -> Parsed<(String, Change)> {
        let shape = self.family.shape();
        let unknown = || format!("tensor {name} is unknown in the architecture {}", self.name);
        let (stem, suffix) = name.rsplit_once('.').ok_or_else(unknown)?;
        if !matches!(suffix, "weight" | "bias") {
            return Err(unknown());
        }
        let minus_one = shape.norm == NormKind::RmsPlusOne;
        let (stem, change) = match stem {
            "token_embd" => (shape.embedding.to_owned(), Change::default()),
            "position_embd" => {
                let positions = shape.positions.ok_or_else(unknown)?;
                (positions.to_owned(), Change::default())
            }
            "output" => ("lm_head".to_owned(), Change::default()),
            "output_norm" => {
                let change = Change {
                    minus_one,
                    ..Change::default()
                };
                (shape.final_norm.to_owned(), change)
            }
            _ => {
                let (layer, part) = stem
                    .strip_prefix("blk.")
                    .and_then(|s| s.split_once('.'))
                    .ok_or_else(unknown)?;
                let layer: u32 = layer.parse().map_err(|_| unknown())?;
                let (part, own) = part_of(shape, part).ok_or_else(unknown)?;
                let change = Change {
                    paired: match part {
                        Part::Q if self.paired => Some(Heads::Query),
                        Part::K if self.paired => Some(Heads::Key),
                        _ => None,
                    },
                    minus_one: minus_one && is_norm(part),
                    transposed: shape.transposed && !is_norm(part) && suffix == "weight",
                };
                (format!("{}.{layer}.{own}", shape.layers), change)
            }
        };
        Ok((format!("{stem}.{suffix}"), change))
    }
}

/// The part that GGUF calls so, with the family's own name for it.
fn part_of(shape: &Shape, name: &str) -> Option<(Part, &'static str)> {
    PARTS
        .iter()
        .filter(|(_, n)| *n == name)
        .find_map(|(part, _)| Some((*part, shape.name(*part)?)))
}

fn is_norm(part: Part) -> bool {
    matches!(
        part,
        Part::InputNorm
            | Part::QNorm
            | Part::KNorm
            | Part::AttentionNorm
            | Part::MlpNorm
            | Part::MlpOutNorm
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(arch: &str, name: &str) -> Parsed<(String, Change)> {
        Architecture::of(arch).unwrap().tensor(name)
    }

    #[test]
    fn every_part_of_every_architecture_has_a_name() {
        for arch in &ALL {
            let shape = arch.family.shape();
            for (part, own) in shape.parts {
                let (_, name) = PARTS.iter().find(|(p, _)| p == part).unwrap();
                let (got, _) = arch.tensor(&format!("blk.7.{name}.weight")).unwrap();
                assert_eq!(got, format!("{}.7.{own}.weight", shape.layers));
            }
        }
    }

    #[test]
    fn changes_are_the_architectures_own() {
        let changed = |arch: &str, name: &str| tensor(arch, name).unwrap().1;
        assert_eq!(
            changed("llama", "blk.0.attn_k.bias").paired,
            Some(Heads::Key)
        );
        assert_eq!(changed("qwen2", "blk.0.attn_k.weight"), Change::default());
        assert_eq!(changed("llama", "blk.0.attn_v.weight"), Change::default());
        assert!(changed("gemma3", "blk.0.attn_q_norm.weight").minus_one);
        assert!(changed("gemma2", "output_norm.weight").minus_one);
        assert_eq!(changed("gemma2", "token_embd.weight"), Change::default());
        assert!(changed("gpt2", "blk.0.ffn_up.weight").transposed);
        assert_eq!(changed("gpt2", "blk.0.ffn_up.bias"), Change::default());
        assert_eq!(changed("gpt2", "position_embd.weight"), Change::default());
    }

    #[test]
    fn what_is_unknown_is_named() {
        let e = Architecture::of("mamba").unwrap_err();
        assert!(
            e.contains("\"mamba\" is not supported; supported: llama, qwen2"),
            "{e}"
        );
        for (arch, name) in [
            ("llama", "blk.0.mystery.weight"),
            ("llama", "blk.x.attn_q.weight"),
            ("llama", "blk.0.attn_q.scale"),
            ("llama", "position_embd.weight"),
            ("olmo2", "blk.0.attn_norm.weight"),
            ("phi3", "blk.0.attn_q.weight"),
            ("llama", "mystery"),
        ] {
            assert!(tensor(arch, name).unwrap_err().contains(name));
        }
    }
}
