//! Judges: one behind a server on this machine that misbehaves as told, and one of our own whose probabilities
//! are enumerated.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rlhf_data::conversation::Text;
use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_data::tokenize::ChatTokenizer;
use rlhf_endpoint::{Endpoint, EndpointConfig};
use rlhf_model::{CausalLm as _, Config, DeviceBatch, Transformer};
use rlhf_reward::judge::{
    Against, LocalJudge, Pair, PairJudge as _, PairSource, Prices, Prompts, RemoteJudge,
    RubricSource, Settings,
};
use rlhf_reward::source::{Judged, RewardSource};
use serde_json::{Map, Value, json};
use tch::{Device, Kind};

/// What the server does with a question.
#[derive(Clone)]
enum Act {
    /// Says this.
    Say(String),
    /// Answers with a status and a body.
    Status(u16, &'static str),
    /// Keeps silent for longer than the client waits.
    Hang,
    /// Hangs up in the middle of the answer.
    Cut,
}

/// The longer reply is the better one, and longer replies get higher ratings.
fn longer(question: &str) -> Act {
    let part = |from: &str, to: &str| {
        let rest = question.split_once(from).map(|(_, rest)| rest)?;
        rest.split_once(to).map(|(part, _)| part.trim().len())
    };
    if let Some(length) = part("=== Reply ===", "=== End") {
        return Act::Say(format!("Length decides.\n[[{}]]", length.clamp(1, 10)));
    }
    let (a, b) = (
        part("=== Reply A ===", "=== Reply B"),
        part("=== Reply B ===", "=== End"),
    );
    Act::Say(format!(
        "Length decides. [[{}]]",
        match a.cmp(&b) {
            std::cmp::Ordering::Greater => "A",
            std::cmp::Ordering::Less => "B",
            std::cmp::Ordering::Equal => "C",
        }
    ))
}

struct Server {
    url: String,
    asked: Arc<Mutex<Vec<Value>>>,
}

/// Does the first acts in order, then what `otherwise` says.
fn server(acts: Vec<Act>, otherwise: fn(&str) -> Act) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let acts = Arc::new(Mutex::new(VecDeque::from(acts)));
    let asked = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&asked);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (acts, asked) = (Arc::clone(&acts), Arc::clone(&kept));
            std::thread::spawn(move || serve(stream.unwrap(), &acts, &asked, otherwise));
        }
    });
    Server { url, asked }
}

fn serve(
    mut stream: TcpStream,
    acts: &Mutex<VecDeque<Act>>,
    asked: &Mutex<Vec<Value>>,
    otherwise: fn(&str) -> Act,
) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        let lower = head.to_lowercase();
        let length = lower
            .lines()
            .find_map(|l| l.strip_prefix("content-length:"));
        let mut body = vec![0; length.map_or(0, |l| l.trim().parse().unwrap())];
        reader.read_exact(&mut body).unwrap();
        let question: Value = serde_json::from_slice(&body).unwrap();
        let text = question["messages"][0]["content"]
            .as_str()
            .unwrap()
            .to_owned();
        asked.lock().unwrap().push(question);
        let act = acts
            .lock()
            .unwrap()
            .pop_front()
            .unwrap_or_else(|| otherwise(&text));
        let (status, body) = match act {
            Act::Say(text) => {
                let answer = json!({
                    "choices": [{"message": {"role": "assistant", "content": text}}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 10},
                });
                (200, answer.to_string())
            }
            Act::Status(status, body) => (status, body.to_owned()),
            Act::Hang => {
                std::thread::sleep(Duration::from_millis(900));
                return;
            }
            Act::Cut => {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n{\"cho");
                return;
            }
        };
        let head = format!(
            "HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        if stream
            .write_all(format!("{head}{body}").as_bytes())
            .is_err()
        {
            return;
        }
    }
}

fn judge(url: &str, change: impl FnOnce(&mut EndpointConfig)) -> RemoteJudge {
    let mut config = EndpointConfig {
        timeout: Duration::from_millis(500),
        first_wait: Duration::from_millis(5),
        longest_wait: Duration::from_millis(20),
        at_once: 1,
        ..EndpointConfig::new(url, "judge")
    };
    change(&mut config);
    let settings = Settings {
        prices: Prices {
            prompt: 2.0,
            completion: 8.0,
        },
        ..Settings::default()
    };
    RemoteJudge::new(Endpoint::new(config).unwrap(), settings).unwrap()
}

fn pair<'a>(a: &'a str, b: &'a str) -> Pair<'a> {
    Pair {
        prompt: "Say something.",
        a,
        b,
    }
}

