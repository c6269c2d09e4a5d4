//! A sampler on a server: vLLM, or any other OpenAI-compatible one that takes and gives token ids and
//! log-probabilities.
//!
//! Prompts go as ids and completions come as ids: nothing is tokenised anew on the way. What the server is
//! asked beyond the common fields is only what the settings ask for (`top_k`, `min_p`, `min_tokens`,
//! `stop_token_ids`, `repetition_penalty`), so a simple server serves simple settings.

use rlhf_data::group::{Completion, Finish, PromptGroup, SamplerRecord};
use rlhf_data::seed::{Purpose, Stream};
use rlhf_endpoint::Endpoint;
use serde_json::{Map, Value, json};

use super::settings::check;
use super::{GenerateLimits, GenerateRequest, RecordedLogprobs, Sampler, SamplingConfig};
use crate::config::Config;
use crate::error::{Error, Result};

/// Which log-probabilities the server gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ServerLogprobs {
    /// The model's, before temperature, filters and penalties: what vLLM gives.
    #[default]
    Model,
    /// Those of the distribution that was drawn from: vLLM with `--logprobs-mode processed_logprobs`.
    Sampled,
}

/// A sampler on a server.
#[derive(Debug)]
pub struct ServerSampler {
    endpoint: Endpoint,
    logprobs: ServerLogprobs,
    vocab: i64,
    context: i64,
    stop: Vec<String>,
}

impl ServerSampler {
    /// `config` is that of the model that the server is to have: its vocabulary and context are checked.
    #[must_use]
    pub fn new(endpoint: Endpoint, config: &Config, logprobs: ServerLogprobs) -> Self {
        Self {
            endpoint,
            logprobs,
            vocab: config.vocab_size,
            context: config.max_position_embeddings,
            stop: Vec::new(),
        }
    }

    /// Ends completions at texts, too.
    #[must_use]
    pub fn stop_at(mut self, strings: Vec<String>) -> Self {
        self.stop = strings;
        self
    }

    /// The server.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Whether the server's log-probabilities are those that are to be recorded.
    fn check_logprobs(&self, c: &SamplingConfig) -> Result<()> {
        let shaped = c.temperature != 1.0
            || c.top_k.is_some()
            || c.top_p.is_some()
            || c.min_p.is_some()
            || c.penalises()
            || !c.logit_bias.is_empty()
            || (c.min_new_tokens > 0 && !c.eos_ids.is_empty());
        let greedy = c.temperature == 0.0;
        match (c.record, self.logprobs) {
            _ if !shaped => Ok(()),
            (RecordedLogprobs::Model, ServerLogprobs::Model)
            | (RecordedLogprobs::Sampled, ServerLogprobs::Sampled) => Ok(()),
            (RecordedLogprobs::Sampled, ServerLogprobs::Model) if greedy => Ok(()),
            (RecordedLogprobs::Sampled, ServerLogprobs::Model) => Err(Error::Argument(
                "the server gives the model's log-probabilities, not those of the distribution that it draws from: sample at temperature 1 without filters and penalties, or start vLLM with --logprobs-mode processed_logprobs and say so".into(),
            )),
            (RecordedLogprobs::Model, ServerLogprobs::Sampled) => Err(Error::Argument(
                "the server gives log-probabilities of the distribution that it draws from, not the model's: sample at temperature 1 without filters and penalties".into(),
            )),
        }
    }

