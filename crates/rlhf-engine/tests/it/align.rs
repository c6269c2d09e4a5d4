//! Direct alignment on thumbs, on rankings, with scores and online: whole runs of a tiny model from scratch,
//! killed and resumed.

use std::path::Path;
use std::process::Stdio;

use rlhf_data::record::{RankedRecord, Record as _, pair_to_unpaired};
use rlhf_data::source::{self, JsonlOut};

use super::rlhf;
use super::runs::wait_for;
use super::text;

const OPTIM: &str = r#"optim = { lr = 3e-3, schedule = { kind = "constant" }, warmup_steps = 0, weight_decay = 0.0, max_grad_norm = 1.0 }"#;

/// The shipped preferences once more as thumbs, rankings and pairs with scores.
fn write_data(dir: &Path) {
    let pairs = source::read_preference(Path::new(&format!(
        "{}/datasets/help/preference/train.parquet",
        super::root().display()
    )))
    .unwrap();
    let file = |name: &str| JsonlOut::create(&dir.join(name)).unwrap();
    let (mut thumbs, mut rankings, mut scored) = (
        file("thumbs.jsonl"),
        file("rankings.jsonl"),
        file("scored.jsonl"),
    );
    for (i, pair) in pairs.take(32).enumerate() {
        let pair = pair.unwrap();
        for thumb in pair_to_unpaired(&pair) {
            thumbs.write(&thumb.to_row()).unwrap();
        }
        let ranking = RankedRecord {
            prompt: pair.prompt.clone(),
            completions: vec![pair.rejected.clone(), pair.chosen.clone()],
            scores: Some(vec![0.5, 2.0]),
        };
        rankings.write(&ranking.to_row()).unwrap();
        let mut row = pair.to_row();
        row.insert("score_chosen".into(), (2.0 + (i % 3) as f64).into());
        row.insert("score_rejected".into(), 1.0.into());
        scored.write(&row).unwrap();
    }
    for f in [thumbs, rankings, scored] {
        f.finish().unwrap();
    }
}

fn recipe(dir: &Path) -> String {
    let at = |name: &str| {
        let path = dir.join(name).display().to_string();
        format!("{{ path = {path:?}, max_prompt = 64, max_completion = 112 }}")
    };
    let rollouts = r#"
[stages.rollouts]
data = { path = "datasets/help/prompts/train.parquet", max_prompt = 64, max_completion = 112, limit = 8 }
prompts_per_step = 4
group_size = 3
sampling = { temperature = 1.0, max_new_tokens = 10, max_sequences = 64 }
reward = [{ rule = { kind = "words", positive = ["the", "your", "you", "we", "to"], negative = [] }, weight = 1.0 }]
missing_eos_penalty = 0.0
"#;
    // Such words are rare at first: more completions find some.
    let many = rollouts
        .replace("prompts_per_step = 4", "prompts_per_step = 8")
        .replace("group_size = 3", "group_size = 8");
    let fast = OPTIM.replace("3e-3", "1e-2");
    format!(
        r#"
[run]
title = "t"
seed = 3
checkpoint_every = 2

[init]
tokenizer = "datasets/help/tokenizer"
scratch = {{ hidden_size = 32, layers = 2, heads = 2, kv_heads = 1, intermediate_size = 64, max_positions = 256, initializer_range = 0.05 }}

[[stages]]
name = "kto"
kind = "unpaired"
model = "init"
data = {thumbs}
test = {thumbs}
test_every = 6
samples = 3
steps = 12
batch_size = 8
micro_tokens = 1024
loss = {{ kind = "kto", beta = 0.5, weights = {{ desirable = 1.0, undesirable = 1.0 }} }}
{OPTIM}

[[stages]]
name = "ranked"
kind = "ranked"
model = "init"
data = {rankings}
test = {rankings}
test_every = 6
steps = 6
batch_size = 8
micro_tokens = 4096
loss = {{ kind = "plackett_luce", beta = 0.5 }}
{OPTIM}

[[stages]]
name = "rebel"
kind = "dpo"
model = "init"
data = {scored}
test = {scored}
test_every = 3
steps = 6
batch_size = 8
micro_tokens = 4096
loss = {{ kind = "rebel", eta = 1.0 }}
{OPTIM}

[[stages]]
name = "online"
kind = "online_dpo"
model = "init"
steps = 24
micro_tokens = 4096
method = {{ kind = "best_worst", loss = {{ kind = "sigmoid", beta = 0.1 }} }}
{fast}
{many}
[[stages]]
name = "xpo"
kind = "online_dpo"
model = "kto"
steps = 4
micro_tokens = 4096
refresh_every = 3
method = {{ kind = "xpo", loss = {{ kind = "sigmoid", beta = 0.1 }}, alpha = 1e-3 }}
replay = {{ data = {scored}, pairs_per_step = 2 }}
{OPTIM}
{rollouts}
[[stages]]
name = "nash"
kind = "online_dpo"
model = "init"
steps = 4
micro_tokens = 4096
method = {{ kind = "nash_md", tau = 0.1, mixture = 0.5, preference = "higher" }}
{OPTIM}
{rollouts}"#,
        thumbs = at("thumbs.jsonl"),
        rankings = at("rankings.jsonl"),
        scored = at("scored.jsonl"),
    )
}

