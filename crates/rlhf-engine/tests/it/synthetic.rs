//! Synthetic data as stages: by a server that fails now and then, and by a model of the run.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rlhf_data::record::{Annotated, PreferenceRecord, SftRecord};
use rlhf_data::source;
use serde_json::{Value, json};

use super::{rlhf, text};

/// A chat server that fails every fourth time and otherwise answers by what is asked.
fn server() -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let count = Arc::clone(&count);
            std::thread::spawn(move || serve(stream.unwrap(), &count));
        }
    });
    (url, asked)
}

fn serve(mut stream: TcpStream, count: &AtomicUsize) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            let line = line.trim().to_lowercase();
            if let Some(n) = line.strip_prefix("content-length:") {
                length = n.trim().parse().unwrap();
            }
            if line.is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        let question: Value = serde_json::from_slice(&body).unwrap();
        let n = count.fetch_add(1, Ordering::SeqCst);
        let (status, body) = if n % 4 == 3 {
            ("503 Service Unavailable", "busy".to_owned())
        } else {
            let said = json!({"choices": [{"message": {"role": "assistant", "content": answer(&question)}}]});
            ("200 OK", said.to_string())
        };
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-length: {}\r\nretry-after: 0\r\n\r\n",
            body.len()
        );
        if stream.write_all(head.as_bytes()).is_err() || stream.write_all(body.as_bytes()).is_err()
        {
            return;
        }
    }
}

fn answer(question: &Value) -> String {
    let messages = question["messages"].as_array().unwrap();
    let last = messages.last().unwrap()["content"].as_str().unwrap();
    let seed = &question["seed"];
    if last.starts_with("Here is a list") {
        format!(
            " Tell apart {seed} a{seed} b{seed} and c{seed}.\nTask 5: Show the picture of {seed}"
        )
    } else if last.contains("Is this a task of classification") {
        "No.".into()
    } else if last.starts_with("Task:") {
        format!("Input: none\nOutput: number {seed}")
    } else if last.starts_with("Point out") {
        "It is short.".into()
    } else if last.starts_with("Write your answer again") {
        format!("better {}", messages.len())
    } else {
        format!("first, to {last}")
    }
}

fn recipe(writer: &str) -> String {
    format!(
        r#"
[run]
title = "Synthetic"
seed = 4
checkpoint_every = 1

[init]
tokenizer = "datasets/tasks/tokenizer"
scratch = {{ hidden_size = 16, layers = 1, heads = 2, kv_heads = 2, intermediate_size = 32, max_positions = 2048, initializer_range = 0.05 }}

[[stages]]
name = "more"
kind = "self_instruct"
writer = {writer}
data = {{ path = "datasets/help/prompts/test.parquet", max_prompt = 256, max_completion = 64, limit = 6 }}
settings = {{ rounds = 2, lists = 3, rows = 100, shown_seeds = 2, shown_own = 1, max_rouge = 0.7, max_tokens = 24, temperature = 1.0 }}

[[stages]]
name = "revised"
kind = "critique"
writer = {writer}
data = {{ path = "datasets/tasks/prompts/train.parquet", max_prompt = 32, max_completion = 20, limit = 5 }}
principles = "crates/rlhf/recipes/principles.toml"
settings = {{ rounds = 2, max_tokens = 12, temperature = 1.0 }}

[[stages]]
name = "sft"
kind = "sft"
model = "init"
data = {{ path = "stage:revised", max_prompt = 64, max_completion = 64 }}
steps = 1
batch_size = 2
micro_tokens = 2048
optim = {{ lr = 1e-3, schedule = {{ kind = "constant" }}, warmup_steps = 0, weight_decay = 0.0, max_grad_norm = 1.0 }}
"#
    )
}

fn go(recipe: &Path, out: &Path, more: &[&str]) -> (i32, String, String) {
    let mut c = rlhf();
    c.arg("run").arg(recipe).arg("--out").arg(out).args(more);
    text(c.output().unwrap())
}

