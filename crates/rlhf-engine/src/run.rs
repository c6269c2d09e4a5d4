//! `rlhf run`: recipe, plan, stages, report.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the command speaks to the terminal"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context as _;
use rlhf_model::{Transformer, copy_tokenizer};
use rlhf_train::{StopFlag, hash_file, peak_memory};
use tch::{Device, Kind};

use crate::engine;
use crate::plan::{self, Plan};
use crate::recipe::{self, Source};
use crate::stage::Context;
use rlhf::args::{DeviceArg, RunArgs};
use rlhf::files::{write, write_json};
use rlhf::results::{RunSummary, StageSummary};
use rlhf::{Usage, usage};
use rlhf::{report, terminal};

pub(crate) fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let shared =
        PathBuf::from(std::env::var_os("RLHF_SHARED").unwrap_or_else(|| "../shared".into()));
    let source = Source::find(&args.recipe)?;
    let recipe = source.parse(args.smoke, &args.set)?;
    if let Some(needs) = &recipe.run.needs
        && !recipe::resolve(&needs.path, &shared).exists()
    {
        let path = recipe::resolve(&needs.path, &shared);
        println!(
            "skipped: {} is not there; to run this recipe: {}",
            path.display(),
            needs.mend
        );
        return Ok(ExitCode::SUCCESS);
    }
    let dir = folder(args, &source.name)?;
    let device = engine::device(args.device)?;
    let (plan, inputs) = plan::resolve(&source.name, &args.recipe, recipe.clone(), &shared, &dir)?;
    if !args.json {
        eprintln!("{}", plan.describe().trim_end());
    }
    if args.dry_run {
        if args.json {
            println!("{}", serde_json::to_string_pretty(&plan)?);
        }
        return Ok(ExitCode::SUCCESS);
    }
    prepare(&dir, &source, &plan, args)?;
    init(&dir, &plan, device)?;
    let began = Instant::now();
    let ctx = Context {
        recipe: &recipe,
        plan: &plan,
        inputs: &inputs,
        dir: &dir,
        device,
        stop: StopFlag::install().context("listening for signals")?,
        quiet: args.json,
    };
    let stages = ctx.run_all()?;
    let summary = summarize(&plan, &dir, args, stages, &began)?;
    write_json(&dir.join("run.json"), &summary)?;
    let html = report::build(&dir)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        println!(
            "done in {}; report: {}",
            terminal::seconds(summary.seconds),
            html.display()
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// The run's folder: as asked for; else a new one, or with `--resume` the newest of this recipe.
fn folder(args: &RunArgs, name: &str) -> Result<PathBuf, Usage> {
    let used = |d: &Path| d.join("plan.json").exists();
    if let Some(out) = &args.out {
        if used(out) && !args.resume {
            return Err(usage(
                "the folder holds a run already",
                out.display().to_string(),
                "add --resume to go on with it, or name another folder",
            ));
        }
        if args.resume && !used(out) {
            return Err(usage(
                "there is no run to resume",
                out.display().to_string(),
                "name the folder of an interrupted run",
            ));
        }
        return Ok(out.clone());
    }
    let numbered = |i: u32| {
        if i == 1 {
            Path::new("runs").join(name)
        } else {
            Path::new("runs").join(format!("{name}-{i}"))
        }
    };
    let free = (1..).find(|&i| !used(&numbered(i))).unwrap_or(1);
    match (args.resume, free) {
        (true, 1) => Err(usage(
            "there is no run to resume",
            format!("runs/{name}"),
            "leave out --resume",
        )),
        (true, n) => Ok(numbered(n - 1)),
        (false, n) => Ok(numbered(n)),
    }
}

/// Makes the folder self-describing: the recipe as given, the plan as resolved.
fn prepare(dir: &Path, source: &Source, plan: &Plan, args: &RunArgs) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let path = dir.join("plan.json");
    if args.resume {
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("reading {}", path.display()))?;
        let before: serde_json::Value = serde_json::from_str(&text)
            .with_context(|| format!("{} is damaged", path.display()))?;
        let now = serde_json::to_value(plan)?;
        if before["recipe"] != now["recipe"]
            || before["data"] != now["data"]
            || before["model"] != now["model"]
        {
            return Err(usage(
                "the recipe, the data or the model are not those of the interrupted run",
                dir.display().to_string(),
                "resume with the same --set, --smoke and files, or begin a new run",
            )
            .into());
        }
        return Ok(());
    }
    write(&dir.join("recipe.toml"), source.text.as_bytes())?;
    write_json(&path, plan)
}

/// Random weights become a model folder like any other.
fn init(dir: &Path, plan: &Plan, device: Device) -> anyhow::Result<()> {
    let target = dir.join("init").join("model");
    let Some(base) = plan.base.as_ref().filter(|b| b.from.is_none()) else {
        return Ok(());
    };
    if target.join("config.json").exists() {
        return Ok(());
    }
    let model = Transformer::init(
        base.config.clone(),
        plan.recipe.run.seed,
        device,
        Kind::Float,
    )?;
    std::fs::create_dir_all(dir.join("init"))
        .with_context(|| format!("cannot make {}", target.display()))?;
    model.save(&target)?;
    copy_tokenizer(&base.tokenizer_dir, &target)?;
    Ok(())
}

fn summarize(
    plan: &Plan,
    dir: &Path,
    args: &RunArgs,
    stages: Vec<StageSummary>,
    began: &Instant,
) -> anyhow::Result<RunSummary> {
    let mut models = BTreeMap::new();
    for s in &stages {
        let weights = dir.join(&s.name).join("model").join("model.safetensors");
        if weights.is_file() {
            models.insert(s.name.clone(), hash_file(&weights)?);
        }
    }
    let total: f64 = stages.iter().map(|s| s.seconds).sum();
    Ok(RunSummary {
        title: plan.recipe.run.title.clone(),
        recipe: plan.name.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        git_revision: git_revision(),
        device: match args.device {
            DeviceArg::Cpu => format!("CPU, {} threads", tch::get_num_threads()),
            DeviceArg::Cuda => "CUDA".into(),
        },
        parameters: plan.parameters,
        seconds: total.max(began.elapsed().as_secs_f64()),
        peak_memory: peak_memory(),
        stages,
        data: plan
            .data
            .iter()
            .map(|f| (f.path.clone(), f.sha256.clone()))
            .collect(),
        models,
    })
}

/// The revision of the working folder, where git and a repository are at hand.
fn git_revision() -> Option<String> {
    let out = std::process::Command::new("git")
        .args(["rev-parse", "HEAD"])
        .stderr(std::process::Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(out.stdout).ok()?;
    out.status.success().then(|| text.trim().to_owned())
}
