//! Runs of control: no model, no tokenizer, no data.

use std::path::Path;
use std::process::{Command, Stdio};

use rlhf_engine::recipe::Source;

use super::{rlhf, text};

fn smoke(recipe: &str, out: &Path, more: &[&str]) -> Command {
    let mut c = rlhf();
    c.args(["run", recipe, "--smoke", "--out"])
        .arg(out)
        .args(more);
    c
}

/// metrics.jsonl of a stage without its times.
fn metrics(out: &Path, stage: &str) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(out.join(stage).join("metrics.jsonl")).unwrap_or_default();
    let line = |line: &str| {
        let mut v: serde_json::Value = serde_json::from_str(line).ok()?;
        v.as_object_mut()?.remove("seconds");
        Some(v)
    };
    text.lines().filter_map(line).collect()
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn the_thermostat_recipe_reaches_its_goal_and_resumes_bit_by_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    let every = ["--set", "run.checkpoint_every=7"];
    let (code, out, err) = text(smoke("thermostat", &whole, &every).output().unwrap());
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("report.html"), "{out}");

    // A learning curve, a verdict and a check in the report; nothing of language models in the plan.
    let html = std::fs::read_to_string(whole.join("report.html")).unwrap();
    for words in [
        "mean return of the last 100 episodes",
        "ppo is better than untrained",
        "held-out episodes",
        "at least -17.5",
    ] {
        assert!(html.contains(words), "{words}");
    }
    assert!(json(&whole.join("plan.json"))["model"].is_null());
    let eval = json(&whole.join("ppo/eval.json"));
    assert_eq!(eval["checks"][0]["ok"], true, "{eval}");
    let done = json(&whole.join("ppo/done.json"));
    assert!(done["final"]["test_return"].as_f64().unwrap() > -17.5);
    let run = json(&whole.join("run.json"));
    assert_eq!(run["parameters"], 2 * 16 + 17 * 2);
    assert_eq!(run["models"]["ppo"].as_str().unwrap().len(), 64);
    assert!(whole.join("ppo/model/value.safetensors").is_file());

    let mut child = smoke("thermostat", &broken, &every)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while metrics(&broken, "ppo").len() < 10 && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let resumed = [&every[..], &["--resume"]].concat();
    let (code, _, err) = text(smoke("thermostat", &broken, &resumed).output().unwrap());
    assert_eq!(code, 0, "{err}");
    assert_eq!(metrics(&broken, "ppo"), metrics(&whole, "ppo"));
    assert_eq!(json(&broken.join("ppo/eval.json")), eval);
}

#[test]
fn the_smoke_runs_of_cart_pole_end() {
    let dir = tempfile::tempdir().unwrap();
    for (recipe, stages) in [
        ("cartpole", &["ppo", "a2c", "reinforce"][..]),
        ("christiano2017", &["preferences"][..]),
    ] {
        let out = dir.path().join(recipe);
        let (code, _, err) = text(smoke(recipe, &out, &[]).output().unwrap());
        assert_eq!(code, 0, "{err}");
        for stage in stages {
            let own = metrics(&out, stage);
            let last = &own[own.len() - 1];
            assert!(
                last[format!("{stage}/return")].as_f64().unwrap() > 5.0,
                "{last}"
            );
            let eval = json(&out.join(stage).join("eval.json"));
            assert_eq!(eval["models"][1]["name"], *stage);
        }
    }
    let own = metrics(&dir.path().join("christiano2017"), "preferences");
    assert_eq!(own[9]["preferences/comparisons"], 190.0);
}

#[test]
fn a_recipe_names_a_language_model_where_one_is_needed_and_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let refused = |recipe: &str, set: &str, words: &str| {
        let (code, _, err) = text(smoke(recipe, &out, &["--set", set]).output().unwrap());
        assert_eq!(code, 2, "{set}: {err}");
        assert!(err.contains(words), "{set}: {err}");
    };
    refused("thermostat", "init.from=\"x\"", "leave [init] out");
    let stage = "stages.ppo";
    for (key, value, words) in [
        ("gamma", "1.5", "gamma is 1.5"),
        ("episodes", "0", "episodes must be above 0"),
        ("environment.loss", "0.0", "loss and heat"),
        ("environment", "{ kind = \"moon\" }", "moon"),
        (
            "algorithm",
            "{ kind = \"reinforce\", baseline = false }",
            "value_lr",
        ),
        (
            "predictor",
            "{ hidden = [4], optim = { lr = 1e-3, schedule = { kind = \"constant\" }, warmup_steps = 0, weight_decay = 0.0, max_grad_norm = 1.0 } }",
            "belong together",
        ),
        ("hidden", "[0]", "hidden"),
    ] {
        refused("thermostat", &format!("{stage}.{key}={value}"), words);
    }
    // Without [init] a stage of language models is refused, by its name.
    let file = dir.path().join("mixed.toml");
    let shown = Source::find("quickstart").unwrap().text;
    let without = shown
        .lines()
        .filter(|l| {
            !l.starts_with("[init]") && !l.starts_with("tokenizer") && !l.starts_with("scratch")
        })
        .collect::<Vec<_>>()
        .join("\n");
    std::fs::write(&file, without).unwrap();
    refused(file.to_str().unwrap(), "run.seed=1", "stage `sft` needs");
    // And what control makes is no language model for a later stage.
    let control = Source::find("thermostat").unwrap().text;
    let stages = &control[control.find("[[stages]]").unwrap()..control.find("[smoke]").unwrap()];
    let mixed = shown.replacen(
        "[[stages]]",
        &format!(
            "{}\n[[stages]]",
            stages.replace("\"ppo\"\nkind", "\"room\"\nkind")
        ),
        1,
    );
    std::fs::write(&file, mixed).unwrap();
    refused(
        file.to_str().unwrap(),
        "stages.grpo.model=\"room\"",
        "names `room`",
    );
}
