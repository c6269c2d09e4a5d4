//! Control against dynamic programming: a Markov decision process of three states, every trajectory of which is
//! enumerated.
//!
//! The oracle knows the process's tables alone: values by backward induction, gradients by differentiating
//! through it, state distributions by forward induction; all in f64.

use rlhf_data::seed::Purpose;
use rlhf_kernels::{Offsets, Ragged};
use rlhf_policy::advantage::Whitening;
use rlhf_policy::control::{
    Act, Batch, Collect, Ends, Environment, GridWorld, Lanes, Mlp, Noise, Outcome, Part,
    advantages, losses,
};
use rlhf_policy::loss::{Clip, PolicyLoss, RatioLevel, Reduction};
use tch::{Device, Kind, Tensor};

const STATES: usize = 3;
const ACTIONS: usize = 2;
const START: [f64; STATES] = [0.7, 0.3, 0.0];
/// p(next | state, action); the last column is the end.
const NEXT: [[[f64; STATES + 1]; ACTIONS]; STATES] = [
    [[0.1, 0.6, 0.2, 0.1], [0.5, 0.0, 0.3, 0.2]],
    [[0.3, 0.3, 0.4, 0.0], [0.0, 0.2, 0.5, 0.3]],
    [[0.6, 0.1, 0.0, 0.3], [0.2, 0.2, 0.2, 0.4]],
];
const REWARD: [[f64; ACTIONS]; STATES] = [[0.5, -1.0], [1.5, 0.3], [-0.4, 2.0]];
const LIMIT: u32 = 3;

/// The process as an environment, for the collector.
#[derive(Clone, Debug, Default)]
struct Process {
    state: usize,
}

fn pick(probabilities: &[f64], u: f64) -> usize {
    let mut sum = 0.0;
    let at = probabilities.iter().position(|p| {
        sum += p;
        u < sum
    });
    at.unwrap_or(probabilities.len() - 1)
}

impl Environment for Process {
    fn observation_size(&self) -> usize {
        STATES
    }
    fn actions(&self) -> usize {
        ACTIONS
    }
    fn time_limit(&self) -> Option<u32> {
        Some(LIMIT)
    }
    fn reset(&mut self, noise: Noise) {
        self.state = pick(&START, noise.uniform(0));
    }
    fn observe(&self, into: &mut Vec<f32>) {
        into.extend((0..STATES).map(|s| if s == self.state { 1.0f32 } else { 0.0 }));
    }
    fn step(&mut self, action: usize, noise: Noise) -> Outcome {
        let reward = REWARD[self.state][action];
        let next = pick(&NEXT[self.state][action], noise.uniform(0));
        let terminated = next == STATES;
        if !terminated {
            self.state = next;
        }
        Outcome { reward, terminated }
    }
    fn state(&self) -> Vec<f64> {
        vec![self.state as f64]
    }
    fn restore(&mut self, state: &[f64]) {
        self.state = state[0] as usize;
    }
}

/// A table of logits, and one of values.
fn networks() -> (Mlp, Mlp) {
    let policy = Mlp::new(&[STATES, ACTIONS], 1.5, 5, Kind::Double).unwrap();
    let value = Mlp::new(&[STATES, 1], 1.0, 6, Kind::Double).unwrap();
    (policy, value)
}

fn every_state() -> Tensor {
    Tensor::eye(STATES as i64, (Kind::Double, Device::Cpu))
}

fn table(x: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(&x.detach().reshape([-1])).unwrap()
}

fn set(network: &Mlp, values: &[f64]) {
    let _guard = tch::no_grad_guard();
    let parameters = network.parameters();
    let [weight, bias] = &parameters[..] else {
        panic!("one layer")
    };
    weight
        .1
        .shallow_clone()
        .copy_(&Tensor::from_slice(values).view([1, -1]));
    let _ = bias.1.shallow_clone().zero_();
}

struct Trajectory {
    states: Vec<usize>,
    actions: Vec<usize>,
    /// Where it stands after its last step; none where it ended.
    after: Option<usize>,
    probability: f64,
}

