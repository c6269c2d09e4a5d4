//! Language models behind an OpenAI-compatible HTTP endpoint (vLLM, llama.cpp's server, a paid one): external
//! samplers and judges ask them.
//!
//! A call that fails for a passing reason (no connection, a deadline, 408, 425, 429, 5xx, an answer that is
//! no JSON) is tried again after a wait that doubles, or that the server names; any other failure is
//! reported at once. Answers may be kept on disk, so that a second run asks nothing twice.
//!
//! ```no_run
//! use rlhf_endpoint::{Endpoint, EndpointConfig};
//! use serde_json::json;
//!
//! let endpoint = Endpoint::new(EndpointConfig::new("http://localhost:8000/v1", "my-model"))?;
//! let answer = endpoint.ask("completions", &json!({"prompt": "Once", "max_tokens": 8}))?;
//! println!("{}", answer["choices"][0]["text"]);
//! # Ok::<(), rlhf_endpoint::Error>(())
//! ```

mod cache;
mod error;

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use serde_json::Value;
use ureq::Agent;

use cache::Cache;
pub use error::{Error, Result};

/// The longest answer that is read.
const MAX_ANSWER: u64 = 256 << 20;

/// Where the endpoint is and how it is asked.
#[derive(Clone)]
pub struct EndpointConfig {
    /// Its address up to the version: `http://localhost:8000/v1`.
    pub url: String,
    /// The model's name there; becomes `model` of every question.
    pub model: String,
    /// The key that is sent as a bearer token. Never printed.
    pub key: Option<String>,
    /// How long one try may take.
    pub timeout: Duration,
    /// How often a question is asked before it counts as failed; at least once.
    pub tries: usize,
    /// The wait before the second try; each next one is twice as long.
    pub first_wait: Duration,
    /// The longest wait, also where the server names one.
    pub longest_wait: Duration,
    /// Questions in flight together.
    pub at_once: usize,
    /// The folder where answers are kept, by a digest of address, model and question.
    pub cache: Option<PathBuf>,
}

impl EndpointConfig {
    /// Two minutes a try, five tries, waits of half a second to half a minute, eight questions at once, no
    /// cache.
    pub fn new(url: impl Into<String>, model: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            model: model.into(),
            key: None,
            timeout: Duration::from_secs(120),
            tries: 5,
            first_wait: Duration::from_millis(500),
            longest_wait: Duration::from_secs(30),
            at_once: 8,
            cache: None,
        }
    }
}

impl std::fmt::Debug for EndpointConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EndpointConfig")
            .field("url", &self.url)
            .field("model", &self.model)
            .field("key", &self.key.as_ref().map(|_| "…"))
            .field("timeout", &self.timeout)
            .field("tries", &self.tries)
            .field("first_wait", &self.first_wait)
            .field("longest_wait", &self.longest_wait)
            .field("at_once", &self.at_once)
            .field("cache", &self.cache)
            .finish()
    }
}

/// What was asked so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Questions that the server answered.
    pub answered: u64,
    /// Questions that the cache answered.
    pub from_cache: u64,
    /// Tries that failed for a passing reason.
    pub failed_tries: u64,
    /// Tokens of prompts, as the server counts them (without those of cached answers).
    pub prompt_tokens: u64,
    /// Tokens of completions, likewise.
    pub completion_tokens: u64,
}

/// An endpoint that can be asked from any thread.
#[derive(Debug)]
pub struct Endpoint {
    config: EndpointConfig,
    agent: Agent,
    cache: Option<Cache>,
    usage: Mutex<Usage>,
}

impl Endpoint {
    /// Asks nothing yet.
    ///
    /// # Errors
    /// [`Error::Config`] when the address is none or a number is out of range; [`Error::Cache`] when the
    /// cache's folder cannot be made.
    pub fn new(mut config: EndpointConfig) -> Result<Self> {
        let bad = |what: String| Err(Error::Config(what));
        while config.url.ends_with('/') {
            config.url.pop();
        }
        let uri: std::result::Result<ureq::http::Uri, _> = config.url.parse();
        match uri {
            Ok(uri)
                if matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some() => {}
            _ => {
                return bad(format!(
                    "`{}` is no address; write it like http://localhost:8000/v1",
                    config.url
                ));
            }
        }
        if config.tries == 0 || config.at_once == 0 || config.timeout.is_zero() {
            return bad("tries, at_once and timeout must be above 0".into());
        }
        let agent: Agent = Agent::config_builder()
            .timeout_global(Some(config.timeout))
            .http_status_as_error(false)
            .max_idle_connections_per_host(config.at_once)
            .build()
            .into();
        let cache = config.cache.clone().map(Cache::new).transpose()?;
        Ok(Self {
            config,
            agent,
            cache,
            usage: Mutex::default(),
        })
    }

