//! Three tasks with one right answer each: `reverse words`, `spell backward` and small arithmetic.
//!
//! Demonstrations are right in a share of all rows ([`Kind::right`]) and slip in the others, so that a model which
//! imitates them knows the task and is right about as often: what a reward adds can then be counted, by equality with
//! `answer`. There are many, since of few a model learns the wrong answers by heart.
//!
//! Invariant: a question belongs to the train or to the test side by its hash. Knows nothing of models.

use std::collections::HashSet;

use sha2::{Digest, Sha256};

use super::DataFile;
use super::columns::{Column, parquet_bytes};
use super::help::Draw;
use crate::error::Result;

/// Rows of `sft/train` of each task.
pub const SFT_TRAIN: usize = 16_000;
/// Rows of `prompts/train` of each task.
pub const PROMPTS_TRAIN: usize = 1500;
/// Rows of `prompts/TASK`, the test side; of sums there are fewer.
pub const TEST: usize = 300;

/// Share of questions on the test side, in 256ths.
const TEST_SHARE: u8 = 40;

/// Words to be turned around.
const WORDS: &[&str] = &[
    "ant", "arm", "bag", "bed", "bee", "box", "bus", "cat", "cow", "cup", "day", "dog", "ear",
    "egg", "fan", "fig", "fox", "gap", "gum", "hat", "hen", "hut", "ice", "ink", "jam", "jug",
    "key", "kit", "leg", "lid", "log", "map", "mud", "net", "nut", "oak", "oil", "owl", "pan",
    "pie", "pot", "rug", "sea", "sky", "sun", "tea", "toy", "van", "web", "yak", "zoo",
];

/// Letters of made-up words, consonant after consonant and vowel after vowel.
const CONSONANTS: &[u8] = b"bdfgklmnprstvz";
const VOWELS: &[u8] = b"aeiou";

/// One of the tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Two to four words in opposite order.
    ReverseWords,
    /// A made-up word of four to six letters, last letter first.
    SpellBackward,
    /// A number of two digits plus or minus one of one.
    Arithmetic,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::ReverseWords, Self::SpellBackward, Self::Arithmetic];

    /// The share of right demonstrations. A small model is right about as often as it was shown, with sums less often.
    #[must_use]
    pub fn right(self) -> f64 {
        match self {
            Self::ReverseWords | Self::SpellBackward => 0.3,
            Self::Arithmetic => 0.45,
        }
    }

    /// The name in the column `task` and in file names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ReverseWords => "reverse_words",
            Self::SpellBackward => "spell_backward",
            Self::Arithmetic => "arithmetic",
        }
    }
}

/// A question with its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Which task.
    pub kind: Kind,
    /// What the user writes.
    pub text: String,
    /// The only right reply.
    pub answer: String,
}

/// A question with a reply that is right or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Demonstration {
    /// The question.
    pub question: Question,
    /// The reply.
    pub reply: String,
}

/// All rows of the three tasks.
#[derive(Clone, Debug)]
pub struct Tasks {
    /// Demonstrations, the tasks in turn.
    pub sft: Vec<Demonstration>,
    /// Questions to train on, the tasks in turn.
    pub train: Vec<Question>,
    /// Questions to test on, a list for each of [`Kind::ALL`].
    pub test: [Vec<Question>; 3],
}

fn on_test_side(text: &str) -> bool {
    Sha256::digest(text.as_bytes())[0] < TEST_SHARE
}

