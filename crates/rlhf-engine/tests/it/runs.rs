//! Whole runs of a tiny recipe, interrupted and resumed.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use super::{rlhf, run, shared, text};

/// The quickstart, so small that it takes seconds.
const TINY: &[&str] = &[
    "init.scratch.hidden_size=32",
    "init.scratch.layers=2",
    "init.scratch.heads=2",
    "init.scratch.kv_heads=1",
    "init.scratch.intermediate_size=64",
    "run.checkpoint_every=2",
    "stages.sft.steps=12",
    "stages.sft.batch_size=4",
    "stages.rm.steps=3",
    "stages.rm.batch_size=4",
    "stages.rm.data.limit=32",
    "stages.rm.test.limit=16",
    "stages.grpo.steps=3",
    "stages.grpo.epochs=2",
    "stages.grpo.rollouts.prompts_per_step=2",
    "stages.grpo.rollouts.group_size=2",
    "stages.grpo.rollouts.sampling.max_new_tokens=12",
    "stages.ppo.steps=3",
    "stages.ppo.value_warmup_steps=1",
    "stages.ppo.rollouts.prompts_per_step=4",
    "stages.ppo.rollouts.sampling.max_new_tokens=12",
    "stages.dpo.steps=3",
    "stages.dpo.batch_size=4",
    "stages.dpo.data.limit=32",
    "stages.dpo.test.limit=16",
    "stages.eval.prompts.limit=6",
    "stages.eval.sampling.max_new_tokens=12",
    "stages.eval.pairs.limit=16",
    "stages.eval.samples=2",
];

pub(crate) fn tiny(out: &Path, more: &[&str]) -> std::process::Command {
    let mut c = rlhf();
    c.args(["run", "quickstart", "--out"]).arg(out);
    for set in TINY {
        c.args(["--set", set]);
    }
    c.args(more);
    c
}

/// metrics.jsonl of every stage without its times.
fn metrics(out: &Path) -> Vec<String> {
    ["sft", "rm", "grpo", "ppo", "dpo"]
        .iter()
        .flat_map(|stage| metrics_of(out, stage))
        .collect()
}

/// metrics.jsonl of a stage without its times.
pub(crate) fn metrics_of(out: &Path, stage: &str) -> Vec<String> {
    let text = std::fs::read_to_string(out.join(stage).join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut v: serde_json::Value = serde_json::from_str(line).unwrap();
        let map = v.as_object_mut().unwrap();
        map.retain(|key, _| key != "seconds" && !key.ends_with("per_second"));
        v.to_string()
    };
    text.lines().map(line).collect()
}

fn lines(out: &Path, stage: &str) -> usize {
    std::fs::read_to_string(out.join(stage).join("metrics.jsonl")).map_or(0, |t| t.lines().count())
}