#[test]
fn both_orders_are_asked_and_counted() {
    let s = server(Vec::new(), longer);
    let judge = judge(&s.url, |_| {});
    let labels = judge
        .prefers(&[pair("long one", "one"), pair("x", "yyy"), pair("ab", "cd")])
        .unwrap();
    assert_eq!(labels, [Some(1.0), Some(0.0), Some(0.5)]);
    let counts = judge.counts();
    assert_eq!(
        (counts.answered, counts.pairs, counts.turned, counts.ties),
        (6, 3, 0, 2)
    );
    assert_eq!((counts.prompt_tokens, counts.completion_tokens), (600, 60));
    // 600 at 2 and 60 at 8 a million.
    assert!((counts.cost - 0.00168).abs() < 1e-12);
    let asked = s.asked.lock().unwrap();
    assert_eq!(asked[0]["temperature"], 0);
    assert_eq!(asked[0]["model"], "judge");
}

#[test]
fn a_liking_for_the_first_place_cancels() {
    let s = server(Vec::new(), |_| Act::Say("[[A]]".into()));
    let judge = judge(&s.url, |_| {});
    assert_eq!(judge.prefers(&[pair("good", "bad")]).unwrap(), [Some(0.5)]);
    assert_eq!(judge.counts().turned, 1);
}

#[test]
fn faults_are_tried_again_and_answers_without_a_verdict_cost_their_row() {
    let acts = vec![
        Act::Status(429, "slow down"),
        Act::Status(500, "overload"),
        Act::Cut,
        Act::Hang,
        Act::Status(200, "<html>"),
        Act::Say("[[9]]".into()),
        // Half an answer, none, one out of the scale, a refusal of the question, and an answer in another form.
        Act::Say("It is good, so [[".into()),
        Act::Say(String::new()),
        Act::Say("[[99]]".into()),
        Act::Status(400, "too long"),
        Act::Status(200, "{\"error\": \"odd\"}"),
        Act::Say("[[1]]".into()),
    ];
    let s = server(acts, longer);
    let judge = judge(&s.url, |c| c.tries = 6);
    let rated = judge.rates(&[("p", "c"); 7]).unwrap();
    assert_eq!(
        rated,
        [Some(8.0 / 9.0), None, None, None, None, None, Some(0.0)]
    );
    let counts = judge.counts();
    assert_eq!(
        (counts.failed_tries, counts.unread, counts.unanswered),
        (5, 4, 1)
    );
    assert_eq!(counts.answered, 6);
}

#[test]
fn one_order_that_fails_leaves_the_other() {
    let s = server(vec![Act::Say("no verdict".into())], longer);
    let judge = judge(&s.url, |_| {});
    assert_eq!(
        judge.prefers(&[pair("long one", "one")]).unwrap(),
        [Some(1.0)]
    );
    assert_eq!((judge.counts().unread, judge.counts().pairs), (1, 0));
}

#[test]
fn what_will_not_pass_ends_the_run() {
    let s = server(Vec::new(), |_| Act::Status(401, "who are you"));
    let e = judge(&s.url, |_| {})
        .rates(&[("p", "c")])
        .unwrap_err()
        .to_string();
    assert!(e.contains("check the key"), "{e}");
    // All down: not a single answer.
    let s = server(Vec::new(), |_| Act::Status(503, "down"));
    let down = judge(&s.url, |c| c.tries = 2);
    assert!(
        down.rates(&[("p", "c"); 3])
            .unwrap_err()
            .to_string()
            .contains("503")
    );
    assert_eq!(down.counts().unanswered, 3);
}

#[test]
fn a_second_run_asks_nothing_twice() {
    let s = server(Vec::new(), longer);
    let folder = tempfile::tempdir().unwrap();
    let run = || {
        let judge = judge(&s.url, |c| c.cache = Some(folder.path().into()));
        (
            judge.prefers(&[pair("a", "bb"), pair("ccc", "d")]).unwrap(),
            judge.counts(),
        )
    };
    let (first, counts) = run();
    assert_eq!((counts.answered, counts.from_cache), (4, 0));
    let (second, counts) = run();
    assert_eq!(first, second);
    assert_eq!((counts.answered, counts.from_cache), (0, 4));
    assert_eq!(counts.cost, 0.0);
    assert_eq!(s.asked.lock().unwrap().len(), 4);
}

/// Scores of one prompt's completions.
fn scores(source: &dyn RewardSource, texts: &[&str], fields: Value) -> Vec<f64> {
    let texts: Vec<String> = texts.iter().map(|t| (*t).to_owned()).collect();
    let completion = |_: &String| Completion::whole(vec![1], Finish::Stop);
    let group = PromptGroup {
        row: 7,
        prompt: vec![1],
        completions: texts.iter().map(completion).collect(),
    };
    let fields: Map<String, Value> = fields.as_object().cloned().unwrap();
    let item = Judged {
        group: &group,
        prompt: "Say something.",
        texts: &texts,
        fields: &fields,
    };
    source.scores(&[item]).unwrap().remove(0)
}

