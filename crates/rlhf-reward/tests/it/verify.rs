//! Verifiers from outside: the pool's promises, commands under limits, IFEval's published verdicts, and that no
//! text makes any of them panic.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use rlhf_reward::Result;
use rlhf_reward::verify::code::{Code, Input, ScoreFrom};
use rlhf_reward::verify::constraint::{Constraint, IDS, Mode};
use rlhf_reward::verify::sandbox::{Limits, isolation};
use rlhf_reward::verify::{Check, FailureKind, Job, Pool, PoolConfig, Sample, Verdict, Verifier};
use serde_json::{Map, Value, json};

fn job(completion: &str) -> Job {
    Job {
        prompt: "".into(),
        completion: completion.into(),
        fields: Arc::new(Map::new()),
        tokens: None,
    }
}

/// Does what the completion says.
#[derive(Debug)]
struct Obeys;

impl Verifier for Obeys {
    fn name(&self) -> &str {
        "obeys"
    }

    fn verify(&self, sample: &Sample<'_>) -> Result<Verdict> {
        match sample.completion {
            "hang" => loop {
                std::thread::park();
            },
            "panic" => panic!("as told"),
            text => Ok(Verdict::scored(text.len() as f64, "its length")),
        }
    }
}

fn obeys(deadline_s: f64) -> Pool {
    let config = PoolConfig {
        workers: 3,
        deadline_s,
        failure_score: -1.0,
        max_bytes: 100,
    };
    Pool::new(Arc::new(Obeys), config).unwrap()
}

#[test]
fn a_verifier_that_hangs_or_panics_costs_its_row() {
    let pool = obeys(3.0);
    let long = "x".repeat(101);
    let texts = [
        "a", "hang", "bb", "panic", &long, "ccc", "hang", "dddd", "", "eeeee",
    ];
    let verdicts = pool.run(texts.iter().map(|t| job(t)).collect()).unwrap();
    let scores: Vec<f64> = verdicts.iter().map(|v| v.score).collect();
    assert_eq!(
        scores,
        [1.0, -1.0, 2.0, -1.0, -1.0, 3.0, -1.0, 4.0, 0.0, 5.0]
    );
    assert_eq!(verdicts[3].reason, "panicked: as told");
    let failures = BTreeMap::from([
        (FailureKind::Deadline, 2),
        (FailureKind::Panicked, 1),
        (FailureKind::TooLong, 1),
    ]);
    assert_eq!(pool.failures(), failures);
    assert_eq!(pool.left_behind(), 2);
    // The next run has all its threads.
    let again = pool.run(vec![job("abc"); 20]).unwrap();
    assert!(again.iter().all(|v| v.score == 3.0));
    assert!(pool.run(Vec::new()).unwrap().is_empty());
}

#[test]
fn too_many_that_hang_end_the_beginning_of_more() {
    let pool = obeys(0.05);
    let verdicts = pool.run(vec![job("hang"); 200]).unwrap();
    assert!(verdicts.iter().all(|v| v.score == -1.0));
    let failures = pool.failures();
    assert_eq!(failures.values().sum::<u64>(), 200);
    assert!(failures[&FailureKind::NotBegun] > 100, "{failures:?}");
    assert!(pool.left_behind() <= 70);
    let refused = pool.run(vec![job("a")]).unwrap();
    assert_eq!(refused[0].failure, Some(FailureKind::NotBegun));
}

#[test]
fn the_first_rows_error_is_the_runs() {
    let math = serde_json::from_value::<Check>(json!({"kind": "math"}))
        .unwrap()
        .build()
        .unwrap();
    let pool = Pool::new(math, PoolConfig::default()).unwrap();
    let e = pool.run(vec![job("1"); 5]).unwrap_err().to_string();
    assert!(e.contains("no field `answer`"), "{e}");
}

fn sh(script: &str) -> Code {
    Code {
        command: vec!["sh".into(), "-c".into(), script.into()],
        input: Input::default(),
        part: Default::default(),
        files: BTreeMap::new(),
        score: ScoreFrom::Exit,
        env: BTreeMap::new(),
        // Long enough for a machine that is busy.
        limits: Limits {
            wall_s: 120.0,
            cpu_s: 60,
            ..Limits::default()
        },
    }
}

fn verdict_of(code: Code, completion: &str, fields: Value) -> Result<Verdict> {
    let verifier = Check::Code(code).build()?;
    let pool = Pool::new(
        verifier,
        PoolConfig {
            failure_score: -1.0,
            ..PoolConfig::default()
        },
    )?;
    let job = Job {
        fields: Arc::new(fields.as_object().cloned().unwrap_or_default()),
        ..job(completion)
    };
    Ok(pool.run(vec![job])?.remove(0))
}

