//! A command under limits: it is watched, and killed with all that it started when it takes too much.
//!
//! It gets an empty environment, a folder of its own and a session of its own; where the kernel allows it no
//! network, and process ids of its own, so that nothing it starts outlives it. Its output goes to files, so
//! nobody waits for a pipe. What it does to files that its user may change is not limited: for hostile code
//! run the whole in a container.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::FailureKind;

/// What a command may take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Seconds from its start to its end.
    pub wall_s: f64,
    /// Seconds of processor time, of all its processes.
    pub cpu_s: u64,
    /// Memory in MiB: address space of each process, and resident memory of all. 0 is no limit (some
    /// programs reserve much more than they use).
    pub memory_mib: u64,
    /// Bytes that it may print, on either stream.
    pub output_bytes: u64,
    /// The largest file in MiB.
    pub file_mib: u64,
    /// Processes and threads at once.
    pub processes: u64,
    /// Whether it may use the network.
    pub network: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            wall_s: 5.0,
            cpu_s: 5,
            memory_mib: 1024,
            output_bytes: 64 * 1024,
            file_mib: 16,
            processes: 32,
            network: false,
        }
    }
}

impl Limits {
    /// What makes no sense, if anything.
    #[must_use]
    pub fn problem(&self) -> Option<&'static str> {
        if !(self.wall_s > 0.0 && self.wall_s <= 86_400.0) {
            return Some("`limits.wall_s` lies above 0 and within a day");
        }
        if self.cpu_s == 0 || self.output_bytes == 0 || self.file_mib == 0 || self.processes == 0 {
            return Some(
                "`cpu_s`, `output_bytes`, `file_mib` and `processes` of `limits` must be above 0",
            );
        }
        None
    }

    /// `wall_s`.
    #[must_use]
    pub fn wall(&self) -> Duration {
        Duration::from_secs_f64(self.wall_s)
    }
}

/// What is run.
#[derive(Debug)]
pub struct Run<'a> {
    /// The program and its arguments; a program without `/` is looked for in [`PATH`].
    pub command: &'a [String],
    /// Where it runs, and where its output lies.
    pub folder: &'a Path,
    /// What it reads.
    pub stdin: &'a Path,
    /// Its environment.
    pub env: &'a BTreeMap<String, String>,
    /// Its limits.
    pub limits: &'a Limits,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its exit code; 128 and the signal's number where a signal ended it.
    pub code: i32,
    /// What it was killed for.
    pub killed: Option<FailureKind>,
    /// The beginning of what it printed, at most `output_bytes`.
    pub stdout: String,
    /// The beginning of what it printed on the error stream.
    pub stderr: String,
}

/// What of the isolation this system allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isolation {
    /// A command has no network.
    pub network: bool,
    /// A command's processes end with it, also those in sessions of their own.
    pub processes: bool,
}

/// Where programs are looked for.
pub const PATH: [&str; 3] = ["/usr/local/bin", "/usr/bin", "/bin"];

/// The file of a program.
#[must_use]
pub fn program(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(name.into());
    }
    let mut places = PATH.iter().map(|dir| Path::new(dir).join(name));
    places.find(|p| p.is_file())
}

#[cfg(unix)]
pub use unix::{isolation, run};

#[cfg(not(unix))]
/// What of the isolation this system allows: nothing.
#[must_use]
pub fn isolation() -> Isolation {
    Isolation {
        network: false,
        processes: false,
    }
}

#[cfg(not(unix))]
/// Runs nothing on this system.
///
/// # Errors
/// Always.
pub fn run(_: &Run<'_>) -> std::io::Result<Ended> {
    Err(std::io::ErrorKind::Unsupported.into())
}

#[cfg(unix)]
mod unix {
    use std::fs::File;
    use std::io::{self, Read as _};
    use std::os::unix::process::ExitStatusExt as _;
    use std::path::Path;
    use std::process::{Child, Command, ExitStatus, Stdio};
    use std::sync::OnceLock;
    use std::time::{Duration, Instant};

    use nix::sys::signal::{Signal, kill, killpg};
    use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
    use nix::unistd::Pid;

    use super::super::FailureKind;
    use super::super::ffi::{Kernel, Spaces, confine};
    use super::{Ended, Isolation, Limits, Run, program};

    /// How often a command is looked at.
    const LOOK: Duration = Duration::from_millis(5);
    /// How often its processes are counted.
    const COUNT: Duration = Duration::from_millis(25);

