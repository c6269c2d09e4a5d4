//! Memory and time of training steps on SmolLM2-135M's shape with random weights.
//!
//! `cargo run --release -p rlhf-policy --example training_memory -- [bf16|stochastic] [lora] [int8] [recompute=N]
//! [tokens=N]`
//!
//! Prints the process's peak and the seconds of a step; run each setting as a process of its own.
#![allow(clippy::print_stdout, reason = "a program")]

use std::time::Instant;

use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_data::pack::PackedBatch;
use rlhf_kernels::LossSum;
use rlhf_kernels::optim::{AdamWConfig, NarrowStep};
use rlhf_model::{AdapterConfig, CausalLm as _, Config, DeviceBatch, Transformer, target_logprobs};
use rlhf_train::{LrSchedule, Stepper, StepperConfig, peak_memory};
use tch::{Device, Kind};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    rlhf_kernels::keep_memory();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |key: &str, default: usize| -> Result<usize, std::num::ParseIntError> {
        let given = args.iter().find_map(|a| a.strip_prefix(key));
        given.map_or(Ok(default), str::parse)
    };
    let (recompute, tokens) = (number("recompute=", 0)?, number("tokens=", 2048)?);
    let config = Config {
        intermediate_size: 1536,
        num_key_value_heads: 3,
        ..Config::new(49_152, 576, 30, 9, 2048)
    };
    let given = |word: &str| args.iter().any(|a| a == word);
    let (kind, narrow) = match (given("bf16"), given("stochastic")) {
        (false, false) => (Kind::Float, NarrowStep::Masters),
        (true, _) => (Kind::BFloat16, NarrowStep::Masters),
        (false, true) => (Kind::BFloat16, NarrowStep::Stochastic),
    };
    let mut model = Transformer::init(config, 1, Device::Cpu, kind)?;
    if given("lora") {
        if given("int8") {
            model = model.into_int8()?;
        }
        model = model.adapt(&AdapterConfig::default(), 1)?;
    }
    model.set_recompute(recompute);
    let schedule = StepperConfig {
        lr: 1e-5,
        schedule: LrSchedule::Constant {},
        warmup_steps: 0,
        total_steps: 3,
        max_grad_norm: Some(1.0),
        max_bad_steps: 1,
    };
    let adamw = AdamWConfig {
        narrow,
        ..AdamWConfig::default()
    };
    let mut stepper = Stepper::new(model.parameters(), adamw, schedule);
    // Pairs: 128 tokens of prompt, twice 64 of completion.
    let ids =
        |n: usize, salt: usize| (0..n).map(move |i| ((i * 7919 + salt * 104_729) % 49_152) as u32);
    let groups: Vec<PromptGroup> = (0..tokens / 256)
        .map(|row| PromptGroup {
            row: row as u64,
            prompt: ids(128, row).collect(),
            completions: (0..2)
                .map(|c| Completion::whole(ids(64, row * 3 + c + 1).collect(), Finish::Stop))
                .collect(),
        })
        .collect();
    let batch = DeviceBatch::new(&PackedBatch::pack(&groups)?, Device::Cpu)?;
    let mut seconds = 0.0;
    for step in 0..3 {
        let began = Instant::now();
        let logprobs = target_logprobs(&model, &batch, 1.0, false)?.logprobs;
        stepper.accumulate(LossSum {
            sum: -logprobs.values().sum(None::<Kind>),
            weight: logprobs.values().numel() as f64,
        })?;
        stepper.apply()?;
        if step > 0 {
            seconds += began.elapsed().as_secs_f64() / 2.0;
        }
    }
    let peak = peak_memory().unwrap_or(0) as f64 / 1e6;
    println!("{args:?}: {peak:.0} MB at most, {seconds:.2} s a step of {tokens} tokens");
    Ok(())
}
