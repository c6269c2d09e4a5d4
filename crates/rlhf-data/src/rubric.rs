//! The gold judge of the shipped customer-help task: is the right fact copied, is the question
//! answered, is the reply polite, is it concise.
//!
//! It is used to label pairs and to evaluate, never to train a policy. It reads the reply's text and
//! the prompt's structured fields (the columns `intent`, `name`, `order`, `product`, `city`, `day` of
//! `datasets/help`), so it judges replies to prompt-only records as well. It knows no tokens, no
//! model and no reference reply.
//!
//! | part | weight | full marks |
//! | --- | --- | --- |
//! | `answers` | 0.35 | a sentence of eight words or more says one key phrase of the asked intent, once, and no sentence says one of another intent |
//! | `slot` | 0.30 | repeats every fact the intent needs (in part: the share of them); 0 if any order number, product, city, weekday or customer name appears that the customer did not state |
//! | `polite` | 0.15 | half for greeting the customer by name at once, half for one to four courteous phrases; 0 with a rude phrase |
//! | `concise` | 0.20 | 14 to 40 words, falling to 0 at 6 and at 50; 0 if a sentence or a run of six words is repeated, if the customer's own sentence is echoed, or if the text does not end in `.`, `!` or `?` |
//!
//! The parts work against each other's shortcuts: listing every answer loses `answers` and
//! `concise`, naming a second order number loses `slot`, stacking thanks loses `polite`.

use crate::error::{Error, Result};
use crate::synth::grammar::{COURTEOUS, GREETING_WORDS, INTENTS, Intent, RUDE, Slot};
use crate::synth::lexicon;
use crate::text_stats::{repeats_run, sentences, words};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::sync::LazyLock;

/// Weight of [`Rubric::answers`] in the score.
pub const WEIGHT_ANSWERS: f64 = 0.35;
/// Weight of [`Rubric::slot`] in the score.
pub const WEIGHT_SLOT: f64 = 0.30;
/// Weight of [`Rubric::polite`] in the score.
pub const WEIGHT_POLITE: f64 = 0.15;
/// Weight of [`Rubric::concise`] in the score.
pub const WEIGHT_CONCISE: f64 = 0.20;

/// A reply of this many words or fewer is not an answer: `concise` is 0.
const WORDS_TOO_FEW: usize = 6;
const WORDS_MIN: usize = 14;
const WORDS_MAX: usize = 40;
/// A reply of this many words or more rambles: `concise` is 0.
const WORDS_TOO_MANY: usize = 50;
/// More courteous phrases than this are flattery.
const COURTESIES_MAX: usize = 4;
/// A key phrase in a shorter sentence is dropped there, not said.
const ANSWER_WORDS: usize = 8;
const REPEATED_RUN: usize = 6;
const ECHO_WORDS: usize = 5;

/// What the customer stated: the structured fields of a prompt.
#[derive(Clone, Debug)]
pub struct Facts {
    intent: &'static Intent,
    slots: [Option<String>; Slot::ALL.len()],
}

/// The judgement of one reply; every number is in `[0, 1]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rubric {
    /// The needed facts are repeated and none is invented.
    pub slot: f64,
    /// The asked question is answered, and only that one.
    pub answers: f64,
    /// Greets by name, is courteous, is not rude.
    pub polite: f64,
    /// Neither too short nor too long, nothing repeated, finished.
    pub concise: f64,
    /// The weighted sum of the four.
    pub score: f64,
}

/// Fields that are not those of this task.
fn not_ours(what: String) -> Error {
    Error::Invalid {
        what,
        mend: "judge only prompts of datasets/help with this rubric".to_owned(),
    }
}

impl Facts {
    /// Facts by hand: `slots` in the order of [`Slot::ALL`].
    ///
    /// # Errors
    /// [`Error::Invalid`] where the intent needs a fact that is absent.
    pub fn new(intent: &'static Intent, slots: [Option<String>; Slot::ALL.len()]) -> Result<Self> {
        let facts = Self { intent, slots };
        for &slot in intent.needs.iter().chain(&[Slot::Name]) {
            if facts.get(slot).is_none() {
                return Err(not_ours(format!(
                    "the intent `{}` needs the field `{}`, which is absent or empty",
                    intent.id,
                    slot.name()
                )));
            }
        }
        Ok(facts)
    }

