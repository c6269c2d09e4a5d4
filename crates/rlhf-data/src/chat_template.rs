//! Hugging Face chat templates: Jinja, as `transformers` renders it.
//!
//! Invariant: bounded time, memory and output whatever the template says; the same input gives the same
//! text on any day (the clock is an argument).
//!
//! A special token's name in a message must not become that token. So a mark is put behind the name's
//! first character before rendering; the rendered text is cut at the marks, and its parts are tokenised
//! one by one. Added tokens that the tokenizer does not call special (`<think>`) are left alone.

mod guard;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value, merge_maps};
use minijinja::{Environment, Error as JinjaError, ErrorKind, context};

use crate::conversation::{Message, ToolCall};
use crate::error::{Error, Result};

/// Instructions a template may execute for one conversation.
const FUEL: u64 = 4_000_000;
/// The longest text a template may give, in bytes.
const MAX_TEXT: usize = 16 << 20;

/// Marks around `{% generation %}` blocks, and inside special tokens that stand in a message.
const BEGIN: char = '\u{f0a11}';
const END: char = '\u{f0a12}';
const SPLIT: char = '\u{f0a13}';

/// A chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    place: String,
    bos: String,
    eos: String,
    /// Other named tokens of the configuration (`pad_token`, …), as variables.
    named: Vec<(&'static str, String)>,
    marks_generation: bool,
    /// Special tokens, which must not come out of a message's text.
    special: Vec<String>,
}

/// A rendered conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Byte ranges of `text` inside `{% generation %}` blocks.
    pub generated: Vec<Range<usize>>,
    /// Byte offsets at which `text` must be cut before it is tokenised, so that a special token's name
    /// inside a message stays plain text.
    pub cuts: Vec<usize>,
}