#[test]
fn judges_are_sources_of_rewards() {
    let s = server(Vec::new(), longer);
    let remote = || judge(&s.url, |_| {});
    let rubric = RubricSource::new(remote(), -1.0);
    assert_eq!(
        scores(&rubric, &["x", "four", "ten letter"], json!({})),
        [0.0, 3.0 / 9.0, 1.0]
    );
    let ranked = PairSource::new(Box::new(remote()), Against::RoundRobin, 0.0);
    // Lengths 1, 3, 2, 3: the two of 3 tie; wins 0, 2½, 1, 2½ of 3.
    let found = scores(&ranked, &["a", "bbb", "cc", "ddd"], json!({}));
    assert_eq!(found, [0.0, 2.5 / 3.0, 1.0 / 3.0, 2.5 / 3.0]);
    assert_eq!(scores(&ranked, &["alone"], json!({})), [0.5]);
    let against = PairSource::new(Box::new(remote()), Against::Field("baseline".into()), 0.0);
    assert_eq!(
        scores(&against, &["a", "bb", "ccc"], json!({"baseline": "xx"})),
        [0.0, 0.5, 1.0]
    );
}

/// A small random model with the tests' tokenizer.
fn local() -> (Transformer, ChatTokenizer) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../rlhf-data/tests/golden/tokenizer");
    let tokenizer = ChatTokenizer::load(&dir).unwrap();
    let mut config = Config::new(tokenizer.vocab_size() as i64, 16, 1, 2, 512);
    config.initializer_range = 0.5;
    (
        Transformer::init(config, 3, Device::Cpu, Kind::Float).unwrap(),
        tokenizer,
    )
}

#[test]
fn a_local_judge_says_the_models_own_probabilities() {
    let (model, tokenizer) = local();
    let question = "{prompt} {a} or {b}?";
    let judge =
        LocalJudge::new(model, tokenizer, Device::Cpu, 4096, Some(question.into())).unwrap();
    let pairs = [pair("yes", "no"), pair("no", "yes"), pair("same", "same")];
    let labels = judge.prefers(&pairs).unwrap();
    // The oracle: the softmax over the whole vocabulary after each question, by the model alone.
    let (model, tokenizer) = local();
    let letter = |text: &str| {
        let ids = tokenizer.encode(text).unwrap();
        *ids.last().unwrap() as i64
    };
    let of_a = |p: Pair<'_>| {
        let text = format!("{} {} or {}?", p.prompt, p.a, p.b);
        let asked =
            rlhf_data::conversation::Message::new(rlhf_data::conversation::Role::User, text);
        let ids = tokenizer.prompt_ids(&Text::Messages(vec![asked])).unwrap();
        let group = PromptGroup {
            row: 0,
            prompt: ids,
            completions: vec![Completion::whole(vec![0], Finish::Length)],
        };
        let packed = rlhf_data::pack::PackedBatch::pack(&[group]).unwrap();
        let batch = DeviceBatch::new(&packed, Device::Cpu).unwrap();
        let hidden = model
            .hidden(&batch)
            .unwrap()
            .index_select(0, &batch.target_rows);
        let probabilities = hidden
            .matmul(&model.lm_head().tr())
            .softmax(-1, Kind::Double);
        let p = |id| probabilities.double_value(&[0, id]);
        p(letter("A")) / (p(letter("A")) + p(letter("B")))
    };
    for (pair, label) in pairs.iter().zip(&labels) {
        let expected = 0.5 * (of_a(*pair) + 1.0 - of_a(pair.swapped()));
        let found = label.unwrap();
        assert!((found - expected).abs() < 1e-5, "{found} {expected}");
    }
    // Order does not count.
    assert!((labels[0].unwrap() + labels[1].unwrap() - 1.0).abs() < 1e-6);
    assert!((labels[2].unwrap() - 0.5).abs() < 1e-6);
    assert!(labels[0].unwrap() != 0.5);
}

#[test]
fn settings_that_make_no_sense() {
    let endpoint = || Endpoint::new(EndpointConfig::new("http://localhost:1/v1", "m")).unwrap();
    for settings in [
        Settings {
            max_tokens: 0,
            ..Settings::default()
        },
        Settings {
            prices: Prices {
                prompt: -1.0,
                completion: 0.0,
            },
            ..Settings::default()
        },
        Settings {
            prompts: Prompts {
                rating: "rate {prompt}".into(),
                ..Prompts::default()
            },
            ..Settings::default()
        },
    ] {
        assert!(RemoteJudge::new(endpoint(), settings).is_err());
    }
    let (model, tokenizer) = local();
    let e = LocalJudge::new(model, tokenizer, Device::Cpu, 512, Some("{a}".into()))
        .err()
        .unwrap();
    assert!(e.to_string().contains("{prompt}"), "{e}");
}
