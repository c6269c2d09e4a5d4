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
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(&out)
            .unwrap()
            .as_array()
            .unwrap()
            .len(),
        3
    );
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
