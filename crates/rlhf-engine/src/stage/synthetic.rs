//! Synthetic data: Self-Instruct, and critique with revision. Every answer is kept in `answers/`, so that a stage
//! that was cut off asks nothing twice.

use std::collections::BTreeMap;

use rlhf_data::conversation::Text;
use rlhf_data::source::JsonlOut;
use rlhf_data::synthetic::{Author as _, Kept, critique, self_instruct};
use rlhf_endpoint::{Endpoint, EndpointConfig};
use rlhf_model::{Decoder, GenerateLimits, LocalSampler, Transformer};

use super::rejection::write_rows;
use super::{Context, Ended};
use crate::author::{EndpointAuthor, LocalAuthor};
use crate::recipe::{self, Critique, SelfInstruct, Writer};
use rlhf::usage;

/// Lets the writer of a stage do `work`, its answers kept.
fn with_author<T>(
    ctx: &Context<'_>,
    stage: &str,
    writer: &Writer,
    work: impl FnOnce(&Kept<'_>) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let folder = ctx.dir.join(stage).join("answers");
    if let Some(server) = &writer.server {
        let mut config = EndpointConfig::new(&server.url, &server.model);
        config.key = crate::server::key(server)?;
        let author = EndpointAuthor {
            name: format!("{} at {}", server.model, server.url),
            endpoint: Endpoint::new(config).map_err(rlhf_model::Error::from)?,
        };
        return work(&Kept::new(&author, &folder)?);
    }
    let Some(name) = &writer.model else {
        return Err(usage("no writer", stage, "name a model or a server").into());
    };
    let model: Transformer = ctx.policy(name)?;
    let author = LocalAuthor {
        name: format!("{name} {} {}", ctx.model_digest(name)?, ctx.recipe.run.seed),
        sampler: LocalSampler {
            decoder: Decoder::new(&model)?,
            limits: GenerateLimits {
                max_batch_sequences: writer.max_sequences,
                ..GenerateLimits::default()
            },
        },
        tokenizer: ctx.tokenizer()?,
        context: model.config().max_position_embeddings as usize,
        seed: ctx.recipe.run.seed,
    };
    work(&Kept::new(&author, &folder)?)
}

pub(super) fn self_instruct(
    ctx: &Context<'_>,
    name: &str,
    s: &SelfInstruct,
) -> anyhow::Result<Ended> {
    let seeds: Vec<String> = ctx
        .inputs
        .prompt_texts(&s.data)?
        .values()
        .map(crate::inputs::plain_text)
        .collect();
    let made = with_author(ctx, name, &s.writer, |author| {
        let seed = ctx.recipe.run.seed;
        let made = self_instruct::run(author, &seeds, &s.settings, seed, &mut |so_far| {
            ctx.say(&format!(
                "      round {}: {} instructions, {} rows",
                so_far.rounds + 1,
                so_far.instructions.len(),
                so_far.rows.len()
            ));
            ctx.stop.get().is_none()
        })?;
        let (asked, found) = author.counts();
        ctx.say(&format!(
            "      {asked} answers written, {found} from before"
        ));
        Ok(made)
    })?;
    if let Some(signal) = ctx.stop.get() {
        return Err(ctx.interrupted(signal));
    }
    let dir = ctx.dir.join(name);
    let mut out = JsonlOut::create(&dir.join("instructions.jsonl"))?;
    for text in &made.instructions {
        out.write(&serde_json::json!({"prompt": text}))?;
    }
    out.finish()?;
    for (reason, n) in &made.left_out {
        ctx.say(&format!("      left out, {reason}: {n}"));
    }
    if made.rows.is_empty() {
        return Err(usage(
            format!("no row passed the filters; left out: {:?}", made.left_out),
            name,
            "use a stronger writer, more rounds, or look at answers/",
        )
        .into());
    }
    write_rows(&dir.join("selected.parquet"), &made.rows)?;
    let mut last = BTreeMap::from([
        ("rows".to_owned(), made.rows.len() as f64),
        ("instructions".to_owned(), made.instructions.len() as f64),
    ]);
    for (reason, n) in &made.left_out {
        last.insert(format!("left_out_{}", reason.replace(' ', "_")), *n as f64);
    }
    Ok(Ended {
        steps: u64::from(made.rounds),
        tokens: 0,
        last,
    })
}

pub(super) fn critique(ctx: &Context<'_>, name: &str, s: &Critique) -> anyhow::Result<Ended> {
    let prompts: Vec<Text> = ctx.inputs.prompt_texts(&s.data)?.into_values().collect();
    let file = recipe::resolve(&s.principles, ctx.inputs.shared());
    let principles = critique::read_principles(&file)?;
    let (made, author) = with_author(ctx, name, &s.writer, |author| {
        let seed = ctx.recipe.run.seed;
        let made = critique::run(
            author,
            &prompts,
            &principles,
            &s.settings,
            seed,
            &mut |round| {
                ctx.say(&format!("      round {}", round + 1));
                ctx.stop.get().is_none()
            },
        )?;
        let (asked, found) = author.counts();
        ctx.say(&format!(
            "      {asked} answers written, {found} from before"
        ));
        Ok((made, author.name().to_owned()))
    })?;
    if let Some(signal) = ctx.stop.get() {
        return Err(ctx.interrupted(signal));
    }
    let dir = ctx.dir.join(name);
    let rows = made.demonstrations(&prompts, &principles, &author);
    let pairs = made.preferences(&prompts, &principles, &author);
    if rows.is_empty() {
        return Err(usage(
            format!("of {} prompts none got a revision", prompts.len()),
            name,
            "see that the writer answers, and that its context has room",
        )
        .into());
    }
    write_rows(&dir.join("selected.parquet"), &rows)?;
    if !pairs.is_empty() {
        write_rows(&dir.join("preferences.parquet"), &pairs)?;
    }
    Ok(Ended {
        steps: u64::from(s.settings.rounds),
        tokens: 0,
        last: BTreeMap::from([
            ("rows".to_owned(), rows.len() as f64),
            ("pairs".to_owned(), pairs.len() as f64),
            ("unanswered".to_owned(), made.unanswered as f64),
            ("broken".to_owned(), made.broken as f64),
        ]),
    })
}
