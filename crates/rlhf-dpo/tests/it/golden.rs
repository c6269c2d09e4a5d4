//! The preference losses against TRL's own numbers and the papers': every case of section `c`, every
//! output of a case. A case, a setting or an output that is not known here fails.

use std::collections::BTreeSet;

use rlhf_dpo::loss::{
    Divergence, PairLogprobs, PairTokens, Pairs, PreferenceLoss, PreferenceMix, PreferenceOutput,
    WeightedLoss, nll,
};
use rlhf_kernels::{LossSum, Ragged};
use tch::Tensor;

use crate::golden_io::{Case, gradient, run};

#[test]
fn c_dpo() {
    let unknown = run(&["c/"], |case| {
        if case.after("c/sft_nll/").is_some() || case.after("c/sft_dft/").is_some() {
            instruction_tuning(case);
            return true;
        }
        let Some(mix) = mix_of(case) else {
            return false;
        };
        pairs_of_tokens(case, &mix);
        true
    });
    assert_eq!(unknown, BTreeSet::new());
}

pub(crate) fn mean(loss: &LossSum) -> Tensor {
    &loss.sum / loss.weight
}

/// What `case` trains, or none if a setting or a loss is unknown.
fn mix_of(case: &Case<'_>) -> Option<PreferenceMix> {
    let known = [
        "loss_type",
        "loss_weights",
        "beta",
        "label_smoothing",
        "discopop_tau",
        "f_divergence_type",
        "f_alpha_divergence_coef",
        "ld_alpha",
        "use_weighting",
        "reference_free",
        "alpha",
    ];
    if !case.settings().iter().all(|s| known.contains(s)) {
        return None;
    }
    let beta = case.number("beta")?;
    let label_smoothing = case.number("label_smoothing").unwrap_or(0.0);
    let one = |loss| Some(PreferenceMix::from(loss));
    // Written from the papers.
    if case.after("c/cdpo_").is_some() {
        return one(PreferenceLoss::Sigmoid {
            beta,
            label_smoothing,
        });
    }
    if case.after("c/ipo_paper_unnormalised/").is_some() {
        return one(PreferenceLoss::Ipo { beta });
    }
    if case.after("c/rpo_paper_seqmean/").is_some() {
        let mut mix = PreferenceMix::from(PreferenceLoss::Sigmoid {
            beta,
            label_smoothing,
        });
        mix.terms.push(WeightedLoss {
            weight: case.number("alpha")?,
            loss: PreferenceLoss::Sft,
        });
        return Some(mix);
    }
    // TRL's names.
    let named = |name: &str| {
        Some(match name {
            "sigmoid" => PreferenceLoss::Sigmoid {
                beta,
                label_smoothing: 0.0,
            },
            "sigmoid_norm" => PreferenceLoss::SigmoidPerToken {
                beta,
                label_smoothing: 0.0,
            },
            "robust" => PreferenceLoss::Robust {
                beta,
                label_smoothing,
            },
            "hinge" => PreferenceLoss::Hinge { beta },
            "ipo" => PreferenceLoss::IpoPerToken { beta },
            "exo_pair" => PreferenceLoss::ExoPair {
                beta,
                label_smoothing,
            },
            "discopop" => PreferenceLoss::Discopop {
                beta,
                tau: case.number("discopop_tau").unwrap_or(0.05),
            },
            "nca_pair" => PreferenceLoss::NcaPair { beta },
            "bco_pair" => PreferenceLoss::BcoPair { beta },
            "sppo_hard" => PreferenceLoss::SppoHard { beta },
            "apo_zero" => PreferenceLoss::ApoZero { beta },
            "apo_down" => PreferenceLoss::ApoDown { beta },
            "aot" => PreferenceLoss::Aot {
                beta,
                label_smoothing,
            },
            "aot_unpaired" => PreferenceLoss::AotUnpaired {
                beta,
                label_smoothing,
            },
            "sft" => PreferenceLoss::SftBatchMean,
            _ => return None,
        })
    };
    let names = case.setting("loss_type").as_array()?;
    let mut terms = Vec::new();
    for (i, name) in names.iter().enumerate() {
        terms.push(WeightedLoss {
            weight: case.setting("loss_weights")[i].as_f64().unwrap_or(1.0),
            loss: named(name.as_str()?)?,
        });
    }
    let divergence = match case.text("f_divergence_type") {
        None | Some("reverse_kl") => Divergence::ReverseKl,
        Some("forward_kl") => Divergence::ForwardKl,
        Some("js_divergence") => Divergence::JensenShannon,
        Some("alpha_divergence") => Divergence::Alpha {
            alpha: 1.0 - case.number("f_alpha_divergence_coef")?,
        },
        Some(_) => return None,
    };
    Some(PreferenceMix {
        terms,
        divergence,
        reference_free: case.setting("reference_free") == true,
    })
}

