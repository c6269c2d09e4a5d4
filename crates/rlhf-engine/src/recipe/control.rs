//! What a recipe says of a stage that learns control, without a language model.

use rlhf_policy::advantage::Whitening;
use rlhf_policy::control::preferences::PreferenceConfig;
use rlhf_policy::control::{Algorithm, ControlConfig, Environment as _, Task};
use serde::{Deserialize, Serialize};

use super::Optim;

/// A policy for an environment, learned from its rewards or from comparisons of clips.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Control {
    /// The environment, by its name in docs/control.md: `{ kind = "cart_pole" }`.
    pub environment: Task,
    /// How the policy learns: `{ kind = "ppo", horizon = 32, … }`, `a2c` or `reinforce`.
    pub algorithm: Algorithm,
    /// Widths of the hidden layers of policy and value function.
    pub hidden: Vec<usize>,
    /// Environments side by side.
    pub environments: usize,
    /// Batches.
    pub steps: u64,
    /// Discount.
    pub gamma: f64,
    /// What is done to the advantages of a batch: `none`, `remove_mean` (and divide by the deviation) or
    /// `keep_mean`.
    pub whitening: Whitening,
    /// Weight of the policy's entropy.
    pub entropy_coef: f64,
    /// The policy's optimiser.
    pub optim: Optim,
    /// Learning rate of the value function; only `reinforce` without a baseline has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_lr: Option<f64>,
    /// Learn from comparisons of clips, not from the environment's rewards (Christiano et al. 2017).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preferences: Option<PreferenceConfig>,
    /// The networks that predict the reward from them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predictor: Option<Predictor>,
    /// Episodes of the evaluation at the end, for the policy and for the one that it began as.
    pub episodes: usize,
    /// The mean return that the recipe promises; the report says whether it holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goal: Option<f64>,
}

/// Networks that predict rewards.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Predictor {
    /// Widths of the hidden layers.
    pub hidden: Vec<usize>,
    /// The optimiser of each.
    pub optim: Optim,
}

impl Control {
    /// The library's settings.
    #[must_use]
    pub fn config(&self, seed: u64) -> ControlConfig {
        ControlConfig {
            seed,
            environments: self.environments,
            steps: self.steps,
            algorithm: self.algorithm,
            gamma: self.gamma,
            whitening: self.whitening,
            entropy_coef: self.entropy_coef,
        }
    }

    /// Numbers in the policy's network.
    #[must_use]
    pub fn parameters(&self) -> usize {
        let (inputs, outputs) = (
            self.environment.observation_size(),
            self.environment.actions(),
        );
        let widths = [&[inputs][..], &self.hidden, &[outputs]].concat();
        widths.windows(2).map(|w| (w[0] + 1) * w[1]).sum()
    }

    /// What is wrong with it, if anything.
    pub(super) fn problem(&self) -> Option<String> {
        let library = self.environment.check().and_then(|()| {
            self.config(0).check()?;
            self.preferences
                .as_ref()
                .map_or(Ok(()), PreferenceConfig::check)
        });
        if let Err(e) = library {
            return Some(e.to_string());
        }
        let hidden = self.predictor.iter().flat_map(|p| &p.hidden);
        let narrow = self.hidden.iter().chain(hidden).any(|w| *w == 0);
        let wrong = [
            (self.episodes == 0, "episodes must be above 0"),
            (narrow, "widths of hidden layers must be above 0"),
            (
                self.preferences.is_some() != self.predictor.is_some(),
                "preferences and predictor belong together: give both or neither",
            ),
            (
                self.preferences.is_some() && matches!(self.algorithm, Algorithm::Reinforce { .. }),
                "preferences hide where episodes end: use a2c or ppo",
            ),
            (
                self.algorithm.has_value() != self.value_lr.is_some(),
                "value_lr must be given for all but reinforce without a baseline, which has no value function",
            ),
            (
                self.value_lr.is_some_and(|lr| lr.is_nan() || lr <= 0.0),
                "value_lr must be above 0",
            ),
        ];
        let found = wrong.into_iter().find(|w| w.0);
        found.map(|w| w.1.to_owned())
    }
}