/// Every trajectory of at most `LIMIT` steps, with its probability under the policy.
fn trajectories(policy: &[f64]) -> Vec<Trajectory> {
    let mut open: Vec<Trajectory> = (0..STATES)
        .filter(|&s| START[s] > 0.0)
        .map(|s| Trajectory {
            states: vec![],
            actions: vec![],
            after: Some(s),
            probability: START[s],
        })
        .collect();
    let mut done = Vec::new();
    for _ in 0..LIMIT {
        let mut longer = Vec::new();
        for t in open {
            let s = t.after.unwrap();
            for a in 0..ACTIONS {
                for (next, p) in NEXT[s][a].iter().enumerate().filter(|(_, p)| **p > 0.0) {
                    let grown = Trajectory {
                        states: [&t.states[..], &[s]].concat(),
                        actions: [&t.actions[..], &[a]].concat(),
                        after: (next < STATES).then_some(next),
                        probability: t.probability * policy[s * ACTIONS + a] * p,
                    };
                    if next < STATES {
                        longer.push(grown);
                    } else {
                        done.push(grown);
                    }
                }
            }
        }
        open = longer;
    }
    done.extend(open);
    done
}

/// All trajectories as a batch; those that were cut are open if `bootstrap`.
fn batch(all: &[Trajectory], policy: &[f64], bootstrap: bool) -> Batch {
    let one_hot = |states: Vec<usize>| {
        let index: Vec<i64> = states.iter().map(|&s| s as i64).collect();
        every_state().index_select(0, &Tensor::from_slice(&index))
    };
    let lengths: Vec<i64> = all.iter().map(|t| t.states.len() as i64).collect();
    let offsets = Offsets::from_lengths(&lengths).unwrap();
    let steps: Vec<(usize, usize)> = all
        .iter()
        .flat_map(|t| t.states.iter().copied().zip(t.actions.iter().copied()))
        .collect();
    let of = |f: &dyn Fn(usize, usize) -> f64| {
        let x: Vec<f64> = steps.iter().map(|&(s, a)| f(s, a)).collect();
        Ragged::new(Tensor::from_slice(&x), offsets.clone()).unwrap()
    };
    let actions: Vec<i64> = steps.iter().map(|s| s.1 as i64).collect();
    Batch {
        observations: one_hot(steps.iter().map(|s| s.0).collect()),
        actions: Tensor::from_slice(&actions),
        logprobs: of(&|s, a| policy[s * ACTIONS + a].ln()),
        rewards: of(&|s, a| REWARD[s][a]),
        // The state where it ended does not matter: the piece is closed.
        after: one_hot(all.iter().map(|t| t.after.unwrap_or(0)).collect()),
        open: all.iter().map(|t| bootstrap && t.after.is_some()).collect(),
        terminated: vec![false; steps.len()],
    }
}

/// The expected gradient of the loss over all trajectories: that of Σ p(τ) Σ_t loss.
fn expected_gradient(
    (policy, value): (&Mlp, Option<&Mlp>),
    (gamma, lambda): (f64, f64),
    bootstrap: bool,
) -> Vec<f64> {
    let probabilities = table(
        &policy
            .forward(&every_state())
            .unwrap()
            .softmax(1, Kind::Double),
    );
    let all = trajectories(&probabilities);
    assert!((all.iter().map(|t| t.probability).sum::<f64>() - 1.0).abs() < 1e-12);
    let batch = batch(&all, &probabilities, bootstrap);
    let of = |x: &Tensor| match value {
        Some(v) => v.scalars(x).unwrap().detach(),
        None => Tensor::zeros([x.size()[0]], (Kind::Double, Device::Cpu)),
    };
    let values = batch.rewards.with_values(of(&batch.observations)).unwrap();
    let known = advantages(
        &batch,
        &values,
        &of(&batch.after),
        (gamma, lambda),
        Whitening::None,
    )
    .unwrap();
    let mut part = Part::whole(&batch, &values, &known).unwrap();
    let weights: Vec<f64> = all.iter().map(|t| t.probability).collect();
    let weights = batch.rewards.broadcast(&Tensor::from_slice(&weights));
    part.weights = Some(batch.rewards.with_values(weights).unwrap());
    let loss = PolicyLoss::Clipped {
        clip: Clip::symmetric(0.2),
        ratio: RatioLevel::Token,
        reduction: Reduction::SequenceSum {},
    };
    let (out, _) = losses(&part, policy, None, &loss, None, 0.0).unwrap();
    gradient(&(-out.loss.sum), policy)
}

fn gradient(of: &Tensor, network: &Mlp) -> Vec<f64> {
    let parameters: Vec<Tensor> = network.parameters().into_iter().map(|p| p.1).collect();
    Tensor::run_backward(&[of], &parameters, false, false)
        .iter()
        .flat_map(table)
        .collect()
}

/// r + γ Σ p v of each state and action, `[states, actions]`; the end is worth nothing.
fn backed_up(v: &Tensor, gamma: f64) -> Tensor {
    let next: Vec<f64> = NEXT
        .iter()
        .flatten()
        .flat_map(|p| p[..STATES].iter().copied())
        .collect();
    let rewards: Vec<f64> = REWARD.iter().flatten().copied().collect();
    let shape = [STATES as i64, ACTIONS as i64];
    let next = Tensor::from_slice(&next).view([shape[0], shape[1], STATES as i64]);
    Tensor::from_slice(&rewards).view(shape) + next.matmul(v) * gamma
}

