//! Seconds and memory of whole training steps of a reward model on random weights and tokens:
//! `cargo run --release -p rlhf-reward --example reward_step -- SHAPE PAIRS TOKENS PROMPT STEPS`.
//!
//! SHAPE is `smol135m` or `stories15m`; every completion with its prompt has TOKENS tokens, of which the share
//! PROMPT (0 to 1) is the prompt's, which a pair has in common. A step is forward, backward and AdamW. Two steps
//! warm up.
#![allow(clippy::print_stdout, reason = "a program")]

use std::time::Instant;

use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_data::seed::{Purpose, Stream};
use rlhf_kernels::optim::AdamWConfig;
use rlhf_model::{Config, ScalarModel, Transformer};
use rlhf_reward::labels::{Label, Labelled};
use rlhf_reward::model::{Readout, RewardModel, Spec};
use rlhf_reward::objective::Objective;
use rlhf_reward::pairs::Ties;
use rlhf_reward::train::{Bootstrap, RewardConfig, train};
use rlhf_train::{
    LrSchedule, Session, SessionConfig, Stepper, StepperConfig, StopFlag, peak_memory,
};
use tch::{Device, Kind};

fn shape(name: &str) -> Option<Config> {
    let (vocab, hidden, layers, heads, kv_heads, inner) = match name {
        "smol135m" => (49_152, 576, 30, 9, 3, 1536),
        "stories15m" => (32_000, 288, 6, 6, 6, 768),
        _ => return None,
    };
    let mut config = Config::new(vocab, hidden, layers, heads, 2048);
    config.num_key_value_heads = kv_heads;
    config.intermediate_size = inner;
    config.tie_word_embeddings = true;
    Some(config)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    rlhf_kernels::keep_memory();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [name, pairs, tokens, share, steps] = args.as_slice() else {
        return Err("give SHAPE PAIRS TOKENS PROMPT STEPS".into());
    };
    let config = shape(name).ok_or("SHAPE is smol135m or stories15m")?;
    let (pairs, tokens, share): (usize, usize, f64) =
        (pairs.parse()?, tokens.parse()?, share.parse()?);
    let steps: u64 = steps.parse::<u64>()? + 2;
    let prompt = (tokens as f64 * share).round() as usize;
    let noise = Stream::new(1, Purpose::Noise);
    let ids = |row: u64, part: u32, n: usize| -> Vec<u32> {
        (0..n as u32)
            .map(|i| 4 + noise.below(376, row, part, i) as u32)
            .collect()
    };
    let data: Vec<Labelled> = (0..pairs as u64 * steps)
        .map(|row| {
            let group = PromptGroup {
                row,
                prompt: ids(row, 0, prompt),
                completions: [1, 2]
                    .map(|c| Completion::whole(ids(row, c, tokens - prompt), Finish::Stop))
                    .into(),
            };
            let label = Label::Pair {
                margin: None,
                preference: 1.0,
            };
            Labelled::new(group, label)
        })
        .collect();
    let trunk = Transformer::init(config, 0, Device::Cpu, Kind::Float)?;
    let net = ScalarModel::from_trunk(trunk, 0)?;
    let model = RewardModel::new(vec![net], &Spec::single(Readout::First { outputs: 1 }))?;
    let before = resident();
    let settings = StepperConfig {
        lr: 1e-6,
        schedule: LrSchedule::Constant {},
        warmup_steps: 0,
        total_steps: steps,
        max_grad_norm: Some(1.0),
        max_bad_steps: 1,
    };
    let mut stepper = Stepper::new(model.parameters()?, AdamWConfig::default(), settings);
    let dir = tempfile::tempdir()?;
    let mut times = Vec::new();
    for step in 0..steps {
        let cfg = RewardConfig {
            objective: Objective::BradleyTerry {
                centering: 0.0,
                label_smoothing: 0.0,
                margins: false,
                ties: Ties::Half,
            },
            seed: step,
            steps: 1,
            batch_size: pairs,
            micro_tokens: usize::MAX,
            bootstrap: Bootstrap::None,
            first_member: 0,
        };
        // A session for each step: it writes no checkpoint before the stage ends, and is not measured.
        let mut session = Session::open(SessionConfig {
            dir: dir.path().join(step.to_string()),
            stage: "reward".into(),
            total_steps: 2,
            checkpoint_every: 100,
            keep: 1,
            stop: StopFlag::default(),
        })?;
        let began = Instant::now();
        train(&model, &data, &cfg, None, &mut stepper, &mut session)?;
        times.push(began.elapsed().as_secs_f64());
    }
    let mut measured = times.split_off(2);
    measured.sort_by(f64::total_cmp);
    println!(
        "{name}: {pairs} pairs of 2 × {tokens} tokens, prompt {prompt}: {:.3} s a step (least {:.3}), memory over the model's {:.0} MiB",
        measured[measured.len() / 2],
        measured[0],
        (peak_memory().unwrap_or(0).saturating_sub(before)) as f64 / 1024.0 / 1024.0,
    );
    Ok(())
}

/// Bytes held now.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmRSS:"));
    line.and_then(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok())
        .unwrap_or(0)
        * 1024
}
