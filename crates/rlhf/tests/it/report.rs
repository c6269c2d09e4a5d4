use std::collections::BTreeMap;
use std::path::Path;

use rlhf::interval::Interval;
use rlhf::results::{Answer, Check, Evaluation, ModelRow, RunSummary, Sample, StageSummary, Token};

const EVIL: &str = "<script>alert(1)</script>\u{1b}[31m\u{202e}\" onload='x' </textarea>&amp;";

fn interval(value: f64) -> Interval {
    Interval {
        value,
        low: value - 0.1,
        high: value + 0.1,
        n: 100,
    }
}

fn summary(stages: &[(&str, &str)]) -> RunSummary {
    let stage = |(name, kind): &(&str, &str)| StageSummary {
        name: (*name).into(),
        kind: (*kind).into(),
        steps: if *kind == "eval" { 0 } else { 50 },
        seconds: 61.0,
        tokens: 1000,
        last: BTreeMap::from([("loss".into(), 0.5)]),
    };
    RunSummary {
        title: "A <run>".into(),
        recipe: "test".into(),
        version: "0".into(),
        git_revision: Some(EVIL.into()),
        device: "CPU".into(),
        parameters: 1_200_000,
        seconds: 122.0,
        peak_memory: Some(1 << 30),
        stages: stages.iter().map(stage).collect(),
        data: BTreeMap::from([("a.parquet".into(), "00ff".into())]),
        models: BTreeMap::from([("grpo".into(), "ff00".into())]),
    }
}

fn evaluation() -> Evaluation {
    let row = |name: &str, gold: f64| ModelRow {
        name: name.into(),
        measures: BTreeMap::from([
            ("gold".into(), interval(gold)),
            ("kl".into(), interval(gold * 3.0)),
            ("win_rate".into(), interval(gold)),
            (
                "a new <measure>".into(),
                Interval {
                    value: f64::NAN,
                    low: f64::NAN,
                    high: f64::INFINITY,
                    n: 0,
                },
            ),
        ]),
    };
    let token = |logprob: f64| Token {
        text: EVIL.into(),
        logprob,
        baseline: -3.0,
    };
    let answer = |model: &str| Answer {
        model: model.into(),
        tokens: vec![token(-1.0), token(-3.1)],
        gold: Some(0.5),
        reward: None,
    };
    Evaluation {
        baseline: "sft".into(),
        models: vec![row("sft", 0.5), row("grpo", 0.8)],
        reward_model_accuracy: Some(interval(0.7)),
        reward_margins: (0..100).map(|i| f64::from(i) - 20.0).collect(),
        checks: vec![
            Check {
                what: "better".into(),
                found: EVIL.into(),
                ok: true,
            },
            Check {
                what: "near".into(),
                found: "no".into(),
                ok: false,
            },
        ],
        samples: vec![
            Sample {
                prompt: EVIL.into(),
                answers: vec![answer("grpo"), answer("sft")]
            };
            5
        ],
    }
}

fn json<T: serde::Serialize>(path: &Path, value: &T) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, serde_json::to_string(value).unwrap()).unwrap();
}

/// A run with everything in it.
fn whole(dir: &Path) {
    json(
        &dir.join("run.json"),
        &summary(&[
            ("sft", "sft"),
            ("rm", "reward"),
            ("grpo", "grpo"),
            ("eval", "eval"),
        ]),
    );
    json(&dir.join("eval/eval.json"), &evaluation());
    for stage in ["sft", "rm", "grpo"] {
        let line = |i: u32| {
            format!(
                "{{\"stage\":\"{stage}\",\"step\":{i},\"{stage}/loss\":null,\"{stage}/reward\":{i},\"{stage}/kl\":{},\"{stage}/<odd>\":1}}\n",
                i * 2
            )
        };
        std::fs::create_dir_all(dir.join(stage)).unwrap();
        std::fs::write(
            dir.join(stage).join("metrics.jsonl"),
            (0..50).map(line).collect::<String>() + "{\"stage\":",
        )
        .unwrap();
    }
    std::fs::write(dir.join("recipe.toml"), format!("title = '{EVIL}'")).unwrap();
    let file = serde_json::json!({"path": EVIL, "rows": 12, "kept": 11, "tokens": 123, "sha256": "00ff".repeat(16)});
    json(&dir.join("plan.json"), &serde_json::json!({"data": [file]}));
}

fn build(dir: &Path) -> String {
    let html = std::fs::read_to_string(rlhf::report::build(dir).unwrap()).unwrap();
    well_formed(&html);
    html
}

/// Every element is closed, in order; attributes have quotes; ids are unique.
fn well_formed(html: &str) {
    let start = html.find("</style>").unwrap();
    let mut open: Vec<&str> = vec!["html", "head", "style"];
    let mut rest = &html[start..];
    let mut ids = Vec::new();
    while let Some(at) = rest.find('<') {
        let end = at + rest[at..].find('>').expect("a tag that does not end");
        let tag = &rest[at + 1..end];
        assert!(!tag.contains('<'), "a tag in a tag: {tag}");
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        rest = &rest[end + 1..];
        let name = tag
            .trim_start_matches('/')
            .split([' ', '/', '\n'])
            .next()
            .unwrap();
        ids.extend(
            tag.split_once(" id=\"")
                .map(|x| x.1.split('"').next().unwrap()),
        );
        if tag.starts_with('/') {
            assert_eq!(
                open.pop(),
                Some(name),
                "before {}",
                &rest[..rest.len().min(80)]
            );
        } else if !tag.ends_with('/') && !["br", "wbr", "meta", "!doctype"].contains(&name) {
            open.push(name);
        }
    }
    assert_eq!(open, Vec::<&str>::new());
    let n = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), n, "{ids:?}");
}