fn run(code: Code, completion: &str) -> Verdict {
    verdict_of(code, completion, Value::Null).unwrap()
}

#[test]
fn a_command_judges_by_exit_code_or_number() {
    assert_eq!(run(sh("grep -q yes"), "well, yes").score, 1.0);
    let no = run(sh("grep -q yes || { echo no such >&2; exit 3; }"), "no");
    assert_eq!(
        (no.score, no.reason.as_str()),
        (0.0, "exit code 3: no such")
    );
    let scored = |script: &str| Code {
        score: ScoreFrom::Stdout,
        ..sh(script)
    };
    assert_eq!(run(scored("echo loading; wc -c"), "12345").score, 5.0);
    assert_eq!(run(scored("echo nothing"), "").score, 0.0);
    assert_eq!(run(scored("echo inf"), "").score, 0.0);
    assert_eq!(run(scored("echo 1; exit 1"), "").score, 0.0);
    let signal = run(sh("kill -SEGV $$"), "");
    assert_eq!(signal.score, 0.0);
    assert!(
        signal.reason.starts_with("exit code 139"),
        "{}",
        signal.reason
    );
}

#[test]
fn files_fields_and_environment() {
    let code = Code {
        input: Input::File("answer.txt".into()),
        files: BTreeMap::from([("expected.txt".into(), "expected".into())]),
        env: BTreeMap::from([("MODE".into(), "strict".into())]),
        ..sh(
            "cmp answer.txt expected.txt && test \"$MODE\" = strict && test -z \"$HOME$LIBTORCH\" && ! read x",
        )
    };
    let fields = json!({"expected": "yes"});
    assert_eq!(
        verdict_of(code.clone(), "yes", fields.clone())
            .unwrap()
            .score,
        1.0
    );
    assert_eq!(verdict_of(code.clone(), "no", fields).unwrap().score, 0.0);
    let e = verdict_of(code.clone(), "no", json!({}))
        .unwrap_err()
        .to_string();
    assert!(e.contains("no field `expected`"), "{e}");
    for (bad, said) in [
        (
            Code {
                command: vec![],
                ..code.clone()
            },
            "`command` is empty",
        ),
        (
            Code {
                command: vec!["no-such-program".into()],
                ..code.clone()
            },
            "no `no-such-program`",
        ),
        (
            Code {
                input: Input::File("../x".into()),
                ..code.clone()
            },
            "no plain file name",
        ),
        (
            Code {
                limits: Limits {
                    wall_s: 0.0,
                    ..Limits::default()
                },
                ..code
            },
            "wall_s",
        ),
    ] {
        let e = Check::Code(bad).build().err().unwrap().to_string();
        assert!(e.contains(said), "{e}");
    }
}

/// The verdict comes, and says what the command was killed for.
fn killed(code: Code, kind: FailureKind) {
    let verdict = run(code, "");
    assert_eq!(verdict.failure, Some(kind), "{verdict:?}");
    assert_eq!(verdict.score, -1.0);
}

#[test]
fn a_command_that_sleeps_forever() {
    let patient = Limits {
        wall_s: 0.5,
        ..Limits::default()
    };
    killed(
        Code {
            limits: patient,
            ..sh("sleep 100000")
        },
        FailureKind::Deadline,
    );
}

#[test]
fn a_command_that_computes_forever() {
    let limits = Limits {
        wall_s: 300.0,
        cpu_s: 1,
        ..Limits::default()
    };
    killed(
        Code {
            limits,
            ..sh("while :; do :; done")
        },
        FailureKind::Cpu,
    );
}

#[test]
fn a_command_that_forks_without_end() {
    let limits = Limits {
        wall_s: 120.0,
        processes: 20,
        ..Limits::default()
    };
    let code = Code {
        limits,
        ..sh("f() { sleep 1000 & f; }; f")
    };
    let verdict = run(code, "");
    // The kernel refuses more, or the watcher sees them.
    assert!(verdict.score <= 0.0, "{verdict:?}");
    assert_ne!(verdict.failure, Some(FailureKind::Deadline), "{verdict:?}");
}

#[test]
fn a_command_that_allocates_without_end() {
    let limits = Limits {
        wall_s: 120.0,
        cpu_s: 60,
        memory_mib: 64,
        ..Limits::default()
    };
    // `tail` keeps a line that never ends.
    let verdict = run(
        Code {
            limits,
            ..sh("tail -n 1 /dev/zero")
        },
        "",
    );
    assert!(verdict.score <= 0.0, "{verdict:?}");
    assert_ne!(verdict.failure, Some(FailureKind::Deadline), "{verdict:?}");
    assert_ne!(verdict.failure, Some(FailureKind::Cpu), "{verdict:?}");
}

