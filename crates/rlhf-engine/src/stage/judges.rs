//! Verifiers and judges of a reward, made of what a recipe says.

use std::path::PathBuf;
use std::time::Duration;

use rlhf::usage;
use rlhf_endpoint::{Endpoint, EndpointConfig};
use rlhf_reward::judge::{LocalJudge, PairSource, RemoteJudge, RubricSource};
use rlhf_reward::source::RewardSource;
use rlhf_reward::verify::VerifierSource;

use super::Context;
use crate::recipe::{JudgePart, RewardPart, Style};

impl Context<'_> {
    /// The verifier or judge of a part, where it has one.
    pub(super) fn verdict_source(
        &self,
        part: &RewardPart,
        micro_tokens: usize,
    ) -> anyhow::Result<Option<Box<dyn RewardSource>>> {
        if let Some(check) = &part.verifier {
            let pool = part.pool.unwrap_or_default();
            return Ok(Some(Box::new(VerifierSource::new(check.build()?, pool)?)));
        }
        let Some(judge) = &part.judge else {
            return Ok(None);
        };
        let Some(url) = &judge.url else {
            let model = self.policy(&judge.model)?;
            let question = judge.settings.prompts.custom_pair();
            let local = LocalJudge::new(
                model,
                self.tokenizer()?.clone(),
                self.device,
                micro_tokens,
                question,
            )?;
            let source =
                PairSource::new(Box::new(local), judge.against.clone(), judge.failure_score);
            return Ok(Some(Box::new(source)));
        };
        let remote = self.remote_judge(judge, url)?;
        Ok(Some(match judge.style {
            Style::Rubric => Box::new(RubricSource::new(remote, judge.failure_score)),
            Style::Pairwise => Box::new(PairSource::new(
                Box::new(remote),
                judge.against.clone(),
                judge.failure_score,
            )),
        }))
    }

    fn remote_judge(&self, judge: &JudgePart, url: &str) -> anyhow::Result<RemoteJudge> {
        let mut config = EndpointConfig::new(url, &judge.model);
        if let Some(name) = &judge.key_env {
            let key = std::env::var(name).map_err(|_| {
                usage(
                    format!("the environment has no `{name}`, which is to hold the judge's key"),
                    url,
                    format!("set {name}, or leave key_env out"),
                )
            })?;
            config.key = Some(key);
        }
        config.timeout = Duration::from_secs_f64(judge.timeout_s);
        config.tries = judge.tries;
        config.at_once = judge.at_once;
        let cache = judge.cache.as_ref().map(PathBuf::from);
        config.cache = Some(cache.unwrap_or_else(|| self.dir.join("judge")));
        let endpoint = Endpoint::new(config).map_err(rlhf_reward::Error::from)?;
        Ok(RemoteJudge::new(endpoint, judge.settings.clone())?)
    }
}
