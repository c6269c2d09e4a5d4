//! A GGUF made here, imported, and compared with the model it was made of.

use std::path::Path;

use rlhf_model::weights::gguf::{GgufFile, import};
use rlhf_model::{CausalLm, Config, LoadOptions, Transformer};
use tch::{Device, Kind, Tensor};

use crate::support::{batch, max_diff, plain};

/// A writer of just enough GGUF.
#[derive(Default)]
struct Gguf {
    meta: Vec<u8>,
    num_meta: u64,
    tensors: Vec<(String, Vec<i64>, Vec<u8>)>,
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

impl Gguf {
    fn put(&mut self, key: &str, code: u32, value: &[u8]) {
        self.meta
            .extend([&text(key)[..], &code.to_le_bytes(), value].concat());
        self.num_meta += 1;
    }

    fn unsigned(&mut self, key: &str, value: u32) {
        self.put(key, 4, &value.to_le_bytes());
    }

    fn float(&mut self, key: &str, value: f32) {
        self.put(key, 6, &value.to_le_bytes());
    }

    fn text(&mut self, key: &str, value: &str) {
        self.put(key, 8, &text(value));
    }

    fn texts(&mut self, key: &str, values: &[String]) {
        let mut list = [
            &8_u32.to_le_bytes()[..],
            &(values.len() as u64).to_le_bytes(),
        ]
        .concat();
        for v in values {
            list.extend(text(v));
        }
        self.put(key, 9, &list);
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3_u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend(self.num_meta.to_le_bytes());
        out.extend(&self.meta);
        let mut data = Vec::new();
        for (name, shape, bytes) in &self.tensors {
            out.extend(text(name));
            out.extend((shape.len() as u32).to_le_bytes());
            for d in shape.iter().rev() {
                out.extend(d.to_le_bytes());
            }
            out.extend(0_u32.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }
}

fn gguf_name(name: &str) -> String {
    let mut name = name.replace("model.layers.", "blk.");
    for (from, to) in [
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ] {
        name = name.replace(from, to);
    }
    name
}

/// Rows of halves to pairs: the inverse of what the import does.
fn pairs(t: &Tensor, heads: i64) -> Tensor {
    let s = t.size();
    t.view([heads, 2, s[0] / heads / 2, s[1]])
        .transpose(1, 2)
        .reshape(&s)
}

fn bytes_of(t: &Tensor) -> Vec<u8> {
    let values = Vec::<f32>::try_from(t.contiguous().view(-1)).unwrap();
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn model() -> Transformer {
    let mut config = Config::new(40, 24, 2, 4, 64);
    config.num_key_value_heads = 2;
    config.tie_word_embeddings = false;
    Transformer::init(config, 9, Device::Cpu, Kind::Float).unwrap()
}

fn gguf(model: &Transformer) -> Gguf {
    let mut g = Gguf::default();
    for (key, value) in [
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
    ] {
        g.text(key, value);
    }
    g.text("tokenizer.ggml.pre", "smollm");
    g.text("tokenizer.chat_template", "{{ messages }}");
    g.text("general.license", "made-here");
    let c = model.config();
    for (key, value) in [
        ("embedding_length", c.hidden_size),
        ("feed_forward_length", c.intermediate_size),
        ("block_count", c.num_hidden_layers),
        ("attention.head_count", c.num_attention_heads),
        ("attention.head_count_kv", c.num_key_value_heads),
        ("rope.dimension_count", c.head_dim),
        ("context_length", c.max_position_embeddings),
        ("vocab_size", c.vocab_size),
    ] {
        g.unsigned(&format!("llama.{key}"), value as u32);
    }
    g.float("llama.attention.layer_norm_rms_epsilon", 1e-5);
    g.float("llama.rope.freq_base", 10_000.0);
    for (i, key) in ["bos", "eos", "unknown", "padding"].into_iter().enumerate() {
        g.unsigned(&format!("tokenizer.ggml.{key}_token_id"), i as u32);
    }
    g.texts(
        "tokenizer.ggml.tokens",
        &(0..40).map(|i| format!("t{i}")).collect::<Vec<_>>(),
    );
    let mut kinds = [&5_u32.to_le_bytes()[..], &40_u64.to_le_bytes()].concat();
    for i in 0..40 {
        kinds.extend((if i < 4 { 3_i32 } else { 1 }).to_le_bytes());
    }
    g.put("tokenizer.ggml.token_type", 9, &kinds);
    g.texts("tokenizer.ggml.merges", &["t 1".to_owned()]);
    for (name, t) in model.parameters() {
        let t = t.detach();
        let stored = match () {
            () if name.contains("q_proj") => pairs(&t, c.num_attention_heads),
            () if name.contains("k_proj") => pairs(&t, c.num_key_value_heads),
            () => t.shallow_clone(),
        };
        g.tensors
            .push((gguf_name(&name), t.size(), bytes_of(&stored)));
    }
    g
}

fn read_json(path: &Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn an_imported_model_is_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    let model = model();
    std::fs::write(&file, gguf(&model).bytes()).unwrap();
    let out = dir.path().join("hf");
    let report = import(&file, &out, Kind::Float).unwrap();
    assert_eq!(
        (report.tensors, report.license.as_deref()),
        (21, Some("made-here"))
    );
    let loaded = Transformer::load(&out, &LoadOptions::default()).unwrap();
    for ((name, a), (_, b)) in model.parameters().iter().zip(&loaded.parameters()) {
        assert!(a.equal(b), "{name}");
    }
    let b = batch(&[plain(0, &[1, 2, 3, 4])]);
    assert!(max_diff(&model.logits(&b).unwrap(), &loaded.logits(&b).unwrap()) == 0.0);
    let text = std::fs::read_to_string(out.join("config.json")).unwrap();
    assert!(
        text.contains("\n \"rms_norm_eps\": 1e-05,\n \"rope_theta\": 10000.0,\n"),
        "{text}"
    );
    let tokenizer = read_json(&out.join("tokenizer.json"));
    assert_eq!(tokenizer["added_tokens"].as_array().unwrap().len(), 4);
    assert_eq!(tokenizer["model"]["vocab"]["t39"], 39);
    assert_eq!(
        read_json(&out.join("tokenizer_config.json"))["eos_token"],
        "t1"
    );
    // bf16 rounds to nearest even, as torch does.
    import(&file, &out, Kind::BFloat16).unwrap();
    let loaded = Transformer::load(&out, &LoadOptions::default()).unwrap();
    for ((name, a), (_, b)) in model.parameters().iter().zip(&loaded.parameters()) {
        assert!(
            a.to_kind(Kind::BFloat16).to_kind(Kind::Float).equal(b),
            "{name}"
        );
    }
}

#[test]
fn a_cut_file_is_refused_at_every_length() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    let whole = gguf(&model()).bytes();
    let step = (whole.len() / 200).max(1);
    for cut in (0..whole.len() - 32).step_by(step) {
        std::fs::write(&file, &whole[..cut]).unwrap();
        assert!(GgufFile::open(&file).is_err(), "cut at {cut}");
    }
    std::fs::write(&file, &whole).unwrap();
    let g = GgufFile::open(&file).unwrap();
    assert_eq!(g.tensors().count(), 21);
    assert_eq!(g.values("output_norm.weight").unwrap(), vec![1.0; 24]);
}

#[test]
fn flipped_bytes_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    let whole = gguf(&model()).bytes();
    // The metadata and the list of tensors are the first few kilobytes.
    for at in (0..5_000.min(whole.len())).step_by(7) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x81;
        std::fs::write(&file, &bytes).unwrap();
        if let Ok(g) = GgufFile::open(&file) {
            let names: Vec<String> = g.tensors().map(|(n, _)| n.to_owned()).collect();
            assert!(names.iter().all(|n| g.values(n).is_some()));
        }
    }
}

#[test]
fn what_would_import_wrongly_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    let refuse = |change: &dyn Fn(&mut Gguf), word: &str| {
        let mut g = gguf(&model());
        change(&mut g);
        std::fs::write(&file, g.bytes()).unwrap();
        let out = dir.path().join("out");
        let e = import(&file, &out, Kind::Float).unwrap_err().to_string();
        assert!(e.contains(word) && e.contains("m.gguf"), "{e}");
        assert!(!out.exists());
    };
    refuse(&|g| g.text("general.architecture", "mamba"), "mamba");
    refuse(&|g| g.text("tokenizer.ggml.pre", "other"), "other");
    refuse(&|g| g.text("llama.rope.scaling.type", "yarn"), "yarn");
    refuse(
        &|g| g.tensors[3].0 = "blk.0.mystery.weight".into(),
        "mystery",
    );
    refuse(&|g| g.unsigned("llama.attention.head_count", 5), "attn_q");
    refuse(&|g| g.unsigned("tokenizer.ggml.eos_token_id", 99), "99");
}
