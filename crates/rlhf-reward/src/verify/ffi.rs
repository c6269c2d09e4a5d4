//! What a command's process does to itself before it becomes the command: a session of its own, namespaces,
//! limits. The only `unsafe` of this crate.
//!
//! Everything here runs between `fork` and `exec`: system calls on numbers alone, no memory is asked for and
//! no lock is taken.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Processes that only wait for the command, where it has process ids of its own.
pub(super) const STANDING_BY: u64 = 2;

/// Namespaces that a command is put into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spaces {
    /// A user namespace, which gives the right to the others and takes all other rights.
    pub user: bool,
    /// Its own network, with nothing in it.
    pub network: bool,
    /// Its own process ids: when its first process ends, all do.
    pub processes: bool,
}

impl Spaces {
    pub(super) const NONE: Self = Self {
        user: false,
        network: false,
        processes: false,
    };
}

/// Limits of the kernel, for each process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    pub cpu_seconds: u64,
    /// Address space in bytes; 0 is no limit.
    pub memory: u64,
    /// Bytes of a file.
    pub file: u64,
    /// Processes of this user in this namespace.
    pub processes: u64,
}

/// Makes `command` confine itself when it is started.
pub(super) fn confine(command: &mut Command, spaces: Spaces, kernel: Kernel) {
    // SAFETY: the closure runs in a forked child of a process with threads, so it may only make calls that
    // are async-signal-safe. It makes raw system calls (setsid, unshare, fork, prctl, getrlimit, setrlimit, and in the
    // one that waits close_range, waitpid and _exit), builds errors from numbers and allocates nothing.
    unsafe {
        command.pre_exec(move || enter(spaces, kernel));
    }
}

fn enter(spaces: Spaces, kernel: Kernel) -> io::Result<()> {
    nix::unistd::setsid()?;
    isolate(spaces)?;
    // Nobody may raise what the system has set lower already.
    let limit = |r, n: u64| -> nix::Result<()> {
        let n = n.min(getrlimit(r)?.1);
        setrlimit(r, n, n)
    };
    // The watcher counts all processes' time together and is earlier by a second.
    limit(Resource::RLIMIT_CPU, kernel.cpu_seconds.saturating_add(1))?;
    limit(Resource::RLIMIT_FSIZE, kernel.file)?;
    limit(Resource::RLIMIT_CORE, 0)?;
    if kernel.memory > 0 {
        limit(Resource::RLIMIT_AS, kernel.memory)?;
    }
    if spaces.user {
        // Elsewhere it would count the user's other processes.
        limit(
            Resource::RLIMIT_NPROC,
            kernel.processes.saturating_add(STANDING_BY),
        )?;
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn isolate(_: Spaces) -> io::Result<()> {
    Ok(())
}

#[cfg(target_os = "linux")]
fn isolate(spaces: Spaces) -> io::Result<()> {
    use nix::sched::{CloneFlags, unshare};
    use nix::sys::{prctl, signal::Signal};
    use nix::unistd::{ForkResult, fork};

    prctl::set_no_new_privs()?;
    let mut flags = CloneFlags::empty();
    flags.set(CloneFlags::CLONE_NEWUSER, spaces.user);
    flags.set(CloneFlags::CLONE_NEWNET, spaces.network);
    flags.set(CloneFlags::CLONE_NEWPID, spaces.processes);
    if flags.is_empty() {
        return Ok(());
    }
    unshare(flags)?;
    if spaces.processes {
        // A new process namespace begins with the next child. That one is not the command: signals that a
        // process sends to itself do nothing to the first of a namespace.
        for _ in 0..2 {
            // SAFETY: as in `confine`: the child goes on with system calls only, the parent with `stand_by`.
            match unsafe { fork() }? {
                ForkResult::Parent { child } => stand_by(child),
                // Where the one that stands by is killed, its child goes too, and with it the namespace.
                ForkResult::Child => prctl::set_pdeathsig(Signal::SIGKILL)?,
            }
        }
    }
    Ok(())
}

/// Waits for a child and ends as it did.
#[cfg(target_os = "linux")]
fn stand_by(child: nix::unistd::Pid) -> ! {
    use nix::errno::Errno;
    use nix::libc;
    use nix::sys::wait::{WaitStatus, waitpid};

    // SAFETY: closes descriptors of this process, which uses none any more. Among them is the pipe by which
    // the parent learns that the command has begun: it waits until every copy is closed.
    unsafe {
        if libc::close_range(3, libc::c_uint::MAX, 0) != 0 {
            for fd in 3..4096 {
                libc::close(fd);
            }
        }
    }
    let code = loop {
        match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, code)) => break code,
            Ok(WaitStatus::Signaled(_, signal, _)) => break 128 + signal as i32,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => break 127,
        }
    };
    // SAFETY: ends the process without running what the parent registered for its own end.
    unsafe { libc::_exit(code) }
}
