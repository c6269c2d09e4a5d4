//! Verifiers and judges in a recipe: a run goes on whatever a verifier does, and the log says what it did.

use super::{runs, text};

/// Three parts: one that counts words, one whose command never ends, and the stage `sft` as a judge.
const REWARD: &str = r#"stages.grpo.rollouts.reward=[
    { verifier = { kind = "length", unit = "tokens", max = 6, slope = 6 }, weight = 1.0 },
    { verifier = { kind = "code", command = ["sh", "-c", "sleep 1000 & sleep 1000"], limits = { wall_s = 0.1 } }, pool = { workers = 4, failure_score = -1.0 }, weight = 0.5 },
    { judge = { model = "sft", style = "pairwise", settings = { prompts = { pair = "{prompt} {a} or {b}?" } } }, weight = 1.0 },
]"#;

#[test]
fn verdicts_are_rewards_and_failures_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let reward = REWARD.replace('\n', " ");
    let more = ["--set", &reward, "--set", "stages.sft.steps=2"];
    let (code, _, err) = text(runs::tiny(&out, &more).output().unwrap());
    assert_eq!(code, 0, "{err}");
    let log = std::fs::read_to_string(out.join("grpo/metrics.jsonl")).unwrap();
    let steps: Vec<serde_json::Value> = log
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(steps.len(), 3);
    for step in &steps {
        let at = |name: &str| {
            step[format!("grpo/{name}")]
                .as_f64()
                .unwrap_or_else(|| panic!("no {name} in {step}"))
        };
        // Two prompts with two completions each.
        assert_eq!(at("reward_code"), -1.0);
        assert_eq!(at("reward_code_failed_deadline"), 4.0);
        // In a group of two one's gain is the other's loss.
        assert!((at("reward_judge") - 0.5).abs() < 1e-6);
        assert!((0.0..=1.0).contains(&at("reward_length")));
    }
}

#[test]
fn data_without_the_answer_stop_the_run_with_their_row() {
    let dir = tempfile::tempdir().unwrap();
    let reward = "stages.grpo.rollouts.reward=[{ verifier = { kind = \"math\", answer = \"gold\" }, weight = 1.0 }]";
    let more = ["--set", reward, "--set", "stages.sft.steps=2"];
    let (code, _, err) = text(runs::tiny(&dir.path().join("run"), &more).output().unwrap());
    assert_eq!(code, 2, "{err}");
    assert!(
        err.contains("row ") && err.contains("no field `gold`"),
        "{err}"
    );
}
