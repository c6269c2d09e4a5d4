//! The whole page: its sections in order, and the way to them.

use super::html::escape;
use super::{Material, behind, results, rewards, samples, training, training_samples, verdict};

const STYLE: &str = include_str!("style.css");

/// A section that has something to show.
#[derive(Clone, Debug)]
pub(crate) struct Section {
    /// Its anchor.
    pub(crate) id: String,
    /// Its heading.
    pub(crate) title: String,
    /// Its inside as HTML.
    pub(crate) body: String,
}

impl Section {
    /// A section of HTML.
    pub(crate) fn new(id: impl Into<String>, title: impl Into<String>, body: String) -> Self {
        Self {
            id: id.into(),
            title: title.into(),
            body,
        }
    }
}

/// The whole page.
pub(crate) fn page(m: &Material) -> anyhow::Result<String> {
    let mut sections = results::sections(m)?;
    sections.extend(rewards::against_kl(m)?);
    sections.extend(samples::section(m)?);
    sections.extend(rewards::reward_model(m)?);
    sections.push(training::section(m)?);
    sections.extend(training_samples::section(m)?);
    sections.push(behind::time(m)?);
    sections.push(behind::repeat(m)?);
    let head = verdict::header(m)?;
    Ok(document(&m.run.title, &head, &sections))
}

/// A whole HTML file: what stands on top, the way to the sections, the sections.
pub(crate) fn document(title: &str, head: &str, sections: &[Section]) -> String {
    let nav: String = sections
        .iter()
        .map(|s| format!("<a href=\"#{}\">{}</a>", s.id, escape(&s.title)))
        .collect();
    let body: String = sections
        .iter()
        .map(|s| {
            format!(
                "<section id=\"{}\">\n<h2>{}</h2>\n{}</section>\n",
                s.id,
                escape(&s.title),
                s.body
            )
        })
        .collect();
    let title = escape(title);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{head}<nav>{nav}</nav>\n{body}</main>\n</body>\n</html>\n"
    )
}
