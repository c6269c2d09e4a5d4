//! Importers on files: every kind, damaged ones, folders, the shared ones.

use std::path::{Path, PathBuf};

use rlhf_data::import::{Format, Manifest, OnBad, preferences, read, records, shipped};
use rlhf_data::record::SftRecord;
use rlhf_data::source;
use serde_json::{Map, Value, json};

fn rows(path: &Path) -> Result<Vec<Value>, String> {
    source::rows(path)
        .and_then(|rows| rows.map(|r| r.map(|r| Value::Object(r.columns))).collect())
        .map_err(|e| e.to_string())
}

fn places(path: &Path) -> Vec<String> {
    let rows = source::rows(path).unwrap();
    rows.map(|r| r.unwrap().place).collect()
}

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

fn zst(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

const LINES: &str = "{\"instruction\":\"Say \\\"hi\\\", twice\",\"input\":\"\",\"output\":\"hi\\nhi\"}\n\
                     {\"instruction\":\"é [a] {b\",\"input\":\"x\\\\\",\"output\":\"ß\"}\n";
const CSV: &str =
    "instruction,input,output\r\n\"Say \"\"hi\"\", twice\",,\"hi\nhi\"\r\né [a] {b,x\\,ß\r\n";

#[test]
fn every_kind_of_file_gives_the_same_rows() {
    let dir = Dir::new();
    let want = rows(&dir.write("a.jsonl", LINES.as_bytes())).unwrap();
    assert_eq!(want.len(), 2);
    let array = format!(
        "\u{feff} [\n {} ,\n{}]\n",
        LINES.lines().next().unwrap(),
        LINES.lines().nth(1).unwrap()
    );
    let tsv =
        "instruction\tinput\toutput\n\"Say \"\"hi\"\", twice\"\t\t\"hi\nhi\"\né [a] {b\tx\\\tß";
    let files = [
        ("a.json", LINES.as_bytes().to_vec(), ["line 1", "line 2"]),
        ("a.jsonl.zst", zst(LINES.as_bytes()), ["line 1", "line 2"]),
        (
            "b.json",
            array.clone().into_bytes(),
            ["element 0", "element 1"],
        ),
        (
            "b.json.zst",
            zst(array.as_bytes()),
            ["element 0", "element 1"],
        ),
        ("c.csv", CSV.as_bytes().to_vec(), ["row 0", "row 1"]),
        ("c.csv.zst", zst(CSV.as_bytes()), ["row 0", "row 1"]),
        (
            "d.csv",
            format!("\u{feff}{CSV}\n\n").into_bytes(),
            ["row 0", "row 1"],
        ),
        ("e.tsv", tsv.as_bytes().to_vec(), ["row 0", "row 1"]),
        ("f.arrow", arrow(true), ["row 0", "row 1"]),
        ("g.arrow", arrow(false), ["row 0", "row 1"]),
    ];
    for (name, bytes, at) in files {
        let path = dir.write(name, &bytes);
        assert_eq!(rows(&path).as_ref(), Ok(&want), "{name}");
        assert_eq!(places(&path), at, "{name}");
        // Through the importer too, recognised by its columns.
        let imported: Vec<_> = read(&path, None, OnBad::Refuse)
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert!(
            imported
                .iter()
                .all(|(f, r)| *f == Format::Alpaca && r.columns.contains_key("messages"))
        );
    }
}

/// The two rows as an Arrow file, or as a stream.
fn arrow(footer: bool) -> Vec<u8> {
    use arrow_array::{ArrayRef, RecordBatch, StringArray};
    use std::sync::Arc;
    let column = |v: [&str; 2]| Arc::new(StringArray::from(v.to_vec())) as ArrayRef;
    let batch = RecordBatch::try_from_iter([
        ("instruction", column(["Say \"hi\", twice", "é [a] {b"])),
        ("input", column(["", "x\\"])),
        ("output", column(["hi\nhi", "ß"])),
    ])
    .unwrap();
    let mut bytes = Vec::new();
    if footer {
        let mut w = arrow_ipc::writer::FileWriter::try_new(&mut bytes, &batch.schema()).unwrap();
        w.write(&batch).unwrap();
        w.finish().unwrap();
    } else {
        let mut w = arrow_ipc::writer::StreamWriter::try_new(&mut bytes, &batch.schema()).unwrap();
        w.write(&batch).unwrap();
        w.finish().unwrap();
    }
    bytes
}

#[test]
fn a_footer_that_speaks_of_more_than_the_file_is_refused() {
    let good = arrow(true);
    let length = u32::from_le_bytes(good[good.len() - 10..][..4].try_into().unwrap());
    let start = good.len() - 10 - length as usize;
    let footer = arrow_ipc::root_as_footer(&good[start..good.len() - 10]).unwrap();
    let block = footer.recordBatches().unwrap().get(0);
    // 2 GiB would be allocated before anything is read.
    let [from, to] = [block.bodyLength(), 1 << 31].map(i64::to_le_bytes);
    let at = good[start..].windows(8).rposition(|w| w == from).unwrap();
    let mut bad = good.clone();
    bad[start + at..start + at + 8].copy_from_slice(&to);
    let dir = Dir::new();
    assert!(rows(&dir.write("good.arrow", &good)).is_ok());
    let e = rows(&dir.write("bad.arrow", &bad)).unwrap_err();
    assert!(
        e.contains("bad.arrow") && e.contains("outside the file"),
        "{e}"
    );
    let mut bad = good;
    let end = bad.len() - 10;
    bad[end..end + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    let e = rows(&dir.write("long.arrow", &bad)).unwrap_err();
    assert!(e.contains("longer than the file"), "{e}");
}

#[test]
fn folders_and_patterns_are_read_in_order() {
    let dir = Dir::new();
    dir.write("d/2.jsonl", b"{\"text\":\"c\"}\n");
    dir.write("d/1.csv", b"text\na\nb\n");
    dir.write("d/README.md", b"no data");
    dir.write("d/.hidden.jsonl", b"no data");
    dir.write("d/sub/3.jsonl", b"no data");
    let all = [
        json!({"text": "a"}),
        json!({"text": "b"}),
        json!({"text": "c"}),
    ];
    let folder = dir.0.path().join("d");
    assert_eq!(rows(&folder).unwrap(), all);
    assert_eq!(
        places(&folder),
        ["1.csv, row 0", "1.csv, row 1", "2.jsonl, line 1"]
    );
    assert_eq!(rows(&folder.join("[12].*")).unwrap(), all);
    assert_eq!(rows(&folder.join("*.jsonl")).unwrap(), all[2..]);
    let across = places(&dir.0.path().join("*/1.csv"));
    assert_eq!(
        across[0],
        format!("{}, row 0", folder.join("1.csv").display())
    );
    let e = rows(&folder.join("*.parquet")).unwrap_err();
    assert!(e.contains("no file of a known kind"), "{e}");
    assert!(
        rows(&folder.join("README.*"))
            .unwrap_err()
            .contains("unknown kind")
    );
    std::fs::create_dir(dir.0.path().join("empty")).unwrap();
    assert!(rows(&dir.0.path().join("empty")).is_err());
    // A bad row of the second file is an error that names that file, and ends the reading.
    dir.write("d/2.jsonl", b"{\"text\":\n");
    let got: Vec<_> = source::rows(&folder).unwrap().collect();
    assert_eq!(got.len(), 3);
    assert!(
        got[2]
            .as_ref()
            .unwrap_err()
            .to_string()
            .contains("2.jsonl, line 1")
    );
}

#[test]
fn damaged_files_are_errors() {
    let dir = Dir::new();
    let packed = zst(LINES.repeat(50).as_bytes());
    let stream = arrow(false);
    let file = arrow(true);
    let mut flipped = packed.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0xff;
    let huge = [b"[{\"a\":\"".to_vec(), vec![b'x'; 65 << 20]].concat();
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        (
            "cut.jsonl.zst",
            packed[..packed.len() - 9].to_vec(),
            "cannot read on",
        ),
        ("flip.jsonl.zst", flipped, "line"),
        ("not.jsonl.zst", LINES.as_bytes().to_vec(), "not zstd"),
        (
            "cut.csv.zst",
            zst(CSV.as_bytes())[..40].to_vec(),
            "cut.csv.zst",
        ),
        (
            "quote.csv",
            b"a,b\n1,\"2\n3,4\n".to_vec(),
            "within a quoted cell",
        ),
        ("few.csv", b"a,b\n1,2\n3".to_vec(), "1 cells"),
        ("many.csv", b"a,b\n1,2,3\n".to_vec(), "3 cells"),
        ("utf8.csv", b"a,b\n1,\xff\n".to_vec(), "UTF-8"),
        ("twice.csv", b"a,a\n1,2\n".to_vec(), "twice"),
        ("cut.json", b"[{\"a\":1},{\"a\":".to_vec(), "element 1"),
        ("open.json", b"[{\"a\":1}".to_vec(), "the file ends"),
        ("after.json", b"[{\"a\":1}] x".to_vec(), "more follows"),
        ("comma.json", b"[{\"a\":1} {\"a\":1}]".to_vec(), "no `,`"),
        ("trailing.json", b"[{\"a\":1},]".to_vec(), "no object"),
        ("scalar.json", b"[1]".to_vec(), "no object"),
        ("keys.json", b"[{\"a\":1,\"a\":2}]".to_vec(), "twice"),
        ("mixed.json", b"[{\"a\":[}]}]".to_vec(), "element 0"),
        ("huge.json", huge.clone(), "64 MiB"),
        ("huge.json.zst", zst(&huge), "64 MiB"),
        ("huge.jsonl.zst", zst(&huge[1..]), "64 MiB"),
        (
            "huge.csv.zst",
            zst(&[b"a\n\"".as_slice(), &huge].concat()),
            "64 MiB",
        ),
        ("array.jsonl", b"[{\"a\":1}]".to_vec(), "a JSON array"),
        ("empty.arrow", Vec::new(), "0 bytes"),
        ("cut.arrow", stream[..stream.len() - 8].to_vec(), "end mark"),
        (
            "cutfile.arrow",
            file[..file.len() - 8].to_vec(),
            "no readable Arrow",
        ),
        ("text.arrow", LINES.as_bytes().to_vec(), "no readable Arrow"),
    ];
    for (name, bytes, words) in cases {
        let e = rows(&dir.write(name, &bytes)).expect_err(name);
        assert!(e.contains(words) && e.contains(name), "{name}: {e}");
    }
    assert_eq!(rows(&dir.write("none.json", b" [ ] ")), Ok(vec![]));
    assert_eq!(rows(&dir.write("none.csv", b"")), Ok(vec![]));
    assert_eq!(rows(&dir.write("header.csv", b"a,b\n")), Ok(vec![]));
}

#[test]
fn no_byte_of_an_arrow_file_makes_the_reader_panic() {
    let dir = Dir::new();
    for whole in [arrow(true), arrow(false)] {
        for i in (0..whole.len()).step_by(3) {
            let mut bytes = whole.clone();
            bytes[i] ^= 0xff;
            let _ = rows(&dir.write("x.arrow", &bytes));
            let _ = rows(&dir.write("x.arrow", &whole[..i]));
        }
    }
}

#[test]
fn bad_rows_are_refused_or_skipped_with_a_count() {
    let dir = Dir::new();
    let good = r#"{"question":"q","answer":"a #### 1"}"#;
    let bad = r#"{"question":"q","answer":"a"}"#;
    let path = dir.write(
        "a.jsonl",
        [good, bad, good, bad, good].join("\n").as_bytes(),
    );
    let mut import = read(&path, None, OnBad::Refuse).unwrap();
    assert_eq!(
        (import.format(), import.next().unwrap().is_ok()),
        (None, true)
    );
    assert_eq!(import.format(), Some(Format::Gsm8k));
    let e = import.next().unwrap().unwrap_err().to_string();
    for words in ["a.jsonl, line 2", "column `answer`", "####", "do: "] {
        assert!(e.contains(words), "{e}");
    }
    assert!(import.next().is_none());

    let mut import = read(&path, None, OnBad::Skip).unwrap();
    let kept: Vec<String> = import.by_ref().map(|r| r.unwrap().1.place).collect();
    assert_eq!(kept, ["line 1", "line 3", "line 5"]);
    assert_eq!(
        (import.skipped().count, import.skipped().first.len()),
        (2, 2)
    );
    assert!(import.skipped().first[1].to_string().contains("line 4"));

    // What cannot be read is an error even so, and so is what nothing recognises.
    let path = dir.write("b.jsonl", format!("{good}\n{{").as_bytes());
    assert!(
        read(&path, None, OnBad::Skip)
            .unwrap()
            .nth(1)
            .unwrap()
            .is_err()
    );
    let path = dir.write("c.jsonl", b"{\"foo\":1,\"bar\":2}");
    let e = read(&path, None, OnBad::Skip)
        .unwrap()
        .next()
        .unwrap()
        .unwrap_err()
        .to_string();
    assert!(e.contains("foo, bar") && e.contains("ultrafeedback"), "{e}");
    let named = read(&path, Some(Format::Canonical), OnBad::Refuse).unwrap();
    assert_eq!(named.count(), 1);

    // Ties are counted apart.
    let tie =
        r#"{"question":{"full_text":"q"},"answer_0":"a","answer_1":"b","score_0":0,"score_1":0}"#;
    let mut import = read(&dir.write("d.jsonl", tie.as_bytes()), None, OnBad::Refuse).unwrap();
    assert!(import.next().is_none());
    assert_eq!((import.skipped().count, import.skipped().nothing), (0, 1));
}

#[test]
fn manifests_parse_and_name_an_importer() {
    for (name, text) in shipped() {
        let manifest = Manifest::parse(text).unwrap();
        assert_eq!(manifest.name, *name);
        assert!(
            !manifest.columns.is_empty() && !manifest.splits.is_empty(),
            "{name}"
        );
        assert_ne!(manifest.format().unwrap(), Format::Canonical, "{name}");
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/manifests");
    let files = std::fs::read_dir(folder).unwrap().count();
    assert_eq!(
        files,
        shipped().len(),
        "every file of the folder is shipped"
    );
    assert!(Manifest::parse("name = 3").is_err());
}

#[test]
fn malformed_hh_rows_of_the_shared_folder() {
    let path = crate::shared().join("bad/jsonl/hh_malformed.jsonl");
    if !path.is_file() {
        println!("skipped: no shared folder");
        return;
    }
    let mut import = read(&path, None, OnBad::Skip).unwrap();
    let kept: Vec<_> = import.by_ref().map(|r| r.unwrap()).collect();
    assert!(kept.iter().all(|(f, _)| *f == Format::HhRlhf));
    let places: Vec<&str> = kept.iter().map(|(_, r)| r.place.as_str()).collect();
    assert_eq!(places, ["line 1", "line 2", "line 6"]);
    assert_eq!(import.skipped().count, 3);
    let first = read(&path, None, OnBad::Refuse).unwrap().nth(2).unwrap();
    assert!(
        first
            .unwrap_err()
            .to_string()
            .contains("line 3, column `rejected`")
    );
}

#[test]
fn raw_files_of_the_shared_folder() {
    let dir = crate::shared().join("datasets/raw");
    if !dir.is_dir() {
        println!("skipped: no shared folder");
        return;
    }
    // The format, the rows kept, the rows skipped. Rows are never shown: some are offensive.
    let expected = [
        ("hh_harmless_base.jsonl.gz", Format::HhRlhf, 1864),
        ("gsm8k_train.jsonl", Format::Gsm8k, 6743),
        ("gsm8k_test.jsonl", Format::Gsm8k, 737),
        ("ifeval_input_data.jsonl", Format::IfEval, 395),
        (
            "alpaca_format_gpteacher_roleplay.json",
            Format::Alpaca,
            2683,
        ),
    ];
    for (name, format, total) in expected {
        let mut import = read(&dir.join(name), None, OnBad::Skip).unwrap();
        let kept = import.by_ref().map(Result::unwrap).count() as u64;
        assert_eq!(import.format(), Some(format), "{name}");
        println!("{name}: {kept} rows, {} skipped", import.skipped().count);
        assert_eq!(kept + import.skipped().count, total, "{name}");
        assert!(import.skipped().count * 50 < total, "{name}");
    }
    for name in [
        "mt_bench_question.jsonl",
        "persona_agreeableness.jsonl",
        "selfinstruct_seed_tasks.jsonl",
    ] {
        let first = read(&dir.join(name), None, OnBad::Skip)
            .unwrap()
            .next()
            .unwrap();
        assert!(first.is_err(), "{name} has no importer");
    }
}

#[test]
fn raw_files_become_what_others_made_of_them() {
    let dir = crate::shared().join("datasets");
    if !dir.is_dir() {
        println!("skipped: no shared folder");
        return;
    }
    let cases: [(&str, &str, &[&str]); 5] = [
        (
            "raw/hh_harmless_base.jsonl.gz",
            "preference/hh_harmless",
            &["prompt", "chosen", "rejected"],
        ),
        (
            "raw/alpaca_format_gpteacher_roleplay.json",
            "sft/gpteacher_roleplay",
            &["messages"],
        ),
        (
            "raw/gsm8k_test.jsonl",
            "prompt_only/gsm8k/test.parquet",
            &["prompt", "answer"],
        ),
        (
            "raw/gsm8k_train.jsonl",
            "prompt_only/gsm8k/train.parquet",
            &["prompt", "answer"],
        ),
        (
            "raw/ifeval_input_data.jsonl",
            "prompt_only/ifeval",
            &["prompt"],
        ),
    ];
    for (raw, made, columns) in cases {
        let chosen = |row: &Map<String, Value>| -> String {
            columns.iter().map(|c| row[*c].to_string() + "\n").collect()
        };
        let sorted = |mut rows: Vec<String>| {
            rows.sort();
            rows
        };
        let ours = read(&dir.join(raw), None, OnBad::Skip).unwrap();
        let ours = sorted(ours.map(|r| chosen(&r.unwrap().1.columns)).collect());
        let theirs = source::rows(&dir.join(made)).unwrap();
        let theirs = sorted(theirs.map(|r| chosen(&r.unwrap().columns)).collect());
        let differ = ours.iter().zip(&theirs).filter(|(a, b)| a != b).count();
        println!(
            "{raw}: {} and {} rows, {differ} differ",
            ours.len(),
            theirs.len()
        );
        // The rows are not shown: some are offensive.
        assert!(ours == theirs, "{raw}: {differ} differ");
    }
}

#[test]
fn manifests_are_found_and_their_rows_are_records() {
    for (name, _) in shipped() {
        assert_eq!(Manifest::named(name).unwrap().name, *name);
    }
    let e = Manifest::named("gms8k").unwrap_err().to_string();
    assert!(
        e.contains("no dataset `gms8k`") && e.contains("gsm8k"),
        "{e}"
    );
    let dir = Dir::new();
    let own = dir.write("mine.toml", b"name = \"mine\"\nsource = \"me/mine\"\nlicence = \"MIT\"\nimporter = \"nectar\"\ncolumns = []\n");
    let own = own.to_str().unwrap();
    let format = Manifest::named(own).unwrap().format().unwrap();
    assert_eq!(format, Format::Nectar);
    let e = Manifest::named("nowhere.toml").unwrap_err().to_string();
    assert!(e.contains("nowhere.toml"), "{e}");
    // Three ranked answers are three pairs; a bad row is named and ends it.
    let answers = |ranks: &[u32]| -> Vec<Value> {
        let answer = |r: &u32| json!({"answer": format!("a{r}"), "model": "m", "rank": r});
        ranks.iter().map(answer).collect()
    };
    let row = |ranks: &[u32]| json!({"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": answers(ranks), "turns": 1, "num_responses": 3});
    let lines = format!("{}\n{}\n{{\"prompt\":3}}\n", row(&[2, 1, 3]), row(&[1, 1]));
    let path = dir.write("nectar.jsonl", lines.as_bytes());
    let pairs: Vec<_> = preferences(&path, format).unwrap().collect();
    assert_eq!(pairs.len(), 4);
    let chosen = |i: usize| pairs[i].as_ref().unwrap().chosen.joined();
    assert_eq!([chosen(0), chosen(1), chosen(2)], ["a1", "a1", "a2"]);
    let e = pairs[3].as_ref().unwrap_err().to_string();
    assert!(e.contains("nectar.jsonl, line 3"), "{e}");
    // A kind that the format does not give.
    let none: Vec<_> = records::<SftRecord>(&path, format).unwrap().collect();
    assert!(none[0].is_err());
}