impl ChatTemplate {
    /// A template from its source; `place` names it in errors. `special` are the tokenizer's special
    /// tokens, `date` the answer of `strftime_now` as (year, month, day).
    ///
    /// # Errors
    /// [`Error::Template`] with the line of a syntax error.
    pub fn new(
        source: &str,
        place: &str,
        bos: &str,
        eos: &str,
        special: Vec<String>,
        date: (i32, u32, u32),
    ) -> Result<Self> {
        let source = guard::guard(source).map_err(|what| Error::Template {
            place: place.into(),
            what,
            mend: "correct the template".into(),
        })?;
        let (source, marks_generation) = mark_generation(&source);
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|e| template_error(place, &e))?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(|state, value, method, args| {
            if method == "format" && value.as_str().is_some_and(guard::is_wide) {
                return Err(JinjaError::new(
                    ErrorKind::InvalidOperation,
                    "a width of more than four digits",
                ));
            }
            minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
        });
        environment.add_function(
            "raise_exception",
            |what: String| -> std::result::Result<String, JinjaError> {
                Err(JinjaError::new(ErrorKind::InvalidOperation, what))
            },
        );
        environment.add_function("strftime_now", move |format: String| {
            strftime(&format, date)
                .map_err(|what| JinjaError::new(ErrorKind::InvalidOperation, what))
        });
        environment.add_filter("tojson", tojson);
        environment.add_filter(guard::FILTER, guard::kept);
        environment.set_formatter(guard::write);
        environment
            .add_template_owned("chat", source)
            .map_err(|e| template_error(place, &e))?;
        Ok(Self {
            environment,
            place: place.into(),
            bos: bos.into(),
            eos: eos.into(),
            named: Vec::new(),
            marks_generation,
            special,
        })
    }

    /// Whether the template says what the model generates.
    #[must_use]
    pub fn marks_generation(&self) -> bool {
        self.marks_generation
    }

    /// The conversation as text.
    ///
    /// # Errors
    /// [`Error::Template`] when the template raises, runs too long or gives too much text.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Rendered> {
        let bad = |what: &str, mend: &str| Error::Template {
            place: self.place.clone(),
            what: what.into(),
            mend: mend.into(),
        };
        let mut list = Vec::with_capacity(messages.len());
        for m in messages {
            let reserved = |t: &str| t.contains([BEGIN, END, SPLIT]);
            if reserved(&m.content)
                || m.name.as_deref().is_some_and(reserved)
                || m.tool_calls
                    .iter()
                    .any(|c| reserved(&c.to_json().to_string()))
            {
                return Err(bad(
                    "a message holds a character that is reserved for marks (U+F0A11 to U+F0A13)",
                    "remove it",
                ));
            }
            let plain = |text: &str| {
                self.defuse(text).map_err(|token| {
                    bad(
                        &format!("a message holds `{token}`, a special token of one character, which cannot be kept apart"),
                        "remove it from the message",
                    )
                })
            };
            let content = plain(&m.content)?;
            let mut turn = vec![
                ("role", Value::from(m.role.name())),
                ("content", content.into()),
            ];
            if let Some(name) = &m.name {
                turn.push(("name", plain(name)?.into()));
            }
            if !m.tool_calls.is_empty() {
                let mut calls: Vec<_> = m.tool_calls.iter().map(ToolCall::to_json).collect();
                for call in &mut calls {
                    each_text(call, &plain)?;
                }
                turn.push(("tool_calls", Value::from(Serde(calls))));
            }
            list.push(Value::from_pairs(turn));
        }
        let template = self
            .environment
            .get_template("chat")
            .map_err(|e| template_error(&self.place, &e))?;
        let mut sink = Sink { text: Vec::new() };
        let variables = context! {
            messages => list, add_generation_prompt => add_generation_prompt,
            bos_token => &self.bos, eos_token => &self.eos,
            tools => (), documents => (),
        };
        let named = self
            .named
            .iter()
            .map(|(name, token)| (*name, token.as_str()));
        let variables = merge_maps([Value::from_pairs(named), variables]);
        // Some formats of text make the engine panic: `'%(é' | format(1)`.
        let rendered = catch_unwind(AssertUnwindSafe(|| {
            template.render_captured_to(variables, &mut sink).map(drop)
        }));
        let rendered = rendered.map_err(|_| {
            bad(
                "the template engine gave up on it",
                "correct the template: look at what it formats",
            )
        })?;
        match rendered {
            Ok(()) => {}
            Err(_) if sink.text.len() >= MAX_TEXT => {
                return Err(bad(
                    "it gives more than 16 MiB of text",
                    "correct the template",
                ));
            }
            Err(e) if e.kind() == ErrorKind::OutOfFuel => {
                return Err(bad(
                    "it runs too long",
                    "correct the template: it may loop for ever",
                ));
            }
            Err(e) => return Err(template_error(&self.place, &e)),
        }
        let text = String::from_utf8(sink.text)
            .map_err(|_| bad("it gives no UTF-8", "correct the template"))?;
        Ok(unmark(&text))
    }

    /// Puts a mark inside every special token's name, so that it is cut there before tokenising; the
    /// error is a token that has no inside.
    fn defuse(&self, content: &str) -> std::result::Result<String, &str> {
        let mut out = content.to_owned();
        for token in &self.special {
            let Some(first) = token.chars().next() else {
                continue;
            };
            let (head, tail) = token.split_at(first.len_utf8());
            // A name may overlap itself ("aa" in "aaa"), so once is not always enough.
            while out.contains(token.as_str()) {
                if tail.is_empty() {
                    return Err(token);
                }
                out = out.replace(token.as_str(), &format!("{head}{SPLIT}{tail}"));
            }
        }
        Ok(out)
    }

    /// Reads the template of a model folder: `chat_template.jinja`, else `chat_template` in
    /// `tokenizer_config.json`. `None` when there is neither.
    ///
    /// # Errors
    /// When a file is unreadable or the template has a syntax error.
    pub fn of_folder(
        dir: &Path,
        config: &serde_json::Value,
        special: Vec<String>,
        date: (i32, u32, u32),
    ) -> Result<Option<Self>> {
        let token = |key: &str| match config.get(key) {
            Some(serde_json::Value::String(s)) => s.clone(),
            Some(v) => v
                .get("content")
                .and_then(serde_json::Value::as_str)
                .unwrap_or_default()
                .to_owned(),
            None => String::new(),
        };
        let (bos, eos) = (token("bos_token"), token("eos_token"));
        let file = dir.join("chat_template.jinja");
        let (source, place) = if file.is_file() {
            (
                std::fs::read_to_string(&file).map_err(Error::io(&file))?,
                file.display().to_string(),
            )
        } else {
            let place = dir.join("tokenizer_config.json").display().to_string();
            match config.get("chat_template") {
                Some(serde_json::Value::String(s)) => (s.clone(), place),
                Some(serde_json::Value::Array(named)) => {
                    let default = named
                        .iter()
                        .find(|t| t.get("name").and_then(|n| n.as_str()) == Some("default"));
                    match default
                        .and_then(|t| t.get("template"))
                        .and_then(|t| t.as_str())
                    {
                        Some(s) => (s.to_owned(), place),
                        None => return Ok(None),
                    }
                }
                _ => return Ok(None),
            }
        };
        let mut template = Self::new(&source, &place, &bos, &eos, special, date)?;
        template.named = [
            "unk_token",
            "pad_token",
            "sep_token",
            "cls_token",
            "mask_token",
        ]
        .into_iter()
        .map(|name| (name, token(name)))
        .filter(|(_, token)| !token.is_empty())
        .collect();
        Ok(Some(template))
    }
}

