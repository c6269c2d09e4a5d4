//! Damaged and hostile model folders: each gives its error, quickly.

use std::path::Path;

use rlhf_model::{
    Error, GenerateLimits, GenerateRequest, LoadOptions, SamplingConfig, Transformer, generate,
};

use crate::support::{batch, plain, shared, small};

fn load(dir: &Path) -> Result<Transformer, Error> {
    Transformer::load(dir, &LoadOptions::default())
}

#[test]
fn shared_bad_models() {
    let Some(root) = shared().map(|s| s.join("bad/model")).filter(|p| p.exists()) else {
        eprintln!("skipped: no shared bad models here");
        return;
    };
    // Case, and what its message must say; all messages name a file.
    let refused: [(&str, &[&str]); 25] = [
        ("st_truncated_header", &["model.safetensors", "truncated"]),
        (
            "st_truncated_data",
            &["model.safetensors", "beyond the file"],
        ),
        (
            "st_absurd_header_len",
            &["model.safetensors", "header length"],
        ),
        (
            "st_overlapping_offsets",
            &["model.safetensors", "shares bytes"],
        ),
        (
            "st_offset_past_end",
            &["model.safetensors", "beyond the file"],
        ),
        (
            "st_shape_times_dtype_wrong",
            &["model.safetensors", "bytes"],
        ),
        ("st_shape_overflow", &["model.safetensors", "overflow"]),
        ("st_unknown_dtype", &["model.safetensors", "Q7"]),
        (
            "st_missing_tensor",
            &[
                "model.safetensors",
                "missing model.layers.0.mlp.up_proj.weight",
            ],
        ),
        (
            "st_wrong_shape",
            &["model.safetensors", "k_proj", "[16, 16]", "[8, 16]"],
        ),
        (
            "st_wrong_dtype_int",
            &["model.safetensors", "embed_tokens", "I64"],
        ),
        ("st_empty", &["model.safetensors", "empty"]),
        ("st_is_lfs_pointer", &["model.safetensors", "Git LFS"]),
        ("st_missing_file", &["model.safetensors"]),
        (
            "st_index_missing_shard",
            &["model-00002-of-00002.safetensors"],
        ),
        (
            "st_index_path_escape",
            &["model.safetensors.index.json", "plain file name"],
        ),
        (
            "cfg_unsupported_arch",
            &["config.json", "MambaForCausalLM", "LlamaForCausalLM"],
        ),
        (
            "cfg_heads_not_divisible",
            &["config.json", "num_attention_heads", "not divisible"],
        ),
        ("cfg_zero_heads", &["config.json", "num_attention_heads"]),
        (
            "cfg_negative_layers",
            &["config.json", "num_hidden_layers", "-1"],
        ),
        (
            "cfg_huge_layers",
            &["config.json", "num_hidden_layers", "1000000000"],
        ),
        ("cfg_unknown_rope", &["config.json", "warp"]),
        ("cfg_unknown_act", &["config.json", "swoosh"]),
        (
            "cfg_missing_hidden_size",
            &["config.json", "hidden_size", "missing"],
        ),
        ("cfg_not_json", &["config.json", "line 1"]),
    ];
    let mut seen = 0;
    for (case, words) in refused {
        let e = load(&root.join(case)).expect_err(case).to_string();
        eprintln!("{case}: {e}");
        assert!(!e.contains('\n'), "{case}: more than a line");
        for word in words {
            assert!(e.contains(word), "{case}: {word:?} is not in: {e}");
        }
        seen += 1;
    }
    for (case, notice) in [
        ("ok_control", None),
        ("st_f64_weights", None),
        ("st_extra_tensor", Some("is not used")),
    ] {
        let model = load(&root.join(case)).unwrap();
        assert_eq!(
            model.notices().len(),
            usize::from(notice.is_some()),
            "{case}"
        );
        assert!(
            notice.is_none_or(|n| model.notices()[0].contains(n)),
            "{case}"
        );
        let logits = model.logits(&batch(&[plain(0, &[1, 2, 3])])).unwrap();
        assert!(bool::try_from(logits.isfinite().all()).unwrap(), "{case}");
        seen += 1;
    }
    let model = load(&root.join("st_nan_weights")).unwrap();
    for temperature in [0.0, 1.0] {
        let e = complete(&model, temperature).unwrap_err().to_string();
        assert!(e.contains("non-finite"), "{e}");
    }
    seen += 1;
    let present = std::fs::read_dir(&root)
        .unwrap()
        .filter(|e| {
            let name = e.as_ref().unwrap().file_name().into_string().unwrap();
            name.starts_with("st_") || name.starts_with("cfg_") || name == "ok_control"
        })
        .count();
    eprintln!("{seen} of {present} cases ran");
    assert_eq!(seen, present, "a case of the folder is not in this test");
}

fn complete(model: &Transformer, temperature: f64) -> Result<(), Error> {
    let request = GenerateRequest {
        prompt: vec![1, 2],
        prompt_key: 0,
        samples: 2,
        max_new_tokens: None,
    };
    let config = SamplingConfig {
        temperature,
        max_new_tokens: 4,
        ..SamplingConfig::default()
    };
    generate(
        model,
        &[request],
        &config,
        &GenerateLimits::default(),
        &mut |_| {},
    )
    .map(|_| ())
}

#[test]
fn every_disagreement_is_listed() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("m");
    small(tch::Kind::Float).save(&dir).unwrap();
    let path = dir.join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["num_hidden_layers"] = 3.into();
    json["intermediate_size"] = 65.into();
    std::fs::write(&path, json.to_string()).unwrap();
    let e = load(&dir).unwrap_err();
    let Error::Tensors { problems, .. } = &e else {
        panic!("{e}")
    };
    // Layers 0 and 1: gate and up with bias, down's weight; layer 2: 2 norms, 7 matrices, 7 biases.
    assert_eq!(problems.len(), 2 * 5 + 16, "{e}");
    assert!(
        e.to_string()
            .contains("missing model.layers.2.self_attn.k_proj.bias")
    );
    // With a layer too few what is left over is listed beside what is misshapen.
    json["num_hidden_layers"] = 1.into();
    std::fs::write(&path, json.to_string()).unwrap();
    let fewer = load(&dir).unwrap_err().to_string();
    assert!(fewer.contains("unexpected model.layers.1.self_attn.k_proj.weight"));
    assert!(
        e.to_string()
            .contains("model.layers.1.mlp.down_proj.weight has shape [24, 64]")
    );
}

#[test]
fn a_failed_save_leaves_the_old_folder() {
    let dir = tempfile::tempdir().unwrap();
    let model = small(tch::Kind::Float);
    let target = dir.path().join("m");
    model.save(&target).unwrap();
    let before = std::fs::read(target.join("model.safetensors")).unwrap();
    // A file where the parent folder should be: nothing can be written there.
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let e = model.save(&file.join("m")).unwrap_err();
    assert!(matches!(e, Error::Io { .. }), "{e}");
    assert_eq!(
        std::fs::read(target.join("model.safetensors")).unwrap(),
        before
    );
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        2,
        "nothing is left over"
    );
}
