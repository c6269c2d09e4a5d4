//! A chat template and a conversation: the template's text, a line of `---`, a list of messages.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rlhf_data::chat_template::ChatTemplate;
use rlhf_data::conversation::{Message, Role};

/// What the renderer allows.
const MAX_TEXT: usize = 16 << 20;

fuzz_target!(
    init: {
        // The engine panics on some formats, which the renderer catches; a panic that leaves it still
        // ends the run.
        std::panic::set_hook(Box::new(|_| {}));
    },
    |data: &str| {
    let (template, messages) = data.split_once("\n---\n").unwrap_or((data, ""));
    let messages: Vec<Message> = serde_json::from_str(messages).unwrap_or_else(|_| {
        vec![
            Message::new(Role::User, "hi <s> there"),
            Message::new(Role::Assistant, messages),
        ]
    });
    let special = vec!["<s>".to_owned(), "</s>".to_owned()];
    let Ok(template) = ChatTemplate::new(template, "fuzz", "<s>", "</s>", special, (2024, 7, 9))
    else {
        return;
    };
    for prompt in [false, true] {
        let Ok(r) = template.render(&messages, prompt) else {
            continue;
        };
        assert!(r.text.len() <= MAX_TEXT);
        assert!(r.cuts.is_sorted() && r.cuts.iter().all(|c| r.text.is_char_boundary(*c)));
        assert!(r.generated.iter().all(|g| r.text.get(g.clone()).is_some()));
    }
}
);
