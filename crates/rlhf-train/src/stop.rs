//! SIGINT and SIGTERM: finish the step, save, leave. A second signal ends the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// The signal that asked for the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Ctrl-C.
    Interrupt,
    /// A polite kill.
    Terminate,
}

impl Signal {
    /// 128 + the signal's number.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Interrupt => 130,
            Self::Terminate => 143,
        }
    }
}

/// Whether a signal came.
#[derive(Clone, Debug, Default)]
pub struct StopFlag(Arc<AtomicUsize>);

impl StopFlag {
    /// Listens for SIGINT and SIGTERM from now on.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn install() -> std::io::Result<Self> {
        let flag = Self::default();
        // One switch for both: Ctrl-C and then a kill is a second signal too.
        let armed = Arc::new(std::sync::atomic::AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order only the second signal finds the switch on.
            flag::register_conditional_shutdown(signal, 128 + signal, armed.clone())?;
            flag::register(signal, armed.clone())?;
            flag::register_usize(signal, flag.0.clone(), signal as usize)?;
        }
        Ok(flag)
    }

    /// The signal that came, if any.
    #[must_use]
    pub fn get(&self) -> Option<Signal> {
        match self.0.load(Ordering::SeqCst) as i32 {
            SIGINT => Some(Signal::Interrupt),
            SIGTERM => Some(Signal::Terminate),
            _ => None,
        }
    }

    /// Acts as if the signal had come.
    pub fn raise(&self, signal: Signal) {
        let number = if signal == Signal::Interrupt {
            SIGINT
        } else {
            SIGTERM
        };
        self.0.store(number as usize, Ordering::SeqCst);
    }
}
