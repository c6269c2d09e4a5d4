//! Templates and tokens against transformers: the cases of the shared golden files, and the shipped
//! tokenizer.

use std::path::{Path, PathBuf};

use rlhf_data::conversation::{Message, Text};
use rlhf_data::record::SftRecord;
use rlhf_data::tokenize::{ChatTokenizer, DropReason, Limits, Outcome};
use serde_json::Value;

const LIMITS: Limits = Limits::new(1000, 1000);

fn shared() -> Option<PathBuf> {
    let dir = std::env::var_os("RLHF_SHARED").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        PathBuf::from,
    );
    dir.join("golden").is_dir().then_some(dir)
}

#[test]
fn rendered_conversations_have_the_peers_text_and_ids() {
    let Some(dir) = shared() else {
        println!("skipped: no shared folder");
        return;
    };
    let (mut ran, mut wrong) = (0, Vec::new());
    for (file, folder) in [
        ("g_tokenization.json", "tokenizer"),
        ("g_tokenization_bos.json", "tokenizer_bos"),
    ] {
        let golden: Value =
            serde_json::from_str(&std::fs::read_to_string(dir.join("golden").join(file)).unwrap())
                .unwrap();
        let t = ChatTokenizer::load(&dir.join("golden").join(folder)).unwrap();
        for case in golden["chat_rendered"].as_array().unwrap() {
            let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
            let add = case["add_generation_prompt"].as_bool().unwrap();
            let rendered = t.template().unwrap().render(&messages, add).unwrap();
            let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            let own = if add {
                t.prompt_ids(&Text::Messages(messages.clone())).unwrap()
            } else {
                ids.clone()
            };
            if rendered.text != case["text"].as_str().unwrap() || own != ids {
                wrong.push(format!("{file}: {:?}", case["text"]));
            }
            ran += 1;
        }
    }
    println!("{ran} conversations");
    assert!(wrong.is_empty() && ran > 0, "{}", wrong.join("\n"));
}

fn shipped() -> ChatTokenizer {
    ChatTokenizer::load(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/help/tokenizer"),
    )
    .unwrap()
}

fn talk(turns: &[(&str, &str)]) -> SftRecord {
    let messages: Vec<Value> = turns
        .iter()
        .map(|(role, content)| serde_json::json!({"role": role, "content": content}))
        .collect();
    SftRecord {
        prompt: None,
        completion: Text::Messages(serde_json::from_value(Value::Array(messages)).unwrap()),
    }
}

#[test]
fn only_what_the_assistant_says_is_trained() {
    let t = shipped();
    let record = talk(&[
        ("user", "Hello"),
        ("assistant", "Good day."),
        ("user", "And?"),
        ("assistant", "Bye."),
    ]);
    let Outcome::Kept(g) = t.sft_group(0, &record, &LIMITS).unwrap() else {
        panic!("dropped")
    };
    let c = &g.completions[0];
    let trained: Vec<String> = c
        .trained
        .iter()
        .map(|r| t.decode(&c.ids[r.clone()], false).unwrap())
        .collect();
    assert_eq!(trained.len(), 2);
    assert!(
        trained[0].contains("Good day.")
            && trained[0].ends_with("<|end|>")
            && trained[1].contains("Bye.")
    );
    assert!(!trained.concat().contains("And?"));
}

#[test]
fn a_marker_in_the_users_text_stays_text() {
    let t = shipped();
    let (end, plain) = (t.eos_ids()[0], "say <|end|> now");
    let honest = t
        .prompt_ids(&Text::Messages(vec![]))
        .map_or(0, |ids| ids.iter().filter(|i| **i == end).count());
    let record = talk(&[
        ("user", plain),
        ("assistant", "I said <|assistant|> and <|end|> here"),
    ]);
    let Outcome::Kept(g) = t.sft_group(0, &record, &LIMITS).unwrap() else {
        panic!("dropped")
    };
    let c = &g.completions[0];
    assert_eq!(
        c.ids.iter().filter(|i| **i == end).count(),
        1,
        "only the real end"
    );
    assert_eq!(*c.ids.last().unwrap(), end);
    assert!(g.prompt.iter().filter(|i| **i == end).count() <= honest + 1);
    assert!(t.decode(&g.prompt, false).unwrap().contains(plain));
}

