//! The preference losses against TRL's own numbers and the papers'.

use rlhf_dpo::loss::{PairLogprobs, PreferenceLoss};
use rlhf_kernels::Ragged;

use crate::golden_io::{Case, gradient, run};

#[test]
fn c_dpo() {
    run(&["c/"], |case| {
        if case.after("c/sigmoid/").is_none() && case.after("c/cdpo_").is_none() {
            return false;
        }
        sigmoid(case);
        true
    });
}

fn sigmoid(case: &Case<'_>) {
    let leaf = case.input("policy_logps").set_requires_grad(true);
    // TRL's mask is of tokens, its log-probs are of the next one.
    let mask = case.mask("completion_mask").slice(1, 1, None, 1);
    let sums = |t| Ragged::from_padded(t, &mask).unwrap().sum();
    let (policy, reference) = (sums(&leaf), sums(&case.input("ref_logps")));
    let halves = |t: &tch::Tensor| {
        let mut parts = t.chunk(2, 0);
        let second = parts.pop().unwrap();
        (parts.pop().unwrap(), second)
    };
    let ((chosen, rejected), (ref_chosen, ref_rejected)) = (halves(&policy), halves(&reference));
    let pairs = PairLogprobs {
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
    };
    let loss = PreferenceLoss::Sigmoid {
        beta: case.number("beta").unwrap(),
        label_smoothing: case.number("label_smoothing").unwrap(),
    };
    let out = loss.compute(&pairs).unwrap();
    let mean = &out.loss.sum / out.loss.weight;
    case.check("loss", &mean);
    // Rewards are differences of sums of log-probs.
    let scale = loss.beta() * policy.abs().max().double_value(&[]);
    case.check_difference("chosen_rewards", &out.chosen_rewards, scale);
    case.check_difference("rejected_rewards", &out.rejected_rewards, scale);
    case.check("grad_policy_logps", &gradient(&mean, &leaf));
    if case.has("losses") {
        case.check("losses", &out.losses);
        return;
    }
    case.check("loss_sigmoid", &out.losses);
    case.check("chosen_logps", &pairs.chosen);
    case.check("rejected_logps", &pairs.rejected);
    case.check("grad_chosen_logps", &gradient(&mean, &pairs.chosen));
    case.check("grad_rejected_logps", &gradient(&mean, &pairs.rejected));
    let kind = case.kind;
    case.check("metric_rewards_accuracies", &out.accuracies().mean(kind));
    case.check_difference("metric_rewards_margins", &out.margins().mean(kind), scale);
    case.check("metric_rewards_chosen", &out.chosen_rewards.mean(kind));
    case.check("metric_rewards_rejected", &out.rejected_rewards.mean(kind));
}
