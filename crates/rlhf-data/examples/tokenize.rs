//! Preference pairs of a file into a cache of tokens, in memory that does not grow with the file:
//! `cargo run --release -p rlhf-data --example tokenize -- PAIRS.parquet TOKENIZER_FOLDER CACHE_FOLDER`.

use std::path::Path;

use rlhf_data::cache::{CacheKey, TokenCache};
use rlhf_data::source;
use rlhf_data::tokenize::{ChatTokenizer, Limits};

#[allow(clippy::print_stdout, reason = "an example")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [pairs, tokenizer, cache] = args.as_slice() else {
        return Err("usage: tokenize PAIRS TOKENIZER_FOLDER CACHE_FOLDER".into());
    };
    let pairs = Path::new(pairs);
    let tokenizer = ChatTokenizer::load(Path::new(tokenizer))?;
    let limits = Limits::new(512, 512);
    let cache = TokenCache::new(cache);
    let key = CacheKey::new(pairs, "preference", None, &tokenizer, &limits)?;
    if let Some((groups, report)) = cache.get(&key)? {
        println!("{} groups are there already: {report}", groups.count());
        return Ok(());
    }
    let mut groups = tokenizer.preference_stream(source::read_preference(pairs)?, &limits);
    let mut writer = cache.writer(&key)?;
    for group in groups.by_ref() {
        writer.push(group?)?;
    }
    println!("{} rows: {}", groups.rows(), groups.report());
    writer.finish(groups.report())?;
    Ok(())
}
