//! Synthetic data with an author that follows a script: what is asked, kept, left out and written.

use std::cell::RefCell;
use std::collections::BTreeSet;

use rlhf_data::conversation::{Message, Role, Text};
use rlhf_data::synthetic::author::Answer;
use rlhf_data::synthetic::critique::{self, Critique, Principle};
use rlhf_data::synthetic::rouge::rouge_l;
use rlhf_data::synthetic::self_instruct::{self, SelfInstruct};
use rlhf_data::synthetic::{Ask, Author, Kept};

/// Answers by a function of the ask; remembers what it was asked.
struct Script<F: Fn(&Ask) -> Answer> {
    answer: F,
    asked: RefCell<Vec<Ask>>,
}

impl<F: Fn(&Ask) -> Answer> Script<F> {
    fn new(answer: F) -> Self {
        Self {
            answer,
            asked: RefCell::new(Vec::new()),
        }
    }
}

impl<F: Fn(&Ask) -> Answer> Author for Script<F> {
    fn name(&self) -> &str {
        "script"
    }

    fn write(&self, asks: &[Ask]) -> Vec<Answer> {
        self.asked.borrow_mut().extend(asks.iter().cloned());
        asks.iter().map(|a| (self.answer)(a)).collect()
    }
}

fn last(a: &Ask) -> &str {
    &a.messages.last().unwrap().content
}

/// Words of which no two lists share much.
fn invented(n: u64) -> String {
    let word = |i: u64| format!("w{}", n * 31 + i * 7);
    format!("Say {} {} {} {}", word(1), word(2), word(3), word(4))
}

/// Two tasks a list, one near to the other; every fifth list fails; instances for all but classes of their own.
fn busy(a: &Ask) -> Answer {
    let text = last(a);
    if text.starts_with("Here is a list") {
        return match a.key % 5 {
            4 => Err("busy".into()),
            _ => {
                let next = 1 + text.matches("\nTask ").count();
                Ok(format!(
                    " {}\nTask {}: {}!",
                    invented(a.key),
                    next + 1,
                    invented(a.key)
                ))
            }
        };
    }
    if text.contains("Is this a task of classification") {
        return Ok(if a.key.is_multiple_of(2) {
            "Yes."
        } else {
            "no"
        }
        .into());
    }
    Ok(if text.contains("Choose one of the labels") {
        "Output: good\nInput: I liked it".into()
    } else {
        format!("Input: none\nOutput: done {}", a.key)
    })
}

fn seeds() -> Vec<String> {
    (0..10)
        .map(|i| format!("Do the thing number {i} of kind {}", i * i))
        .collect()
}

const SETTINGS: SelfInstruct = SelfInstruct {
    rounds: 4,
    lists: 5,
    rows: 1000,
    shown_seeds: 6,
    shown_own: 2,
    max_rouge: 0.7,
    max_tokens: 50,
    temperature: 0.8,
};

#[test]
fn the_loop_fills_a_pool_of_tasks_that_differ() {
    let author = Script::new(busy);
    let out = self_instruct::run(&author, &seeds(), &SETTINGS, 3, &mut |_| true).unwrap();
    assert_eq!(out.rounds, 4);
    // Of five lists a round one fails, and in each other the second task is too near to the first.
    assert_eq!(out.instructions.len(), 16);
    assert_eq!(out.left_out["no answer"], 4);
    assert_eq!(out.left_out["too near to another"], 16);
    for (i, a) in out.instructions.iter().enumerate() {
        for b in out.instructions[..i].iter().chain(&seeds()) {
            assert!(rouge_l(a, b) < 0.7, "{a} {b}");
        }
    }
    assert_eq!(out.rows.len(), 16);
    let of = |i: usize| {
        let r = &out.rows[i];
        let text = |t: &Text| match t {
            Text::Messages(m) => m[0].content.clone(),
            Text::Plain(t) => t.clone(),
        };
        (
            text(r.record.prompt.as_ref().unwrap()),
            text(&r.record.completion),
        )
    };
    // Instances 0, 2, … of a round are classes: an input, and a label.
    assert_eq!(
        of(0),
        (
            format!("{}\n\nI liked it", out.instructions[0]),
            "good".into()
        )
    );
    assert_eq!(of(1).0, out.instructions[1]);
    assert!(of(1).1.starts_with("done "));
    let source = out.rows[15].source.as_ref().unwrap();
    assert_eq!(source.model.as_deref(), Some("script"));
    assert_eq!(source.other.as_ref().unwrap()["round"], 3);
    // Lists show eight tasks: of seeds alone at first, then two of the model's own.
    let asked = author.asked.borrow();
    let lists: Vec<&Ask> = asked
        .iter()
        .filter(|a| last(a).starts_with("Here"))
        .collect();
    assert_eq!(lists.len(), 20);
    for (i, list) in lists.iter().enumerate() {
        assert_eq!(last(list).matches("\nTask ").count(), 9);
        let own = last(list).matches(": Say w").count();
        assert_eq!(own, if i < 5 { 0 } else { 2 });
        assert_eq!(list.temperature, 0.8);
    }
    let keys: BTreeSet<u64> = asked.iter().map(|a| a.key).collect();
    assert_eq!(keys.len(), asked.len());
}

