//! Model folders with outputs of `transformers`: logits, log-probs, loss, gradients, greedy text.

use std::path::{Path, PathBuf};

use rlhf_model::{
    CausalLm, Family, GenerateLimits, GenerateRequest, SamplingConfig, Transformer, generate,
    target_logprobs,
};
use tch::{Kind, Tensor};

use crate::support::{batch, max_diff, on_device, own, plain, relative_diff, shared, tensors};

/// The folders to run: the crate's own, and those of `RLHF_MODELS` or else the shared ones.
fn folders() -> Vec<PathBuf> {
    let more = std::env::var_os("RLHF_MODELS")
        .map(PathBuf::from)
        .or_else(|| shared().map(|s| s.join("models")));
    if more.is_none() {
        eprintln!("shared models: skipped (none here)");
    }
    let mut all: Vec<PathBuf> = std::iter::once(own("models"))
        .chain(more)
        .flat_map(|root| {
            let list = std::fs::read_dir(&root);
            let list = list.unwrap_or_else(|e| panic!("{}: {e}", root.display()));
            list.map(|e| e.unwrap().path()).collect::<Vec<_>>()
        })
        .filter(|p| p.join("golden.safetensors").exists())
        .collect();
    all.sort_by_key(|p| p.file_name().map(std::ffi::OsStr::to_owned));
    all.dedup_by_key(|p| p.file_name().map(std::ffi::OsStr::to_owned));
    all
}

