//! Progress on stderr: a bar on a terminal, a line now and then elsewhere.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Shows how far a stage is, its throughput and the time left.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    stage: String,
    total: u64,
    began: Instant,
    first: u64,
    tokens: u64,
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
        let now = Instant::now();
        Self {
            bar,
            stage: stage.to_owned(),
            total,
            began: now,
            first,
            tokens: 0,
            spoke: now,
        }
    }

    /// `step` steps are done; the last took `tokens` tokens and had these metrics.
    pub fn advance(&mut self, step: u64, tokens: u64, values: &[(&str, f64)]) {
        self.tokens += tokens;
        let seconds = self.began.elapsed().as_secs_f64().max(1e-9);
        let rate = self.tokens as f64 / seconds;
        let shown: Vec<String> = ["loss", "reward", "kl", "accuracy"]
            .iter()
            .filter_map(|k| values.iter().find(|(name, _)| name == k))
            .map(|(k, v)| format!("{k} {v:.3}"))
            .collect();
        let message = format!("{} · {rate:.0} tok/s", shown.join(" "));
        if let Some(bar) = &self.bar {
            bar.set_message(message);
            bar.set_position(step);
        } else if self.spoke.elapsed() >= PAUSE {
            self.spoke = Instant::now();
            let done = (step - self.first.min(step)).max(1) as f64;
            let left = seconds / done * self.total.saturating_sub(step) as f64;
            // A closed stderr must not end the run.
            let _ = writeln!(
                std::io::stderr(),
                "{:>10} {step}/{} {message} eta {left:.0}s",
                self.stage,
                self.total
            );
        }
    }

    /// Clears the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
