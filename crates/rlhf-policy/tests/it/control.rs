//! Control learns: to optima that are known, the same way after a resume, from comparisons as well.

use std::path::Path;

use rlhf_kernels::optim::AdamWConfig;
use rlhf_policy::advantage::Whitening;
use rlhf_policy::control::preferences::{self, PreferenceConfig};
use rlhf_policy::control::{
    Act, Agent, Algorithm, CartPole, Collect, ControlConfig, Ends, Environment, GridWorld, Lanes,
    Mlp, Task, Thermostat, evaluate, train,
};
use rlhf_policy::loss::Clip;
use rlhf_train::{Flow, LrSchedule, Session, SessionConfig, StepperConfig, StopFlag};
use tch::{Kind, Tensor};

const PPO: Algorithm = Algorithm::Ppo {
    horizon: 32,
    gae_lambda: 0.9,
    epochs: 4,
    minibatches: 2,
    clip: Clip {
        epsilon_low: 0.2,
        epsilon_high: 0.2,
        dual: None,
    },
    value_clip: None,
};

fn config(seed: u64, steps: u64, algorithm: Algorithm) -> ControlConfig {
    ControlConfig {
        seed,
        environments: 8,
        steps,
        algorithm,
        gamma: 0.98,
        whitening: Whitening::RemoveMean,
        entropy_coef: 0.0,
    }
}

fn optim(lr: f64) -> (AdamWConfig, StepperConfig) {
    let config = StepperConfig {
        lr,
        schedule: LrSchedule::Constant {},
        warmup_steps: 0,
        total_steps: 1,
        max_grad_norm: Some(0.5),
        max_bad_steps: 1,
    };
    (AdamWConfig::default(), config)
}

fn session(dir: &Path, steps: u64) -> Session {
    Session::open(SessionConfig {
        dir: dir.to_owned(),
        stage: "control".into(),
        total_steps: steps,
        checkpoint_every: 3,
        keep: 1,
        stop: StopFlag::default(),
    })
    .unwrap()
}

