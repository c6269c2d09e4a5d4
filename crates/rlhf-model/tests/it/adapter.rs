//! Adapters: against PEFT's own numbers, against finite differences, against the merged weights; and
//! what frozen, eight-bit and recomputed layers may not change.

use std::path::{Path, PathBuf};

use rlhf_model::{
    AdapterConfig, CausalLm, Config, DeviceBatch, Family, GenerateLimits, GenerateRequest,
    LoadOptions, SamplingConfig, ScalarModel, Transformer, generate, target_logprobs,
};
use tch::{Kind, Tensor};

use crate::device::{device, from_slice};
use crate::support::{
    batch, group, max_diff, on_device, own, plain, relative_diff, small, tensors,
};

const ALL: [(&str, &str); 5] = [
    ("lora", "tiny-mistral"),
    ("rslora", "tiny-phi3"),
    ("dora", "tiny-qwen3"),
    ("transposed", "tiny-gpt2"),
    ("transposed-dora", "tiny-gpt2"),
];

fn load(base: &str) -> Transformer {
    Transformer::load(&own("models").join(base), &on_device()).unwrap()
}

fn folder(name: &str) -> PathBuf {
    own("adapters").join(name)
}

fn rows(golden: &Tensor) -> DeviceBatch {
    let groups: Vec<_> = (0..golden.size()[0])
        .map(|r| {
            let ids = Vec::<i64>::try_from(golden.get(r)).unwrap();
            plain(
                r as u64,
                &ids.iter().map(|&id| id as u32).collect::<Vec<_>>(),
            )
        })
        .collect();
    batch(&groups)
}

fn logits(model: &Transformer, batch: &DeviceBatch) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    model.logits(batch).unwrap()
}

fn loss(model: &dyn CausalLm, batch: &DeviceBatch) -> Tensor {
    let logprobs = target_logprobs(model, batch, 1.0, false).unwrap().logprobs;
    -logprobs.values().mean(None::<Kind>)
}

/// A little text with a shared prompt.
fn text() -> DeviceBatch {
    batch(&[
        group(0, &[3, 9, 4], &[&[7, 8, 2], &[5, 30]]),
        group(1, &[], &[&[1, 2, 3, 4, 5]]),
    ])
}

/// Moves an adapter off its start, where it changes nothing.
fn shake(model: &Transformer) {
    let _no_grad = tch::no_grad_guard();
    for (i, (_, t)) in model.parameters().into_iter().enumerate() {
        let wave = Tensor::arange(t.numel() as i64, (Kind::Double, device())) * 1.3 + i as f64;
        let _ = t
            .detach()
            .g_add_(&(wave.sin() * 0.1).view_as(&t).to_kind(t.kind()));
    }
}

#[test]
fn peft_agrees() {
    for (name, base) in ALL {
        let golden = tensors(&folder(name).join("golden.safetensors"));
        let model = load(base).load_adapter(&folder(name)).unwrap();
        let batch = rows(&golden["ids"]);
        let wanted = golden["logits"].flatten(0, 1);
        let difference = max_diff(&logits(&model, &batch), &wanted);
        loss(&model, &batch).backward();
        let (mut worst, mut count) = (0.0_f64, 0);
        for (name, t) in model.parameters() {
            worst = worst.max(relative_diff(&t.grad(), &golden[&format!("grad.{name}")]));
            count += 1;
        }
        eprintln!("{name}: logits differ by {difference:.1e}, {count} gradients by {worst:.1e}");
        assert!(difference <= 2e-5 && worst <= 1e-4);
        assert_eq!(
            golden.len(),
            count + 2,
            "every gradient of the file is one of ours"
        );
        let merged = model.merged().unwrap();
        assert!(max_diff(&logits(&merged, &batch), &wanted) <= 2e-5);
    }
}

#[test]
fn a_fresh_adapter_changes_nothing_and_is_all_that_is_trained() {
    for dora in [false, true] {
        let plain = small(Kind::Double);
        let before = logits(&plain, &text());
        let config = AdapterConfig {
            rank: 3,
            dora,
            ..AdapterConfig::default()
        };
        let model = plain.adapt(&config, 1).unwrap();
        assert!(max_diff(&logits(&model, &text()), &before) < 1e-12);
        loss(&model, &text()).backward();
        // Two layers of seven matrices.
        assert_eq!(model.parameters().len(), 14 * if dora { 3 } else { 2 });
        assert!(model.parameters().iter().all(|(_, t)| t.grad().defined()));
        let base = model.base().unwrap();
        for (name, t) in base.parameters() {
            assert!(!t.requires_grad() && !t.grad().defined(), "{name}");
        }
        // A step of the adapter leaves the reference alone, for it is the same memory, unmoved.
        shake(&model);
        assert!(max_diff(&logits(&model, &text()), &before) > 1e-3);
        assert_eq!(max_diff(&logits(&base, &text()), &before), 0.0);
        let (a, b) = (base.parameters(), model.base().unwrap().parameters());
        assert!(
            a.iter()
                .zip(&b)
                .all(|((_, a), (_, b))| a.data_ptr() == b.data_ptr())
        );
    }
}

