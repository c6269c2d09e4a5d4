use super::{root, run};

#[test]
fn wrong_usage_exits_with_2_and_three_lines() {
    for args in [
        &["run", "nope"][..],
        &["run", "quickstart", "--set", "stages.dpo.loss.betta=1"],
        &["run", "quickstart", "--set", "beta"],
        &[
            "run",
            "quickstart",
            "--set",
            "stages.sft.data.path=missing.parquet",
        ],
        &["run", "quickstart", "--set", "init.tokenizer=missing"],
        &[
            "run",
            "quickstart",
            "--set",
            "stages.sft.data.path=Cargo.toml",
        ],
        &["run", "quickstart", "--set", "stages.sft.data.max_prompt=1"],
        &[
            "run",
            "quickstart",
            "--set",
            "stages.sft.data.max_prompt=5000",
        ],
        &["run", "quickstart", "--resume", "--out", "missing-run"],
        &["generate", "--model", "missing", "--prompt", "x"],
    ] {
        let (code, out, err) = run(args);
        assert_eq!(code, 2, "{args:?}: {out}{err}");
        assert!(err.starts_with("error: "), "{args:?}: {err}");
        assert!(
            !err.contains("panicked") && err.lines().count() <= 6,
            "{args:?}: {err}"
        );
    }
    assert_eq!(run(&["frobnicate"]).0, 2);
}

/// A model of a few thousand weights with the shipped tokenizer.
const SCRATCH: &str = r#"tokenizer = "datasets/help/tokenizer"
scratch = { hidden_size = 16, layers = 1, heads = 2, kv_heads = 2, intermediate_size = 32, max_positions = 256, initializer_range = 0.05 }"#;

/// Runs a recipe of one stage on `data` (and further keys of the stage): exit code, stderr, the folder.
fn one_stage(init: &str, data: &str, more: &str) -> (i32, String, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let recipe = dir.path().join("mine.toml");
    let text = format!(
        r#"
[run]
title = "t"
seed = 1
checkpoint_every = 50
[init]
{init}
[[stages]]
name = "sft"
kind = "sft"
model = "init"
data = {{ {data}, max_prompt = 64, max_completion = 64 }}
{more}
steps = 1
batch_size = 1
micro_tokens = 512
optim = {{ lr = 1e-3, schedule = {{ kind = "constant" }}, warmup_steps = 0, weight_decay = 0.0, max_grad_norm = 1.0 }}
"#
    );
    std::fs::write(&recipe, text).unwrap();
    let out = dir.path().join("run");
    let args = [recipe.to_str().unwrap(), "--out", out.to_str().unwrap()];
    let (code, _, err) = run(&["run", args[0], args[1], args[2]]);
    (code, err, dir)
}

/// The message of a recipe that must be refused, which must be a clear one.
fn refused(init: &str, data: &str) -> String {
    let (code, err, dir) = one_stage(init, data, "");
    assert_eq!(code, 2, "{err}");
    assert!(
        err.starts_with("error: ") && err.lines().count() <= 6,
        "{err}"
    );
    assert!(!dir.path().join("run/sft").exists(), "nothing was begun");
    err
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let llama = root().join("crates/rlhf-model/tests/models/llama");
    let init = format!(
        "from = \"{}\"\ntokenizer = \"datasets/help/tokenizer\"",
        llama.display()
    );
    let err = refused(&init, r#"path = "datasets/help/sft/test.parquet""#);
    assert!(
        err.contains("vocabulary of 384") && err.contains("1023") && err.contains("do: "),
        "{err}"
    );
}

#[test]
fn unreadable_and_empty_tables_are_refused() {
    let init = SCRATCH;
    let dir = tempfile::tempdir().unwrap();
    let whole = std::fs::read(root().join("datasets/help/sft/test.parquet")).unwrap();
    let table = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        format!("path = \"{}\"", path.display())
    };
    let torn = table("torn.parquet", &whole[..whole.len() / 2]);
    let err = refused(init, &torn);
    assert!(err.contains("torn.parquet"), "{err}");
    let empty = table("empty.jsonl", b"");
    let err = refused(init, &empty);
    assert!(err.contains("empty.jsonl"), "{err}");
    let line = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    let bad = table("bad.jsonl", format!("{line}\n{{\"mess").as_bytes());
    let err = refused(init, &bad);
    assert!(err.contains("bad.jsonl") && err.contains('2'), "{err}");
    // Every row has a prompt that is too long.
    let long = "word ".repeat(500);
    let line = format!(
        r#"{{"messages": [{{"role": "user", "content": "{long}"}}, {{"role": "assistant", "content": "b"}}]}}"#
    );
    let err = refused(init, &table("long.jsonl", line.as_bytes()));
    assert!(err.contains("long.jsonl"), "{err}");
}

#[test]
fn public_datasets_are_read_in_their_own_columns() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gsm8k.jsonl");
    let row = r#"{"question": "How many?", "answer": "One and one.\n#### 2"}"#;
    std::fs::write(&path, format!("{row}\n{row}\n{row}\n")).unwrap();
    let path = path.display();
    let of = |data: &str| one_stage(SCRATCH, data, "turns = \"everything\"");
    let (code, err, out) = of(&format!("path = \"{path}\", dataset = \"gsm8k\""));
    assert_eq!(code, 0, "{err}");
    assert!(out.path().join("run/sft/metrics.jsonl").is_file());
    // Without the dataset's name these are no columns of a demonstration.
    let err = refused(SCRATCH, &format!("path = \"{path}\""));
    assert!(
        err.contains("question, answer") || err.contains("answer, question"),
        "{err}"
    );
    let err = refused(SCRATCH, &format!("path = \"{path}\", dataset = \"gms8k\""));
    assert!(
        err.contains("no dataset `gms8k`") && err.contains("gsm8k, helpsteer2"),
        "{err}"
    );
    let err = refused(SCRATCH, "path = \"nowhere.jsonl\", dataset = \"gsm8k\"");
    assert!(err.contains("openai/gsm8k (MIT)"), "{err}");
}
