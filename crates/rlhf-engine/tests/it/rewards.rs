//! Reward stages of other kinds of labels, ensembles, mixes, and `rlhf eval reward`.

use std::io::Write as _;
use std::path::Path;

use super::{rlhf, run, text};

/// A trunk so small that a stage takes a second.
const HEAD: &str = r#"
[run]
title = "rewards"
seed = 3
checkpoint_every = 2

[init]
tokenizer = "datasets/help/tokenizer"
scratch = { hidden_size = 32, layers = 2, heads = 2, kv_heads = 1, intermediate_size = 64, max_positions = 256, initializer_range = 0.05 }
"#;

fn stage(name: &str, loss: &str, data: &Path, more: &str) -> String {
    let data = format!(
        "{{ path = {:?}, max_prompt = 64, max_completion = 64 }}",
        data.to_str().unwrap()
    );
    format!(
        r#"
[[stages]]
name = "{name}"
kind = "reward"
model = "init"
data = {data}
test = {data}
loss = {loss}
steps = 3
batch_size = 4
micro_tokens = 1024
optim = {{ lr = 1e-3, schedule = {{ kind = "constant" }}, warmup_steps = 0, weight_decay = 0.0, max_grad_norm = 1.0 }}
{more}
"#
    )
}

fn write(path: &Path, rows: &[serde_json::Value]) {
    let mut file = std::fs::File::create(path).unwrap();
    for row in rows {
        writeln!(file, "{row}").unwrap();
    }
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn start(recipe: &Path, out: &Path, more: &[&str]) -> (i32, String, String) {
    let mut c = rlhf();
    c.arg("run").arg(recipe).arg("--out").arg(out).args(more);
    text(c.output().unwrap())
}

#[test]
fn every_kind_of_row_trains_a_reward_model() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, rows: &[serde_json::Value]| {
        let path = dir.path().join(name);
        write(&path, rows);
        path
    };
    let rows = |f: &dyn Fn(usize) -> serde_json::Value| (0..8).map(f).collect::<Vec<_>>();
    let pairs = file(
        "pairs.jsonl",
        &rows(
            &|i| serde_json::json!({"prompt": format!("Where is parcel {i}?"), "chosen": "On its way, sorry.", "rejected": "No.", "margin": i % 3, "preference": 0.9}),
        ),
    );
    let ranked = file(
        "ranked.jsonl",
        &rows(
            &|i| serde_json::json!({"prompt": format!("Refund {i}"), "completions": ["Done.", "Soon, sorry.", "No."], "scores": [1.0, 3.0, 1.0]}),
        ),
    );
    let rated = file(
        "rated.jsonl",
        &rows(
            &|i| serde_json::json!({"prompt": "Hi", "completion": format!("Hello {i}"), "ratings": {"helpfulness": i % 5, "verbosity": 1.5}}),
        ),
    );
    let thumbs = file(
        "thumbs.jsonl",
        &rows(
            &|i| serde_json::json!({"prompt": "Hi", "completion": format!("Hello {i}"), "label": i % 2 == 0}),
        ),
    );
    let steps = file(
        "steps.jsonl",
        &rows(
            &|i| serde_json::json!({"prompt": "2 + 2", "completions": ["Add them.", format!("It is {i}.")], "labels": [1, (i % 3) as i64 - 1]}),
        ),
    );
    let mix = format!(
        "mix_data = {{ path = {:?}, max_prompt = 64, max_completion = 64 }}\n[stages.ensemble]\ncount = 2\nshare = \"trunk\"\nbootstrap = \"bayesian\"\ncombine = {{ kind = \"min\" }}",
        pairs.to_str().unwrap()
    );
    let nets = "test_every = 2\n[stages.ensemble]\ncount = 2\nshare = \"nothing\"\ncombine = { kind = \"mean_minus_std\", k = 1.0 }";
    let stages = [
        stage(
            "pairs",
            "{ kind = \"bradley_terry\", centering = 0.01, margins = true }",
            &pairs,
            nets,
        ),
        stage(
            "scale",
            "{ kind = \"likert_pairs\", steps = 2 }",
            &pairs,
            "",
        ),
        stage(
            "ranked",
            "{ kind = \"bradley_terry\", centering = 0.0 }",
            &ranked,
            "rows = \"ranked\"",
        ),
        stage(
            "attributes",
            "{ kind = \"regression\", attributes = [\"helpfulness\", \"verbosity\"], mix = { kind = \"learned\", ridge = 1.0 } }",
            &rated,
            &mix,
        ),
        stage(
            "likert",
            "{ kind = \"likert\", attribute = \"helpfulness\", low = 0, high = 4 }",
            &rated,
            "",
        ),
        stage(
            "outcome",
            "{ kind = \"outcome\", said = \"per_token\" }",
            &thumbs,
            "",
        ),
        stage(
            "process",
            "{ kind = \"process\", steps = { kind = \"three\", neutral = \"right\" }, separator = \"\\n\", aggregate = \"min\" }",
            &steps,
            "",
        ),
        stage("variance", "{ kind = \"mean_variance_pairs\" }", &pairs, ""),
    ];
    let recipe = dir.path().join("r.toml");
    std::fs::write(&recipe, format!("{HEAD}{}", stages.concat())).unwrap();
    let out = dir.path().join("run");
    let (code, _, err) = start(&recipe, &out, &[]);
    assert_eq!(code, 0, "{err}");
    for (name, measure) in [
        ("pairs", "test_accuracy"),
        ("scale", "test_label_accuracy"),
        ("ranked", "test_accuracy"),
        ("attributes", "test_mse"),
        ("likert", "test_label_accuracy"),
        ("outcome", "test_accuracy"),
        ("process", "test_accuracy"),
        ("variance", "test_std"),
    ] {
        let done = json(&out.join(name).join("done.json"));
        assert!(done["final"][measure].is_number(), "{name}: {done}");
        assert!(done["final"]["test_loss"].is_number(), "{name}: {done}");
    }
    assert!(out.join("pairs/model/member-1/model.safetensors").is_file());
    assert!(out.join("pairs/reward_eval.html").is_file());
    let found = json(&out.join("pairs/reward_eval.json"));
    assert_eq!(found["members"]["accuracy"].as_array().unwrap().len(), 2);
    let config = json(&out.join("attributes/model/config.json"));
    assert_eq!(config["num_labels"], 4);
    let mix = &config["rlhf_reward"]["readout"]["weights"];
    assert!(mix[0] != mix[1] && mix[0] != 0.5, "{mix}");

    // The command, with RewardBench's columns and a best of n.
    let bench = file(
        "bench.jsonl",
        &rows(
            &|i| serde_json::json!({"id": i, "prompt": "Hi", "chosen": format!("Hello {i}"), "rejected": "No", "chosen_model": "a", "rejected_model": "b", "subset": if i < 3 { "math-prm" } else { "hep-rust" }}),
        ),
    );
    let report = dir.path().join("report");
    let model = out.join("variance/model");
    let args = [
        "eval",
        "reward",
        "--json",
        "--model",
        model.to_str().unwrap(),
        "--pairs",
        bench.to_str().unwrap(),
        "--best-of",
        ranked.to_str().unwrap(),
        "--out",
        report.to_str().unwrap(),
    ];
    let (code, printed, err) = run(&args);
    assert_eq!(code, 0, "{err}");
    let printed: serde_json::Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(printed, json(&report.join("reward_eval.json")));
    assert_eq!(printed["sections"][0]["name"], "Reasoning");
    assert_eq!(printed["categories"][1]["share"]["n"], 3);
    assert_eq!(printed["best_of"].as_array().unwrap().len(), 2);
    assert!(report.join("reward_eval.html").is_file());
    // Best of one is the mean: 5/3.
    assert!((printed["best_of"][0]["gold"]["value"].as_f64().unwrap() - 5.0 / 3.0).abs() < 1e-9);
    let (code, _, err) = run(&["eval", "reward", "--model", "nowhere", "--pairs", "x"]);
    assert!(code == 2 && err.contains("no such model folder"), "{err}");

    // A row that does not fit ends the run before anything is trained.
    let bad = file(
        "bad.jsonl",
        &[
            serde_json::json!({"prompt": "Hi", "completion": "a", "ratings": {"helpfulness": 1}}),
            serde_json::json!({"prompt": "Hi", "completion": "b", "ratings": {"helpfulness": 9}}),
        ],
    );
    let text = stage(
        "likert",
        "{ kind = \"likert\", attribute = \"helpfulness\", low = 0, high = 4 }",
        &bad,
        "",
    );
    std::fs::write(&recipe, format!("{HEAD}{text}")).unwrap();
    let (code, _, err) = start(&recipe, &dir.path().join("bad"), &[]);
    assert!(
        code == 2 && err.contains("row 1") && err.contains("outside its scale"),
        "{err}"
    );
    let text = stage(
        "x",
        "{ kind = \"outcome\", said = \"last\", centering = 1.0 }",
        &thumbs,
        "",
    );
    std::fs::write(&recipe, format!("{HEAD}{text}")).unwrap();
    let (code, _, err) = start(&recipe, &dir.path().join("bad"), &[]);
    assert!(code == 2 && err.contains("centering"), "{err}");
}