fn learned(
    environment: &impl Environment,
    hidden: &[usize],
    cfg: &ControlConfig,
    lr: f64,
) -> Agent {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = Agent::new(environment, hidden, cfg, optim(lr), lr).unwrap();
    let mut session = session(dir.path(), cfg.steps);
    let flow = train(environment, &mut agent, cfg, &mut session).unwrap();
    assert_eq!(flow, Flow::Continue);
    agent
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

/// The best return of the default thermostat from `k` half degrees away, by hand: k − 1, …, 1, 0, then 1 and 0 in
/// turn, half a degree each, over 40 steps.
fn best(k: u32) -> f64 {
    let (mut away, mut cost) = (k, 0.0);
    for _ in 0..40 {
        away = if away > 0 { away - 1 } else { 1 };
        cost += 0.5 * f64::from(away);
    }
    -cost
}

#[test]
fn the_thermostat_s_optimum_by_hand() {
    // From the target: 1, 0, 1, 0, … of half degrees: 20 times ½. From 3 away: 2, 1, 0, then 37 steps, 19 of them 1.
    assert_eq!((best(0), best(3)), (-10.0, -1.5 - 9.5));
    let room = Thermostat::default();
    // Heat below the target.
    let bang_bang = Mlp::new(&[1, 2], 1.0, 1, Kind::Float).unwrap();
    {
        let _guard = tch::no_grad_guard();
        let parameters = bang_bang.parameters();
        let mut weight = parameters[0].1.shallow_clone();
        weight.copy_(&Tensor::from_slice(&[1f32, -1.0]).view([2, 1]));
    }
    let mut lanes = Lanes::new(&room, 200, 3, 0);
    let drawn = lanes
        .collect(&bang_bang, Collect::Episodes, Ends::Seen, Act::Greedy)
        .unwrap();
    let first = drawn.batch.rewards.offsets().host();
    let starts = Vec::<f32>::try_from(&drawn.batch.observations.reshape([-1])).unwrap();
    let mut met = std::collections::BTreeSet::new();
    for (at, episode) in first.iter().zip(&drawn.finished) {
        // Observations are in steps of the heater, which are two half degrees.
        let k = (2.0 * starts[*at as usize]).abs().round();
        met.insert(k as u32);
        assert!(
            (episode.total - best(k as u32)).abs() < 1e-9,
            "{k}: {episode:?}"
        );
        assert!(episode.truncated && episode.length == 40);
    }
    assert_eq!(met.len(), 11, "every start was met");
    assert!(drawn.batch.open.iter().all(|open| *open));
}

#[test]
fn ppo_finds_the_thermostat_s_optimum() {
    let room = Thermostat::default();
    let agent = learned(&room, &[16], &config(1, 40, PPO), 1e-2);
    // Of 21 starts: one at the target, two at each distance.
    let optimum = (best(0) + 2.0 * (1..=10).map(best).sum::<f64>()) / 21.0;
    let got = mean(&evaluate(&room, &agent.policy.network, Act::Greedy, 9, 2000).unwrap());
    println!("thermostat {got:.3}, optimum {optimum:.3}");
    assert!((got - optimum).abs() < 0.35, "{got} against {optimum}");
}

#[test]
fn every_algorithm_finds_the_way_through_a_grid() {
    let world = GridWorld::new(&["..G", ".#X", "S.."], 0.0, 0.04, 30).unwrap();
    // The shortest way has four steps: 1 − 4 · .04.
    for (algorithm, steps) in [
        (Algorithm::Reinforce { baseline: false }, 60),
        (Algorithm::Reinforce { baseline: true }, 60),
        (
            Algorithm::A2c {
                horizon: 8,
                gae_lambda: 1.0,
            },
            120,
        ),
        (PPO, 15),
    ] {
        let cfg = config(2, steps, algorithm);
        let agent = learned(&world, &[], &cfg, 5e-2);
        let returns = evaluate(&world, &agent.policy.network, Act::Greedy, 1, 1).unwrap();
        assert!(
            (returns[0] - 0.84).abs() < 1e-9,
            "{algorithm:?}: {returns:?}"
        );
    }
}

#[test]
fn cart_pole_is_learned() {
    let cart_pole = CartPole::default();
    let before = Mlp::new(&[4, 32, 2], 0.01, 1, Kind::Float).unwrap();
    let before = mean(&evaluate(&cart_pole, &before, Act::Sampled, 1, 50).unwrap());
    let agent = learned(&cart_pole, &[32], &config(1, 40, PPO), 3e-3);
    let after = mean(&evaluate(&cart_pole, &agent.policy.network, Act::Sampled, 1, 50).unwrap());
    println!("cart-pole {before:.0} → {after:.0} in 10,240 steps");
    assert!(before < 40.0 && after > 120.0, "{before} {after}");
}

#[test]
fn lanes_do_not_know_of_each_other_and_can_go_back() {
    let policy = Mlp::new(&[4, 2], 1.0, 1, Kind::Float).unwrap();
    let draw = |lanes: &mut Lanes<CartPole>, steps| {
        let drawn = lanes
            .collect(&policy, Collect::Steps(steps), Ends::Seen, Act::Sampled)
            .unwrap();
        let first = drawn.batch.rewards.offsets().host().len();
        let x = drawn.batch.observations.reshape([-1]);
        (Vec::<f32>::try_from(&x).unwrap(), first)
    };
    let cart_pole = CartPole::default();
    let (mut one, mut three) = (
        Lanes::new(&cart_pole, 1, 5, 0),
        Lanes::new(&cart_pole, 3, 5, 0),
    );
    let (alone, together) = (draw(&mut one, 100).0, draw(&mut three, 100).0);
    assert_eq!(alone[..], together[..400]);
    assert_ne!(together[..400], together[400..800]);
    let state = three.state();
    let text = serde_json::to_string(&state).unwrap();
    let next = draw(&mut three, 60).0;
    let mut again = Lanes::new(&cart_pole, 3, 5, 0);
    again
        .restore(&serde_json::from_str::<Vec<_>>(&text).unwrap())
        .unwrap();
    assert_eq!(draw(&mut again, 60).0, next);
    assert!(Lanes::new(&cart_pole, 2, 5, 0).restore(&state).is_err());
}

#[test]
fn hidden_ends_are_not_seen_but_counted() {
    let policy = Mlp::new(&[4, 2], 0.01, 1, Kind::Float).unwrap();
    let cart_pole = CartPole::default();
    let collect = |ends| {
        let mut lanes = Lanes::new(&cart_pole, 2, 5, 0);
        lanes
            .collect(&policy, Collect::Steps(100), ends, Act::Sampled)
            .unwrap()
    };
    let (seen, hidden) = (collect(Ends::Seen), collect(Ends::Hidden));
    assert_eq!(seen.finished, hidden.finished);
    assert_eq!(hidden.batch.rewards.offsets().host(), [0, 100, 200]);
    assert_eq!(hidden.batch.open, [true, true]);
    let ends = hidden.batch.terminated.iter().filter(|t| **t).count();
    assert_eq!(ends, seen.batch.open.iter().filter(|open| !**open).count());
    assert!(ends > 3);
    let mut lanes = Lanes::new(&cart_pole, 2, 5, 0);
    let e = lanes.collect(&policy, Collect::Episodes, Ends::Hidden, Act::Sampled);
    assert!(e.unwrap_err().to_string().contains("whole episodes"));
}

/// metrics.jsonl without its times.
fn metrics(dir: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut v: serde_json::Value = serde_json::from_str(line).unwrap();
        v.as_object_mut().unwrap().remove("seconds");
        v
    };
    text.lines().map(line).collect()
}

