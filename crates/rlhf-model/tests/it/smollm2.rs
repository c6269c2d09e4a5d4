//! SmolLM2-135M-Instruct from its GGUF: byte-identical files, and `transformers`' own text.
//!
//! `RLHF_SMOLLM2` names a folder with the GGUF, or with the imported Hugging Face files.

use std::path::{Path, PathBuf};

use rlhf_model::weights::gguf::import;
use rlhf_model::{
    GenerateLimits, GenerateRequest, SamplingConfig, Transformer, generate, target_logprobs,
};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tch::Kind;

use crate::support::{batch, on_device, plain, shared};

fn sha256(path: &Path) -> String {
    let digest = Sha256::digest(std::fs::read(path).unwrap());
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

fn numbers(v: &Value) -> Vec<f64> {
    v.as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_f64().unwrap())
        .collect()
}

fn ids(v: &Value) -> Vec<u32> {
    numbers(v).into_iter().map(|x| x as u32).collect()
}

#[test]
fn smollm2() {
    let Some(dir) = std::env::var_os("RLHF_SMOLLM2").map(PathBuf::from) else {
        eprintln!("skipped: RLHF_SMOLLM2 names no folder");
        return;
    };
    let Some(golden) = shared()
        .map(|s| s.join("models/smollm2_golden.json"))
        .filter(|p| p.exists())
    else {
        eprintln!("skipped: no shared models here");
        return;
    };
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(golden).unwrap()).unwrap();
    let gguf = std::fs::read_dir(&dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.extension().is_some_and(|e| e == "gguf"));
    let work = tempfile::tempdir().unwrap();
    let dir = match gguf {
        None => dir,
        Some(file) => {
            let out = work.path().join("hf");
            eprintln!("{:?}", import(&file, &out, Kind::BFloat16).unwrap());
            out
        }
    };
    for (name, hash) in golden["sha256"].as_object().unwrap() {
        assert_eq!(sha256(&dir.join(name)), *hash.as_str().unwrap(), "{name}");
    }
    let model = Transformer::load(&dir, &on_device()).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let prompt = ids(&case["prompt_ids"]);
        let greedy = ids(&case["greedy_ids"]);
        let request = GenerateRequest {
            prompt: prompt.clone(),
            prompt_key: 0,
            samples: 1,
            max_new_tokens: None,
        };
        let config = SamplingConfig {
            temperature: 0.0,
            max_new_tokens: greedy.len(),
            eos_ids: model.config().eos_token_ids.clone(),
            ..SamplingConfig::default()
        };
        let out = generate(
            &model,
            &[request],
            &config,
            &GenerateLimits::default(),
            &mut |_| {},
        );
        assert_eq!(
            out.unwrap()[0].completions[0].ids,
            greedy,
            "{}",
            case["prompt"]
        );
        let _no_grad = tch::no_grad_guard();
        let logits = model.logits(&batch(&[plain(0, &prompt)])).unwrap();
        let last = logits.get(prompt.len() as i64 - 1);
        for (id, wanted) in ids(&case["last_position_top10_ids"])
            .iter()
            .zip(numbers(&case["last_position_top10_logits"]))
        {
            let got = last.double_value(&[i64::from(*id)]);
            assert!((got - wanted).abs() < 2e-3, "{got} {wanted}");
        }
        let whole: Vec<u32> = prompt.iter().chain(&greedy).copied().collect();
        let wanted = numbers(&case["token_logprobs"]);
        let whole = &whole[..=wanted.len()];
        let b = batch(&[plain(0, whole)]);
        let got = target_logprobs(&model, &b, 1.0, false).unwrap().logprobs;
        let got = Vec::<f64>::try_from(got.values().to_kind(Kind::Double)).unwrap();
        for (i, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
            assert!((got - wanted).abs() < 2e-3, "token {i}: {got} {wanted}");
        }
    }
    eprintln!("{} cases ran", golden["cases"].as_array().unwrap().len());
}