    /// What can be had here, tried once.
    fn spaces() -> Spaces {
        static FOUND: OnceLock<Spaces> = OnceLock::new();
        let space = |user, network, processes| Spaces {
            user,
            network,
            processes,
        };
        // A user namespace first: it also takes root's rights away.
        let wanted = [
            space(true, true, true),
            space(false, true, true),
            space(true, true, false),
            space(false, false, true),
        ];
        let works = |s: &Spaces| {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", ":"]).env_clear().stdin(Stdio::null());
            command.stdout(Stdio::null()).stderr(Stdio::null());
            confine(&mut command, *s, kernel(&Limits::default()));
            command.status().is_ok_and(|s| s.success())
        };
        *FOUND.get_or_init(|| wanted.into_iter().find(works).unwrap_or(Spaces::NONE))
    }

    /// What of the isolation this system allows.
    #[must_use]
    pub fn isolation() -> Isolation {
        let s = spaces();
        Isolation {
            network: s.network,
            processes: s.processes,
        }
    }

    fn kernel(limits: &Limits) -> Kernel {
        const MIB: u64 = 1 << 20;
        Kernel {
            cpu_seconds: limits.cpu_s,
            memory: limits.memory_mib.saturating_mul(MIB),
            // Output goes to files: a little more than may be printed, so that too much is noticed.
            file: limits
                .file_mib
                .saturating_mul(MIB)
                .max(limits.output_bytes.saturating_add(4096)),
            processes: limits.processes,
        }
    }