#[test]
fn a_command_that_prints_a_gigabyte() {
    let limits = Limits {
        wall_s: 120.0,
        cpu_s: 60,
        output_bytes: 1000,
        ..Limits::default()
    };
    killed(
        Code {
            limits,
            ..sh("yes | head -c 1000000000")
        },
        FailureKind::Output,
    );
}

#[test]
fn a_command_that_leaves_something_behind() {
    if !isolation().processes {
        println!("skipped: no process namespaces here");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mark = folder.path().join("mark");
    // In a session of its own, so that killing the group does not reach it.
    let script = format!(
        "setsid sh -c 'sleep 1; echo alive > {}' & exit 0",
        mark.display()
    );
    assert_eq!(run(sh(&script), "").score, 1.0);
    std::thread::sleep(Duration::from_millis(1500));
    assert!(!mark.exists());
}

#[test]
fn a_command_has_no_network() {
    if !isolation().network {
        println!("skipped: no network namespaces here");
        return;
    }
    // The only device is a loopback that is down.
    let seen = run(sh("tail -n +3 /proc/net/dev | grep -qv ' lo:'"), "");
    assert_eq!(seen.score, 0.0, "{seen:?}");
}

#[test]
fn ifeval_says_what_the_published_checks_say() {
    let text = include_str!("../golden/ifeval.json");
    let golden: Value = serde_json::from_str(text).unwrap();
    let texts: Vec<&str> = golden["texts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t.as_str().unwrap())
        .collect();
    let (mut seen, mut wrong, mut compared, mut sentences) = (Vec::new(), Vec::new(), 0, (0, 0));
    for c in golden["constraints"].as_array().unwrap() {
        let id = c["id"].as_str().unwrap();
        seen.push(id);
        let constraint = Constraint::parse(id, c["kwargs"].as_object().unwrap()).unwrap();
        for (mode, name) in [(Mode::Strict, "strict"), (Mode::Loose, "loose")] {
            for (text, expected) in texts.iter().zip(c[name].as_str().unwrap().chars()) {
                // Of a few words each detector has its own opinion.
                let letters = text.chars().filter(|c| c.is_alphabetic()).count();
                let of_language = id.contains("language") || id.contains("english");
                if of_language && (1..60).contains(&letters) {
                    continue;
                }
                compared += 1;
                let same = constraint.kept(text, mode) == (expected == '1');
                if id == "length_constraints:number_sentences" {
                    // Rules against a trained model: nearly always the same.
                    sentences = (sentences.0 + 1, sentences.1 + u32::from(!same));
                } else if !same {
                    wrong.push(format!(
                        "{id} {} {name}: {text:?} expected {expected}",
                        c["kwargs"]
                    ));
                }
            }
        }
    }
    seen.dedup();
    assert_eq!(seen.len(), IDS.len());
    assert!(IDS.iter().all(|id| seen.contains(id)));
    assert!(sentences.1 * 50 <= sentences.0, "sentences: {sentences:?}");
    assert!(
        wrong.is_empty(),
        "{} of {compared}:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn ifeval_names_what_it_does_not_know() {
    let check =
        serde_json::from_value::<Check>(json!({"kind": "ifeval", "score": "share"})).unwrap();
    let verifier = check.build().unwrap();
    let verify = |ids: Value, kwargs: Value| {
        let fields = json!({"instruction_id_list": ids, "kwargs": kwargs});
        verifier.verify(&Sample::new("", "No commas", fields.as_object().unwrap()))
    };
    let two = json!(["punctuation:no_comma", "detectable_format:title"]);
    assert_eq!(verify(two.clone(), json!([{}, null])).unwrap().score, 0.5);
    // As text, and with keys that belong to other kinds set to null.
    let as_text = (json!(two.to_string()), json!("[{\"num_words\": null}, {}]"));
    assert_eq!(verify(as_text.0, as_text.1).unwrap().score, 0.5);
    for (ids, kwargs, said) in [
        (
            json!(["keywords:nonsense"]),
            json!([{}]),
            "`keywords:nonsense` is no constraint",
        ),
        (
            json!(["keywords:existence"]),
            json!([{}]),
            "keywords:existence needs `keywords`",
        ),
        (
            json!(["length_constraints:number_words"]),
            json!([{"num_words": 5, "relation": "at most"}]),
            "`relation` = \"at most\"",
        ),
        (
            json!(["language:response_language"]),
            json!([{"language": "tlh"}]),
            "`tlh`",
        ),
        (two.clone(), json!([{}]), "2 entries"),
        (json!("[not JSON"), json!([]), "cannot be read"),
        (json!(5), json!([]), "is no list"),
    ] {
        let e = verify(ids, kwargs).unwrap_err().to_string();
        assert!(e.contains(said), "{e}");
    }
}

#[test]
fn recipes_name_every_kind() {
    for spec in [
        json!({"kind": "math"}),
        json!({"kind": "math", "answer": "gold", "extract": ["boxed", "last_number"]}),
        json!({"kind": "exact", "case": false}),
        json!({"kind": "regex", "pattern": "^yes"}),
        json!({"kind": "json", "schema": {"type": "object"}, "part": "fenced"}),
        json!({"kind": "format", "tags": ["think", "answer"]}),
        json!({"kind": "language", "language": "en"}),
        json!({"kind": "length", "unit": "words", "max": 100}),
        json!({"kind": "repetition", "n": 3}),
        json!({"kind": "ifeval", "mode": "loose"}),
        json!({"kind": "code", "command": ["sh"], "input": {"file": "a.py"}, "limits": {"wall_s": 2.0}}),
    ] {
        let check: Check = serde_json::from_value(spec.clone()).unwrap();
        check.build().unwrap();
        let again: Check = serde_json::from_value(serde_json::to_value(&check).unwrap()).unwrap();
        assert_eq!(again, check);
        let mut unknown = spec.clone();
        unknown["typo"] = json!(1);
        let e = serde_json::from_value::<Check>(unknown)
            .unwrap_err()
            .to_string();
        assert!(e.contains("typo"), "{e}");
    }
    let e = serde_json::from_value::<Check>(json!({"kind": "mth"}))
        .unwrap_err()
        .to_string();
    assert!(e.contains("mth") && e.contains("math"), "{e}");
}

/// Text of the pieces that verifiers look for.
fn pieces() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just(r"\boxed{".to_owned()),
        Just("}".to_owned()),
        Just(r"\frac".to_owned()),
        Just(r"\sqrt[".to_owned()),
        Just(r"\text{".to_owned()),
        Just("####".to_owned()),
        Just("answer is ".to_owned()),
        Just("<answer>".to_owned()),
        Just("</answer>".to_owned()),
        Just("```".to_owned()),
        Just("******".to_owned()),
        Just("<<".to_owned()),
        Just("e999".to_owned()),
        Just(", ".to_owned()),
        "[0-9]{1,4}",
        "[-+*/^(){}\\[\\]%$.\\\\ \n]",
        "\\PC{0,3}",
    ];
    proptest::collection::vec(piece, 0..30).prop_map(|p| p.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn no_text_makes_a_verifier_panic(text in pieces(), gold in pieces()) {
        let fields = json!({
            "answer": if gold.trim().is_empty() { "1" } else { &gold },
            "instruction_id_list": ["startend:quotation", "combination:two_responses",
                "length_constraints:number_paragraphs", "detectable_format:json_format",
                "change_case:english_capital", "detectable_format:number_highlighted_sections",
                "length_constraints:nth_paragraph_first_word", "length_constraints:number_sentences"],
            "kwargs": [{}, {}, {"num_paragraphs": 2}, {}, {}, {"num_highlights": 1},
                {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "a"},
                {"num_sentences": 2, "relation": "at least"}],
        });
        for spec in [
            json!({"kind": "math"}),
            json!({"kind": "exact", "within": true}),
            json!({"kind": "json", "part": "fenced"}),
            json!({"kind": "format"}),
            json!({"kind": "language", "language": "en"}),
            json!({"kind": "length", "unit": "sentences", "max": 3}),
            json!({"kind": "repetition"}),
            json!({"kind": "ifeval", "mode": "loose"}),
        ] {
            let check: Check = serde_json::from_value(spec).unwrap();
            let sample = Sample::new("", &text, fields.as_object().unwrap());
            let verdict = check.build().unwrap().verify(&sample);
            prop_assert!(verdict.is_ok_and(|v| (0.0..=1.0).contains(&v.score)));
        }
    }

    #[test]
    fn equality_of_answers_is_symmetric(a in pieces(), b in pieces()) {
        use rlhf_reward::verify::math::equal;
        prop_assert_eq!(equal(&a, &b), equal(&b, &a));
    }

    #[test]
    fn numbers_equal_themselves_however_written(p in -1_000_000i64..1_000_000, q in 1i64..1000) {
        use rlhf_reward::verify::math::equal;
        let fraction = format!("{p}/{q}");
        let latex = format!(r"\frac{{{p}}}{{{q}}}");
        prop_assert!(equal(&fraction, &latex), "{} {}", fraction, latex);
        let double = format!(r"\dfrac{{{}}}{{{}}}", 2 * p, 2 * q);
        prop_assert!(equal(&fraction, &double));
        let other = format!("{}/{q}", p + 1);
        prop_assert!(!equal(&fraction, &other));
        let decimal = format!("{:.15e}", p as f64 / q as f64);
        prop_assert!(equal(&fraction, &decimal), "{} {}", fraction, decimal);
    }
}
