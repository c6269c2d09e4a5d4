//! The shipped data sets: rebuilt byte for byte, disjoint, of the stated noise, sizes and tokens.

use rlhf_data::conversation::Text;
use rlhf_data::rubric::{Facts, judge, judge_facts};
use rlhf_data::source;
use rlhf_data::synth::grammar::{INTENTS, Intent, Slot};
use rlhf_data::synth::help::{self, Demonstration, Pair, Prompt, Task};
use rlhf_data::synth::{self, DataFile, lexicon, vocabulary};
use rlhf_data::tokenize::{ChatTokenizer, Limits, Outcome};
use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tokenizers::Tokenizer;

fn shipped_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets")
}

fn task() -> &'static Task {
    static TASK: OnceLock<Task> = OnceLock::new();
    TASK.get_or_init(|| Task::generate(synth::SEED).unwrap())
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_file(shipped_folder().join("help/tokenizer/tokenizer.json")).unwrap()
}

fn score(prompt: &Prompt, reply: &str) -> f64 {
    judge_facts(&prompt.text, reply, &prompt.facts).score
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len() as f64;
    values.sum::<f64>() / n
}

fn all_texts(task: &Task) -> Vec<&str> {
    let mut texts = task.sft_texts();
    texts.extend(
        task.sft
            .test
            .iter()
            .flat_map(|d| [d.prompt.text.as_str(), d.reply.as_str()]),
    );
    for pair in task.preference.train.iter().chain(&task.preference.test) {
        texts.extend([pair.prompt.text.as_str(), &pair.chosen, &pair.rejected]);
    }
    texts.extend(
        task.prompts
            .train
            .iter()
            .chain(&task.prompts.test)
            .map(|p| p.text.as_str()),
    );
    texts
}

/// Rebuilding into an empty folder gives exactly the shipped files, and nothing else is shipped but the
/// manifests.
#[test]
fn rebuilding_gives_the_shipped_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let files = synth::build(synth::SEED).unwrap();
    let mut total = 0;
    for file in &files {
        file.write(folder.path()).unwrap();
        let built = std::fs::read(folder.path().join(&file.path)).unwrap();
        let shipped = std::fs::read(shipped_folder().join(&file.path)).unwrap();
        assert!(
            built == shipped,
            "datasets/{} is not what the generator builds; run `cargo xtask datasets`",
            file.path
        );
        assert!(file.is_written(folder.path()).unwrap());
        total += built.len();
    }
    assert!(total <= 3 * 1024 * 1024, "{total} bytes");
    let mut shipped = names_below(&shipped_folder());
    // What is known of public datasets is written by hand.
    shipped.retain(|name| !name.starts_with("manifests"));
    assert_eq!(shipped, names_below(folder.path()));
}

fn names_below(root: &Path) -> BTreeSet<PathBuf> {
    let mut names = BTreeSet::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                names.insert(path.strip_prefix(root).unwrap().to_owned());
            }
        }
    }
    names
}

/// The trainer of the tokenizer counts in hash maps of random order; its result must not show it.
#[test]
fn training_the_tokenizer_twice_gives_the_same_file() {
    let texts = task().sft_texts();
    let file =
        |texts: &[&str]| vocabulary::files("help", &vocabulary::train(texts).unwrap()).unwrap();
    assert_eq!(file(&texts), file(&texts));
}

#[test]
fn an_altered_file_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let file = DataFile {
        path: "help/x".to_owned(),
        bytes: vec![1, 2, 3],
    };
    assert!(!file.is_written(folder.path()).unwrap());
    file.write(folder.path()).unwrap();
    assert!(file.is_written(folder.path()).unwrap());
    std::fs::write(folder.path().join("help/x"), [1, 2, 4]).unwrap();
    assert!(!file.is_written(folder.path()).unwrap());
    assert_eq!(
        file.sha256(),
        "039058c6f2c0cb492c533b0a4d14ef77cc0f78abccced5287d84a1a2011cfb81"
    );
}

#[test]
fn another_seed_gives_other_rows() {
    let other = Task::generate(synth::SEED + 1).unwrap();
    assert_ne!(
        other.sft.train[0].prompt.text,
        task().sft.train[0].prompt.text
    );
    assert_eq!(other.sft.train.len(), task().sft.train.len());
}

#[test]
fn sizes_are_as_stated() {
    let t = task();
    assert_eq!(
        (t.sft.train.len(), t.sft.test.len()),
        (help::SFT_TRAIN, help::SFT_TEST)
    );
    let pairs = (t.preference.train.len(), t.preference.test.len());
    assert_eq!(pairs, (help::PREFERENCE_TRAIN, help::PREFERENCE_TEST));
    let prompts = (t.prompts.train.len(), t.prompts.test.len());
    assert_eq!(prompts, (help::PROMPTS_TRAIN, help::PROMPTS_TEST));
}

