//! A judge behind an OpenAI-compatible endpoint.

use std::sync::{Mutex, PoisonError};

use rlhf_endpoint::{Endpoint, Error as EndpointError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::prompts::read_winner;
use super::{Pair, PairJudge, Prompts, Winner};
use crate::error::{Error, Result};

/// What tokens cost, in any currency.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Prices {
    /// A million tokens of prompts.
    pub prompt: f64,
    /// A million tokens of answers.
    pub completion: f64,
}

/// How a judge is asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Its texts.
    pub prompts: Prompts,
    /// The longest answer in tokens.
    pub max_tokens: u64,
    /// What tokens cost.
    pub prices: Prices,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            prompts: Prompts::default(),
            max_tokens: 512,
            prices: Prices::default(),
        }
    }
}

/// What a judge did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Counts {
    /// Questions that the server answered.
    pub answered: u64,
    /// Questions that the cache answered.
    pub from_cache: u64,
    /// Tries that failed and were made again.
    pub failed_tries: u64,
    /// Questions without an answer after all tries.
    pub unanswered: u64,
    /// Answers without a verdict.
    pub unread: u64,
    /// Verdicts that neither is better.
    pub ties: u64,
    /// Pairs of which both orders were judged.
    pub pairs: u64,
    /// Of those, pairs whose verdict changed with the order.
    pub turned: u64,
    /// Tokens of prompts, as the server counts them, without those of cached answers.
    pub prompt_tokens: u64,
    /// Tokens of answers, likewise.
    pub completion_tokens: u64,
    /// What they cost.
    pub cost: f64,
}

/// A judge behind an endpoint.
#[derive(Debug)]
pub struct RemoteJudge {
    endpoint: Endpoint,
    settings: Settings,
    seen: Mutex<Counts>,
    /// What the log knows of.
    told: Mutex<Counts>,
}

impl RemoteJudge {
    /// Asks nothing yet.
    ///
    /// # Errors
    /// When the settings make no sense.
    pub fn new(endpoint: Endpoint, settings: Settings) -> Result<Self> {
        settings.prompts.check()?;
        let prices = [settings.prices.prompt, settings.prices.completion];
        if settings.max_tokens == 0 || prices.iter().any(|p| !(p.is_finite() && *p >= 0.0)) {
            return Err(Error::Judge {
                what: "max_tokens must be above 0, and prices not negative".into(),
            });
        }
        Ok(Self {
            endpoint,
            settings,
            seen: Mutex::default(),
            told: Mutex::default(),
        })
    }