fn question(draw: &mut Draw, kind: Kind) -> Question {
    let (text, answer) = match kind {
        Kind::ReverseWords => {
            let words: Vec<&str> = (0..2 + draw.below(3)).map(|_| draw.pick(WORDS)).collect();
            let turned: Vec<&str> = words.iter().rev().copied().collect();
            (format!("reverse {}", words.join(" ")), turned.join(" "))
        }
        Kind::SpellBackward => {
            let first = draw.below(2);
            let word: String = (0..4 + draw.below(3))
                .map(|i| {
                    let letters = if i % 2 == first { CONSONANTS } else { VOWELS };
                    char::from(letters[draw.below(letters.len())])
                })
                .collect();
            (format!("spell {word}"), word.chars().rev().collect())
        }
        Kind::Arithmetic => {
            let (a, b) = (10 + draw.below(90), 1 + draw.below(9));
            if draw.chance(0.5) {
                (format!("{a}+{b}"), (a + b).to_string())
            } else {
                (format!("{a}-{b}"), (a - b).to_string())
            }
        }
    };
    Question { kind, text, answer }
}

/// A reply that is wrong in one of the ways in which people are.
fn slip(draw: &mut Draw, q: &Question) -> String {
    let wrong = match q.kind {
        Kind::ReverseWords => {
            let mut words: Vec<&str> = q.answer.split(' ').collect();
            match draw.below(3) {
                0 => words.reverse(),
                1 => {
                    words.pop();
                }
                _ => words.swap(0, 1),
            }
            words.join(" ")
        }
        Kind::SpellBackward => {
            let mut letters: Vec<char> = q.answer.chars().collect();
            match draw.below(3) {
                0 => letters.reverse(),
                1 => {
                    letters.pop();
                }
                _ => letters.swap(0, 1),
            }
            letters.into_iter().collect()
        }
        Kind::Arithmetic => {
            let digits = |text: &str| text.parse::<usize>().unwrap_or_default();
            let a = q.text.split(['+', '-']).next().unwrap_or_default();
            let (a, right) = (digits(a), digits(&q.answer));
            match draw.below(3) {
                // The carry, or what was borrowed, is forgotten; where there is none the sign is taken wrong.
                0 if right / 10 != a / 10 => a / 10 * 10 + right % 10,
                0 | 1 => (2 * a).saturating_sub(right),
                _ => a,
            }
            .to_string()
        }
    };
    // Of equal words, or letters, the slip may be none.
    if wrong == q.answer {
        wrong[1..].to_owned()
    } else {
        wrong
    }
}

/// `n` questions of each task from one side, the tasks in turn; `part` keeps the parts of the data apart.
fn questions(seed: u64, part: u32, n: usize, test: bool, kinds: &[Kind]) -> Vec<(Draw, Question)> {
    let mut row = 0u64;
    let mut all = Vec::with_capacity(n * kinds.len());
    for _ in 0..n {
        for &kind in kinds {
            loop {
                let mut draw = Draw::new(seed, row, part);
                row += 1;
                let q = question(&mut draw, kind);
                if on_test_side(&q.text) == test {
                    all.push((draw, q));
                    break;
                }
            }
        }
    }
    all
}

impl Tasks {
    /// All rows: a function of the seed.
    #[must_use]
    pub fn generate(seed: u64) -> Self {
        let sft = questions(seed, 100, SFT_TRAIN, false, &Kind::ALL)
            .into_iter()
            .map(|(mut draw, question)| {
                let reply = if draw.chance(question.kind.right()) {
                    question.answer.clone()
                } else {
                    slip(&mut draw, &question)
                };
                Demonstration { question, reply }
            })
            .collect();
        let train = questions(seed, 101, PROMPTS_TRAIN, false, &Kind::ALL)
            .into_iter()
            .map(|(_, q)| q)
            .collect();
        let test = Kind::ALL.map(|kind| {
            // A test question counts once; of sums there are few, so many are drawn, and fewer may be left.
            let mut seen = HashSet::new();
            questions(seed, 102 + kind as u32, TEST * 8, true, &[kind])
                .into_iter()
                .map(|(_, q)| q)
                .filter(|q| seen.insert(q.text.clone()))
                .take(TEST)
                .collect()
        });
        Self { sft, train, test }
    }

