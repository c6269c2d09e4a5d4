//! Who writes synthetic data: a model of the run, or one behind an OpenAI-compatible server.

use rlhf_data::conversation::Text;
use rlhf_data::synthetic::author::Answer;
use rlhf_data::synthetic::{Ask, Author};
use rlhf_data::tokenize::ChatTokenizer;
use rlhf_endpoint::Endpoint;
use rlhf_model::{GenerateRequest, LocalSampler, Sampler as _, SamplingConfig};
use serde_json::{Value, json};

/// A model here. Its answers are a function of the weights, the seed and the asks.
pub(crate) struct LocalAuthor<'a> {
    pub name: String,
    pub sampler: LocalSampler<'a>,
    pub tokenizer: &'a ChatTokenizer,
    pub context: usize,
    pub seed: u64,
}

impl LocalAuthor<'_> {
    /// The request of an ask, unless it leaves no room for an answer.
    fn request(&self, ask: &Ask) -> Result<GenerateRequest, String> {
        let ids = if self.tokenizer.has_template() {
            self.tokenizer
                .prompt_ids(&Text::Messages(ask.messages.clone()))
        } else {
            let texts: Vec<&str> = ask.messages.iter().map(|m| m.content.as_str()).collect();
            self.tokenizer.prompt_ids(&Text::Plain(texts.join("\n\n")))
        };
        let ids = ids.map_err(|e| e.to_string())?;
        let room = self.context.saturating_sub(ids.len());
        if room == 0 || ids.is_empty() {
            return Err(format!(
                "the conversation has {} tokens, the context {}",
                ids.len(),
                self.context
            ));
        }
        Ok(GenerateRequest {
            prompt: ids,
            prompt_key: ask.key,
            samples: 1,
            max_new_tokens: Some(ask.max_tokens.min(room)),
        })
    }

    fn answers(&self, asks: &[&Ask]) -> Vec<Answer> {
        let requests: Vec<Result<GenerateRequest, String>> =
            asks.iter().map(|a| self.request(a)).collect();
        let fit: Vec<GenerateRequest> = requests.iter().filter_map(|r| r.clone().ok()).collect();
        let config = SamplingConfig {
            temperature: asks.first().map_or(0.0, |a| a.temperature),
            max_new_tokens: asks.iter().map(|a| a.max_tokens).max().unwrap_or(1),
            eos_ids: self.tokenizer.eos_ids().to_vec(),
            seed: self.seed,
            ..SamplingConfig::default()
        };
        let groups = match self.sampler.sample(&fit, &config) {
            Ok(groups) => groups,
            Err(e) => return asks.iter().map(|_| Err(e.to_string())).collect(),
        };
        let mut groups = groups.into_iter();
        requests
            .into_iter()
            .map(|r| {
                r?;
                let group = groups.next().ok_or("the sampler gave no completion")?;
                let ids = group.completions.first().map_or(&[][..], |c| &c.ids[..]);
                self.tokenizer.decode(ids, true).map_err(|e| e.to_string())
            })
            .collect()
    }
}

impl Author for LocalAuthor<'_> {
    fn name(&self) -> &str {
        &self.name
    }

    fn write(&self, asks: &[Ask]) -> Vec<Answer> {
        // One call for each run of asks at one temperature: a batch has one.
        let mut out = Vec::with_capacity(asks.len());
        for part in asks.chunk_by(|a, b| a.temperature == b.temperature) {
            out.extend(self.answers(&part.iter().collect::<Vec<_>>()));
        }
        out
    }
}

/// A chat model behind a server.
pub(crate) struct EndpointAuthor {
    pub name: String,
    pub endpoint: Endpoint,
}

impl Author for EndpointAuthor {
    fn name(&self) -> &str {
        &self.name
    }

    fn write(&self, asks: &[Ask]) -> Vec<Answer> {
        let question = |a: &Ask| {
            let messages: Vec<Value> = a
                .messages
                .iter()
                .map(|m| json!({"role": m.role.name(), "content": m.content}))
                .collect();
            json!({
                "messages": messages,
                "max_tokens": a.max_tokens,
                "temperature": a.temperature,
                // Servers take 31 bits; a key's halves count rounds and rows.
                "seed": (a.key ^ (a.key >> 32).wrapping_mul(0x9e37_79b9)) & 0x7fff_ffff,
            })
        };
        let questions: Vec<Value> = asks.iter().map(question).collect();
        let answers = self
            .endpoint
            .ask_all("chat/completions", &questions, &|_, _| {});
        answers
            .into_iter()
            .map(|a| {
                let a = a.map_err(|e| e.to_string())?;
                let text = a["choices"][0]["message"]["content"].as_str();
                text.map(str::to_owned)
                    .ok_or_else(|| "the answer has no choices[0].message.content".to_owned())
            })
            .collect()
    }
}
