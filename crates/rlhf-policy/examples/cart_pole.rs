//! A pole is balanced by PPO: `cargo run --release -p rlhf-policy --example cart_pole -- [SEED]`
#![allow(clippy::print_stdout, reason = "a program")]

use rlhf_kernels::optim::AdamWConfig;
use rlhf_policy::advantage::Whitening;
use rlhf_policy::control::{Act, Agent, Algorithm, CartPole, ControlConfig, evaluate, train};
use rlhf_policy::loss::Clip;
use rlhf_train::{LrSchedule, Session, SessionConfig, StepperConfig, StopFlag};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let seed = std::env::args().nth(1).map_or(Ok(1), |s| s.parse())?;
    let (clip, value_clip) = (Clip::symmetric(0.2), None);
    let cfg = ControlConfig {
        seed,
        environments: 8,
        steps: 390, // of 8 × 32 steps: 99,840
        algorithm: Algorithm::Ppo {
            horizon: 32,
            gae_lambda: 0.8,
            epochs: 20,
            minibatches: 1,
            clip,
            value_clip,
        },
        gamma: 0.98,
        whitening: Whitening::RemoveMean,
        entropy_coef: 0.0,
    };
    let stepper = StepperConfig {
        lr: 1e-3,
        schedule: LrSchedule::Linear {},
        warmup_steps: 0,
        total_steps: cfg.steps * cfg.algorithm.updates(),
        max_grad_norm: Some(0.5),
        max_bad_steps: 5,
    };
    let cart_pole = CartPole::default();
    let mut agent = Agent::new(
        &cart_pole,
        &[64, 64],
        &cfg,
        (AdamWConfig::default(), stepper),
        1e-3,
    )?;
    let dir = std::env::temp_dir().join(format!("cart_pole-{seed}"));
    let mut session = Session::open(SessionConfig {
        dir: dir.clone(),
        stage: "ppo".into(),
        total_steps: cfg.steps,
        checkpoint_every: 100,
        keep: 1,
        stop: StopFlag::install()?,
    })?;
    train(&cart_pole, &mut agent, &cfg, &mut session)?;
    let returns = evaluate(&cart_pole, &agent.policy.network, Act::Sampled, seed, 100)?;
    println!(
        "mean return of 100 episodes: {}; curves: {}",
        returns.iter().sum::<f64>() / 100.0,
        dir.display()
    );
    Ok(())
}
