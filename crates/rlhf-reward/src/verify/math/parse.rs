//! Answers as numbers, expressions, tuples, intervals, sets and lists.

use std::sync::LazyLock;

use regex::Regex;

use super::number::Num;
use super::tokens::{Token, tokens};
use crate::verify::fixed;

/// Brackets in brackets beyond this depth are no answer.
const DEEPEST: usize = 24;
/// Variables are read at so many points.
const POINTS: usize = 3;
/// Members that are compared in any order.
const MOST_MEMBERS: usize = 64;

/// What single letters are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Letters {
    /// Variables of an expression.
    Variables,
    /// Units, behind a number.
    Units,
}

/// An answer that was understood.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    Number {
        /// At each point where variables are read; all the same without any.
        at: [Num; POINTS],
        percent: bool,
        unit: Option<String>,
    },
    /// With its brackets, in order.
    Tuple(char, char, Vec<Answer>),
    /// In any order: sets, bare lists, unions.
    Members(Vec<Answer>),
}

impl Answer {
    pub(super) fn equals(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Number { at, percent, unit },
                Self::Number {
                    at: other_at,
                    percent: other_percent,
                    unit: other_unit,
                },
            ) => {
                if let (Some(a), Some(b)) = (unit, other_unit)
                    && a != b
                {
                    return false;
                }
                let same = |x: &[Num], y: &[Num]| x.iter().zip(y).all(|(a, b)| a.equals(*b));
                let hundredth = |x: &[Num; POINTS]| -> Option<Vec<Num>> {
                    x.iter().map(|n| n.div(Num::whole(100))).collect()
                };
                same(at, other_at)
                    || match (percent, other_percent) {
                        (true, false) => hundredth(at).is_some_and(|h| same(&h, other_at)),
                        (false, true) => hundredth(other_at).is_some_and(|h| same(at, &h)),
                        _ => false,
                    }
            }
            (Self::Tuple(o, c, a), Self::Tuple(p, d, b)) => {
                o == p && c == d && a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.equals(b))
            }
            (Self::Members(a), Self::Members(b)) => {
                // Equality to a tolerance is as good as transitive here: the first that fits is taken.
                let mut left: Vec<&Self> = b.iter().collect();
                a.len() == b.len()
                    && a.len() <= MOST_MEMBERS
                    && a.iter().all(|x| {
                        left.iter()
                            .position(|y| x.equals(y))
                            .map(|i| left.swap_remove(i))
                            .is_some()
                    })
            }
            _ => false,
        }
    }
}

/// Reads a whole answer.
pub(super) fn answer(text: &str, letters: Letters) -> Option<Answer> {
    list(&tokens(text)?, letters, 0)
}

/// Whether an answer can be read.
pub(super) fn understood(text: &str) -> bool {
    [Letters::Variables, Letters::Units]
        .into_iter()
        .any(|l| answer(text, l).is_some())
}

/// `x = 5` is 5.
fn after_equals(tokens: &[Token]) -> &[Token] {
    let at = tokens.iter().rposition(|t| *t == Token::Sign('='));
    at.map_or(tokens, |i| &tokens[i + 1..])
}

fn is_open(t: &Token) -> bool {
    matches!(t, Token::Sign('(' | '[' | '{') | Token::Brace(true))
}

fn is_close(t: &Token) -> bool {
    matches!(t, Token::Sign(')' | ']' | '}') | Token::Brace(false))
}

/// Splits where `at` holds outside of brackets.
fn split(tokens: &[Token], at: impl Fn(&Token) -> bool) -> Vec<&[Token]> {
    let (mut parts, mut from, mut depth) = (Vec::new(), 0, 0usize);
    for (i, t) in tokens.iter().enumerate() {
        if is_open(t) {
            depth += 1;
        } else if is_close(t) {
            depth = depth.saturating_sub(1);
        } else if depth == 0 && at(t) {
            parts.push(&tokens[from..i]);
            from = i + 1;
        }
    }
    parts.push(&tokens[from..]);
    parts
}

/// One answer, or several with commas between them.
fn list(tokens: &[Token], letters: Letters, depth: usize) -> Option<Answer> {
    if depth > DEEPEST {
        return None;
    }
    let mut members = Vec::new();
    for part in split(tokens, |t| matches!(t, Token::Sign(',') | Token::Union)) {
        // "1, 2, and 3" has an empty place between the comma and the word.
        if !part.is_empty() {
            members.extend(item(after_equals(part), letters, depth)?);
        }
    }
    match members.len() {
        0 => None,
        1 => members.pop(),
        _ => Some(Answer::Members(members)),
    }
}

