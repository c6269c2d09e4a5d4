//! Self-Instruct (Wang et al. 2022, arXiv 2212.10560): from a few tasks many, written by the model itself.
//!
//! Each round shows k tasks of the pool, some of them seeds, and lets the author go on with the list; what is new
//! by the filters enters the pool and gets an instance: input first, or for a task of classification the label
//! first (section 2.2). Filters (sections 2.2 and 3): ROUGE-L below 0.7 to all of the pool, no word of what a
//! language model cannot do, a length within bounds, a beginning that is a letter or digit; an instance that is
//! there already, whose output repeats its input, or that is empty is left out.
//!
//! The prompts are this project's own words.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};

use super::author::{Ask, Author};
use super::rouge::rouge_l_words;
use crate::conversation::{Message, Role, Text};
use crate::error::{Error, Result};
use crate::record::{Annotated, SftRecord, Source};
use crate::seed::{Purpose, Stream};
use crate::text_stats::words;

/// Words of tasks that text alone cannot do.
const FORBIDDEN: &[&str] = &[
    "image", "images", "graph", "graphs", "picture", "pictures", "photo", "photos", "file",
    "files", "map", "maps", "draw", "plot", "video", "videos", "audio", "diagram", "diagrams",
];

/// The shortest and the longest instruction in words.
const WORDS: std::ops::RangeInclusive<usize> = 4..=150;

/// Settings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SelfInstruct {
    /// Rounds at most.
    pub rounds: u32,
    /// Lists that are continued in a round, together.
    pub lists: u32,
    /// Rows that are enough.
    pub rows: usize,
    /// Seed tasks shown in a list.
    pub shown_seeds: usize,
    /// The model's own tasks shown in a list, as far as there are any; seeds stand in for those missing.
    pub shown_own: usize,
    /// An instruction as near as this to one of the pool is left out.
    pub max_rouge: f64,
    /// The longest answer in tokens.
    pub max_tokens: usize,
    /// Of the lists; instances are written at half of it.
    pub temperature: f64,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Instructed {
    /// Demonstrations with their provenance.
    pub rows: Vec<Annotated<SftRecord>>,
    /// Instructions that passed, with or without an instance.
    pub instructions: Vec<String>,
    /// What was left out, by reason.
    pub left_out: BTreeMap<String, u64>,
    /// Rounds that were run.
    pub rounds: u32,
}

impl Instructed {
    fn leave_out(&mut self, reason: &str) {
        *self.left_out.entry(reason.to_owned()).or_default() += 1;
    }
}

/// Runs the loop from `seeds`, instructions of people. `go_on` is asked before each round, with what there is.
///
/// # Errors
/// When there are fewer seeds than are shown, or a number is 0.
pub fn run(
    author: &dyn Author,
    seeds: &[String],
    cfg: &SelfInstruct,
    seed: u64,
    go_on: &mut dyn FnMut(&Instructed) -> bool,
) -> Result<Instructed> {
    check(seeds, cfg)?;
    let stream = Stream::new(seed, Purpose::Subset);
    let mut out = Instructed::default();
    let mut pool: Vec<Vec<String>> = seeds.iter().map(|s| words(s)).collect();
    let mut instances = HashSet::new();
    while out.rounds < cfg.rounds && out.rows.len() < cfg.rows && go_on(&out) {
        let round = out.rounds;
        let asks: Vec<Ask> = (0..cfg.lists)
            .map(|list| {
                let shown = shown(&stream, seeds, &out.instructions, cfg, (round, list));
                Ask {
                    messages: vec![Message::new(Role::User, list_prompt(&shown))],
                    max_tokens: cfg.max_tokens,
                    temperature: cfg.temperature,
                    key: key(round, 0, u64::from(list)),
                }
            })
            .collect();
        let mut new = Vec::new();
        for answer in author.write(&asks) {
            let Ok(text) = answer else {
                out.leave_out("no answer");
                continue;
            };
            for instruction in list_items(&text) {
                match refused(&instruction, &pool, cfg.max_rouge) {
                    Some(reason) => out.leave_out(reason),
                    None => {
                        pool.push(words(&instruction));
                        new.push(instruction);
                    }
                }
            }
        }
        let made = write_instances(author, &new, cfg, round);
        for (instruction, instance) in new.iter().zip(made) {
            let row = instance.and_then(|i| i.accept(instruction, &mut instances));
            match row {
                Ok((input, output)) => {
                    let name = author.name();
                    out.rows
                        .push(demonstration(instruction, &input, &output, name, round));
                }
                Err(reason) => out.leave_out(reason),
            }
        }
        out.instructions.extend(new);
        out.rounds += 1;
    }
    out.rows.truncate(cfg.rows);
    Ok(out)
}

