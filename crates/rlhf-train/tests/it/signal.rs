//! SIGINT and SIGTERM: the first ends the run after its step, the second at once.
#![cfg(unix)]

use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rlhf_train::StopFlag;
use rlhf_train::checkpoint::CheckpointStore;

use crate::kill::{CHILD, child, wait};
use crate::trainer::{End, Training, logged};

fn send(signal: &str, child: &Child) {
    let status = Command::new("kill")
        .args([signal, &child.id().to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
#[ignore = "the child process of the test below"]
fn train() {
    if let Some(dir) = std::env::var_os(CHILD) {
        let stop = StopFlag::install().unwrap();
        let training = Training {
            pause: Duration::from_millis(2),
            ..Training::new(1_000_000, 1_000_000)
        };
        let end = training.run(Path::new(&dir), &stop, |_| true).unwrap();
        assert_eq!(end, End::Stopped);
        std::process::exit(i32::from(stop.get().unwrap().exit_code()));
    }
}

#[test]
fn the_first_signal_saves_and_leaves() {
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        let dir = tempfile::tempdir().unwrap();
        let mut running = child("signal::train", dir.path()).spawn().unwrap();
        assert!(wait(&mut running, || logged(dir.path()) >= 2));
        send(signal, &running);
        assert_eq!(running.wait().unwrap().code(), Some(code));
        let store = CheckpointStore::new(dir.path().join("checkpoints"), 1);
        let (_, manifest) = store.latest().unwrap().unwrap();
        assert_eq!(manifest.step, logged(dir.path()) as u64);
    }
}

#[test]
#[ignore = "the child process of the test below"]
fn a_step_without_end() {
    if let Some(dir) = std::env::var_os(CHILD) {
        let stop = StopFlag::install().unwrap();
        std::fs::write(Path::new(&dir).join("ready"), "").unwrap();
        while stop.get().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::fs::write(Path::new(&dir).join("asked"), "").unwrap();
        std::thread::sleep(Duration::from_secs(60));
    }
}

#[test]
fn the_second_signal_ends_at_once() {
    for (first, second, code) in [
        ("-INT", "-INT", 130),
        ("-TERM", "-TERM", 143),
        ("-INT", "-TERM", 143),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(name);
        let mut running = child("signal::a_step_without_end", dir.path())
            .spawn()
            .unwrap();
        assert!(wait(&mut running, || file("ready").exists()));
        send(first, &running);
        assert!(wait(&mut running, || file("asked").exists()));
        let began = Instant::now();
        send(second, &running);
        assert_eq!(running.wait().unwrap().code(), Some(code));
        assert!(began.elapsed() < Duration::from_secs(20));
    }
}
