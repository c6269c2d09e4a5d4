//! The language that a completion is written in, told by its trigrams and scripts (`whatlang`).

use serde::{Deserialize, Serialize};
use whatlang::{Lang, detect};

use super::words::words;
use super::{Sample, Verdict, Verifier, bad};
use crate::error::Result;

/// No more of a text is looked at.
const ENOUGH: usize = 16 * 1024;

/// Whether a completion is written in a language.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Language {
    /// Its code, in two letters (ISO 639-1) or three (639-3).
    pub language: String,
}

/// A language that can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tongue {
    Known(Lang),
    /// Swahili, which `whatlang` does not know.
    Swahili,
}

/// Two-letter codes of the languages that `whatlang` names by three.
const CODES: &[(&str, &str)] = &[
    ("af", "afr"),
    ("ak", "aka"),
    ("am", "amh"),
    ("ar", "ara"),
    ("az", "aze"),
    ("be", "bel"),
    ("bg", "bul"),
    ("bn", "ben"),
    ("ca", "cat"),
    ("cs", "ces"),
    ("cy", "cym"),
    ("da", "dan"),
    ("de", "deu"),
    ("el", "ell"),
    ("en", "eng"),
    ("eo", "epo"),
    ("es", "spa"),
    ("et", "est"),
    ("fa", "pes"),
    ("fi", "fin"),
    ("fr", "fra"),
    ("gu", "guj"),
    ("he", "heb"),
    ("hi", "hin"),
    ("hr", "hrv"),
    ("hu", "hun"),
    ("hy", "hye"),
    ("id", "ind"),
    ("it", "ita"),
    ("ja", "jpn"),
    ("jv", "jav"),
    ("ka", "kat"),
    ("km", "khm"),
    ("kn", "kan"),
    ("ko", "kor"),
    ("la", "lat"),
    ("lt", "lit"),
    ("lv", "lav"),
    ("mk", "mkd"),
    ("ml", "mal"),
    ("mr", "mar"),
    ("my", "mya"),
    ("nb", "nob"),
    ("ne", "nep"),
    ("nl", "nld"),
    ("no", "nob"),
    ("or", "ori"),
    ("pa", "pan"),
    ("pl", "pol"),
    ("pt", "por"),
    ("ro", "ron"),
    ("ru", "rus"),
    ("si", "sin"),
    ("sk", "slk"),
    ("sl", "slv"),
    ("sn", "sna"),
    ("sr", "srp"),
    ("sv", "swe"),
    ("ta", "tam"),
    ("te", "tel"),
    ("th", "tha"),
    ("tk", "tuk"),
    ("tl", "tgl"),
    ("tr", "tur"),
    ("uk", "ukr"),
    ("ur", "urd"),
    ("uz", "uzb"),
    ("vi", "vie"),
    ("yi", "yid"),
    ("zh", "cmn"),
    ("zu", "zul"),
];

/// Swahili's commonest words.
const SWAHILI: &[&str] = &[
    "na", "ya", "wa", "kwa", "ni", "katika", "la", "za", "kuwa", "hii", "hiyo", "cha", "kama",
    "si", "yake", "huo", "lakini", "pia", "watu", "mtu", "sana", "kila", "yangu", "wewe", "mimi",
    "hapa", "nini", "siku",
];

impl Tongue {
    /// By its code.
    pub(super) fn named(code: &str) -> Option<Self> {
        let code = code.to_lowercase();
        if code == "sw" || code == "swa" || code == "swh" {
            return Some(Self::Swahili);
        }
        let two = code.split(['-', '_']).next().unwrap_or(&code);
        let three = CODES
            .iter()
            .find(|(a, _)| *a == two)
            .map_or(two, |(_, b)| b);
        Lang::from_code(three).map(Self::Known)
    }

    /// The likeliest language of a text; none of one without letters.
    pub(super) fn of(text: &str) -> Option<Self> {
        let mut end = text.len().min(ENOUGH);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let lower = text[..end].to_lowercase();
        let found = detect(&lower)?;
        if found.script() == whatlang::Script::Latin {
            let (mut all, mut common) = (0usize, 0usize);
            for word in words(&lower) {
                all += 1;
                common += usize::from(SWAHILI.contains(&word));
            }
            // Romance languages share a few of them, far from a fifth of all words.
            if common * 5 >= all && common > 1 {
                return Some(Self::Swahili);
            }
        }
        Some(Self::Known(found.lang()))
    }

    fn name(self) -> &'static str {
        match self {
            Self::Known(lang) => lang.eng_name(),
            Self::Swahili => "Swahili",
        }
    }
}

#[derive(Debug)]
struct Asked(Tongue);

impl Language {
    pub(crate) fn build(&self) -> Result<impl Verifier + use<>> {
        Tongue::named(&self.language).map(Asked).ok_or_else(|| {
            bad(
                "language",
                format!(
                    "`language`: `{}` is none that can be told; use a code such as \"en\"",
                    self.language
                ),
            )
        })
    }
}

impl Verifier for Asked {
    fn name(&self) -> &str {
        "language"
    }

    fn verify(&self, sample: &Sample<'_>) -> Result<Verdict> {
        let found = Tongue::of(sample.completion);
        let name = found.map_or("no language", Tongue::name);
        Ok(Verdict::of(found == Some(self.0), name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_known_and_languages_are_told_apart() {
        for (two, three) in CODES {
            assert!(Tongue::named(two).is_some(), "{two} {three}");
        }
        assert_eq!(Tongue::named("zh-CN"), Tongue::named("cmn"));
        assert_eq!(Tongue::named("xx"), None);
        for (code, text) in [
            (
                "en",
                "The weather is lovely today and we are going to the sea.",
            ),
            ("de", "Heute ist das Wetter schön und wir fahren ans Meer."),
            ("fr", "Il fait beau aujourd'hui et nous allons à la mer."),
            (
                "es",
                "Hoy hace buen tiempo y vamos a la playa con los niños.",
            ),
            (
                "it",
                "Oggi il tempo è bello e andiamo al mare con i bambini.",
            ),
            (
                "pt",
                "Hoje o tempo está bom e nós vamos à praia com as crianças.",
            ),
            ("ru", "Сегодня прекрасная погода, и мы едем на море."),
            ("hi", "आज मौसम बहुत अच्छा है और हम समुद्र तट पर जा रहे हैं।"),
            ("ja", "今日は天気がいいので、海に行きます。"),
            ("ko", "오늘은 날씨가 좋아서 바다에 갑니다."),
            (
                "sw",
                "Leo hali ya hewa ni nzuri sana na tunaenda baharini kwa watoto.",
            ),
        ] {
            assert_eq!(Tongue::of(text), Tongue::named(code), "{text}");
        }
        assert_eq!(Tongue::of("12 34"), None);
        let unknown = Language {
            language: "klingon".into(),
        };
        assert!(
            unknown
                .build()
                .err()
                .unwrap()
                .to_string()
                .contains("klingon")
        );
    }
}