    /// What it did so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let usage = self.endpoint.usage();
        let prices = self.settings.prices;
        let cost = usage.prompt_tokens as f64 * prices.prompt
            + usage.completion_tokens as f64 * prices.completion;
        Counts {
            answered: usage.answered,
            from_cache: usage.from_cache,
            failed_tries: usage.failed_tries,
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            cost: cost / 1e6,
            ..*self.lock()
        }
    }

    /// What it did since this was last asked, by name.
    #[must_use]
    pub fn counted(&self) -> Vec<(String, f64)> {
        let now = self.counts();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let new = now.since(&told);
        *told = now;
        new
    }

    /// A rating from 0 to 1 of each completion (prompt, completion); nothing where none came.
    ///
    /// # Errors
    /// What will not pass, and when no question at all was answered.
    pub fn rates(&self, completions: &[(&str, &str)]) -> Result<Vec<Option<f64>>> {
        let prompts = &self.settings.prompts;
        let questions = completions.iter().map(|(p, c)| prompts.ask_rating(p, c));
        let answers = self.answers(questions.collect())?;
        let read = |a: Option<String>| a.and_then(|a| self.read(&a, |t| prompts.read_rating(t)));
        Ok(answers.into_iter().map(read).collect())
    }

    /// The verdict on each pair as it stands, one order.
    fn winners(&self, pairs: &[Pair<'_>]) -> Result<Vec<Option<Winner>>> {
        let questions = pairs.iter().map(|p| self.settings.prompts.ask_pair(*p));
        let answers = self.answers(questions.collect())?;
        let read = |a: Option<String>| a.and_then(|a| self.read(&a, read_winner));
        let winners: Vec<Option<Winner>> = answers.into_iter().map(read).collect();
        let ties = winners.iter().filter(|w| **w == Some(Winner::Tie)).count();
        self.lock().ties += ties as u64;
        Ok(winners)
    }

    fn read<T>(&self, answer: &str, reader: impl Fn(&str) -> Option<T>) -> Option<T> {
        let found = reader(answer);
        self.lock().unread += u64::from(found.is_none());
        found
    }

    /// The text of each answer; an empty one where there is no text in it, nothing where no answer came.
    fn answers(&self, questions: Vec<String>) -> Result<Vec<Option<String>>> {
        let questions: Vec<Value> = questions
            .into_iter()
            .map(|text| {
                json!({
                    "messages": [{"role": "user", "content": text}],
                    "temperature": 0,
                    "max_tokens": self.settings.max_tokens,
                })
            })
            .collect();
        let answers = self
            .endpoint
            .ask_all("chat/completions", &questions, &|_, _| {});
        let (mut found, mut last) = (Vec::new(), None);
        for answer in answers {
            match answer {
                Ok(a) => {
                    let text = a["choices"][0]["message"]["content"].as_str();
                    found.push(Some(text.unwrap_or_default().to_owned()));
                }
                // Asking again would not help, here or with the next question.
                Err(e) if !e.passes() && !of_the_question(&e) => return Err(e.into()),
                Err(e) => {
                    self.lock().unanswered += 1;
                    last = Some(e);
                    found.push(None);
                }
            }
        }
        match last {
            Some(e) if found.iter().all(Option::is_none) => Err(e.into()),
            _ => Ok(found),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Counts> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a server refused a question for what it says (too long, filtered), not for who asks.
fn of_the_question(e: &EndpointError) -> bool {
    matches!(
        e,
        EndpointError::Status {
            status: 400 | 413 | 422,
            ..
        }
    )
}

impl Counts {
    /// What came since `before`, by name.
    pub(super) fn since(&self, before: &Self) -> Vec<(String, f64)> {
        let new = |name: &str, now: u64, then: u64| (name.to_owned(), (now - then) as f64);
        vec![
            new("answered", self.answered, before.answered),
            new("from_cache", self.from_cache, before.from_cache),
            new("failed_tries", self.failed_tries, before.failed_tries),
            new("unanswered", self.unanswered, before.unanswered),
            new("unread", self.unread, before.unread),
            new("ties", self.ties, before.ties),
            new("pairs", self.pairs, before.pairs),
            new("turned", self.turned, before.turned),
            new("prompt_tokens", self.prompt_tokens, before.prompt_tokens),
            new(
                "completion_tokens",
                self.completion_tokens,
                before.completion_tokens,
            ),
            ("cost".to_owned(), self.cost - before.cost),
        ]
    }
}

impl PairJudge for RemoteJudge {
    fn prefers(&self, pairs: &[Pair<'_>]) -> Result<Vec<Option<f64>>> {
        let both: Vec<Pair<'_>> = pairs.iter().flat_map(|p| [*p, p.swapped()]).collect();
        let winners = self.winners(&both)?;
        let mut seen = self.lock();
        let label = |two: &[Option<Winner>]| {
            let first = two[0].map(Winner::of_a);
            let second = two[1].map(|w| 1.0 - w.of_a());
            match (first, second) {
                (Some(a), Some(b)) => {
                    seen.pairs += 1;
                    seen.turned += u64::from(a != b);
                    Some(0.5 * (a + b))
                }
                (a, b) => a.or(b),
            }
        };
        Ok(winners.chunks_exact(2).map(label).collect())
    }

    fn name(&self) -> &str {
        "judge"
    }

    fn counted(&self) -> Vec<(String, f64)> {
        Self::counted(self)
    }
}
