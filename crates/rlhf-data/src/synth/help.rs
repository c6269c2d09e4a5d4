//! The customer-help task: one message that states facts and asks one thing, one reply.
//!
//! Demonstrations are of mixed quality on purpose: a model that imitates them writes fluent replies
//! of middling worth, and what preferences and rewards add can be measured with [`crate::rubric`].
//!
//! Invariant: a combination of intent and facts belongs to the train or to the test side by its
//! hash, and is used in one row of one file only.

use super::DataFile;
use super::columns::{Column, Messages, parquet_bytes};
use super::grammar::{
    ASIDES, CLOSINGS, COURTESIES, GREETINGS, Goods, INTENTS, Intent, OPENINGS, RAMBLES, RUDE,
    STUBS, Slot, TAILS,
};
use super::lexicon::{CITIES, CLOTHES, DAYS, NAMES, ORDER_DIGITS, ORDER_LETTERS, THINGS};
use crate::error::Result;
use crate::rubric::{Facts, judge_facts};
use crate::seed::{Purpose, Stream};
use crate::text_stats::word_count;
use std::collections::HashSet;

/// Rows of `sft/train`.
pub const SFT_TRAIN: usize = 5000;
/// Rows of `sft/test`.
pub const SFT_TEST: usize = 300;
/// Rows of `preference/train`.
pub const PREFERENCE_TRAIN: usize = 4000;
/// Rows of `preference/test`.
pub const PREFERENCE_TEST: usize = 500;
/// Rows of `prompts/train`.
pub const PROMPTS_TRAIN: usize = 4000;
/// Rows of `prompts/test`.
pub const PROMPTS_TEST: usize = 400;

/// Share of `preference/train` whose label is turned around; the test labels are clean.
pub const LABEL_NOISE: f64 = 0.15;
/// Two replies make a pair only if their rubric scores differ by this much.
pub const MIN_MARGIN: f64 = 0.1;

/// Share of fact combinations on the test side.
const TEST_SHARE: f64 = 0.1;
/// Chance of a reply without fault.
const GOOD: f64 = 0.30;
/// Chances of one and of two faults in a reply that has any; else it has three.
const ONE_FAULT: f64 = 0.30;
const TWO_FAULTS: f64 = 0.40;

/// A longer body is not said twice and gets one rambling sentence instead of two.
const REPEATABLE_WORDS: usize = 20;

/// A prompt: the facts and the customer's words.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// What is stated and asked.
    pub facts: Facts,
    /// The customer's message.
    pub text: String,
}

/// A prompt with a reply of mixed quality.
#[derive(Clone, Debug)]
pub struct Demonstration {
    /// The prompt.
    pub prompt: Prompt,
    /// The reply.
    pub reply: String,
}

/// A prompt with two replies.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The prompt.
    pub prompt: Prompt,
    /// The reply labelled better.
    pub chosen: String,
    /// The reply labelled worse.
    pub rejected: String,
}

/// The two sides of a split.
#[derive(Clone, Debug)]
pub struct Split<T> {
    /// Rows to train on.
    pub train: Vec<T>,
    /// Rows to evaluate on.
    pub test: Vec<T>,
}

/// All rows of the task.
#[derive(Clone, Debug)]
pub struct Task {
    /// Demonstrations.
    pub sft: Split<Demonstration>,
    /// Labelled pairs.
    pub preference: Split<Pair>,
    /// Prompts alone.
    pub prompts: Split<Prompt>,
}

/// What can be wrong with a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// A needed fact is missing or another one stands in its place.
    Facts,
    /// Another question is answered, or another one as well.
    Question,
    /// No greeting, no courtesy, or rude.
    Manners,
    /// Rambling, repeating itself, or saying next to nothing.
    Length,
}

/// Numbers drawn one after the other for one purpose of one row.
pub(super) struct Draw {
    stream: Stream,
    row: u64,
    part: u32,
    next: u32,
}

