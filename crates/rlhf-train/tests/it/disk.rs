//! A disk that is full, or not there: a clear error, and nothing finished is lost.

use std::path::Path;

use rlhf_train::StopFlag;

use crate::kill::CHILD;
use crate::trainer::{End, Training, checkpoints, metrics, weights};

/// Checkpoints of about 100 kB beside a log of some kB.
fn training() -> Training {
    Training {
        width: 96,
        ..Training::new(8, 2)
    }
}

#[test]
#[ignore = "the child process of the test below"]
fn train() {
    if let Some(dir) = std::env::var_os(CHILD) {
        let end = training().run(Path::new(&dir), &StopFlag::default(), |_| true);
        if let Err(e) = end {
            eprintln!("error: {e}");
            std::process::exit(1);
        }
    }
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_checkpoints_before() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    let never = StopFlag::default();
    training().run(&whole, &never, |_| true).unwrap();
    training().run(&broken, &never, |step| step < 4).unwrap();
    assert_eq!(checkpoints(&broken), ["step-00000002", "step-00000004"]);
    // No file may grow beyond 48 blocks (of 512 or 1024 bytes, as the shell likes it).
    let program = std::env::current_exe().unwrap();
    let out = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 48; exec \"$@\"", "sh"])
        .arg(program)
        .args(["--exact", "disk::train", "--ignored", "--nocapture"])
        .env(CHILD, &broken)
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{err}");
    assert!(
        err.contains("cannot write") && err.contains("model.safetensors"),
        "{err}"
    );
    assert!(err.contains("do: free space"), "{err}");
    assert_eq!(
        checkpoints(&broken),
        ["step-00000002", "step-00000004"],
        "nothing half written, nothing lost"
    );
    assert_eq!(
        training().run(&broken, &never, |_| true).unwrap(),
        End::Finished
    );
    assert_eq!(metrics(&broken), metrics(&whole));
    assert_eq!(weights(&broken, 8), weights(&whole, 8));
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("checkpoints"), "a file").unwrap();
    let e = training().run(dir.path(), &StopFlag::default(), |_| true);
    let e = e.unwrap_err().to_string();
    assert!(e.contains("checkpoints") && e.contains("do: "), "{e}");
}