fn check(seeds: &[String], cfg: &SelfInstruct) -> Result<()> {
    let wrong = if cfg.lists == 0 || cfg.rounds == 0 || cfg.rows == 0 || cfg.max_tokens == 0 {
        Some("rounds, lists, rows and max_tokens must be above 0".to_owned())
    } else if cfg.shown_seeds + cfg.shown_own == 0 {
        Some("a list shows no task; raise shown_seeds".to_owned())
    } else if seeds.len() < cfg.shown_seeds + cfg.shown_own {
        Some(format!(
            "{} seed tasks, of which a list shows {}",
            seeds.len(),
            cfg.shown_seeds + cfg.shown_own
        ))
    } else if !(0.0..=1.0).contains(&cfg.max_rouge) {
        Some(format!("max_rouge is {}, expected 0 to 1", cfg.max_rouge))
    } else {
        None
    };
    wrong.map_or(Ok(()), |what| {
        Err(Error::Invalid {
            what,
            mend: "mend the setting, or give more seed tasks".into(),
        })
    })
}

/// A key of noise: for lists, classes and instances of a round.
fn key(round: u32, what: u64, number: u64) -> u64 {
    u64::from(round) << 32 | what << 28 | number
}

/// The tasks of a list in a drawn order, seeds and the model's own.
fn shown<'a>(
    stream: &Stream,
    seeds: &'a [String],
    own: &'a [String],
    cfg: &SelfInstruct,
    (round, list): (u32, u32),
) -> Vec<&'a str> {
    let draw = |from: &'a [String], n: usize, part: u32| -> Vec<&'a str> {
        let at = |i: usize| stream.bits(u64::from(round) << 32 | u64::from(list), part, i as u32);
        let mut keyed: Vec<([u32; 4], &str)> = from
            .iter()
            .enumerate()
            .map(|(i, s)| (at(i), s.as_str()))
            .collect();
        keyed.sort_unstable();
        keyed.into_iter().take(n).map(|k| k.1).collect()
    };
    let mine = draw(own, cfg.shown_own, 1);
    let mut all = draw(seeds, cfg.shown_seeds + cfg.shown_own - mine.len(), 0);
    all.extend(mine);
    let order: Vec<[u32; 4]> = (0..all.len())
        .map(|i| stream.bits(u64::from(round) << 32 | u64::from(list), 2, i as u32))
        .collect();
    let mut places: Vec<usize> = (0..all.len()).collect();
    places.sort_by_key(|&i| order[i]);
    places.into_iter().map(|i| all[i]).collect()
}

fn list_prompt(shown: &[&str]) -> String {
    let mut text = "Here is a list of tasks that people give to an assistant. Go on with the list: write new tasks that differ from those above and from each other in subject, form and wording. Each takes one line and can be done with words alone.\n\n".to_owned();
    for (i, task) in shown.iter().enumerate() {
        text += &format!("Task {}: {}\n", i + 1, task.trim().replace('\n', " "));
    }
    text + &format!("Task {}:", shown.len() + 1)
}

