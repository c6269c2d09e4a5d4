//! The losses without a reference, of thumbs and of a gold completion against TRL's own numbers: every case of
//! section `d`, every output of a case. A case or an output that is not known here fails.

use std::collections::BTreeSet;

use rlhf_dpo::loss::unpaired::{
    self, RunningMoments, ThumbWeights, UnpairedLogprobs, UnpairedLoss, kl_estimate,
};
use rlhf_dpo::loss::{PairValues, PreferenceOutput, likelihood, margin, nll};
use rlhf_kernels::{Ragged, token_logprobs};
use tch::{Kind, Tensor};

use crate::device::device;
use crate::golden::{halves, mean};
use crate::golden_io::{Case, gradient, run};

#[test]
fn d_pref() {
    let unknown = run(&["d/"], |case| {
        let family = case.after("d/").unwrap().split('/').next().unwrap();
        match family {
            "kto" => kto(case),
            "bco" => bco(case),
            "cpo" => cpo(case),
            "orpo" => orpo(case),
            "tpo" => tpo(case),
            "batch_logps" => batch_logprobs(case),
            _ => return false,
        }
        true
    });
    assert_eq!(unknown, BTreeSet::new());
}

fn kto(case: &Case<'_>) {
    let leaf = case.input("policy_logps").set_requires_grad(true);
    let sums = |values: &Tensor, mask: &str| {
        let mask = case.mask(mask).slice(1, 1, None, 1);
        Ragged::from_padded(values, &mask).unwrap().sum()
    };
    let completions = UnpairedLogprobs {
        logprobs: sums(&leaf, "completion_mask"),
        ref_logprobs: sums(&case.input("ref_logps"), "completion_mask"),
        desirable: case.mask("label"),
    };
    let beta = case.number("beta").unwrap();
    let weights = ThumbWeights {
        desirable: case.number("desirable_weight").unwrap(),
        undesirable: case.number("undesirable_weight").unwrap(),
    };
    let mismatched = |input: &str| sums(&case.input(input), "KL_completion_mask");
    let (loss, baseline) = match case.text("loss_type") {
        Some("kto") => (
            UnpairedLoss::Kto { beta, weights },
            kl_estimate(&mismatched("KL_policy_logps"), &mismatched("KL_ref_logps")).unwrap(),
        ),
        Some("apo_zero_unpaired") => (UnpairedLoss::ApoZeroUnpaired { beta, weights }, 0.0),
        other => panic!("{}: {other:?}", case.name()),
    };
    let out = loss.compute(&completions, baseline).unwrap();
    let loss = mean(&out.loss);
    let (good, bad) = (&completions.desirable, completions.desirable.logical_not());
    let of = |t: &Tensor, mask: &Tensor| t.masked_select(mask);
    let scale = completions.logprobs.abs().max().double_value(&[]);
    let rewards = |name: &str, mask: &Tensor| {
        let got = of(&out.rewards, mask);
        let expected = case.output(name);
        assert_eq!(got.size(), expected.size(), "{} {name}", case.name());
        if got.numel() > 0 {
            case.check_difference(name, &got, scale);
        }
    };
    // TRL puts the chosen first.
    let in_order = |t: &Tensor| Tensor::cat(&[of(t, good), of(t, &bad)], 0);
    let some = |name: &str, got: &Tensor| {
        assert_eq!(
            got.size(),
            case.output(name).size(),
            "{} {name}",
            case.name()
        );
        if got.numel() > 0 {
            case.check(name, got);
        }
    };
    for name in case.outputs() {
        match name {
            "loss" => case.check(name, &loss),
            // TRL's zero of APO-zero is `[1]`.
            "kl" => case.check(name, &Tensor::from(baseline).reshape_as(&case.output(name))),
            "losses" => case.check(name, &in_order(&out.losses)),
            // TRL has these before their weights.
            "chosen_losses" => some(name, &(of(&out.losses, good) / weights.desirable)),
            "rejected_losses" => some(name, &(of(&out.losses, &bad) / weights.undesirable)),
            "chosen_rewards" => rewards(name, good),
            "rejected_rewards" => rewards(name, &bad),
            "grad_policy_logps" => case.check(name, &gradient(&loss, &leaf)),
            other => panic!("{}: unknown output {other}", case.name()),
        }
    }
}

