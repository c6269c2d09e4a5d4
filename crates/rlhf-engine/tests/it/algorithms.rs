//! Policy-gradient stages by the name of their algorithm: each runs, resumes bit by bit, and refuses what contradicts it.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use super::runs::{metrics_of, wait_for};
use super::{rlhf, text};

const HEAD: &str = r#"
[run]
title = "algorithms"
seed = 5
checkpoint_every = 2

[init]
tokenizer = "datasets/help/tokenizer"
scratch = { hidden_size = 16, layers = 1, heads = 2, kv_heads = 1, intermediate_size = 32, max_positions = 128, initializer_range = 0.4 }
"#;

/// What every stage here has in common, with further keys of the stage and of its rollouts.
fn stage(name: &str, kind: &str, keys: &str, rollouts: &str) -> String {
    format!(
        r#"
[[stages]]
name = "{name}"
kind = "{kind}"
model = "init"
steps = 4
micro_tokens = 512
optim = {{ lr = 3e-3, schedule = {{ kind = "constant" }}, warmup_steps = 0, weight_decay = 0.0, max_grad_norm = 1.0 }}
{keys}
[stages.rollouts]
data = {{ path = "datasets/help/prompts/train.parquet", max_prompt = 64, max_completion = 16, limit = 24 }}
prompts_per_step = 3
group_size = 3
sampling = {{ temperature = 1.0, max_new_tokens = 10, max_sequences = 64 }}
reward = [{{ rule = {{ kind = "words", positive = ["a", "i", "s", "t", "to", "the", "you", "and", "we", "is", "or", "in", "of", "on"], negative = [] }}, weight = 1.0 }}]
{rollouts}
"#
    )
}

fn write(dir: &Path, stages: &[String]) -> PathBuf {
    let path = dir.join("algorithms.toml");
    std::fs::write(&path, format!("{HEAD}{}", stages.concat())).unwrap();
    path
}

fn command(recipe: &Path, out: &Path, more: &[&str]) -> std::process::Command {
    let mut c = rlhf();
    c.arg("run").arg(recipe).arg("--out").arg(out).args(more);
    c
}

fn succeeds(recipe: &Path, out: &Path, more: &[&str]) -> String {
    let (code, _, err) = text(command(recipe, out, more).output().unwrap());
    assert_eq!(code, 0, "{err}");
    err
}

fn logged(out: &Path, stage: &str, key: &str) -> Vec<f64> {
    let of = |line: &String| {
        let v: serde_json::Value = serde_json::from_str(line).unwrap();
        v[format!("{stage}/{key}")].as_f64().unwrap_or(f64::NAN)
    };
    metrics_of(out, stage).iter().map(of).collect()
}

const POLICY: [&str; 15] = [
    "reinforce",
    "reinforce_plus_plus",
    "rloo",
    "remax",
    "grpo",
    "dr_grpo",
    "bnpo",
    "dapo",
    "gspo",
    "cispo",
    "sapo",
    "luspo",
    "vespo",
    "gmpo",
    "maxrl",
];