    fn question(&self, r: &GenerateRequest, c: &SamplingConfig) -> Value {
        let mut q = Map::new();
        let mut put = |name: &str, value: Value| {
            q.insert(name.into(), value);
        };
        let room = self.context as usize - r.prompt.len();
        let most = r.max_new_tokens.unwrap_or(usize::MAX);
        put("prompt", json!(r.prompt));
        put("n", json!(r.samples));
        put("max_tokens", json!(most.min(c.max_new_tokens).min(room)));
        put("temperature", json!(c.temperature));
        // Some servers take 0 for none at all.
        put("logprobs", json!(c.top_logprobs.max(1)));
        put(
            "seed",
            json!(Stream::new(c.seed, Purpose::Sample).bits(r.prompt_key, 0, 0)[0]),
        );
        put("return_token_ids", json!(true));
        put("return_tokens_as_token_ids", json!(true));
        put("add_special_tokens", json!(false));
        put("skip_special_tokens", json!(false));
        if let Some(k) = c.top_k {
            put("top_k", json!(k));
        }
        if let Some(p) = c.top_p {
            put("top_p", json!(p));
        }
        if let Some(p) = c.min_p {
            put("min_p", json!(p));
        }
        if c.min_new_tokens > 0 {
            put("min_tokens", json!(c.min_new_tokens));
        }
        if c.eos_ids.is_empty() {
            put("ignore_eos", json!(true));
        } else {
            put("stop_token_ids", json!(c.eos_ids));
        }
        if !self.stop.is_empty() {
            put("stop", json!(self.stop));
            put("include_stop_str_in_output", json!(true));
        }
        for (name, value, neutral) in [
            ("repetition_penalty", c.repetition_penalty, 1.0),
            ("presence_penalty", c.presence_penalty, 0.0),
            ("frequency_penalty", c.frequency_penalty, 0.0),
        ] {
            if value != neutral {
                put(name, json!(value));
            }
        }
        if !c.logit_bias.is_empty() {
            // JSON has no −∞; servers take −100 for it.
            let bias = c
                .logit_bias
                .iter()
                .map(|(id, x)| (id.to_string(), json!(x.max(-100.0))));
            put("logit_bias", Value::Object(bias.collect()));
        }
        Value::Object(q)
    }

    fn group(
        &self,
        answer: &Value,
        r: &GenerateRequest,
        c: &SamplingConfig,
    ) -> std::result::Result<PromptGroup, String> {
        let choices = answer["choices"].as_array().ok_or("it has no `choices`")?;
        if choices.len() != r.samples {
            return Err(format!("{} choices, expected {}", choices.len(), r.samples));
        }
        let mut completions = vec![None; r.samples];
        for (place, choice) in choices.iter().enumerate() {
            let index = choice["index"].as_u64().map_or(place, |i| i as usize);
            let at = |e: String| format!("choice {index}: {e}");
            if let Some(prompt) = choice["prompt_token_ids"].as_array()
                && !prompt
                    .iter()
                    .map(Value::as_u64)
                    .eq(r.prompt.iter().map(|&id| Some(u64::from(id))))
            {
                return Err(at("the server completed another prompt".into()));
            }
            let slot = completions
                .get_mut(index)
                .filter(|s| s.is_none())
                .ok_or_else(|| at("it comes twice or does not belong here".into()))?;
            *slot = Some(self.completion(choice, r, c).map_err(at)?);
        }
        Ok(PromptGroup {
            row: r.prompt_key,
            prompt: r.prompt.clone(),
            completions: completions.into_iter().flatten().collect(),
        })
    }

    fn completion(
        &self,
        choice: &Value,
        r: &GenerateRequest,
        c: &SamplingConfig,
    ) -> std::result::Result<Completion, String> {
        let ids = ids(choice)?;
        if let Some(id) = ids.iter().find(|&&id| i64::from(id) >= self.vocab) {
            return Err(format!(
                "token {id} is outside the model's vocabulary of {}: the server has another model",
                self.vocab
            ));
        }
        let most = r.max_new_tokens.unwrap_or(usize::MAX).min(c.max_new_tokens);
        if ids.is_empty() || ids.len() > most {
            return Err(format!("{} tokens, expected 1 to {most}", ids.len()));
        }
        let finish = match choice["finish_reason"].as_str() {
            Some("stop") => Finish::Stop,
            Some("length") => Finish::Length,
            other => return Err(format!("finish_reason is {other:?}")),
        };
        let ends = ids.last().is_some_and(|id| c.eos_ids.contains(id));
        if finish == Finish::Stop && !ends && self.stop.is_empty() {
            return Err(
                "it stopped, but its last token does not end a sequence: the server leaves that token out, or has other ones".into(),
            );
        }
        let mut logprobs = logprobs(choice)?;
        if logprobs.len() != ids.len() {
            return Err(format!(
                "{} log-probabilities of {} tokens",
                logprobs.len(),
                ids.len()
            ));
        }
        if c.temperature == 0.0 && c.record == RecordedLogprobs::Sampled {
            logprobs.fill(0.0);
        }
        let top = if c.top_logprobs > 0 {
            top(choice, ids.len(), c.top_logprobs)?
        } else {
            Vec::new()
        };
        let mut completion = Completion::whole(ids, finish);
        completion.sampler = Some(SamplerRecord {
            logprobs,
            policy_version: c.policy_version,
            top,
        });
        Ok(completion)
    }
}