    /// Reads the facts from a prompt record's fields; an absent, null or empty field is no fact.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the intent is absent or unknown, or a needed fact is absent.
    pub fn from_fields(fields: &Map<String, Value>) -> Result<Self> {
        let id = fields
            .get("intent")
            .and_then(Value::as_str)
            .ok_or_else(|| not_ours("the prompt has no text field `intent`".to_owned()))?;
        let intent = INTENTS.iter().find(|i| i.id == id).ok_or_else(|| {
            let known: Vec<&str> = INTENTS.iter().map(|i| i.id).collect();
            not_ours(format!(
                "unknown intent `{id}`; the rubric knows {}",
                known.join(", ")
            ))
        })?;
        let slots = Slot::ALL.map(|slot| {
            let text = fields.get(slot.name()).and_then(Value::as_str)?.trim();
            (!text.is_empty()).then(|| text.to_owned())
        });
        Self::new(intent, slots)
    }

    /// What the customer asks.
    #[must_use]
    pub fn intent(&self) -> &'static Intent {
        self.intent
    }

    /// The fact in a slot, where the customer stated it.
    #[must_use]
    pub fn get(&self, slot: Slot) -> Option<&str> {
        self.slots[slot as usize].as_deref()
    }
}

/// Judges `completion` as the reply to `prompt` (the customer's text), whose record has `fields`.
///
/// # Errors
/// [`Error::Invalid`] where the fields are not those of the customer-help task.
pub fn judge(prompt: &str, completion: &str, fields: &Map<String, Value>) -> Result<Rubric> {
    Ok(judge_facts(
        prompt,
        completion,
        &Facts::from_fields(fields)?,
    ))
}

/// Judges `completion` as the reply to `prompt` (the customer's text), which states `facts`.
#[must_use]
pub fn judge_facts(prompt: &str, completion: &str, facts: &Facts) -> Rubric {
    let words = words(completion);
    let slot = slot_part(&words, facts);
    let answers = answers_part(completion, facts);
    let polite = polite_part(&words, facts);
    let concise = concise_part(prompt, completion, words.len());
    let score = WEIGHT_SLOT * slot
        + WEIGHT_ANSWERS * answers
        + WEIGHT_POLITE * polite
        + WEIGHT_CONCISE * concise;
    Rubric {
        slot,
        answers,
        polite,
        concise,
        score,
    }
}

/// Every word that can fill a slot, in lower case.
static SLOT_WORDS: LazyLock<BTreeSet<String>> = LazyLock::new(|| {
    [
        lexicon::NAMES,
        lexicon::THINGS,
        lexicon::CLOTHES,
        lexicon::CITIES,
        lexicon::DAYS,
    ]
    .concat()
    .iter()
    .map(|word| word.to_lowercase())
    .collect()
});

/// The key phrases of each intent as words, in the order of [`INTENTS`].
static KEYS: LazyLock<Vec<Vec<Vec<String>>>> = LazyLock::new(|| {
    INTENTS
        .iter()
        .map(|i| i.keys.iter().map(|key| words(key)).collect())
        .collect()
});

static COURTEOUS_WORDS: LazyLock<Vec<Vec<String>>> =
    LazyLock::new(|| COURTEOUS.iter().map(|phrase| words(phrase)).collect());

static RUDE_WORDS: LazyLock<Vec<Vec<String>>> =
    LazyLock::new(|| RUDE.iter().map(|phrase| words(phrase)).collect());

static GREETINGS: LazyLock<Vec<Vec<String>>> =
    LazyLock::new(|| GREETING_WORDS.iter().map(|phrase| words(phrase)).collect());

fn count(words: &[String], phrase: &[String]) -> usize {
    words
        .windows(phrase.len())
        .filter(|window| *window == phrase)
        .count()
}

fn slot_part(words: &[String], facts: &Facts) -> f64 {
    let stated: BTreeSet<String> = facts
        .slots
        .iter()
        .flatten()
        .map(|text| text.to_lowercase())
        .collect();
    let invented = words.iter().any(|word| {
        let fills = SLOT_WORDS.contains(word) || word.bytes().any(|b| b.is_ascii_digit());
        fills && !stated.contains(word)
    });
    if invented {
        return 0.0;
    }
    let needs = facts.intent.needs;
    let copied = needs
        .iter()
        .filter_map(|&slot| facts.get(slot))
        .filter(|text| words.contains(&text.to_lowercase()))
        .count();
    copied as f64 / needs.len() as f64
}