struct Sink {
    text: Vec<u8>,
}

impl std::io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.text.len() + bytes.len() > MAX_TEXT {
            self.text.resize(MAX_TEXT, b' ');
            return Err(std::io::Error::other("too much text"));
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn template_error(place: &str, e: &JinjaError) -> Error {
    let line = e.line().map_or_else(String::new, |l| format!(", line {l}"));
    let detail = e
        .detail()
        .map_or_else(|| e.kind().to_string(), str::to_owned);
    Error::Template {
        place: format!("{place}{line}"),
        what: detail,
        mend: "correct the template, or the conversation that it refuses".into(),
    }
}

/// Replaces `{% generation %}` tags by tags that write a mark, keeping their white-space control.
fn mark_generation(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut found = false;
    while let Some(start) = rest.find("{%") {
        // A tag in a comment is none.
        if let Some(comment) = rest[..start].find("{#") {
            let end = rest[comment..]
                .find("#}")
                .map_or(rest.len(), |n| comment + n + 2);
            out.push_str(&rest[..end]);
            rest = &rest[end..];
            continue;
        }
        // The end stands behind the beginning: `{%}` is no tag.
        let Some(len) = rest[start + 2..].find("%}") else {
            break;
        };
        let tag = &rest[start..start + len + 4];
        let inner = &tag[2..tag.len() - 2];
        let (open, inner) = inner
            .strip_prefix(['-', '+'])
            .map_or(("", inner), |i| (&tag[2..3], i));
        let (close, inner) = inner
            .strip_suffix(['-', '+'])
            .map_or(("", inner), |i| (&tag[tag.len() - 3..tag.len() - 2], i));
        out.push_str(&rest[..start]);
        match inner.trim() {
            "generation" => {
                found = true;
                out.push_str(&format!("{{%{open} if true %}}{BEGIN}{{% endif {close}%}}"));
            }
            "endgeneration" => {
                out.push_str(&format!("{{%{open} if true %}}{END}{{% endif {close}%}}"))
            }
            _ => out.push_str(tag),
        }
        rest = &rest[start + len + 4..];
    }
    out.push_str(rest);
    (out, found)
}

fn unmark(marked: &str) -> Rendered {
    let mut r = Rendered {
        text: String::with_capacity(marked.len()),
        generated: Vec::new(),
        cuts: Vec::new(),
    };
    let mut begin = None;
    for c in marked.chars() {
        match c {
            BEGIN => begin = Some(r.text.len()),
            END => r.generated.extend(begin.take().map(|b| b..r.text.len())),
            SPLIT => r.cuts.push(r.text.len()),
            c => r.text.push(c),
        }
    }
    r
}

/// Changes every text in a JSON value, and the keys of its objects.
fn each_text(v: &mut serde_json::Value, change: &impl Fn(&str) -> Result<String>) -> Result<()> {
    match v {
        serde_json::Value::String(s) => *s = change(s)?,
        serde_json::Value::Array(a) => {
            for x in a {
                each_text(x, change)?;
            }
        }
        serde_json::Value::Object(o) => {
            for (key, mut x) in std::mem::take(o) {
                each_text(&mut x, change)?;
                o.insert(change(&key)?, x);
            }
        }
        _ => {}
    }
    Ok(())
}

/// How [`dump`] writes.
struct Layout {
    indent: Option<usize>,
    item: String,
    key: String,
    ascii: bool,
    sorted: bool,
}

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, as
/// `transformers` defines the filter.
fn tojson(value: Value, kwargs: Kwargs) -> std::result::Result<String, JinjaError> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    let sorted: Option<bool> = kwargs.get("sort_keys")?;
    kwargs.assert_all_used()?;
    let bad = |what: String| JinjaError::new(ErrorKind::InvalidOperation, what);
    let (item, key) = match separators.as_deref() {
        None => (
            if indent.is_some() { "," } else { ", " }.to_owned(),
            ": ".to_owned(),
        ),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(other) => {
            return Err(bad(format!(
                "tojson: {} separators, expected 2",
                other.len()
            )));
        }
    };
    let layout = Layout {
        indent,
        item,
        key,
        ascii: ascii.unwrap_or(false),
        sorted: sorted.unwrap_or(false),
    };
    let json = serde_json::to_value(&value).map_err(|e| bad(e.to_string()))?;
    let mut out = String::new();
    dump(&json, &layout, 0, &mut out)
        .map_err(|TooLong| bad("tojson gives too much text".into()))?;
    // Marks are no control characters, so JSON leaves them as they are.
    Ok(out)
}

