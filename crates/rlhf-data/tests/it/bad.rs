//! Hostile files: each is refused with its place, or read as its README says.

use std::path::{Path, PathBuf};

use rlhf_data::check::{Purpose, check};
use rlhf_data::record::UnpairedRecord;
use rlhf_data::source;

fn shared() -> Option<PathBuf> {
    let dir = std::env::var_os("RLHF_SHARED").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        PathBuf::from,
    );
    dir.join("bad").is_dir().then_some(dir)
}

/// Reads a preference file to its end: rows, or the first error.
fn read(path: &Path) -> Result<usize, String> {
    let rows = source::read_preference(path).map_err(|e| e.to_string())?;
    rows.collect::<Result<Vec<_>, _>>()
        .map(|r| r.len())
        .map_err(|e| e.to_string())
}

#[test]
fn shared_files_are_refused_or_read_as_told() {
    let Some(dir) = shared() else {
        println!("skipped: no shared folder");
        return;
    };
    // What a preference reader must say: the rows, or words of the refusal.
    let expected: &[(&str, Result<usize, &[&str]>)] = &[
        ("parquet/ok_control.parquet", Ok(6)),
        ("jsonl/ok_control.jsonl", Ok(6)),
        ("parquet/truncated.parquet", Err(&["truncated.parquet"])),
        (
            "parquet/truncated_8_bytes.parquet",
            Err(&["no readable Parquet"]),
        ),
        (
            "parquet/absurd_footer.parquet",
            Err(&["no readable Parquet"]),
        ),
        ("parquet/empty_file.parquet", Err(&["0 bytes"])),
        ("parquet/is_really_json.parquet", Err(&["PAR1"])),
        (
            "parquet/flipped_pages.parquet",
            Err(&["flipped_pages.parquet"]),
        ),
        ("parquet/zero_rows.parquet", Ok(0)),
        ("parquet/wrong_types.parquet", Err(&["row 0", "column"])),
        (
            "parquet/mixed_prompt_text_chosen_messages.parquet",
            Err(&["row 0", "form"]),
        ),
        ("parquet/large_string_dict.parquet", Ok(6)),
        (
            "parquet/missing_rejected.parquet",
            Err(&["`rejected`", "chosen"]),
        ),
        ("parquet/extra_columns.parquet", Ok(6)),
        (
            "parquet/null_completions.parquet",
            Err(&["row 1", "`chosen`"]),
        ),
        (
            "parquet/empty_message_lists.parquet",
            Err(&["row", "column"]),
        ),
        ("parquet/empty_strings.parquet", Err(&["row 0", "empty"])),
        ("parquet/nan_inf_margin.parquet", Err(&["row", "margin"])),
        ("jsonl/broken_line_middle.jsonl", Err(&["line 4"])),
        ("jsonl/invalid_utf8.jsonl", Err(&["line 2", "UTF-8"])),
        ("jsonl/bom_crlf_blank.jsonl", Ok(6)),
        ("jsonl/no_final_newline.jsonl", Ok(6)),
        ("jsonl/top_level_array.jsonl", Err(&["line 1", "array"])),
        ("jsonl/scalar_lines.jsonl", Err(&["line 1"])),
        ("jsonl/deep_nesting.jsonl", Err(&["line"])),
        ("jsonl/empty.jsonl", Ok(0)),
        ("jsonl/lone_surrogate.jsonl", Err(&["line 1"])),
        ("jsonl/duplicate_keys.jsonl", Err(&["twice"])),
        ("jsonl/nan_literal.jsonl", Err(&["line"])),
        ("jsonl/chosen_equals_rejected.jsonl", Ok(6)),
        (
            "jsonl/prompt_not_shared.jsonl",
            Err(&["line 1", "not the prompt"]),
        ),
        ("jsonl/unknown_role.jsonl", Err(&["line 1"])),
        ("jsonl/duplicate_rows.jsonl", Ok(14)),
        ("gzip/truncated.jsonl.gz", Err(&["cannot read on"])),
        ("gzip/bad_crc.jsonl.gz", Err(&["cannot read on"])),
        ("gzip/two_members.jsonl.gz", Ok(6)),
        ("gzip/trailing_garbage.jsonl.gz", Err(&["cannot read on"])),
        ("gzip/not_gzip.jsonl.gz", Err(&["not gzip"])),
        ("gzip/bomb_200MB_one_line.jsonl.gz", Err(&["64 MiB"])),
    ];
    let mut wrong = Vec::new();
    for (name, want) in expected {
        let path = dir.join("bad").join(name);
        let got = read(&path);
        let fine = match (&got, want) {
            (Ok(a), Ok(b)) => a == b,
            (Err(e), Err(words)) => {
                words.iter().all(|w| e.contains(w)) && e.contains(name.rsplit('/').next().unwrap())
            }
            _ => false,
        };
        if !fine {
            wrong.push(format!("{name}: {got:?}, expected {want:?}"));
        }
        // The lint reads the same files and never stops half-way without saying so.
        let report = check(&path, Purpose::Preference, None);
        if want.is_err() && !report.failed {
            wrong.push(format!("{name}: the lint finds nothing"));
        }
    }
    println!("{} files", expected.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn thumbs_of_the_shared_folder() {
    let Some(dir) = shared() else {
        println!("skipped: no shared folder");
        return;
    };
    let read = |name: &str| {
        let rows = source::read::<UnpairedRecord>(&dir.join("bad/parquet").join(name)).unwrap();
        rows.collect::<Result<Vec<_>, _>>()
            .map_err(|e| e.to_string())
    };
    // One class alone is read; who trains on it must have both.
    assert!(
        read("kto_one_class.parquet")
            .unwrap()
            .iter()
            .all(|r| r.label)
    );
    let e = read("kto_label_text.parquet").unwrap_err();
    let words = [
        "kto_label_text.parquet",
        "row 0",
        "`label`",
        "text, expected true or false",
    ];
    assert!(words.iter().all(|w| e.contains(w)), "{e}");
}

#[test]
fn damaged_files_made_here_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let row = br#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#;
    let twice = [&row[..], b"\n", row].concat();
    assert_eq!(read(&write("ok.jsonl", &twice)), Ok(2));
    let e = read(&write("cut.jsonl", &twice[..twice.len() - 4])).unwrap_err();
    assert!(e.contains("cut.jsonl, line 2"), "{e}");
    let e = read(&write("x.parquet", b"PAR1 and nothing more")).unwrap_err();
    assert!(e.contains("no readable Parquet"), "{e}");
    assert!(
        read(&write("x.gz", b""))
            .unwrap_err()
            .contains("unknown kind")
    );
    assert!(
        read(&dir.path().join("absent.jsonl"))
            .unwrap_err()
            .contains("absent.jsonl")
    );
    assert!(
        read(&write(
            "n.jsonl",
            br#"{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "NaN"}"#
        ))
        .is_err()
    );
}

#[test]
fn what_is_written_appears_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    let records: Vec<rlhf_data::record::PreferenceRecord> = (0..3000)
        .map(|i| rlhf_data::record::PreferenceRecord {
            prompt: rlhf_data::conversation::Text::Plain(format!("p{i}")),
            chosen: rlhf_data::conversation::Text::Plain("c".into()),
            rejected: rlhf_data::conversation::Text::Plain("r".into()),
            margin: (i % 2 == 0).then_some(0.5),
        })
        .collect();
    let batch = rlhf_data::record::preference_batch(&records).unwrap();
    let mut out = source::ParquetOut::create(&path, batch.schema()).unwrap();
    out.write(&batch).unwrap();
    drop(out);
    assert!(
        !path.exists() && std::fs::read_dir(dir.path()).unwrap().count() == 0,
        "dropped, it leaves nothing"
    );
    let mut out = source::ParquetOut::create(&path, batch.schema()).unwrap();
    out.write(&batch).unwrap();
    out.finish().unwrap();
    let back: Vec<_> = source::read_preference(&path)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(back.len(), 3000);
    assert_eq!(
        (
            back[7].prompt.joined().as_str(),
            back[7].margin,
            back[8].margin
        ),
        ("p7", None, Some(0.5))
    );
}
