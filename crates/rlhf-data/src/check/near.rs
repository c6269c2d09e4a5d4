//! Near-duplicates by MinHash and locality-sensitive hashing.
//!
//! Invariant: deterministic, and memory per row does not depend on the length of its text: 256 bytes of
//! signature, 64 bytes of links and 16 entries of 8 bytes in a hash table, in all about 600 bytes.

use std::collections::HashMap;

use crate::text_stats::words;

/// Hash functions of a signature.
pub(super) const HASHES: usize = 128;
/// Bands of the signature; rows that agree in a whole band are compared.
const BANDS: usize = 16;
const ROWS: usize = HASHES / BANDS;
/// Words of a shingle.
const SHINGLE: usize = 5;
/// Rows of one bucket that a new row is compared with, the newest first.
const MAX_CHAIN: usize = 32;

/// The minimum of each hash function, cut to 16 bits (Li and König 2010, "b-Bit minwise hashing").
pub(super) type Signature = [u16; HASHES];

/// A 64-bit mixer (Steele, Lea and Flood 2014, SplitMix64's finaliser).
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The hash of a word: FNV-1a and then a mixer.
pub(super) fn word_hash(word: &str) -> u64 {
    let fnv = word.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    mix(fnv)
}

/// The hash of a run of words in their order.
pub(super) fn run_hash(hashes: &[u64]) -> u64 {
    hashes
        .iter()
        .fold(hashes.len() as u64, |h, w| mix(h.rotate_left(5) ^ w))
}

/// The hashes of the 5-word shingles of a text; none where it has fewer words.
pub(super) fn shingles(text: &str) -> Vec<u64> {
    let hashes: Vec<u64> = words(text).iter().map(|w| word_hash(w)).collect();
    hashes.windows(SHINGLE).map(run_hash).collect()
}

/// MinHash (Broder 1997, "On the resemblance and containment of documents"): for each function
/// h_i(x) = a_i·x + b_i mod 2⁶⁴ the least value over the set. Two sets agree in a position with a
/// probability that is their Jaccard similarity |A∩B| / |A∪B|. `None` for the empty set.
pub(super) fn signature(set: &[u64]) -> Option<Signature> {
    if set.is_empty() {
        return None;
    }
    let mut out = [0; HASHES];
    for (i, slot) in out.iter_mut().enumerate() {
        let seed = 2 * i as u64;
        let (a, b) = (mix(seed + 1) | 1, mix(seed + 2));
        let least = set
            .iter()
            .map(|x| a.wrapping_mul(*x).wrapping_add(b))
            .min()
            .unwrap_or_default();
        *slot = (mix(least) >> 48) as u16;
    }
    Some(out)
}

/// The estimated Jaccard similarity: the share of positions that agree; its standard error is at most
/// 1 / (2·√128) = 0.044.
pub(super) fn similarity(a: &Signature, b: &Signature) -> f64 {
    let same = a.iter().zip(b).filter(|(x, y)| x == y).count();
    same as f64 / HASHES as f64
}

/// The rows so far.
///
/// With 16 bands of 8 positions a pair of similarity s is compared with probability 1 − (1 − s⁸)¹⁶:
/// 0.06 at 0.5, 0.61 at 0.7, 0.95 at 0.8, 1.00 at 0.9. Rows that are near-duplicates of an earlier one
/// are not kept: the earlier one stands for them.
#[derive(Debug, Default)]
pub(super) struct NearDuplicates {
    signatures: Vec<Signature>,
    places: Vec<u64>,
    /// The next older row of the same bucket, plus one, for each band.
    older: Vec<[u32; BANDS]>,
    /// The newest row of a bucket, plus one.
    newest: HashMap<u32, u32>,
}

impl NearDuplicates {
    /// The earlier row most like `text`, with the similarity, if it reaches `threshold`; else keeps the
    /// row.
    pub(super) fn find(&mut self, text: &str, place: u64, threshold: f64) -> Option<(u64, f64)> {
        let signature = signature(&shingles(text))?;
        let mut keys = [0; BANDS];
        for (band, (key, rows)) in keys.iter_mut().zip(signature.chunks(ROWS)).enumerate() {
            let h = rows
                .iter()
                .fold(band as u64, |h, v| mix(h.rotate_left(16) ^ u64::from(*v)));
            *key = (h >> 32) as u32;
        }
        let mut best: Option<(u32, f64)> = None;
        for (band, key) in keys.iter().enumerate() {
            let mut at = self.newest.get(key).copied().unwrap_or(0);
            for _ in 0..MAX_CHAIN {
                let Some(row) = at.checked_sub(1) else { break };
                let Some(other) = self.signatures.get(row as usize) else {
                    break;
                };
                let s = similarity(&signature, other);
                let better = best.is_none_or(|(r, b)| s > b || (s == b && row < r));
                if s >= threshold && better {
                    best = Some((row, s));
                }
                at = self.older.get(row as usize).map_or(0, |o| o[band]);
            }
        }
        if let Some((row, s)) = best {
            return self.places.get(row as usize).map(|p| (*p, s));
        }
        let number = u32::try_from(self.signatures.len() + 1).ok()?;
        let mut older = [0; BANDS];
        for (link, key) in older.iter_mut().zip(keys) {
            *link = self.newest.insert(key, number).unwrap_or(0);
        }
        self.signatures.push(signature);
        self.places.push(place);
        self.older.push(older);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_is_near_the_true_similarity() {
        // Sets of 400 with a known overlap: |A∩B| = c, |A∪B| = 800 − c.
        let mut squares = 0.0;
        let mut n = 0.0;
        for c in (0..=400).step_by(20) {
            for seed in 0..5 {
                let item = |i: u64| mix((seed << 32) + i + 1);
                let a: Vec<u64> = (0..400).map(item).collect();
                let b: Vec<u64> = (400 - c..800 - c).map(item).collect();
                let truth = c as f64 / (800 - c) as f64;
                let s = similarity(&signature(&a).unwrap(), &signature(&b).unwrap());
                let error = s - truth;
                assert!(error.abs() < 0.18, "{truth} {s}");
                squares += error * error;
                n += 1.0;
            }
        }
        // The root mean square of √(s(1−s)/128) is at most 0.044.
        let rms = f64::sqrt(squares / n);
        assert!(rms < 0.045, "{rms}");
        assert!(signature(&[]).is_none());
    }

    #[test]
    fn the_same_row_is_found_whatever_its_length_and_signatures_never_change() {
        let text = |n: u64| -> String { (0..n).map(|i| format!("w{} ", mix(i) % 997)).collect() };
        let mut near = NearDuplicates::default();
        assert_eq!(near.find("four words are few", 1, 0.8), None);
        assert_eq!(near.find(&text(5), 2, 0.8), None);
        assert_eq!(near.find(&text(5_000), 3, 0.8), None);
        assert_eq!(near.find(&text(5), 4, 0.8), Some((2, 1.0)));
        assert_eq!(
            near.find(&text(5_000).to_uppercase(), 5, 0.8),
            Some((3, 1.0))
        );
        assert_eq!(near.signatures.len(), 2);
        // Pinned: a signature must be the same on every machine and in every version.
        let s = signature(&shingles("the quick brown fox jumps")).unwrap();
        assert_eq!(run_hash(&[1, 2, 3]), run_hash(&[1, 2, 3]));
        assert_ne!(run_hash(&[1, 2, 3]), run_hash(&[2, 1, 3]));
        assert_eq!(s[..2], [36281, 43554]);
    }
}
