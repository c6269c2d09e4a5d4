//! A trainer as small as can be, with everything that makes a resume hard: an optimiser, a schedule,
//! a controller whose state feeds back into the loss, and a parameter that not every step uses.

use std::path::Path;
use std::time::Duration;

use rlhf_kernels::LossSum;
use rlhf_kernels::optim::AdamWConfig;
use rlhf_train::{
    Flow, LrSchedule, Result, Session, SessionConfig, Stepper, StepperConfig, StopFlag,
};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

/// A training of so many steps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Training {
    pub(crate) total: u64,
    pub(crate) every: u64,
    /// The weight is `width` × `width`.
    pub(crate) width: i64,
    pub(crate) pause: Duration,
}

/// How a training ended.
#[derive(Debug, PartialEq)]
pub(crate) enum End {
    Finished,
    /// A signal came; a checkpoint was saved.
    Stopped,
    /// `each` said so: nothing was saved.
    Dropped,
}

/// Saved besides the weights.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct State {
    coef: f64,
    average: f64,
}

/// Numbers without pattern that depend on the step alone.
fn wave(step: u64, salt: f64, size: &[i64]) -> Tensor {
    let n = size.iter().product::<i64>();
    let x = Tensor::arange(n, (Kind::Double, Device::Cpu)) + salt + step as f64 * 17.0;
    ((&x * 12.9898).sin() * 437.5)
        .fmod(1.0)
        .view(size)
        .to_kind(Kind::Float)
}

impl Training {
    pub(crate) fn new(total: u64, every: u64) -> Self {
        Self {
            total,
            every,
            width: 5,
            pause: Duration::ZERO,
        }
    }

    /// Trains on from the last checkpoint in `dir`. After each step `each` says whether to go on as if
    /// nothing were (true) or to drop everything on the spot.
    pub(crate) fn run(
        &self,
        dir: &Path,
        stop: &StopFlag,
        mut each: impl FnMut(u64) -> bool,
    ) -> Result<End> {
        let width = self.width;
        let leaf = |salt: f64, size: &[i64]| wave(0, salt, size).set_requires_grad(true);
        let (weight, bias, rare) = (
            leaf(0.1, &[width, width]),
            leaf(0.2, &[width]),
            leaf(0.3, &[width]),
        );
        let mut stepper = Stepper::new(
            vec![
                ("weight".into(), weight.shallow_clone()),
                ("bias".into(), bias.shallow_clone()),
                ("rare".into(), rare.shallow_clone()),
            ],
            AdamWConfig {
                weight_decay: 0.01,
                ..AdamWConfig::default()
            },
            StepperConfig {
                lr: 0.02,
                schedule: LrSchedule::Cosine { min_ratio: 0.1 },
                warmup_steps: 5,
                total_steps: self.total,
                max_grad_norm: Some(1.0),
                max_bad_steps: 3,
            },
        );
        let mut session = Session::open(SessionConfig {
            dir: dir.to_owned(),
            stage: "line".into(),
            total_steps: self.total,
            checkpoint_every: self.every,
            keep: 2,
            stop: stop.clone(),
        })?;
        let fresh = State {
            coef: 0.1,
            average: 0.0,
        };
        let (start, mut state) = session
            .resume::<State>(&mut [("model", &mut stepper)])?
            .map_or((0, fresh), |r| (r.step, r.extra));
        for step in start..self.total {
            let (x, y) = (wave(step, 0.7, &[7, width]), wave(step, 0.9, &[7, width]));
            for rows in [0..3, 3..7i64] {
                let n = rows.end - rows.start;
                let out = x.narrow(0, rows.start, n).matmul(&weight) + &bias;
                // At steps 0, 5, 10 …: in between its gradient is zero, and after a resume it must be too.
                let out = if step % 5 == 0 { out + &rare } else { out };
                let error = out - y.narrow(0, rows.start, n);
                let sum = (&error * &error).sum(None)
                    + (&weight * &weight).sum(None) * state.coef * n as f64;
                stepper.note_rows(rows.map(|r| step * 7 + r as u64));
                stepper.accumulate(LossSum {
                    sum,
                    weight: n as f64,
                })?;
            }
            let report = stepper.apply()?;
            state.average = 0.9 * state.average + 0.1 * report.loss;
            state.coef *= 1.0 + 0.05 * (report.loss - state.average).tanh();
            let values = [
                ("loss", report.loss),
                ("grad_norm", report.grad_norm),
                ("lr", report.lr),
                ("coef", state.coef),
            ];
            session.log(step, 7, &values)?;
            if !each(step) {
                return Ok(End::Dropped);
            }
            if let Flow::Stop(_) = session.after_step(step, &[("model", &stepper)], &state)? {
                return Ok(End::Stopped);
            }
            std::thread::sleep(self.pause);
        }
        let summary = session.finish()?;
        assert_eq!(
            (summary.steps, summary.tokens),
            (self.total, 7 * self.total)
        );
        Ok(End::Finished)
    }
}

/// `metrics.jsonl` without its times.
pub(crate) fn metrics(dir: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let mut v: serde_json::Value = serde_json::from_str(line).unwrap();
            v.as_object_mut().unwrap().remove("seconds").unwrap();
            v.to_string()
        })
        .collect()
}

/// The steps logged so far; none where there is no log yet.
pub(crate) fn logged(dir: &Path) -> usize {
    std::fs::read_to_string(dir.join("metrics.jsonl")).map_or(0, |t| t.matches('\n').count())
}

/// The bytes of weights, moments and counters in the checkpoint of `step`.
pub(crate) fn weights(dir: &Path, step: u64) -> Vec<u8> {
    std::fs::read(dir.join(format!("checkpoints/step-{step:08}/model.safetensors"))).unwrap()
}

/// The names in the folder of checkpoints; none before the first was begun.
pub(crate) fn checkpoints(dir: &Path) -> Vec<String> {
    let entries = match std::fs::read_dir(dir.join("checkpoints")) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Vec::new(),
        entries => entries.unwrap(),
    };
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
