//! An answer's characters and LaTeX commands as tokens.

/// Longer answers are compared as text.
const LONGEST: usize = 1024;

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    /// Digits, a point, an exponent; thousands separators are gone. `spaced` tells whether a space stands
    /// before it.
    Number { text: String, spaced: bool },
    /// A word of several letters, or the content of `\text{…}`.
    Word(String),
    /// One letter.
    Letter(char),
    /// `\frac` and kin.
    Frac,
    /// `\sqrt`.
    Sqrt,
    /// π.
    Pi,
    /// ∞.
    Infinity,
    /// `\pm`.
    PlusMinus,
    /// A currency's sign, as a word.
    Currency(&'static str),
    /// `%`.
    Percent,
    /// `\cup`.
    Union,
    /// `\{` and `\}`.
    Brace(bool),
    /// + − * / ^ ( ) [ ] { } , = and nothing else.
    Sign(char),
}

/// The tokens, or nothing when the text holds what no answer does.
pub(super) fn tokens(text: &str) -> Option<Vec<Token>> {
    if text.len() > LONGEST {
        return None;
    }
    Lexer {
        chars: text.chars().collect(),
        at: 0,
        depth: 0,
        out: Vec::new(),
    }
    .run()
}

struct Lexer {
    chars: Vec<char>,
    at: usize,
    /// Open brackets: a comma inside of them separates.
    depth: usize,
    out: Vec<Token>,
}

impl Lexer {
    fn peek(&self, ahead: usize) -> Option<char> {
        self.chars.get(self.at + ahead).copied()
    }

    fn starts(&self, what: &str) -> bool {
        what.chars()
            .enumerate()
            .all(|(i, c)| self.peek(i) == Some(c))
    }

    fn push(&mut self, token: Token) {
        self.out.push(token);
    }

