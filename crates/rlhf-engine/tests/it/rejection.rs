//! Rejection sampling as a stage: drawn, scored, kept, learned from, and not drawn again.

use std::path::Path;

use rlhf_data::record::{Annotated, SftRecord};
use rlhf_data::source;
use serde_json::Value;

use super::{rlhf, text};

const RECIPE: &str = r#"
[run]
title = "Best of 4"
seed = 2
checkpoint_every = 1

[init]
tokenizer = "datasets/tasks/tokenizer"
scratch = { hidden_size = 32, layers = 1, heads = 2, kv_heads = 2, intermediate_size = 64, max_positions = 64, initializer_range = 0.05 }

[[stages]]
name = "sft"
kind = "sft"
model = "init"
data = { path = "datasets/tasks/sft/train.parquet", max_prompt = 32, max_completion = 20, limit = 200 }
loss = { kind = "dft" }
neftune_alpha = 5.0
test = { path = "datasets/tasks/sft/train.parquet", max_prompt = 32, max_completion = 20, limit = 8 }
test_every = 2
steps = 4
batch_size = 8
micro_tokens = 2048
optim = { lr = 1e-3, schedule = { kind = "constant" }, warmup_steps = 0, weight_decay = 0.0, max_grad_norm = 1.0 }

[[stages]]
name = "bon"
kind = "rejection"
model = "sft"
data = { path = "datasets/tasks/prompts/train.parquet", max_prompt = 32, max_completion = 20, limit = 7 }
samples = 4
prompts_at_once = 3
sampling = { temperature = 1.0, max_new_tokens = 6, max_sequences = 32 }
reward = [{ rule = { kind = "words", positive = ["a", "e", "i", "o", "u"], negative = [] }, weight = 1.0 }]
missing_eos_penalty = -0.5
select = { kind = "top_overall", keep = 10 }
control = "overall"
judge = { kind = "exact", field = "answer" }
micro_tokens = 2048

[[stages]]
name = "again"
kind = "sft"
model = "sft"
data = { path = "stage:bon", max_prompt = 32, max_completion = 20 }
steps = 2
batch_size = 4
micro_tokens = 2048
optim = { lr = 1e-3, schedule = { kind = "constant" }, warmup_steps = 0, weight_decay = 0.0, max_grad_norm = 1.0 }

[[stages]]
name = "lot"
kind = "sft"
model = "sft"
data = { path = "stage:bon/control", max_prompt = 32, max_completion = 20 }
steps = 2
batch_size = 4
micro_tokens = 2048
optim = { lr = 1e-3, schedule = { kind = "constant" }, warmup_steps = 0, weight_decay = 0.0, max_grad_norm = 1.0 }
"#;

fn go(recipe: &Path, out: &Path, more: &[&str]) -> (i32, String, String) {
    let mut c = rlhf();
    c.arg("run").arg(recipe).arg("--out").arg(out).args(more);
    text(c.output().unwrap())
}

#[test]
fn the_best_are_kept_with_their_provenance_and_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = dir.path().join("bon.toml");
    std::fs::write(&recipe, RECIPE).unwrap();
    let out = dir.path().join("run");
    let (code, _, err) = go(&recipe, &out, &[]);
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("best of n, KL"), "{err}");

    let file = |name: &str| out.join("bon").join(name);
    let rows = |name: &str| -> Vec<Annotated<SftRecord>> {
        let rows = source::read(&file(name)).unwrap();
        rows.collect::<Result<_, _>>().unwrap()
    };
    let (selected, control) = (rows("selected.parquet"), rows("control.parquet"));
    // Blank completions are left out of both.
    assert!((1..=10).contains(&selected.len()) && (1..=10).contains(&control.len()));
    let score = |r: &Annotated<SftRecord>| {
        let other = r.source.as_ref().unwrap().other.clone().unwrap();
        other["score"].as_f64().unwrap()
    };
    let source = selected[0].source.as_ref().unwrap();
    assert_eq!(source.model.as_deref(), Some("sft"));
    assert_eq!(source.policy_version, Some(4));
    assert_eq!(source.sampler.as_ref().unwrap()["samples"], 4);
    let mean = |r: &[Annotated<SftRecord>]| r.iter().map(score).sum::<f64>() / r.len() as f64;
    assert!(mean(&selected) >= mean(&control));

    // What was drawn is there, in parts of three prompts; of it the curve.
    let drawn: Vec<Value> = ["00000", "00001", "00002"]
        .iter()
        .flat_map(|n| {
            let text = std::fs::read_to_string(file(&format!("drawn/{n}.jsonl"))).unwrap();
            let lines: Vec<Value> = text
                .lines()
                .map(|l| serde_json::from_str(l).unwrap())
                .collect();
            lines
        })
        .collect();
    assert_eq!(drawn.len(), 7);
    let curve: Value =
        serde_json::from_str(&std::fs::read_to_string(file("best_of_n.json")).unwrap()).unwrap();
    let best = |d: &Value| {
        let rewards = d["rewards"].as_array().unwrap().iter();
        rewards
            .map(|r| r.as_f64().unwrap())
            .fold(f64::NEG_INFINITY, f64::max)
    };
    let by_hand = drawn.iter().map(best).sum::<f64>() / 7.0;
    let last = &curve["reward"][3];
    assert!((last["mean"].as_f64().unwrap() - by_hand).abs() < 1e-9);
    assert!((last["kl"].as_f64().unwrap() - (4f64.ln() - 0.75)).abs() < 1e-12);
    assert_eq!(curve["gold"].as_array().unwrap().len(), 4);
    // Held-out demonstrations of the first stage were looked at.
    let done = std::fs::read_to_string(out.join("sft/done.json")).unwrap();
    assert!(done.contains("test_loss"), "{done}");

    // Begun again without its end, the stage draws nothing anew and ends the same.
    let before = std::fs::read(file("selected.parquet")).unwrap();
    let made = std::fs::metadata(file("drawn/00001.jsonl"))
        .unwrap()
        .modified()
        .unwrap();
    for stage in ["bon", "again", "lot"] {
        std::fs::remove_file(out.join(stage).join("done.json")).unwrap();
    }
    std::fs::remove_file(file("drawn/00002.jsonl")).unwrap();
    std::fs::remove_dir_all(file("checkpoints")).unwrap();
    let (code, _, err) = go(&recipe, &out, &["--resume"]);
    assert_eq!(code, 0, "{err}");
    let again = std::fs::metadata(file("drawn/00001.jsonl"))
        .unwrap()
        .modified()
        .unwrap();
    assert_eq!(made, again);
    assert_eq!(before, std::fs::read(file("selected.parquet")).unwrap());
}