impl Draw {
    pub(super) fn new(seed: u64, row: u64, part: u32) -> Self {
        Self {
            stream: Stream::new(seed, Purpose::Synth),
            row,
            part,
            next: 0,
        }
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        let drawn = self.stream.below(n as u64, self.row, self.part, self.next);
        self.next += 1;
        drawn as usize
    }

    pub(super) fn chance(&mut self, probability: f64) -> bool {
        let drawn = self.stream.uniform(self.row, self.part, self.next);
        self.next += 1;
        drawn < probability
    }

    pub(super) fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len())]
    }

    fn order_number(&mut self) -> String {
        let mut number = String::new();
        number.push(char::from(ORDER_LETTERS[self.below(ORDER_LETTERS.len())]));
        let mut digits: Vec<char> = ('0'..='9').collect();
        for _ in 0..ORDER_DIGITS {
            number.push(digits.remove(self.below(digits.len())));
        }
        number
    }

    fn slot(&mut self, slot: Slot, goods: Goods) -> String {
        match slot {
            Slot::Name => self.pick(NAMES).to_owned(),
            Slot::Order => self.order_number(),
            Slot::Product => match goods {
                Goods::Things => self.pick(THINGS),
                Goods::Clothes => self.pick(CLOTHES),
                Goods::Any => self.pick(&[THINGS, CLOTHES].concat()),
            }
            .to_owned(),
            Slot::City => self.pick(CITIES).to_owned(),
            Slot::Day => self.pick(DAYS).to_owned(),
        }
    }
}

fn fill(template: &str, value: impl Fn(Slot) -> Option<String>) -> String {
    let mut text = template.to_owned();
    for slot in Slot::ALL {
        if let Some(value) = value(slot) {
            text = text.replace(slot.placeholder(), &value);
        }
    }
    text
}

/// Removes the placeholders of facts that a reply leaves out.
fn leave_out(text: &str) -> String {
    text.replace("order number {order}", "your order number")
        .replace("order {order}", "your order")
        .replace("Order {order}", "Your order")
        .replace("{product}", "item")
        .replace("{city}", "your town")
        .replace("{day}", "another day")
}

fn draw_prompt(seed: u64, row: u64) -> Result<Prompt> {
    let mut draw = Draw::new(seed, row, 0);
    let intent = &INTENTS[draw.below(INTENTS.len())];
    let aside = draw.chance(0.4).then(|| ASIDES[draw.below(ASIDES.len())]);
    let aside = aside.filter(|(slot, _)| !intent.needs.contains(slot));
    let slots = Slot::ALL.map(|slot| {
        let stated = slot == Slot::Name
            || intent.needs.contains(&slot)
            || aside.is_some_and(|a| a.0 == slot);
        stated.then(|| draw.slot(slot, intent.goods))
    });
    let facts = Facts::new(intent, slots)?;
    let mut parts = vec![draw.pick(OPENINGS)];
    let question = draw.pick(intent.questions);
    match aside {
        Some((_, aside)) if draw.chance(0.5) => parts.extend([aside, question]),
        Some((_, aside)) => parts.extend([question, aside]),
        None => parts.push(question),
    }
    if draw.chance(0.6) {
        parts.push(draw.pick(TAILS));
    }
    let text = fill(&parts.join(" "), |slot| facts.get(slot).map(str::to_owned));
    Ok(Prompt { facts, text })
}

fn draw_faults(draw: &mut Draw) -> Vec<Fault> {
    if draw.chance(GOOD) {
        return Vec::new();
    }
    let count = if draw.chance(ONE_FAULT) {
        1
    } else if draw.chance(TWO_FAULTS / (1.0 - ONE_FAULT)) {
        2
    } else {
        3
    };
    let mut all = vec![Fault::Facts, Fault::Question, Fault::Manners, Fault::Length];
    (0..count)
        .map(|_| all.remove(draw.below(all.len())))
        .collect()
}

