//! Every loss of pairs, with settings under which it is smooth at the tests' points.

use std::collections::BTreeSet;

use rlhf_dpo::loss::{PreferenceLoss, PreferenceMix};

pub(crate) fn every_loss() -> Vec<PreferenceLoss> {
    let (beta, label_smoothing) = (0.3, 0.1);
    vec![
        PreferenceLoss::Sigmoid {
            beta,
            label_smoothing,
        },
        PreferenceLoss::SigmoidPerToken {
            beta: 5.0,
            label_smoothing,
        },
        PreferenceLoss::Robust {
            beta,
            label_smoothing,
        },
        PreferenceLoss::Odpo { beta, alpha: 0.7 },
        PreferenceLoss::DpoPositive { beta, lambda: 5.0 },
        PreferenceLoss::CalDpo { beta },
        PreferenceLoss::Hinge { beta },
        PreferenceLoss::Ipo { beta },
        PreferenceLoss::IpoPerToken { beta },
        PreferenceLoss::ExoPair {
            beta,
            label_smoothing,
        },
        PreferenceLoss::Discopop { beta, tau: 0.05 },
        PreferenceLoss::Rebel { eta: 2.0 },
        PreferenceLoss::RewardAware { beta, eta: 0.8 },
        PreferenceLoss::NcaPair { beta },
        PreferenceLoss::BcoPair { beta },
        PreferenceLoss::SppoHard { beta },
        PreferenceLoss::ApoZero { beta },
        PreferenceLoss::ApoDown { beta },
        PreferenceLoss::Aot {
            beta,
            label_smoothing,
        },
        PreferenceLoss::AotUnpaired {
            beta,
            label_smoothing,
        },
        PreferenceLoss::Orpo { lambda: 0.2 },
        PreferenceLoss::Cpo {
            beta,
            label_smoothing,
            nll_coef: 0.5,
        },
        PreferenceLoss::Simpo {
            beta: 2.0,
            gamma: 0.5,
            label_smoothing,
        },
        PreferenceLoss::Alphapo {
            beta: 2.0,
            gamma: 0.5,
            alpha: 0.25,
        },
        PreferenceLoss::Sft,
        PreferenceLoss::SftBatchMean,
    ]
}

/// The names that a recipe may use, and that none is missing above: serde lists them in its complaint.
#[test]
fn names() {
    let complaint = serde_json::from_str::<PreferenceLoss>(r#"{"kind":"?"}"#)
        .unwrap_err()
        .to_string();
    let offered: BTreeSet<String> = complaint
        .split('`')
        .skip(3)
        .step_by(2)
        .map(str::to_owned)
        .collect();
    let name = |loss| {
        let json = serde_json::to_value(loss).unwrap();
        assert_eq!(
            serde_json::from_value::<PreferenceLoss>(json.clone()).unwrap(),
            loss
        );
        json["kind"].as_str().unwrap().to_owned()
    };
    let listed: BTreeSet<String> = every_loss().into_iter().map(name).collect();
    assert_eq!(listed, offered);
    assert_eq!(listed.len(), 26);
    for expected in [
        "sigmoid",
        "ipo_per_token",
        "simpo",
        "alphapo",
        "sft_batch_mean",
    ] {
        assert!(listed.contains(expected), "{expected}");
    }
}

#[test]
fn a_mix_in_a_recipe() {
    let mix: PreferenceMix = serde_json::from_str(
        r#"{"terms": [{"weight": 1.0, "loss": {"kind": "ipo", "beta": 0.1}}, {"weight": 0.2, "loss": {"kind": "sft"}}],
            "divergence": {"kind": "alpha", "alpha": 0.5}}"#,
    )
    .unwrap();
    assert_eq!(mix.terms[1].loss, PreferenceLoss::Sft);
    assert!(!mix.reference_free);
    let wrong = serde_json::from_str::<PreferenceMix>(r#"{"terms": [], "divergense": 1}"#);
    assert!(wrong.unwrap_err().to_string().contains("divergense"));
}
