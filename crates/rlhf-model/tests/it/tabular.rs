//! The tabular model against enumeration.

use rlhf_model::tabular::TabularLm;
use rlhf_model::{CausalLm, target_logprobs};
use tch::{Kind, Tensor};

use crate::device::device;
use crate::support::{batch, group, max_diff};

fn model() -> TabularLm {
    // V = 3, sequences to 3 tokens: 3 + 9 + 27 = 39 states.
    assert_eq!(TabularLm::num_states(3, 3), Some(39));
    let table = (Tensor::arange(3 * 39, (Kind::Double, device())) * 1.7)
        .sin()
        .view([3, 39]);
    TabularLm::new(&table, 3).unwrap()
}

#[test]
fn states_are_numbered_by_length_then_value() {
    let m = model();
    assert_eq!(m.state(&[0]).unwrap(), 0);
    assert_eq!(m.state(&[2]).unwrap(), 2);
    assert_eq!(m.state(&[0, 0]).unwrap(), 3);
    // 3 + (2·3 + 1).
    assert_eq!(m.state(&[2, 1]).unwrap(), 10);
    assert_eq!(m.state(&[2, 2, 2]).unwrap(), 38);
    assert!(m.state(&[]).is_err() && m.state(&[3]).is_err() && m.state(&[0; 4]).is_err());
}

#[test]
fn completions_of_a_prompt_sum_to_one() {
    // All 9 completions of two tokens after the prompt [1], packed into one group.
    let m = model();
    let all: Vec<[u32; 2]> = (0..9).map(|i| [i / 3, i % 3]).collect();
    let completions: Vec<&[u32]> = all.iter().map(|c| &c[..]).collect();
    let b = batch(&[group(0, &[1], &completions)]);
    let logprobs = target_logprobs(&m, &b, 1.0, false).unwrap().logprobs;
    let values = logprobs.values().view([9, 2]);
    let total = values
        .sum_dim_intlist(1, false, None::<Kind>)
        .exp()
        .sum(None::<Kind>);
    assert!((total.double_value(&[]) - 1.0).abs() < 1e-12);
    for (i, c) in all.iter().enumerate() {
        let wanted = m
            .logits(&[1])
            .unwrap()
            .log_softmax(0, None::<Kind>)
            .get(i64::from(c[0]));
        assert!(max_diff(&values.get(i as i64).get(0), &wanted) < 1e-14);
        let wanted = m
            .logits(&[1, i64::from(c[0])])
            .unwrap()
            .log_softmax(0, None::<Kind>);
        assert!(max_diff(&values.get(i as i64).get(1), &wanted.get(i64::from(c[1]))) < 1e-14);
    }
}

#[test]
fn the_score_function_has_mean_zero() {
    // Σ_y p(y) ∇ log p(y) = 0 over all completions.
    let m = model();
    let all: Vec<[u32; 2]> = (0..9).map(|i| [i / 3, i % 3]).collect();
    let completions: Vec<&[u32]> = all.iter().map(|c| &c[..]).collect();
    let b = batch(&[group(0, &[1], &completions)]);
    let logprobs = target_logprobs(&m, &b, 1.0, false).unwrap().logprobs;
    let sums = logprobs
        .values()
        .view([9, 2])
        .sum_dim_intlist(1, false, None::<Kind>);
    (sums.exp().detach() * &sums).sum(None::<Kind>).backward();
    let (name, table) = &m.parameters()[0];
    assert_eq!(name, "table");
    assert!(table.grad().abs().max().double_value(&[]) < 1e-14);
    // A single completion's gradient is not zero: the test above could fail.
    let other = model();
    let one = batch(&[group(0, &[1], &completions[..1])]);
    let lp = target_logprobs(&other, &one, 1.0, false).unwrap().logprobs;
    lp.values().sum(None::<Kind>).backward();
    assert!(other.table().grad().abs().max().double_value(&[]) > 0.1);
}