/// One or two answer sentences with placeholders.
fn draw_body(draw: &mut Draw, intent: &'static Intent, faults: &[Fault]) -> String {
    let own = draw.pick(intent.answers);
    if !faults.contains(&Fault::Question) {
        return own.to_owned();
    }
    let others: Vec<&Intent> = INTENTS.iter().filter(|i| i.id != intent.id).collect();
    let other = others[draw.below(others.len())];
    let other = draw.pick(other.answers);
    if draw.chance(0.3) {
        format!("{own} {other}")
    } else {
        other.to_owned()
    }
}

/// Puts the facts into a reply's body; a fact the customer did not state is left out.
fn fill_body(draw: &mut Draw, body: &str, facts: &Facts, faults: &[Fault]) -> String {
    let held: Vec<Slot> = Slot::ALL
        .into_iter()
        .filter(|slot| body.contains(slot.placeholder()))
        .collect();
    let stated: Vec<Slot> = held
        .into_iter()
        .filter(|&slot| facts.get(slot).is_some())
        .collect();
    // Which of the stated facts go wrong: one of them, or all.
    let mut wrong: Vec<Slot> = Vec::new();
    let mut invent = false;
    if faults.contains(&Fault::Facts) && !stated.is_empty() {
        wrong = if draw.chance(0.5) {
            stated
        } else {
            vec![stated[draw.below(stated.len())]]
        };
        invent = draw.chance(0.6);
    }
    let invented = Slot::ALL.map(|slot| draw.slot(slot, facts.intent().goods));
    let text = fill(body, |slot| match (wrong.contains(&slot), invent) {
        (true, true) => Some(invented[slot as usize].clone()),
        (true, false) => None,
        (false, _) => facts.get(slot).map(str::to_owned),
    });
    leave_out(&text)
}

/// How many ways [`frame`] knows; the last two are alike, so that short replies are more frequent.
const FRAMES: usize = 4;

/// What a good reply says before and after its answer: courteous before, after or both.
fn frame(way: usize, greeting: &str, courtesy: &str, closing: &str) -> (String, String) {
    match way {
        0 => (format!("{greeting}! "), format!(" {closing}")),
        1 => (format!("{greeting}, {courtesy} "), format!(" {closing}")),
        _ => (format!("{greeting}, {courtesy} "), String::new()),
    }
}

/// A reply of mixed quality to `prompt`; `part` tells several replies to one prompt apart.
fn draw_reply(seed: u64, row: u64, part: u32, prompt: &Prompt) -> String {
    let mut draw = Draw::new(seed, row, part);
    let facts = &prompt.facts;
    let faults = draw_faults(&mut draw);
    let body = draw_body(&mut draw, facts.intent(), &faults);
    let body = fill_body(&mut draw, &body, facts, &faults);
    let greeting = fill(draw.pick(GREETINGS), |slot| {
        facts.get(slot).map(str::to_owned)
    });
    let courtesy = draw.pick(COURTESIES);
    let closing = draw.pick(CLOSINGS);
    let (mut before, mut after) = frame(draw.below(FRAMES), &greeting, courtesy, closing);
    if faults.contains(&Fault::Manners) {
        let rude = draw.pick(RUDE);
        (before, after) = match draw.below(6) {
            0 | 1 => (String::new(), String::new()),
            2 => (format!("{greeting}! "), String::new()),
            3 => (String::new(), format!(" {rude}")),
            4 => (format!("{rude} "), String::new()),
            _ => (format!("{greeting}! "), format!(" {rude}")),
        };
    }
    let mut body = body;
    if faults.contains(&Fault::Length) {
        let short = word_count(&body) < REPEATABLE_WORDS;
        match draw.below(10) {
            0 | 1 => return format!("{greeting}, {}", draw.pick(STUBS)),
            2 | 3 if short => body = format!("{body} {body}"),
            _ => {
                let mut rambles = RAMBLES.to_vec();
                for _ in 0..if short { 2 } else { 1 } {
                    let ramble = rambles.remove(draw.below(rambles.len()));
                    body = format!("{body} {ramble}");
                }
            }
        }
    }
    format!("{before}{body}{after}")
}