    fn sign(&mut self, c: char) {
        match c {
            '(' | '[' => self.depth += 1,
            ')' | ']' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        self.push(Token::Sign(c));
    }

    fn run(mut self) -> Option<Vec<Token>> {
        let mut spaced = false;
        while let Some(c) = self.peek(0) {
            let was_spaced = std::mem::take(&mut spaced);
            match c {
                '\\' => self.command()?,
                '0'..='9' => self.number(was_spaced),
                '.' if self.peek(1).is_some_and(|c| c.is_ascii_digit()) => self.number(was_spaced),
                '{' if self.starts("{,}") => self.at += 3,
                _ if c.is_whitespace() || c == '~' => {
                    spaced = true;
                    self.at += 1;
                }
                _ if c.is_alphabetic() && c != 'π' && c != '∞' => self.word(),
                _ => {
                    self.at += 1;
                    self.single(c)?;
                }
            }
        }
        Some(self.out)
    }

    fn single(&mut self, c: char) -> Option<()> {
        match c {
            '$' => {
                // A dollar before a digit at the beginning is money, others are LaTeX's.
                if self.out.is_empty()
                    && self.peek(0).is_some_and(|c| c.is_ascii_digit() || c == '.')
                    && !self.chars[self.at..].contains(&'$')
                {
                    self.push(Token::Currency("dollar"));
                }
            }
            '€' => self.push(Token::Currency("euro")),
            '£' => self.push(Token::Currency("pound")),
            '¥' => self.push(Token::Currency("yen")),
            '%' => self.push(Token::Percent),
            '−' | '–' | '-' => self.sign('-'),
            '×' | '·' | '⋅' | '*' => self.sign('*'),
            '÷' | '/' => self.sign('/'),
            '+' | '^' | '(' | ')' | '[' | ']' | '{' | '}' | ',' | '=' => self.sign(c),
            ';' => self.sign(','),
            '±' => self.push(Token::PlusMinus),
            '√' => {
                self.push(Token::Sqrt);
                // Unlike LaTeX's command it takes the whole number.
                if self.is_digit(0) {
                    self.push(Token::Sign('{'));
                    self.number(false);
                    self.push(Token::Sign('}'));
                }
            }
            'π' => self.push(Token::Pi),
            '∞' => self.push(Token::Infinity),
            '∪' => self.push(Token::Union),
            '°' | '.' | '!' | '`' => {
                // A full stop may end an answer; a factorial is none that is read.
                if c == '!' || (c == '.' && self.at < self.chars.len()) {
                    return None;
                }
            }
            '²' => self.power('2'),
            '³' => self.power('3'),
            '½' => self.vulgar("1", "2"),
            '⅓' => self.vulgar("1", "3"),
            '⅔' => self.vulgar("2", "3"),
            '¼' => self.vulgar("1", "4"),
            '¾' => self.vulgar("3", "4"),
            _ => return None,
        }
        Some(())
    }

    fn power(&mut self, digit: char) {
        self.push(Token::Sign('^'));
        self.digits(&digit.to_string());
    }

    fn digits(&mut self, text: &str) {
        self.push(Token::Number {
            text: text.into(),
            spaced: false,
        });
    }

    fn vulgar(&mut self, above: &str, below: &str) {
        self.push(Token::Frac);
        for part in [above, below] {
            self.push(Token::Sign('{'));
            self.digits(part);
            self.push(Token::Sign('}'));
        }
    }

    fn is_digit(&self, ahead: usize) -> bool {
        self.peek(ahead).is_some_and(|c| c.is_ascii_digit())
    }

    fn number(&mut self, spaced: bool) {
        let mut text = String::new();
        let mut grouped = false;
        while let Some(c) = self.peek(0) {
            if c.is_ascii_digit() {
                text.push(c);
                self.at += 1;
            } else if let Some(skip) = self.separator(text.len(), grouped) {
                grouped = true;
                self.at += skip;
            } else {
                break;
            }
        }
        if self.peek(0) == Some('.') && self.is_digit(1) {
            text.push('.');
            self.at += 1;
            while self.is_digit(0) {
                text.extend(self.peek(0));
                self.at += 1;
            }
        } else if self.peek(0) == Some('.')
            && !text.is_empty()
            && self.peek(1).is_some_and(char::is_whitespace)
        {
            // "5. " is five and a full stop, or "5." before a unit.
            self.at += 1;
        }
        let signed = matches!(self.peek(1), Some('+' | '-'));
        if matches!(self.peek(0), Some('e' | 'E')) && self.is_digit(1 + usize::from(signed)) {
            text.push('e');
            self.at += 1;
            if signed {
                text.extend(self.peek(0));
                self.at += 1;
            }
            while self.is_digit(0) {
                text.extend(self.peek(0));
                self.at += 1;
            }
        }
        self.push(Token::Number { text, spaced });
    }

    /// How many characters a thousands separator takes here, when there is one: three digits and no more
    /// follow it.
    fn separator(&self, digits: usize, grouped: bool) -> Option<usize> {
        let three = |n: usize| (0..3).all(|i| self.is_digit(n + i)) && !self.is_digit(n + 3);
        if digits == 0 || (digits > 3 && !grouped) {
            return None;
        }
        for mark in ["{,}", ",\\!", "\\,"] {
            if self.starts(mark) && three(mark.chars().count()) {
                return Some(mark.chars().count());
            }
        }
        (self.depth == 0 && self.starts(",") && three(1)).then_some(1)
    }

    fn word(&mut self) {
        let mut word = String::new();
        while let Some(c) = self.peek(0) {
            let inside = (c == '\'' || c == '-') && self.peek(1).is_some_and(char::is_alphabetic);
            if !(c.is_alphabetic() || (inside && word.len() > 1)) {
                break;
            }
            word.push(c);
            self.at += 1;
        }
        self.named(&word);
    }

    fn named(&mut self, word: &str) {
        let mut chars = word.chars();
        let token = match word.to_lowercase().as_str() {
            "pi" => Token::Pi,
            "sqrt" => Token::Sqrt,
            "infinity" | "inf" => Token::Infinity,
            "percent" => Token::Percent,
            "and" | "or" => Token::Sign(','),
            "degrees" | "degree" => return,
            _ => match (chars.next(), chars.next()) {
                (Some(c), None) => Token::Letter(c),
                _ => Token::Word(word.to_lowercase()),
            },
        };
        self.push(token);
    }

    fn command(&mut self) -> Option<()> {
        self.at += 1;
        let c = self.peek(0)?;
        if !c.is_ascii_alphabetic() {
            self.at += 1;
            match c {
                '{' => {
                    self.depth += 1;
                    self.push(Token::Brace(true));
                }
                '}' => {
                    self.depth = self.depth.saturating_sub(1);
                    self.push(Token::Brace(false));
                }
                '$' => self.push(Token::Currency("dollar")),
                '%' => self.push(Token::Percent),
                // Spaces, and the ends of inline mathematics.
                '!' | ',' | ';' | ':' | ' ' | '(' | ')' | '[' | ']' => {}
                _ => return None,
            }
            return Some(());
        }
        let mut name = String::new();
        while let Some(c) = self.peek(0).filter(char::is_ascii_alphabetic) {
            name.push(c);
            self.at += 1;
        }
        match name.as_str() {
            "frac" | "dfrac" | "tfrac" | "cfrac" => self.push(Token::Frac),
            "sqrt" => self.push(Token::Sqrt),
            "pi" => self.push(Token::Pi),
            "infty" => self.push(Token::Infinity),
            "cdot" | "times" | "ast" => self.sign('*'),
            "div" => self.sign('/'),
            "pm" => self.push(Token::PlusMinus),
            "cup" => self.push(Token::Union),
            "lbrace" => self.push(Token::Brace(true)),
            "rbrace" => self.push(Token::Brace(false)),
            "left" | "right" | "displaystyle" | "quad" | "qquad" | "big" | "Big" | "bigl"
            | "bigr" | "circ" | "degree" | "boxed" => {}
            "text" | "textbf" | "textrm" | "textit" | "mathrm" | "mathbf" | "mbox" | "rm"
            | "operatorname" => self.wrapped()?,
            _ => return None,
        }
        Some(())
    }

    /// The words of `\text{…}`.
    fn wrapped(&mut self) -> Option<()> {
        while self.peek(0).is_some_and(char::is_whitespace) {
            self.at += 1;
        }
        if self.peek(0) != Some('{') {
            return None;
        }
        let end = self.chars[self.at..].iter().position(|&c| c == '}')? + self.at;
        let inside: String = self.chars[self.at + 1..end].iter().collect();
        self.at = end + 1;
        for word in inside.split(|c: char| !c.is_alphabetic()) {
            if !word.is_empty() {
                self.named(word);
            }
        }
        Some(())
    }
}