#[test]
fn every_algorithm_runs_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut stages: Vec<String> = POLICY
        .iter()
        .map(|p| stage(p, "grpo", &format!("preset = \"{p}\""), ""))
        .collect();
    // A model judges steps as well; `init` with a fresh head serves.
    let process = "process = { model = \"init\", ends = [\" \", \".\"], weight = 0.5 }";
    stages.push(stage("steps", "grpo", "preset = \"grpo\"", process));
    let own = "value_model = \"init\"\nvalue_lr = 1e-3";
    stages.push(stage(
        "ppo_steps",
        "ppo",
        &format!("preset = \"ppo\"\n{own}"),
        process,
    ));
    let shared = "value_model = \"shared\"\nvalue_coef = 0.1";
    let ptx = "ptx = { data = { path = \"datasets/help/sft/train.parquet\", max_prompt = 64, max_completion = 60, limit = 8 }, batch_size = 2 }";
    stages.push(stage("ppo", "ppo", &format!("preset = \"ppo\"\n{own}"), ""));
    stages.push(stage(
        "ppo_shared",
        "ppo",
        &format!("preset = \"ppo\"\nwhiten_rewards = true\n{shared}"),
        "",
    ));
    stages.push(stage(
        "ppo_ptx",
        "ppo",
        &format!("preset = \"ppo_ptx\"\n{own}\n{ptx}"),
        "",
    ));
    stages.push(stage("a2c", "ppo", &format!("preset = \"a2c\"\n{own}"), ""));
    let teacher = "teacher = \"ppo\"";
    stages.push(stage(
        "opd",
        "opd",
        &format!("preset = \"opd\"\n{teacher}"),
        "",
    ));
    stages.push(stage(
        "gkd",
        "opd",
        &format!("preset = \"gkd\"\n{teacher}"),
        "",
    ));
    let recipe = write(dir.path(), &stages);
    let out = dir.path().join("run");
    succeeds(&recipe, &out, &["--set", "run.title=all"]);
    for name in POLICY {
        let loss = logged(&out, name, "loss");
        assert!(
            loss.len() == 4 && loss.iter().all(|l| l.is_finite()),
            "{name}: {loss:?}"
        );
        assert!(
            logged(&out, name, "advantage_std").iter().any(|a| *a > 0.0),
            "{name}"
        );
        assert!(out.join(name).join("model/model.safetensors").is_file());
    }
    for name in ["ppo", "ppo_steps", "ppo_shared", "ppo_ptx", "a2c"] {
        let values = logged(&out, name, "value_loss");
        assert!(
            values.iter().all(|l| l.is_finite() && *l > 0.0),
            "{name}: {values:?}"
        );
    }
    assert_ne!(
        logged(&out, "steps", "advantage_std"),
        logged(&out, "grpo", "advantage_std")
    );
    // A2C takes one step on each batch: no ratio has left 1, and none is clipped.
    assert!(
        logged(&out, "a2c", "ratio_p99")
            .iter()
            .all(|r| (r - 1.0).abs() < 1e-4)
    );
    assert!(logged(&out, "ppo_ptx", "ptx_loss").iter().all(|l| *l > 0.0));
    for name in ["opd", "gkd"] {
        assert!(
            logged(&out, name, "kl_teacher_k3")
                .iter()
                .all(|k| *k >= 0.0)
        );
    }
    let plan = std::fs::read_to_string(out.join("plan.json")).unwrap();
    assert!(plan.contains("\"preset\": \"dr_grpo\"") && plan.contains("\"fixed_length\""));
}

/// Everything that a training remembers beside weights and optimiser.
fn remembering() -> Vec<String> {
    vec![
        stage(
            "sync",
            "grpo",
            "preset = \"grpo\"\nadaptive_kl = { target = 0.01, horizon = 20.0 }\nreference = { kind = \"sync\", every = 3, mix = 0.6 }",
            "samples = { every = 1, prompts = 2 }\nrecord = true",
        ),
        stage(
            "running",
            "grpo",
            "preset = \"reinforce\"\nadvantage = { kind = \"running\", decay = 0.8 }\nreference = { kind = \"reset\", every = 3 }",
            "",
        ),
        stage(
            "dapo",
            "grpo",
            "preset = \"dapo\"",
            "overlong = { buffer = 4, penalty = 1.0 }\nfilter_cut = true",
        ),
        stage(
            "ahead",
            "grpo",
            "preset = \"grpo\"\ncorrection = { level = \"sequence_sum\", bound = { kind = \"mask\", min = 0.2, max = 5.0 } }",
            "ahead = 1\nsamples = { every = 2, prompts = 1 }",
        ),
        stage(
            "ema",
            "ppo",
            "preset = \"ppo\"\nvalue_model = \"shared\"\nvalue_coef = 0.1\nreference = { kind = \"ema\", decay = 0.5 }",
            "ahead = 2",
        ),
    ]
}

const NAMES: [&str; 5] = ["sync", "running", "dapo", "ahead", "ema"];

