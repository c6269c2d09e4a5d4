//! A reward model trained on preference pairs with the trainer:
//! `cargo run --release -p rlhf-reward --example train_reward -- MODEL_DIR TRAIN TEST OUT STEPS BATCH LR`.
//!
//! `OUT` gets the log, the model before the first step (`init`) and after the last (`model`), and the tokens of
//! the pairs in the order of training (`ordered.jsonl`) and of the held-out ones (`test.jsonl`), so that another
//! trainer can do the same.
#![allow(clippy::print_stdout, reason = "a program")]

use std::path::Path;

use rlhf_data::order::endless;
use rlhf_data::record::{Annotated, JudgedPairRecord};
use rlhf_data::source::{self, JsonlOut};
use rlhf_data::tokenize::{ChatTokenizer, Limits};
use rlhf_kernels::optim::AdamWConfig;
use rlhf_model::{LoadOptions, ScalarModel, Transformer, copy_tokenizer};
use rlhf_reward::labels::{self, Labelled};
use rlhf_reward::model::{Readout, RewardModel, Spec};
use rlhf_reward::objective::Objective;
use rlhf_reward::pairs::Ties;
use rlhf_reward::train::{Bootstrap, RewardConfig, pair_scores, train};
use rlhf_train::{LrSchedule, Session, SessionConfig, Stepper, StepperConfig, StopFlag};

fn read(
    path: &str,
    tokenizer: &ChatTokenizer,
) -> Result<Vec<Labelled>, Box<dyn std::error::Error>> {
    let records: Vec<Annotated<JudgedPairRecord>> =
        source::read(Path::new(path))?.collect::<Result<_, _>>()?;
    let (rows, report) = labels::pairs(tokenizer, &records, &Limits::new(64, 128))?;
    if rows.len() != records.len() {
        println!("{path}: {report}");
    }
    Ok(rows)
}

fn write(path: &Path, rows: &[&Labelled]) -> Result<(), Box<dyn std::error::Error>> {
    let mut out = JsonlOut::create(path)?;
    for r in rows {
        let whole = |i: usize| [&r.group.prompt[..], &r.group.completions[i].ids].concat();
        out.write(&serde_json::json!({"chosen_ids": whole(0), "rejected_ids": whole(1)}))?;
    }
    out.finish()?;
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, train_file, test_file, out, steps, batch, lr] = args.as_slice() else {
        return Err("give MODEL_DIR TRAIN TEST OUT STEPS BATCH LR".into());
    };
    let (dir, out) = (Path::new(dir), Path::new(out));
    std::fs::create_dir_all(out)?;
    let tokenizer = ChatTokenizer::load(dir)?;
    let (data, test) = (read(train_file, &tokenizer)?, read(test_file, &tokenizer)?);
    let cfg = RewardConfig {
        objective: Objective::BradleyTerry {
            centering: 0.01,
            label_smoothing: 0.0,
            margins: false,
            ties: Ties::Half,
        },
        seed: 7,
        steps: steps.parse()?,
        batch_size: batch.parse()?,
        micro_tokens: 8192,
        bootstrap: Bootstrap::None,
        first_member: 0,
    };
    let ordered: Vec<&Labelled> = (0..cfg.steps * cfg.batch_size as u64)
        .map(|i| &data[endless(cfg.seed, data.len(), i)])
        .collect();
    write(&out.join("ordered.jsonl"), &ordered)?;
    write(&out.join("test.jsonl"), &test.iter().collect::<Vec<_>>())?;

    let trunk = Transformer::load(dir, &LoadOptions::default())?;
    let net = ScalarModel::from_trunk(trunk, 7)?;
    let mut model = RewardModel::new(vec![net], &Spec::single(Readout::First { outputs: 1 }))?;
    model.save(&out.join("init"))?;
    copy_tokenizer(dir, &out.join("init"))?;
    let settings = StepperConfig {
        lr: lr.parse()?,
        schedule: LrSchedule::Constant {},
        warmup_steps: 0,
        total_steps: cfg.steps,
        max_grad_norm: Some(1.0),
        max_bad_steps: 1,
    };
    let adamw = AdamWConfig {
        weight_decay: 0.0,
        ..AdamWConfig::default()
    };
    let mut stepper = Stepper::new(model.parameters()?, adamw, settings);
    let mut session = Session::open(SessionConfig {
        dir: out.to_owned(),
        stage: "reward".into(),
        total_steps: cfg.steps,
        checkpoint_every: cfg.steps,
        keep: 1,
        stop: StopFlag::default(),
    })?;
    train(&model, &data, &cfg, None, &mut stepper, &mut session)?;
    session.finish()?;
    model.save(&out.join("model"))?;
    copy_tokenizer(dir, &out.join("model"))?;
    let scores = pair_scores(&model, test.iter().map(|r| &r.group), cfg.micro_tokens)?;
    let right = scores.iter().filter(|(c, r)| c > r).count();
    println!("{right} of {} held-out pairs right", scores.len());
    Ok(())
}