fn bco(case: &Case<'_>) {
    let leaves =
        ["policy_chosen", "policy_rejected"].map(|name| case.input(name).set_requires_grad(true));
    let [chosen, rejected] = leaves.each_ref().map(|t| t.numel() as i64);
    let options = (Kind::Bool, device());
    let completions = UnpairedLogprobs {
        logprobs: Tensor::cat(&leaves, 0),
        ref_logprobs: Tensor::cat(&[case.input("ref_chosen"), case.input("ref_rejected")], 0),
        desirable: Tensor::cat(
            &[
                Tensor::ones([chosen], options),
                Tensor::zeros([rejected], options),
            ],
            0,
        ),
    };
    let beta = case.number("beta").unwrap();
    let rewards = completions.log_ratios().unwrap().detach() * beta;
    let mut running = RunningMoments::default();
    running.update(&case.input("history")).unwrap();
    running.update(&rewards).unwrap();
    let bounds = ["min_density_ratio", "max_density_ratio"].map(|n| case.number(n).unwrap());
    let weights = (case.setting("udm") == true).then(|| {
        let p = case.input("prob_desirable");
        let ratio = unpaired::density_ratio(&p, 1e-8, bounds[0], bounds[1]).unwrap();
        Tensor::cat(&[Tensor::ones([chosen], (case.kind, device())), ratio], 0)
    });
    let out = unpaired::bco(&completions, running.mean(), beta, weights.as_ref()).unwrap();
    let loss = mean(&out.loss);
    let scale = completions.logprobs.abs().max().double_value(&[]);
    for name in case.outputs() {
        match name {
            "loss" => case.check(name, &loss),
            "losses" => case.check(name, &out.losses),
            "chosen_rewards" => {
                case.check_difference(name, &out.rewards.narrow(0, 0, chosen), scale);
            }
            "rejected_rewards" => {
                case.check_difference(name, &out.rewards.narrow(0, chosen, rejected), scale);
            }
            "delta" => case.check_difference(name, &Tensor::from(running.mean()), scale),
            "running_std" => case.check_difference(name, &Tensor::from(running.std()), scale),
            "grad_policy_chosen" => case.check(name, &gradient(&loss, &leaves[0])),
            "grad_policy_rejected" => case.check(name, &gradient(&loss, &leaves[1])),
            other => panic!("{}: unknown output {other}", case.name()),
        }
    }
}

/// The contrastive part of TRL's CPO trainer, without a reference, on sums or means of log-probs.
fn contrast(case: &Case<'_>, name: &str, values: &PairValues, gamma: &str) -> PreferenceOutput {
    let beta = case.number("beta").unwrap();
    let label_smoothing = case.number("label_smoothing").unwrap();
    match name {
        "sigmoid" => likelihood::cpo(values, beta, label_smoothing, 0.0),
        "hinge" => margin::hinge(values, beta),
        "ipo" => margin::ipo(values, beta),
        "simpo" | "tpo-l" => {
            let gamma = case.number(gamma).unwrap();
            match case.number("alpha") {
                Some(alpha) => likelihood::alphapo(values, beta, gamma, alpha),
                None => likelihood::simpo(values, beta, gamma, label_smoothing),
            }
        }
        other => panic!("{}: unknown loss {other}", case.name()),
    }
    .unwrap()
}

fn cpo(case: &Case<'_>) {
    let leaf = |name| case.input(name).set_requires_grad(true);
    let name = case.text("loss_type").unwrap();
    let averages = ["ipo", "simpo"].contains(&name);
    let leaves = if averages {
        [leaf("chosen_avg"), leaf("rejected_avg")]
    } else {
        [leaf("chosen"), leaf("rejected")]
    };
    let values = PairValues::new(&leaves[0], &leaves[1]).unwrap();
    let out = contrast(case, name, &values, "simpo_gamma");
    let loss = mean(&out.loss);
    for name in case.outputs() {
        match name {
            "loss" => case.check(name, &loss),
            "losses" => case.check(name, &out.losses),
            "chosen_rewards" => case.check(name, &out.chosen_rewards),
            "rejected_rewards" => case.check(name, &out.rejected_rewards),
            "grad_chosen" | "grad_chosen_avg" => case.check(name, &gradient(&loss, &leaves[0])),
            "grad_rejected" | "grad_rejected_avg" => {
                case.check(name, &gradient(&loss, &leaves[1]));
            }
            other => panic!("{}: unknown output {other}", case.name()),
        }
    }
}