/// The tasks of an answer: its first line, and what follows each `Task n:`.
fn list_items(text: &str) -> Vec<String> {
    let mut items = Vec::new();
    for line in text.lines() {
        let line = line.trim();
        let body = match line.strip_prefix("Task ").and_then(|l| l.split_once(':')) {
            Some((number, body)) if number.chars().all(|c| c.is_ascii_digit()) => body,
            // Only what comes first may lack its mark: the prompt ends with it.
            _ if items.is_empty() => line,
            _ => continue,
        };
        let body = body.trim();
        if !body.is_empty() {
            items.push(body.to_owned());
        }
    }
    items
}

/// Why an instruction is left out.
fn refused(instruction: &str, pool: &[Vec<String>], max_rouge: f64) -> Option<&'static str> {
    let own = words(instruction);
    if own.len() < *WORDS.start() {
        return Some("too short");
    }
    if own.len() > *WORDS.end() {
        return Some("too long");
    }
    if !instruction.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Some("begins oddly");
    }
    if own.iter().any(|w| FORBIDDEN.contains(&w.as_str())) {
        return Some("asks for more than text");
    }
    // The authors' code leaves these out: answers were mostly no programs.
    if own.starts_with(&["write".into(), "a".into(), "program".into()]) {
        return Some("asks for a program");
    }
    pool.iter()
        .any(|p| rouge_l_words(&own, p) >= max_rouge)
        .then_some("too near to another")
}

/// Input and output as an author wrote them.
struct Instance {
    input: String,
    output: String,
}

impl Instance {
    fn accept(
        self,
        instruction: &str,
        seen: &mut HashSet<(String, String)>,
    ) -> std::result::Result<(String, String), &'static str> {
        let same = |a: &str, b: &str| words(a) == words(b);
        if self.output.is_empty() {
            return Err("no output");
        }
        if same(&self.output, &self.input) || same(&self.output, instruction) {
            return Err("output repeats input");
        }
        // One input with two outputs is of no use either.
        if !seen.insert((instruction.to_lowercase(), self.input.to_lowercase())) {
            return Err("instance twice");
        }
        Ok((self.input, self.output))
    }
}

fn write_instances(
    author: &dyn Author,
    instructions: &[String],
    cfg: &SelfInstruct,
    round: u32,
) -> Vec<std::result::Result<Instance, &'static str>> {
    let ask = |(i, text): (usize, String), what: u64, max_tokens: usize| Ask {
        messages: vec![Message::new(Role::User, text)],
        max_tokens,
        temperature: cfg.temperature / 2.0,
        key: key(round, what, i as u64),
    };
    let classes: Vec<Ask> = instructions
        .iter()
        .map(|t| format!("Task: {t}\n\nIs this a task of classification, whose answer is one of a few labels that are known beforehand? Answer yes or no."))
        .enumerate()
        .map(|t| ask(t, 1, cfg.max_tokens.min(8)))
        .collect();
    let is_class: Vec<bool> = author
        .write(&classes)
        .into_iter()
        .map(|a| a.is_ok_and(|t| words(&t).first().is_some_and(|w| w == "yes")))
        .collect();
    let asks: Vec<Ask> = instructions
        .iter()
        .zip(&is_class)
        .map(|(t, class)| {
            if *class {
                format!("Task: {t}\n\nChoose one of the labels of this task, and write an input to which it belongs. Keep to this form:\nOutput: the label\nInput: the input")
            } else {
                format!("Task: {t}\n\nWrite an example of this task. Where it needs an input, make one up; where it needs none, write none. Then do the task. Keep to this form:\nInput: the input\nOutput: the answer")
            }
        })
        .enumerate()
        .map(|t| ask(t, 2, cfg.max_tokens))
        .collect();
    author
        .write(&asks)
        .into_iter()
        .map(|a| a.map_err(|_| "no answer").and_then(|t| parts(&t)))
        .collect()
}