/// No test prompt in training, neither its text nor its facts; nor any prompt twice.
#[test]
fn test_prompts_are_never_trained_on() {
    let t = task();
    let train: Vec<&Prompt> = (t.sft.train.iter().map(|d| &d.prompt))
        .chain(t.preference.train.iter().map(|p| &p.prompt))
        .chain(&t.prompts.train)
        .collect();
    let test: Vec<&Prompt> = (t.sft.test.iter().map(|d| &d.prompt))
        .chain(t.preference.test.iter().map(|p| &p.prompt))
        .chain(&t.prompts.test)
        .collect();
    let texts: HashSet<&str> = train.iter().map(|p| p.text.as_str()).collect();
    assert_eq!(texts.len(), train.len(), "a training prompt occurs twice");
    assert!(test.iter().all(|p| !texts.contains(p.text.as_str())));
    let facts = |p: &&Prompt| {
        let slots: Vec<Option<String>> = Slot::ALL
            .iter()
            .map(|&s| p.facts.get(s).map(str::to_owned))
            .collect();
        (p.facts.intent().id, slots)
    };
    let combinations: HashSet<_> = train.iter().map(facts).collect();
    assert!(test.iter().all(|p| !combinations.contains(&facts(p))));
}

#[test]
fn labels_are_turned_around_as_often_as_stated() {
    let turned = |pairs: &[Pair]| {
        mean(pairs.iter().map(|pair| {
            let margin = score(&pair.prompt, &pair.chosen) - score(&pair.prompt, &pair.rejected);
            assert!(margin.abs() >= help::MIN_MARGIN, "{pair:?}");
            f64::from(u8::from(margin < 0.0))
        }))
    };
    let train = turned(&task().preference.train);
    assert!((train - help::LABEL_NOISE).abs() <= 0.01, "{train}");
    assert_eq!(turned(&task().preference.test), 0.0);
}

/// Middling demonstrations: much to gain over them, and enough good ones to learn from.
#[test]
fn demonstrations_are_of_mixed_quality() {
    let rate = |demos: &[Demonstration]| -> Vec<f64> {
        demos.iter().map(|d| score(&d.prompt, &d.reply)).collect()
    };
    for demos in [&task().sft.train, &task().sft.test] {
        let scores = rate(demos);
        let average = mean(scores.iter().copied());
        assert!((0.55..0.68).contains(&average), "{average}");
        let full = mean(scores.iter().map(|&s| f64::from(u8::from(s > 0.999))));
        assert!((0.22..0.38).contains(&full), "{full}");
        assert!(scores.iter().all(|s| (0.0..=1.0 + 1e-12).contains(s)));
    }
    let intents: HashSet<&str> = task()
        .sft
        .train
        .iter()
        .map(|d| d.prompt.facts.intent().id)
        .collect();
    assert_eq!(intents.len(), INTENTS.len());
}

fn intent(id: &str) -> &'static Intent {
    INTENTS.iter().find(|i| i.id == id).unwrap()
}

/// From best to worst, as a person would order them; the last are attempts to trick the rubric.
#[test]
fn the_rubric_ranks_as_a_person_would() {
    let slots = ["Nora", "T52", "guitar", "", ""].map(|s| (!s.is_empty()).then(|| s.to_owned()));
    let facts = Facts::new(intent("return_item"), slots).unwrap();
    let prompt = "Hello, I am Nora. How can I return the guitar from order T52?";
    let every: String = INTENTS
        .iter()
        .map(|i| format!("{}. ", i.keys.join(", ")))
        .collect();
    let every = format!("Hi Nora, thanks. Order T52, guitar. {every}");
    let replies = [
        "Dear Nora, thanks for writing to us. I have emailed you a return label for the guitar from order T52.",
        "I have emailed you a return label for the guitar from order T52. Kind regards from the help team.",
        "Dear Nora, thanks for writing to us. I have emailed you a return label for the item from your order.",
        "Dear Nora, thanks for writing to us. Our shop in York is open from nine to six every day.",
        "No.",
    ];
    let scores: Vec<f64> = replies
        .iter()
        .map(|reply| judge_facts(prompt, reply, &facts).score)
        .collect();
    assert!(
        scores.windows(2).all(|pair| pair[0] > pair[1]),
        "{scores:?}"
    );
    assert!((scores[0] - 1.0).abs() < 1e-12);
    let honest = scores[2];
    let tricks = [
        every.as_str(),
        "Hi Nora, thanks. Return label, return label, guitar T52, guitar T53, return label for all.",
        "Thanks thanks thanks thanks thanks thanks thanks thanks thanks thanks thanks thanks thanks.",
        "Hi Nora, thank you, thanks, please, thank you, thanks, please, thank you, thanks, please, thank you.",
        prompt,
    ];
    for trick in tricks {
        let got = judge_facts(prompt, trick, &facts);
        assert!(got.score < honest, "{trick}: {got:?}");
    }
}

#[test]
fn the_tokenizer_knows_every_text() {
    let tokenizer = tokenizer();
    let size = tokenizer.get_vocab_size(true);
    assert!((768..=1024).contains(&size), "{size}");
    for (id, token) in vocabulary::SPECIAL_TOKENS.iter().enumerate() {
        assert_eq!(tokenizer.token_to_id(token), Some(id as u32));
    }
    for text in all_texts(task()) {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(ids.get_ids(), false).unwrap(), text);
    }
    // Text of another world comes back, too: the alphabet holds all bytes.
    let odd = "\u{4f60}\u{597d} caf\u{e9}\t\n~ <|nothing|>";
    let ids = tokenizer.encode(odd, false).unwrap();
    assert_eq!(tokenizer.decode(ids.get_ids(), false).unwrap(), odd);
}