/// Runs `test` on every folder.
fn each(test: impl Fn(&Path, &Transformer)) {
    let mut families = Vec::new();
    for dir in folders() {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let model = Transformer::load(&dir, &on_device()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(model.notices(), &[] as &[String], "{name}");
        eprintln!("{name}:");
        test(&dir, &model);
        families.push(model.config().family);
    }
    eprintln!("{} models ran", families.len());
    for family in Family::ALL {
        assert!(families.contains(&family), "no model of {family:?}");
    }
}

/// The rows' ids without padding, and the columns that they stand in.
fn unpadded(
    golden: &std::collections::HashMap<String, Tensor>,
    side: &str,
) -> Vec<(Vec<u32>, Tensor)> {
    let ids = &golden[&format!("{side}.input_ids")];
    let mask = &golden[&format!("{side}.attention_mask")];
    (0..ids.size()[0])
        .map(|r| {
            let columns = mask.get(r).nonzero().squeeze_dim(1);
            let ids = Vec::<i64>::try_from(ids.get(r).index_select(0, &columns)).unwrap();
            (ids.iter().map(|&id| id as u32).collect(), columns)
        })
        .collect()
}

#[test]
fn logits_and_logprobs() {
    each(|dir, model| {
        let golden = tensors(&dir.join("golden.safetensors"));
        for side in ["right", "left"] {
            let rows = unpadded(&golden, side);
            let groups: Vec<_> = rows
                .iter()
                .enumerate()
                .map(|(i, (ids, _))| plain(i as u64, ids))
                .collect();
            let batch = batch(&groups);
            let _no_grad = tch::no_grad_guard();
            let logits = model.logits(&batch).unwrap();
            let logprobs = target_logprobs(model, &batch, 1.0, false).unwrap().logprobs;
            let (mut at, mut worst, mut worst_lp) = (0, 0.0_f64, 0.0_f64);
            for (r, (ids, columns)) in rows.iter().enumerate() {
                let n = ids.len() as i64;
                let wanted = golden[&format!("{side}.logits")]
                    .get(r as i64)
                    .index_select(0, columns);
                worst = worst.max(max_diff(&logits.narrow(0, at, n), &wanted));
                at += n;
                let lp = golden[&format!("{side}.token_logprobs")].get(r as i64);
                let wanted = lp.index_select(0, &columns.narrow(0, 0, n - 1));
                let offsets = batch.offsets.host();
                let got = logprobs.values().narrow(0, offsets[r], n - 1);
                worst_lp = worst_lp.max(max_diff(&got, &wanted));
            }
            eprintln!("  {side}: logits differ by {worst:.1e}, log-probs by {worst_lp:.1e}");
            assert!(worst <= 1e-4 && worst_lp <= 1e-4);
        }
    });
}

#[test]
fn loss_and_gradients() {
    let ran = std::cell::Cell::new(0);
    each(|dir, model| {
        let golden = tensors(&dir.join("golden.safetensors"));
        let Some(loss) = golden.get("right.loss") else {
            eprintln!("  no loss in this folder");
            return;
        };
        ran.set(ran.get() + 1);
        let rows = unpadded(&golden, "right");
        let groups: Vec<_> = rows
            .iter()
            .enumerate()
            .map(|(i, (ids, _))| plain(i as u64, ids))
            .collect();
        let batch = batch(&groups);
        let logprobs = target_logprobs(model, &batch, 1.0, false).unwrap().logprobs;
        let ours = -logprobs.values().mean(None::<Kind>);
        let difference = max_diff(&ours.view(1), loss);
        ours.backward();
        let (mut worst, mut checked) = (0.0_f64, 0);
        for (name, t) in model.parameters() {
            let Some(norm) = golden.get(&format!("grad_norm.{name}")) else {
                panic!("no gradient norm of {name}")
            };
            worst = worst.max(relative_diff(&t.grad().norm().view(1), norm));
            checked += 1;
            if let Some(full) = golden.get(&format!("grad.{name}")) {
                let d = relative_diff(&t.grad(), full);
                eprintln!("  full gradient of {name} differs by {d:.1e}");
                assert!(d <= 1e-4);
            }
        }
        eprintln!("  loss differs by {difference:.1e}, {checked} gradient norms by {worst:.1e}");
        assert!(difference <= 1e-5 && worst <= 1e-4);
        let norms = golden
            .keys()
            .filter(|k| k.starts_with("grad_norm."))
            .count();
        assert_eq!(checked, norms, "every parameter of the file is one of ours");
    });
    assert!(ran.get() > 0, "no folder had gradients");
}

#[test]
fn greedy_text() {
    each(|dir, model| {
        let golden = tensors(&dir.join("golden.safetensors"));
        let rows = unpadded(&golden, "left");
        let requests: Vec<_> = rows
            .iter()
            .enumerate()
            .map(|(i, (ids, _))| GenerateRequest {
                prompt: ids.clone(),
                prompt_key: i as u64,
                samples: 1,
                max_new_tokens: None,
            })
            .collect();
        for (key, honoured) in [
            ("greedy.output_ids", false),
            ("greedy.output_ids_eos_honoured", true),
        ] {
            let Some(wanted) = golden.get(key) else {
                eprintln!("  no {key} in this folder");
                continue;
            };
            // With the end honoured, columns stop once all rows ended.
            let max = golden["greedy.output_ids"].size()[1] as usize;
            let eos = model.config().eos_token_ids.clone();
            let config = SamplingConfig {
                temperature: 0.0,
                max_new_tokens: max,
                min_new_tokens: if honoured { 0 } else { max },
                eos_ids: eos.clone(),
                ..SamplingConfig::default()
            };
            let limits = GenerateLimits::default();
            let out = generate(model, &requests, &config, &limits, &mut |_| {}).unwrap();
            for (r, group) in out.iter().enumerate() {
                let wanted = Vec::<i64>::try_from(wanted.get(r as i64)).unwrap();
                let wanted: Vec<u32> = wanted.iter().map(|&id| id as u32).collect();
                let ids = &group.completions[0].ids;
                assert_eq!(ids[..], wanted[..ids.len()], "{key}, row {r}");
                let ended = ids.last().is_some_and(|id| eos.contains(id));
                // What follows an end is padding.
                assert!(
                    ended || ids.len() == wanted.len().max(max),
                    "{key}, row {r}"
                );
                assert!(!ended || honoured);
            }
            eprintln!("  {key}: {} rows identical", out.len());
        }
    });
}