/// d loss / dA and dB by differences. DoRA's norm counts as a constant, so there only the magnitude
/// has a plain derivative.
#[test]
fn gradients_are_the_differences() {
    for dora in [false, true] {
        let config = AdapterConfig {
            rank: 2,
            dora,
            rank_stabilized: true,
            targets: vec!["v_proj".into(), "down_proj".into()],
            ..AdapterConfig::default()
        };
        let model = small(Kind::Double).adapt(&config, 1).unwrap();
        shake(&model);
        loss(&model, &text()).backward();
        let _no_grad = tch::no_grad_guard();
        let mut checked = 0;
        for (name, t) in model.parameters() {
            if dora != name.ends_with("magnitude_vector") {
                continue;
            }
            for at in [0, t.numel() as i64 / 2, t.numel() as i64 - 1] {
                let mut cell = t.detach().view(-1).narrow(0, at, 1);
                let value = |cell: &mut Tensor, by: f64| {
                    let _ = cell.g_add_scalar_(by);
                    let y = loss(&model, &text()).double_value(&[]);
                    let _ = cell.g_add_scalar_(-by);
                    y
                };
                let slope = (value(&mut cell, 1e-5) - value(&mut cell, -1e-5)) / 2e-5;
                let ours = t.grad().view(-1).double_value(&[at]);
                assert!(
                    (slope - ours).abs() < 1e-7 * (1.0 + slope.abs()),
                    "{name}[{at}]: {ours} is not {slope}"
                );
                checked += 1;
            }
        }
        assert!(checked >= 12);
    }
}

#[test]
fn folders_travel_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let config = AdapterConfig {
        rank: 3,
        alpha: 5.0,
        dora: true,
        rank_stabilized: true,
        targets: vec!["o_proj".into(), "gate_proj".into()],
    };
    let model = small(Kind::Float).adapt(&config, 1).unwrap();
    shake(&model);
    let ours = logits(&model, &text());
    model.save_adapter(dir.path(), Some("some/base")).unwrap();
    // The weights of a model in the same folder stay.
    model
        .base()
        .unwrap()
        .save(&dir.path().join("base"))
        .unwrap();
    model.save_adapter(&dir.path().join("base"), None).unwrap();
    let again = Transformer::load(&dir.path().join("base"), &on_device())
        .unwrap()
        .load_adapter(dir.path())
        .unwrap();
    assert_eq!(again.adapter(), Some(&config));
    assert_eq!(max_diff(&logits(&again, &text()), &ours), 0.0);
    // Saved whole, it is merged.
    model.save(&dir.path().join("merged")).unwrap();
    let merged = Transformer::load(&dir.path().join("merged"), &on_device()).unwrap();
    assert!(merged.adapter().is_none());
    assert!(max_diff(&logits(&merged, &text()), &ours) < 1e-5);
    // A copy has an adapter of its own on the same weights.
    let copy = model.duplicate().unwrap();
    shake(&model);
    assert_eq!(max_diff(&logits(&copy, &text()), &ours), 0.0);
    copy.copy_from(&model).unwrap();
    assert_eq!(
        max_diff(&logits(&copy, &text()), &logits(&model, &text())),
        0.0
    );
}

/// The sampler works on merged copies: its log-probs are the model's.
#[test]
fn generation_is_the_adapted_model() {
    let config = AdapterConfig::default();
    let model = small(Kind::Double).adapt(&config, 1).unwrap();
    shake(&model);
    let request = GenerateRequest {
        prompt: vec![3, 9, 4],
        prompt_key: 0,
        samples: 2,
        max_new_tokens: None,
    };
    let sampling = SamplingConfig {
        max_new_tokens: 6,
        ..SamplingConfig::default()
    };
    let limits = GenerateLimits::default();
    let groups = generate(&model, &[request], &sampling, &limits, &mut |_| {}).unwrap();
    let ours = target_logprobs(&model, &batch(&groups), 1.0, false).unwrap();
    let drawn: Vec<f64> = groups[0]
        .completions
        .iter()
        .flat_map(|c| c.sampler.as_ref().unwrap().logprobs.iter())
        .map(|&x| f64::from(x))
        .collect();
    let wanted = from_slice(&drawn);
    assert!(max_diff(ours.logprobs.values(), &wanted) < 1e-6);
}

