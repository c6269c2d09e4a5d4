//! Hostile files through the commands: each is refused with its place and leaves nothing behind, or is
//! read as its README says.

use std::path::{Path, PathBuf};

use super::run;

/// The folder of hostile files, which may be absent.
fn folder() -> Option<PathBuf> {
    let shared = std::env::var_os("RLHF_SHARED").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        PathBuf::from,
    );
    let bad = shared.join("bad");
    bad.is_dir().then_some(bad)
}

/// What a file must give.
enum Want {
    /// Fit, with so many rows.
    Rows(usize),
    /// Read, and not fit: words that `check` says. `stats` describes it.
    Unfit(&'static str),
    /// Refused by every command: words of the refusal.
    Refused(&'static str),
}

use Want::{Refused, Rows, Unfit};

/// Purpose, file and what it must give.
const FILES: &[(&str, &str, Want)] = &[
    ("preference", "parquet/ok_control.parquet", Rows(6)),
    ("preference", "jsonl/ok_control.jsonl", Rows(6)),
    (
        "preference",
        "parquet/truncated.parquet",
        Refused("no readable Parquet"),
    ),
    (
        "preference",
        "parquet/truncated_8_bytes.parquet",
        Refused("no readable Parquet"),
    ),
    (
        "preference",
        "parquet/flipped_pages.parquet",
        Refused("Parquet"),
    ),
    (
        "preference",
        "parquet/absurd_footer.parquet",
        Refused("no readable Parquet"),
    ),
    (
        "preference",
        "parquet/empty_file.parquet",
        Refused("0 bytes"),
    ),
    (
        "preference",
        "parquet/is_really_json.parquet",
        Refused("PAR1"),
    ),
    ("preference", "parquet/zero_rows.parquet", Unfit("no rows")),
    (
        "preference",
        "parquet/wrong_types.parquet",
        Refused("row 0"),
    ),
    (
        "preference",
        "parquet/mixed_prompt_text_chosen_messages.parquet",
        Refused("row 0"),
    ),
    ("preference", "parquet/large_string_dict.parquet", Rows(6)),
    (
        "preference",
        "parquet/missing_rejected.parquet",
        Refused("`rejected`"),
    ),
    ("preference", "parquet/extra_columns.parquet", Rows(6)),
    (
        "preference",
        "parquet/null_completions.parquet",
        Refused("row 1"),
    ),
    (
        "preference",
        "parquet/empty_message_lists.parquet",
        Refused("row 0"),
    ),
    (
        "preference",
        "parquet/empty_strings.parquet",
        Refused("row 0"),
    ),
    (
        "preference",
        "parquet/nan_inf_margin.parquet",
        Refused("row 0"),
    ),
    ("unpaired", "parquet/kto_one_class.parquet", Rows(0)),
    (
        "unpaired",
        "parquet/kto_label_text.parquet",
        Refused("`label`"),
    ),
    (
        "preference",
        "jsonl/broken_line_middle.jsonl",
        Refused("line 4"),
    ),
    ("preference", "jsonl/invalid_utf8.jsonl", Refused("line 2")),
    ("preference", "jsonl/bom_crlf_blank.jsonl", Rows(6)),
    ("preference", "jsonl/no_final_newline.jsonl", Rows(6)),
    (
        "preference",
        "jsonl/top_level_array.jsonl",
        Refused("line 1"),
    ),
    ("preference", "jsonl/scalar_lines.jsonl", Refused("line 1")),
    ("preference", "jsonl/deep_nesting.jsonl", Refused("line 1")),
    ("preference", "jsonl/empty.jsonl", Unfit("no rows")),
    (
        "preference",
        "jsonl/lone_surrogate.jsonl",
        Refused("line 1"),
    ),
    ("preference", "jsonl/duplicate_keys.jsonl", Refused("twice")),
    ("preference", "jsonl/nan_literal.jsonl", Refused("line 1")),
    ("preference", "jsonl/chosen_equals_rejected.jsonl", Rows(6)),
    (
        "preference",
        "jsonl/prompt_not_shared.jsonl",
        Refused("line 1"),
    ),
    ("preference", "jsonl/hh_malformed.jsonl", Refused("line")),
    ("sft", "jsonl/roles_out_of_order.jsonl", Refused("line 4")),
    ("sft", "jsonl/unknown_role.jsonl", Refused("`robot`")),
    ("sft", "jsonl/special_tokens_in_text.jsonl", Rows(1)),
    ("preference", "jsonl/duplicate_rows.jsonl", Rows(14)),
    ("preference", "jsonl/one_megabyte_row.jsonl", Rows(1)),
    ("preference", "jsonl/one_megabyte_no_space.jsonl", Rows(1)),
    (
        "preference",
        "jsonl/prompt_longer_than_context.jsonl",
        Rows(2),
    ),
    ("preference", "jsonl/control_chars.jsonl", Rows(1)),
    (
        "preference",
        "gzip/truncated.jsonl.gz",
        Refused("cannot read on"),
    ),
    (
        "preference",
        "gzip/bad_crc.jsonl.gz",
        Refused("cannot read on"),
    ),
    ("preference", "gzip/two_members.jsonl.gz", Rows(6)),
    (
        "preference",
        "gzip/trailing_garbage.jsonl.gz",
        Refused("cannot read on"),
    ),
    ("preference", "gzip/not_gzip.jsonl.gz", Refused("not gzip")),
    (
        "preference",
        "gzip/bomb_200MB_one_line.jsonl.gz",
        Refused("64 MiB"),
    ),
];

/// What is wrong with one file's treatment.
fn wrongs(dir: &Path, purpose: &str, name: &str, want: &Want) -> Vec<String> {
    let path = dir.join(name);
    let path = path.to_str().unwrap();
    let file = name.rsplit('/').next().unwrap();
    let mut wrong = Vec::new();
    let mut expect = |fine: bool, what: String| {
        if !fine {
            wrong.push(format!("{name}: {what}"));
        }
    };
    // Thumbs are for `import` alone.
    if purpose != "unpaired" {
        let (code, out, err) = run(&["data", "check", path, "--purpose", purpose]);
        expect(!err.contains("panicked"), err);
        match want {
            Rows(n) => expect(
                code == 0 && out.contains(&format!("{n} rows, fit for training")),
                format!("check {code}: {out}"),
            ),
            Unfit(words) | Refused(words) => expect(
                code == 2 && out.contains(words) && out.contains("not fit for training"),
                format!("check {code}: {out}"),
            ),
        }
        expect(
            !out.chars().any(|c| c.is_control() && c != '\n'),
            "raw control characters".into(),
        );
        let (code, out, err) = run(&["data", "stats", path, "--purpose", purpose]);
        match want {
            Rows(n) => expect(
                code == 0 && out.starts_with(&format!("{n} rows")),
                format!("stats {code}: {out}{err}"),
            ),
            Unfit(_) => expect(code == 0, format!("stats {code}: {err}")),
            Refused(words) => expect(
                code == 2 && refusal(&err, file, words),
                format!("stats {code}: {err}"),
            ),
        }
    }
    for ending in ["parquet", "jsonl"] {
        let to = tempfile::tempdir().unwrap();
        let out = to.path().join(format!("out.{ending}"));
        let args = ["data", "import", path, "--purpose", purpose, "--out"];
        let (code, _, err) = run(&[&args[..], &[out.to_str().unwrap()]].concat());
        let left = std::fs::read_dir(to.path()).unwrap().count();
        match want {
            Rows(_) => expect(
                code == 0 && left == 1,
                format!("import {code}, {left}: {err}"),
            ),
            Unfit(words) => expect(
                code == 2 && left == 0 && refusal(&err, file, words),
                format!("import {code}, {left} files left: {err}"),
            ),
            // Foreign formats have importers, which may speak of other columns.
            Refused(_) => expect(
                code == 2 && left == 0 && refusal(&err, file, ""),
                format!("import {code}, {left} files left: {err}"),
            ),
        }
    }
    wrong
}

/// A cause, a place with the file, a mend; and nothing else.
fn refusal(err: &str, file: &str, words: &str) -> bool {
    let lines: Vec<&str> = err.lines().collect();
    err.contains(words)
        && matches!(lines[..], [cause, place, mend]
            if cause.starts_with("error: ")
                && place.starts_with("  in: ")
                && place.contains(file)
                && mend.starts_with("  do: "))
}

#[test]
fn every_hostile_file_is_refused_or_read_by_every_command() {
    let Some(dir) = folder() else {
        println!("skipped: no shared folder");
        return;
    };
    let wrong: Vec<String> = FILES
        .iter()
        .flat_map(|(purpose, name, want)| wrongs(&dir, purpose, name, want))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let listed = |kind: &str| {
        std::fs::read_dir(dir.join(kind))
            .unwrap()
            .map(|e| format!("{kind}/{}", e.unwrap().file_name().display()))
            .collect::<Vec<_>>()
    };
    for file in ["jsonl", "gzip", "parquet"].into_iter().flat_map(listed) {
        assert!(
            FILES.iter().any(|(_, name, _)| *name == file),
            "{file} is not tried"
        );
    }
}
