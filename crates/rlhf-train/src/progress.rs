//! Progress on stderr: a bar on a terminal, a line now and then elsewhere.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Tokens a second since it was made.
#[derive(Clone, Copy, Debug)]
pub struct Throughput {
    began: Instant,
    tokens: u64,
}

impl Default for Throughput {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            tokens: 0,
        }
    }
}

impl Throughput {
    /// Counts from now on.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// So many tokens more.
    pub fn add(&mut self, tokens: u64) {
        self.tokens += tokens;
    }

    /// Tokens counted.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Seconds since the beginning.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// Tokens a second.
    #[must_use]
    pub fn per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds().max(1e-9)
    }
}

/// Shows how far a stage is, its throughput and the time left.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    stage: String,
    total: u64,
    first: u64,
    throughput: Throughput,
    spoke: Instant,
}

/// Between two lines where there is no terminal.
const PAUSE: Duration = Duration::from_secs(15);

impl Progress {
    /// Progress of `total` steps, of which `first` are done.
    #[must_use]
    pub fn new(stage: &str, first: u64, total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            if let Ok(style) =
                ProgressStyle::with_template("{prefix:>10} {bar:30} {pos}/{len} {msg} eta {eta}")
            {
                bar.set_style(style);
            }
            bar.set_prefix(stage.to_owned());
            bar.set_position(first);
            bar.reset_eta();
            bar
        });
        Self {
            bar,
            stage: stage.to_owned(),
            total,
            first,
            throughput: Throughput::new(),
            spoke: Instant::now(),
        }
    }

    /// `step` steps are done; the last took `tokens` tokens and had these metrics.
    pub fn advance(&mut self, step: u64, tokens: u64, values: &[(&str, f64)]) {
        self.throughput.add(tokens);
        let shown: Vec<String> = ["loss", "reward", "kl", "accuracy"]
            .iter()
            .filter_map(|k| values.iter().find(|(name, _)| name == k))
            .map(|(k, v)| format!("{k} {v:.3}"))
            .collect();
        let rate = self.throughput.per_second();
        let message = format!("{} · {rate:.0} tok/s", shown.join(" "));
        if let Some(bar) = &self.bar {
            bar.set_message(message);
            bar.set_position(step);
        } else if self.spoke.elapsed() >= PAUSE {
            self.spoke = Instant::now();
            let done = (step - self.first.min(step)).max(1) as f64;
            let left = self.throughput.seconds() / done * self.total.saturating_sub(step) as f64;
            self.note(&format!("{step}/{} {message} eta {left:.0}s", self.total));
        }
    }

    /// Says something once, above the bar where there is one.
    pub fn note(&self, text: &str) {
        let line = format!("{:>10} {text}", self.stage);
        match &self.bar {
            Some(bar) => bar.println(line),
            // A closed stderr must not end the run.
            None => drop(writeln!(std::io::stderr(), "{line}")),
        }
    }

    /// Clears the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn throughput_is_tokens_by_time() {
        let mut t = Throughput::new();
        t.add(30);
        t.add(70);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(t.tokens(), 100);
        let rate = t.per_second();
        // At least 20 ms have gone by, so at most 5,000 a second; and not a minute, so more than 1.
        assert!(rate > 1.0 && rate <= 5_000.0, "{rate}");
    }
}
