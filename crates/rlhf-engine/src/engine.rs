//! The commands that compute: linked to libtorch, started by the front.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "these commands speak to the terminal"
)]

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use rlhf_data::conversation::{Message, Role, Text};
use rlhf_data::source;
use rlhf_data::tokenize::{ChatTokenizer, Limits};
use rlhf_model::{
    Decoder, DecoderWeights, GenerateLimits, GenerateProgress, GenerateRequest, LoadOptions,
    SamplingConfig, StopStrings, Transformer, weights,
};
use tch::{Device, Kind};

use crate::inputs::plain_text;
use crate::{logprobs, reward_eval, run, server};
use rlhf::args::{
    ChatArgs, Cli, Command, DeviceArg, EvalCommand, GenerateArgs, ImportGgufArgs, LogprobsArgs,
    SamplingArgs, WeightsArg,
};
use rlhf::exit;
use rlhf::usage;

/// `main` of `rlhf-engine`.
pub fn main() -> ExitCode {
    rlhf_kernels::keep_memory();
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Run(a) => run::run(&a),
        Command::Generate(a) => generate_command(&a),
        Command::Logprobs(a) => logprobs_command(&a),
        Command::Chat(a) => chat(&a),
        Command::ImportGguf(a) => import_gguf(&a),
        Command::Eval(EvalCommand::Reward(a)) => reward_eval::command(&a),
        Command::Recipes(_) | Command::Data(_) | Command::Report(_) => Err(usage(
            "this command belongs to `rlhf`",
            "rlhf-engine",
            "run `rlhf` with the same arguments",
        )
        .into()),
    };
    exit::code(result, is_input)
}

fn is_input(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause
        .downcast_ref::<rlhf_data::Error>()
        .is_some_and(rlhf_data::Error::is_input)
        || cause
            .downcast_ref::<rlhf_model::Error>()
            .is_some_and(rlhf_model::Error::is_input)
        || cause
            .downcast_ref::<rlhf_reward::Error>()
            .is_some_and(rlhf_reward::Error::is_input)
        // What a transparent error holds is no cause of it.
        || cause
            .downcast_ref::<rlhf_policy::Error>()
            .is_some_and(|e| matches!(e, rlhf_policy::Error::Reward(e) if e.is_input()))
}

/// The device that was asked for. Must come before anything else of libtorch.
pub(crate) fn device(arg: DeviceArg) -> anyhow::Result<Device> {
    match arg {
        DeviceArg::Cpu => Ok(Device::Cpu),
        DeviceArg::Cuda => {
            rlhf_kernels::load_cuda();
            if !tch::Cuda::is_available() {
                return Err(usage(
                    "no CUDA device that libtorch can use",
                    "--device cuda",
                    "run on the CPU, or point LIBTORCH at a CUDA build of libtorch 2.11.0 (`cargo xtask doctor` explains)",
                )
                .into());
            }
            Ok(Device::Cuda(0))
        }
    }
}

/// A model folder must be there before libtorch is asked for anything.
fn load(dir: &Path, device: Device) -> anyhow::Result<(Transformer, ChatTokenizer)> {
    if !dir.is_dir() {
        return Err(usage(
            "no such model folder",
            dir.display().to_string(),
            "name a folder with config.json, model.safetensors and tokenizer.json",
        )
        .into());
    }
    let tokenizer = ChatTokenizer::load(dir)
        .with_context(|| format!("loading the tokenizer of {}", dir.display()))?;
    let model = Transformer::load(
        dir,
        &LoadOptions {
            device,
            kind: Kind::Float,
        },
    )
    .with_context(|| format!("loading {}", dir.display()))?;
    if tokenizer.vocab_size() > model.config().vocab_size as usize {
        return Err(usage(
            format!(
                "the tokenizer has ids up to {}, the model a vocabulary of {}",
                tokenizer.vocab_size() - 1,
                model.config().vocab_size
            ),
            dir.display().to_string(),
            "use the tokenizer that belongs to the model",
        )
        .into());
    }
    Ok((model, tokenizer))
}