const PREFERENCES: PreferenceConfig = PreferenceConfig {
    comparisons: 60,
    first: 20,
    each: 10,
    clip_length: 10,
    candidates: 4,
    members: 2,
    error_rate: 0.1,
    end_penalty: 1.0,
    updates: 3,
    batch_size: 16,
};

fn run(dir: &Path, cfg: &ControlConfig, preferred: Option<&PreferenceConfig>) {
    let task = Task::CartPole(CartPole::default());
    let mut agent = Agent::new(&task, &[16], cfg, optim(1e-3), 1e-3).unwrap();
    let mut session = session(dir, cfg.steps);
    match preferred {
        None => train(&task, &mut agent, cfg, &mut session).unwrap(),
        Some(p) => {
            let mut members =
                preferences::predictors(&task, &[16], p, cfg.seed, optim(1e-3)).unwrap();
            preferences::train(&task, &mut agent, &mut members, (cfg, p), &mut session).unwrap()
        }
    };
}

#[test]
fn a_resumed_run_is_the_same_bit_by_bit() {
    let cases = [
        (PPO, None),
        (Algorithm::Reinforce { baseline: true }, None),
        (PPO, Some(&PREFERENCES)),
    ];
    for (algorithm, preferred) in cases {
        let dir = tempfile::tempdir().unwrap();
        let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
        let cfg = |steps| config(4, steps, algorithm);
        run(&whole, &cfg(6), preferred);
        run(&broken, &cfg(3), preferred);
        run(&broken, &cfg(6), preferred);
        let (whole, broken) = (metrics(&whole), metrics(&broken));
        assert_eq!(whole.len(), 6);
        assert_eq!(whole, broken, "{algorithm:?}");
        if preferred.is_some() {
            let asked: Vec<f64> = whole
                .iter()
                .map(|m| m["control/comparisons"].as_f64().unwrap())
                .collect();
            assert_eq!(asked, [20.0, 30.0, 40.0, 50.0, 60.0, 60.0]);
        }
    }
}

#[test]
fn settings_out_of_range_are_named() {
    let good = config(1, 1, PPO);
    let message = |cfg: &ControlConfig| cfg.check().unwrap_err().to_string();
    assert!(good.check().is_ok());
    assert!(message(&ControlConfig { gamma: 1.5, ..good }).contains("gamma is 1.5"));
    assert!(
        message(&ControlConfig {
            environments: 0,
            ..good
        })
        .contains("environments")
    );
    let lambda = Algorithm::A2c {
        horizon: 5,
        gae_lambda: -1.0,
    };
    assert!(message(&config(1, 1, lambda)).contains("gae_lambda"));
    let wrong = PreferenceConfig {
        error_rate: 1.0,
        ..PREFERENCES
    };
    assert!(
        wrong
            .check()
            .unwrap_err()
            .to_string()
            .contains("error_rate")
    );
    let dir = tempfile::tempdir().unwrap();
    let task = Task::CartPole(CartPole::default());
    let cfg = config(1, 1, Algorithm::Reinforce { baseline: true });
    let mut agent = Agent::new(&task, &[4], &cfg, optim(1e-3), 1e-3).unwrap();
    let mut session = session(dir.path(), 1);
    let both = (&cfg, &PREFERENCES);
    let e = preferences::train(&task, &mut agent, &mut [], both, &mut session);
    assert!(e.unwrap_err().to_string().contains("whole episodes"));
}