#[test]
fn a_report_stands_alone_and_escapes_what_models_wrote() {
    let dir = tempfile::tempdir().unwrap();
    whole(dir.path());
    let html = build(dir.path());
    assert!(
        html.contains("A &lt;run&gt;")
            && html.contains(
                "&lt;script&gt;alert(1)&lt;/script&gt;\\u{1b}[31m\\u{202e}&quot; onload=&#39;x&#39;"
            )
    );
    assert!(
        !html.contains("<script")
            && !html.contains('\u{1b}')
            && !html.contains('\u{202e}')
            && !html.contains("onload='")
    );
    for outside in [
        "http:", "https:", "url(", "@import", "src=", "<link", "<iframe", "<object",
    ] {
        assert!(!html.contains(outside), "{outside}");
    }
    for (at, _) in html.match_indices("href=\"") {
        assert!(html[at..].starts_with("href=\"#"), "{}", &html[at..at + 40]);
    }
    let needed = [
        "prefers-color-scheme",
        "viewport",
        "grpo is better than sft",
        "1 of 2 checks fails",
        "Reward against KL",
        "Calibration",
        "0.800",
        "a new &lt;measure&gt;",
        "00ff",
        "ff00",
        "no value is finite",
        "could not be read: 1",
        "&lt;odd&gt;",
        "title=\"log p −1.00, before −3.00, difference 2.00\"",
    ];
    for needed in needed {
        assert!(html.contains(needed), "{needed}");
    }
    // The baseline's reply stands first, whatever the order in the file.
    let samples = &html[html.find("id=\"samples\"").unwrap()..];
    let who = |name: &str| {
        samples
            .find(&format!("</i>{name}</span><small>2 tokens"))
            .unwrap()
    };
    assert!(who("sft") < who("grpo"));
    assert!(html.len() < 300_000, "{}", html.len());
}

#[test]
fn a_poor_run_says_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = summary(&[("sft", "sft")]);
    (run.git_revision, run.peak_memory) = (None, None);
    run.data.clear();
    run.models.clear();
    json(&dir.path().join("run.json"), &run);
    let html = build(dir.path());
    for note in [
        "whether they got better is not known",
        "There are no metrics of sft",
        "Recipe, as given: not in",
        "Plan, as resolved: not in",
        "kept no hashes",
        "an unknown revision",
    ] {
        assert!(html.contains(note), "{note}");
    }
    // No stage at all, an evaluation of nothing, a plan that is not JSON.
    run.stages = summary(&[("eval", "eval")]).stages;
    json(&dir.path().join("run.json"), &run);
    json(&dir.path().join("eval/eval.json"), &Evaluation::default());
    std::fs::write(dir.path().join("plan.json"), "not JSON").unwrap();
    assert!(build(dir.path()).contains("This evaluation measured nothing"));
    run.stages.clear();
    json(&dir.path().join("run.json"), &run);
    build(dir.path());
}

#[test]
fn files_of_an_earlier_version_are_read() {
    let dir = tempfile::tempdir().unwrap();
    whole(dir.path());
    let mut old = serde_json::to_value(evaluation()).unwrap();
    old.as_object_mut().unwrap().remove("reward_margins");
    json(&dir.path().join("eval/eval.json"), &old);
    assert!(!build(dir.path()).contains("Calibration"));
}

#[test]
fn two_evaluations_stand_one_below_the_other() {
    let dir = tempfile::tempdir().unwrap();
    whole(dir.path());
    json(
        &dir.path().join("run.json"),
        &summary(&[("grpo", "grpo"), ("eval", "eval"), ("again", "eval")]),
    );
    json(&dir.path().join("again/eval.json"), &evaluation());
    let html = build(dir.path());
    assert!(
        html.contains("Results of eval")
            && html.contains("Results of again")
            && html.contains("2 of 4 checks fail")
    );
}

#[test]
fn an_unfinished_or_damaged_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let e = rlhf::report::build(dir.path()).unwrap_err();
    assert!(
        e.to_string().contains("no finished run") && e.is::<rlhf::Usage>(),
        "{e}"
    );
    whole(dir.path());
    rlhf::report::build(dir.path()).unwrap();
    let before = std::fs::read(dir.path().join("report.html")).unwrap();
    std::fs::write(dir.path().join("eval/eval.json"), "{").unwrap();
    assert!(
        rlhf::report::build(dir.path())
            .unwrap_err()
            .to_string()
            .contains("eval.json is damaged")
    );
    assert_eq!(
        std::fs::read(dir.path().join("report.html")).unwrap(),
        before,
        "the old report stays"
    );
}

#[test]
fn a_run_of_a_hundred_thousand_steps_makes_no_large_report() {
    let dir = tempfile::tempdir().unwrap();
    json(&dir.path().join("run.json"), &summary(&[("grpo", "grpo")]));
    std::fs::create_dir_all(dir.path().join("grpo")).unwrap();
    let line = |i: u32| {
        format!(
            "{{\"step\":{i},\"grpo/reward\":{},\"grpo/kl\":{}}}\n",
            f64::from(i % 977).sqrt(),
            i % 31
        )
    };
    std::fs::write(
        dir.path().join("grpo/metrics.jsonl"),
        (0..100_000).map(line).collect::<String>(),
    )
    .unwrap();
    let html = build(dir.path());
    assert!(html.len() < 200_000, "{}", html.len());
}
