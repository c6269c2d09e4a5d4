use std::collections::BTreeMap;

use rlhf::interval::Interval;
use rlhf::results::{Answer, Check, Evaluation, ModelRow, RunSummary, Sample, StageSummary, Token};

fn interval(value: f64) -> Interval {
    Interval {
        value,
        low: value - 0.1,
        high: value + 0.1,
        n: 100,
    }
}

fn write(dir: &std::path::Path) {
    let stage = |name: &str, kind: &str| StageSummary {
        name: name.into(),
        kind: kind.into(),
        steps: 10,
        seconds: 61.0,
        tokens: 1000,
        last: BTreeMap::new(),
    };
    let run = RunSummary {
        title: "A <run>".into(),
        recipe: "test".into(),
        version: "0".into(),
        git_revision: None,
        device: "CPU".into(),
        parameters: 1_200_000,
        seconds: 122.0,
        peak_memory: Some(1 << 30),
        stages: vec![stage("grpo", "grpo"), stage("eval", "eval")],
        data: BTreeMap::from([("a.parquet".into(), "00ff".into())]),
        models: BTreeMap::new(),
    };
    let row = |name: &str, gold: f64| ModelRow {
        name: name.into(),
        measures: BTreeMap::from([
            ("gold".into(), interval(gold)),
            ("kl".into(), interval(gold * 3.0)),
        ]),
    };
    let evil = "<script>alert(1)</script>\u{1b}[31m";
    let eval = Evaluation {
        baseline: "sft".into(),
        models: vec![row("sft", 0.5), row("grpo", 0.8)],
        reward_model_accuracy: Some(interval(0.7)),
        checks: vec![Check {
            what: "better".into(),
            found: "yes".into(),
            ok: true,
        }],
        samples: vec![Sample {
            prompt: evil.into(),
            answers: vec![Answer {
                model: "sft".into(),
                tokens: vec![Token {
                    text: evil.into(),
                    logprob: -1.0,
                    baseline: -3.0,
                }],
                gold: Some(0.5),
                reward: None,
            }],
        }],
    };
    for d in ["grpo", "eval"] {
        std::fs::create_dir_all(dir.join(d)).unwrap();
    }
    std::fs::write(dir.join("run.json"), serde_json::to_string(&run).unwrap()).unwrap();
    std::fs::write(
        dir.join("eval/eval.json"),
        serde_json::to_string(&eval).unwrap(),
    )
    .unwrap();
    let lines: String = (0..50)
        .map(|i| format!("{{\"stage\":\"grpo\",\"step\":{i},\"grpo/loss\":null,\"grpo/reward\":{},\"grpo/kl\":{}}}\n", i, i * 2))
        .collect();
    std::fs::write(dir.join("grpo/metrics.jsonl"), lines).unwrap();
}

#[test]
fn a_report_stands_alone_and_escapes_what_models_wrote() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path());
    let html = std::fs::read_to_string(rlhf::report::build(dir.path()).unwrap()).unwrap();
    assert!(
        html.contains("A &lt;run&gt;")
            && html.contains("&lt;script&gt;")
            && !html.contains("<script")
    );
    assert!(!html.contains('\u{1b}'));
    for outside in ["src=\"http", "href=\"http", "url(http", "@import"] {
        assert!(!html.contains(outside), "{outside}");
    }
    for needed in [
        "prefers-color-scheme",
        "viewport",
        "Reward against KL",
        "0.800",
        "00ff",
        "Every check holds",
    ] {
        assert!(html.contains(needed), "{needed}");
    }
    for tag in [
        "section", "div", "table", "article", "figure", "details", "svg",
    ] {
        let opened =
            html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count();
        assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "{tag}");
    }
}

#[test]
fn an_unfinished_or_damaged_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let e = rlhf::report::build(dir.path()).unwrap_err();
    assert!(e.to_string().contains("no finished run"), "{e}");
    write(dir.path());
    std::fs::write(dir.path().join("eval/eval.json"), "{").unwrap();
    assert!(
        rlhf::report::build(dir.path())
            .unwrap_err()
            .to_string()
            .contains("eval.json is damaged")
    );
}
