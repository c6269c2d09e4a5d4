use super::run;

#[test]
fn wrong_usage_exits_with_2_and_three_lines() {
    for args in [
        &["run", "nope"][..],
        &["run", "quickstart", "--set", "stages.dpo.betta=1"],
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