/// The parts of an answer in either order; `none` and kin are no input.
fn parts(text: &str) -> std::result::Result<Instance, &'static str> {
    let output = text.find("Output:").ok_or("no output")?;
    let after = |at: usize, mark: &str| at + mark.len();
    let (input, output) = match text.find("Input:") {
        Some(i) if i < output => (
            &text[after(i, "Input:")..output],
            &text[after(output, "Output:")..],
        ),
        Some(i) => (
            &text[after(i, "Input:")..],
            &text[after(output, "Output:")..i],
        ),
        None => ("", &text[after(output, "Output:")..]),
    };
    let input = input.trim();
    let bare = input
        .trim_matches(|c: char| !c.is_alphanumeric())
        .to_lowercase();
    let nothing = ["", "none", "n a", "no input", "n/a", "noinput"].contains(&bare.as_str());
    Ok(Instance {
        input: if nothing {
            String::new()
        } else {
            input.to_owned()
        },
        output: output.trim().to_owned(),
    })
}

fn demonstration(
    instruction: &str,
    input: &str,
    output: &str,
    model: &str,
    round: u32,
) -> Annotated<SftRecord> {
    let asked = if input.is_empty() {
        instruction.to_owned()
    } else {
        format!("{instruction}\n\n{input}")
    };
    let mut other = serde_json::Map::new();
    other.insert("method".into(), "self_instruct".into());
    other.insert("round".into(), round.into());
    other.insert("instruction".into(), instruction.into());
    Annotated {
        record: SftRecord {
            prompt: Some(Text::Messages(vec![Message::new(Role::User, asked)])),
            completion: Text::Messages(vec![Message::new(Role::Assistant, output)]),
        },
        weight: None,
        source: Some(Source {
            model: Some(model.to_owned()),
            other: Some(other),
            ..Source::default()
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_by_its_marks() {
        let text = " Name three rivers of Europe.\nTask 10: Sum up a story.\nso be it\nTask x: no\nTask 11:\nTask 12: Say it in French.";
        assert_eq!(
            list_items(text),
            [
                "Name three rivers of Europe.",
                "Sum up a story.",
                "Say it in French."
            ]
        );
        assert!(list_items("").is_empty());
    }

    #[test]
    fn what_is_no_use_is_refused_with_its_reason() {
        let pool = vec![words("Name three rivers of Europe.")];
        let reason = |t: &str| refused(t, &pool, 0.7);
        assert_eq!(reason("Name three lakes of Asia now please"), None);
        assert_eq!(reason("Do it"), Some("too short"));
        assert_eq!(reason(&"word ".repeat(151)), Some("too long"));
        assert_eq!(reason("- name a bird of prey"), Some("begins oddly"));
        assert_eq!(
            reason("Describe the picture in words"),
            Some("asks for more than text")
        );
        assert_eq!(
            reason("Write a program that sorts"),
            Some("asks for a program")
        );
        // Four words of five in order: 2·4/10 = 0.8.
        assert_eq!(
            reason("Name three lakes of Europe."),
            Some("too near to another")
        );
    }

    #[test]
    fn an_instance_is_read_in_either_order() {
        let read = |t: &str| parts(t).map(|i| (i.input, i.output));
        let both = |a: &str, b: &str| Ok((a.to_owned(), b.to_owned()));
        assert_eq!(read("Input: 2 and 3\nOutput: 5"), both("2 and 3", "5"));
        assert_eq!(
            read("Output: good\nInput: I liked it."),
            both("I liked it.", "good")
        );
        assert_eq!(read("Input: none.\nOutput: Hello"), both("", "Hello"));
        assert_eq!(read("Output: Hello"), both("", "Hello"));
        assert_eq!(read("Hello"), Err("no output"));
        let mut seen = HashSet::new();
        let mut accept = |i: &str, o: &str| {
            let instance = Instance {
                input: i.into(),
                output: o.into(),
            };
            instance.accept("Say it", &mut seen)
        };
        assert_eq!(accept("x y", "X, y!"), Err("output repeats input"));
        assert_eq!(accept("x", ""), Err("no output"));
        assert!(accept("x", "y").is_ok());
        assert_eq!(accept("X", "z"), Err("instance twice"));
    }
}
