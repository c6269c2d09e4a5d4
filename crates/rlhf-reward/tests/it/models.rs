//! Reward models: what is stored, what normalises, what a score depends on.

use std::path::Path;

use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_model::{Config, LoadOptions, RewardNorm, ScalarModel, Transformer};
use rlhf_reward::model::{Combine, Readout, RewardModel, Spec};
use rlhf_reward::objective::StepClasses;
use rlhf_reward::process::{Aggregate, Neutral};
use tch::{Device, Kind};

pub(crate) fn trunk(seed: u64, kind: Kind) -> Transformer {
    let mut config = Config::new(40, 24, 2, 4, 256);
    config.num_key_value_heads = 2;
    config.initializer_range = 0.3;
    Transformer::init(config, seed, Device::Cpu, kind).unwrap()
}

pub(crate) fn net(outputs: usize, seed: u64, kind: Kind) -> ScalarModel {
    ScalarModel::with_outputs(trunk(7, kind), outputs, seed).unwrap()
}

/// A prompt of some length with completions that depend on `row`.
pub(crate) fn group(row: u64, lengths: &[usize]) -> PromptGroup {
    let ids = |salt: u64, n: usize| -> Vec<u32> {
        (0..n as u64)
            .map(|i| ((row * 31 + salt * 17 + i * i * 7 + i) % 40) as u32)
            .collect()
    };
    PromptGroup {
        row,
        prompt: ids(0, 3 + row as usize % 5),
        completions: (1u64..)
            .zip(lengths)
            .map(|(i, n)| Completion::whole(ids(i, *n), Finish::Stop))
            .collect(),
    }
}

fn many() -> Vec<PromptGroup> {
    (0..24)
        .map(|i| group(i, &[4 + i as usize % 9, 2 + i as usize % 4]))
        .collect()
}

fn refs(groups: &[PromptGroup]) -> Vec<&PromptGroup> {
    groups.iter().collect()
}

fn options(kind: Kind) -> LoadOptions {
    LoadOptions {
        device: Device::Cpu,
        kind,
    }
}

fn moments(x: &[f64]) -> (f64, f64) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    (mean, x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n)
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn readouts() -> Vec<Readout> {
    let steps = |steps, aggregate| Readout::Steps {
        steps,
        aggregate,
        end: Some(5),
    };
    vec![
        Readout::First { outputs: 1 },
        Readout::First { outputs: 2 },
        Readout::MeanOfTokens {},
        Readout::Mix {
            attributes: vec!["a".into(), "b".into(), "c".into()],
            weights: vec![0.7, -0.2, 1.5],
        },
        steps(StepClasses::Binary {}, Aggregate::Min),
        steps(
            StepClasses::Three {
                neutral: Neutral::Right,
            },
            Aggregate::Product,
        ),
    ]
}

/// Every readout, alone, as heads on one trunk and as nets of their own: normalised to mean 0 and variance
/// 1 on the reference completions, and the same after a round trip through files.
#[test]
fn normalised_scores_survive_their_files() {
    let groups = many();
    let groups = refs(&groups);
    let dir = tempfile::tempdir().unwrap();
    for (i, readout) in readouts().into_iter().enumerate() {
        for (nets, heads, combine) in [
            (1, 1, Combine::Mean),
            (1, 3, Combine::Min),
            (2, 1, Combine::MeanMinusStd { k: 1.5 }),
        ] {
            let spec = Spec {
                readout: readout.clone(),
                heads,
                combine,
                thresholds: Some(vec![0.25, -1.5]),
            };
            let members = (0..nets).map(|k| net(spec.outputs(), k, Kind::Double));
            let mut model = RewardModel::new(members.collect(), &spec).unwrap();
            model.normalize_on(&groups, 64).unwrap();
            let scores = model.scores(&groups, 64).unwrap();
            let (mean, variance) = moments(&scores);
            assert!(
                mean.abs() < 1e-9 && (variance - 1.0).abs() < 1e-9,
                "{readout:?} {combine:?}"
            );
            if nets * heads as u64 > 1 {
                for member in model.member_scores(&groups, 64).unwrap() {
                    let (mean, variance) = moments(&member);
                    assert!(
                        mean.abs() < 1e-9 && (variance - 1.0).abs() < 1e-9,
                        "{readout:?}"
                    );
                }
            }
            let path = dir.path().join(format!("{i}-{nets}-{heads}"));
            model.save(&path).unwrap();
            let loaded = RewardModel::load(&path, &options(Kind::Double)).unwrap();
            assert_eq!(loaded.readout(), &readout);
            assert_eq!(
                (loaded.members(), loaded.combine()),
                (model.members(), combine)
            );
            assert_eq!(
                loaded.scores(&groups, 64).unwrap(),
                scores,
                "{readout:?} {combine:?}"
            );
        }
    }
}

