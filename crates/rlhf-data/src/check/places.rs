//! Places of rows as numbers, so that remembering one costs eight bytes.

/// Bits of a row's number; the rest says what stands before it.
const ROW_BITS: u32 = 40;

/// What stands before the numbers of places: `line`, `row`, `part.jsonl, line`.
#[derive(Debug, Default)]
pub(super) struct Places(Vec<String>);

impl Places {
    /// A place such as `part.jsonl, line 4` as a number.
    pub(super) fn number(&mut self, place: &str) -> u64 {
        let (before, number) = place.rsplit_once(' ').unwrap_or((place, ""));
        let number: u64 = number.parse().unwrap_or_default();
        // Files come one after the other.
        if self.0.last().is_none_or(|last| last != before) {
            self.0.push(before.to_owned());
        }
        ((self.0.len() as u64 - 1) << ROW_BITS) | (number & ((1 << ROW_BITS) - 1))
    }

    /// The place of a number.
    pub(super) fn name(&self, number: u64) -> String {
        let before = self.0.get((number >> ROW_BITS) as usize);
        let before = before.map(String::as_str).unwrap_or_default();
        format!("{before} {}", number & ((1 << ROW_BITS) - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_name_their_places() {
        let all = [
            "line 4",
            "a b.jsonl, line 1",
            "a b.jsonl, line 900000000000",
            "c.csv, row 0",
        ];
        let mut places = Places::default();
        let numbers = all.map(|p| places.number(p));
        assert_eq!(numbers.map(|n| places.name(n)), all);
    }
}