/// J by backward induction over `LIMIT` steps, then `tail`; its gradient by differentiating through it.
fn exact_gradient(policy: &Mlp, tail: &[f64], gamma: f64) -> Vec<f64> {
    let pi = policy
        .forward(&every_state())
        .unwrap()
        .softmax(1, Kind::Double);
    let mut v = Tensor::from_slice(tail);
    for _ in 0..LIMIT {
        v = (&pi * backed_up(&v, gamma)).sum_dim_intlist(&[1i64][..], false, Kind::Double);
    }
    gradient(&(v * Tensor::from_slice(&START)).sum(Kind::Double), policy)
}

/// V of the policy without a time limit, by value iteration to rest.
fn values_without_limit(policy: &Mlp, gamma: f64) -> Vec<f64> {
    let pi = policy
        .forward(&every_state())
        .unwrap()
        .softmax(1, Kind::Double)
        .detach();
    let mut v = Tensor::zeros([STATES as i64], (Kind::Double, Device::Cpu));
    for _ in 0..2000 {
        v = (&pi * backed_up(&v, gamma)).sum_dim_intlist(&[1i64][..], false, Kind::Double);
    }
    table(&v)
}

fn close(got: &[f64], expected: &[f64]) {
    assert!(
        expected.iter().any(|x| x.abs() > 1e-2),
        "a gradient of nothing"
    );
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!((g - e).abs() < 1e-12, "[{i}]: {g} against {e}");
    }
}

#[test]
fn reinforce_is_the_gradient_of_the_return() {
    let (policy, value) = networks();
    let exact = exact_gradient(&policy, &[0.0; STATES], 1.0);
    close(
        &expected_gradient((&policy, None), (1.0, 1.0), false),
        &exact,
    );
    // A baseline of any values changes nothing in expectation.
    close(
        &expected_gradient((&policy, Some(&value)), (1.0, 1.0), false),
        &exact,
    );
}

#[test]
fn n_step_returns_are_the_gradient_with_values_behind_them() {
    let (policy, value) = networks();
    let tail = table(&value.scalars(&every_state()).unwrap());
    let exact = exact_gradient(&policy, &tail, 1.0);
    close(
        &expected_gradient((&policy, Some(&value)), (1.0, 1.0), true),
        &exact,
    );
    // With λ < 1 and values that are wrong it is not: the bias of GAE.
    let biased = expected_gradient((&policy, Some(&value)), (1.0, 0.5), true);
    assert!(biased.iter().zip(&exact).any(|(b, e)| (b - e).abs() > 1e-2));
}

/// With exact values every λ gives the policy gradient theorem's Σ_t Σ_s d_t(s) Σ_a ∇π Q over the steps that were
/// taken, and a time limit leaves no trace. (d_t is not discounted: as everywhere in practice, γ acts on what
/// follows a step and not on the step's own weight.)
#[test]
fn values_bootstrap_through_the_time_limit() {
    let gamma = 0.9;
    let (policy, value) = networks();
    let v = values_without_limit(&policy, gamma);
    set(&value, &v);
    let q = backed_up(&Tensor::from_slice(&v), gamma);
    let pi = policy
        .forward(&every_state())
        .unwrap()
        .softmax(1, Kind::Double);
    let probabilities = table(&pi);
    let mut at = START.to_vec();
    let mut visits = vec![0.0; STATES];
    for _ in 0..LIMIT {
        let mut next = vec![0.0; STATES];
        for s in 0..STATES {
            visits[s] += at[s];
            for a in 0..ACTIONS {
                for (n, to) in next.iter_mut().enumerate() {
                    *to += at[s] * probabilities[s * ACTIONS + a] * NEXT[s][a][n];
                }
            }
        }
        at = next;
    }
    let visits = Tensor::from_slice(&visits).unsqueeze(1);
    let exact = gradient(&(visits * pi * q).sum(Kind::Double), &policy);
    for lambda in [0.0, 0.6, 1.0] {
        let learners = (&policy, Some(&value));
        close(&expected_gradient(learners, (gamma, lambda), true), &exact);
        let ended = expected_gradient(learners, (gamma, lambda), false);
        let off = ended.iter().zip(&exact).map(|(a, b)| (a - b).abs());
        assert!(off.fold(0.0, f64::max) > 0.05, "a cut is no end: {lambda}");
    }
}

