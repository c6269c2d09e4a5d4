//! Records and their conversions: lines of JSON rows.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rlhf_data::record::{
    Likert, Pairing, PreferenceRecord, PromptRecord, RankedRecord, RatedRecord, SftRecord,
    StepwiseRecord, UnpairedRecord, likert_to_pair, pair_to_unpaired, ranked_to_pairs,
    rated_to_ranked, rated_to_unpaired, unpaired_to_pairs,
};
use rlhf_data_fuzz::{Row, same, same_in_parquet, scratch};

static FILE: LazyLock<PathBuf> = LazyLock::new(|| scratch("records.parquet"));

fuzz_target!(|data: &[u8]| {
    let (mut thumbs, mut rated) = (Vec::new(), Vec::new());
    for line in data.split(|b| *b == b'\n').take(8) {
        let Ok(row) = serde_json::from_slice::<Row>(line) else {
            return;
        };
        if let Some(r) = same::<SftRecord>(&row) {
            same_in_parquet::<SftRecord>(&row, &FILE);
            assert!(!r.completion.is_blank());
        }
        if let Some(p) = same::<PreferenceRecord>(&row) {
            same_in_parquet::<PreferenceRecord>(&row, &FILE);
            thumbs.extend(pair_to_unpaired(&p));
            let value = p.margin.unwrap_or_default() as i64;
            for scale in [Likert::Five, Likert::Eight] {
                let pair = likert_to_pair(&p.prompt, &p.chosen, &p.rejected, scale, value);
                assert!(pair.is_none_or(|p| p.margin.is_some_and(|m| m > 0.0)));
            }
        }
        if same::<PromptRecord>(&row).is_some() {
            same_in_parquet::<PromptRecord>(&row, &FILE);
        }
        if let Some(r) = same::<RankedRecord>(&row) {
            same_in_parquet::<RankedRecord>(&row, &FILE);
            for pairing in [Pairing::All, Pairing::BestVsRandom, Pairing::Adjacent] {
                for p in ranked_to_pairs(&r, pairing, 0, 0) {
                    assert!(p.margin.is_none_or(|m| m > 0.0), "{p:?}");
                }
            }
        }
        if let Some(r) = same::<UnpairedRecord>(&row) {
            same_in_parquet::<UnpairedRecord>(&row, &FILE);
            thumbs.push(r);
        }
        if same::<StepwiseRecord>(&row).is_some() {
            same_in_parquet::<StepwiseRecord>(&row, &FILE);
        }
        if let Some(r) = same::<RatedRecord>(&row) {
            same_in_parquet::<RatedRecord>(&row, &FILE);
            let _ = rated_to_unpaired(&r, "helpfulness", 0.5);
            rated.push(r);
        }
    }
    assert!(unpaired_to_pairs(&thumbs).len() <= thumbs.len() / 2);
    for r in rated_to_ranked(&rated, "helpfulness") {
        assert_eq!(Some(r.completions.len()), r.scores.map(|s| s.len()));
    }
});