/// What other tools see: a sequence classifier with a label an output, whose raw head is untouched by norms.
#[test]
fn an_ensemble_is_a_classifier_with_a_label_an_output() {
    let groups = many();
    let groups = refs(&groups);
    let dir = tempfile::tempdir().unwrap();
    let spec = Spec {
        heads: 3,
        ..Spec::single(Readout::First { outputs: 1 })
    };
    let mut model = RewardModel::new(vec![net(3, 1, Kind::Float)], &spec).unwrap();
    model.normalize_on(&groups, 64).unwrap();
    let raw = model.raw_scores(&groups, 64).unwrap();
    let path = dir.path().join("rm");
    model.save(&path).unwrap();
    let config = json(&path.join("config.json"));
    assert_eq!(config["architectures"][0], "LlamaForSequenceClassification");
    assert_eq!(config["num_labels"], 3);
    assert_eq!(config["id2label"]["2"], "LABEL_2");
    assert_eq!(config["label2id"]["LABEL_2"], 2);
    let bytes = std::fs::read(path.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("score.weight").unwrap().shape(), [3, 24]);
    // Without what stands under `rlhf_reward` it still is that classifier, and its first label is the score.
    let mut bare = config.clone();
    bare.as_object_mut().unwrap().remove("rlhf_reward");
    std::fs::write(path.join("config.json"), bare.to_string()).unwrap();
    let other = RewardModel::load(&path, &options(Kind::Float)).unwrap();
    assert_eq!(other.norm(), RewardNorm::default());
    assert_eq!(other.scores(&groups, 64).unwrap(), raw[0]);

    // Several nets are several such folders.
    let spec = Spec::single(Readout::First { outputs: 1 });
    let nets = (0..2).map(|k| net(1, k, Kind::Float)).collect();
    let mut model = RewardModel::new(nets, &spec).unwrap();
    model.normalize_on(&groups, 64).unwrap();
    let path = dir.path().join("nets");
    model.save(&path).unwrap();
    let members = model.member_scores(&groups, 64).unwrap();
    for (i, scores) in members.iter().enumerate() {
        let one = RewardModel::load(&path.join(format!("member-{i}")), &options(Kind::Float));
        assert_eq!(&one.unwrap().scores(&groups, 64).unwrap(), scores);
    }
}

#[test]
fn damaged_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rm");
    let spec = Spec::single(Readout::First { outputs: 2 });
    let mut model = RewardModel::new(vec![net(2, 1, Kind::Float)], &spec).unwrap();
    model.save(&path).unwrap();
    let config = json(&path.join("config.json"));
    let broken = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut c = config.clone();
        change(&mut c);
        std::fs::write(path.join("config.json"), c.to_string()).unwrap();
        let e = RewardModel::load(&path, &options(Kind::Float)).unwrap_err();
        assert!(e.is_input(), "{e}");
        e.to_string()
    };
    let e = broken(&|c| c["rlhf_reward"]["readout"]["outputs"] = 3.into());
    assert!(e.contains("2 outputs"), "{e}");
    let e = broken(&|c| c["rlhf_reward"]["readout"]["kind"] = "other".into());
    assert!(e.contains("rlhf_reward"), "{e}");
    broken(&|c| c["rlhf_reward"]["norms"][0][1] = 0.0.into());
    broken(&|c| c["num_labels"] = 3.into());
    std::fs::write(path.join("reward.json"), "{\"members\": 0}").unwrap();
    let e = RewardModel::load(&path, &options(Kind::Float)).unwrap_err();
    assert!(e.to_string().contains("reward.json"), "{e}");
}

/// On the CPU a score has the same bits whatever else is in the batch, and in whatever order.
#[test]
fn scores_do_not_depend_on_the_batch() {
    // A small language model's width, where products are split among threads.
    let mut wide = Config::new(40, 576, 2, 9, 64);
    wide.num_key_value_heads = 3;
    wide.intermediate_size = 1536;
    let wide = Transformer::init(wide, 7, Device::Cpu, Kind::Float).unwrap();
    let wide = ScalarModel::with_outputs(wide, 2, 1).unwrap();
    for (name, net, groups) in [
        ("f32", net(2, 1, Kind::Float), many()),
        ("f64", net(2, 1, Kind::Double), many()),
        ("wide", wide, many()[..6].to_vec()),
    ] {
        let spec = Spec {
            heads: 2,
            ..Spec::single(Readout::First { outputs: 1 })
        };
        let model = RewardModel::new(vec![net], &spec).unwrap();
        let together = model.scores(&refs(&groups), 100_000).unwrap();
        let split = model.scores(&refs(&groups), 40).unwrap();
        let alone: Vec<f64> = groups
            .iter()
            .flat_map(|g| model.scores(&[g], 100_000).unwrap())
            .collect();
        let mut back: Vec<f64> = Vec::new();
        let reversed: Vec<&PromptGroup> = groups.iter().rev().collect();
        for two in model.scores(&reversed, 90).unwrap().chunks(2).rev() {
            back.extend(two);
        }
        // A completion without its sibling.
        let single: Vec<f64> = groups
            .iter()
            .flat_map(|g| {
                g.completions.iter().map(|c| PromptGroup {
                    completions: vec![c.clone()],
                    ..g.clone()
                })
            })
            .flat_map(|g| model.scores(&[&g], 100_000).unwrap())
            .collect();
        assert_eq!(together, split, "{name}");
        assert_eq!(together, alone, "{name}");
        assert_eq!(together, back, "{name}");
        assert_eq!(together, single, "{name}");
    }
}