#[test]
fn what_is_drawn_is_what_was_enumerated() {
    let (policy, _) = networks();
    let pi = policy
        .forward(&every_state())
        .unwrap()
        .softmax(1, Kind::Double);
    let probabilities = table(&pi);
    let n = 20_000;
    let mut lanes = Lanes::new(&Process::default(), n, 11, 0);
    let drawn = lanes
        .collect(&policy, Collect::Episodes, Ends::Seen, Act::Sampled)
        .unwrap();
    let b = drawn.batch;
    let (states, actions) = (
        Vec::<i64>::try_from(&b.observations.argmax(1, false)).unwrap(),
        Vec::<i64>::try_from(&b.actions).unwrap(),
    );
    let after = Vec::<i64>::try_from(&b.after.argmax(1, false)).unwrap();
    let (rewards, logprobs) = (table(b.rewards.values()), table(b.logprobs.values()));
    let mut counts = std::collections::BTreeMap::<(Vec<i64>, Vec<i64>, i64), f64>::new();
    for (s, w) in b.rewards.offsets().host().windows(2).enumerate() {
        let steps = w[0] as usize..w[1] as usize;
        let end = if b.open[s] { after[s] } else { -1 };
        assert_eq!(b.terminated[steps.end - 1], !b.open[s]);
        assert_eq!(drawn.finished[s].truncated, b.open[s]);
        assert_eq!(drawn.finished[s].length as usize, steps.len());
        let total: f64 = rewards[steps.clone()].iter().sum();
        assert_eq!(drawn.finished[s].total, total);
        for i in steps.clone() {
            let (s, a) = (states[i] as usize, actions[i] as usize);
            assert_eq!(rewards[i], REWARD[s][a]);
            assert!((logprobs[i] - probabilities[s * ACTIONS + a].ln()).abs() < 1e-6);
        }
        let key = (states[steps.clone()].to_vec(), actions[steps].to_vec(), end);
        *counts.entry(key).or_default() += 1.0;
    }
    let all = trajectories(&probabilities);
    assert!(counts.len() <= all.len());
    // χ² over trajectories met at least five times on average: its mean is their number, its deviation √(2k).
    let (mut chi, mut k) = (0.0, 0.0);
    for t in &all {
        let long = |x: &[usize]| x.iter().map(|&i| i as i64).collect::<Vec<i64>>();
        let end = t.after.map_or(-1, |s| s as i64);
        let key = (long(&t.states), long(&t.actions), end);
        let (met, expected) = (
            counts.get(&key).copied().unwrap_or(0.0),
            t.probability * n as f64,
        );
        if expected >= 5.0 {
            chi += (met - expected).powi(2) / expected;
            k += 1.0;
        }
    }
    println!("χ² {chi:.1} over {k} trajectories");
    assert!(k > 50.0 && (chi - k).abs() < 4.0 * (2.0 * k).sqrt());
}

#[test]
fn the_grid_slips_to_both_sides_and_stops_at_walls() {
    // From the middle of three rows, meant to the right: .8 the goal, .1 up into the wall (one stays), .1 down to
    // the pit.
    let world = GridWorld::new(&["###", ".SG", ".X."], 0.2, 0.04, 9).unwrap();
    let mut counts = [0.0; 3];
    let n = 20_000;
    for i in 0..n {
        let mut w = world.clone();
        w.reset(Noise::new(1, Purpose::Noise, i, 0, 0));
        let mut before = Vec::new();
        w.observe(&mut before);
        let out = w.step(1, Noise::new(1, Purpose::Noise, i, 0, 1));
        let mut after = Vec::new();
        w.observe(&mut after);
        let which = match (out.terminated, out.reward > 0.0) {
            (true, true) => 0,
            (false, _) => 1,
            (true, false) => 2,
        };
        let reward = [1.0, 0.0, -1.0][which] - 0.04;
        assert_eq!((out.reward, which == 1), (reward, before == after));
        counts[which] += 1.0;
    }
    for (met, p) in counts.iter().zip([0.8, 0.1, 0.1]) {
        let deviation = (p * (1.0 - p) * f64::from(n)).sqrt();
        assert!(
            (met - p * f64::from(n)).abs() < 4.0 * deviation,
            "{counts:?}"
        );
    }
    for (rows, slip, word) in [
        (&["S.", "."][..], 0.0, "length"),
        (&["S?"][..], 0.0, "'?'"),
        (&[".G"][..], 0.0, "start"),
        (&["SG"][..], 1.5, "slip"),
    ] {
        let e = GridWorld::new(rows, slip, 0.0, 9).unwrap_err().to_string();
        assert!(e.contains(word), "{e}");
    }
}
