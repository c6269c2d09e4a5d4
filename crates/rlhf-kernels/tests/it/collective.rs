//! Groups of real processes: this test binary starts itself again for each of them.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rlhf_kernels::Error;
use rlhf_kernels::collective::{Group, Reduce, Rendezvous};
use tch::{Device, Kind, Tensor};

/// What a process is told: port, rank, size and what to do.
const ROLE: &str = "RLHF_TEST_COLLECTIVE";

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn start(port: u16, rank: usize, size: usize, task: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "collective::one_process",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(ROLE, format!("{port} {rank} {size} {task}"))
        .env("OMP_NUM_THREADS", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Starts `size` processes but those `absent`; all must end well. A process's standard input ends when those
/// before it have ended.
fn together(size: usize, absent: &[usize], task: &str) {
    let port = free_port();
    let all: Vec<Child> = (0..size)
        .filter(|rank| !absent.contains(rank))
        .map(|rank| start(port, rank, size, task))
        .collect();
    for child in all {
        let out = child.wait_with_output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            out.status.success(),
            "{}{}",
            text(&out.stdout),
            text(&out.stderr)
        );
        assert!(
            text(&out.stdout).contains("1 passed"),
            "{}",
            text(&out.stdout)
        );
    }
}

fn meet(port: u16, rank: usize, size: usize, patience: u64) -> Result<Group, Error> {
    Group::gloo(&Rendezvous {
        timeout: Duration::from_secs(patience),
        interface: Some("lo".into()),
        ..Rendezvous::new("127.0.0.1", port, rank, size)
    })
}

fn numbers(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.to_kind(Kind::Double).flatten(0, -1)).unwrap()
}

/// What one process of a group does; as a test of its own it does nothing.
#[test]
fn one_process() {
    #[allow(clippy::disallowed_methods, reason = "a test's own variable")]
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let words: Vec<&str> = role.split(' ').collect();
    let number = |i: usize| words[i].parse::<usize>().unwrap();
    let (port, rank, size) = (number(0) as u16, number(1), number(2));
    match words[3] {
        "all" => all_operations(&meet(port, rank, size, 60).unwrap()),
        "absent" => {
            let e = meet(port, rank, size, 2).unwrap_err();
            assert!(
                matches!(
                    e,
                    Error::Timeout {
                        op: "Group::gloo",
                        ..
                    }
                ),
                "{e:?}"
            );
        }
        "late" => late(&meet(port, rank, size, 6).unwrap()),
        "different" => different(&meet(port, rank, size, 60).unwrap()),
        other => panic!("{other}"),
    }
}

/// Each result against arithmetic on what the ranks are known to bring.
fn all_operations(group: &Group) {
    let (rank, size) = (group.rank() as f64, group.size());
    let ranks: Vec<f64> = (0..size).map(|r| r as f64).collect();
    let of = |f: &dyn Fn(f64) -> f64| ranks.iter().map(|&r| f(r)).collect::<Vec<_>>();
    let brought = |r: f64| [r + 1.0, 10.0 * r, -r];
    let sum: Vec<f64> = (0..3)
        .map(|i| of(&|r| brought(r)[i]).iter().sum())
        .collect();
    for kind in [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Int64] {
        let mine = Tensor::from_slice(&brought(rank)).to_kind(kind);
        let kept = mine.shallow_clone();
        let out = group.all_reduce(mine, Reduce::Sum).unwrap().wait().unwrap();
        assert_eq!((numbers(&out), out.kind()), (sum.clone(), kind));
        assert_eq!(numbers(&kept), sum, "in place");
    }
    for (reduce, expected) in [(Reduce::Min, 0.0), (Reduce::Max, size as f64 - 1.0)] {
        let out = group
            .all_reduce(Tensor::from_slice(&[rank]), reduce)
            .unwrap();
        assert_eq!(numbers(&out.wait().unwrap()), [expected]);
    }
    // Several under way at once, waited for in another order.
    let under_way: Vec<_> = (0..4)
        .map(|i| {
            group
                .all_reduce(Tensor::from_slice(&[rank + f64::from(i)]), Reduce::Sum)
                .unwrap()
        })
        .collect();
    for (i, pending) in under_way.into_iter().enumerate().rev() {
        let expected = of(&|r| r + i as f64).iter().sum::<f64>();
        assert_eq!(numbers(&pending.wait().unwrap()), [expected]);
    }
    let last = size - 1;
    let out = group.broadcast(
        Tensor::from_slice(&[rank as f32, 0.5]).to_kind(Kind::BFloat16),
        last,
    );
    assert_eq!(numbers(&out.unwrap().wait().unwrap()), [last as f64, 0.5]);
    // [2, 2] each, a view that is not contiguous.
    let part = Tensor::from_slice(&[rank, 1.0, 2.0, rank])
        .view([2, 2])
        .tr();
    let out = group.all_gather(&part).unwrap().wait().unwrap();
    assert_eq!(out.size(), [2 * size as i64, 2]);
    assert_eq!(
        numbers(&out),
        ranks
            .iter()
            .flat_map(|&r| [r, 2.0, 1.0, r])
            .collect::<Vec<_>>()
    );
    let whole = Tensor::arange(2 * size as i64, (Kind::Double, Device::Cpu)) * (rank + 1.0);
    let out = group
        .reduce_scatter(&whole, Reduce::Sum)
        .unwrap()
        .wait()
        .unwrap();
    let factor = of(&|r| r + 1.0).iter().sum::<f64>();
    assert_eq!(
        numbers(&out),
        [2.0 * rank * factor, (2.0 * rank + 1.0) * factor]
    );
    let pending = group
        .all_reduce(Tensor::zeros([0], (Kind::Float, Device::Cpu)), Reduce::Sum)
        .unwrap();
    assert_eq!(pending.wait().unwrap().numel(), 0);
    group.barrier().unwrap();

    let text = |r: Result<_, Error>| {
        r.map(|_: rlhf_kernels::collective::Pending| ())
            .unwrap_err()
            .to_string()
    };
    let odd = Tensor::zeros([2 * size as i64 + 1], (Kind::Float, Device::Cpu));
    // One process divides anything.
    if size > 1 {
        let e = text(group.reduce_scatter(&odd, Reduce::Sum));
        assert!(
            e.contains("parts of unequal sizes are not supported"),
            "{e}"
        );
    }
    assert!(text(group.broadcast(odd.shallow_clone(), size)).contains("from"));
    assert!(text(group.all_gather(&Tensor::from(1f32))).contains("no axis"));
    let strided = Tensor::zeros([3, 2], (Kind::Float, Device::Cpu)).tr();
    assert!(text(group.all_reduce(strided, Reduce::Sum)).contains("not contiguous"));
    group.barrier().unwrap();
}

