//! Talks of several turns: a policy writes, an environment answers (a tool's output, a user, a game), until it
//! ends the talk with a reward.
//!
//! Invariants: what an environment wrote is in a completion's ids and in none of its trained ranges; a sampled
//! token keeps the log-probability under which it was drawn, a written one has 0, being given. The group's shared
//! prefix is the first prompt, so all that follows is one completion. Noise is keyed by (seed, step, row, sample,
//! turn, position): a talk goes the same way alone and in a crowd, and a talk of one turn is what
//! [`rollout::draw`](crate::rollout::draw()) draws.
//!
//! A later turn computes its whole context again: nothing is kept between the sampler's calls.

mod calculator;

use std::ops::Range;

use rlhf_data::conversation::{Message, Role, Text};
use rlhf_data::group::{Completion, Finish, PromptGroup, SamplerRecord};
use rlhf_data::record::SftRecord;
use rlhf_data::seed::{Purpose, Stream};
use rlhf_data::tokenize::{ChatTokenizer, Limits, Outcome};
use rlhf_model::{GenerateRequest, Sampler, SamplingConfig};

use serde::{Deserialize, Serialize};

pub use calculator::{Calculator, evaluate};

use crate::error::{Result, ensure};
use crate::rollout::{Prompt, Rollout, RolloutConfig};

/// What the policy just wrote, and all before it.
#[derive(Clone, Copy, Debug)]
pub struct Turn<'a> {
    /// The first prompt.
    pub prompt: &'a Prompt,
    /// Everything after it: what the policy and the environment wrote, in turn, special tokens included.
    pub ids: &'a [u32],
    /// What the policy wrote in each turn so far, special tokens left out; the last is new.
    pub texts: &'a [String],
    /// What the environment answered to each but the last, as text.
    pub replies: &'a [String],
    /// How the last turn ends.
    pub finish: Finish,
}

impl Turn<'_> {
    /// What the policy wrote last.
    #[must_use]
    pub fn said(&self) -> &str {
        self.texts.last().map_or("", String::as_str)
    }
}

/// What an environment does.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// It answers with messages, in the form that the chat template gives them, and the policy goes on.
    Messages(Vec<Message>),
    /// It answers with plain text, put right after what the policy wrote.
    Text(String),
    /// The talk is over, with this reward.
    End(f64),
}

/// Something to talk with, and for how long.
#[derive(Clone, Copy)]
pub struct Scene<'a> {
    /// It.
    pub environment: &'a dyn Environment,
    /// How long a talk may be.
    pub limits: TalkLimits,
}

impl std::fmt::Debug for Scene<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scene")
            .field("environment", &self.environment.name())
            .field("limits", &self.limits)
            .finish()
    }
}

/// Something to talk with.
pub trait Environment: Sync {
    /// A short name for metrics.
    fn name(&self) -> &str;

    /// Answers a turn. A function of the talk alone, so that a run can be repeated.
    ///
    /// # Errors
    /// Whatever keeps the environment from answering at all; the run stops. What the policy does wrong is no
    /// error but a reply or an end.
    fn step(&self, turn: &Turn<'_>) -> Result<Reply>;

    /// The reward of a talk that had to be broken off, for want of turns or room.
    fn unfinished(&self) -> f64 {
        0.0
    }
}

/// How long a talk may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TalkLimits {
    /// Turns of the policy.
    pub max_turns: usize,
    /// Tokens after the first prompt, the environment's included.
    pub max_tokens: usize,
}

/// A talk as it goes on.
struct Talk {
    /// Index into the prompts chosen.
    place: usize,
    sample: usize,
    ids: Vec<u32>,
    trained: Vec<Range<usize>>,
    logprobs: Vec<f32>,
    texts: Vec<String>,
    replies: Vec<String>,
    finish: Finish,
    reward: Option<f64>,
}

impl Talk {
    fn new(place: usize, sample: usize) -> Self {
        Self {
            place,
            sample,
            ids: Vec::new(),
            trained: Vec::new(),
            logprobs: Vec::new(),
            texts: Vec::new(),
            replies: Vec::new(),
            finish: Finish::Stop,
            reward: None,
        }
    }

    fn say(&mut self, said: &Completion, text: String) {
        let begin = self.ids.len();
        self.ids.extend(&said.ids);
        self.trained.push(begin..self.ids.len());
        match &said.sampler {
            Some(s) => self.logprobs.extend(&s.logprobs),
            None => self.logprobs.resize(self.ids.len(), 0.0),
        }
        self.texts.push(text);
        self.finish = said.finish;
    }