fn go(recipe: &Path, out: &Path, more: &[&str]) -> std::process::Command {
    let mut c = rlhf();
    c.arg("run").arg(recipe).arg("--out").arg(out).args(more);
    c
}

const STAGES: [&str; 6] = ["kto", "ranked", "rebel", "online", "xpo", "nash"];

/// Every stage's log without its times.
fn logs(out: &Path) -> Vec<serde_json::Value> {
    STAGES
        .iter()
        .flat_map(|stage| {
            let log = std::fs::read_to_string(out.join(stage).join("metrics.jsonl")).unwrap();
            log.lines()
                .map(|line| {
                    let mut v: serde_json::Value = serde_json::from_str(line).unwrap();
                    v.as_object_mut().unwrap().remove("seconds");
                    v
                })
                .collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn thumbs_rankings_scores_and_online_pairs_are_learned_and_resumed() {
    let dir = tempfile::tempdir().unwrap();
    write_data(dir.path());
    let path = dir.path().join("align.toml");
    std::fs::write(&path, recipe(dir.path())).unwrap();
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    let (code, _, err) = text(go(&path, &whole, &[]).output().unwrap());
    assert_eq!(code, 0, "{err}");
    let expected = logs(&whole);
    let number = |i: usize, key: &str| {
        let v = &expected[i];
        v[key].as_f64().unwrap_or_else(|| panic!("no {key}: {v}"))
    };
    // Looks after the 6th and the last step, on the rows that were learned.
    for (stage, first, last) in [("kto", 5, 11), ("ranked", 17, 17), ("rebel", 20, 23)] {
        let key = format!("{stage}/test_loss");
        if first != last {
            assert!(number(last, &key) < number(first, &key), "{stage}");
        }
        let right = number(last, &format!("{stage}/test_accuracy"));
        assert!(right > 0.6, "{stage}: {right}");
    }
    assert!(number(11, "kto/test_auc") > 0.7);
    let said = std::fs::read_to_string(whole.join("kto/samples-000006.jsonl")).unwrap();
    let line: serde_json::Value = serde_json::from_str(said.lines().next().unwrap()).unwrap();
    assert_eq!(said.lines().count(), 3);
    assert!(line["row"] == 0 && line["completion"].is_string(), "{line}");
    let mean = |from: usize| {
        let rewards = (from..from + 6).map(|i| number(i, "online/reward"));
        rewards.sum::<f64>() / 6.0
    };
    let (before, after) = (mean(24), mean(42));
    assert!(after > before + 0.3, "online: {before} {after}");

    for (i, (stage, step)) in [
        ("kto", 3),
        ("ranked", 1),
        ("rebel", 3),
        ("online", 5),
        ("xpo", 1),
        ("xpo", 4),
        ("nash", 2),
    ]
    .into_iter()
    .enumerate()
    {
        let more: &[&str] = if i == 0 { &[] } else { &["--resume"] };
        let mut child = go(&path, &broken, more)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for(&mut child, &broken, stage, step);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let (code, _, err) = text(go(&path, &broken, &["--resume"]).output().unwrap());
    assert_eq!(code, 0, "{err}");
    assert_eq!(logs(&broken), expected);
}

#[test]
fn what_does_not_fit_is_refused_before_anything_runs() {
    let dir = tempfile::tempdir().unwrap();
    write_data(dir.path());
    let path = dir.path().join("align.toml");
    std::fs::write(&path, recipe(dir.path())).unwrap();
    let pairs = "{ path = \"datasets/help/preference/train.parquet\", max_prompt = 64, max_completion = 112 }";
    for (set, word) in [
        ("stages.kto.batch_size=1".to_owned(), "mismatches the rows"),
        ("stages.kto.loss.beta=-1".to_owned(), "beta"),
        (
            "stages.kto.loss.kind=\"apo\"".to_owned(),
            "apo_zero_unpaired",
        ),
        (format!("stages.kto.data={pairs}"), "label"),
        ("stages.ranked.loss.beta=0".to_owned(), "beta"),
        (format!("stages.rebel.data={pairs}"), "score_chosen"),
        (
            "stages.online.rollouts.group_size=1".to_owned(),
            "at least 2",
        ),
        ("stages.online.refresh_every=0".to_owned(), "above 0"),
        ("stages.nash.method.mixture=2".to_owned(), "mixture is 2"),
        (
            format!("stages.nash.replay={{ data = {pairs}, pairs_per_step = 1 }}"),
            "replay needs",
        ),
        (
            "stages.online.rollouts.server={ url = \"http://x\", model = \"m\" }".to_owned(),
            "rollouts.server",
        ),
    ] {
        let out = dir.path().join("out");
        let more = ["--dry-run", "--set", set.as_str()];
        let (code, _, err) = text(go(&path, &out, &more).output().unwrap());
        assert!(code == 2 && err.contains(word), "{set}: {code} {err}");
    }
}
