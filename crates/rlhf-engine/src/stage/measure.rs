//! Measuring policies on held-out prompts: what each writes, and how far it moved from a baseline.

use anyhow::Context as _;
use rlhf_data::group::{Finish, PromptGroup};
use rlhf_data::pack::{PackedBatch, batches_by_tokens};
use rlhf_data::tokenize::ChatTokenizer;
use rlhf_model::{DeviceBatch, Transformer, target_logprobs};
use rlhf_policy::rollout::{self, Prompt, Rollout, RolloutConfig};
use rlhf_reward::source::{Judged, RewardSource};
use tch::Kind;

/// What a policy wrote for the held-out prompts, one completion each.
#[derive(Debug)]
pub(crate) struct Written {
    /// The completions.
    pub rollouts: Vec<Rollout>,
    /// Log-probs of every token under the policy that wrote it.
    pub logprobs: Vec<Vec<f64>>,
    /// The same under the baseline.
    pub baseline_logprobs: Vec<Vec<f64>>,
    /// Gold score of each completion, when there is a judge.
    pub gold: Option<Vec<f64>>,
    /// Score of the reward model, when there is one.
    pub reward: Option<Vec<f64>>,
}

impl Written {
    /// log π − log π₀ summed over each completion: an unbiased estimate of the KL in nats.
    pub(crate) fn kl(&self) -> Vec<f64> {
        self.logprobs
            .iter()
            .zip(&self.baseline_logprobs)
            .map(|(p, q)| p.iter().sum::<f64>() - q.iter().sum::<f64>())
            .collect()
    }

    /// Length of each completion in tokens.
    pub(crate) fn lengths(&self) -> Vec<f64> {
        self.completions().map(|c| c.ids.len() as f64).collect()
    }

    /// 1 where a completion ends by itself, else 0.
    pub(crate) fn stopped(&self) -> Vec<f64> {
        self.completions()
            .map(|c| f64::from(u8::from(c.finish == Finish::Stop)))
            .collect()
    }

    /// Each completion's text.
    pub(crate) fn texts(&self) -> Vec<&str> {
        self.rollouts
            .iter()
            .flat_map(|r| r.texts.iter().map(String::as_str))
            .collect()
    }

    fn completions(&self) -> impl Iterator<Item = &rlhf_data::group::Completion> {
        self.rollouts.iter().flat_map(|r| &r.group.completions)
    }
}

/// Who measures.
#[derive(Clone, Copy)]
pub(crate) struct Judges<'a> {
    pub tokenizer: &'a ChatTokenizer,
    pub baseline: &'a Transformer,
    pub gold: Option<&'a dyn RewardSource>,
    pub reward: Option<&'a dyn RewardSource>,
    pub micro_tokens: usize,
}

/// Lets `model` write one completion of each prompt, and measures them.
pub(crate) fn write(
    model: &Transformer,
    prompts: &[Prompt],
    cfg: &RolloutConfig,
    judges: Judges<'_>,
) -> anyhow::Result<Written> {
    let all: Vec<usize> = (0..prompts.len()).collect();
    let rollouts = rollout::draw(&cfg.local(model)?, judges.tokenizer, prompts, &all, cfg, 0)
        .context("drawing completions")?;
    let groups: Vec<PromptGroup> = rollouts.iter().map(|r| r.group.clone()).collect();
    let items: Vec<Judged<'_>> = rollouts
        .iter()
        .map(|r| Judged {
            group: &r.group,
            prompt: &prompts[r.prompt].text,
            texts: &r.texts,
            fields: &prompts[r.prompt].fields,
        })
        .collect();
    let flat = |s: Vec<Vec<f64>>| s.into_iter().flatten().collect::<Vec<f64>>();
    let gold = judges
        .gold
        .map(|g| g.scores(&items).map(flat))
        .transpose()?;
    let reward = judges
        .reward
        .map(|r| r.scores(&items).map(flat))
        .transpose()?;
    let logprobs = logprobs_of(model, &groups, cfg.temperature, judges.micro_tokens)?;
    let baseline_logprobs = logprobs_of(
        judges.baseline,
        &groups,
        cfg.temperature,
        judges.micro_tokens,
    )?;
    Ok(Written {
        rollouts,
        logprobs,
        baseline_logprobs,
        gold,
        reward,
    })
}

/// Log-probs of the trained tokens of every completion, in order, without gradients.
pub(crate) fn logprobs_of(
    model: &Transformer,
    groups: &[PromptGroup],
    temperature: f64,
    micro_tokens: usize,
) -> anyhow::Result<Vec<Vec<f64>>> {
    let _guard = tch::no_grad_guard();
    let temperature = if temperature > 0.0 { temperature } else { 1.0 };
    let lengths: Vec<usize> = groups.iter().map(PromptGroup::num_tokens).collect();
    let mut out = Vec::new();
    for range in batches_by_tokens(&lengths, micro_tokens)? {
        let batch = DeviceBatch::new(&PackedBatch::pack(&groups[range])?, model.device())?;
        let lp = target_logprobs(model, &batch, temperature, false)?.logprobs;
        let values = Vec::<f64>::try_from(&lp.values().to_kind(Kind::Double))?;
        out.extend(
            lp.offsets()
                .host()
                .windows(2)
                .map(|w| values[w[0] as usize..w[1] as usize].to_vec()),
        );
    }
    Ok(out)
}