/// FNV-1a over the intent and the facts: decides the side of the split.
fn combination(facts: &Facts) -> (String, u64) {
    let mut key = facts.intent().id.to_owned();
    for slot in Slot::ALL {
        key.push('|');
        key.push_str(facts.get(slot).unwrap_or(""));
    }
    let hash = key.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    (key, hash)
}

/// A prompt with the row number under which its replies are drawn.
type Row = (u64, Prompt);

/// Prompts of both sides, no combination of facts and no text twice.
fn draw_prompts(seed: u64, train: usize, test: usize) -> Result<Split<Row>> {
    let side = Stream::new(seed, Purpose::Split);
    let mut split = Split {
        train: Vec::with_capacity(train),
        test: Vec::with_capacity(test),
    };
    let mut seen = HashSet::new();
    let mut row = 0;
    while split.train.len() < train || split.test.len() < test {
        let prompt = draw_prompt(seed, row)?;
        let (key, hash) = combination(&prompt.facts);
        if seen.insert(key) {
            let is_test = side.uniform(hash, 0, 0) < TEST_SHARE;
            let (rows, wanted) = if is_test {
                (&mut split.test, test)
            } else {
                (&mut split.train, train)
            };
            if rows.len() < wanted {
                rows.push((row, prompt));
            }
        }
        row += 1;
    }
    Ok(split)
}

fn draw_pair(seed: u64, row: u64, prompt: Prompt) -> Pair {
    let score = |reply: &str| judge_facts(&prompt.text, reply, &prompt.facts).score;
    let first = draw_reply(seed, row, 1, &prompt);
    let first_score = score(&first);
    let mut part = 2;
    loop {
        let second = draw_reply(seed, row, part, &prompt);
        let margin = first_score - score(&second);
        if margin.abs() >= MIN_MARGIN {
            let (chosen, rejected) = if margin > 0.0 {
                (first, second)
            } else {
                (second, first)
            };
            return Pair {
                prompt,
                chosen,
                rejected,
            };
        }
        part += 1;
    }
}

/// Turns around the labels of exactly [`LABEL_NOISE`] of the pairs.
fn add_label_noise(seed: u64, pairs: &mut [Pair]) {
    let noise = Stream::new(seed, Purpose::Noise);
    let mut rows: Vec<(u64, usize)> = (0..pairs.len())
        .map(|i| (noise.below(u64::MAX, i as u64, 0, 0), i))
        .collect();
    rows.sort_unstable();
    let turned = (LABEL_NOISE * pairs.len() as f64).round() as usize;
    for &(_, i) in rows.iter().take(turned) {
        let pair = &mut pairs[i];
        std::mem::swap(&mut pair.chosen, &mut pair.rejected);
    }
}

impl Task {
    /// Draws every row.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] if the grammar contradicts itself; the shipped one does not.
    pub fn generate(seed: u64) -> Result<Self> {
        let drawn = draw_prompts(
            seed,
            SFT_TRAIN + PREFERENCE_TRAIN + PROMPTS_TRAIN,
            SFT_TEST + PREFERENCE_TEST + PROMPTS_TEST,
        )?;
        let demonstrate = |rows: Vec<Row>| -> Vec<Demonstration> {
            rows.into_iter()
                .map(|(row, prompt)| {
                    let reply = draw_reply(seed, row, 1, &prompt);
                    Demonstration { prompt, reply }
                })
                .collect()
        };
        let compare = |rows: Vec<Row>| -> Vec<Pair> {
            rows.into_iter()
                .map(|(row, prompt)| draw_pair(seed, row, prompt))
                .collect()
        };
        let alone = |rows: Vec<Row>| -> Vec<Prompt> { rows.into_iter().map(|r| r.1).collect() };
        let Split {
            train: mut sft_train,
            test: mut sft_test,
        } = drawn;
        let mut pair_train = sft_train.split_off(SFT_TRAIN);
        let prompts_train = pair_train.split_off(PREFERENCE_TRAIN);
        let mut pair_test = sft_test.split_off(SFT_TEST);
        let prompts_test = pair_test.split_off(PREFERENCE_TEST);
        let mut task = Self {
            sft: Split {
                train: demonstrate(sft_train),
                test: demonstrate(sft_test),
            },
            preference: Split {
                train: compare(pair_train),
                test: compare(pair_test),
            },
            prompts: Split {
                train: alone(prompts_train),
                test: alone(prompts_test),
            },
        };
        add_label_noise(seed, &mut task.preference.train);
        Ok(task)
    }