/// A mix with gates, running norms and penalties: every component is logged by name.
#[test]
fn a_mix_logs_every_component() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = dir.path().join("mix.toml");
    let pairs = Path::new("datasets/help/preference/train.parquet");
    let rm = stage(
        "rm",
        "{ kind = \"bradley_terry\", centering = 0.01 }",
        pairs,
        "",
    );
    let rm = rm.replace("max_completion = 64", "max_completion = 112, limit = 16");
    let grpo = r#"
[[stages]]
name = "grpo"
kind = "grpo"
model = "init"
steps = 3
epochs = 1
micro_tokens = 1024
advantage = { kind = "group_normalized", std_epsilon = 1e-4, scope = "group" }
loss = { kind = "clipped", clip = { epsilon_low = 0.2, epsilon_high = 0.2 }, ratio = "token", reduction = { kind = "token" } }
kl = { estimator = "k3", placement = "in_loss", coef = 0.1 }
optim = { lr = 1e-3, schedule = { kind = "constant" }, warmup_steps = 0, weight_decay = 0.0, max_grad_norm = 1.0 }

[stages.rollouts]
data = { path = "datasets/help/prompts/train.parquet", max_prompt = 64, max_completion = 16 }
prompts_per_step = 2
group_size = 4
sampling = { temperature = 1.0, max_new_tokens = 8, max_sequences = 16 }
missing_eos_penalty = -0.5
reward = [
  { rule = { kind = "help" }, weight = 0.0, name = "rubric" },
  { model = "rm", weight = 1.0, normalize = { kind = "running" }, clip = [-3.0, 3.0], gate = { kind = "at_least", by = "rubric", least = 0.1, otherwise = -1.0 } },
]
shaping = { token_cost = 0.05, kl_budget = { nats = 0.0, cost = 0.5 }, clip = [-2.0, 2.0] }
"#;
    std::fs::write(&recipe, format!("{HEAD}{rm}{grpo}")).unwrap();
    let out = dir.path().join("run");
    let (code, _, err) = start(&recipe, &out, &[]);
    assert_eq!(code, 0, "{err}");
    let metrics = std::fs::read_to_string(out.join("grpo/metrics.jsonl")).unwrap();
    let first: serde_json::Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    for part in [
        "rubric",
        "rubric_part",
        "rm",
        "rm_part",
        "eos_penalty",
        "length_penalty",
        "kl_penalty",
        "clipped",
    ] {
        assert!(
            first[format!("grpo/reward_{part}")].is_number(),
            "{part}: {first}"
        );
    }
}
