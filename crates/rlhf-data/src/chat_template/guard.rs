//! What a template may not do: build expressions or values so deep that walking them ends the stack.
//!
//! Jinja's own limits do not reach there: a chain of a thousand `~` is no loop, and a namespace may take
//! itself into a list again and again. So long tags are refused before they are compiled, and what a
//! `set` keeps goes through a filter that measures it.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, Output, State};

/// Bytes of a template.
const MAX_SOURCE: usize = 1 << 20;
/// Words and signs of one tag, each of which may be one more level.
const MAX_WORDS: usize = 1000;
/// `elif` tags: each stands within the one before.
const MAX_ELIF: usize = 200;
/// Levels of lists and maps in a value.
const MAX_DEPTH: usize = 32;
/// Items that may be looked at in one rendering.
const MAX_VISITS: u64 = 1_000_000;
/// The filter's name, and that of its count.
pub(super) const FILTER: &str = "__kept";

/// A tag: what stands between its signs, and where.
struct Tag {
    start: usize,
    end: usize,
    words: usize,
    block: bool,
}

/// The template with the filter in its `set` tags; the error is what is wrong with it.
pub(super) fn guard(source: &str) -> Result<String, String> {
    if source.len() > MAX_SOURCE {
        return Err(format!("a template of more than {} KiB", MAX_SOURCE >> 10));
    }
    let mut out = String::with_capacity(source.len());
    let (mut at, mut copied, mut elif) = (0, 0, 0);
    while let Some(tag) = next_tag(source, at) {
        at = tag.end;
        if tag.words > MAX_WORDS {
            let line = 1 + source[..tag.start].matches('\n').count();
            let what = format!("a tag of {} words and signs", tag.words);
            return Err(format!("line {line}: {what}, the limit is {MAX_WORDS}"));
        }
        let inner = &source[tag.start..tag.end];
        let word = inner.trim_start();
        elif += usize::from(tag.block && word.starts_with("elif"));
        if elif > MAX_ELIF {
            return Err(format!("more than {MAX_ELIF} `elif`"));
        }
        let set = word
            .strip_prefix("set")
            .filter(|rest| rest.starts_with(char::is_whitespace));
        // The first `=` assigns; a block `set` has none but in a filter's arguments, and keeps text.
        if let Some(target) = set
            .and_then(|rest| rest.split_once('='))
            .map(|(target, _)| target)
            .filter(|target| !target.contains('|'))
            && tag.block
        {
            let equals = tag.end - word.len() + "set".len() + target.len() + 1;
            if source[equals..tag.end].trim().is_empty() {
                continue;
            }
            out.push_str(&source[copied..equals]);
            // No line more and no line less: errors name lines.
            out.push_str(" (");
            out.push_str(&source[equals..tag.end]);
            out.push_str(&format!(")|{FILTER}({}) ", target.contains('.')));
            copied = tag.end;
        }
    }
    out.push_str(&source[copied..]);
    Ok(out)
}

/// The next tag from `at`, as the lexer sees it: strings hide its end, and so do open brackets.
fn next_tag(source: &str, mut at: usize) -> Option<Tag> {
    let bytes = source.as_bytes();
    loop {
        at += source[at..].find('{')?;
        match bytes.get(at + 1) {
            Some(b'#') => at += 2 + source[at + 2..].find("#}")? + 2,
            Some(b'%') => match raw(&source[at + 2..]) {
                Some(skip) => at += 2 + skip?,
                None => return tag(source, at + 2, b"%}"),
            },
            Some(b'{') => return tag(source, at + 2, b"}}"),
            _ => at += 1,
        }
    }
}