/// One member; `±` makes two of it.
fn item(tokens: &[Token], letters: Letters, depth: usize) -> Option<Vec<Answer>> {
    if let Some(found) = bracketed(tokens, letters, depth) {
        return Some(vec![found]);
    }
    if !tokens.contains(&Token::PlusMinus) {
        return Some(vec![number(tokens, letters)?]);
    }
    ['+', '-']
        .into_iter()
        .map(|sign| {
            let one: Vec<Token> = tokens
                .iter()
                .map(|t| match t {
                    Token::PlusMinus => Token::Sign(sign),
                    t => t.clone(),
                })
                .collect();
            number(&one, letters)
        })
        .collect()
}

/// A tuple, an interval or a set: brackets around the whole, with a comma inside.
fn bracketed(tokens: &[Token], letters: Letters, depth: usize) -> Option<Answer> {
    let (open, close) = match (tokens.first()?, tokens.last()?) {
        (Token::Sign(o @ ('(' | '[')), Token::Sign(c @ (')' | ']'))) => (*o, *c),
        (Token::Brace(true), Token::Brace(false)) => ('{', '}'),
        _ => return None,
    };
    let inside = tokens.get(1..tokens.len() - 1)?;
    // The first bracket must close with the last.
    let mut level = 0i64;
    for t in inside {
        level += i64::from(is_open(t)) - i64::from(is_close(t));
        if level < 0 {
            return None;
        }
    }
    let parts = split(inside, |t| *t == Token::Sign(','));
    if parts.len() < 2 && open != '{' {
        return None;
    }
    if depth >= DEEPEST {
        return None;
    }
    let members = parts
        .into_iter()
        .map(|p| list(p, letters, depth + 1))
        .collect::<Option<Vec<_>>>()?;
    Some(if open == '{' {
        Answer::Members(members)
    } else {
        Answer::Tuple(open, close, members)
    })
}

fn number(tokens: &[Token], letters: Letters) -> Option<Answer> {
    let mut at = [Num::whole(0); POINTS];
    let (mut percent, mut unit) = (false, None);
    // "2xy" is a product; "no" is a word.
    let words = letters == Letters::Variables
        && tokens
            .iter()
            .any(|t| matches!(t, Token::Number { .. } | Token::Sign(_)));
    for (point, value) in at.iter_mut().enumerate() {
        let mut reader = Reader {
            words,
            tokens,
            at: 0,
            split: None,
            point,
            letters,
            percent: false,
            numbers: 0,
        };
        let currency = reader.currency();
        *value = reader.sum(0)?;
        let behind = reader.unit()?;
        percent = reader.percent;
        unit = currency.or(behind);
        // A unit alone is no number.
        if letters == Letters::Units && reader.numbers == 0 {
            return None;
        }
    }
    Some(Answer::Number { at, percent, unit })
}

