//! Writes model folders with the logits that they give here, for `docs/interop/check_transformers.py`.
//!
//! `cargo run -p rlhf-model --example save_for_transformers -- OUT [MODEL_DIR…]`
//!
//! Without model folders it makes small random ones: a language model and a reward model of every
//! family, and what a Llama may vary in (grouped heads, biases, tied and not, each rope scaling, one
//! and several shards, f32 and bf16). In each, `rlhf_logits.json` holds token ids and what we compute from them.
#![allow(clippy::print_stdout, reason = "a program")]

use std::path::{Path, PathBuf};

use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_data::pack::PackedBatch;
use rlhf_model::{
    AdapterConfig, CausalLm, Config, DeviceBatch, Family, LoadOptions, Result, RopeScaling,
    SaveOptions, ScalarModel, Transformer,
};
use tch::{Device, Kind, Tensor};

fn main() -> std::process::ExitCode {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let Some(out) = args.next() else {
        println!("usage: save_for_transformers OUT [MODEL_DIR...]");
        return std::process::ExitCode::from(2);
    };
    match write_all(&out, &args.collect::<Vec<_>>()) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            println!("error: {e}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn write_all(out: &Path, models: &[PathBuf]) -> Result<()> {
    for dir in models {
        let model = Transformer::load(dir, &LoadOptions::default())?;
        let name = dir
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        write(&out.join(name), &model, &SaveOptions::default())?;
    }
    if !models.is_empty() {
        return Ok(());
    }
    let base = Config {
        initializer_range: 0.2,
        ..Config::new(384, 64, 2, 4, 256)
    };
    let init = |config: &Config| Transformer::init(config.clone(), 5, Device::Cpu, Kind::Float);
    let plain = SaveOptions::default();
    write(&out.join("tied"), &init(&base)?, &plain)?;
    let full = Config {
        num_key_value_heads: 2,
        qkv_bias: true,
        output_bias: true,
        mlp_bias: true,
        tie_word_embeddings: false,
        eos_token_ids: vec![2, 3],
        ..base.clone()
    };
    let sharded = SaveOptions {
        max_shard_bytes: 100_000,
        ..plain
    };
    write(&out.join("biases-untied-sharded"), &init(&full)?, &sharded)?;
    let linear = Config {
        rope_scaling: RopeScaling::Linear { factor: 2.0 },
        ..base.clone()
    };
    write(&out.join("rope-linear"), &init(&linear)?, &plain)?;
    let llama3 = Config {
        rope_scaling: RopeScaling::Llama3 {
            factor: 4.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64.0,
        },
        ..base.clone()
    };
    write(&out.join("rope-llama3"), &init(&llama3)?, &plain)?;
    let yarn = Config {
        rope_scaling: RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 1.2,
            original_max_position_embeddings: 64.0,
            truncate: true,
        },
        ..base.clone()
    };
    write(&out.join("rope-yarn"), &init(&yarn)?, &plain)?;
    for family in Family::ALL {
        let mut config = base.clone().in_family(family)?;
        // GPT-2 shares no heads; the others may.
        if family != Family::Gpt2 {
            config.num_key_value_heads = 2;
        }
        // Shorter than the texts.
        config.sliding_window = config.sliding_window.map(|_| 5);
        write(
            &out.join(format!("family-{}", family.model_type())),
            &init(&config)?,
            &plain,
        )?;
        // The adapter lies beside the base that it belongs to; the logits are those of both.
        let dir = out.join(format!("adapter-{}", family.model_type()));
        let adapter = AdapterConfig {
            dora: family == Family::Qwen3,
            rank_stabilized: family == Family::Gemma2,
            ..AdapterConfig::default()
        };
        let model = init(&config)?;
        model.save(&dir)?;
        let model = model.adapt(&adapter, 7)?;
        for (i, (_, t)) in model.parameters().into_iter().enumerate() {
            let _no_grad = tch::no_grad_guard();
            let wave = Tensor::arange(t.numel() as i64, (Kind::Float, Device::Cpu)) * 1.3;
            let _ = t
                .detach()
                .g_add_(&((wave + i as f64).sin() * 0.05).view_as(&t));
        }
        model.save_adapter(&dir.join("adapter"), None)?;
        write_json(&dir, "logits", &model.logits(&batch()?)?)?;
        let reward = ScalarModel::from_trunk(init(&config)?, 6)?;
        let dir = out.join(format!("reward-{}", family.model_type()));
        reward.save(&dir)?;
        write_json(&dir, "scores", &reward.scores(&batch()?)?)?;
    }
    let half = SaveOptions {
        kind: Some(Kind::BFloat16),
        ..plain
    };
    let dir = out.join("bf16");
    init(&base)?.save_with(&dir, &half)?;
    // What is compared is what was stored.
    write(
        &dir,
        &Transformer::load(&dir, &LoadOptions::default())?,
        &half,
    )?;

    let reward = ScalarModel::from_trunk(init(&full)?, 6)?;
    let dir = out.join("reward");
    reward.save(&dir)?;
    let scores = reward.scores(&batch()?)?;
    write_json(&dir, "scores", &scores)
}

fn write(dir: &Path, model: &Transformer, options: &SaveOptions) -> Result<()> {
    model.save_with(dir, options)?;
    let _no_grad = tch::no_grad_guard();
    write_json(dir, "logits", &model.logits(&batch()?)?)
}

const IDS: [[u32; 12]; 2] = [
    [1, 17, 42, 99, 3, 250, 8, 77, 310, 5, 64, 2],
    [1, 200, 7, 7, 7, 31, 155, 90, 12, 301, 44, 6],
];

fn batch() -> Result<DeviceBatch> {
    let groups: Vec<PromptGroup> = IDS
        .iter()
        .enumerate()
        .map(|(row, ids)| PromptGroup {
            row: row as u64,
            prompt: Vec::new(),
            completions: vec![Completion::whole(ids.to_vec(), Finish::Length)],
        })
        .collect();
    DeviceBatch::new(&PackedBatch::pack(&groups)?, Device::Cpu)
}

fn write_json(dir: &Path, key: &str, values: &Tensor) -> Result<()> {
    let values = Vec::<f64>::try_from(values.detach().to_kind(Kind::Double).reshape([-1]))?;
    let json = serde_json::json!({"ids": IDS, key: values});
    let path = dir.join("rlhf_logits.json");
    std::fs::write(&path, json.to_string()).map_err(|source| rlhf_model::Error::Io {
        path: path.clone(),
        source,
    })?;
    println!("{}", dir.display());
    Ok(())
}
