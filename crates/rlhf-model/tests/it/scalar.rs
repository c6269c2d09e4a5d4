//! Reward and value models: scores, files.

use rlhf_model::{LoadOptions, RewardNorm, SaveOptions, ScalarModel, Transformer};
use tch::Kind;

use crate::support::{batch, group, max_diff, on_device, small};

fn model() -> ScalarModel {
    ScalarModel::from_trunk(small(Kind::Double), 3).unwrap()
}

#[test]
fn a_score_does_not_depend_on_the_batch() {
    let m = model();
    let target = group(5, &[3, 4, 5], &[&[6, 7], &[8, 9, 10]]);
    let alone = m.scores(&batch(std::slice::from_ref(&target))).unwrap();
    let mut groups: Vec<_> = (0..31_u32)
        .map(|i| group(0, &[i, i + 1], &[&[i + 2; 9], &[i + 3]]))
        .collect();
    groups.insert(17, target);
    let among = m.scores(&batch(&groups)).unwrap();
    assert_eq!(among.size(), [64]);
    assert!(max_diff(&among.narrow(0, 34, 2), &alone) < 1e-12);
}

#[test]
fn values_stand_where_tokens_are_predicted() {
    // The value of the last token's predecessor row equals the score of the completion cut there.
    let m = model();
    let whole = m
        .values(&batch(&[group(0, &[3, 4], &[&[6, 7, 8]])]))
        .unwrap();
    assert_eq!(whole.values().size(), [3]);
    let cut = m.scores(&batch(&[group(0, &[3, 4], &[&[6, 7]])])).unwrap();
    assert!(max_diff(&whole.values().narrow(0, 2, 1), &cut) < 1e-12);
}

#[test]
fn the_norm_shifts_and_divides_and_is_saved() {
    let mut m = model();
    let b = batch(&[group(0, &[3, 4], &[&[6, 7], &[1]])]);
    let raw = m.scores(&b).unwrap();
    m.set_norm(RewardNorm {
        mean: 0.5,
        std: 2.0,
    })
    .unwrap();
    assert!(max_diff(&m.scores(&b).unwrap(), &((&raw - 0.5) / 2.0)) < 1e-15);
    assert!(
        m.set_norm(RewardNorm {
            mean: 0.0,
            std: 0.0
        })
        .is_err()
    );

    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("rm");
    m.save_with(
        &dir,
        &SaveOptions {
            max_shard_bytes: 10_000,
            kind: None,
        },
    )
    .unwrap();
    assert!(dir.join("model.safetensors.index.json").exists());
    let config = std::fs::read_to_string(dir.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["architectures"][0], "LlamaForSequenceClassification");
    assert_eq!(config["num_labels"], 1);
    let options = LoadOptions {
        kind: Kind::Double,
        ..on_device()
    };
    let loaded = ScalarModel::load(&dir, &options).unwrap();
    assert_eq!(loaded.norm(), m.norm());
    assert!(max_diff(&loaded.scores(&b).unwrap(), &m.scores(&b).unwrap()) == 0.0);
    // Each kind of folder is refused by the other kind of model.
    let e = Transformer::load(&dir, &options).unwrap_err().to_string();
    assert!(e.contains("not a language model"), "{e}");
    let lm = dir.with_file_name("lm");
    small(Kind::Float).save(&lm).unwrap();
    let e = ScalarModel::load(&lm, &options).unwrap_err().to_string();
    assert!(e.contains("not a scalar model"), "{e}");
}

#[test]
fn the_score_trains_the_head_and_the_trunk() {
    let m = model();
    m.scores(&batch(&[group(0, &[3, 4], &[&[6, 7]])]))
        .unwrap()
        .sum(None::<Kind>)
        .backward();
    for (name, t) in m.parameters() {
        assert!(
            t.grad().defined() && t.grad().abs().max().double_value(&[]) > 0.0,
            "{name}"
        );
    }
    let copy = m.duplicate().unwrap();
    assert!(copy.parameters().iter().all(|(_, t)| !t.grad().defined()));
}
