//! The reward losses against TRL's own numbers and the papers'.

use rlhf_reward::bradley_terry::{self, BradleyTerry};

use crate::golden_io::{Case, gradient, run};

#[test]
fn e_reward() {
    run(&["e/"], |case| {
        if case.after("e/bt/").is_none() {
            return false;
        }
        bradley_terry(case);
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
}
