use super::{rlhf, root, run, text};

#[test]
fn the_front_does_not_need_libtorch() {
    // Loading libtorch takes a third of a second; help, recipes and data must not pay it.
    let (code, out, err) = text(
        rlhf()
            .arg("--help")
            .env_remove("LD_LIBRARY_PATH")
            .output()
            .unwrap(),
    );
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("recipes") && out.contains("generate"));
    let binary = std::fs::read(env!("CARGO_BIN_EXE_rlhf")).unwrap();
    let name = b"libtorch_cpu.so";
    assert!(
        !binary.windows(name.len()).any(|w| w == name),
        "rlhf is linked to libtorch; only rlhf-engine may be"
    );
}

#[test]
fn recipes_are_listed_and_shown() {
    let (code, out, _) = run(&["recipes"]);
    assert_eq!(code, 0);
    assert!(
        out.contains("quickstart") && out.contains("sft → rm → grpo → ppo → dpo → eval"),
        "{out}"
    );
    let (code, out, _) = run(&["recipes", "--json"]);
    assert_eq!(code, 0);
    // Every recipe is shipped; what has no `[run]` is a part of recipes.
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/recipes");
    let files = std::fs::read_dir(folder).unwrap().filter(|f| {
        let text = std::fs::read_to_string(f.as_ref().unwrap().path()).unwrap();
        text.contains("[run]")
    });
    let listed: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), files.count());
    assert!(
        run(&["recipes", "show", "stories"])
            .1
            .starts_with("# The same way on real weights")
    );
    let (code, _, err) = run(&["recipes", "show", "nope"]);
    assert_eq!(code, 2);
    assert!(err.contains("quickstart, stories"), "{err}");
}

#[test]
fn wrong_usage_exits_with_2_and_three_lines() {
    for args in [
        &["data", "stats", "missing.jsonl", "--purpose", "sft"][..],
        &[
            "data",
            "render",
            "datasets/help/sft/train.parquet",
            "--purpose",
            "sft",
            "--tokenizer",
            "missing",
        ],
        &["report", "missing-run"],
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

#[test]
fn data_commands_describe_check_and_import() {
    let file = "datasets/help/preference/train.parquet";
    let (code, out, err) = run(&[
        "data",
        "stats",
        file,
        "--purpose",
        "preference",
        "--tokenizer",
        "datasets/help/tokenizer",
        "--json",
    ]);
    assert_eq!(code, 0, "{err}");
    let v: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (v["rows"].as_u64(), v["unit"].as_str()),
        (Some(4000), Some("tokens"))
    );
    assert_eq!(v["lengths"][1]["column"], "chosen");
    assert_eq!(v["lengths"][1]["tokens"]["n"], 4000);
    assert!(
        v["preference"]["length_model"]["weight"].is_number(),
        "{out}"
    );
    let (code, out, _) = run(&[
        "data",
        "check",
        file,
        "--purpose",
        "preference",
        "--tokenizer",
        "datasets/help/tokenizer",
    ]);
    assert_eq!(code, 0, "{out}");
    assert!(out.contains("4000 rows, fit for training"), "{out}");
    let (code, out, _) = run(&["data", "check", file, "--purpose", "sft"]);
    assert_eq!(code, 2, "{out}");

    let dir = tempfile::tempdir().unwrap();
    let jsonl = dir.path().join("a.jsonl");
    std::fs::write(
        &jsonl,
        "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"a\"\n",
    )
    .unwrap();
    let out = dir.path().join("a.parquet");
    let (code, _, err) = run(&[
        "data",
        "import",
        jsonl.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
        "--purpose",
        "sft",
    ]);
    assert_eq!(code, 2);
    assert!(err.contains("line 2") && !out.exists(), "{err}");
    std::fs::write(&jsonl, "{\"prompt\": \"a\", \"completion\": \"b\"}\n").unwrap();
    assert_eq!(
        run(&[
            "data",
            "import",
            jsonl.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
            "--purpose",
            "sft"
        ])
        .0,
        0
    );
    assert!(
        run(&["data", "stats", out.to_str().unwrap(), "--purpose", "sft"])
            .1
            .starts_with("1 rows")
    );
}

#[test]
fn check_compares_with_other_files_and_stats_writes_a_page() {
    let file = "datasets/help/preference/train.parquet";
    let dir = tempfile::tempdir().unwrap();
    let (findings, page, test) = (
        dir.path().join("findings.parquet"),
        dir.path().join("stats.html"),
        dir.path().join("test.jsonl"),
    );
    let args = [
        "data",
        "check",
        file,
        "--purpose",
        "preference",
        "--findings",
        findings.to_str().unwrap(),
    ];
    let with = |more: &[&str]| run(&[&args[..], more].concat());
    // A row of the file itself as another split and as an evaluation set.
    let row = rlhf_data::source::rows(&root().join(file))
        .unwrap()
        .nth(7)
        .unwrap()
        .unwrap();
    std::fs::write(
        &test,
        format!("{}\n", serde_json::Value::Object(row.columns)),
    )
    .unwrap();
    let test = test.to_str().unwrap();
    let (code, out, err) = with(&["--against", test, "--eval", test, "--near-duplicate", "0"]);
    assert_eq!(code, 2, "{out}{err}");
    let rules: Vec<(String, String)> = rlhf_data::source::rows(&findings)
        .unwrap()
        .map(|r| {
            let c = r.unwrap().columns;
            let of = |name: &str| c[name].as_str().unwrap().to_owned();
            (of("rule"), of("place"))
        })
        .collect();
    assert!(
        rules.contains(&("leak".into(), "row 7".into())),
        "{rules:?}"
    );
    assert!(out.contains("leak") && out.contains(", line 1"), "{out}");
    assert_eq!(with(&["--near-duplicate", "2"]).0, 2);
    assert_eq!(with(&["--against", "missing.jsonl"]).0, 2);

    let (code, out, err) = run(&[
        "data",
        "stats",
        file,
        "--purpose",
        "preference",
        "--html",
        page.to_str().unwrap(),
    ]);
    assert_eq!(code, 0, "{err}");
    assert!(
        out.contains("chosen is longer") && out.contains("length alone"),
        "{out}"
    );
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.contains("<rect"));
}