/// Reads an expression and computes it on the way.
struct Reader<'a> {
    tokens: &'a [Token],
    at: usize,
    /// What is left of a number of which `\frac12` took a digit.
    split: Option<&'a str>,
    point: usize,
    letters: Letters,
    /// Whether short words are products of variables.
    words: bool,
    percent: bool,
    numbers: usize,
}

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<&'a Token> {
        self.tokens.get(self.at)
    }

    fn sign(&mut self, c: char) -> bool {
        let found = self.split.is_none() && self.peek() == Some(&Token::Sign(c));
        self.at += usize::from(found);
        found
    }

    fn currency(&mut self) -> Option<String> {
        // "-$5" is as good as "$-5".
        let sign = usize::from(self.peek() == Some(&Token::Sign('-')));
        let Some(Token::Currency(name)) = self.tokens.get(self.at + sign) else {
            return None;
        };
        if sign == 0 {
            self.at += 1;
        }
        Some((*name).into())
    }

    fn sum(&mut self, depth: usize) -> Option<Num> {
        if depth > DEEPEST {
            return None;
        }
        let mut sum = self.signed(depth)?;
        loop {
            let next = if self.sign('+') {
                self.term(depth)?
            } else if self.sign('-') {
                self.term(depth)?.neg()
            } else {
                return Some(sum);
            };
            sum = sum.add(next)?;
        }
    }

    fn signed(&mut self, depth: usize) -> Option<Num> {
        let mut minus = false;
        loop {
            if self.sign('-') {
                minus = !minus;
            } else if !self.sign('+') {
                break;
            }
        }
        let term = self.term(depth)?;
        Some(if minus { term.neg() } else { term })
    }

    fn term(&mut self, depth: usize) -> Option<Num> {
        let mut product = self.factor(depth)?;
        loop {
            if self.sign('*') {
                let next = self.signed_factor(depth)?;
                product = product.mul(next)?;
            } else if self.sign('/') {
                let next = self.signed_factor(depth)?;
                product = product.div(next)?;
            } else if self.begins_factor() {
                let next = self.factor(depth)?;
                product = product.mul(next)?;
            } else {
                return Some(product);
            }
        }
    }

    fn signed_factor(&mut self, depth: usize) -> Option<Num> {
        if self.sign('-') {
            return self.factor(depth).map(Num::neg);
        }
        self.factor(depth)
    }

    /// Whether a factor follows without a sign; two numbers side by side are no product.
    fn begins_factor(&self) -> bool {
        match self.peek() {
            Some(Token::Letter(_)) => self.letters == Letters::Variables,
            Some(Token::Word(w)) => self.words && w.chars().count() <= 3,
            Some(Token::Sign('(' | '{') | Token::Frac | Token::Sqrt | Token::Pi) => {
                self.split.is_none()
            }
            _ => false,
        }
    }

    fn factor(&mut self, depth: usize) -> Option<Num> {
        let mut base = self.primary(depth)?;
        if self.sign('^') {
            let power = if self.peek() == Some(&Token::Sign('{')) {
                // An empty exponent is what `^{\circ}` leaves.
                if self.tokens.get(self.at + 1) == Some(&Token::Sign('}')) {
                    self.at += 2;
                    Num::whole(1)
                } else {
                    self.primary(depth)?
                }
            } else if self.begins_power() {
                self.signed_factor(depth + 1)?
            } else {
                // `^\circ`.
                Num::whole(1)
            };
            base = base.pow(power)?;
        }
        if self.split.is_none() && self.peek() == Some(&Token::Percent) {
            self.at += 1;
            self.percent = true;
        }
        Some(base)
    }

    fn begins_power(&self) -> bool {
        matches!(
            self.peek(),
            Some(
                Token::Number { .. }
                    | Token::Letter(_)
                    | Token::Sign('-' | '(')
                    | Token::Pi
                    | Token::Frac
                    | Token::Sqrt
            )
        )
    }

    fn primary(&mut self, depth: usize) -> Option<Num> {
        if depth > DEEPEST {
            return None;
        }
        if let Some(rest) = self.split.take() {
            self.at += 1;
            self.numbers += 1;
            return Num::read(rest);
        }
        let token = self.peek()?;
        self.at += 1;
        match token {
            Token::Number { text, .. } => {
                self.numbers += 1;
                self.mixed(Num::read(text)?)
            }
            Token::Currency(_) => self.primary(depth + 1),
            Token::Pi => Num::real(std::f64::consts::PI),
            Token::Infinity => Some(Num::infinity()),
            Token::Letter('e') if self.letters == Letters::Variables => {
                Num::real(std::f64::consts::E)
            }
            Token::Letter(c) if self.letters == Letters::Variables => variable(*c, self.point),
            Token::Word(w) if self.words && w.chars().count() <= 3 => w
                .chars()
                .try_fold(Num::whole(1), |p, c| p.mul(variable(c, self.point)?)),
            Token::Sign(open @ ('(' | '{' | '[')) => {
                let value = self.sum(depth + 1)?;
                let close = match open {
                    '(' => ')',
                    '{' => '}',
                    _ => ']',
                };
                self.sign(close).then_some(value)
            }
            Token::Frac => {
                let above = self.argument(depth)?;
                let below = self.argument(depth)?;
                above.div(below)
            }
            Token::Sqrt => {
                let degree = if self.sign('[') {
                    let n = self.sum(depth + 1)?;
                    if !self.sign(']') || !n.is_whole() || !(2.0..=64.0).contains(&n.value()) {
                        return None;
                    }
                    n.value() as u32
                } else {
                    2
                };
                self.argument(depth)?.root(degree)
            }
            _ => None,
        }
    }

    /// A braced or bracketed expression, or one digit, as LaTeX's commands take it.
    fn argument(&mut self, depth: usize) -> Option<Num> {
        let text = match (self.split, self.peek()?) {
            (Some(rest), _) => rest,
            (None, Token::Number { text, .. }) => text.as_str(),
            _ => return self.primary(depth + 1),
        };
        if text.contains('.') || text.contains('e') {
            return self.primary(depth + 1);
        }
        let (digit, rest) = text.split_at_checked(1)?;
        self.numbers += 1;
        if rest.is_empty() {
            self.split = None;
            self.at += 1;
        } else {
            self.split = Some(rest);
        }
        Num::read(digit)
    }

    /// `1\frac{1}{2}` and `1 1/2`.
    fn mixed(&mut self, whole: Num) -> Option<Num> {
        let number = |t: Option<&'a Token>| match t {
            Some(Token::Number { text, spaced }) => Num::read(text)
                .filter(|n| n.is_whole())
                .map(|n| (n, *spaced)),
            _ => None,
        };
        if !whole.is_whole() {
            return Some(whole);
        }
        let next = |i: usize| self.tokens.get(self.at + i);
        match next(0) {
            Some(Token::Number { .. }) => {
                let (above, spaced) = number(next(0))?;
                let (below, _) = number(next(2))?;
                if !spaced || next(1) != Some(&Token::Sign('/')) {
                    return None;
                }
                self.at += 3;
                whole.add(above.div(below)?)
            }
            Some(Token::Frac) => {
                let plain = |i: usize| {
                    next(i) == Some(&Token::Sign('{')) && next(i + 2) == Some(&Token::Sign('}'))
                };
                if plain(1) && plain(4) {
                    let (above, below) = (number(next(2)), number(next(5)));
                    if let (Some((above, _)), Some((below, _))) = (above, below) {
                        self.at += 7;
                        return whole.add(above.div(below)?);
                    }
                }
                Some(whole)
            }
            _ => Some(whole),
        }
    }

    /// The unit behind a number; nothing when something else is there.
    #[allow(clippy::option_option, reason = "no answer, or one without a unit")]
    fn unit(&mut self) -> Option<Option<String>> {
        if self.split.is_some() {
            return None;
        }
        let rest = &self.tokens[self.at..];
        let mut unit = String::new();
        for (i, t) in rest.iter().enumerate() {
            match t {
                Token::Word(w) => unit.push_str(singular(w)),
                Token::Currency(w) => unit.push_str(w),
                Token::Letter(c)
                    if self.letters == Letters::Units && (i > 0 || UNITS.contains(*c)) =>
                {
                    unit.push(*c);
                }
                Token::Sign('/') if i > 0 => unit.push('/'),
                Token::Sign('^') if i > 0 => unit.push('^'),
                Token::Sign('(' | ')' | '{' | '}' | '*') if i > 0 => {}
                Token::Number { text, .. } if i > 0 => unit.push_str(text),
                _ => return None,
            }
            if unit.len() > 64 {
                return None;
            }
        }
        Some((!unit.is_empty()).then_some(unit))
    }
}

