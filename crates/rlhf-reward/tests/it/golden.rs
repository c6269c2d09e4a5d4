//! The reward losses against TRL's and transformers' own numbers and the papers'.

use rlhf_kernels::{Offsets, Ragged};
use rlhf_reward::bradley_terry::{self, BradleyTerry, PairStats};
use rlhf_reward::pairs::Pairs;
use rlhf_reward::{plackett_luce, process};
use tch::{Kind, Tensor};

use crate::device::device;
use crate::golden_io::{Case, gradient, run};

#[test]
fn e_reward() {
    run(&["e/"], |case| {
        if case.after("e/bt/").is_some() {
            bradley_terry(case);
        } else if case.after("e/plackett_luce/").is_some() {
            plackett_luce(case);
        } else if case.after("e/prm/").is_some() {
            process(case);
        } else {
            panic!("unknown case {}", case.name());
        }
        true
    });
}

fn bradley_terry(case: &Case<'_>) {
    // [chosen; rejected], one column.
    let leaf = case.input("logits").set_requires_grad(true);
    let scores = leaf.squeeze_dim(1);
    let pairs = scores.size()[0] / 2;
    let (chosen, rejected) = (scores.narrow(0, 0, pairs), scores.narrow(0, pairs, pairs));
    let margin = case
        .setting("margin")
        .as_bool()
        .unwrap()
        .then(|| case.input("margin"));
    let settings = BradleyTerry {
        margin: margin.as_ref(),
        centering: case.number("center").unwrap_or(0.0),
        ..BradleyTerry::default()
    };
    let out = bradley_terry::loss(&chosen, &rejected, &settings).unwrap();
    let mean = out.sum / out.weight;
    case.check("loss", &mean);
    case.check("grad_logits", &gradient(&mean, &leaf));
    let stats = PairStats::of(&chosen, &rejected).unwrap();
    // TRL counts a tie as wrong.
    case.check("metric_accuracy", &Tensor::from(stats.right / stats.pairs));
    case.check("metric_margin", &Tensor::from(stats.mean_margin()));
    case.check("metric_min_reward", &scores.min());
    case.check("metric_mean_reward", &scores.mean(None::<Kind>));
    case.check("metric_max_reward", &scores.max());
}

fn plackett_luce(case: &Case<'_>) {
    let leaf = case.input("rewards").set_requires_grad(true);
    let lengths = Vec::<i64>::try_from(&case.input("n_items")).unwrap();
    let offsets = Offsets::from_lengths(&lengths).unwrap();
    let real = Tensor::arange(leaf.size()[1], (Kind::Int64, device()))
        .unsqueeze(0)
        .lt_tensor(&case.input("n_items").unsqueeze(1));
    let scores = Ragged::from_padded(&leaf, &real).unwrap();
    let out = plackett_luce::loss(&scores, None).unwrap();
    let mean = out.sum / out.weight;
    case.check("loss", &mean);
    case.check("grad_rewards", &gradient(&mean, &leaf));

    // Each ranking alone, and its pairs.
    let (mut nll, mut pairwise) = (Vec::new(), Vec::new());
    for row in 0..lengths.len() as i64 {
        let (start, n) = (offsets.host()[row as usize], lengths[row as usize]);
        let one = scores.values().narrow(0, start, n);
        let alone = Offsets::from_lengths(&[n]).unwrap();
        let ranking = Ragged::new(one.shallow_clone(), alone.clone()).unwrap();
        nll.push(plackett_luce::loss(&ranking, None).unwrap().sum);
        let pairs = Pairs::of_rankings(&alone)
            .unwrap()
            .tensors(case.kind, device());
        let settings = BradleyTerry {
            weights: Some(&pairs.weights),
            ..BradleyTerry::default()
        };
        let out = bradley_terry::loss_of_pairs(&one, &pairs.chosen, &pairs.rejected, &settings);
        pairwise.push(out.unwrap().sum);
    }
    case.check("nll", &Tensor::stack(&nll, 0));
    case.check("instructgpt_pairwise", &Tensor::stack(&pairwise, 0));

    // All rankings in one batch: the pairs' weights make it the mean over prompts.
    let pairs = Pairs::of_rankings(&offsets)
        .unwrap()
        .tensors(case.kind, device());
    let settings = BradleyTerry {
        weights: Some(&pairs.weights),
        ..BradleyTerry::default()
    };
    let out =
        bradley_terry::loss_of_pairs(scores.values(), &pairs.chosen, &pairs.rejected, &settings)
            .unwrap();
    case.check(
        "grad_rewards_pairwise",
        &gradient(&(out.sum / out.weight), &leaf),
    );
}

fn process(case: &Case<'_>) {
    let leaf = case.input("logits").set_requires_grad(true);
    let labels = case.input("labels").reshape([-1]);
    // The peer marks what is no step's end by −100.
    let ends = labels.ne(-100).nonzero().squeeze_dim(1);
    let logits = leaf.reshape([-1, leaf.size()[2]]).index_select(0, &ends);
    let labels = labels.index_select(0, &ends);
    let out = process::loss(&logits, &labels, None).unwrap();
    let mean = out.sum / case.number("num_items").unwrap_or(out.weight);
    case.check("loss", &mean);
    case.check("grad_logits", &gradient(&mean, &leaf));
    let right = logits.argmax(1, false).eq_tensor(&labels);
    case.check("accuracy", &right.to_kind(Kind::Double).mean(None::<Kind>));
}