#[test]
fn a_fact_is_few_tokens_and_the_same_ones_everywhere() {
    let tokenizer = tokenizer();
    let lists = [
        lexicon::NAMES,
        lexicon::THINGS,
        lexicon::CLOTHES,
        lexicon::CITIES,
        lexicon::DAYS,
    ];
    for word in lists.concat() {
        let text = format!(" {word}");
        assert_eq!(
            tokenizer.encode(text.as_str(), false).unwrap().len(),
            1,
            "{word}"
        );
    }
    for letter in lexicon::ORDER_LETTERS {
        let text = format!(" {}48.", char::from(*letter));
        assert_eq!(
            tokenizer.encode(text.as_str(), false).unwrap().len(),
            4,
            "{text}"
        );
    }
}

#[test]
fn lengths_suit_a_small_model() {
    let tokenizer = tokenizer();
    let tokens = |text: &str| tokenizer.encode(text, false).unwrap().len();
    let demos = &task().sft.train;
    let prompts: Vec<usize> = demos.iter().map(|d| tokens(&d.prompt.text)).collect();
    let replies: Vec<usize> = demos.iter().map(|d| tokens(&d.reply)).collect();
    let average = |lengths: &[usize]| mean(lengths.iter().map(|&n| n as f64));
    assert!((20.0..50.0).contains(&average(&prompts)));
    assert!((20.0..45.0).contains(&average(&replies)));
    assert!(prompts.iter().max().unwrap() <= &64);
    assert!(replies.iter().max().unwrap() <= &120);
}

/// What the crate's own readers and tokenizer make of the shipped files.
#[test]
fn the_shipped_files_read_as_records_and_groups() {
    let help = shipped_folder().join("help");
    let chat = ChatTokenizer::load(&help.join("tokenizer")).unwrap();
    assert_eq!(chat.eos_ids(), [1]);
    let limits = Limits::new(64, 112);

    let sft: Vec<_> = source::read_sft(&help.join("sft/test.parquet"))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(sft.len(), help::SFT_TEST);
    for (row, (record, demo)) in sft.iter().zip(&task().sft.test).enumerate() {
        let Outcome::Kept(group) = chat.sft_group(row as u64, record, &limits).unwrap() else {
            panic!("row {row} is not kept whole");
        };
        let [completion] = group.completions.as_slice() else {
            panic!("one completion")
        };
        let prompt = format!("<|bos|><|user|>{}<|end|><|assistant|>", demo.prompt.text);
        assert_eq!(chat.decode(&group.prompt, false).unwrap(), prompt);
        let reply = format!("{}<|end|>", demo.reply);
        assert_eq!(chat.decode(&completion.ids, false).unwrap(), reply);
        let [trained] = completion.trained.as_slice() else {
            panic!("one trained range")
        };
        assert_eq!(*trained, 0..completion.ids.len());
    }

    let pairs = source::read_preference(&help.join("preference/test.parquet")).unwrap();
    let pairs: Vec<_> = pairs.map(Result::unwrap).collect();
    assert_eq!(pairs.len(), help::PREFERENCE_TEST);
    for (row, record) in pairs.iter().enumerate() {
        let group = chat.preference_group(row as u64, record, &limits).unwrap();
        assert!(
            matches!(group, Outcome::Kept(group) if group.completions.len() == 2),
            "{row}"
        );
    }

    let prompts = source::read_prompts(&help.join("prompts/test.parquet")).unwrap();
    let mut read = 0;
    for (record, prompt) in prompts.zip(&task().prompts.test) {
        let record = record.unwrap();
        let facts = Facts::from_fields(&record.fields).unwrap();
        assert_eq!(facts.intent().id, prompt.facts.intent().id);
        assert!(
            Slot::ALL
                .iter()
                .all(|&slot| facts.get(slot) == prompt.facts.get(slot))
        );
        let ids = chat.prompt_ids(&record.prompt).unwrap();
        assert!(ids.len() <= limits.max_prompt);
        let Text::Messages(messages) = &record.prompt else {
            panic!("messages")
        };
        assert_eq!(messages[0].content, prompt.text);
        let body = prompt.facts.intent().answers[0];
        let body = Slot::ALL.iter().fold(body.to_owned(), |text, &slot| {
            text.replace(
                &format!("{{{}}}", slot.name()),
                prompt.facts.get(slot).unwrap_or(""),
            )
        });
        let name = prompt.facts.get(Slot::Name).unwrap();
        let reply = format!("Hello {name}, I am happy to help. {body}");
        let rubric = judge(&messages[0].content, &reply, &record.fields).unwrap();
        assert!(rubric.score > 0.999, "{reply}: {rubric:?}");
        read += 1;
    }
    assert_eq!(read, help::PROMPTS_TEST);
}