fn orpo(case: &Case<'_>) {
    let leaves = ["chosen_avg", "rejected_avg"].map(|n| case.input(n).set_requires_grad(true));
    let means = PairValues::new(&leaves[0], &leaves[1]).unwrap();
    let lambda = case.number("beta").unwrap();
    let out = likelihood::odds_ratio(&means, lambda).unwrap();
    let loss = mean(&out.loss);
    let log_odds = likelihood::log_odds(&means).margin();
    for name in case.outputs() {
        match name {
            "loss" => case.check(name, &loss),
            "losses_trl_sign" => case.check(name, &-&out.losses),
            "chosen_rewards" => case.check(name, &out.chosen_rewards),
            "rejected_rewards" => case.check(name, &out.rejected_rewards),
            "log_odds_ratio" => case.check(name, &(-&loss / lambda)),
            "log_odds_chosen" => case.check(name, &log_odds.mean(case.kind)),
            "grad_chosen_avg" => case.check(name, &gradient(&loss, &leaves[0])),
            "grad_rejected_avg" => case.check(name, &gradient(&loss, &leaves[1])),
            other => panic!("{}: unknown output {other}", case.name()),
        }
    }
}

/// Log-probs of the next tokens `[B, T-1]` from logits `[B, T, V]`.
fn next_logprobs(logits: &Tensor, ids: &Tensor) -> Tensor {
    let (from, to) = (logits.slice(1, 0, -1, 1), ids.slice(1, 1, None, 1));
    let flat = from.reshape([-1, from.size()[2]]);
    token_logprobs(&flat, &to.reshape([-1]))
        .unwrap()
        .reshape_as(&to)
}

/// Triple preference optimisation: a contrast without a reference, and the NLL of a third, gold completion.
fn tpo(case: &Case<'_>) {
    let leaf = case.input("logits").set_requires_grad(true);
    let mask = case.mask("cmask").slice(1, 1, None, 1);
    let logprobs = next_logprobs(&leaf, &case.input("ids"));
    let pairs = mask.size()[0] / 3;
    let two = |t: &Tensor| t.narrow(0, 0, 2 * pairs);
    let tokens = halves(&two(&logprobs), &two(&mask));
    let third = |t: &Tensor| t.narrow(0, 2 * pairs, pairs);
    let gold = nll::tokens(&Ragged::from_padded(&third(&logprobs), &third(&mask)).unwrap());
    let name = case.text("loss_type").unwrap();
    let mut values = tokens.sums().unwrap();
    if ["ipo", "tpo-l"].contains(&name) {
        values = values.per_token(&tokens.lengths().unwrap()).unwrap();
    }
    let out = contrast(case, name, &values, "tpo_l_gamma");
    let loss = mean(&out.loss) + mean(&gold) * case.number("tpo_alpha").unwrap();
    for name in case.outputs() {
        match name {
            "loss" => case.check(name, &loss),
            "grad_logits" => case.check(name, &gradient(&loss, &leaf)),
            other => panic!("{}: unknown output {other}", case.name()),
        }
    }
}

fn batch_logprobs(case: &Case<'_>) {
    let leaf = case.input("logits").set_requires_grad(true);
    let labels = case.input("labels");
    let logprobs = next_logprobs(&leaf, &labels.clamp_min(0));
    let mask = labels.slice(1, 1, None, 1).ne(-100);
    let ragged = Ragged::from_padded(&logprobs, &mask).unwrap();
    let sums = ragged.sum();
    let rows = Tensor::arange(sums.numel() as i64, (case.kind, device())) + 1.0;
    let loss = (&sums * rows).sum(case.kind);
    for name in case.outputs() {
        match name {
            "loss" => case.check(name, &loss),
            "sum_logps" => case.check(name, &sums),
            "avg_logps" => case.check(name, &ragged.mean()),
            "nll_all" => case.check(name, &mean(&nll::tokens(&ragged))),
            "grad_logits" => case.check(name, &gradient(&loss, &leaf)),
            other => panic!("{}: unknown output {other}", case.name()),
        }
    }
}