/// The two halves of a padded batch, chosen first.
pub(crate) fn halves(padded: &Tensor, mask: &Tensor) -> PairTokens {
    let half = |i: i64| {
        let rows = mask.size()[0] / 2;
        let part = |t: &Tensor| t.narrow(0, i * rows, rows);
        Ragged::from_padded(&part(padded), &part(mask)).unwrap()
    };
    PairTokens::new(&half(0), &half(1)).unwrap()
}

/// Compares where the reference is a number; ours must be one everywhere.
fn check_numbers(case: &Case<'_>, output: &str, got: &Tensor) {
    assert!(
        bool::try_from(got.isfinite().all()).unwrap(),
        "{} {output} is not finite: {got}",
        case.name()
    );
    let numbers = case.output(output).isfinite();
    if bool::try_from(numbers.all()).unwrap() {
        case.check(output, got);
    } else if bool::try_from(numbers.any()).unwrap() {
        case.check_at(output, &got.masked_select(&numbers), &numbers);
    }
}

fn pairs_of_tokens(case: &Case<'_>, mix: &PreferenceMix) {
    let leaf = case.input("policy_logps").set_requires_grad(true);
    // TRL's mask is of tokens, its log-probs are of the next one.
    let mask = case.mask("completion_mask").slice(1, 1, None, 1);
    let policy = halves(&leaf, &mask);
    let reference = halves(&case.input("ref_logps"), &mask);
    let sums = |tokens: &PairTokens| match case.number("ld_alpha") {
        Some(alpha) => tokens.length_desensitized(alpha).unwrap(),
        None => tokens.sums().unwrap(),
    };
    let mut logprobs = PairLogprobs::new(&sums(&policy), &sums(&reference));
    if mix.reference_free {
        logprobs = PairLogprobs::reference_free(&logprobs.policy().unwrap());
    }
    let weighted = case.setting("use_weighting") == true;
    let pairs = Pairs {
        lengths: Some(policy.lengths().unwrap()),
        weights: weighted.then(|| {
            let norms = halves(&case.input("log_sum_sq_probs"), &mask);
            policy.wpo_weights(&norms).unwrap()
        }),
        ..logprobs.into()
    };
    let logprobs = &pairs.logprobs;
    let out = mix.compute(&pairs).unwrap();
    let loss = mean(&out.loss);
    let ratios = logprobs.log_ratios().unwrap();
    let scores = mix.divergence.of_ratios(&ratios).unwrap();
    // TRL's reward is β log π/π₀ for every loss; DPO's is, ours only where the loss has no other.
    let trl = PreferenceLoss::Sigmoid {
        beta: case.number("beta").unwrap(),
        label_smoothing: 0.0,
    };
    let trl = trl.compute(&pairs).unwrap();
    let rewarded_otherwise = mix.divergence != Divergence::ReverseKl
        || matches!(
            mix.terms[0].loss,
            PreferenceLoss::IpoPerToken { .. }
                | PreferenceLoss::SigmoidPerToken { .. }
                | PreferenceLoss::SftBatchMean
        );
    let rewards: &PreferenceOutput = if rewarded_otherwise { &trl } else { &out };
    let largest = |t: &Tensor| t.abs().max().double_value(&[]);
    // Differences of sums of log-probs.
    let size = largest(&leaf.masked_select(&mask)) * mask.size()[1] as f64;
    let column = |name: &str, got: &Tensor| {
        let steep = largest(&case.output(name)).max(1.0);
        case.check_difference(name, got, size * steep);
    };
    let reference = logprobs.reference().unwrap();
    let term = |name: &str| {
        let i = (case.setting("loss_type").as_array().unwrap().iter())
            .position(|n| *n == name)
            .unwrap_or_else(|| panic!("{}: no loss {name}", case.name()));
        let alone = PreferenceMix {
            terms: vec![WeightedLoss {
                weight: 1.0,
                ..mix.terms[i]
            }],
            ..mix.clone()
        };
        alone.compute(&pairs).unwrap().losses
    };
    // TRL's NLL does not go through the sums.
    let through_sums = |leaf: &Tensor| {
        let is_nll =
            |l: &PreferenceLoss| matches!(l, PreferenceLoss::Sft | PreferenceLoss::SftBatchMean);
        let mut rest = mix.clone();
        rest.terms.retain(|t| !is_nll(&t.loss));
        gradient(&mean(&rest.compute(&pairs).unwrap().loss), leaf)
    };
    let tokens_mean = |input: &str, half: fn(&PairTokens) -> &Ragged| {
        let tokens = halves(&case.input(input).to_kind(case.kind), &mask);
        half(&tokens).values().mean(case.kind)
    };
    for name in case.outputs() {
        match name {
            "loss" => check_numbers(case, name, &loss),
            "losses" => case.check(name, &out.losses),
            "chosen_scores" => column(name, scores.chosen()),
            "rejected_scores" => column(name, scores.rejected()),
            "delta_score" => column(name, &scores.margin()),
            "chosen_logps" => case.check(name, &logprobs.chosen),
            "rejected_logps" => case.check(name, &logprobs.rejected),
            "ref_chosen_logps" => case.check(name, reference.chosen()),
            "ref_rejected_logps" => case.check(name, reference.rejected()),
            "chosen_rewards" => column(name, &rewards.chosen_rewards),
            "rejected_rewards" => column(name, &rewards.rejected_rewards),
            "nll" => case.check(name, &PreferenceLoss::Sft.compute(&pairs).unwrap().losses),
            "metric_rewards_accuracies" => {
                case.check(name, &rewards.accuracies().mean(case.kind));
            }
            "metric_rewards_margins" => column(name, &rewards.margins().mean(case.kind)),
            "metric_rewards_chosen" => column(name, &rewards.chosen_rewards.mean(case.kind)),
            "metric_rewards_rejected" => column(name, &rewards.rejected_rewards.mean(case.kind)),
            "metric_logps_chosen" => case.check(name, &logprobs.chosen.mean(case.kind)),
            "metric_logps_rejected" => case.check(name, &logprobs.rejected.mean(case.kind)),
            "metric_entropy" => {
                let entropy = Ragged::from_padded(&case.input("entropy"), &mask).unwrap();
                case.check(name, &entropy.values().mean(case.kind));
            }
            "metric_mean_token_accuracy" => {
                case.check(name, &tokens_mean("is_top1", PairTokens::chosen));
            }
            "metric_logits_chosen" => {
                case.check(name, &tokens_mean("mean_logits", PairTokens::chosen));
            }
            "metric_logits_rejected" => {
                case.check(name, &tokens_mean("mean_logits", PairTokens::rejected));
            }
            "grad_policy_logps" => check_numbers(case, name, &gradient(&loss, &leaf)),
            // A small difference of two slopes, each at most a quarter of β.
            "grad_chosen_logps" if case.after("c/apo_down/").is_some() => {
                let scale = case.number("beta").unwrap() / 4.0;
                case.check_difference(name, &through_sums(&logprobs.chosen), scale);
            }
            "grad_chosen_logps" => check_numbers(case, name, &through_sums(&logprobs.chosen)),
            "grad_rejected_logps" => check_numbers(case, name, &through_sums(&logprobs.rejected)),
            other => match other.strip_prefix("loss_") {
                Some(loss) => check_numbers(case, other, &term(loss)),
                None => panic!("{}: unknown output {other}", case.name()),
            },
        }
    }
}

fn instruction_tuning(case: &Case<'_>) {
    let leaf = case.input("policy_logps").set_requires_grad(true);
    let mask = case.mask("completion_mask").slice(1, 1, None, 1);
    let logprobs = Ragged::from_padded(&leaf, &mask).unwrap();
    let sum = match case.text("loss_type") {
        Some("nll") => nll::tokens(&logprobs),
        Some("dft") => nll::dynamic(&logprobs),
        other => panic!("{}: {other:?}", case.name()),
    };
    let loss = &sum.sum / case.number("num_items").unwrap_or(sum.weight);
    let over_tokens = |input: &str| {
        let values = case.input(input).to_kind(case.kind);
        Ragged::from_padded(&values, &mask)
            .unwrap()
            .values()
            .mean(case.kind)
    };
    for name in case.outputs() {
        match name {
            "loss" => case.check(name, &loss),
            "metric_entropy" => case.check(name, &over_tokens("entropy")),
            "metric_acc" => case.check(name, &over_tokens("is_top1")),
            "grad_policy_logps" => case.check(name, &gradient(&loss, &leaf)),
            other => panic!("{}: unknown output {other}", case.name()),
        }
    }
}