/// More than [`MAX_TEXT`].
struct TooLong;

fn dump(
    v: &serde_json::Value,
    layout: &Layout,
    depth: usize,
    out: &mut String,
) -> std::result::Result<(), TooLong> {
    let newline = |depth: usize, out: &mut String| {
        let Some(n) = layout.indent else {
            return Ok(());
        };
        let width = n.saturating_mul(depth);
        if out.len().saturating_add(width) > MAX_TEXT {
            return Err(TooLong);
        }
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', width));
        Ok(())
    };
    if out.len() > MAX_TEXT {
        return Err(TooLong);
    }
    match v {
        serde_json::Value::Array(a) if !a.is_empty() => {
            out.push('[');
            for (i, x) in a.iter().enumerate() {
                if i > 0 {
                    out.push_str(&layout.item);
                }
                newline(depth + 1, out)?;
                dump(x, layout, depth + 1, out)?;
            }
            newline(depth, out)?;
            out.push(']');
        }
        serde_json::Value::Object(o) if !o.is_empty() => {
            let mut entries: Vec<(&String, &serde_json::Value)> = o.iter().collect();
            if layout.sorted {
                entries.sort_by_key(|(k, _)| *k);
            }
            out.push('{');
            for (i, (k, x)) in entries.into_iter().enumerate() {
                if i > 0 {
                    out.push_str(&layout.item);
                }
                newline(depth + 1, out)?;
                quote(k, layout.ascii, out);
                out.push_str(&layout.key);
                dump(x, layout, depth + 1, out)?;
            }
            newline(depth, out)?;
            out.push('}');
        }
        serde_json::Value::String(s) => quote(s, layout.ascii, out),
        other => out.push_str(&other.to_string()),
    }
    Ok(())
}

fn quote(text: &str, ascii: bool, out: &mut String) {
    let quoted = serde_json::Value::from(text).to_string();
    for c in quoted.chars() {
        if ascii && !c.is_ascii() && c != SPLIT {
            for unit in c.encode_utf16(&mut [0; 2]) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            out.push(c);
        }
    }
}

