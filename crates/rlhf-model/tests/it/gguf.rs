//! A GGUF made here, imported, and compared with the model it was made of.

use std::collections::BTreeMap;
use std::path::Path;

use rlhf_model::weights::gguf::{GgufFile, import};
use rlhf_model::{CausalLm, Config, Family, RopeScaling, Transformer};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::device::device;
use crate::support::{batch, max_diff, on_device, own, plain};

/// A writer of just enough GGUF.
#[derive(Default)]
struct Gguf {
    meta: BTreeMap<String, Vec<u8>>,
    tensors: Vec<(String, Vec<i64>, Vec<u8>)>,
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

impl Gguf {
    fn put(&mut self, key: &str, code: u32, value: &[u8]) {
        let value = [&code.to_le_bytes(), value].concat();
        self.meta.insert(key.to_owned(), value);
    }

    fn tensor(&mut self, name: &str, t: &Tensor) {
        self.tensors.push((name.to_owned(), t.size(), bytes_of(t)));
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
        out.extend((self.meta.len() as u64).to_le_bytes());
        for (key, value) in &self.meta {
            out.extend(text(key));
            out.extend(value);
        }
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

/// What the `gguf` package calls the tensors of a tiny model.
fn names(model: &str) -> BTreeMap<String, String> {
    let table = std::fs::read_to_string(own("golden/gguf/names.json")).unwrap();
    let mut table: BTreeMap<String, BTreeMap<String, String>> =
        serde_json::from_str(&table).unwrap();
    table.remove(model).unwrap()
}

fn gguf_name(names: &BTreeMap<String, String>, name: &str) -> String {
    let layer = name.split('.').find(|s| s.parse::<u32>().is_ok());
    let Some(layer) = layer else {
        return names[name].clone();
    };
    let key = name.replace(&format!(".{layer}."), ".N.");
    names[&key].replace(".N.", &format!(".{layer}."))
}

/// Rows of halves to pairs: the inverse of what the import does.
fn pairs(t: &Tensor, heads: i64) -> Tensor {
    let s = t.size();
    t.reshape([heads, 2, s[0] / heads / 2, -1])
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
    Transformer::init(config, 9, device(), Kind::Float).unwrap()
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
    let names = names("llama");
    for (name, t) in model.parameters() {
        let t = t.detach();
        let stored = match () {
            () if name.contains("q_proj") => pairs(&t, c.num_attention_heads),
            () if name.contains("k_proj") => pairs(&t, c.num_key_value_heads),
            () => t.shallow_clone(),
        };
        g.tensor(&gguf_name(&names, &name), &stored);
    }
    g
}

fn read_json(path: &Path) -> Value {
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
    let loaded = Transformer::load(&out, &on_device()).unwrap();
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
    let loaded = Transformer::load(&out, &on_device()).unwrap();
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
    refuse(
        &|g| g.text("general.architecture", "mamba"),
        "\"mamba\" is not supported; supported: llama, qwen2, qwen3",
    );
    refuse(
        &|g| g.text("tokenizer.ggml.pre", "other"),
        "\"other\" is not supported; supported: smollm, gpt-2, llama-bpe, qwen2; put tokenizer.json",
    );
    refuse(
        &|g| g.text("tokenizer.ggml.model", "llama"),
        "put tokenizer.json",
    );
    refuse(
        &|g| g.text("llama.rope.scaling.type", "longrope"),
        "longrope",
    );
    refuse(
        &|g| g.tensors[3].0 = "blk.0.mystery.weight".into(),
        "mystery",
    );
    refuse(
        &|g| g.tensors[3].0 = "blk.9.attn_k.weight".into(),
        "tensor blk.9.attn_k.weight: the metadata has no place for it",
    );
    refuse(
        &|g| {
            g.tensors.remove(3);
            g.unsigned("llama.feed_forward_length", 65);
        },
        "up_proj.weight has shape [64, 24], the configuration says [65, 24]",
    );
    refuse(
        &|g| drop(g.tensors.remove(3)),
        "missing model.layers.0.self_attn.k_proj.weight",
    );
    refuse(
        &|g| g.unsigned("llama.attention.head_count", 5),
        "num_attention_heads",
    );
    refuse(
        &|g| g.unsigned("llama.vocab_size", 41),
        "41, but token_embd",
    );
    refuse(
        &|g| g.unsigned("llama.rope.dimension_count", 4),
        "4 of a head's 6",
    );
    refuse(
        &|g| g.unsigned("llama.attention.value_length", 8),
        "the keys' 6",
    );
    refuse(
        &|g| g.unsigned("llama.block_count", 1 << 30),
        "num_hidden_layers",
    );
    refuse(&|g| g.float("llama.logit_scale", 0.5), "llama.logit_scale");
    refuse(&|g| g.unsigned("split.count", 3), "one part of 3");
    refuse(&|g| g.unsigned("tokenizer.ggml.eos_token_id", 99), "99");
    refuse(
        &|g| {
            g.tensor(
                "rope_freqs.weight",
                &Tensor::from_slice(&[1.0_f32, 2.0, 3.0]),
            )
        },
        "rope_freqs.weight: only Llama 3's",
    );
}

/// Every format, and a header, as the `gguf` package writes them.
#[test]
fn blocks_decode_as_the_format_s_own_package_does() {
    let file = GgufFile::open(&own("golden/gguf/blocks.gguf")).unwrap();
    let names: Vec<&str> = file.tensors().map(|(name, _)| name).collect();
    let mut compared = 0;
    for name in names {
        let Some(wanted) = file.values(&format!("{name}.f32")) else {
            continue;
        };
        let got = file.values(name).unwrap();
        assert!(got.iter().any(|x| *x != 0.0) && got.len() == wanted.len());
        for (i, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
            let close = (got - wanted).abs() <= 1e-6 * wanted.abs().max(1e-3);
            assert!(close, "{name}, number {i}: {got} {wanted}");
        }
        compared += 1;
    }
    assert_eq!(compared, 10);
}

/// A copy of one of the tiny models with a changed configuration, loaded.
fn tiny(name: &str, change: &dyn Fn(&mut Value)) -> Transformer {
    let dir = tempfile::tempdir().unwrap();
    let from = own("models").join(name);
    let mut config = read_json(&from.join("config.json"));
    change(&mut config);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let weights = "model.safetensors";
    std::fs::copy(from.join(weights), dir.path().join(weights)).unwrap();
    Transformer::load(dir.path(), &on_device()).unwrap()
}

/// What llama.cpp's converter writes of a model: the keys that all architectures have, names by the
/// table, and numbers stored as it stores them.
fn converted(model: &Transformer, table: &str, arch: &str) -> Gguf {
    let c = model.config();
    let mut g = Gguf::default();
    g.text("general.architecture", arch);
    for (key, value) in [
        ("embedding_length", c.hidden_size),
        ("feed_forward_length", c.intermediate_size),
        ("block_count", c.num_hidden_layers),
        ("attention.head_count", c.num_attention_heads),
        ("context_length", c.max_position_embeddings),
    ] {
        g.unsigned(&format!("{arch}.{key}"), value as u32);
    }
    if c.family == Family::Gpt2 {
        g.float("gpt2.attention.layer_norm_epsilon", c.norm_eps as f32);
    } else {
        g.unsigned(
            &format!("{arch}.attention.head_count_kv"),
            c.num_key_value_heads as u32,
        );
        let rms = format!("{arch}.attention.layer_norm_rms_epsilon");
        g.float(&rms, c.norm_eps as f32);
        g.float(&format!("{arch}.rope.freq_base"), c.rope_theta as f32);
    }
    if !matches!(c.family, Family::Gpt2 | Family::Phi3) {
        g.unsigned(&format!("{arch}.attention.key_length"), c.head_dim as u32);
        g.unsigned(&format!("{arch}.attention.value_length"), c.head_dim as u32);
    }
    for (i, key) in ["padding", "bos", "eos"].into_iter().enumerate() {
        g.unsigned(&format!("tokenizer.ggml.{key}_token_id"), i as u32);
    }
    let gemma = matches!(c.family, Family::Gemma2 | Family::Gemma3);
    let names = names(table);
    for (name, t) in model.parameters() {
        let t = t.detach();
        let paired = matches!(arch, "llama" | "smollm3");
        let stored = match () {
            () if paired && name.contains("q_proj") => pairs(&t, c.num_attention_heads),
            () if paired && name.contains("k_proj") => pairs(&t, c.num_key_value_heads),
            () if gemma && name.ends_with("norm.weight") => t + 1.0,
            () if c.family == Family::Gpt2
                && ["c_attn.weight", "c_proj.weight", "c_fc.weight"]
                    .iter()
                    .any(|s| name.ends_with(s)) =>
            {
                t.tr().contiguous()
            }
            () => t,
        };
        g.tensor(&gguf_name(&names, &name), &stored);
    }
    g
}

/// Imports what the converter would write, and compares configuration, weights and logits.
fn comes_back(model: &Transformer, g: &Gguf) -> Config {
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (dir.path().join("m.gguf"), dir.path().join("hf"));
    std::fs::write(&file, g.bytes()).unwrap();
    // The file has no tokenizer: the folder needs one, and keeps it.
    let e = import(&file, &out, Kind::Float).unwrap_err().to_string();
    assert!(e.contains("tokenizer.ggml.model is missing"), "{e}");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("tokenizer.json"), "{}").unwrap();
    import(&file, &out, Kind::Float).unwrap();
    assert_eq!(
        std::fs::read_to_string(out.join("tokenizer.json")).unwrap(),
        "{}"
    );
    let loaded = Transformer::load(&out, &on_device()).unwrap();
    assert_eq!(loaded.notices(), &[] as &[String]);
    let (a, b) = (model.parameters(), loaded.parameters());
    assert_eq!(a.len(), b.len());
    for ((an, a), (bn, b)) in a.iter().zip(&b) {
        assert_eq!(an, bn);
        assert!(max_diff(a, b) <= 2e-7, "{an}");
    }
    // Longer than any window.
    let ids: Vec<u32> = (0..20).map(|i| (i * 7 + 3) % 90).collect();
    let b = batch(&[plain(0, &ids)]);
    let difference = max_diff(&model.logits(&b).unwrap(), &loaded.logits(&b).unwrap());
    assert!(difference <= 1e-5, "{difference}");
    let mut wanted = model.config().clone();
    wanted.initializer_range = loaded.config().initializer_range;
    assert_eq!(*loaded.config(), wanted);
    wanted
}

fn unchanged(_: &mut Value) {}

#[test]
fn llama_and_mistral() {
    let model = tiny("llama", &unchanged);
    let mut g = converted(&model, "llama", "llama");
    g.unsigned("llama.vocab_size", model.config().vocab_size as u32);
    g.unsigned("llama.rope.dimension_count", model.config().head_dim as u32);
    comes_back(&model, &g);
    let model = tiny("tiny-mistral", &unchanged);
    let mut g = converted(&model, "tiny-mistral", "llama");
    g.unsigned("llama.attention.sliding_window", 5);
    assert_eq!(comes_back(&model, &g).family, Family::Mistral);
}

/// The converter stores Llama 3's stretching as what it divides every frequency by.
#[test]
fn llama3_rope_comes_back_from_its_factors() {
    let model = tiny("llama3-rope", &|c| {
        for key in ["rope_scaling", "rope_parameters"] {
            c[key]["original_max_position_embeddings"] = json!(8192);
        }
    });
    let mut g = converted(&model, "llama", "llama");
    // Head width 16, base 10000. Wavelengths 2π · 10^(i/2): 6.3, 20, 63, 199, 628, 1987, 6283, 19869.
    // Below 8192/4 = 2048 as they are; above 8192 by 4; 6283 between: smooth = (8192/6283.19 − 1)/3
    // = 0.101267, 1 / ((1 − smooth)/4 + smooth) = 3.067853.
    let factors = [1.0_f32, 1.0, 1.0, 1.0, 1.0, 1.0, 3.067_853, 4.0];
    g.tensor("rope_freqs.weight", &Tensor::from_slice(&factors));
    let rope = comes_back(&model, &g).rope_scaling;
    assert!(matches!(rope, RopeScaling::Llama3 { factor: 4.0, .. }));
}

#[test]
fn qwen2_and_qwen3() {
    let model = tiny("tiny-qwen2-yarn", &unchanged);
    let mut g = converted(&model, "tiny-qwen2-yarn", "qwen2");
    g.text("qwen2.rope.scaling.type", "yarn");
    g.float("qwen2.rope.scaling.factor", 4.0);
    g.unsigned("qwen2.rope.scaling.original_context_length", 16);
    comes_back(&model, &g);
    let model = tiny("tiny-qwen3", &unchanged);
    comes_back(&model, &converted(&model, "tiny-qwen3", "qwen3"));
}

#[test]
fn gemma2_and_gemma3() {
    // The format has no key for the scale of scores: it is the heads' width.
    let model = tiny("tiny-gemma2", &|c| c["query_pre_attn_scalar"] = json!(8));
    let mut g = converted(&model, "tiny-gemma2", "gemma2");
    g.unsigned("gemma2.attention.sliding_window", 5);
    g.float("gemma2.attn_logit_softcapping", 2.0);
    g.float("gemma2.final_logit_softcapping", 3.0);
    comes_back(&model, &g);
    let model = tiny("tiny-gemma3", &unchanged);
    let mut g = converted(&model, "tiny-gemma3", "gemma3");
    g.unsigned("gemma3.attention.sliding_window", 5);
    g.unsigned("gemma3.attention.sliding_window_pattern", 2);
    g.float("gemma3.rope.freq_base_swa", 10_000.0);
    g.text("gemma3.rope.scaling.type", "linear");
    g.float("gemma3.rope.scaling.factor", 8.0);
    comes_back(&model, &g);
    // Without the key all but every sixth layer slide, so all three.
    g.meta.remove("gemma3.attention.sliding_window_pattern");
    let model = tiny("tiny-gemma3", &|c| {
        c["layer_types"] = json!([
            "sliding_attention",
            "sliding_attention",
            "sliding_attention"
        ]);
    });
    comes_back(&model, &g);
}

#[test]
fn gpt2_olmo2_phi3_and_smollm3() {
    let model = tiny("tiny-gpt2", &unchanged);
    comes_back(&model, &converted(&model, "tiny-gpt2", "gpt2"));
    let model = tiny("tiny-olmo2", &unchanged);
    comes_back(&model, &converted(&model, "tiny-olmo2", "olmo2"));
    let model = tiny("tiny-phi3", &unchanged);
    let mut g = converted(&model, "tiny-phi3", "phi3");
    g.unsigned("phi3.rope.dimension_count", 4);
    g.unsigned("phi3.rope.scaling.original_context_length", 64);
    g.unsigned("phi3.attention.sliding_window", 6);
    comes_back(&model, &g);
    let model = tiny("tiny-smollm3", &unchanged);
    comes_back(&model, &converted(&model, "tiny-smollm3", "smollm3"));
}
