//! Critique and revision (Bai et al. 2022, "Constitutional AI", arXiv 2212.08073, section 3.1): a model answers,
//! finds fault with its answer by a principle, and writes it again; principles are drawn anew for each row and
//! round. The last answer becomes a demonstration, and against the first a preference.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::author::{Answer, Ask, Author};
use crate::conversation::{Message, Role, Text};
use crate::error::{Error, Result};
use crate::record::{Annotated, PreferenceRecord, SftRecord, Source};
use crate::seed::{Purpose, Stream};

/// A principle as two requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Principle {
    /// Its name, for provenance.
    pub name: String,
    /// Asks what is wrong with the answer.
    pub critique: String,
    /// Asks for a better one.
    pub revision: String,
}

/// Reads `[[principles]]` with `name`, `critique` and `revision` from a TOML file.
///
/// # Errors
/// When the file cannot be read or holds none.
pub fn read_principles(path: &Path) -> Result<Vec<Principle>> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Constitution {
        principles: Vec<Principle>,
    }
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let mend = "give [[principles]] with name, critique and revision";
    let read: Constitution = toml::from_str(&text)
        .map_err(|e| Error::file(path, e.message().trim().to_owned(), mend))?;
    if read.principles.is_empty() {
        return Err(Error::file(path, "no principles", mend));
    }
    Ok(read.principles)
}

/// Settings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Critique {
    /// Critiques and revisions of each answer.
    pub rounds: u32,
    /// The longest answer in tokens.
    pub max_tokens: usize,
    /// Of all answers.
    pub temperature: f64,
}

