//! Time and memory of whole DPO steps on random weights:
//! `cargo run --release -p rlhf-dpo --example dpo_step -- SHAPE [pairs=2] [tokens=256] [prompt=50] [steps=6] [micro=8192]
//! [reference] [cuda] [bf16]`, SHAPE `smol135m` or `stories15m`.
//!
//! `prompt` is the prompt's share of a sequence of `tokens` in per cent. Prints one line of JSON: the median of the
//! steps but the first, whether the reference's sums of their pairs are counted, the arithmetic, the peak.
#![allow(clippy::print_stdout, reason = "a program")]

use std::time::Instant;

use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_dpo::loss::PreferenceLoss;
use rlhf_dpo::train::{DpoConfig, PairData, pair_sums, train};
use rlhf_kernels::optim::AdamWConfig;
use rlhf_model::{CausalLm as _, Config, Transformer};
use rlhf_train::{
    LrSchedule, Session, SessionConfig, Stepper, StepperConfig, StopFlag, peak_memory,
};
use tch::{Device, Kind};

type Failure = Box<dyn std::error::Error>;

fn shape(name: &str) -> Result<Config, Failure> {
    Ok(match name {
        "smol135m" => Config {
            intermediate_size: 1536,
            num_key_value_heads: 3,
            ..Config::new(49_152, 576, 30, 9, 2048)
        },
        "stories15m" => Config {
            intermediate_size: 768,
            ..Config::new(32_000, 288, 6, 6, 1024)
        },
        _ => return Err("give smol135m or stories15m".into()),
    })
}

/// Multiply-adds twice: what a token costs in the layers' and the head's matrices, forward.
fn flops(c: &Config) -> (f64, f64) {
    let (h, d) = (c.hidden_size, c.head_dim);
    let attention = h * d * (2 * c.num_attention_heads + 2 * c.num_key_value_heads);
    let layer = attention + 3 * h * c.intermediate_size;
    (
        2.0 * (layer * c.num_hidden_layers) as f64,
        2.0 * (h * c.vocab_size) as f64,
    )
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

fn main() -> Result<(), Failure> {
    rlhf_kernels::keep_memory();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |key: &str, default: usize| -> Result<usize, std::num::ParseIntError> {
        let given = args.iter().find_map(|a| a.strip_prefix(key));
        given.map_or(Ok(default), str::parse)
    };
    let config = shape(args.first().map_or("", String::as_str))?;
    let (pairs, tokens) = (number("pairs=", 2)?, number("tokens=", 256)?);
    let steps = number("steps=", 6)?;
    let prompt = tokens * number("prompt=", 50)? / 100;
    // Something must predict the first token, as TRL's sequence begins with one that is not trained.
    let prompt = prompt.max(1);
    let (layers, head) = flops(&config);
    let vocab = config.vocab_size as usize;
    let asked = |name: &str| args.iter().any(|a| a == name);
    let device = if asked("cuda") {
        rlhf_kernels::load_cuda();
        Device::Cuda(0)
    } else {
        Device::Cpu
    };
    let kind = if asked("bf16") {
        Kind::BFloat16
    } else {
        Kind::Float
    };
    let model = Transformer::init(config, 1, device, kind)?;
    let with_reference = asked("reference");
    let ids =
        |n: usize, salt: usize| (0..n).map(move |i| ((i * 7919 + salt * 104_729) % vocab) as u32);
    let data: Vec<PromptGroup> = (0..pairs * steps)
        .map(|row| PromptGroup {
            row: row as u64,
            prompt: ids(prompt, row).collect(),
            completions: (0..2)
                .map(|c| {
                    let ids = ids(tokens - prompt, row * 3 + c + 1).collect();
                    Completion::whole(ids, Finish::Stop)
                })
                .collect(),
        })
        .collect();
    let cfg = DpoConfig {
        loss: PreferenceLoss::Sigmoid {
            beta: 0.1,
            label_smoothing: 0.0,
        }
        .into(),
        seed: 1,
        steps: steps as u64,
        batch_size: pairs,
        micro_tokens: number("micro=", 8192)?,
    };
    let mut reference = Vec::new();
    let mut reference_times = Vec::new();
    for step in data.chunks(pairs) {
        let began = Instant::now();
        reference.extend(pair_sums(&model, step, cfg.micro_tokens)?);
        reference_times.push(began.elapsed().as_secs_f64());
    }
    let settings = StepperConfig {
        lr: 1e-6,
        schedule: LrSchedule::Constant {},
        warmup_steps: 0,
        total_steps: cfg.steps,
        max_grad_norm: Some(1.0),
        max_bad_steps: 1,
    };
    let mut stepper = Stepper::new(model.parameters(), AdamWConfig::default(), settings);
    let dir = std::env::temp_dir().join(format!("step-speed-{}", std::process::id()));
    let mut session = Session::open(SessionConfig {
        dir: dir.clone(),
        stage: "dpo".into(),
        // One more: no checkpoint within.
        total_steps: cfg.steps + 1,
        checkpoint_every: cfg.steps + 1,
        keep: 1,
        stop: StopFlag::default(),
    })?;
    let data = PairData::new(&data, &reference);
    train(&model, data, &cfg, None, &mut stepper, &mut session)?;
    session.finish()?;
    let log = std::fs::read_to_string(dir.join("metrics.jsonl"))?;
    let at: Vec<f64> = log
        .lines()
        .filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok()?["seconds"].as_f64())
        .collect();
    std::fs::remove_dir_all(&dir)?;
    let step = median(at.windows(2).map(|w| w[1] - w[0]).collect());
    let before = median(reference_times.split_off(1));
    let packed = (pairs * (2 * tokens - prompt)) as f64;
    let trained = (pairs * 2 * (tokens - prompt)) as f64;
    // Forward, and twice that backward; the head's product once more in backward where its logits are not kept.
    let kept = device == Device::Cpu && trained * vocab as f64 * 4.0 <= f64::from(96 << 20);
    let passes = if kept { 3.0 } else { 4.0 };
    let arithmetic = 3.0 * layers * packed + passes * head * trained;
    let once = layers * packed + head * trained;
    let (seconds, work) = if with_reference {
        (step + before, arithmetic + once)
    } else {
        (step, arithmetic)
    };
    println!(
        "{}",
        serde_json::json!({
            "setting": args.join(" "), "seconds": seconds, "reference_seconds": before,
            "packed_tokens": packed, "trained_tokens": trained, "gflop": work / 1e9,
            "gflop_per_s": work / 1e9 / seconds,
            "peak_mb": peak_memory().unwrap_or(0) as f64 / 1e6,
        })
    );
    Ok(())
}