    fn hear(&mut self, ids: &[u32], text: String) {
        self.ids.extend(ids);
        self.logprobs.resize(self.ids.len(), 0.0);
        self.replies.push(text);
    }

    fn into_completion(self, policy_version: u64) -> Completion {
        Completion {
            ids: self.ids,
            trained: self.trained,
            finish: self.finish,
            sampler: Some(SamplerRecord {
                logprobs: self.logprobs,
                policy_version,
                top: Vec::new(),
            }),
        }
    }
}

/// Lets `cfg.group_size` talks of each chosen prompt go on in `environment` until it ends them; each gives a
/// completion with its reward in [`Rollout::earned`]. `cfg.max_new_tokens` bounds each turn of the policy. A talk that runs out of turns
/// or room is broken off ([`Finish::Length`], [`Environment::unfinished`]); an answer for which there is no room
/// is left out.
///
/// [`Rollout::texts`] is all of a talk as text, what the environment wrote included.
///
/// # Errors
/// When the sampler or the environment fails, a limit is 0, a reward is not finite, or the chat template cannot
/// continue a conversation.
pub fn play(
    sampler: &dyn Sampler,
    tokenizer: &ChatTokenizer,
    scene: Scene<'_>,
    (prompts, chosen): (&[Prompt], &[usize]),
    cfg: &RolloutConfig,
    step: u64,
) -> Result<Vec<Rollout>> {
    let Scene {
        environment,
        limits,
    } = scene;
    ensure(
        limits.max_turns > 0 && limits.max_tokens > 0,
        "environment",
        || "max_turns and max_tokens must be above 0".into(),
    )?;
    let mut talks: Vec<Talk> = (0..chosen.len())
        .flat_map(|p| (0..cfg.group_size).map(move |s| Talk::new(p, s)))
        .collect();
    for turn in 0..limits.max_turns {
        let live: Vec<usize> = (0..talks.len())
            .filter(|&i| talks[i].reward.is_none())
            .collect();
        if live.is_empty() {
            break;
        }
        let said = next_turn(
            sampler,
            tokenizer,
            &talks,
            &live,
            (prompts, chosen),
            limits,
            cfg,
            (step, turn),
        )?;
        for (&i, said) in live.iter().zip(&said) {
            let text = tokenizer.decode(&said.ids, true)?;
            talks[i].say(said, text);
            let last = turn + 1 == limits.max_turns;
            answer(
                &mut talks[i],
                tokenizer,
                environment,
                limits,
                (prompts, chosen),
                last,
            )?;
        }
    }
    gather(talks, tokenizer, (prompts, chosen), step)
}

/// What the policy writes next in each of the talks `live`.
#[allow(
    clippy::too_many_arguments,
    reason = "a step of `play`, which has them all"
)]
fn next_turn(
    sampler: &dyn Sampler,
    tokenizer: &ChatTokenizer,
    talks: &[Talk],
    live: &[usize],
    (prompts, chosen): (&[Prompt], &[usize]),
    limits: TalkLimits,
    cfg: &RolloutConfig,
    (step, turn): (u64, usize),
) -> Result<Vec<Completion>> {
    let sampling = SamplingConfig {
        temperature: cfg.temperature,
        max_new_tokens: cfg.max_new_tokens.min(limits.max_tokens),
        eos_ids: tokenizer.eos_ids().to_vec(),
        seed: cfg.seed,
        policy_version: step,
        ..SamplingConfig::default()
    };
    let key = |place: usize| step << 32 | (prompts[chosen[place]].row & 0xffff_ffff);
    let requests: Vec<GenerateRequest> = if turn == 0 {
        // All of a group at once: its prompt is computed once.
        let request = |place: usize| GenerateRequest {
            prompt: prompts[chosen[place]].ids.clone(),
            prompt_key: key(place),
            samples: cfg.group_size,
            max_new_tokens: None,
        };
        (0..chosen.len()).map(request).collect()
    } else {
        let stream = Stream::new(cfg.seed, Purpose::Sample);
        let request = |&i: &usize| {
            let t = &talks[i];
            // With the top bit, which no step reaches: a key that no first turn has.
            let w = stream.bits(key(t.place), t.sample as u32, u32::MAX - turn as u32);
            GenerateRequest {
                prompt: [&prompts[chosen[t.place]].ids[..], &t.ids].concat(),
                prompt_key: (u64::from(w[0]) << 32 | u64::from(w[1])) | 1 << 63,
                samples: 1,
                max_new_tokens: Some((limits.max_tokens - t.ids.len()).min(cfg.max_new_tokens)),
            }
        };
        live.iter().map(request).collect()
    };
    let groups = sampler.sample(&requests, &sampling)?;
    let said: Vec<Completion> = groups.into_iter().flat_map(|g| g.completions).collect();
    ensure(said.len() == live.len(), "environment", || {
        format!(
            "the sampler gave {} completions, expected {}",
            said.len(),
            live.len()
        )
    })?;
    Ok(said)
}

