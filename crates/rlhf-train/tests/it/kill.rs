//! `kill -9` at any instant: a process that trains is killed ten times and ends as if it never were.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rlhf_train::StopFlag;
use rlhf_train::checkpoint::CheckpointStore;

use crate::trainer::{End, Training, checkpoints, logged, metrics, weights};

/// Names the folder that a child process works in.
pub(crate) const CHILD: &str = "RLHF_TRAIN_TEST_CHILD";

/// This test binary again, as the child process that `test` describes.
pub(crate) fn child(test: &str, dir: &Path) -> Command {
    let mut c = Command::new(std::env::current_exe().unwrap());
    c.args([
        "--exact",
        test,
        "--ignored",
        "--nocapture",
        "--test-threads=1",
    ])
    .env(CHILD, dir)
    .stdin(Stdio::null());
    c
}

/// Waits until `ready`, or the child ended. Says whether it still runs.
pub(crate) fn wait(child: &mut Child, ready: impl Fn() -> bool) -> bool {
    let began = Instant::now();
    loop {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        if ready() {
            return true;
        }
        assert!(
            began.elapsed() < Duration::from_secs(120),
            "nothing happens"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn training() -> Training {
    Training {
        pause: Duration::from_millis(2),
        ..Training::new(120, 3)
    }
}

#[test]
#[ignore = "the child process of the test below"]
fn train() {
    if let Some(dir) = std::env::var_os(CHILD) {
        let end = training().run(Path::new(&dir), &StopFlag::default(), |_| true);
        assert_eq!(end.unwrap(), End::Finished);
    }
}

#[test]
fn killed_ten_times_a_run_ends_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    let never = StopFlag::default();
    assert_eq!(
        training().run(&whole, &never, |_| true).unwrap(),
        End::Finished
    );

    let mut noise = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .subsec_nanos();
    println!("seed {noise}");
    let mut below = |n: u32| {
        noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (noise >> 8) % n
    };
    let (mut kills, mut torn) = (0, 0);
    for _ in 0..10 {
        let before = logged(&broken);
        let more = 1 + below(7) as usize;
        let mut running = child("kill::train", &broken)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // A resumed log is first cut back to its checkpoint: at most two lines.
        wait(&mut running, || logged(&broken) >= before + more);
        // Anywhere within a step or a checkpoint.
        std::thread::sleep(Duration::from_micros(u64::from(below(6_000))));
        running.kill().unwrap();
        let status = running.wait().unwrap();
        kills += u32::from(!status.success());
        torn += u32::from(checkpoints(&broken).iter().any(|n| n.starts_with('.')));
    }
    println!("{kills} kills, {torn} of them within a checkpoint");
    assert_eq!(kills, 10);
    let last = child("kill::train", &broken).output().unwrap();
    assert!(last.status.success(), "{last:?}");
    assert_eq!(metrics(&broken), metrics(&whole));
    assert_eq!(weights(&broken, 120), weights(&whole, 120));
    assert_eq!(checkpoints(&broken), checkpoints(&whole));
}

#[test]
#[ignore = "the child process of the test below"]
fn die_within_a_checkpoint() {
    if let Some(dir) = std::env::var_os(CHILD) {
        let store = CheckpointStore::new(dir.into(), 1);
        let _never = store.save(2, |folder| {
            std::fs::write(folder.join("model.safetensors"), "half").unwrap();
            std::process::abort();
        });
    }
}

#[test]
fn a_checkpoint_that_was_cut_off_is_no_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::new(dir.path().to_owned(), 1);
    let write = |text: &'static str| {
        move |folder: &Path| {
            std::fs::write(folder.join("a"), text).unwrap();
            Ok(())
        }
    };
    store.save(1, write("one")).unwrap();
    let died = child("kill::die_within_a_checkpoint", dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(!died.success());
    let names = || std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(names(), 2, "what was half written lies beside");
    assert_eq!(store.latest().unwrap().unwrap().1.step, 1);
    store.save(3, write("three")).unwrap();
    assert_eq!(names(), 1, "and is swept up by the next");
    assert_eq!(store.latest().unwrap().unwrap().1.step, 3);
}
