//! What a tokenizer's folder says beside the tokenizer itself.

use std::collections::HashSet;
use std::path::Path;

use sha2::{Digest as _, Sha256};
use tokenizers::Tokenizer;

use crate::error::{Error, Result};

/// Whether text may be cut after a special token and its parts tokenised one by one: an added token takes
/// no neighbouring white space, none overlaps another, and no word depends on being the first.
pub(super) fn has_parts(tokenizer: &Tokenizer) -> bool {
    let added: Vec<_> = tokenizer.get_added_tokens_decoder().into_values().collect();
    let plain = added
        .iter()
        .all(|t| !(t.lstrip || t.rstrip || t.single_word || t.special && t.normalized));
    let names: HashSet<&str> = added.iter().map(|t| t.content.as_str()).collect();
    let cuts = |t: &str| -> Vec<usize> { t.char_indices().map(|(i, _)| i).collect() };
    let beginnings: HashSet<&str> = names
        .iter()
        .flat_map(|t| cuts(t).into_iter().skip(1).map(|n| &t[..n]))
        .collect();
    let apart = names.iter().all(|t| {
        let mut ends = cuts(t);
        ends.push(t.len());
        // None ends as another (or itself) begins, and none stands within another.
        ends.iter()
            .skip(1)
            .all(|&i| i == t.len() || !beginnings.contains(&t[i..]))
            && ends.iter().enumerate().all(|(k, &i)| {
                ends[k + 1..]
                    .iter()
                    .all(|&j| j - i == t.len() || !names.contains(&t[i..j]))
            })
    });
    let words = tokenizer
        .get_pre_tokenizer()
        .and_then(|p| serde_json::to_string(p).ok())
        .is_none_or(|json| !json.contains("Metaspace"));
    plain && apart && words
}

pub(super) fn hash_files(dir: &Path, date: (i32, u32, u32)) -> Result<[u8; 32]> {
    let mut hash = Sha256::new();
    let mut dated = false;
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ] {
        let path = dir.join(name);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(Error::io(&path)(e)),
        };
        dated |= bytes.windows(12).any(|w| w == b"strftime_now");
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    }
    if dated {
        hash.update(format!("{date:?}"));
    }
    Ok(hash.finalize().into())
}

pub(super) fn json(path: &Path) -> Result<serde_json::Value> {
    if !path.is_file() {
        return Ok(serde_json::Value::Null);
    }
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|e| {
        Error::file(
            path,
            format!("no readable JSON: {e}"),
            "correct or remove the file",
        )
    })
}

/// `eos_token_id` of the generation settings (one or several), then the tokenizer's `eos_token`.
pub(super) fn eos_ids(
    tokenizer: &Tokenizer,
    config: &serde_json::Value,
    generation: &serde_json::Value,
) -> Vec<u32> {
    let mut ids: Vec<u32> = Vec::new();
    let token = match config.get("eos_token") {
        Some(serde_json::Value::String(s)) => Some(s.as_str()),
        Some(v) => v.get("content").and_then(|c| c.as_str()),
        None => None,
    };
    ids.extend(token.and_then(|t| tokenizer.token_to_id(t)));
    match generation.get("eos_token_id") {
        Some(serde_json::Value::Array(list)) => {
            ids.extend(list.iter().filter_map(|v| v.as_u64()).map(|v| v as u32))
        }
        Some(v) => ids.extend(v.as_u64().map(|v| v as u32)),
        None => {}
    }
    let mut seen = HashSet::new();
    ids.retain(|id| seen.insert(*id));
    ids
}

/// Today in UTC (days to a civil date after Howard Hinnant's public-domain algorithm).
pub(super) fn today() -> (i32, u32, u32) {
    let seconds = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let z = (seconds / 86_400) as i64 + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let mp = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (
        (year_of_era + era * 400 + i64::from(month <= 2)) as i32,
        month as u32,
        day as u32,
    )
}