/// Lets the environment answer, and ends the talk where it is over.
fn answer(
    talk: &mut Talk,
    tokenizer: &ChatTokenizer,
    environment: &dyn Environment,
    limits: TalkLimits,
    (prompts, chosen): (&[Prompt], &[usize]),
    last: bool,
) -> Result<()> {
    let reply = environment.step(&Turn {
        prompt: &prompts[chosen[talk.place]],
        ids: &talk.ids,
        texts: &talk.texts,
        replies: &talk.replies,
        finish: talk.finish,
    })?;
    let (ids, text) = match reply {
        Reply::End(reward) => {
            ensure(reward.is_finite(), "environment", || {
                format!("{} gave the reward {reward}", environment.name())
            })?;
            talk.reward = Some(reward);
            return Ok(());
        }
        Reply::Text(text) => (plain(tokenizer, &text)?, text),
        Reply::Messages(messages) => {
            let text: Vec<&str> = messages.iter().map(|m| m.content.as_str()).collect();
            (continuation(tokenizer, &messages)?, text.join("\n"))
        }
    };
    if last || talk.ids.len() + ids.len() >= limits.max_tokens {
        talk.finish = Finish::Length;
        talk.reward = Some(environment.unfinished());
    } else {
        talk.hear(&ids, text);
    }
    Ok(())
}

fn gather(
    talks: Vec<Talk>,
    tokenizer: &ChatTokenizer,
    (prompts, chosen): (&[Prompt], &[usize]),
    step: u64,
) -> Result<Vec<Rollout>> {
    let mut all: Vec<Rollout> = chosen
        .iter()
        .map(|&prompt| Rollout {
            prompt,
            group: PromptGroup {
                row: prompts[prompt].row,
                prompt: prompts[prompt].ids.clone(),
                completions: Vec::new(),
            },
            texts: Vec::new(),
            earned: Vec::new(),
        })
        .collect();
    for talk in talks {
        let of = &mut all[talk.place];
        of.texts.push(tokenizer.decode(&talk.ids, true)?);
        of.earned.push(talk.reward.unwrap_or_default());
        of.group.completions.push(talk.into_completion(step));
    }
    Ok(all)
}

/// Ids of text in the middle of other text: without what the tokenizer puts before a whole one.
fn plain(tokenizer: &ChatTokenizer, text: &str) -> Result<Vec<u32>> {
    let before = tokenizer.encode("")?;
    let ids = tokenizer.encode(text)?;
    match ids.strip_prefix(&before[..]) {
        Some(ids) => Ok(ids.to_vec()),
        None => Err(crate::Error::Argument {
            op: "environment",
            what: "the tokenizer puts tokens around every text; use an environment that answers in messages".into(),
        }),
    }
}

/// The ids that the chat template puts between an assistant's turn, end-of-sequence token included, and the next:
/// those of `messages` and of the beginning of an assistant's turn.
///
/// # Errors
/// When there is no template, or it does not write conversations one after the other.
pub fn continuation(tokenizer: &ChatTokenizer, messages: &[Message]) -> Result<Vec<u32>> {
    // What was asked and said before does not matter to what comes after.
    let before = Text::Messages(vec![Message::new(Role::User, "a")]);
    let said = Message::new(Role::Assistant, "a");
    let record = SftRecord {
        prompt: Some(before),
        completion: Text::Messages(vec![said.clone()]),
    };
    let limits = Limits::new(usize::MAX / 2, usize::MAX / 2);
    let mut all = vec![Message::new(Role::User, "a"), said];
    all.extend(messages.iter().cloned());
    let whole = tokenizer.prompt_ids(&Text::Messages(all))?;
    if let Outcome::Kept(group) = tokenizer.sft_group(0, &record, &limits)? {
        let begin = [&group.prompt[..], &group.completions[0].ids].concat();
        if let Some(rest) = whole.strip_prefix(&begin[..]) {
            return Ok(rest.to_vec());
        }
    }
    Err(crate::Error::Argument {
        op: "environment",
        what: "the chat template writes an assistant's turn in another way when messages follow it; use an environment that answers in plain text".into(),
    })
}