fn answers_part(completion: &str, facts: &Facts) -> f64 {
    let (mut own, mut other) = (false, false);
    for sentence in sentences(completion) {
        for (intent, keys) in INTENTS.iter().zip(KEYS.iter()) {
            let said: usize = keys.iter().map(|key| count(&sentence, key)).sum();
            if intent.id == facts.intent.id {
                own |= said == 1 && sentence.len() >= ANSWER_WORDS;
            } else {
                other |= said > 0;
            }
        }
    }
    if own && !other { 1.0 } else { 0.0 }
}

fn polite_part(words: &[String], facts: &Facts) -> f64 {
    if RUDE_WORDS.iter().any(|phrase| count(words, phrase) > 0) {
        return 0.0;
    }
    let name = facts
        .get(Slot::Name)
        .map(str::to_lowercase)
        .unwrap_or_default();
    let greets = GREETINGS
        .iter()
        .any(|greeting| words.starts_with(greeting) && words.get(greeting.len()) == Some(&name));
    let courtesies: usize = COURTEOUS_WORDS
        .iter()
        .map(|phrase| count(words, phrase))
        .sum();
    let courteous = (1..=COURTESIES_MAX).contains(&courtesies);
    0.5 * f64::from(u8::from(greets)) + 0.5 * f64::from(u8::from(courteous))
}

