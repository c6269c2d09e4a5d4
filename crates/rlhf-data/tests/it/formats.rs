//! Public chat formats, each written from its published description, rendered and compared with the text
//! that the description gives. The templates use what templates in the wild use: loop controls, string
//! methods, exceptions, namespaces, macros, the date.

use rlhf_data::chat_template::ChatTemplate;
use rlhf_data::conversation::{Message, Role, ToolCall};

const DATE: (i32, u32, u32) = (2024, 7, 9);

fn render(template: &str, bos: &str, eos: &str, turns: &[(Role, &str)], open: bool) -> String {
    let messages: Vec<Message> = turns.iter().map(|(r, c)| Message::new(*r, *c)).collect();
    ChatTemplate::new(template, "test", bos, eos, Vec::new(), DATE)
        .unwrap()
        .render(&messages, open)
        .unwrap()
        .text
}

const TALK: [(Role, &str); 4] = [
    (Role::System, "Be brief."),
    (Role::User, "Hi <you>"),
    (Role::Assistant, "Hello."),
    (Role::User, "And \"now\"? é"),
];

#[test]
fn chatml() {
    let t = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
    insta::assert_snapshot!(render(t, "", "", &TALK, true), @r#"
    <|im_start|>system
    Be brief.<|im_end|>
    <|im_start|>user
    Hi <you><|im_end|>
    <|im_start|>assistant
    Hello.<|im_end|>
    <|im_start|>user
    And "now"? é<|im_end|>
    <|im_start|>assistant
    "#);
}

#[test]
fn llama_2() {
    let t = "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = '<<SYS>>\n' ~ m.content ~ '\n<</SYS>>\n\n' %}{% continue %}{% endif %}{% if loop.previtem is defined and loop.previtem.role == m.role %}{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}{{ bos_token ~ '[INST] ' ~ ns.system ~ m.content.strip() ~ ' [/INST]' }}{% set ns.system = '' %}{% else %}{{ ' ' ~ m.content.strip() ~ ' ' ~ eos_token }}{% endif %}{% endfor %}";
    insta::assert_snapshot!(render(t, "<s>", "</s>", &TALK, true), @r#"
    <s>[INST] <<SYS>>
    Be brief.
    <</SYS>>

    Hi <you> [/INST] Hello. </s><s>[INST] And "now"? é [/INST]
    "#);
    let twice = [Message::new(Role::User, "a"), Message::new(Role::User, "b")];
    let e = ChatTemplate::new(t, "test", "<s>", "</s>", Vec::new(), DATE)
        .unwrap()
        .render(&twice, true)
        .unwrap_err();
    assert!(e.to_string().contains("roles must alternate"), "{e}");
}

#[test]
fn llama_3() {
    let t = "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}";
    insta::assert_snapshot!(render(t, "<|begin_of_text|>", "<|eot_id|>", &TALK[..2], true), @r"
    <|begin_of_text|><|start_header_id|>system<|end_header_id|>

    Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>

    Hi <you><|eot_id|><|start_header_id|>assistant<|end_header_id|>
    ");
}

#[test]
fn llama_3_1_with_its_date() {
    let t = "{%- macro part(who, what) -%}<|start_header_id|>{{ who }}<|end_header_id|>\n\n{{ what | trim }}<|eot_id|>{%- endmacro -%}{%- set own = messages[0].content if messages[0].role == 'system' else '' -%}{{ bos_token }}{{ part('system', 'Cutting Knowledge Date: December 2023\nToday Date: ' ~ strftime_now('%d %b %Y') ~ '\n\n' ~ own) }}{%- for m in messages -%}{%- if m.role != 'system' -%}{{ part(m.role, m.content) }}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{%- endif -%}";
    insta::assert_snapshot!(render(t, "<|begin_of_text|>", "", &TALK[..2], true), @r"
    <|begin_of_text|><|start_header_id|>system<|end_header_id|>

    Cutting Knowledge Date: December 2023
    Today Date: 09 Jul 2024

    Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>

    Hi <you><|eot_id|><|start_header_id|>assistant<|end_header_id|>
    ");
}

#[test]
fn zephyr() {
    let t = "{% for m in messages %}\n{% if m.role not in ['system', 'user', 'assistant'] %}\n{% continue %}\n{% endif %}\n<|{{ m.role }}|>\n{{ m.content ~ eos_token }}\n{% endfor %}\n{% if add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}";
    // Line ends after a block tag are dropped, those after an expression stay.
    insta::assert_snapshot!(render(t, "<s>", "</s>", &TALK, true), @r#"
    <|system|>
    Be brief.</s>
    <|user|>
    Hi <you></s>
    <|assistant|>
    Hello.</s>
    <|user|>
    And "now"? é</s>
    <|assistant|>
    "#);
}

#[test]
fn tulu() {
    let t = "{% for m in messages %}<|{{ m.role }}|>{{ '\n' ~ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% if not loop.last or m.role != 'assistant' %}{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}";
    insta::assert_snapshot!(render(t, "", "<|end_of_text|>", &TALK, true), @r#"
    <|system|>
    Be brief.
    <|user|>
    Hi <you>
    <|assistant|>
    Hello.<|end_of_text|>
    <|user|>
    And "now"? é
    <|assistant|>
    "#);
}

#[test]
fn gemma() {
    let t = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}";
    insta::assert_snapshot!(render(t, "<bos>", "<eos>", &TALK[1..], true), @r#"
    <bos><start_of_turn>user
    Hi <you><end_of_turn>
    <start_of_turn>model
    Hello.<end_of_turn>
    <start_of_turn>user
    And "now"? é<end_of_turn>
    <start_of_turn>model
    "#);
    let system = [Message::new(Role::System, "x")];
    let e = ChatTemplate::new(t, "test", "<bos>", "<eos>", Vec::new(), DATE)
        .unwrap()
        .render(&system, true)
        .unwrap_err();
    assert!(e.to_string().contains("System role not supported"), "{e}");
}

#[test]
fn mistral() {
    let t = "{{ bos_token }}{% set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') %}{% set talk = messages | rejectattr('role', 'equalto', 'system') | list %}{% for m in talk %}{% if m.role == 'assistant' %}{{ ' ' ~ m.content | trim ~ eos_token }}{% else %}[INST] {% if loop.last and system %}{{ system ~ '\n\n' }}{% endif %}{{ m.content }}[/INST]{% endif %}{% endfor %}";
    insta::assert_snapshot!(render(t, "<s>", "</s>", &TALK, false), @r#"
    <s>[INST] Hi <you>[/INST] Hello.</s>[INST] Be brief.

    And "now"? é[/INST]
    "#);
}

#[test]
fn qwen_2_5_has_a_system_message_of_its_own_and_tool_calls() {
    let t = "{%- macro open(who) -%}<|im_start|>{{ who }}{%- endmacro -%}{%- if messages[0].role != 'system' -%}{{ open('system') ~ '\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}{%- endif -%}{%- for m in messages -%}{%- if m.role == 'tool' -%}{%- if loop.previtem is undefined or loop.previtem.role != 'tool' -%}{{ open('user') }}{%- endif -%}{{ '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}{%- if loop.nextitem is undefined or loop.nextitem.role != 'tool' -%}{{ '<|im_end|>\n' }}{%- endif -%}{%- else -%}{{ open(m.role) }}{%- if m.content -%}{{ '\n' ~ m.content }}{%- endif -%}{%- for call in m.tool_calls or [] -%}{{ '\n<tool_call>\n{\"name\": ' ~ call.function.name | tojson ~ ', \"arguments\": ' ~ call.function.arguments | tojson ~ '}\n</tool_call>' }}{%- endfor -%}{{ '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ open('assistant') ~ '\n' }}{%- endif -%}";
    let mut call = Message::new(Role::Assistant, "");
    let arguments = serde_json::json!({"city": "Zürich", "days": [1, 2]});
    call.tool_calls = vec![ToolCall::new(
        None,
        "weather",
        arguments.as_object().unwrap().clone(),
    )];
    let talk = [
        Message::new(Role::User, "Rain?"),
        call,
        Message::new(Role::Tool, "yes"),
        Message::new(Role::Assistant, "It rains."),
    ];
    let text = ChatTemplate::new(t, "test", "", "<|im_end|>", Vec::new(), DATE)
        .unwrap()
        .render(&talk, true)
        .unwrap()
        .text;
    insta::assert_snapshot!(text, @r#"
    <|im_start|>system
    You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>
    <|im_start|>user
    Rain?<|im_end|>
    <|im_start|>assistant
    <tool_call>
    {"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}}
    </tool_call><|im_end|>
    <|im_start|>user
    <tool_response>
    yes
    </tool_response><|im_end|>
    <|im_start|>assistant
    It rains.<|im_end|>
    <|im_start|>assistant
    "#);
}

/// Thoughts of earlier answers are left out, found by a namespace and a reversed loop.
#[test]
fn qwen_3() {
    let t = "{%- set at = namespace(question=-1) -%}{%- for m in messages | reverse -%}{%- if m.role == 'user' -%}{%- set at.question = loop.revindex0 -%}{%- break -%}{%- endif -%}{%- endfor -%}{%- for m in messages -%}{%- set text = m.content -%}{%- if m.role == 'assistant' and '</think>' in text -%}{%- set parts = text.split('</think>') -%}{%- set thought = parts[0].replace('<think>', '').strip('\n') -%}{%- set text = parts[-1].lstrip('\n') -%}{%- if loop.index0 > at.question -%}{%- set text = '<think>\n' ~ thought ~ '\n</think>\n\n' ~ text -%}{%- endif -%}{%- endif -%}{{ '<|im_start|>' ~ m.role ~ '\n' ~ text ~ '<|im_end|>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}";
    let talk = [
        (Role::User, "1+1?"),
        (Role::Assistant, "<think>\nadd\n</think>\n\n2"),
        (Role::User, "2+2?"),
        (Role::Assistant, "<think>\nadd again\n</think>\n\n4"),
    ];
    insta::assert_snapshot!(render(t, "", "<|im_end|>", &talk, false), @r"
    <|im_start|>user
    1+1?<|im_end|>
    <|im_start|>assistant
    2<|im_end|>
    <|im_start|>user
    2+2?<|im_end|>
    <|im_start|>assistant
    <think>
    add again
    </think>

    4<|im_end|>
    ");
}

#[test]
fn phi_3() {
    let t = "{% for m in messages %}{% if m.content %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|end|>\n' }}{% endif %}{% endfor %}{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}";
    insta::assert_snapshot!(render(t, "<s>", "<|endoftext|>", &TALK[..3], false), @r"
    <|system|>
    Be brief.<|end|>
    <|user|>
    Hi <you><|end|>
    <|assistant|>
    Hello.<|end|>
    <|endoftext|>
    ");
}

#[test]
fn deepseek_r1() {
    let t = "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>') | last }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}";
    let talk = [
        TALK[0],
        TALK[1],
        (Role::Assistant, "<think>why</think>Hello."),
        TALK[3],
    ];
    insta::assert_snapshot!(render(t, "<｜begin▁of▁sentence｜>", "", &talk, true), @r#"
    <｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi <you><｜Assistant｜>Hello.<｜end▁of▁sentence｜><｜User｜>And "now"? é<｜Assistant｜><think>
    "#);
}

#[test]
fn olmo_2() {
    let t = "{{ bos_token }}{% for m in messages %}{{ '<|%s|>\n%s' | format(m.role, m.content) }}{{ eos_token if m.role == 'assistant' }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}";
    insta::assert_snapshot!(render(t, "<|endoftext|>", "<|endoftext|>", &TALK[1..3], false), @r"
    <|endoftext|><|user|>
    Hi <you>
    <|assistant|>
    Hello.<|endoftext|>
    ");
}

#[test]
fn smollm_2() {
    let t = "{% if messages[0].role != 'system' %}{% set first = [{'role': 'system', 'content': 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'}] %}{% else %}{% set first = [] %}{% endif %}{% for m in first + messages %}<|im_start|>{{ m.role }}{{ '\n' }}{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    insta::assert_snapshot!(render(t, "<|im_start|>", "<|im_end|>", &TALK[1..2], true), @r"
    <|im_start|>system
    You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
    <|im_start|>user
    Hi <you><|im_end|>
    <|im_start|>assistant
    ");
}

#[test]
fn command_r() {
    let t = "{% macro turn(who, what) %}<|START_OF_TURN_TOKEN|><|{{ who }}_TOKEN|>{{ what.strip() }}<|END_OF_TURN_TOKEN|>{% endmacro %}{{ bos_token }}{% set names = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'} %}{% for m in messages %}{% if m.role not in names %}{{ raise_exception('no such role: ' ~ m.role) }}{% endif %}{{ turn(names[m.role], m.content) }}{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}";
    insta::assert_snapshot!(render(t, "<BOS_TOKEN>", "", &TALK, true), @r#"<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi <you><|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Hello.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>And "now"? é<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"#);
}