    /// The Parquet files, below `tasks/`.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] where the encoder fails.
    pub fn files(&self) -> Result<Vec<DataFile>> {
        let messages = self
            .sft
            .iter()
            .map(|d| {
                vec![
                    ("user", d.question.text.as_str()),
                    ("assistant", d.reply.as_str()),
                ]
            })
            .collect();
        let mut columns = vec![Column::Messages("messages", messages)];
        columns.extend(facts(self.sft.iter().map(|d| &d.question)));
        let mut files = vec![DataFile {
            path: "tasks/sft/train.parquet".to_owned(),
            bytes: parquet_bytes(columns)?,
        }];
        let names = ["train"].into_iter().chain(Kind::ALL.map(Kind::name));
        for (name, rows) in names.zip([&self.train].into_iter().chain(&self.test)) {
            let prompts = rows.iter().map(|q| vec![("user", q.text.as_str())]);
            let mut columns = vec![Column::Messages("prompt", prompts.collect())];
            columns.extend(facts(rows.iter()));
            files.push(DataFile {
                path: format!("tasks/prompts/{name}.parquet"),
                bytes: parquet_bytes(columns)?,
            });
        }
        Ok(files)
    }
}

fn facts<'a>(rows: impl Iterator<Item = &'a Question> + Clone) -> [Column<'a>; 2] {
    [
        Column::Text("task", rows.clone().map(|q| Some(q.kind.name())).collect()),
        Column::Text("answer", rows.map(|q| Some(q.answer.as_str())).collect()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn solve(q: &Question) -> String {
        match q.kind {
            Kind::ReverseWords => {
                let mut words: Vec<&str> = q.text.split(' ').skip(1).collect();
                words.reverse();
                words.join(" ")
            }
            Kind::SpellBackward => q.text["spell ".len()..].chars().rev().collect(),
            Kind::Arithmetic => {
                let number = |s: &str| s.parse::<i64>().unwrap();
                let (a, b) = q.text.split_once(['+', '-']).unwrap();
                if q.text.contains('+') {
                    (number(a) + number(b)).to_string()
                } else {
                    (number(a) - number(b)).to_string()
                }
            }
        }
    }

    #[test]
    fn answers_are_right_and_slips_are_wrong() {
        let tasks = Tasks::generate(3);
        let mut rows = tasks.train.iter().chain(tasks.test.iter().flatten());
        assert!(rows.all(|q| solve(q) == q.answer));
        assert_eq!(tasks.train.len(), 3 * PROMPTS_TRAIN);
        assert!((200..=TEST).contains(&tasks.test[2].len()));
        assert_eq!(
            tasks.test[..2].iter().map(Vec::len).sum::<usize>(),
            2 * TEST
        );
        assert_eq!(tasks.sft.len(), 3 * SFT_TRAIN);
        for kind in Kind::ALL {
            let rows = tasks.sft.iter().filter(|d| d.question.kind == kind);
            let right = rows.filter(|d| d.reply == solve(&d.question)).count() as f64;
            // Three standard errors of a share of 0.45 in 16,000 rows are 0.0118.
            assert!(
                (right / SFT_TRAIN as f64 - kind.right()).abs() < 0.0118,
                "{kind:?} {right}"
            );
        }
    }

    #[test]
    fn no_test_question_is_trained_on_or_asked_twice() {
        let tasks = Tasks::generate(4);
        let trained: HashSet<&str> = tasks
            .train
            .iter()
            .chain(tasks.sft.iter().map(|d| &d.question))
            .map(|q| q.text.as_str())
            .collect();
        let test: HashSet<&str> = tasks
            .test
            .iter()
            .flatten()
            .map(|q| q.text.as_str())
            .collect();
        assert_eq!(test.len(), tasks.test.iter().map(Vec::len).sum::<usize>());
        assert!(trained.is_disjoint(&test));
    }

    #[test]
    fn another_seed_gives_other_rows() {
        let (a, b) = (Tasks::generate(5), Tasks::generate(6));
        assert_ne!(a.sft, b.sft);
        assert_ne!(a.test, b.test);
    }
}