#[test]
fn it_stops_at_enough_rows_and_when_told() {
    let author = Script::new(busy);
    let cfg = SelfInstruct {
        rows: 6,
        ..SETTINGS
    };
    let out = self_instruct::run(&author, &seeds(), &cfg, 3, &mut |_| true).unwrap();
    assert_eq!((out.rows.len(), out.rounds), (6, 2));
    let none = self_instruct::run(&author, &seeds(), &cfg, 3, &mut |_| false).unwrap();
    assert_eq!((none.rows.len(), none.rounds), (0, 0));
    for bad in [
        SelfInstruct { lists: 0, ..cfg },
        SelfInstruct {
            shown_seeds: 11,
            ..cfg
        },
        SelfInstruct {
            max_rouge: 1.5,
            ..cfg
        },
    ] {
        assert!(self_instruct::run(&author, &seeds(), &bad, 3, &mut |_| true).is_err());
    }
}

#[test]
fn what_is_kept_is_not_asked_again_and_failures_are() {
    let folder = tempfile::tempdir().unwrap();
    let run = |author: &dyn Author| {
        let kept = Kept::new(author, folder.path()).unwrap();
        let out = self_instruct::run(&kept, &seeds(), &SETTINGS, 3, &mut |_| true).unwrap();
        (out, kept.counts())
    };
    let first = Script::new(busy);
    let (a, (asked, found)) = run(&first);
    assert_eq!((asked as usize, found), (first.asked.borrow().len(), 0));
    let second = Script::new(busy);
    let (b, (asked, found)) = run(&second);
    assert_eq!(a, b);
    // Only the four that failed.
    assert_eq!((asked, found as usize), (4, first.asked.borrow().len() - 4));
    // A damaged file counts as none.
    let file = std::fs::read_dir(folder.path()).unwrap().next().unwrap();
    std::fs::write(file.unwrap().path(), "{").unwrap();
    let third = Script::new(busy);
    assert_eq!(run(&third).0, a);
    assert_eq!(third.asked.borrow().len(), 5);
}

fn principles() -> Vec<Principle> {
    (0..4)
        .map(|i| Principle {
            name: format!("p{i}"),
            critique: format!("criticise by {i}"),
            revision: format!("revise by {i}"),
        })
        .collect()
}

const REVISE: Critique = Critique {
    rounds: 2,
    max_tokens: 40,
    temperature: 1.0,
};