/// Letters that are units by themselves.
const UNITS: &str = "mgsthlLNJWVACFK";

fn singular(word: &str) -> &str {
    match word {
        "dollars" => "dollar",
        "feet" => "foot",
        "inches" => "inch",
        w if w.len() > 3 && w.ends_with('s') && !w.ends_with("ss") => &w[..w.len() - 1],
        w => w,
    }
}

/// A variable's value at a point: a number between 0.5 and 2.5 that no answer is made of.
fn variable(letter: char, point: usize) -> Option<Num> {
    let seed =
        f64::from(u32::from(letter)) * 0.618_033_988_749_894_9 + point as f64 * 0.414_213_562;
    Num::real(0.5 + 2.0 * seed.fract())
}

static WRAPPED: LazyLock<Regex> =
    LazyLock::new(|| fixed(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}"));
static DROPPED: LazyLock<Regex> =
    LazyLock::new(|| fixed(r"\\left|\\right|\\displaystyle|\\[!,;:()\[\] ]|[$*`]|\^\{?\\circ\}?"));
static SPACES: LazyLock<Regex> = LazyLock::new(|| fixed(r"[\s~]+"));
static LOOSE_SPACES: LazyLock<Regex> = LazyLock::new(|| fixed(r"\B | \B"));

/// The text that answers are compared by when they are no numbers.
pub(super) fn as_text(text: &str) -> String {
    let text = WRAPPED.replace_all(text, "$1");
    let text = text
        .replace("\\dfrac", "\\frac")
        .replace("\\tfrac", "\\frac");
    let text = DROPPED.replace_all(&text, "").to_lowercase();
    let text = SPACES.replace_all(&text, " ");
    // Between two words a space counts: "1 2" is not "12".
    let text = LOOSE_SPACES.replace_all(&text, "");
    let text = text
        .trim()
        .trim_end_matches(['.', ',', ';'])
        .trim_start_matches([':', '=']);
    // "(A)" is "A".
    let mut chars = text.chars();
    match (chars.next(), chars.next(), chars.next(), chars.next()) {
        (Some('('), Some(c), Some(')'), None) => c.to_string(),
        _ => text.to_owned(),
    }
}
