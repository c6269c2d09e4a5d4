//! A tool: the policy may have sums worked out before it answers.

use rlhf_data::conversation::{Message, Role};
use rlhf_data::group::Finish;

use super::{Environment, Reply, Turn};
use crate::error::Result;

/// A pocket calculator. A turn that begins with `calc ` asks it, as in `calc 12*(3+4)`, and gets a message with
/// the result or with what is wrong; any other turn is the answer, worth 1 where it equals the text of the row's
/// `field`, white space around it left out, else 0. A turn that was cut off is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calculator {
    /// The column with the answer.
    pub field: String,
    /// Who speaks for the tool: [`Role::Tool`] where the chat template knows it.
    pub role: Role,
}

impl Environment for Calculator {
    fn name(&self) -> &str {
        "calculator"
    }

    fn step(&self, turn: &Turn<'_>) -> Result<Reply> {
        if turn.finish != Finish::Stop {
            return Ok(Reply::End(0.0));
        }
        let said = turn.said().trim();
        if let Some(sum) = said.strip_prefix("calc ") {
            let result = evaluate(sum).map_or_else(|what| format!("error: {what}"), shown);
            return Ok(Reply::Messages(vec![Message::new(self.role, result)]));
        }
        let answer = turn.prompt.fields.get(&self.field).and_then(|v| v.as_str());
        let answer = answer.ok_or_else(|| crate::Error::Argument {
            op: "calculator",
            what: format!(
                "row {} has no text in `{}`; name the column with the answer",
                turn.prompt.row, self.field
            ),
        })?;
        Ok(Reply::End(f64::from(u8::from(said == answer.trim()))))
    }
}

/// A number as a person writes it: whole numbers without a point, others to ten places at most.
fn shown(x: f64) -> String {
    let text = format!("{x:.10}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" {
        "0".into()
    } else {
        text.into()
    }
}

/// How deep brackets and signs may lie.
const DEEPEST: usize = 50;

/// The value of a sum of decimal numbers with `+ - * /`, signs and brackets.
///
/// # Errors
/// What is wrong with it, in a few words.
pub fn evaluate(text: &str) -> std::result::Result<f64, String> {
    let mut reader = Reader {
        rest: text.trim_start(),
        depth: 0,
    };
    let value = reader.sum()?;
    match reader.rest.chars().next() {
        Some(c) => Err(format!("`{c}` was not expected")),
        None if value.is_finite() => Ok(value),
        None => Err("the result is too large".into()),
    }
}

struct Reader<'a> {
    /// Never begins with white space.
    rest: &'a str,
    depth: usize,
}

impl Reader<'_> {
    fn eat(&mut self, c: char) -> bool {
        let found = self.rest.strip_prefix(c);
        if let Some(rest) = found {
            self.rest = rest.trim_start();
        }
        found.is_some()
    }

    fn sum(&mut self) -> std::result::Result<f64, String> {
        let mut value = self.product()?;
        loop {
            if self.eat('+') {
                value += self.product()?;
            } else if self.eat('-') {
                value -= self.product()?;
            } else {
                return Ok(value);
            }
        }
    }

    fn product(&mut self) -> std::result::Result<f64, String> {
        let mut value = self.factor()?;
        loop {
            if self.eat('*') {
                value *= self.factor()?;
            } else if self.eat('/') {
                let by = self.factor()?;
                if by == 0.0 {
                    return Err("division by 0".into());
                }
                value /= by;
            } else {
                return Ok(value);
            }
        }
    }

    fn factor(&mut self) -> std::result::Result<f64, String> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err("too many brackets".into());
        }
        let value = if self.eat('-') {
            -self.factor()?
        } else if self.eat('(') {
            let inner = self.sum()?;
            if !self.eat(')') {
                return Err("a bracket is not closed".into());
            }
            inner
        } else {
            self.number()?
        };
        self.depth -= 1;
        Ok(value)
    }

    fn number(&mut self) -> std::result::Result<f64, String> {
        let end = self
            .rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(self.rest.len());
        let (digits, rest) = self.rest.split_at(end);
        let value = digits.parse().map_err(|_| match self.rest.chars().next() {
            Some(_) if !digits.is_empty() => format!("`{digits}` is no number"),
            Some(c) => format!("`{c}` was not expected"),
            None => "a number is missing".into(),
        })?;
        self.rest = rest.trim_start();
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_worked_out() {
        for (text, value) in [
            ("2+3*4", "14"),
            (" ( 2 + 3 ) * 4 ", "20"),
            ("10-4-3", "3"),
            ("24/4/3", "2"),
            ("-(2-5)*--2", "6"),
            ("1/3", "0.3333333333"),
            ("0.1+0.2", "0.3"),
            ("0-0", "0"),
            ("49+49", "98"),
        ] {
            assert_eq!(evaluate(text).map(shown), Ok(value.into()), "{text}");
        }
    }

    #[test]
    fn what_is_no_sum_is_said() {
        let huge = "9".repeat(400);
        let deep = "(".repeat(1000);
        for (text, word) in [
            ("", "missing"),
            ("2+", "missing"),
            ("2 3", "`3`"),
            ("2+x", "`x`"),
            ("1.2.3", "1.2.3"),
            ("(1+2", "not closed"),
            ("1/0", "division by 0"),
            ("1/(2-2)", "division by 0"),
            (huge.as_str(), "too large"),
            (deep.as_str(), "brackets"),
        ] {
            let e = evaluate(text).unwrap_err();
            assert!(e.contains(word), "{text}: {e}");
        }
    }
}