    /// Runs a command to its end, or to the end of its limits.
    ///
    /// # Errors
    /// When it cannot be started, or its files cannot be written.
    pub fn run(run: &Run<'_>) -> io::Result<Ended> {
        let (name, args) = run
            .command
            .split_first()
            .ok_or(io::ErrorKind::InvalidInput)?;
        let program = program(name).ok_or(io::ErrorKind::NotFound)?;
        let output = run.folder.join(".stdout");
        let errors = run.folder.join(".stderr");
        let mut command = Command::new(program);
        command
            .args(args)
            .current_dir(run.folder)
            .env_clear()
            .envs(run.env)
            .stdin(File::open(run.stdin)?)
            .stdout(File::create(&output)?)
            .stderr(File::create(&errors)?);
        let spaces = Spaces {
            network: spaces().network && !run.limits.network,
            ..spaces()
        };
        confine(&mut command, spaces, kernel(run.limits));
        let mut watched = Watched {
            child: command.spawn()?,
            own_ids: spaces.processes,
        };
        let killed = watched.watch(run.limits, &[&output, &errors]);
        let status = watched.end()?;
        let printed = |path: &Path| -> io::Result<String> {
            let mut bytes = Vec::new();
            File::open(path)?
                .take(run.limits.output_bytes)
                .read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        Ok(Ended {
            code: code(status),
            killed,
            stdout: printed(&output)?,
            stderr: printed(&errors)?,
        })
    }

    fn code(status: ExitStatus) -> i32 {
        let signal = status.signal().map(|s| 128 + s);
        status.code().or(signal).unwrap_or(127)
    }

    /// A command that is running.
    struct Watched {
        child: Child,
        /// Whether the child and its child only stand by for the command.
        own_ids: bool,
    }

    impl Watched {
        fn pid(&self) -> Pid {
            Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(i32::MAX))
        }

        /// Whether it has ended; it stays there to be waited for, so that its id is nobody else's.
        fn has_ended(&self) -> bool {
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
            !matches!(
                waitid(Id::Pid(self.pid()), flags),
                Ok(WaitStatus::StillAlive)
            )
        }

        /// Waits until it ends, or gives what it must be killed for.
        fn watch(&self, limits: &Limits, outputs: &[&Path]) -> Option<FailureKind> {
            let begun = Instant::now();
            let mut counted = begun;
            let size = |p: &&Path| p.metadata().map_or(0, |m| m.len());
            loop {
                let ended = self.has_ended();
                if outputs.iter().map(size).any(|n| n > limits.output_bytes) {
                    return Some(FailureKind::Output);
                }
                if ended {
                    return None;
                }
                if begun.elapsed() >= limits.wall() {
                    return Some(FailureKind::Deadline);
                }
                if counted.elapsed() >= COUNT {
                    counted = Instant::now();
                    let over = self.members().over(limits);
                    if over.is_some() {
                        return over;
                    }
                }
                std::thread::sleep(LOOK);
            }
        }

        fn members(&self) -> Members {
            Members::of(self.pid().as_raw(), self.own_ids)
        }

        /// Kills all that is left and gives how the command ended.
        fn end(&mut self) -> io::Result<ExitStatus> {
            for _ in 0..100 {
                // A group that is gone already is no error.
                let _ = killpg(self.pid(), Signal::SIGKILL);
                let members = self.members();
                for id in &members.ids {
                    let _ = kill(Pid::from_raw(*id), Signal::SIGKILL);
                }
                if members.ids.is_empty() && self.has_ended() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            self.child.wait()
        }
    }

    /// The processes of a command, as far as they can be seen.
    #[derive(Default)]
    struct Members {
        ids: Vec<i32>,
        threads: u64,
        memory: u64,
        cpu_s: f64,
    }

    impl Members {
        fn over(&self, limits: &Limits) -> Option<FailureKind> {
            if self.threads > limits.processes {
                return Some(FailureKind::Processes);
            }
            if limits.memory_mib > 0 && self.memory >> 20 >= limits.memory_mib {
                return Some(FailureKind::Memory);
            }
            (self.cpu_s > limits.cpu_s as f64).then_some(FailureKind::Cpu)
        }

        #[cfg(not(target_os = "linux"))]
        fn of(_: i32, _: bool) -> Self {
            Self::default()
        }

        /// The living descendants of `root`, and whoever is of its session. Of the two that stand by, nothing
        /// is counted: their memory is that of the process that they were forked from.
        #[cfg(target_os = "linux")]
        fn of(root: i32, stands_by: bool) -> Self {
            use std::collections::HashSet;

            let mut all: Vec<Stat> = std::fs::read_dir("/proc")
                .into_iter()
                .flatten()
                .flatten()
                .filter_map(|e| Stat::read(e.file_name().to_str()?.parse().ok()?))
                .collect();
            let mut found = Self::default();
            let mut ids = HashSet::from([root]);
            // Parents may stand behind their children: until nothing is added.
            loop {
                let before = ids.len();
                ids.extend(
                    all.iter()
                        .filter(|s| s.session == root || ids.contains(&s.parent))
                        .map(|s| s.id)
                        .collect::<Vec<_>>(),
                );
                if ids.len() == before {
                    break;
                }
            }
            let waits = |s: &Stat| stands_by && (s.id == root || s.parent == root);
            all.retain(|s| ids.contains(&s.id) && !waits(s));
            for s in all {
                found.cpu_s += s.ticks as f64 / ticks_a_second();
                found.memory += s.pages.saturating_mul(page_bytes());
                if s.lives {
                    found.ids.push(s.id);
                    found.threads += s.threads;
                }
            }
            found
        }
    }

    /// What `/proc/ID/stat` says of a process.
    #[cfg(target_os = "linux")]
    struct Stat {
        id: i32,
        lives: bool,
        parent: i32,
        session: i32,
        ticks: u64,
        threads: u64,
        pages: u64,
    }

    #[cfg(target_os = "linux")]
    impl Stat {
        fn read(id: i32) -> Option<Self> {
            let text = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
            // The name, in brackets, may hold anything.
            let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
            let number = |i: usize| fields.get(i).and_then(|f| f.parse::<u64>().ok());
            let state = *fields.first()?;
            Some(Self {
                id,
                lives: !matches!(state, "Z" | "X"),
                parent: fields.get(1)?.parse().ok()?,
                session: fields.get(3)?.parse().ok()?,
                // Its own in user and kernel mode, and that of children that were waited for.
                ticks: (11..=14).filter_map(number).sum(),
                threads: number(17)?,
                pages: number(21)?,
            })
        }
    }

    #[cfg(target_os = "linux")]
    fn system(variable: nix::unistd::SysconfVar, otherwise: u64) -> u64 {
        let value = nix::unistd::sysconf(variable).ok().flatten();
        value
            .and_then(|v| u64::try_from(v).ok())
            .unwrap_or(otherwise)
    }

    #[cfg(target_os = "linux")]
    fn page_bytes() -> u64 {
        system(nix::unistd::SysconfVar::PAGE_SIZE, 4096)
    }

    #[cfg(target_os = "linux")]
    fn ticks_a_second() -> f64 {
        system(nix::unistd::SysconfVar::CLK_TCK, 100) as f64
    }
}