#[test]
fn what_a_training_remembers_survives_being_killed() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = write(dir.path(), &remembering());
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    succeeds(&recipe, &whole, &[]);
    for (i, (stage, step)) in [
        ("sync", 3),
        ("running", 3),
        ("dapo", 3),
        ("ahead", 1),
        ("ahead", 3),
        ("ema", 3),
    ]
    .into_iter()
    .enumerate()
    {
        let more: &[&str] = if i == 0 { &[] } else { &["--resume"] };
        let mut child = command(&recipe, &broken, more)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for(&mut child, &broken, stage, step);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    succeeds(&recipe, &broken, &["--resume"]);
    for name in NAMES {
        assert_eq!(
            metrics_of(&whole, name),
            metrics_of(&broken, name),
            "{name}"
        );
        let weights =
            |d: &Path| std::fs::read(d.join(name).join("model/model.safetensors")).unwrap();
        assert!(weights(&whole) == weights(&broken), "{name}");
    }
    assert_eq!(logged(&whole, "ahead", "staleness"), [0.0, 1.0, 1.0, 1.0]);
    assert_eq!(logged(&whole, "ema", "staleness"), [0.0, 1.0, 2.0, 2.0]);
    assert!(logged(&whole, "ahead", "sampler_kl")[2] > 0.0);
    // After the reference has moved the KL begins lower; the coefficient follows its target.
    let coef = logged(&whole, "sync", "kl_coef");
    assert!(coef.windows(2).any(|w| w[0] != w[1]), "{coef:?}");
    // Completions that were cut teach nothing, and dynamic sampling uses groups that differ.
    let (drawn, used) = (
        logged(&whole, "dapo", "groups_drawn"),
        logged(&whole, "dapo", "groups_used"),
    );
    assert!(
        drawn.iter().zip(&used).all(|(d, u)| d >= u && *u <= 3.0),
        "{drawn:?} {used:?}"
    );
    samples(&whole, &broken);
    replayed(dir.path(), &whole);
}

fn samples(whole: &Path, broken: &Path) {
    let rows = |d: &Path| -> Vec<_> {
        let path = d.join("sync/samples.parquet");
        rlhf_data::source::rows(&path)
            .unwrap()
            .map(|r| r.unwrap().columns)
            .collect()
    };
    assert_eq!(rows(whole), rows(broken));
    assert_eq!(rows(whole).len(), 8);
    assert!(rows(whole)[0]["prompt"].as_str().unwrap().len() > 3);
    let html = std::fs::read_to_string(whole.join("report.html")).unwrap();
    assert!(
        html.contains("Samples of the training"),
        "the report shows them"
    );
}

/// A stage that learns from what another has recorded ends with the same weights.
fn replayed(dir: &Path, whole: &Path) {
    let folder = whole.join("sync/rollouts");
    let again = remembering()[0].replace(
        "record = true",
        &format!("replay = {:?}", folder.to_str().unwrap()),
    );
    let recipe = write(dir, &[again]);
    let out = dir.join("again");
    succeeds(&recipe, &out, &[]);
    assert_eq!(metrics_of(&out, "sync"), metrics_of(whole, "sync"));
    let weights = |d: &Path| std::fs::read(d.join("sync/model/model.safetensors")).unwrap();
    assert!(weights(&out) == weights(whole));
    // What was not recorded cannot be replayed.
    let (code, _, err) = text(
        command(
            &recipe,
            &dir.join("more"),
            &["--set", "stages.sync.steps=5"],
        )
        .output()
        .unwrap(),
    );
    assert!(
        code == 1 && err.contains("step 4 was not recorded"),
        "{err}"
    );
    let (code, _, err) = text(
        command(
            &recipe,
            &dir.join("none"),
            &["--set", "stages.sync.rollouts.replay=\"/nowhere\""],
        )
        .output()
        .unwrap(),
    );
    assert!(code == 2 && err.contains("no recorded rollouts"), "{err}");
    let (code, _, err) = text(
        command(
            &recipe,
            &dir.join("other"),
            &[
                "--set",
                "stages.sync.rollouts.data.path=\"datasets/help/prompts/test.parquet\"",
            ],
        )
        .output()
        .unwrap(),
    );
    assert!(err.contains("not the one of these data"), "{code} {err}");
}

