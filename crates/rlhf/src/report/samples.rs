//! What the models wrote, side by side, each token shaded by how much likelier it became.

use std::fmt::Write as _;

use super::Material;
use super::html::{escape, number};
use super::page::Section;
use crate::results::{Answer, Evaluation, Sample};

/// Differences of log-probability (nats) at which the shading gets stronger.
const STEPS: [f64; 5] = [0.25, 0.75, 1.5, 2.5, 4.0];
/// This many prompts are open; the others unfold.
const OPEN: usize = 3;

/// The section, if an evaluation kept samples.
pub(crate) fn section(m: &Material) -> Result<Option<Section>, std::fmt::Error> {
    let mut out = String::new();
    for (stage, e) in m.evaluations.iter().filter(|e| !e.1.samples.is_empty()) {
        if m.evaluations.len() > 1 {
            writeln!(out, "<h3>{}</h3>", escape(stage))?;
        }
        introduction(e, &mut out)?;
        for (i, s) in e.samples.iter().enumerate() {
            sample(m, e, s, i, &mut out)?;
        }
    }
    Ok((!out.is_empty()).then(|| Section::new("samples", "Samples, side by side", out)))
}

fn introduction(e: &Evaluation, out: &mut String) -> std::fmt::Result {
    let baseline = escape(&e.baseline);
    write!(
        out,
        "<p>Replies to held-out prompts. A token is shaded by how much likelier (<span class=\"u4\">blue</span>) or less likely (<span class=\"d4\">orange</span>) the model that wrote it finds it than {baseline} does; point at a token for its numbers.</p>\n<p class=\"scale muted\"><i>difference in nats</i>"
    )?;
    for i in (0..STEPS.len()).rev() {
        write!(out, "<span class=\"d{}\">−{}</span>", i + 1, STEPS[i])?;
    }
    write!(out, "<span>0</span>")?;
    for (i, s) in STEPS.iter().enumerate() {
        write!(out, "<span class=\"u{}\">+{s}</span>", i + 1)?;
    }
    writeln!(out, "</p>")
}

fn sample(
    m: &Material,
    e: &Evaluation,
    s: &Sample,
    i: usize,
    out: &mut String,
) -> std::fmt::Result {
    let open = if i < OPEN { " open" } else { "" };
    writeln!(
        out,
        "<details class=\"sample\"{open}><summary><q>{}</q></summary><div class=\"answers\">",
        escape(&s.prompt)
    )?;
    // Before stands before after.
    for a in s
        .answers
        .iter()
        .filter(|a| a.model == e.baseline)
        .chain(s.answers.iter().filter(|a| a.model != e.baseline))
    {
        answer(m, a, out)?;
    }
    writeln!(out, "</div></details>")
}

fn answer(m: &Material, a: &Answer, out: &mut String) -> std::fmt::Result {
    let mut facts = Vec::new();
    facts.extend(a.gold.map(|x| format!("gold <b>{}</b>", number(x))));
    facts.extend(a.reward.map(|x| format!("reward {}", number(x))));
    write!(
        out,
        "<div class=\"answer\"><p class=\"who\">{}<small>{} tokens</small></p><p class=\"facts\">{}</p><p class=\"text\">",
        m.palette.key(&a.model),
        a.tokens.len(),
        facts.join(" · ")
    )?;
    for t in &a.tokens {
        let gap = t.logprob - t.baseline;
        let title = format!("log p {}, before {}", number(t.logprob), number(t.baseline));
        match shade(gap) {
            None => write!(out, "<span title=\"{title}\">{}</span>", escape(&t.text))?,
            Some(class) => write!(
                out,
                "<span class=\"{class}\" title=\"{title}, difference {}\">{}</span>",
                number(gap),
                escape(&t.text)
            )?,
        }
    }
    writeln!(out, "</p></div>")
}

/// The class of a token's shading; none for a small or undefined difference.
fn shade(gap: f64) -> Option<String> {
    let strength = STEPS.iter().take_while(|s| gap.abs() >= **s).count();
    (strength > 0).then(|| format!("{}{strength}", if gap > 0.0 { 'u' } else { 'd' }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shading_grows_with_the_difference() {
        assert_eq!([0.2, f64::NAN].map(shade), [None, None]);
        let classes: Vec<_> = [0.25, -1.6, 9.0, f64::NEG_INFINITY]
            .into_iter()
            .filter_map(shade)
            .collect();
        assert_eq!(classes, ["u1", "d3", "u5", "d5"]);
    }
}