fn concise_part(prompt: &str, completion: &str, words: usize) -> f64 {
    let reply = sentences(completion);
    let mut seen = BTreeSet::new();
    let repeated = reply.iter().any(|sentence| !seen.insert(sentence))
        || repeats_run(completion, REPEATED_RUN);
    let asked = sentences(prompt);
    let echoed = reply
        .iter()
        .any(|s| s.len() >= ECHO_WORDS && asked.contains(s));
    let finished = completion.trim_end().ends_with(['.', '!', '?']);
    if repeated || echoed || !finished {
        return 0.0;
    }
    let fall = |from: usize, to: usize| (words.abs_diff(to) as f64) / (from.abs_diff(to) as f64);
    match words {
        n if n <= WORDS_TOO_FEW || n >= WORDS_TOO_MANY => 0.0,
        n if n < WORDS_MIN => fall(WORDS_MIN, WORDS_TOO_FEW),
        n if n > WORDS_MAX => fall(WORDS_MAX, WORDS_TOO_MANY),
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const PROMPT: &str = "Hello, my name is Anna. I live in Leeds. Please cancel order K48. I do not need the kettle any more.";

    fn fields() -> Map<String, Value> {
        json!({"intent": "cancel_order", "name": "Anna", "order": "K48", "product": "kettle",
               "city": "Leeds", "day": null})
        .as_object()
        .cloned()
        .unwrap()
    }

    fn rate(reply: &str) -> Rubric {
        judge(PROMPT, reply, &fields()).unwrap()
    }

    #[test]
    fn a_good_reply_has_full_marks() {
        let r = rate(
            "Hello Anna, thank you for your message. Order K48 is now cancelled and you will not be charged for the kettle.",
        );
        assert_eq!(
            (r.slot, r.answers, r.polite, r.concise),
            (1.0, 1.0, 1.0, 1.0)
        );
        assert!((r.score - 1.0).abs() < 1e-12);
        // A fact the customer stated but the question does not need may be mentioned.
        let r = rate(
            "Hello Anna, thank you for your message from Leeds. Order K48 is now cancelled and the kettle stays here.",
        );
        assert!((r.score - 1.0).abs() < 1e-12);
    }

    #[test]
    fn slots() {
        let tell =
            |body: &str| rate(&format!("Hello Anna, thank you for your message. {body}")).slot;
        assert_eq!(
            tell("Order K48 is now cancelled and you will not be charged for the item."),
            0.5
        );
        assert_eq!(tell("Your order is now cancelled."), 0.0);
        // Another order number, product, city, day or name is invented: all marks lost.
        assert_eq!(
            tell("Order K48 and order R17 are now cancelled with the kettle."),
            0.0
        );
        assert_eq!(
            tell("Order K48 with the kettle and the lamp is now cancelled."),
            0.0
        );
        assert_eq!(
            tell("Order K48 with the kettle is now cancelled on Monday."),
            0.0
        );
        assert_eq!(
            tell("Order K48 with the kettle is now cancelled, Peter."),
            0.0
        );
        assert_eq!(
            tell("Order K48 with the kettle is now cancelled in Leeds."),
            1.0
        );
        assert_eq!(
            tell("Order K48 with the kettle is now cancelled in York."),
            0.0
        );
        // A number that merely contains the right one is another number.
        assert_eq!(tell("Order K481 with the kettle is now cancelled."), 0.0);
    }

    #[test]
    fn another_question_or_every_question() {
        let r = rate(
            "Hello Anna, thank you for your message. Your kettle from order K48 is on its way and should arrive in two days.",
        );
        assert_eq!(
            (r.slot, r.answers, r.polite, r.concise),
            (1.0, 0.0, 1.0, 1.0)
        );
        assert!((r.score - 0.65).abs() < 1e-12);
        let both = rate(
            "Hello Anna, thank you for your message. Your kettle is on its way. Order K48 is now cancelled.",
        );
        assert_eq!(both.answers, 0.0);
        // The key phrase thrown in, or said over and over, is no answer.
        let tell = |body: &str| rate(&format!("Hello Anna, thanks. {body}")).answers;
        assert_eq!(tell("Kettle K48 is now cancelled."), 0.0);
        assert_eq!(
            tell("Kettle K48 is now cancelled, is now cancelled, is now cancelled."),
            0.0
        );
        assert_eq!(
            tell("The kettle of order K48 is now cancelled for you."),
            1.0
        );
        let every: String = INTENTS
            .iter()
            .map(|i| format!("It is so: {}. ", i.keys[0]))
            .collect();
        let r = rate(&format!("Hello Anna, thanks. Order K48, kettle. {every}"));
        assert!(r.score <= 0.45 + 1e-12, "{r:?}");
    }

    #[test]
    fn manners() {
        let body = "Order K48 is now cancelled and you will not be charged for the kettle.";
        let polite = |reply: String| rate(&reply).polite;
        assert_eq!(polite(format!("Hi Anna, I am happy to help. {body}")), 1.0);
        assert_eq!(
            polite(format!("Good day Anna! {body} Have a lovely day!")),
            1.0
        );
        assert_eq!(polite(format!("Hi Anna! {body}")), 0.5);
        assert_eq!(polite(format!("Hi Peter, thanks. {body}")), 0.5);
        assert_eq!(polite(body.to_owned()), 0.0);
        assert_eq!(
            polite(format!(
                "Hi Anna, thank you for asking. {body} This is not my problem."
            )),
            0.0
        );
        // Courtesy is not to be had by the pound.
        assert_eq!(
            polite(format!(
                "Hi Anna, thanks thanks thanks thanks thanks. {body}"
            )),
            0.5
        );
    }

    #[test]
    fn length_and_repetition() {
        let concise = |reply: &str| rate(reply).concise;
        let long = |n: usize| {
            let words: Vec<String> = (0..n)
                .map(|i| {
                    format!(
                        "{}{}",
                        char::from(b'a' + (i / 26) as u8),
                        char::from(b'a' + (i % 26) as u8)
                    )
                })
                .collect();
            format!("{}.", words.join(" "))
        };
        assert_eq!(concise(&long(6)), 0.0);
        assert_eq!(concise(&long(10)), 0.5); // half way from 6 to 14
        assert_eq!(concise(&long(14)), 1.0);
        assert_eq!(concise(&long(40)), 1.0);
        assert_eq!(concise(&long(45)), 0.5); // half way from 40 to 50
        assert_eq!(concise(&long(50)), 0.0);
        assert_eq!(concise(long(20).trim_end_matches('.')), 0.0);
        assert_eq!(
            concise("We will see. We know all of it very well here in our shop. We will see."),
            0.0
        );
        assert_eq!(concise(&format!("{} {}", long(12), long(12))), 0.0);
        // The customer's own sentence said back.
        assert_eq!(
            concise(
                "Hello Anna, thank you. I do not need the kettle any more. Order K48 is now cancelled."
            ),
            0.0
        );
        assert_eq!(concise(""), 0.0);
    }

    #[test]
    fn an_empty_reply_is_worth_nothing() {
        assert_eq!(rate("").score, 0.0);
    }

    #[test]
    fn fields_must_be_those_of_the_task() {
        let said = |fields: &Map<String, Value>| judge("", "", fields).unwrap_err().to_string();
        assert!(said(&Map::new()).contains("no text field `intent`"));
        let mut wrong = fields();
        wrong.insert("intent".into(), json!("poem"));
        assert!(said(&wrong).contains("unknown intent `poem`; the rubric knows order_status, "));
        let mut absent = fields();
        absent.insert("order".into(), json!(""));
        assert!(said(&absent).contains("`cancel_order` needs the field `order`"));
    }
}
