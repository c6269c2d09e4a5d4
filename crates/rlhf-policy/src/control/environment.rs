//! What an environment is, and the noise that it is given.

use rlhf_data::seed::{Purpose, Stream};

/// The noise of one step of one episode: a function of (seed, environment, episode, step).
#[derive(Clone, Copy, Debug)]
pub struct Noise {
    stream: Stream,
    episode: u64,
    step: u32,
}

impl Noise {
    /// Noise for step `step` (0 is the reset) of an environment's episode; streams of different purposes are
    /// independent.
    #[must_use]
    pub fn new(seed: u64, purpose: Purpose, environment: u32, episode: u32, step: u32) -> Self {
        Self {
            stream: Stream::new(seed, purpose),
            episode: u64::from(environment) << 32 | u64::from(episode),
            step,
        }
    }

    /// The `i`th uniform number in (0, 1) of this step.
    #[must_use]
    pub fn uniform(&self, i: u32) -> f64 {
        self.stream.uniform(self.episode, self.step, i)
    }
}

/// What a step brings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// r.
    pub reward: f64,
    /// The episode is over: nothing more is to be had. A time limit is no such end; see
    /// [`Environment::time_limit`].
    pub terminated: bool,
}

/// A problem with finitely many actions.
///
/// It knows nothing of seeds, of other environments or of time limits: those are [`Lanes`](super::Lanes)'.
pub trait Environment: Clone + std::fmt::Debug {
    /// Numbers in an observation.
    fn observation_size(&self) -> usize;
    /// How many actions there are: 0 to this less 1.
    fn actions(&self) -> usize;
    /// After how many steps an episode is cut, though it has not ended.
    fn time_limit(&self) -> Option<u32>;
    /// Begins an episode.
    fn reset(&mut self, noise: Noise);
    /// Appends the observation.
    fn observe(&self, into: &mut Vec<f32>);
    /// Does `action`.
    ///
    /// # Panics
    /// May panic when there is no such action.
    fn step(&mut self, action: usize, noise: Noise) -> Outcome;
    /// Where the episode stands, as finite numbers.
    fn state(&self) -> Vec<f64>;
    /// Goes back to where [`Environment::state`] was taken.
    fn restore(&mut self, state: &[f64]);
}
