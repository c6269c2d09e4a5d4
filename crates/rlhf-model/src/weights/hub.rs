//! A model's folder from the Hugging Face Hub.
//!
//! Brings what this crate reads, nothing else: the configuration, the tokenizer, and weights in
//! safetensors, in one file or in the shards that the index names. How files come, are checked and
//! kept is the business of [`rlhf_data::import::hub`].

use std::path::{Path, PathBuf};

pub use rlhf_data::import::hub::Hub;
use rlhf_data::import::hub::RepoKind;

use super::store::{INDEX, SINGLE, read_index};
use crate::error::{Error, Result};

/// What is taken where it is there.
const SMALL: [&str; 11] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

/// Brings the model `repo` (`org/name`) at `revision` (a branch, tag or commit; `main` is the
/// newest) into the cache of `hub`, unless it is there, and returns its folder.
///
/// What was cut goes on where it stopped. Every file is compared with the size that the Hub states,
/// large ones with their SHA-256 digest.
///
/// # Errors
/// [`Error::Data`] when the Hub cannot be reached, has no such model or does not let us read it, or
/// what came is damaged; [`Error::Argument`] when the model has no `config.json` or no safetensors.
pub fn fetch(repo: &str, revision: &str, hub: &Hub) -> Result<PathBuf> {
    let list = std::cell::RefCell::new(Vec::new());
    let small = |name: &str| {
        if name == SINGLE || name == INDEX {
            list.borrow_mut().push(name.to_owned());
        }
        SMALL.contains(&name) || name == INDEX
    };
    let found = hub.snapshot(RepoKind::Model, repo, revision, &small)?;
    let config = found.files.iter().find(|p| p.ends_with("config.json"));
    let Some(folder) = config.and_then(|p| p.parent()) else {
        return Err(Error::Argument(format!(
            "{repo} at {revision} has no config.json: it is no model in the layout of transformers"
        )));
    };
    let list = list.into_inner();
    let shards = if list.iter().any(|n| n == SINGLE) {
        vec![SINGLE.to_owned()]
    } else if list.is_empty() {
        return Err(Error::Argument(format!(
            "{repo} at {revision} has neither {SINGLE} nor {INDEX}; only safetensors can be read (and GGUF, which is imported)"
        )));
    } else {
        let mut shards: Vec<String> = read_index(&folder.join(INDEX))?.into_values().collect();
        shards.sort();
        shards.dedup();
        shards
    };
    let wanted = |name: &str| shards.iter().any(|s| s == name);
    let weights = hub.snapshot(RepoKind::Model, repo, &found.commit, &wanted)?;
    let has = |shard: &String| weights.files.iter().any(|p| p == &folder.join(shard));
    match shards.iter().find(|s| !has(s)) {
        None => Ok(Path::to_owned(folder)),
        Some(shard) => Err(Error::Argument(format!(
            "{repo} at {revision} has no {shard}, which its {INDEX} names; choose another revision"
        ))),
    }
}