fn sampling(args: &SamplingArgs, tokenizer: &ChatTokenizer) -> anyhow::Result<SamplingConfig> {
    let in_unit = |name: &str, v: Option<f64>| match v {
        Some(p) if !(p > 0.0 && p <= 1.0) => Err(usage(
            format!("{name} is {p}"),
            "the command line",
            "give a number above 0 and at most 1",
        )),
        _ => Ok(()),
    };
    in_unit("--top-p", args.top_p)?;
    in_unit("--min-p", args.min_p)?;
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        return Err(usage(
            format!("--temperature is {}", args.temperature),
            "the command line",
            "give 0 (greedy) or more",
        )
        .into());
    }
    Ok(SamplingConfig {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
        presence_penalty: args.presence_penalty,
        max_new_tokens: args.max_new_tokens,
        eos_ids: tokenizer.eos_ids().to_vec(),
        seed: args.seed,
        ..SamplingConfig::default()
    })
}

fn generate_command(args: &GenerateArgs) -> anyhow::Result<ExitCode> {
    let device = device(args.sampling.device)?;
    let (model, tokenizer) = load(&args.model, device)?;
    let cfg = sampling(&args.sampling, &tokenizer)?;
    let mut prompts: Vec<Text> = Vec::new();
    if let Some(text) = &args.prompt {
        prompts.push(if args.plain || !tokenizer.has_template() {
            Text::Plain(text.clone())
        } else {
            Text::Messages(vec![Message::new(Role::User, text.clone())])
        });
    }
    if let Some(file) = &args.prompts {
        for record in source::read_prompts(file)? {
            prompts.push(record?.prompt);
        }
    }
    if prompts.is_empty() {
        return Err(usage(
            "no prompts",
            "the prompt file",
            "give a file with at least one row",
        )
        .into());
    }
    let requests = prompts
        .iter()
        .enumerate()
        .map(|(i, p)| {
            Ok(GenerateRequest {
                prompt: tokenizer.prompt_ids(p)?,
                prompt_key: i as u64,
                samples: args.n.max(1),
                max_new_tokens: None,
            })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let text = |ids: &[u32]| tokenizer.decode(ids, true).unwrap_or_default();
    let groups = match &args.server.endpoint {
        Some(url) => server::generate(url, args, &model, &requests, &cfg)?,
        None => decoder(&model, &args.sampling, &text)?.generate(
            &requests,
            &cfg,
            &GenerateLimits::default(),
            &mut |_| {},
        )?,
    };
    let mut out = std::io::stdout().lock();
    for (prompt, group) in prompts.iter().zip(&groups) {
        for (i, c) in group.completions.iter().enumerate() {
            let text = tokenizer.decode(&c.ids, true)?;
            if args.json {
                let logprob: f64 = c
                    .sampler
                    .as_ref()
                    .map_or(0.0, |s| s.logprobs.iter().map(|&x| f64::from(x)).sum());
                let line = serde_json::json!({
                    "prompt": plain_text(prompt), "sample": i, "completion": text,
                    "finish": c.finish, "tokens": c.ids.len(), "ids": c.ids, "logprob": logprob,
                });
                writeln!(out, "{line}")?;
            } else {
                if prompts.len() > 1 || args.n > 1 {
                    writeln!(
                        out,
                        "── {} · {}",
                        rlhf::terminal::escape(&plain_text(prompt)),
                        i + 1
                    )?;
                }
                writeln!(out, "{}", rlhf::terminal::escape(text.trim()))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn logprobs_command(args: &LogprobsArgs) -> anyhow::Result<ExitCode> {
    let device = device(args.device)?;
    let (model, tokenizer) = load(&args.model, device)?;
    let context = model.config().max_position_embeddings as usize;
    let limits = Limits::new(context, context);
    let rows = logprobs::write(
        &model,
        &tokenizer,
        &args.input,
        &args.out,
        &limits,
        args.micro_tokens,
    )?;
    eprintln!("{rows} rows written to {}", args.out.display());
    Ok(ExitCode::SUCCESS)
}

fn chat(args: &ChatArgs) -> anyhow::Result<ExitCode> {
    let device = device(args.sampling.device)?;
    let (model, tokenizer) = load(&args.model, device)?;
    let mut cfg = sampling(&args.sampling, &tokenizer)?;
    let text = |ids: &[u32]| tokenizer.decode(ids, true).unwrap_or_default();
    let decoder = decoder(&model, &args.sampling, &text)?;
    if !tokenizer.has_template() {
        return Err(usage(
            "the model has no chat template",
            args.model.display().to_string(),
            "use `rlhf generate --plain`",
        )
        .into());
    }
    let mut messages: Vec<Message> = args
        .system
        .iter()
        .map(|s| Message::new(Role::System, s.clone()))
        .collect();
    let prompt_marks = std::io::stdin().is_terminal();
    if prompt_marks {
        eprintln!("an empty line or Ctrl-D ends the talk");
    }
    let mut turn = 0u64;
    loop {
        if prompt_marks {
            eprint!("you: ");
        }
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line)? == 0 || line.trim().is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        messages.push(Message::new(Role::User, line.trim_end().to_owned()));
        let prompt = tokenizer.prompt_ids(&Text::Messages(messages.clone()))?;
        let room = (model.config().max_position_embeddings as usize).saturating_sub(prompt.len());
        if room == 0 {
            return Err(usage(
                format!(
                    "the talk has {} tokens, more than the model's context",
                    prompt.len()
                ),
                "the conversation",
                "begin a new one",
            )
            .into());
        }
        cfg.max_new_tokens = args.sampling.max_new_tokens.min(room);
        let reply = speak(&decoder, &tokenizer, &cfg, prompt, turn)?;
        messages.push(Message::new(Role::Assistant, reply));
        turn += 1;
    }
}

/// The model as a sampler; `text` is that of some tokens.
fn decoder<'m>(
    model: &'m Transformer,
    args: &'m SamplingArgs,
    text: &'m dyn Fn(&[u32]) -> String,
) -> rlhf_model::Result<Decoder<'m>> {
    let weights = if args.bf16 {
        DecoderWeights::Bf16
    } else {
        DecoderWeights::AsLoaded
    };
    Decoder::with_weights(model, weights)?.stop_at(StopStrings {
        strings: &args.stop,
        decode: text,
    })
}

/// Generates one reply, printing it as it grows.
fn speak(
    decoder: &Decoder<'_>,
    tokenizer: &ChatTokenizer,
    cfg: &SamplingConfig,
    prompt: Vec<u32>,
    turn: u64,
) -> anyhow::Result<String> {
    let mut ids: Vec<u32> = Vec::new();
    let mut shown = 0;
    let mut failed = None;
    let request = GenerateRequest {
        prompt,
        prompt_key: turn,
        samples: 1,
        max_new_tokens: None,
    };
    decoder.generate(&[request], cfg, &GenerateLimits::default(), &mut |event| {
        let GenerateProgress::Token { id, .. } = event else {
            return;
        };
        ids.push(id);
        match tokenizer.decode(&ids, true) {
            // A token may end inside a character; it is shown when it is whole.
            Ok(text) if text.len() > shown && !text.ends_with('\u{fffd}') => {
                print!("{}", rlhf::terminal::escape(&text[shown..]));
                shown = text.len();
                if let Err(e) = std::io::stdout().flush() {
                    failed = Some(anyhow::Error::from(e));
                }
            }
            Ok(_) => {}
            Err(e) => failed = Some(e.into()),
        }
    })?;
    println!();
    if let Some(e) = failed {
        return Err(e);
    }
    Ok(tokenizer.decode(&ids, true)?.trim().to_owned())
}

fn import_gguf(args: &ImportGgufArgs) -> anyhow::Result<ExitCode> {
    let file: &PathBuf = &args.file;
    if !file.is_file() {
        return Err(usage(
            "no such file",
            file.display().to_string(),
            "name a GGUF file",
        )
        .into());
    }
    let kind = match args.dtype {
        WeightsArg::F32 => Kind::Float,
        WeightsArg::Bf16 => Kind::BFloat16,
        WeightsArg::F16 => Kind::Half,
    };
    weights::gguf::import(file, &args.out, kind)?;
    eprintln!("written to {}", args.out.display());
    Ok(ExitCode::SUCCESS)
}
