//! A model trained on preference pairs with the trainer:
//! `cargo run -p rlhf-dpo --example train_pairs -- MODEL_DIR PAIRS OUT`.
//!
//! Twenty steps of eight pairs. `OUT` gets the log and, as `ordered.jsonl`, the pairs in the order of training.

use std::path::Path;

use rlhf_data::order::endless;
use rlhf_data::record::Record as _;
use rlhf_data::source::{self, JsonlOut};
use rlhf_data::tokenize::{ChatTokenizer, Limits};
use rlhf_dpo::loss::PreferenceLoss;
use rlhf_dpo::train::{DpoConfig, PairData, reference_sums, train};
use rlhf_kernels::optim::AdamWConfig;
use rlhf_model::{CausalLm as _, LoadOptions, Transformer};
use rlhf_train::{LrSchedule, Session, SessionConfig, Stepper, StepperConfig, StopFlag};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, pairs, out] = args.as_slice() else {
        return Err("give MODEL_DIR PAIRS OUT".into());
    };
    let (dir, out) = (Path::new(dir), Path::new(out));
    let model = Transformer::load(dir, &LoadOptions::default())?;
    let tokenizer = ChatTokenizer::load(dir)?;
    let records = source::read_preference(Path::new(pairs))?.collect::<Result<Vec<_>, _>>()?;
    let (data, report) = tokenizer.preference_groups(&records, &Limits::new(128, 128))?;
    if data.len() != records.len() {
        return Err(format!("rows were dropped: {report}").into());
    }
    let cfg = DpoConfig {
        loss: PreferenceLoss::Sigmoid {
            beta: 0.1,
            label_smoothing: 0.0,
        }
        .into(),
        seed: 7,
        steps: 20,
        batch_size: 8,
        micro_tokens: 4096,
    };
    std::fs::create_dir_all(out)?;
    let mut ordered = JsonlOut::create(&out.join("ordered.jsonl"))?;
    for i in 0..cfg.steps * cfg.batch_size as u64 {
        ordered.write(&records[endless(cfg.seed, data.len(), i)].to_row())?;
    }
    ordered.finish()?;
    let settings = StepperConfig {
        lr: 1e-3,
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
    let mut stepper = Stepper::new(model.parameters(), adamw, settings);
    let mut session = Session::open(SessionConfig {
        dir: out.to_owned(),
        stage: "dpo".into(),
        total_steps: cfg.steps,
        checkpoint_every: cfg.steps,
        keep: 1,
        stop: StopFlag::default(),
    })?;
    let reference = reference_sums(&model, &data, &cfg)?;
    train(
        &model,
        PairData::new(&data, &reference),
        &cfg,
        None,
        &mut stepper,
        &mut session,
    )?;
    session.finish()?;
    Ok(())
}