    /// As it was configured.
    #[must_use]
    pub fn config(&self) -> &EndpointConfig {
        &self.config
    }

    /// What was asked so far.
    #[must_use]
    pub fn usage(&self) -> Usage {
        *self.lock()
    }

    /// Posts `question`, a JSON object, to `path` (`completions`, `chat/completions`) with the model's name in
    /// it, and gives the answer.
    ///
    /// # Errors
    /// The last try's error; [`Error::Config`] when the question is no object.
    pub fn ask(&self, path: &str, question: &Value) -> Result<Value> {
        let mut question = question.clone();
        let Some(map) = question.as_object_mut() else {
            return Err(Error::Config("a question is a JSON object".into()));
        };
        map.insert("model".into(), Value::String(self.config.model.clone()));
        let url = format!("{}/{path}", self.config.url);
        let body = question.to_string();
        if let Some(cache) = &self.cache
            && let Some(answer) = cache.find(&url, &body)?
        {
            self.lock().from_cache += 1;
            return Ok(answer);
        }
        let c = &self.config;
        let waits = ExponentialBuilder::new()
            .with_min_delay(c.first_wait)
            .with_max_delay(c.longest_wait)
            .with_max_times(c.tries - 1)
            .with_jitter();
        let mut waits = waits.build();
        let answer = loop {
            let e = match self.try_once(&url, &body) {
                Ok(answer) => break answer,
                Err(e) => e,
            };
            if !e.passes() {
                return Err(e);
            }
            self.lock().failed_tries += 1;
            let Some(wait) = waits.next() else {
                return Err(e);
            };
            std::thread::sleep(e.retry_after().map_or(wait, |w| w.min(c.longest_wait)));
        };
        if let Some(cache) = &self.cache {
            cache.keep(&url, &body, &answer)?;
        }
        let count = |name: &str| answer["usage"][name].as_u64().unwrap_or(0);
        let mut usage = self.lock();
        usage.answered += 1;
        usage.prompt_tokens += count("prompt_tokens");
        usage.completion_tokens += count("completion_tokens");
        drop(usage);
        Ok(answer)
    }

    /// Asks all `questions`, `at_once` of them together; one answer each, in their order. `done` is told each
    /// time one is through.
    pub fn ask_all(
        &self,
        path: &str,
        questions: &[Value],
        done: &(dyn Fn(usize, &Result<Value>) + Sync),
    ) -> Vec<Result<Value>> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut mine = Vec::new();
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let Some(question) = questions.get(i) else {
                    return mine;
                };
                let answer = self.ask(path, question);
                done(i, &answer);
                mine.push((i, answer));
            }
        };
        let threads = self.config.at_once.min(questions.len());
        let mut all: Vec<(usize, Result<Value>)> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            let joined = workers.into_iter().map(|w| match w.join() {
                Ok(mine) => mine,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            joined.flatten().collect()
        });
        all.sort_by_key(|(i, _)| *i);
        all.into_iter().map(|(_, answer)| answer).collect()
    }

    fn try_once(&self, url: &str, body: &str) -> Result<Value> {
        let start = Instant::now();
        let failed = |e: ureq::Error| Error::transport(url, &e, start.elapsed());
        let mut request = self
            .agent
            .post(url)
            .header("content-type", "application/json");
        if let Some(key) = &self.config.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut response = request.send(body).map_err(failed)?;
        let status = response.status().as_u16();
        let header = response.headers().get("retry-after");
        let wait = header.and_then(|v| v.to_str().ok()?.trim().parse().ok());
        let text = response
            .body_mut()
            .with_config()
            .limit(MAX_ANSWER)
            .lossy_utf8(true)
            .read_to_string()
            .map_err(failed)?;
        if !(200..300).contains(&status) {
            return Err(Error::Status {
                url: url.into(),
                status,
                said: short(&text),
                retry_after: wait.map(Duration::from_secs),
            });
        }
        serde_json::from_str(&text).map_err(|e| Error::Malformed {
            url: url.into(),
            what: e.to_string(),
            said: short(&text),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Usage> {
        // Numbers are whole at every moment: a panic elsewhere does not spoil them.
        self.usage
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The beginning of what a server said, for a message.
fn short(text: &str) -> String {
    const MOST: usize = 300;
    let line: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MOST)
        .collect();
    let cut = if text.chars().nth(MOST).is_some() {
        "…"
    } else {
        ""
    };
    format!("{}{cut}", line.trim())
}