/// The directives of a date, in English; the clock stands at midnight.
fn strftime(
    format: &str,
    (year, month, day): (i32, u32, u32),
) -> std::result::Result<String, String> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = [
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
        "Thursday",
        "Friday",
        "Saturday",
    ];
    let month_name = MONTHS
        .get((month as usize).wrapping_sub(1))
        .copied()
        .unwrap_or("");
    let weekday = DAYS[weekday(year, month, day)];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&format!("{year:04}")),
            Some('y') => out.push_str(&format!("{:02}", year.rem_euclid(100))),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('e') => out.push_str(&format!("{day:2}")),
            Some('B') => out.push_str(month_name),
            Some('b' | 'h') => out.push_str(month_name.get(..3).unwrap_or("")),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('F') => out.push_str(&format!("{year:04}-{month:02}-{day:02}")),
            Some('H' | 'M' | 'S') => out.push_str("00"),
            Some('%') => out.push('%'),
            other => {
                return Err(format!(
                    "strftime_now: the directive %{} is not supported",
                    other.map_or_else(String::new, String::from)
                ));
            }
        }
    }
    Ok(out)
}

/// Days since Sunday (Sakamoto's method).
fn weekday(year: i32, month: u32, day: u32) -> usize {
    const SHIFT: [i32; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
    let y = year - i32::from(month < 3);
    let shift = SHIFT
        .get((month as usize).wrapping_sub(1))
        .copied()
        .unwrap_or(0);
    (y + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) + shift + day as i32).rem_euclid(7)
        as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conversation::Role;

    const DATE: (i32, u32, u32) = (2024, 7, 9);

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source, "test", "<s>", "</s>", vec!["</s>".into()], DATE).unwrap()
    }

    fn messages() -> Vec<Message> {
        vec![
            Message::new(Role::User, "hi"),
            Message::new(Role::Assistant, "yo"),
        ]
    }

    #[test]
    fn generation_blocks_become_ranges() {
        let t = template(
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}|{% endif %}{% endfor %}",
        );
        let r = t.render(&messages(), false).unwrap();
        assert_eq!(r.text, "hi|yo</s>");
        assert_eq!((r.generated.len(), r.generated[0].clone()), (1, 3..9));
        assert!(t.marks_generation());
    }

    #[test]
    fn special_tokens_in_a_message_are_cut() {
        let r = template("{{ messages[0].content }}{{ eos_token }}")
            .render(&[Message::new(Role::User, "a</s>b")], false)
            .unwrap();
        assert_eq!(r.text, "a</s>b</s>");
        assert_eq!(r.cuts, [2]);
    }

    #[test]
    fn what_templates_in_the_wild_use() {
        let t = template(
            "{%- for m in messages %}{%- if loop.first %}{%- continue %}{%- endif %}{{- m['content'].strip().upper() }}{%- endfor %} {{ strftime_now('%d %b %Y') }} {{ {'a': [1, 'é']} | tojson }}",
        );
        assert_eq!(
            t.render(&messages(), false).unwrap().text,
            "YO 09 Jul 2024 {\"a\": [1, \"é\"]}"
        );
        let e = template("{{ raise_exception('no system turn') }}")
            .render(&messages(), false)
            .unwrap_err();
        assert!(e.to_string().contains("no system turn"), "{e}");
    }

    #[test]
    fn names_that_overlap_or_have_no_inside() {
        let of = |special: &[&str]| {
            let special = special.iter().map(|s| (*s).to_owned()).collect();
            ChatTemplate::new("{{ messages[0].content }}", "test", "", "", special, DATE).unwrap()
        };
        let say =
            |t: &ChatTemplate, content: &str| t.render(&[Message::new(Role::User, content)], false);
        // No part between two cuts may hold "aa".
        let r = say(&of(&["aa"]), "aaaa").unwrap();
        assert_eq!(
            (r.text.as_str(), r.cuts.as_slice()),
            ("aaaa", [1, 2, 3].as_slice())
        );
        let r = say(&of(&["<|im_start|>", "<|im"]), "<|im_start|> <|im").unwrap();
        assert_eq!(r.cuts, [1, 14]);
        let e = say(&of(&["X"]), "aXb").unwrap_err().to_string();
        assert!(e.contains("one character"), "{e}");
        let e = say(&of(&[]), "a\u{f0a13}b").unwrap_err().to_string();
        assert!(e.contains("reserved"), "{e}");
    }

    #[test]
    fn json_as_python_writes_it() {
        let of = |arguments: &str| {
            let source = format!("{{{{ {{'b': [1, 'é\"'], 'a': {{}}}} | tojson({arguments}) }}}}");
            template(&source).render(&messages(), false).unwrap().text
        };
        assert_eq!(of(""), r#"{"b": [1, "é\""], "a": {}}"#);
        assert_eq!(
            of("indent=2"),
            "{\n  \"b\": [\n    1,\n    \"é\\\"\"\n  ],\n  \"a\": {}\n}"
        );
        assert_eq!(of("separators=[',', ':']"), r#"{"b":[1,"é\""],"a":{}}"#);
        assert_eq!(
            of("ensure_ascii=true, sort_keys=true"),
            r#"{"a": {}, "b": [1, "\u00e9\""]}"#
        );
    }

    #[test]
    fn dates_by_hand() {
        // 9 July 2024 was a Tuesday, 29 February 2000 too.
        assert_eq!(
            strftime("%A %a %e %B %Y, %F %%", DATE).unwrap(),
            "Tuesday Tue  9 July 2024, 2024-07-09 %"
        );
        assert_eq!(strftime("%a %y", (2000, 2, 29)).unwrap(), "Tue 00");
        assert!(strftime("%Q", DATE).unwrap_err().contains("%Q"));
    }

    #[test]
    fn a_tag_in_a_comment_is_none() {
        let t = template(
            "{# {% generation %} and {% #}{% for m in messages %}{{ m.content }}{% endfor %}",
        );
        assert_eq!(t.render(&messages(), false).unwrap().text, "hiyo");
        assert!(!t.marks_generation());
    }

    #[test]
    fn tools_are_none_as_in_transformers() {
        let t = template("{{ tools is none }} {{ documents is not none }} {{ custom is defined }}");
        assert_eq!(
            t.render(&messages(), false).unwrap().text,
            "True False False"
        );
    }

    #[test]
    fn memory_is_bounded_too() {
        let t = template(
            "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s | length }}",
        );
        let e = t.render(&messages(), false).unwrap_err().to_string();
        assert!(e.contains("too long"), "{e}");
    }

    #[test]
    fn endless_and_broken_templates_stop() {
        let e = template("{% for a in range(100000) %}{% for b in range(100000) %}{{ a }}{% endfor %}{% endfor %}")
            .render(&messages(), false)
            .unwrap_err();
        assert!(
            e.to_string().contains("too long") || e.to_string().contains("16 MiB"),
            "{e}"
        );
        let e = ChatTemplate::new("\n{% for %}", "here", "", "", vec![], DATE).unwrap_err();
        assert!(e.to_string().contains("here, line 2"), "{e}");
    }

    #[test]
    fn products_of_lists_stop() {
        for source in [
            "{{ 8 ** 7 * messages * 6 }}",
            "{{ [messages * 1000] * 1000 * 1000 }}",
            "{% set m = messages * 9000000 %}{{ m | length }}",
        ] {
            let started = std::time::Instant::now();
            let e = template(source).render(&messages(), false).unwrap_err();
            assert!(e.to_string().contains("too long"), "{source}: {e}");
            assert!(started.elapsed().as_secs() < 20, "{source}");
        }
        let short = template("{{ [1, 'a'] * 2 }}").render(&messages(), false);
        assert_eq!(short.unwrap().text, "[1, 'a', 1, 'a']");
    }
}
