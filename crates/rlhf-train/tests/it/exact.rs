//! A run that was dropped or stopped any number of times ends bit by bit as one that was not.

use rlhf_train::{Signal, StopFlag};

use crate::trainer::{End, Training, checkpoints, metrics, weights};

#[test]
fn stopped_and_dropped_at_any_step_a_run_ends_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    let training = Training::new(60, 4);
    let never = StopFlag::default();
    assert_eq!(
        training.run(&whole, &never, |_| true).unwrap(),
        End::Finished
    );

    // Ends at these steps, by turns dropped (what follows the last checkpoint is lost) and by a signal.
    let ends = [0, 2, 3, 7, 11, 12, 26, 39, 40, 58];
    for (i, end) in ends.into_iter().enumerate() {
        let stop = StopFlag::default();
        let dropped = i % 2 == 0;
        let ended = training.run(&broken, &stop, |step| {
            if step == end && !dropped {
                stop.raise(Signal::Terminate);
            }
            step != end || !dropped
        });
        let expected = if dropped { End::Dropped } else { End::Stopped };
        assert_eq!(ended.unwrap(), expected, "at step {end}");
    }
    assert_eq!(
        training.run(&broken, &never, |_| true).unwrap(),
        End::Finished
    );
    assert_eq!(metrics(&whole).len(), 60);
    assert_eq!(metrics(&broken), metrics(&whole));
    assert_eq!(weights(&broken, 60), weights(&whole, 60));
    assert_eq!(checkpoints(&whole), ["step-00000056", "step-00000060"]);
    // What is finished stays as it is.
    assert_eq!(
        training.run(&broken, &never, |_| false).unwrap(),
        End::Finished
    );
    assert_eq!(metrics(&broken), metrics(&whole));
}

#[test]
fn a_damaged_checkpoint_is_passed_over_and_said() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    let training = Training::new(12, 2);
    let never = StopFlag::default();
    training.run(&whole, &never, |_| true).unwrap();
    training.run(&broken, &never, |step| step < 8).unwrap();
    assert_eq!(checkpoints(&broken), ["step-00000006", "step-00000008"]);
    let damage = |step: u64| {
        let path = broken.join(format!("checkpoints/step-{step:08}/model.safetensors"));
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
    };
    damage(8);
    training.run(&broken, &never, |_| true).unwrap();
    assert_eq!(metrics(&broken), metrics(&whole));
    assert_eq!(weights(&broken, 12), weights(&whole, 12));

    // With none left the run does not begin anew by itself: that would cut off the log.
    damage(10);
    damage(12);
    let e = training.run(&broken, &never, |_| true).unwrap_err();
    let e = e.to_string();
    assert!(
        e.contains("step-00000012") && e.contains("step-00000010") && e.contains("start over"),
        "{e}"
    );
    assert_eq!(metrics(&broken), metrics(&whole));
}

#[test]
fn another_training_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let never = StopFlag::default();
    let mut training = Training::new(4, 2);
    training.run(dir.path(), &never, |_| true).unwrap();
    training.width = 6;
    let e = training.run(dir.path(), &never, |_| true).unwrap_err();
    let e = e.to_string();
    assert!(
        e.contains("model.safetensors") && e.contains("[5, 5]") && e.contains("[6, 6]"),
        "{e}"
    );
}