/// An answer with its revisions.
#[derive(Clone, Debug, PartialEq)]
pub struct Chain {
    /// Row of the prompts.
    pub row: usize,
    /// The first answer and each revision.
    pub answers: Vec<String>,
    /// Each revision's principle.
    pub principles: Vec<usize>,
    /// Each revision's critique.
    pub critiques: Vec<String>,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Revised {
    /// Rows with at least a first answer, in order.
    pub chains: Vec<Chain>,
    /// Rows without an answer.
    pub unanswered: usize,
    /// Rows that stopped short of their rounds, for want of an answer.
    pub broken: usize,
}

/// Lets `author` answer `prompts` and revise its answers. `go_on` is asked before each round, with its number.
///
/// # Errors
/// When there are no principles though there are rounds, or `max_tokens` is 0.
pub fn run(
    author: &dyn Author,
    prompts: &[Text],
    principles: &[Principle],
    cfg: &Critique,
    seed: u64,
    go_on: &mut dyn FnMut(u32) -> bool,
) -> Result<Revised> {
    if cfg.max_tokens == 0 || (principles.is_empty() && cfg.rounds > 0) {
        return Err(Error::Invalid {
            what: "max_tokens is 0, or there are no principles".into(),
            mend: "raise max_tokens, or name a file of principles".into(),
        });
    }
    let stream = Stream::new(seed, Purpose::Subset);
    let ask = |messages: Vec<Message>, row: usize, number: u32| Ask {
        messages,
        max_tokens: cfg.max_tokens,
        temperature: cfg.temperature,
        key: (row as u64) << 16 | u64::from(number),
    };
    let mut out = Revised::default();
    let asks: Vec<Ask> = (0..prompts.len())
        .map(|row| ask(talk(&prompts[row]), row, 0))
        .collect();
    for (row, answer) in author.write(&asks).into_iter().enumerate() {
        match said(answer) {
            Some(text) => out.chains.push(Chain {
                row,
                answers: vec![text],
                principles: Vec::new(),
                critiques: Vec::new(),
            }),
            None => out.unanswered += 1,
        }
    }
    for round in 0..cfg.rounds {
        if !go_on(round) {
            break;
        }
        // A chain that broke does not go on.
        let live: Vec<usize> = (0..out.chains.len())
            .filter(|&i| out.chains[i].answers.len() == round as usize + 1)
            .collect();
        let drawn: Vec<usize> = live
            .iter()
            .map(|&i| {
                let n = principles.len() as u64;
                stream.below(n, out.chains[i].row as u64, round, 0) as usize
            })
            .collect();
        let before = |i: usize, p: usize| {
            let c = &out.chains[i];
            let last = c.answers.last().cloned().unwrap_or_default();
            let mut m = talk(&prompts[c.row]);
            m.push(Message::new(Role::Assistant, last));
            m.push(Message::new(Role::User, principles[p].critique.clone()));
            m
        };
        let asks: Vec<Ask> = live
            .iter()
            .zip(&drawn)
            .map(|(&i, &p)| ask(before(i, p), out.chains[i].row, 2 * round + 1))
            .collect();
        let critiques: Vec<Option<String>> = author.write(&asks).into_iter().map(said).collect();
        let found: Vec<usize> = (0..live.len())
            .filter(|&k| critiques[k].is_some())
            .collect();
        let asks: Vec<Ask> = found
            .iter()
            .map(|&k| {
                let (i, p) = (live[k], drawn[k]);
                let mut m = before(i, p);
                m.push(Message::new(
                    Role::Assistant,
                    critiques[k].clone().unwrap_or_default(),
                ));
                m.push(Message::new(Role::User, principles[p].revision.clone()));
                ask(m, out.chains[i].row, 2 * round + 2)
            })
            .collect();
        let revisions = author.write(&asks);
        for (&k, revision) in found.iter().zip(revisions) {
            if let (Some(text), Some(critique)) = (said(revision), &critiques[k]) {
                let chain = &mut out.chains[live[k]];
                chain.answers.push(text);
                chain.principles.push(drawn[k]);
                chain.critiques.push(critique.clone());
            }
        }
    }
    let whole = cfg.rounds as usize + 1;
    out.broken = out
        .chains
        .iter()
        .filter(|c| c.answers.len() < whole)
        .count();
    Ok(out)
}

fn talk(prompt: &Text) -> Vec<Message> {
    match prompt {
        Text::Messages(m) => m.clone(),
        Text::Plain(text) => vec![Message::new(Role::User, text.clone())],
    }
}

fn said(answer: Answer) -> Option<String> {
    let text = answer.ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

impl Revised {
    /// The last answer of each row as a demonstration; rows that were never revised are left out.
    #[must_use]
    pub fn demonstrations(
        &self,
        prompts: &[Text],
        principles: &[Principle],
        model: &str,
    ) -> Vec<Annotated<SftRecord>> {
        let revised = self.chains.iter().filter(|c| c.answers.len() > 1);
        revised
            .map(|c| Annotated {
                record: SftRecord {
                    prompt: Some(prompts[c.row].clone()),
                    completion: answer(&prompts[c.row], c.answers.last()),
                },
                weight: None,
                source: Some(c.source(principles, model)),
            })
            .collect()
    }

    /// The last answer of each row preferred to the first, where the two differ.
    #[must_use]
    pub fn preferences(
        &self,
        prompts: &[Text],
        principles: &[Principle],
        model: &str,
    ) -> Vec<Annotated<PreferenceRecord>> {
        let changed = self
            .chains
            .iter()
            .filter(|c| c.answers.first() != c.answers.last());
        changed
            .map(|c| Annotated {
                record: PreferenceRecord {
                    prompt: prompts[c.row].clone(),
                    chosen: answer(&prompts[c.row], c.answers.last()),
                    rejected: answer(&prompts[c.row], c.answers.first()),
                    margin: None,
                },
                weight: None,
                source: Some(c.source(principles, model)),
            })
            .collect()
    }
}

/// An answer in the form of its prompt.
fn answer(prompt: &Text, text: Option<&String>) -> Text {
    let text = text.cloned().unwrap_or_default();
    match prompt {
        Text::Plain(_) => Text::Plain(text),
        Text::Messages(_) => Text::Messages(vec![Message::new(Role::Assistant, text)]),
    }
}

impl Chain {
    fn source(&self, principles: &[Principle], model: &str) -> Source {
        let names: Vec<&str> = self
            .principles
            .iter()
            .map(|&p| principles[p].name.as_str())
            .collect();
        let mut other = serde_json::Map::new();
        other.insert("method".into(), "critique_revision".into());
        other.insert("row".into(), self.row.into());
        other.insert("principles".into(), names.into());
        other.insert("critiques".into(), self.critiques.clone().into());
        Source {
            model: Some(model.to_owned()),
            other: Some(other),
            ..Source::default()
        }
    }
}