#[test]
fn render_marks_the_trained_tokens() {
    let file = root().join("datasets/help/sft/train.parquet");
    let (code, out, err) = run(&[
        "data",
        "render",
        file.to_str().unwrap(),
        "--purpose",
        "sft",
        "--tokenizer",
        "datasets/help/tokenizer",
        "--row",
        "3",
    ]);
    assert_eq!(code, 0, "{err}");
    assert!(
        out.contains("<|user|>") && out.contains("«<|end|>»"),
        "{out}"
    );
    let (code, _, err) = run(&[
        "data",
        "render",
        file.to_str().unwrap(),
        "--purpose",
        "sft",
        "--tokenizer",
        "datasets/help/tokenizer",
        "--row",
        "99999",
    ]);
    assert_eq!(code, 2);
    assert!(err.contains("5000 rows"), "{err}");
}

#[test]
fn foreign_formats_are_recognised_and_rankings_become_pairs() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let import = |input: &str, purpose: &str, more: &[&str]| {
        let out = dir.path().join("out.jsonl");
        let out = out.to_str().unwrap();
        let mut args = vec!["data", "import", input, "--out", out, "--purpose", purpose];
        args.extend(more);
        let (code, _, err) = run(&args);
        (code, std::fs::read_to_string(out).unwrap_or_default(), err)
    };
    let ranked = r#"{"prompt": "\n\nHuman: hi\n\nAssistant: ", "answers": [{"answer": "b", "model": "m", "rank": 2}, {"answer": "a", "model": "m", "rank": 1}, {"answer": "c", "model": "m", "rank": 3}]}"#;
    let nectar = file("nectar.jsonl", ranked);
    let (code, rows, err) = import(&nectar, "preference", &[]);
    assert_eq!((code, rows.lines().count()), (0, 3), "{err}");
    assert!(err.contains("3 rows of the format nectar"), "{err}");
    let first: serde_json::Value = serde_json::from_str(rows.lines().next().unwrap()).unwrap();
    assert_eq!(first["chosen"][0]["content"], "a");
    assert_eq!(
        (import(&nectar, "preference", &["--pairs", "adjacent"]).1)
            .lines()
            .count(),
        2
    );
    assert_eq!(
        (import(&nectar, "preference", &["--pairs", "best-vs-random"]).1)
            .lines()
            .count(),
        1
    );
    // Another purpose than the format serves.
    assert_eq!(import(&nectar, "sft", &[]).0, 2);

    let alpaca = file(
        "a.json",
        r#"[{"instruction": "add", "input": "1 and 2", "output": "3"}, {"instruction": "x", "input": "", "output": 7}]"#,
    );
    let (code, _, err) = import(&alpaca, "sft", &[]);
    assert!(code == 2 && err.contains("output"), "{err}");
    let (code, rows, err) = import(&alpaca, "sft", &["--skip-bad"]);
    assert_eq!((code, rows.lines().count()), (0, 1), "{err}");
    assert!(err.contains("1 bad rows left out"), "{err}");
    let (code, _, err) = import(&alpaca, "sft", &["--from", "alpacca"]);
    assert!(code == 2 && err.contains("sharegpt"), "{err}");
}