/// Waits until the stage has logged `n` steps, or the child ended.
pub(super) fn wait_for(child: &mut Child, out: &Path, stage: &str, n: usize) {
    let began = Instant::now();
    while lines(out, stage) < n && child.try_wait().unwrap().is_none() {
        assert!(
            began.elapsed() < Duration::from_secs(120),
            "{stage} never reached step {n}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn killed_at_any_step_a_run_ends_with_the_same_metrics() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    let (code, out, err) = text(tiny(&whole, &[]).output().unwrap());
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("report.html") && whole.join("report.html").is_file());
    let expected = metrics(&whole);
    assert_eq!(expected.len(), 12 + 3 + 3 + 3 + 3);

    // Ten kills, at steps with and without a checkpoint, in every stage.
    let kills = [
        ("sft", 1),
        ("sft", 2),
        ("sft", 5),
        ("sft", 9),
        ("rm", 1),
        ("grpo", 1),
        ("grpo", 3),
        ("ppo", 1),
        ("ppo", 2),
        ("dpo", 2),
    ];
    for (i, (stage, step)) in kills.into_iter().enumerate() {
        let more: &[&str] = if i == 0 { &[] } else { &["--resume"] };
        let mut child = tiny(&broken, more)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for(&mut child, &broken, stage, step);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let (code, _, err) = text(tiny(&broken, &["--resume"]).output().unwrap());
    assert_eq!(code, 0, "{err}");
    assert_eq!(metrics(&broken), expected);
    let eval = |d: &Path| std::fs::read_to_string(d.join("eval/eval.json")).unwrap();
    assert_eq!(eval(&broken), eval(&whole));

    // A finished run is not overwritten, and another recipe does not resume it.
    let (code, _, err) = text(tiny(&whole, &[]).output().unwrap());
    assert!(code == 2 && err.contains("--resume"), "{err}");
    let (code, _, err) = text(
        tiny(&whole, &["--resume", "--set", "stages.dpo.loss.beta=0.3"])
            .output()
            .unwrap(),
    );
    assert!(
        code == 2 && err.contains("not those of the interrupted run"),
        "{err}"
    );

    speaks(&whole);
}

/// The models that a run leaves behind can be used by the other commands.
fn speaks(whole: &Path) {
    let model = whole.join("dpo/model");
    let model = model.to_str().unwrap();
    let args = [
        "generate",
        "--model",
        model,
        "--prompt",
        "Where is my order?",
        "--n",
        "2",
        "--max-new-tokens",
        "8",
        "--json",
    ];
    let (code, out, err) = run(&args);
    assert_eq!(code, 0, "{err}");
    assert_eq!(out.lines().count(), 2);
    assert_eq!(run(&args).1, out, "the same seed gives the same text");

    let parquet = whole.join("lp.parquet");
    let (code, _, err) = run(&[
        "logprobs",
        "--model",
        model,
        "--in",
        "datasets/help/sft/test.parquet",
        "--out",
        parquet.to_str().unwrap(),
    ]);
    assert_eq!(code, 0, "{err}");
    let rows: Vec<_> = rlhf_data::source::rows(&parquet)
        .unwrap()
        .map(|r| r.unwrap().columns)
        .collect();
    assert_eq!(rows.len(), 300);
    let sum: f64 = rows[0]["logprobs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_f64().unwrap())
        .sum();
    assert!((sum - rows[0]["sum"].as_f64().unwrap()).abs() < 1e-3 && sum < 0.0);

    use std::io::Write as _;
    let mut child = rlhf()
        .args([
            "chat",
            "--model",
            model,
            "--max-new-tokens",
            "6",
            "--temperature",
            "0",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"Hello\nAnd now?\n")
        .unwrap();
    let (code, out, _) = text(child.wait_with_output().unwrap());
    assert_eq!((code, out.lines().count()), (0, 2), "{out}");
}

#[cfg(unix)]
/// Every stage with an adapter on recomputed layers, one on eight bits: models that others load, the
/// adapter beside them, and a resumed run like an unbroken one.
#[test]
fn adapters_go_through_every_stage() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    let mut more = Vec::new();
    for set in [
        "stages.sft.memory={ recompute = 1 }",
        "stages.rm.memory={ lora = { rank = 2 } }",
        "stages.grpo.memory={ lora = { rank = 4, dora = true } }",
        "stages.ppo.memory={ lora = { rank = 2, targets = [\"q_proj\"] }, recompute = 2 }",
        "stages.dpo.memory={ lora = {}, int8_base = true }",
    ] {
        more.extend(["--set", set]);
    }
    let (code, _, err) = text(tiny(&whole, &more).output().unwrap());
    assert_eq!(code, 0, "{err}");
    for stage in ["grpo", "ppo", "dpo"] {
        let dir = whole.join(stage);
        assert!(dir.join("adapter/adapter_model.safetensors").is_file());
        assert!(dir.join("model/model.safetensors").is_file());
    }
    assert!(!whole.join("sft/adapter").exists());
    let mut child = tiny(&broken, &more)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for(&mut child, &broken, "dpo", 2);
    child.kill().unwrap();
    child.wait().unwrap();
    more.push("--resume");
    let (code, _, err) = text(tiny(&broken, &more).output().unwrap());
    assert_eq!(code, 0, "{err}");
    assert_eq!(metrics(&broken), metrics(&whole));

    let bad = ["--set", "stages.dpo.memory={ int8_base = true }"];
    let (code, _, err) = text(tiny(&dir.path().join("bad"), &bad).output().unwrap());
    assert!(code == 2 && err.contains("needs memory.lora"), "{err}");
}

#[test]
fn a_signal_ends_the_run_with_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let mut child = tiny(&out, &["--set", "stages.sft.steps=100000"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for(&mut child, &out, "sft", 2);
    std::process::Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status()
        .unwrap();
    let (code, _, err) = text(child.wait_with_output().unwrap());
    assert_eq!(code, 143, "{err}");
    assert!(err.contains("--resume"), "{err}");
    assert!(
        std::fs::read_dir(out.join("sft/checkpoints"))
            .unwrap()
            .count()
            >= 1
    );
}

#[test]
fn a_full_disk_is_an_error_and_keeps_what_was_finished() {
    if !Path::new("/dev/full").exists() {
        eprintln!("skipped: no /dev/full here");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    std::fs::create_dir_all(out.join("rm")).unwrap();
    // Every write to the reward model's log fails as on a full disk.
    #[cfg(unix)]
    std::os::unix::fs::symlink("/dev/full", out.join("rm/metrics.jsonl")).unwrap();
    let (code, _, err) = text(tiny(&out, &[]).output().unwrap());
    assert_eq!(code, 1, "{err}");
    assert!(
        err.contains("stage `rm`") && err.contains("metrics.jsonl"),
        "{err}"
    );
    assert!(
        out.join("sft/model/model.safetensors").is_file() && out.join("sft/done.json").is_file()
    );
}

#[test]
fn recipes_without_their_material_say_so() {
    let mut c = rlhf();
    c.args(["run", "stories"]).env("RLHF_SHARED", "/nowhere");
    let (code, out, err) = text(c.output().unwrap());
    assert_eq!(code, 0, "{err}");
    assert!(
        out.starts_with("skipped: ") && out.contains("RLHF_SHARED"),
        "{out}"
    );
}

#[test]
fn the_stories_recipe_runs_where_its_material_is() {
    let Some(shared) = shared() else {
        eprintln!("skipped: no shared folder");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut c = rlhf();
    c.args(["run", "stories", "--smoke", "--out"])
        .arg(dir.path().join("run"));
    for set in [
        "stages.eval.prompts.limit=4",
        "stages.grpo.rollouts.prompts_per_step=2",
        "stages.ppo.rollouts.prompts_per_step=4",
        "stages.eval.sampling.max_new_tokens=16",
    ] {
        c.args(["--set", set]);
    }
    c.env("RLHF_SHARED", shared);
    let (code, out, err) = text(c.output().unwrap());
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("report.html"), "{out}");
}

/// Weights of 16 bits in every stage, and a resumed run that ends with the same metrics: what is remembered
/// beside the weights goes through checkpoints.
#[test]
fn sixteen_bits_go_through_every_stage() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    let sets: Vec<String> = [
        ("sft", "bf16"),
        ("rm", "bf16"),
        ("grpo", "bf16_stochastic"),
        ("ppo", "bf16"),
        ("dpo", "bf16_stochastic"),
    ]
    .iter()
    .map(|(stage, weights)| format!("stages.{stage}.memory={{ weights = \"{weights}\" }}"))
    .chain(["stages.ppo.rollouts.sampling.weights=\"bf16\"".into()])
    .collect();
    let more: Vec<&str> = sets.iter().flat_map(|s| ["--set", s]).collect();
    let (code, _, err) = text(tiny(&whole, &more).output().unwrap());
    assert_eq!(code, 0, "{err}");
    for (i, (stage, step)) in [("sft", 3), ("grpo", 2), ("dpo", 2)]
        .into_iter()
        .enumerate()
    {
        let resume: &[&str] = if i == 0 { &[] } else { &["--resume"] };
        let mut child = tiny(&broken, &[&more[..], resume].concat())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for(&mut child, &broken, stage, step);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let resumed = [&more[..], &["--resume"]].concat();
    let (code, _, err) = text(tiny(&broken, &resumed).output().unwrap());
    assert_eq!(code, 0, "{err}");
    assert_eq!(metrics(&whole), metrics(&broken));
    let config = std::fs::read_to_string(whole.join("dpo/model/config.json")).unwrap();
    assert!(config.contains("\"bfloat16\""), "{config}");
    // What an optimiser cannot do with such weights is refused.
    let (code, _, err) = text(
        tiny(
            &dir.path().join("no"),
            &[
                "--set",
                "stages.dpo.memory={ weights = \"bf16\", int8_base = true, lora = {} }",
            ],
        )
        .output()
        .unwrap(),
    );
    assert_eq!(code, 2);
    assert!(err.contains("leave memory.weights out"), "{err}");
}

/// A server that completes every prompt with the same three tokens.
fn server() -> String {
    use std::io::{BufRead as _, BufReader, Read as _, Write as _};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let (mut head, mut length) = (String::new(), 0);
            while !head.ends_with("\r\n\r\n") {
                let from = head.len();
                if reader.read_line(&mut head).unwrap() == 0 {
                    break;
                }
                if let Some(n) = head[from..].to_lowercase().strip_prefix("content-length:") {
                    length = n.trim().parse().unwrap();
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let question: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert!(head.to_lowercase().contains("bearer open sesame"), "{head}");
            let choice = |i: u64| {
                serde_json::json!({"index": i, "token_ids": [5, 6, 7 + i], "finish_reason": "length",
                    "logprobs": {"token_logprobs": [-2.0, -3.0, -2.5]}})
            };
            let n = question["n"].as_u64().unwrap();
            let answer = serde_json::json!({"choices": (0..n).map(choice).collect::<Vec<_>>()});
            let text = answer.to_string();
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                text.len()
            );
            stream
                .write_all(format!("{head}{text}").as_bytes())
                .unwrap();
        }
    });
    url
}

#[test]
fn completions_come_from_rounded_weights_or_a_server() {
    let dir = tempfile::tempdir().unwrap();
    let url = server();
    let at = format!(
        "stages.ppo.rollouts.server={{ url = \"{url}\", model = \"m\", key_env = \"RLHF_TEST_KEY\" }}"
    );
    let sets = [
        "stages.grpo.rollouts.sampling.weights=\"bf16\"",
        "stages.grpo.correction={ level = \"token\", bound = { kind = \"truncate\", max = 2.0 } }",
        "run.title=\"samplers\"",
        &at,
    ];
    let more: Vec<&str> = sets.iter().flat_map(|s| ["--set", s]).collect();
    // Without the key nothing is asked.
    let (code, _, err) = text(
        tiny(dir.path(), &more)
            .env_remove("RLHF_TEST_KEY")
            .output()
            .unwrap(),
    );
    assert_eq!(code, 2, "{err}");
    assert!(
        err.contains("the environment has no `RLHF_TEST_KEY`"),
        "{err}"
    );
    let again = [&more[..], &["--resume"]].concat();
    let (code, _, err) = text(
        tiny(dir.path(), &again)
            .env("RLHF_TEST_KEY", "open sesame")
            .output()
            .unwrap(),
    );
    assert_eq!(code, 0, "{err}");
    let logged = |stage: &str, key: &str| -> f64 {
        let text = std::fs::read_to_string(dir.path().join(stage).join("metrics.jsonl")).unwrap();
        let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        last[format!("{stage}/{key}")].as_f64().unwrap()
    };
    let gap = logged("grpo", "sampler_gap");
    assert!(gap > 1e-5 && gap < 0.5, "{gap}");
    assert!(logged("grpo", "sampler_kl") < 0.01);
    assert_eq!(logged("ppo", "length"), 3.0);

    let model = dir.path().join("sft/model");
    let mut generate = rlhf();
    generate
        .args([
            "generate",
            "--prompt",
            "hello",
            "--n",
            "2",
            "--json",
            "--temperature",
            "1",
        ])
        .args([
            "--endpoint",
            &url,
            "--served-model",
            "m",
            "--key-env",
            "RLHF_TEST_KEY",
        ])
        .arg("--model")
        .arg(&model)
        .env("RLHF_TEST_KEY", "open sesame");
    let (code, out, err) = text(generate.output().unwrap());
    assert_eq!((code, out.lines().count()), (0, 2), "{err}");
    assert!(err.contains("sampler mismatch over 6 tokens"), "{err}");
    let (code, _, err) = run(&[
        "generate",
        "--model",
        model.to_str().unwrap(),
        "--prompt",
        "x",
        "--endpoint",
        "http://127.0.0.1:9/v1",
    ]);
    assert_eq!(code, 2);
    assert!(err.contains("--served-model"), "{err}");
    let local = |flag: &[&str]| {
        let args = [
            "generate",
            "--model",
            model.to_str().unwrap(),
            "--prompt",
            "hello",
        ];
        run(&[&args, flag].concat())
    };
    assert_eq!(local(&["--bf16"]).0, 0);
}
