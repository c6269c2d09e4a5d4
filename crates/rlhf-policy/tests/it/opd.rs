//! On-policy distillation by enumeration: a student and a teacher that are tables over three tokens, where token 0
//! ends a completion and at most two tokens are drawn after a prompt of one.

use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_data::pack::PackedBatch;
use rlhf_kernels::discounted_returns;
use rlhf_model::tabular::TabularLm;
use rlhf_model::{CausalLm as _, DeviceBatch, target_logprobs};
use rlhf_policy::loss::{PolicyInputs, PolicyLoss, Reduction};
use rlhf_policy::opd::{TeacherDivergence, exact};
use tch::{Device, Kind, Tensor};

const PROMPT: i64 = 1;
const HORIZON: usize = 3;

fn table(shift: f64) -> TabularLm {
    let states = TabularLm::num_states(3, HORIZON).unwrap();
    let logits = (Tensor::arange(3 * states, (Kind::Double, Device::Cpu)) * 1.7 + shift).sin();
    TabularLm::new(&logits.view([3, states]), HORIZON).unwrap()
}

fn completions() -> Vec<Vec<u32>> {
    let mut all = vec![vec![0]];
    for a in 1..3 {
        all.extend((0..3).map(|b| vec![a, b]));
    }
    all
}

fn batch(ids: &[u32]) -> DeviceBatch {
    let group = PromptGroup {
        row: 0,
        prompt: vec![PROMPT as u32],
        completions: vec![Completion::whole(ids.to_vec(), Finish::Stop)],
    };
    DeviceBatch::new(&PackedBatch::pack(&[group]).unwrap(), Device::Cpu).unwrap()
}

/// log-softmax of the next token after `state`.
fn next(lm: &TabularLm, state: &[i64]) -> Tensor {
    let table = &lm.parameters()[0].1;
    let column = table.select(1, lm.state(state).unwrap());
    column.log_softmax(0, Kind::Double)
}

fn gradient(of: &Tensor, lm: &TabularLm) -> Vec<f64> {
    let g = Tensor::run_backward(&[of], &[&lm.parameters()[0].1], true, false);
    Vec::<f64>::try_from(&g[0].view([-1])).unwrap()
}

/// Σ over prefixes of how likely the student comes there (held) times a divergence of the two there.
fn held(
    student: &TabularLm,
    teacher: &TabularLm,
    at: impl Fn(&Tensor, &Tensor) -> Tensor,
) -> Vec<f64> {
    let there = |state: &[i64]| at(&next(student, state), &next(teacher, state).detach());
    let root = next(student, &[PROMPT]).exp().detach();
    let mut total = there(&[PROMPT]);
    for a in 1..3 {
        total += there(&[PROMPT, a]) * root.get(a);
    }
    gradient(&total, student)
}

fn reverse(p: &Tensor, q: &Tensor) -> Tensor {
    (p.exp() * (p - q)).sum(Kind::Double)
}

/// The expected gradient of a loss over the student's own completions.
fn expected(student: &TabularLm, loss: impl Fn(&DeviceBatch) -> Tensor) -> Vec<f64> {
    let mut total = Tensor::from(0f64);
    for ids in completions() {
        let batch = batch(&ids);
        let logprobs = target_logprobs(student, &batch, 1.0, false)
            .unwrap()
            .logprobs;
        let p = logprobs.values().sum(Kind::Double).exp().detach();
        total += loss(&batch) * p;
    }
    gradient(&total, student)
}

fn sampled(student: &TabularLm, teacher: &TabularLm, discount: f64) -> Vec<f64> {
    expected(student, |batch| {
        let now = target_logprobs(student, batch, 1.0, false)
            .unwrap()
            .logprobs;
        let theirs = target_logprobs(teacher, batch, 1.0, false)
            .unwrap()
            .logprobs;
        let rewards = (theirs.values() - now.values()).detach();
        let advantages = discounted_returns(&now.with_values(rewards).unwrap(), discount).unwrap();
        let old = now.with_values(now.values().detach()).unwrap();
        let loss = PolicyLoss::Reinforce {
            reduction: Reduction::SequenceSum {},
        };
        let inputs = PolicyInputs::new(&now, &old, &advantages);
        loss.compute(&inputs).unwrap().loss.sum
    })
}

#[track_caller]
fn assert_equal(got: &[f64], want: &[f64]) {
    assert!(want.iter().any(|x| x.abs() > 1e-2), "{want:?}");
    let gap = got
        .iter()
        .zip(want)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f64::max);
    assert!(gap < 1e-12, "{gap}: {got:?}\n{want:?}");
}

#[test]
fn the_exact_form_is_the_divergence_at_held_prefixes() {
    let (student, teacher) = (table(0.0), table(2.0));
    let of = |d: TeacherDivergence| {
        expected(&student, |batch| {
            exact(&student, &teacher, batch, d, 1.0).unwrap().sum
        })
    };
    let reverse_kl = held(&student, &teacher, reverse);
    assert_equal(&of(TeacherDivergence::ReverseKl {}), &reverse_kl);
    let forward = held(&student, &teacher, |p, q| reverse(q, p));
    assert_equal(&of(TeacherDivergence::ForwardKl {}), &forward);
    let beta = 0.3;
    let js = held(&student, &teacher, |p, q| {
        let m = (q.exp() * beta + p.exp() * (1.0 - beta)).log();
        reverse(q, &m) * beta + reverse(p, &m) * (1.0 - beta)
    });
    assert_equal(&of(TeacherDivergence::JensenShannon { beta }), &js);
    // No gradient goes to the teacher.
    let loss = exact(
        &student,
        &teacher,
        &batch(&[2, 0]),
        TeacherDivergence::ReverseKl {},
        1.0,
    );
    loss.unwrap().sum.backward();
    assert!(!teacher.parameters()[0].1.grad().defined());
}

#[test]
fn the_sampled_form_is_the_same_in_expectation_and_with_discount_1_the_kl_of_completions() {
    let (student, teacher) = (table(0.0), table(2.0));
    assert_equal(
        &sampled(&student, &teacher, 0.0),
        &held(&student, &teacher, reverse),
    );
    let mut kl = Tensor::from(0f64);
    for ids in completions() {
        let sum = |lm: &TabularLm| {
            let l = target_logprobs(lm, &batch(&ids), 1.0, false)
                .unwrap()
                .logprobs;
            l.values().sum(Kind::Double)
        };
        let own = sum(&student);
        kl += own.exp() * (&own - sum(&teacher).detach());
    }
    assert_equal(&sampled(&student, &teacher, 1.0), &gradient(&kl, &student));
}