impl Sampler for ServerSampler {
    fn sample(
        &self,
        requests: &[GenerateRequest],
        config: &SamplingConfig,
    ) -> Result<Vec<PromptGroup>> {
        config.filters()?;
        let limits = GenerateLimits::default();
        check(requests, config, &limits, self.vocab, self.context)?;
        self.check_logprobs(config)?;
        let asked: Vec<&GenerateRequest> = requests.iter().filter(|r| r.samples > 0).collect();
        let questions: Vec<Value> = asked.iter().map(|r| self.question(r, config)).collect();
        let answers = self.endpoint.ask_all("completions", &questions, &|_, _| {});
        let mut answers = answers.into_iter();
        let one = |(i, r): (usize, &GenerateRequest)| {
            if r.samples == 0 {
                return Ok(PromptGroup {
                    row: r.prompt_key,
                    prompt: r.prompt.clone(),
                    completions: Vec::new(),
                });
            }
            let answer = answers.next().unwrap_or(Ok(Value::Null))?;
            self.group(&answer, r, config)
                .map_err(|what| Error::Format {
                    file: self.endpoint.config().url.clone(),
                    message: format!("its answer to request {i}: {what}"),
                })
        };
        requests.iter().enumerate().map(one).collect()
    }
}

fn id(value: &Value) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok()
}

/// `token_id:17`, as vLLM writes tokens when asked to.
fn named_id(text: &str) -> Option<u32> {
    text.strip_prefix("token_id:")?.parse().ok()
}

/// A completion's tokens: `token_ids`, or what stands with the log-probabilities.
fn ids(choice: &Value) -> std::result::Result<Vec<u32>, String> {
    let from =
        |list: &Vec<Value>, one: &dyn Fn(&Value) -> Option<u32>| list.iter().map(one).collect();
    let with = &choice["logprobs"];
    let found: Option<Vec<u32>> = if let Some(list) = choice["token_ids"].as_array() {
        from(list, &id)
    } else if let Some(list) = with["tokens"].as_array() {
        from(list, &|t| named_id(t.as_str()?))
    } else if let Some(list) = with["content"].as_array() {
        from(list, &|t| id(&t["id"]))
    } else {
        None
    };
    found.ok_or_else(|| {
        "it has no token ids; vLLM gives them from version 0.10.2 on, llama.cpp's server with log-probabilities".into()
    })
}

fn logprobs(choice: &Value) -> std::result::Result<Vec<f32>, String> {
    let with = &choice["logprobs"];
    let number = |v: &Value| {
        v.as_f64()
            .filter(|x| x.is_finite() && *x <= 1e-3)
            .map(|x| x.min(0.0) as f32)
    };
    let found: Option<Vec<f32>> = if let Some(list) = with["token_logprobs"].as_array() {
        list.iter().map(number).collect()
    } else if let Some(list) = with["content"].as_array() {
        list.iter().map(|t| number(&t["logprob"])).collect()
    } else {
        return Err("it has no log-probabilities; the server must give them (`logprobs`)".into());
    };
    found.ok_or_else(|| "a log-probability is no number of at most 0".into())
}

fn top(
    choice: &Value,
    tokens: usize,
    k: usize,
) -> std::result::Result<Vec<Vec<(u32, f32)>>, String> {
    let with = &choice["logprobs"];
    let place = |t: usize| -> Option<Vec<(u32, f32)>> {
        let mut all: Vec<(u32, f32)> = match &with["top_logprobs"][t] {
            Value::Object(map) => map
                .iter()
                .map(|(name, x)| Some((named_id(name)?, x.as_f64()? as f32)))
                .collect::<Option<_>>()?,
            _ => with["content"][t]["top_logprobs"]
                .as_array()?
                .iter()
                .map(|e| Some((id(&e["id"])?, e["logprob"].as_f64()? as f32)))
                .collect::<Option<_>>()?,
        };
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        // vLLM adds the token that was drawn where it is not among them.
        all.truncate(k);
        Some(all)
    };
    (0..tokens)
        .map(place)
        .collect::<Option<_>>()
        .ok_or_else(|| "it has no likeliest tokens with their ids".into())
}