/// Eight bits: every weight within 1/254 of its row's largest; gradients are those of the widened
/// weights; what is saved is widened.
#[test]
fn eight_bits_are_as_exact_as_promised() {
    for family in [Family::Llama, Family::Gpt2] {
        let mut config = Config::new(40, 24, 2, 4, 64).in_family(family).unwrap();
        config.initializer_range = 0.3;
        let float = Transformer::init(config, 3, device(), Kind::Float).unwrap();
        let exact = logits(&float, &text());
        let dir = tempfile::tempdir().unwrap();
        let int8 = float.duplicate().unwrap().into_int8().unwrap();
        int8.save(dir.path()).unwrap();
        let wide = Transformer::load(dir.path(), &on_device()).unwrap();
        for ((name, a), (_, b)) in float.parameters().iter().zip(wide.parameters()) {
            // Rows of the matrix as it multiplies: columns of GPT-2's.
            let along = if family == Family::Gpt2 { 0 } else { 1 };
            if a.dim() == 2 {
                let bound = a.abs().amax([along], true) / 254.0 * 1.0001;
                assert!(
                    ((a - b).abs() - bound).max().double_value(&[]) <= 0.0,
                    "{name}"
                );
            }
        }
        assert!(max_diff(&logits(&int8, &text()), &logits(&wide, &text())) < 1e-5);
        let relative = relative_diff(&logits(&int8, &text()), &exact);
        eprintln!("{family:?}: eight bits move logits by {relative:.1e} of the largest");
        assert!(relative < 0.1);
        let adapter = AdapterConfig {
            rank: 2,
            ..AdapterConfig::default()
        };
        let (a, b) = (
            int8.adapt(&adapter, 1).unwrap(),
            wide.adapt(&adapter, 1).unwrap(),
        );
        for model in [&a, &b] {
            shake(model);
            loss(model, &text()).backward();
        }
        for ((name, a), (_, b)) in a.parameters().iter().zip(b.parameters()) {
            assert!(relative_diff(&a.grad(), &b.grad()) < 1e-4, "{name}");
        }
    }
}

/// Layers that are run again give the same loss and the same gradients, adapted or not.
#[test]
fn recomputed_layers_change_nothing() {
    let gradients = |model: &dyn CausalLm| {
        loss(model, &text()).backward();
        let list = model.parameters();
        list.into_iter()
            .map(|(n, t)| (n, t.grad().copy()))
            .collect::<Vec<_>>()
    };
    for adapted in [false, true] {
        let make = |every| {
            let mut model = small(Kind::Double);
            if adapted {
                model = model.adapt(&AdapterConfig::default(), 1).unwrap();
                shake(&model);
            }
            model.set_recompute(every);
            model
        };
        let wanted = gradients(&make(0));
        for every in [1, 2, 5] {
            let got = gradients(&make(every));
            assert_eq!(wanted.len(), got.len());
            for ((name, a), (_, b)) in wanted.iter().zip(&got) {
                assert!(max_diff(a, b) < 1e-14, "{name}");
            }
        }
    }
}

/// Hidden states of some rows alone, a row twice and out of order, are those of all rows: with their gradients, in
/// every family, and with layers that are run again.
#[test]
fn rows_alone_are_the_rows_of_all() {
    let folders = std::fs::read_dir(own("models")).unwrap();
    let mut models: Vec<Transformer> = folders
        .map(|folder| Transformer::load(&folder.unwrap().path(), &on_device()).unwrap())
        .collect();
    assert!(models.len() >= 13);
    models.push(small(Kind::Float));
    let (b, rows) = (text(), from_slice(&[3i64, 0, 5, 3]));
    for model in &mut models {
        let run = |model: &Transformer, alone: bool| {
            let hidden = if alone {
                model.hidden_at(&b, &rows).unwrap()
            } else {
                model.hidden(&b).unwrap().index_select(0, &rows)
            };
            let head = model.lm_head();
            hidden
                .linear(&head, None::<Tensor>)
                .sin()
                .sum(Kind::Float)
                .backward();
            let grads = model.parameters().into_iter().map(|(n, mut t)| {
                let grad = t.grad().copy();
                t.zero_grad();
                (n, grad)
            });
            (hidden.detach(), grads.collect::<Vec<_>>())
        };
        for every in [0, 1] {
            model.set_recompute(every);
            let (wanted, got) = (run(model, false), run(model, true));
            assert!(relative_diff(&wanted.0, &got.0) < 1e-5);
            for ((name, a), (_, b)) in wanted.1.iter().zip(&got.1) {
                assert!(relative_diff(a, b) < 1e-4, "{name}");
            }
        }
        let outside = from_slice(&[b.token_ids.size()[0]]);
        model.hidden_at(&b, &outside).unwrap_err();
    }
}

