//! What several test modules share.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_data::pack::PackedBatch;
use rlhf_model::{Config, DeviceBatch, LoadOptions, Transformer};
use tch::{Kind, Tensor};

use crate::device::device;

/// The crate's own copies under `tests/`.
pub(crate) fn own(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests")
        .join(name)
}

/// The folder of files shared beside the repository, where there is one.
pub(crate) fn shared() -> Option<PathBuf> {
    let dir = match std::env::var_os("RLHF_SHARED") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
    };
    dir.is_dir().then_some(dir)
}

/// f32 on the tests' device.
pub(crate) fn on_device() -> LoadOptions {
    LoadOptions {
        device: device(),
        ..LoadOptions::default()
    }
}

/// All tensors of a safetensors file, read by the format's own crate.
pub(crate) fn tensors(path: &Path) -> HashMap<String, Tensor> {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.tensors()
        .into_iter()
        .map(|(name, view)| {
            let kind = match view.dtype() {
                safetensors::Dtype::F32 => Kind::Float,
                safetensors::Dtype::F64 => Kind::Double,
                safetensors::Dtype::BF16 => Kind::BFloat16,
                safetensors::Dtype::I64 => Kind::Int64,
                safetensors::Dtype::BOOL => Kind::Bool,
                other => panic!("{other:?}"),
            };
            let shape: Vec<i64> = view.shape().iter().map(|&d| d as i64).collect();
            (
                name,
                Tensor::from_data_size(view.data(), &shape, kind).to_device(device()),
            )
        })
        .collect()
}

/// Largest absolute difference.
pub(crate) fn max_diff(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double))
        .abs()
        .max()
        .double_value(&[])
}

/// Largest absolute difference over the largest absolute value of `b`.
pub(crate) fn relative_diff(a: &Tensor, b: &Tensor) -> f64 {
    max_diff(a, b) / b.abs().max().double_value(&[]).max(1e-30)
}

/// A sequence without a prompt.
pub(crate) fn plain(row: u64, ids: &[u32]) -> PromptGroup {
    let completions = vec![Completion::whole(ids.to_vec(), Finish::Length)];
    PromptGroup {
        row,
        prompt: Vec::new(),
        completions,
    }
}

pub(crate) fn group(row: u64, prompt: &[u32], completions: &[&[u32]]) -> PromptGroup {
    PromptGroup {
        row,
        prompt: prompt.to_vec(),
        completions: completions
            .iter()
            .map(|ids| Completion::whole(ids.to_vec(), Finish::Length))
            .collect(),
    }
}

pub(crate) fn batch(groups: &[PromptGroup]) -> DeviceBatch {
    DeviceBatch::new(&PackedBatch::pack(groups).unwrap(), device()).unwrap()
}

/// A small random model with every feature of the family: grouped heads, biases, an untied head.
pub(crate) fn small(kind: Kind) -> Transformer {
    let mut config = Config::new(40, 24, 2, 4, 64);
    config.num_key_value_heads = 2;
    config.qkv_bias = true;
    config.output_bias = true;
    config.mlp_bias = true;
    config.tie_word_embeddings = false;
    config.initializer_range = 0.3;
    let model = Transformer::init(config, 7, device(), kind).unwrap();
    jitter(&model);
    model
}

/// Moves norms off one and biases off zero, so that a forgotten one shows.
fn jitter(model: &Transformer) {
    use rlhf_model::CausalLm;
    let _no_grad = tch::no_grad_guard();
    for (i, (_, t)) in model.parameters().into_iter().enumerate() {
        if t.dim() == 1 {
            let wave = Tensor::arange(t.size()[0], (t.kind(), t.device())) * 0.7 + i as f64;
            let _ = t.detach().g_add_(&(wave.sin() * 0.2));
        }
    }
}