    /// What the tokenizer is trained on: both sides of every training demonstration.
    #[must_use]
    pub fn sft_texts(&self) -> Vec<&str> {
        self.sft
            .train
            .iter()
            .flat_map(|d| [d.prompt.text.as_str(), d.reply.as_str()])
            .collect()
    }

    /// The Parquet files.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] where the encoder fails.
    pub fn files(&self) -> Result<Vec<DataFile>> {
        let file = |path: &str, columns| -> Result<DataFile> {
            Ok(DataFile {
                path: format!("help/{path}.parquet"),
                bytes: parquet_bytes(columns)?,
            })
        };
        Ok(vec![
            file("sft/train", sft_columns(&self.sft.train))?,
            file("sft/test", sft_columns(&self.sft.test))?,
            file("preference/train", pair_columns(&self.preference.train))?,
            file("preference/test", pair_columns(&self.preference.test))?,
            file("prompts/train", prompt_columns(&self.prompts.train))?,
            file("prompts/test", prompt_columns(&self.prompts.test))?,
        ])
    }
}

fn user(prompt: &Prompt) -> Messages<'_> {
    vec![("user", &prompt.text)]
}

fn fact_columns<'a>(prompts: impl Iterator<Item = &'a Prompt> + Clone) -> Vec<Column<'a>> {
    let intent = prompts.clone().map(|p| Some(p.facts.intent().id)).collect();
    let mut columns = vec![Column::Text("intent", intent)];
    for slot in Slot::ALL {
        let facts = prompts.clone().map(|p| p.facts.get(slot)).collect();
        columns.push(Column::Text(slot.name(), facts));
    }
    columns
}

fn sft_columns(rows: &[Demonstration]) -> Vec<Column<'_>> {
    let messages = rows
        .iter()
        .map(|d| {
            vec![
                ("user", d.prompt.text.as_str()),
                ("assistant", d.reply.as_str()),
            ]
        })
        .collect();
    let mut columns = vec![Column::Messages("messages", messages)];
    columns.extend(fact_columns(rows.iter().map(|d| &d.prompt)));
    columns
}

fn pair_columns(rows: &[Pair]) -> Vec<Column<'_>> {
    let chosen = rows
        .iter()
        .map(|p| vec![("assistant", p.chosen.as_str())])
        .collect();
    let rejected = rows
        .iter()
        .map(|p| vec![("assistant", p.rejected.as_str())])
        .collect();
    let mut columns = vec![
        Column::Messages("prompt", rows.iter().map(|p| user(&p.prompt)).collect()),
        Column::Messages("chosen", chosen),
        Column::Messages("rejected", rejected),
    ];
    columns.extend(fact_columns(rows.iter().map(|p| &p.prompt)));
    columns
}

