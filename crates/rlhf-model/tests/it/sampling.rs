//! The filters against `transformers`' logits processors.

use std::path::PathBuf;

use rlhf_model::sampling::Filters;
use serde_json::Value;
use tch::Kind;

use crate::support::{max_diff, own, tensors};

/// The filters of a case, or `None` when it has a setting that does not exist here.
fn filters(hyper: &serde_json::Map<String, Value>) -> Option<Filters> {
    let mut f = Filters::default();
    for (key, value) in hyper {
        match key.as_str() {
            "temperature" => f.temperature = value.as_f64()?,
            "top_k" => f.top_k = Some(usize::try_from(value.as_u64()?).ok()?),
            "top_p" => f.top_p = Some(value.as_f64()?),
            "min_p" => f.min_p = Some(value.as_f64()?),
            _ => return None,
        }
    }
    Some(f)
}

#[test]
fn golden_i_sampling() {
    let dir = std::env::var_os("RLHF_GOLDEN").map_or_else(|| own("golden"), PathBuf::from);
    let manifest: Value =
        serde_json::from_str(&std::fs::read_to_string(dir.join("manifest.json")).unwrap()).unwrap();
    let (mut ran, mut unknown) = (0, Vec::new());
    let mut files = std::collections::HashMap::new();
    for case in manifest["cases"].as_array().unwrap() {
        if case["section"] != "i_sampling" {
            continue;
        }
        let name = case["case"].as_str().unwrap();
        let Some(filters) = filters(case["hyper"].as_object().unwrap()) else {
            unknown.push(name);
            continue;
        };
        filters.validate().unwrap();
        let file = case["file"].as_str().unwrap();
        let all = files
            .entry(file.to_owned())
            .or_insert_with(|| tensors(&dir.join(file)));
        let tensor = |v: &Value| &all[v.as_str().unwrap()];
        let scores = tensor(&case["inputs"]["scores"]).to_kind(Kind::Double);
        let wanted = |output: &str| tensor(&case["outputs"][output]["key"]);
        let filtered = filters.apply(&scores);
        let kept = filtered.isfinite();
        assert!(
            kept.equal(&wanted("kept").to_kind(Kind::Bool)),
            "{name}: other tokens kept"
        );
        let finite = |t: &tch::Tensor| t.masked_fill(&kept.logical_not(), 0.0);
        let d = max_diff(&finite(&filtered), &finite(wanted("filtered")));
        let scale = finite(wanted("filtered"))
            .abs()
            .max()
            .double_value(&[])
            .max(1.0);
        assert!(
            d <= 1e-12 * scale,
            "{name}: filtered scores differ by {d:e}"
        );
        let d = max_diff(&filtered.softmax(-1, None::<Kind>), wanted("probs"));
        assert!(d <= 1e-12, "{name}: probabilities differ by {d:e}");
        ran += 1;
    }
    eprintln!("i_sampling: {ran} cases ran");
    if !unknown.is_empty() {
        eprintln!("unknown cases: {}", unknown.join(", "));
    }
    assert!(ran > 0, "no case of i_sampling ran");
}