#[test]
fn a_server_that_fails_now_and_then_is_asked_nothing_twice() {
    let (url, asked) = server();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("r.toml");
    let writer = format!(r#"{{ server = {{ url = "{url}", model = "m" }} }}"#);
    std::fs::write(&file, recipe(&writer)).unwrap();
    let out = dir.path().join("run");
    let (code, _, err) = go(&file, &out, &[]);
    assert_eq!(code, 0, "{err}");
    // Two rounds of three lists, each with one good task; a class and an instance for each. Five answers with
    // two critiques and revisions each. A quarter of all calls failed besides.
    let good = 6 + 6 + 6 + 5 * 5;
    let calls = asked.load(Ordering::SeqCst);
    assert!(
        calls > good && calls <= good * 4 / 3 + 1,
        "{calls} calls for {good} answers"
    );
    let rows: Vec<Annotated<SftRecord>> = source::read(&out.join("more/selected.parquet"))
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    assert_eq!(rows.len(), 6);
    assert!(err.contains("asks for more than text: 6"), "{err}");
    let model = rows[0].source.as_ref().unwrap().model.clone().unwrap();
    assert_eq!(model, format!("m at {url}"));
    let pairs: Vec<Annotated<PreferenceRecord>> =
        source::read(&out.join("revised/preferences.parquet"))
            .unwrap()
            .collect::<Result<_, _>>()
            .unwrap();
    assert_eq!(pairs.len(), 5);
    assert!(format!("{:?}", pairs[0].record.chosen).contains("better 5"));
    assert!(format!("{:?}", pairs[0].record.rejected).contains("first, to "));

    // Both stages again: every answer is there.
    let before = std::fs::read(out.join("more/selected.parquet")).unwrap();
    for stage in ["more", "revised"] {
        std::fs::remove_file(out.join(stage).join("done.json")).unwrap();
    }
    let (code, _, err) = go(&file, &out, &["--resume"]);
    assert_eq!(code, 0, "{err}");
    assert_eq!(asked.load(Ordering::SeqCst), calls);
    assert_eq!(
        before,
        std::fs::read(out.join("more/selected.parquet")).unwrap()
    );
}

#[test]
fn a_model_of_the_run_writes_the_same_each_time() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("r.toml");
    // Random weights write no tasks that pass the filters; they do answer and revise.
    let text = recipe(r#"{ model = "init", max_sequences = 4 }"#);
    let (head, rest) = text.split_once("\n[[stages]]\nname = \"more\"").unwrap();
    let rest = &rest[rest.find("\n[[stages]]\nname = \"revised\"").unwrap()..];
    std::fs::write(&file, format!("{head}{rest}")).unwrap();
    let read = |out: &Path| {
        let (code, _, err) = go(&file, out, &[]);
        assert_eq!(code, 0, "{err}");
        let rows = source::read(&out.join("revised/selected.parquet")).unwrap();
        rows.collect::<Result<Vec<Annotated<SftRecord>>, _>>()
            .unwrap()
    };
    let (a, b) = (read(&dir.path().join("a")), read(&dir.path().join("b")));
    assert!(!a.is_empty());
    assert_eq!(a, b);
    let model = a[0].source.as_ref().unwrap().model.clone().unwrap();
    assert!(model.starts_with("init "), "{model}");
}

#[test]
fn what_cannot_be_is_refused_before_anything_runs() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("r.toml");
    let refused = |text: String, word: &str| {
        std::fs::write(&file, text).unwrap();
        let (code, _, err) = go(&file, &dir.path().join("run"), &[]);
        assert_eq!(code, 2, "{err}");
        assert!(err.contains(word), "{word}: {err}");
    };
    refused(recipe("{ }"), "either `model` or `server`");
    refused(recipe(r#"{ model = "nobody" }"#), "nobody");
    let writer = r#"{ model = "init" }"#;
    refused(
        recipe(writer).replace("recipes/principles.toml", "recipes/none.toml"),
        "none.toml",
    );
}
