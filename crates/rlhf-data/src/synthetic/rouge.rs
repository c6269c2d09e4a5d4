//! ROUGE-L (Lin 2004): how much of two texts is the same words in the same order.

use crate::text_stats::words;

/// The F-measure of the longest common subsequence of words, 0 to 1: 2 L / (m + n), lower case, no stemming. 0 where
/// a text has no words.
#[must_use]
pub fn rouge_l(a: &str, b: &str) -> f64 {
    rouge_l_words(&words(a), &words(b))
}

/// [`rouge_l`] of texts as their [`words`].
#[must_use]
pub fn rouge_l_words(a: &[String], b: &[String]) -> f64 {
    if a.is_empty() || b.is_empty() {
        return 0.0;
    }
    2.0 * common(a, b) as f64 / (a.len() + b.len()) as f64
}

/// The length of the longest common subsequence, a row of the table at a time.
fn common(a: &[String], b: &[String]) -> usize {
    let mut row = vec![0usize; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y {
                diagonal + 1
            } else {
                above.max(row[j])
            };
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        // "police the gunman" of 4 and 4 words: 2·2/8; of the second only one word in order besides.
        assert_eq!(
            rouge_l("police killed the gunman", "police kill the gunman"),
            0.75
        );
        assert_eq!(
            rouge_l("police killed the gunman", "the gunman kill police"),
            0.5
        );
        assert_eq!(rouge_l("Write a poem!", "write a poem"), 1.0);
        assert_eq!(rouge_l("one two", "three"), 0.0);
        assert_eq!(rouge_l("", "three"), 0.0);
    }

    /// Against all subsequences.
    #[test]
    fn the_longest_of_all_common_subsequences() {
        let text = |bits: u32, n: u32| -> Vec<String> {
            (0..n).map(|i| (bits >> (2 * i) & 3).to_string()).collect()
        };
        for seed in 0..200u32 {
            let (a, b) = (text(seed * 7919, 6), text(seed * 104_729 + 3, 5));
            let longest = (0..1u32 << a.len())
                .filter(|pick| {
                    let mut rest = b.iter();
                    (0..a.len())
                        .filter(|i| pick >> i & 1 == 1)
                        .all(|i| rest.any(|y| *y == a[i]))
                })
                .map(u32::count_ones)
                .max();
            assert_eq!(Some(common(&a, &b) as u32), longest, "{a:?} {b:?}");
        }
    }
}
