//! Saving and loading: bit-equal, in one file or several, readable by the format's own crate.

use rlhf_model::{
    CausalLm, Config, SaveOptions, Transformer, copy_tokenizer, weights::WeightStore,
};
use tch::Kind;

use crate::device::device;
use crate::support::{on_device, small, tensors};

fn equal(a: &Transformer, b: &Transformer) {
    assert_eq!(a.config(), b.config());
    let (a, b) = (a.parameters(), b.parameters());
    assert_eq!(a.len(), b.len());
    for ((an, a), (bn, b)) in a.iter().zip(&b) {
        assert_eq!(an, bn);
        assert!(a.equal(b), "{an} differs");
        assert!(b.requires_grad() && b.is_leaf());
    }
}

#[test]
fn round_trip_single_and_sharded() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("made/on/the/way");
    let model = small(Kind::Float);
    model.save(&dir).unwrap();
    std::fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    equal(&model, &Transformer::load(&dir, &on_device()).unwrap());
    let official = tensors(&dir.join("model.safetensors"));
    assert_eq!(official.len(), model.parameters().len());
    assert!(
        model
            .parameters()
            .iter()
            .all(|(n, t)| official[n].equal(&t.detach()))
    );
    let head = std::fs::read(dir.join("model.safetensors")).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&head).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");

    // Saving again in shards replaces the single file and keeps the tokenizer.
    model
        .save_with(
            &dir,
            &SaveOptions {
                max_shard_bytes: 8_000,
                kind: None,
            },
        )
        .unwrap();
    assert!(!dir.join("model.safetensors").exists() && dir.join("tokenizer.json").exists());
    let names: Vec<String> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n.starts_with("model-"))
        .collect();
    assert!(names.len() > 2);
    equal(&model, &Transformer::load(&dir, &on_device()).unwrap());
    model.save(&dir).unwrap();
    assert!(!dir.join(&names[0]).exists());
    equal(&model, &Transformer::load(&dir, &on_device()).unwrap());
    let left: Vec<_> = std::fs::read_dir(dir.parent().unwrap()).unwrap().collect();
    assert_eq!(left.len(), 1, "no temporary folder is left");
}

#[test]
fn types_convert_on_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("m");
    let model = small(Kind::Float);
    let save = SaveOptions {
        kind: Some(Kind::BFloat16),
        ..SaveOptions::default()
    };
    model.save_with(&dir, &save).unwrap();
    let loaded = Transformer::load(&dir, &on_device()).unwrap();
    assert_eq!(
        (loaded.config().dtype, loaded.kind()),
        (Kind::BFloat16, Kind::Float)
    );
    for ((_, a), (_, b)) in model.parameters().iter().zip(&loaded.parameters()) {
        assert!(a.to_kind(Kind::BFloat16).to_kind(Kind::Float).equal(b));
    }
    let store = WeightStore::open(&dir).unwrap();
    assert_eq!(store.info("model.norm.weight").unwrap().dtype, "BF16");
}

#[test]
fn tied_heads_are_stored_once() {
    let mut config = Config::new(40, 24, 1, 2, 64);
    config.eos_token_ids = vec![2, 3];
    let model = Transformer::init(config, 1, device(), Kind::Float).unwrap();
    assert!(
        model
            .parameters()
            .iter()
            .all(|(n, _)| n != "lm_head.weight")
    );
    let total: i64 = model
        .parameters()
        .iter()
        .map(|(_, t)| t.numel() as i64)
        .sum();
    assert_eq!(total, model.config().num_parameters());
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("m");
    model.save(&dir).unwrap();
    equal(&model, &Transformer::load(&dir, &on_device()).unwrap());
}

#[test]
fn equal_seeds_give_equal_weights() {
    let init = |seed, kind| {
        Transformer::init(Config::new(40, 24, 1, 2, 64), seed, device(), kind).unwrap()
    };
    equal(&init(5, Kind::Float), &init(5, Kind::Float));
    let (a, b) = (init(5, Kind::Float), init(6, Kind::Float));
    let first = |m: &Transformer| m.parameters()[0].1.detach();
    assert!(!first(&a).equal(&first(&b)));
    assert!(
        first(&init(5, Kind::Double))
            .to_kind(Kind::Float)
            .equal(&first(&a))
    );
    // Embedding and a matrix of the same seed differ; the deviation is the one asked for.
    let t = first(&a);
    let std = t.std(true).double_value(&[]);
    assert!((std - 0.02).abs() < 0.002, "{std}");
    assert!(t.mean(None::<Kind>).double_value(&[]).abs() < 0.003);
}

#[test]
fn tokenizer_files_are_copied() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    assert!(copy_tokenizer(from.path(), to.path()).is_err());
    for name in ["tokenizer.json", "chat_template.jinja", "model.safetensors"] {
        std::fs::write(from.path().join(name), name).unwrap();
    }
    copy_tokenizer(from.path(), to.path()).unwrap();
    let mut names: Vec<_> = std::fs::read_dir(to.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["chat_template.jinja", "tokenizer.json"]);
}

#[test]
fn flipped_bytes_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("m");
    let config = Config::new(8, 4, 1, 1, 8);
    let model = Transformer::init(config, 1, device(), Kind::Float).unwrap();
    model.save(&dir).unwrap();
    let path = dir.join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut refused = 0;
    for at in 0..header {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x15;
        std::fs::write(&path, &bytes).unwrap();
        // A flip inside a tensor's name or the metadata may leave a valid file.
        refused += usize::from(WeightStore::open(&dir).is_err());
    }
    assert!(refused > header / 3, "{refused} of {header}");
    for cut in (0..whole.len()).step_by(5) {
        std::fs::write(&path, &whole[..cut]).unwrap();
        assert!(WeightStore::open(&dir).is_err(), "cut at {cut}");
    }
}