#[test]
fn answers_are_revised_by_principles_drawn_for_each_row_and_round() {
    let prompts: Vec<Text> = (0..40)
        .map(|i| {
            if i % 2 == 0 {
                Text::Plain(format!("question {i}"))
            } else {
                Text::Messages(vec![Message::new(Role::User, format!("question {i}"))])
            }
        })
        .collect();
    // Row 3 gets no answer, row 5 no second critique; row 7 is content with what it said.
    let author = Script::new(|a: &Ask| {
        let row = a.messages[0]
            .content
            .trim_start_matches("question ")
            .to_owned();
        let turns = a.messages.len();
        match (row.as_str(), last(a)) {
            ("3", _) => Err("down".into()),
            ("5", t) if t.starts_with("criticise") && a.key & 0xffff == 3 => Ok("  ".into()),
            ("7", t) if !t.starts_with("criticise") => Ok("same".into()),
            (_, t) if t.starts_with("criticise") => Ok(format!("critique {turns}")),
            _ => Ok(format!("answer {}", a.key & 0xffff)),
        }
    });
    let go = |seed| {
        critique::run(&author, &prompts, &principles(), &REVISE, seed, &mut |_| {
            true
        })
    };
    let out = go(1).unwrap();
    assert_eq!((out.chains.len(), out.unanswered, out.broken), (39, 1, 1));
    let of = |row: usize| out.chains.iter().find(|c| c.row == row).unwrap();
    assert_eq!(of(0).answers, ["answer 0", "answer 2", "answer 4"]);
    assert_eq!(of(5).answers, ["answer 0", "answer 2"]);
    // Critiques see the question, the last answer and the request.
    assert_eq!(of(0).critiques, ["critique 3", "critique 3"]);
    let drawn: Vec<usize> = out
        .chains
        .iter()
        .flat_map(|c| c.principles.clone())
        .collect();
    for p in 0..4 {
        // 77 draws of four: 19 ± 4 each.
        let n = drawn.iter().filter(|d| **d == p).count();
        assert!((8..=32).contains(&n), "{p}: {n}");
    }
    assert_ne!(
        drawn,
        go(2)
            .unwrap()
            .chains
            .iter()
            .flat_map(|c| c.principles.clone())
            .collect::<Vec<_>>()
    );
    let rows = out.demonstrations(&prompts, &principles(), "m");
    let pairs = out.preferences(&prompts, &principles(), "m");
    assert_eq!((rows.len(), pairs.len()), (39, 38));
    assert_eq!(rows[0].record.completion, Text::Plain("answer 4".into()));
    assert_eq!(pairs[0].record.rejected, Text::Plain("answer 0".into()));
    let other = rows[0].source.as_ref().unwrap().other.clone().unwrap();
    assert_eq!(other["principles"].as_array().unwrap().len(), 2);
    let said = Text::Messages(vec![Message::new(Role::Assistant, "answer 4")]);
    assert_eq!(rows[1].record.completion, said);
    // Revision requests come after the critique.
    let asked = author.asked.borrow();
    let revision = asked.iter().find(|a| a.key == 2).unwrap();
    let texts: Vec<&str> = revision
        .messages
        .iter()
        .map(|m| m.content.as_str())
        .collect();
    assert_eq!(&texts[..2], ["question 0", "answer 0"]);
    assert!(texts[2].starts_with("criticise") && texts[4].starts_with("revise"));
    assert_eq!(
        texts[2].split(' ').next_back(),
        texts[4].split(' ').next_back()
    );
}

#[test]
fn principles_are_read_and_what_is_wrong_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let read = |text: &str| {
        let path = folder.path().join("p.toml");
        std::fs::write(&path, text).unwrap();
        critique::read_principles(&path)
    };
    let good = "[[principles]]\nname = 'a'\ncritique = 'b'\nrevision = 'c'\n";
    assert_eq!(read(good).unwrap().len(), 1);
    for (text, word) in [
        ("principles = []", "no principles"),
        ("[[principles]]\nname = 'a'\n", "critique"),
        (
            "[[principles]]\nname = 'a'\ncritique = 'b'\nrevision = 'c'\nx = 1\n",
            "`x`",
        ),
        ("not toml [", ""),
    ] {
        let e = read(text).unwrap_err().to_string();
        assert!(e.contains(word) && e.contains("p.toml"), "{e}");
    }
    assert!(critique::read_principles(&folder.path().join("none.toml")).is_err());
    let none = critique::run(
        &Script::new(|_| Ok("x".into())),
        &[],
        &[],
        &REVISE,
        1,
        &mut |_| true,
    );
    assert!(none.is_err());
}
