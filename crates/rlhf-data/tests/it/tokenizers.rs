//! The tokenizers and templates of model folders, which may be absent: the peer's text and ids.

use std::path::PathBuf;

use rlhf_data::conversation::{Message, Text};
use rlhf_data::record::SftRecord;
use rlhf_data::tokenize::{ChatTokenizer, Limits, Outcome};
use serde_json::Value;

const NO_LIMITS: Limits = Limits::new(usize::MAX, usize::MAX);

/// An i64 or i32 tensor of a safetensors file, flat, with its last dimension.
fn tensor(file: &[u8], name: &str) -> Option<(Vec<i64>, usize)> {
    let n = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&file[8..8 + n]).unwrap();
    let entry = header.get(name)?;
    assert_eq!(entry["dtype"], "I64");
    let at = |i: usize| 8 + n + entry["data_offsets"][i].as_u64().unwrap() as usize;
    let values = file[at(0)..at(1)]
        .chunks_exact(8)
        .map(|b| i64::from_le_bytes(b.try_into().unwrap()))
        .collect();
    let width = entry["shape"].as_array().unwrap().last().unwrap();
    Some((values, width.as_u64().unwrap() as usize))
}

#[test]
fn model_folders_have_the_peers_ids() {
    let dir = std::env::var_os("RLHF_MODELS")
        .map_or_else(|| crate::shared().join("models"), PathBuf::from);
    let Ok(list) = std::fs::read_dir(&dir) else {
        println!("skipped: no {}", dir.display());
        return;
    };
    let (mut chats, mut texts) = (0, 0);
    for model in list.map(|e| e.unwrap().path()) {
        let (text, tensors) = (
            model.join("golden_text.json"),
            model.join("golden.safetensors"),
        );
        if !text.is_file() || !tensors.is_file() {
            continue;
        }
        let golden: Value = serde_json::from_str(&std::fs::read_to_string(text).unwrap()).unwrap();
        let file = std::fs::read(tensors).unwrap();
        let t = ChatTokenizer::load(&model).unwrap();
        let name = model.display();
        let (input, width) = tensor(&file, "right.input_ids").unwrap();
        let (mask, _) = tensor(&file, "right.attention_mask").unwrap();
        for (i, text) in golden["texts"].as_array().unwrap().iter().enumerate() {
            let row = i * width..(i + 1) * width;
            let want: Vec<u32> = input[row.clone()]
                .iter()
                .zip(&mask[row])
                .filter(|(_, m)| **m == 1)
                .map(|(id, _)| *id as u32)
                .collect();
            assert_eq!(
                t.encode(text.as_str().unwrap()).unwrap(),
                want,
                "{name}: {text}"
            );
            texts += 1;
        }
        let Some((prompt, _)) = tensor(&file, "chat.prompt_ids") else {
            continue;
        };
        let unsigned = |v: Vec<i64>| v.into_iter().map(|i| i as u32).collect::<Vec<_>>();
        let messages: Vec<Message> = serde_json::from_value(golden["messages"].clone()).unwrap();
        let template = t.template().unwrap();
        let rendered = template.render(&messages, true).unwrap().text;
        assert_eq!(rendered, golden["with_generation_prompt"], "{name}");
        let rendered = template.render(&messages[..2], false).unwrap().text;
        assert_eq!(rendered, golden["first_two_without"], "{name}");
        let got = t.prompt_ids(&Text::Messages(messages.clone())).unwrap();
        assert_eq!(got, unsigned(prompt), "{name}");
        let full = unsigned(tensor(&file, "chat.full_ids").unwrap().0);
        let record = SftRecord {
            prompt: None,
            completion: Text::Messages(messages[..2].to_vec()),
        };
        let Outcome::Kept(g) = t.sft_group(0, &record, &NO_LIMITS).unwrap() else {
            panic!("{name}: not kept")
        };
        let got = [g.prompt, g.completions[0].ids.clone()].concat();
        assert_eq!(got, full[..got.len()], "{name}");
        let beyond = &full[got.len()..];
        assert!(
            beyond.iter().all(|i| !t.eos_ids().contains(i)),
            "{name}: {beyond:?}"
        );
        chats += 1;
    }
    println!("{chats} conversations, {texts} texts");
    assert!(texts > 0, "{} holds no model", dir.display());
    assert!(
        !dir.join("README.md").is_file() || chats >= 9,
        "{chats} of nine"
    );
}