#[test]
fn limits_drop_and_cut_and_never_invent_an_end() {
    let t = shipped();
    let record = talk(&[
        ("user", "Hello there my friend"),
        ("assistant", "A long answer to cut somewhere."),
    ]);
    let long = Limits::new(1, 100);
    assert_eq!(
        t.sft_group(0, &record, &long).unwrap(),
        Outcome::Dropped(DropReason::PromptTooLong)
    );
    let short = Limits::new(100, 3);
    let Outcome::Truncated(g) = t.sft_group(0, &record, &short).unwrap() else {
        panic!("not cut")
    };
    assert_eq!(g.completions[0].ids.len(), 3);
    assert!(!t.eos_ids().contains(g.completions[0].ids.last().unwrap()));
    assert_eq!(g.completions[0].finish, rlhf_data::group::Finish::Cut);
    let none = talk(&[("user", "Hello")]);
    assert_eq!(
        t.sft_group(0, &none, &LIMITS).unwrap(),
        Outcome::Dropped(DropReason::NothingTrained)
    );
}

/// A folder with the golden tokenizer and a template of its own.
fn with_template(template: &str, config: &str) -> (tempfile::TempDir, ChatTokenizer) {
    let dir = tempfile::tempdir().unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer/tokenizer.json");
    std::fs::copy(from, dir.path().join("tokenizer.json")).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    let t = ChatTokenizer::load_dated(dir.path(), (2024, 7, 9)).unwrap();
    (dir, t)
}

#[test]
fn named_tokens_of_the_configuration_are_variables() {
    let config =
        r#"{"pad_token": "<|pad|>", "eos_token": {"content": "<|im_end|>"}, "unk_token": null}"#;
    let (_dir, t) = with_template(
        "{{ pad_token }}{{ eos_token }}{{ unk_token is defined }}",
        config,
    );
    let rendered = t.template().unwrap().render(&[], false).unwrap();
    assert_eq!(rendered.text, "<|pad|><|im_end|>False");
}

#[test]
fn tool_calls_and_names_reach_the_template() {
    use rlhf_data::conversation::{Role, ToolCall};
    // As Hermes and Qwen write calls.
    let template = "{% for m in messages %}{% if m.name %}{{ m.name }}: {% endif %}{{ m.content }}{% if m.tool_calls %}{% for c in m.tool_calls %}{% set f = c.function %}<tool_call>{\"name\": \"{{ f.name }}\", \"arguments\": {{ f.arguments | tojson }}}</tool_call>{% endfor %}{% endif %}{{ eos_token }}{% endfor %}";
    let (_dir, t) = with_template(template, r#"{"eos_token": "<|im_end|>"}"#);
    let mut call = Message::new(Role::Assistant, "");
    let arguments = serde_json::json!({"city": "O<|im_end|>slo", "days": 2});
    call.tool_calls = vec![ToolCall::new(
        None,
        "weather",
        arguments.as_object().unwrap().clone(),
    )];
    let mut answer = Message::new(Role::Tool, "rain");
    answer.name = Some("weather".into());
    let talk = [Message::new(Role::User, "hi"), call, answer];
    let rendered = t.template().unwrap().render(&talk, false).unwrap();
    assert_eq!(
        rendered.text,
        "hi<|im_end|><tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"O<|im_end|>slo\", \"days\": 2}}</tool_call><|im_end|>weather: rain<|im_end|>"
    );
    // The name of a special token inside an argument does not become that token.
    let ids = t.prompt_ids(&Text::Messages(talk.to_vec())).unwrap();
    let end = t.eos_ids()[0];
    assert_eq!(ids.iter().filter(|i| **i == end).count(), 3);
}

#[test]
fn truncation_and_padding_of_the_tokenizers_file_are_not_applied() {
    let (dir, t) = with_template("{{ messages[0].content }}", "{}");
    let path = dir.path().join("tokenizer.json");
    let mut json: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    json["truncation"] = serde_json::json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = serde_json::json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 3, "pad_type_id": 0, "pad_token": "<|pad|>"});
    std::fs::write(&path, json.to_string()).unwrap();
    let cut = ChatTokenizer::load(dir.path()).unwrap();
    let text = Text::Plain("a somewhat longer text than four tokens".into());
    assert_eq!(cut.prompt_ids(&text).unwrap(), t.prompt_ids(&text).unwrap());
    assert!(t.prompt_ids(&text).unwrap().len() > 4);
}