/// For a tag that opens raw text: what follows the name of the one that closes it.
fn raw(inner: &str) -> Option<Option<usize>> {
    let bare = |s: &str| s.strip_prefix(['-', '+']).unwrap_or(s).trim_start().len();
    let rest = inner[inner.len() - bare(inner)..]
        .strip_prefix("raw")?
        .trim_start();
    rest.strip_prefix(['-', '+'])
        .unwrap_or(rest)
        .strip_prefix("%}")?;
    let mut at = inner.len() - rest.len();
    while let Some(n) = inner[at..].find("{%") {
        at += n + 2;
        let left = bare(&inner[at..]);
        if inner[inner.len() - left..].starts_with("endraw") {
            return Some(Some(inner.len() - left + "endraw".len()));
        }
    }
    Some(None)
}

fn tag(source: &str, mut at: usize, close: &[u8]) -> Option<Tag> {
    let bytes = source.as_bytes();
    if matches!(bytes.get(at), Some(b'-' | b'+')) {
        at += 1;
    }
    let start = at;
    let (mut open, mut words, mut in_word) = (0_isize, 0, false);
    while let Some(&b) = bytes.get(at) {
        let end = bytes[at..].starts_with(close)
            || (matches!(b, b'-' | b'+') && bytes[at + 1..].starts_with(close));
        if open == 0 && end {
            let block = close == b"%}";
            return Some(Tag {
                start,
                end: at,
                words,
                block,
            });
        }
        let letter = b.is_ascii_alphanumeric() || b == b'_' || !b.is_ascii();
        let goes_on = b.is_ascii_whitespace() || (letter && in_word);
        words += usize::from(!goes_on);
        in_word = letter;
        match b {
            b'"' | b'\'' => {
                at += 1;
                while *bytes.get(at)? != b {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
            }
            b'(' | b'[' | b'{' => open += 1,
            b')' | b']' | b'}' => open -= 1,
            _ => {}
        }
        at += 1;
    }
    None
}

/// What a `set` keeps: no deeper than [`MAX_DEPTH`], and a plain list where it was computed lazily. A
/// namespace is kept by a name alone, not within a value: it could hold itself.
pub(super) fn kept(state: &mut State, value: Value, within: bool) -> Result<Value, Error> {
    let value = match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            // One item more than may be looked at is enough to be refused.
            let items = value.try_iter()?.take(MAX_VISITS as usize + 1);
            Value::from(items.collect::<Vec<_>>())
        }
        _ => value,
    };
    measure(state, &value, within)?;
    Ok(value)
}

/// Writes what a tag gives. Writing goes over a whole list even where nothing more can be written, and a
/// product of lists can be long, so that is looked at before.
pub(super) fn write(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    if value.as_object().is_some() {
        measure(state, value, false)?;
    }
    minijinja::escape_formatter(out, state, value)
}

/// Visits a value's items, and theirs.
fn measure(state: &mut State, value: &Value, within: bool) -> Result<(), Error> {
    let bad = |what: &str| Error::new(ErrorKind::InvalidOperation, what.to_owned());
    let count = state.get_temp(FILTER).and_then(|n| u64::try_from(n).ok());
    let mut count = count.unwrap_or_default();
    let mut left = vec![(value.clone(), usize::from(within))];
    while let Some((value, depth)) = left.pop() {
        if depth > MAX_DEPTH {
            return Err(bad("a value is nested too deeply"));
        }
        let object = value.as_object();
        if depth > 0 && object.is_some_and(|o| o.type_name().ends_with("::Namespace")) {
            return Err(bad("a namespace stands within a value"));
        }
        let map = value.kind() == ValueKind::Map;
        if !map && !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
            continue;
        }
        for item in value.try_iter()? {
            count += 1;
            if count > MAX_VISITS {
                return Err(Error::from(ErrorKind::OutOfFuel));
            }
            let item = if map { value.get_item(&item)? } else { item };
            if item.as_object().is_some() {
                left.push((item, depth + 1));
            }
        }
    }
    state.set_temp(FILTER, Value::from(count));
    Ok(())
}

/// Whether a format of `str.format` asks for more width than any text has.
pub(super) fn is_wide(format: &str) -> bool {
    let mut digits = 0;
    format.chars().any(|c| {
        digits = if c.is_ascii_digit() { digits + 1 } else { 0 };
        digits > 4
    })
}
