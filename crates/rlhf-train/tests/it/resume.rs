//! A small training in a process of its own, killed at random moments, ends as if nothing had happened.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rlhf_data::seed::{Purpose, Stream};
use rlhf_kernels::LossSum;
use rlhf_kernels::optim::AdamWConfig;
use rlhf_train::{
    Flow, LrSchedule, Restored, Session, SessionConfig, Stepper, StepperConfig, StopFlag,
};
use tch::{Device, Kind, Tensor};

const STEPS: u64 = 60;

/// Fits a line with noise that is a function of the step, remembering a running sum besides.
fn train(dir: &Path) {
    let stream = Stream::new(3, Purpose::Noise);
    let weights = Tensor::zeros([4], (Kind::Double, Device::Cpu)).set_requires_grad(true);
    let config = StepperConfig {
        lr: 0.05,
        schedule: LrSchedule::Cosine { min_ratio: 0.1 },
        warmup_steps: 5,
        total_steps: STEPS,
        max_grad_norm: Some(1.0),
        max_bad_steps: 3,
    };
    let mut stepper = Stepper::new(
        vec![("weights".into(), weights.shallow_clone())],
        AdamWConfig::default(),
        config,
    );
    let mut session = Session::open(SessionConfig {
        dir: dir.to_owned(),
        stage: "fit".into(),
        total_steps: STEPS,
        checkpoint_every: 7,
        keep: 2,
        stop: StopFlag::default(),
    })
    .unwrap();
    let restored: Option<Restored<f64>> = session.resume(&mut [("model", &mut stepper)]).unwrap();
    let (start, mut sum) = restored.map_or((0, 0.0), |r| (r.step, r.extra));
    for step in start..STEPS {
        let noise: Vec<f64> = (0..4).map(|i| stream.uniform(step, i, 0)).collect();
        let error = (&weights * Tensor::from_slice(&noise)).sum(Kind::Double) - 1.0;
        stepper
            .accumulate(LossSum {
                sum: &error * &error,
                weight: 1.0,
            })
            .unwrap();
        let report = stepper.apply().unwrap();
        sum += report.loss;
        session
            .log(step, 1, &[("loss", report.loss), ("sum", sum)])
            .unwrap();
        assert_eq!(
            session
                .after_step(step, &[("model", &stepper)], &sum)
                .unwrap(),
            Flow::Continue
        );
        std::thread::sleep(Duration::from_millis(3));
    }
    let summary = session.finish().unwrap();
    assert_eq!(summary.steps, STEPS);
    std::fs::write(dir.join("finished"), "").unwrap();
}

/// The child: trains in the folder that the parent names. In an ordinary run it does nothing.
#[test]
fn child() {
    if let Some(dir) = std::env::var_os("RLHF_TRAIN_TEST_DIR") {
        train(Path::new(&dir));
    }
}

fn metrics(dir: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let timeless = |line: &str| {
        let mut v: serde_json::Value = serde_json::from_str(line).unwrap();
        v.as_object_mut().unwrap().remove("seconds");
        v.to_string()
    };
    text.lines().map(timeless).collect()
}

#[test]
fn ten_kills_change_nothing() {
    let whole = tempfile::tempdir().unwrap();
    train(whole.path());
    let expected = metrics(whole.path());
    assert_eq!(expected.len() as u64, STEPS);

    let broken = tempfile::tempdir().unwrap();
    let stream = Stream::new(11, Purpose::Subset);
    let (mut kills, mut runs) = (0, 0);
    while !broken.path().join("finished").exists() {
        runs += 1;
        assert!(runs < 200, "it never finishes");
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "resume::child", "--test-threads=1"])
            .env("RLHF_TRAIN_TEST_DIR", broken.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        if kills < 10 {
            // Some steps after wherever it is now, at any instant of a step.
            let lines = || {
                std::fs::read_to_string(broken.path().join("metrics.jsonl"))
                    .map_or(0, |t| t.lines().count())
            };
            let (before, began) = (lines(), Instant::now());
            let further = 1 + stream.below(8, runs, 0, 0) as usize;
            while lines() < before + further
                && child.try_wait().unwrap().is_none()
                && began.elapsed() < Duration::from_secs(30)
            {
                std::thread::sleep(Duration::from_micros(200));
            }
            std::thread::sleep(Duration::from_micros(stream.below(3000, runs, 1, 0)));
            child.kill().unwrap();
            kills += 1;
        }
        child.wait().unwrap();
    }
    assert_eq!(kills, 10);
    assert_eq!(metrics(broken.path()), expected);
}