fn prompt_columns(rows: &[Prompt]) -> Vec<Column<'_>> {
    let mut columns = vec![Column::Messages("prompt", rows.iter().map(user).collect())];
    columns.extend(fact_columns(rows.iter()));
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stated(intent: &'static Intent) -> Facts {
        let slots = ["Anna", "K48", "kettle", "Leeds", "Friday"].map(|s| Some(s.to_owned()));
        Facts::new(intent, slots).unwrap()
    }

    fn filled(text: &str, facts: &Facts) -> String {
        fill(text, |slot| facts.get(slot).map(str::to_owned))
    }

    #[test]
    fn every_faultless_reply_has_full_marks() {
        for intent in INTENTS {
            let facts = stated(intent);
            for (i, answer) in intent.answers.iter().enumerate() {
                let answer = filled(answer, &facts);
                let greeting = filled(GREETINGS[i % GREETINGS.len()], &facts);
                for courtesy in COURTESIES {
                    for closing in CLOSINGS {
                        for way in 0..FRAMES {
                            let (before, after) = frame(way, &greeting, courtesy, closing);
                            let reply = format!("{before}{answer}{after}");
                            let rubric = judge_facts("", &reply, &facts);
                            assert!(rubric.score > 0.999_999, "{reply}: {rubric:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_fault_costs() {
        for intent in INTENTS {
            let facts = stated(intent);
            let body = filled(intent.answers[0], &facts);
            let good = format!("Hello Anna, thank you for your message. {body}");
            let judged = |reply: &str| judge_facts("", reply, &facts);
            assert_eq!(judged(&body).polite, 0.0);
            for rude in RUDE {
                assert_eq!(judged(&format!("{good} {rude}")).polite, 0.0, "{rude}");
                assert_eq!(judged(&format!("{rude} {body}")).polite, 0.0, "{rude}");
            }
            for stub in STUBS {
                assert!(judged(&format!("Hello Anna, {stub}")).score < 0.1, "{stub}");
            }
            for (a, b) in RAMBLES.iter().zip(RAMBLES.iter().skip(1)) {
                let rambling = judged(&format!("{good} {a} {b}"));
                assert!(rambling.concise <= 0.5, "{intent:?}: {rambling:?}");
                assert_eq!(rambling.answers, 1.0);
            }
            assert_eq!(judged(&format!("{good} {body}")).concise, 0.0);
            for other in INTENTS.iter().filter(|other| other.id != intent.id) {
                for answer in other.answers {
                    let answer = filled(answer, &facts);
                    let wrong =
                        judged(&format!("Hello Anna, thank you for your message. {answer}"));
                    assert_eq!(wrong.answers, 0.0, "{answer}");
                    assert_eq!(judged(&format!("{good} {answer}")).answers, 0.0, "{answer}");
                }
            }
            let without = leave_out(intent.answers[0]);
            assert!(!without.contains(['{', '}']), "{without}");
            assert_eq!(
                judged(&format!("Hello Anna, thanks. {without}")).slot,
                0.0,
                "{without}"
            );
        }
    }

    #[test]
    fn draws_are_functions_of_their_counters() {
        let prompt = draw_prompt(3, 17).unwrap();
        assert_eq!(prompt.text, draw_prompt(3, 17).unwrap().text);
        assert_ne!(prompt.text, draw_prompt(4, 17).unwrap().text);
        assert_eq!(draw_reply(3, 17, 1, &prompt), draw_reply(3, 17, 1, &prompt));
        let number = Draw::new(1, 2, 3).order_number();
        assert_eq!(number.len(), 1 + ORDER_DIGITS);
        assert!(number.as_bytes()[1] != number.as_bytes()[2], "{number}");
    }

    #[test]
    fn faults_come_as_often_as_stated() {
        let n = 4000;
        let drawn: Vec<Vec<Fault>> = (0..n)
            .map(|row| draw_faults(&mut Draw::new(5, row, 0)))
            .collect();
        let share =
            |faults: usize| drawn.iter().filter(|d| d.len() == faults).count() as f64 / n as f64;
        // Three standard errors of a share near 0.3 are 0.022.
        assert!((share(0) - 0.30).abs() < 0.022);
        assert!((share(1) - 0.70 * 0.30).abs() < 0.022);
        assert!((share(2) - 0.70 * 0.40).abs() < 0.022);
        assert!((share(3) - 0.70 * 0.30).abs() < 0.022);
    }
}