#[test]
fn a_budget_of_kl_ends_the_training_at_the_last_good_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let one = |max: &str| {
        let keys = format!("preset = \"bnpo\"\n{max}");
        stage("g", "grpo", &keys, "")
            .replace("steps = 4", "steps = 9")
            .replace("lr = 3e-3", "lr = 2e-2")
    };
    let free = dir.path().join("free");
    succeeds(
        &write(dir.path(), &[one("")]),
        &free,
        &["--set", "run.checkpoint_every=1"],
    );
    let kl = logged(&free, "g", "kl");
    let most = kl[..5].iter().fold(0.0f64, |a, b| a.max(*b));
    let bound = (most * 0.5).max(1e-3);
    let first = kl.iter().position(|k| *k > bound).unwrap();
    assert!(first > 0, "{kl:?}");
    let recipe = write(dir.path(), &[one(&format!("max_kl = {bound:?}"))]);
    let out = dir.path().join("held");
    let said = succeeds(&recipe, &out, &["--set", "run.checkpoint_every=1"]);
    assert!(said.contains("the KL exceeded max_kl"), "{said}");
    assert_eq!(metrics_of(&out, "g").len(), first + 1);
    assert_eq!(logged(&out, "g", "kl_exceeded")[first], 1.0);
    // The result is the model of a run that ends one step before the step whose KL was too much.
    if first > 1 {
        let short = dir.path().join("short");
        let steps = format!("stages.g.steps={}", first - 1);
        succeeds(
            &recipe,
            &short,
            &["--set", "run.checkpoint_every=1", "--set", &steps],
        );
        let weights = |d: &Path| std::fs::read(d.join("g/model/model.safetensors")).unwrap();
        assert!(weights(&short) == weights(&out));
    }
}

