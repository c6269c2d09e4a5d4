//! Plain statistics of texts: words, sentences, distinct n-grams.
//!
//! A word is a run of letters, digits or apostrophes, compared in lower case. Knows nothing of
//! tokens: these numbers are the same whatever the tokenizer.

use std::collections::HashSet;

/// The words of `text`, in lower case.
#[must_use]
pub fn words(text: &str) -> Vec<String> {
    text.split(|c: char| !(c.is_alphanumeric() || c == '\''))
        .map(|word| word.trim_matches('\'').to_lowercase())
        .filter(|word| !word.is_empty())
        .collect()
}

/// How many words `text` has.
#[must_use]
pub fn word_count(text: &str) -> usize {
    words(text).len()
}

/// The sentences of `text`, each as its words; `.`, `!`, `?` and line ends separate sentences.
#[must_use]
pub fn sentences(text: &str) -> Vec<Vec<String>> {
    text.split(['.', '!', '?', '\n'])
        .map(words)
        .filter(|sentence| !sentence.is_empty())
        .collect()
}

/// distinct-n (Li et al. 2016, "A diversity-promoting objective function"): different word n-grams
/// over all word n-grams of the whole collection; n-grams do not cross texts.
///
/// In (0, 1]; 0 where no text has `n` words or `n` is 0. It falls as a collection grows, so compare
/// only collections of equal size.
#[must_use]
pub fn distinct_n<T: AsRef<str>>(texts: &[T], n: usize) -> f64 {
    if n == 0 {
        return 0.0;
    }
    let mut all = 0usize;
    let mut seen: HashSet<Vec<String>> = HashSet::new();
    for text in texts {
        for gram in words(text.as_ref()).windows(n) {
            all += 1;
            if !seen.contains(gram) {
                seen.insert(gram.to_vec());
            }
        }
    }
    if all == 0 {
        0.0
    } else {
        seen.len() as f64 / all as f64
    }
}

/// Whether some run of `n` words occurs twice within `text`.
#[must_use]
pub fn repeats_run(text: &str, n: usize) -> bool {
    if n == 0 {
        return false;
    }
    let words = words(text);
    let mut seen: HashSet<&[String]> = HashSet::new();
    words.windows(n).any(|run| !seen.insert(run))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_lower_case_without_punctuation() {
        assert_eq!(words("Hi Anna, it's K48!"), ["hi", "anna", "it's", "k48"]);
        assert_eq!(word_count(" ... "), 0);
        assert_eq!(sentences("One two. Three! \n four?").len(), 3);
    }

    #[test]
    fn distinct_n_by_hand() {
        // Bigrams: a b | b a | a b  and  a b: four, two different.
        assert!((distinct_n(&["a b a b", "a b"], 2) - 0.5).abs() < 1e-12);
        // Unigrams: six, two different.
        assert!((distinct_n(&["a b a b", "a b"], 1) - 2.0 / 6.0).abs() < 1e-12);
        // No n-gram crosses from one text to the next.
        assert_eq!(distinct_n(&["a", "b"], 2), 0.0);
        assert_eq!(distinct_n(&["a b"], 0), 0.0);
        assert_eq!(distinct_n::<&str>(&[], 2), 0.0);
    }

    #[test]
    fn repeated_runs() {
        assert!(repeats_run("we will help you. And we will help you", 4));
        assert!(!repeats_run("we will help you and we will help him", 4));
        assert!(!repeats_run("a a", 0));
    }
}
