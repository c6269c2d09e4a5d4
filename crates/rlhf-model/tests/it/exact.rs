//! Sharing a prompt among its completions changes nothing but the time: logits and every gradient
//! equal those of running each (prompt, completion) alone.

use rlhf_data::group::PromptGroup;
use rlhf_model::{CausalLm, DeviceBatch, Reference, Transformer, target_logprobs};
use tch::{Kind, Tensor};

use crate::device::device;
use crate::support::{batch, group, max_diff, plain, relative_diff, small};

fn groups() -> Vec<PromptGroup> {
    vec![
        group(
            0,
            &[3, 5, 7, 9, 11],
            &[&[1, 2, 3], &[4, 5], &[6, 7, 8, 9, 10, 11, 12]],
        ),
        group(1, &[8], &[&[30, 31]]),
        plain(2, &[13, 14, 15, 16]),
        group(3, &[20, 21, 22], &[&[23], &[23], &[24, 25, 26, 27]]),
    ]
}

/// The same groups with one completion each.
fn alone(groups: &[PromptGroup]) -> Vec<PromptGroup> {
    groups
        .iter()
        .flat_map(|g| {
            g.completions.iter().map(|c| PromptGroup {
                row: g.row,
                prompt: g.prompt.clone(),
                completions: vec![c.clone()],
            })
        })
        .collect()
}

/// A loss that weighs every target differently, so that no error cancels.
fn loss(model: &Transformer, batch: &DeviceBatch, weights: &Tensor) -> Tensor {
    let logprobs = target_logprobs(model, batch, 0.8, false).unwrap().logprobs;
    (logprobs.values() * weights).sum(None::<Kind>)
}

fn compare(kind: Kind, logits_tolerance: f64, gradient_tolerance: f64) {
    let groups = groups();
    let packed = batch(&groups);
    let model = small(kind);
    let weights = (Tensor::arange(packed.num_targets(), (kind, device())) * 0.9).cos();
    loss(&model, &packed, &weights).backward();
    let packed_gradients: Vec<Tensor> = model
        .parameters()
        .iter()
        .map(|(_, t)| t.grad().copy())
        .collect();
    let packed_logits = model.logits(&packed).unwrap();

    let single = model.duplicate().unwrap();
    let (mut s, mut worst) = (0, 0.0_f64);
    let mut spans = packed.layout.groups().iter().flat_map(|g| {
        g.completions
            .iter()
            .map(move |c| (g.prompt.clone(), c.clone()))
    });
    for one in alone(&groups) {
        let b = batch(std::slice::from_ref(&one));
        let range = packed.offsets.host()[s]..packed.offsets.host()[s + 1];
        s += 1;
        let weights = weights.narrow(0, range.start, range.end - range.start);
        loss(&single, &b, &weights).backward();
        let logits = single.logits(&b).unwrap();
        let (prompt, completion) = spans.next().unwrap();
        let (p, c) = (prompt.end - prompt.start, completion.end - completion.start);
        worst = worst.max(max_diff(
            &logits.narrow(0, p, c),
            &packed_logits.narrow(0, completion.start, c),
        ));
        if p > 0 {
            let d = max_diff(
                &logits.narrow(0, 0, p),
                &packed_logits.narrow(0, prompt.start, p),
            );
            worst = worst.max(d);
        }
    }
    eprintln!("{kind:?}: logits differ by {worst:.1e}");
    assert!(worst <= logits_tolerance);
    for ((name, t), packed) in single.parameters().iter().zip(&packed_gradients) {
        let d = relative_diff(packed, &t.grad());
        assert!(
            d <= gradient_tolerance,
            "{kind:?}: gradient of {name} differs by {d:.1e}"
        );
    }
}

#[test]
fn shared_prompts_in_f32() {
    compare(Kind::Float, 1e-5, 1e-5);
}

#[test]
fn shared_prompts_in_f64() {
    compare(Kind::Double, 1e-11, 1e-11);
}

#[test]
fn the_reference_agrees_and_has_no_graph() {
    let model = small(Kind::Double);
    let reference = Reference::new(model.duplicate().unwrap());
    let b = batch(&groups());
    let ours = target_logprobs(&model, &b, 1.3, true).unwrap();
    let theirs = reference.logprobs(&b, 1.3).unwrap();
    assert!(!theirs.values().requires_grad() && ours.logprobs.values().requires_grad());
    assert!(max_diff(ours.logprobs.values(), theirs.values()) == 0.0);
    // Entropy of a distribution over 40 tokens.
    let entropy = ours.entropy.unwrap();
    let (low, high) = (entropy.values().min(), entropy.values().max());
    assert!(low.double_value(&[]) > 0.0 && high.double_value(&[]) <= 40_f64.ln());
}

#[test]
fn a_batch_that_does_not_fit_is_refused() {
    let model = small(Kind::Float);
    let e = model
        .hidden(&batch(&[plain(0, &[39, 40])]))
        .unwrap_err()
        .to_string();
    assert!(
        e.contains("token id 40") && e.contains("vocabulary of 40"),
        "{e}"
    );
    let e = model
        .hidden(&batch(&[plain(0, &[1; 65])]))
        .unwrap_err()
        .to_string();
    assert!(
        e.contains("65 tokens") && e.contains("context of 64"),
        "{e}"
    );
}

#[test]
fn duplicates_do_not_share_weights() {
    let a = small(Kind::Float);
    let b = a.duplicate().unwrap();
    let batch = batch(&groups());
    let before = a.logits(&batch).unwrap();
    {
        let _no_grad = tch::no_grad_guard();
        for (_, t) in b.parameters() {
            let _ = t.detach().fill_(0.5);
        }
    }
    assert!(max_diff(&a.logits(&batch).unwrap(), &before) == 0.0);
    b.copy_from(&a).unwrap();
    assert!(max_diff(&b.logits(&batch).unwrap(), &before) == 0.0);
}