#[test]
fn reward_models_take_adapters() {
    let model = small(Kind::Double)
        .adapt(&AdapterConfig::default(), 1)
        .unwrap();
    let reward = ScalarModel::from_trunk(model, 2).unwrap();
    let names: Vec<String> = reward.parameters().into_iter().map(|(n, _)| n).collect();
    assert_eq!(names.len(), 29);
    assert_eq!(names[28], "score.weight");
    reward.scores(&text()).unwrap().sum(None::<Kind>).backward();
    assert!(reward.parameters()[28].1.grad().defined());
    let dir = tempfile::tempdir().unwrap();
    reward.save(dir.path()).unwrap();
    let wide = LoadOptions {
        kind: Kind::Double,
        ..on_device()
    };
    let again = ScalarModel::load(dir.path(), &wide).unwrap();
    let scores = |m: &ScalarModel| m.scores(&text()).unwrap().detach();
    assert!(max_diff(&scores(&reward), &scores(&again)) < 1e-12);
}

#[test]
fn what_does_not_fit_is_named() {
    let copy = |to: &Path| {
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(folder("lora").join(name), to.join(name)).unwrap();
        }
    };
    let text_of = |dir: &Path| match load("tiny-mistral").load_adapter(dir) {
        Ok(_) => panic!("loaded"),
        Err(e) => e.to_string(),
    };
    let dir = tempfile::tempdir().unwrap();
    assert!(text_of(dir.path()).contains("adapter_config.json"));
    for (from, to, expect) in [
        ("\"r\": 4", "\"r\": 5", "lora_A"),
        ("\"r\": 4", "\"r\": 0", "r: 0 is not a rank"),
        ("\"LORA\"", "\"IA3\"", "supported: LORA"),
        ("\"bias\": \"none\"", "\"bias\": \"all\"", "bias: only none"),
        (
            "\"v_proj\"",
            "\"w_proj\"",
            "no matrix is called w_proj; there are down_proj",
        ),
        ("\"v_proj\"", "\"k_proj\"", "k_proj.lora_A.weight"),
        (
            "\"modules_to_save\": null",
            "\"modules_to_save\": [\"lm_head\"]",
            "modules_to_save",
        ),
        (
            "\"use_dora\": false",
            "\"use_dora\": true",
            "lora_magnitude_vector",
        ),
    ] {
        copy(dir.path());
        let file = dir.path().join("adapter_config.json");
        let json = std::fs::read_to_string(&file).unwrap();
        assert!(json.contains(from), "{from}");
        std::fs::write(&file, json.replace(from, to)).unwrap();
        let message = text_of(dir.path());
        assert!(message.contains(expect), "{message}");
    }
    // Fewer targets than the file has tensors for.
    copy(dir.path());
    let file = dir.path().join("adapter_config.json");
    let json = std::fs::read_to_string(&file).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&json).unwrap();
    json["target_modules"] = serde_json::json!(["v_proj"]);
    std::fs::write(&file, json.to_string()).unwrap();
    let message = text_of(dir.path());
    assert!(
        message.contains("q_proj.lora_A.weight belongs to no matrix"),
        "{message}"
    );

    let bad = |config: AdapterConfig| {
        small(Kind::Float)
            .adapt(&config, 0)
            .unwrap_err()
            .to_string()
    };
    let default = AdapterConfig::default;
    assert!(
        bad(AdapterConfig {
            rank: 0,
            ..default()
        })
        .contains("rank is 0")
    );
    assert!(
        bad(AdapterConfig {
            alpha: f64::NAN,
            ..default()
        })
        .contains("alpha is NaN")
    );
    assert!(small(Kind::Float).save_adapter(dir.path(), None).is_err());
}