#[test]
fn what_contradicts_an_algorithm_is_refused_by_name() {
    use rlhf_engine::recipe::Source;
    let parse = |stage: &str| {
        let text = format!("{HEAD}{stage}");
        let source = Source {
            name: "t".into(),
            text,
            origin: "t.toml".into(),
        };
        source.parse(false, &[])
    };
    let grpo = |keys: &str, rollouts: &str| stage("s", "grpo", keys, rollouts);
    let ppo = |keys: &str| stage("s", "ppo", keys, "");
    for (stage, words) in [
        (
            grpo("preset = \"cispo\"\nloss = { max_ratio = 0.2 }", ""),
            vec!["bounds ρ itself"],
        ),
        (
            grpo(
                "preset = \"dr_grpo\"\nadvantage = { kind = \"group_normalized\", std_epsilon = 1e-4, scope = \"group\" }",
                "",
            ),
            vec!["preset `dr_grpo`", "advantage.kind", "group_centered"],
        ),
        (
            grpo(
                "preset = \"dr_grpo\"\nloss = { reduction = { kind = \"sequence\" } }",
                "",
            ),
            vec!["loss.reduction.kind"],
        ),
        (
            grpo(
                "preset = \"dr_grpo\"\nloss = { reduction = { length = 4 } }",
                "",
            ),
            vec!["max_new_tokens"],
        ),
        (
            grpo("preset = \"gspo\"\nloss = { ratio = \"token\" }", ""),
            vec!["sequence_mean", "no `gspo`"],
        ),
        (
            grpo(
                "preset = \"dapo\"\nloss = { clip = { epsilon_high = 0.1 } }",
                "",
            ),
            vec!["clips higher"],
        ),
        (
            grpo("preset = \"grpo\"\nloss = { kind = \"cispo\" }", ""),
            vec!["loss.kind"],
        ),
        (
            grpo("preset = \"reinforce\"\nepochs = 2", ""),
            vec!["epochs"],
        ),
        (grpo("preset = \"rloo\"\nepochs = 2", ""), vec!["no ratio"]),
        (
            grpo("preset = \"rloo\"\nkl = { placement = \"in_loss\" }", ""),
            vec!["kl.placement"],
        ),
        (
            grpo("preset = \"maxrl\"\nkl = { placement = \"in_reward\" }", ""),
            vec!["kl.placement"],
        ),
        (grpo("preset = \"magic\"", ""), vec!["`magic`", "dr_grpo"]),
        (grpo("preset = \"ppo\"", ""), vec!["kind ppo"]),
        (grpo("preset = \"grpo\"", "ahead = 1"), vec!["correction"]),
        (
            grpo("preset = \"dapo\"\nold = \"sampler\"", "ahead = 1"),
            vec!["dynamic sampling"],
        ),
        (
            grpo("preset = \"remax\"", "dynamic = { max_rounds = 2 }"),
            vec!["greedy"],
        ),
        (
            grpo(
                "preset = \"grpo\"",
                "overlong = { buffer = 11, penalty = 1.0 }",
            ),
            vec!["overlong.buffer"],
        ),
        (
            grpo("preset = \"grpo\"", "record = true\nreplay = \"x\""),
            vec!["record"],
        ),
        (
            grpo("preset = \"grpo\"\nreference = { kind = \"none\" }", ""),
            vec!["KL penalty"],
        ),
        (
            grpo(
                "preset = \"bnpo\"\nreference = { kind = \"none\" }\nmax_kl = 1.0",
                "",
            ),
            vec!["max_kl"],
        ),
        (
            grpo(
                "preset = \"grpo\"\nreference = { kind = \"sync\", every = 0, mix = 0.5 }",
                "",
            ),
            vec!["every"],
        ),
        (
            grpo(
                "preset = \"grpo\"\nreference = { kind = \"ema\", decay = 0.9 }\nmemory = { lora = {} }",
                "",
            ),
            vec!["adapter"],
        ),
        (
            grpo(
                "preset = \"bnpo\"\nadaptive_kl = { target = 1.0, horizon = 10.0 }",
                "",
            ),
            vec!["kl.coef"],
        ),
        (
            grpo(
                "preset = \"gmpo\"\ncorrection = { level = \"token\", bound = { kind = \"truncate\", max = 2.0 } }",
                "",
            ),
            vec!["gmpo"],
        ),
        (
            ppo("preset = \"a2c\"\nvalue_model = \"init\"\nvalue_lr = 1e-3\nepochs = 4"),
            vec!["epochs"],
        ),
        (
            ppo("preset = \"a2c\"\nvalue_model = \"init\"\nvalue_lr = 1e-3\nvalue_clip = 0.2"),
            vec!["has no value_clip"],
        ),
        (
            ppo("preset = \"ppo_ptx\"\nvalue_model = \"init\"\nvalue_lr = 1e-3"),
            vec!["needs `ptx`"],
        ),
        (
            ppo("preset = \"ppo\"\nvalue_model = \"shared\"\nvalue_lr = 1e-3"),
            vec!["value_coef"],
        ),
        (
            ppo("preset = \"ppo\"\nvalue_model = \"init\""),
            vec!["value_lr"],
        ),
        (
            ppo("preset = \"ppo\"\nvalue_model = \"init\"\nvalue_lr = 1e-3\nvalue_coef = 1.0"),
            vec!["shared"],
        ),
    ] {
        let e = parse(&stage).map(|_| ()).unwrap_err().to_string();
        for word in words {
            assert!(e.contains(word), "{word}: {e}\n{stage}");
        }
    }
    // What is no contradiction may be set.
    for keys in [
        "preset = \"dapo\"\nloss = { clip = { epsilon_high = 0.4 } }\nkl = { coef = 0.01 }",
        "preset = \"reinforce\"\nadvantage = { kind = \"leave_one_out\" }",
        "preset = \"grpo\"\nloss = { clip = { dual = 3.0 } }\nepochs = 2",
        "preset = \"reinforce_plus_plus\"\nadvantage = { group_baseline = true }",
    ] {
        parse(&grpo(keys, "")).unwrap();
    }
}