/// The last process does not take part in what the others do, and stays until they have seen it.
fn late(group: &Group) {
    if group.rank() == group.size() - 1 {
        std::io::read_to_string(std::io::stdin()).unwrap();
        return;
    }
    let e = group
        .all_reduce(Tensor::from(1f32).view([1]), Reduce::Sum)
        .and_then(rlhf_kernels::collective::Pending::wait)
        .unwrap_err();
    assert!(
        matches!(
            e,
            Error::Timeout {
                op: "all_reduce",
                ..
            }
        ),
        "{e:?}"
    );
    assert_eq!(e.to_string().lines().count(), 1);
}

/// Sizes, types and operations that differ between processes give errors on all of them, and the group lives.
fn different(group: &Group) {
    let rank = group.rank() as i64;
    let zeros = |n: i64, kind| Tensor::zeros([n], (kind, Device::Cpu));
    let e = group
        .all_gather(&zeros(2 + rank, Kind::Float))
        .unwrap_err()
        .to_string();
    assert!(e.contains("unequal sizes are not supported"), "{e}");
    let kind = if rank == 0 { Kind::Double } else { Kind::Float };
    let e = group
        .all_reduce(zeros(2, kind), Reduce::Sum)
        .unwrap_err()
        .to_string();
    assert!(e.contains("not about to do the same"), "{e}");
    group.barrier().unwrap();
}

#[test]
fn two_and_three_processes_agree() {
    together(1, &[], "all");
    together(2, &[], "all");
    together(3, &[], "all");
}

#[test]
fn a_process_that_never_comes_is_an_error() {
    together(2, &[1], "absent");
    together(2, &[0], "absent");
}

#[test]
fn a_process_that_stays_away_later_is_an_error() {
    together(2, &[], "late");
}

#[test]
fn processes_that_differ_are_told() {
    together(2, &[], "different");
}

#[test]
fn wrong_rendezvous_are_refused() {
    let at = |rank, size| Rendezvous::new("127.0.0.1", 1, rank, size);
    for (bad, words) in [
        (at(2, 2), "rank 2 of 2"),
        (
            Rendezvous {
                timeout: Duration::ZERO,
                ..at(0, 1)
            },
            "time-out",
        ),
        (
            Rendezvous {
                host: "a\0b".into(),
                ..at(0, 1)
            },
            "NUL",
        ),
    ] {
        let e = Group::gloo(&bad).unwrap_err().to_string();
        assert!(e.contains(words), "{e}");
    }
    let e = Group::gloo(&Rendezvous {
        interface: Some("no-such-interface".into()),
        ..Rendezvous::new("127.0.0.1", free_port(), 0, 1)
    });
    assert!(matches!(e, Err(Error::Shim { .. })), "{e:?}");
}
