//! The command line: what may be typed. Fixed; users and scripts rely on it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// RLHF post-training for language models.
#[derive(Debug, Parser)]
#[command(
    name = "rlhf",
    version,
    about,
    propagate_version = true,
    disable_help_subcommand = true
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a recipe: its stages in order, then the report
    Run(RunArgs),
    /// List the shipped recipes, or show one
    Recipes(RecipesArgs),
    /// Generate completions
    Generate(GenerateArgs),
    /// Per-token log-probabilities of given conversations, as Parquet
    Logprobs(LogprobsArgs),
    /// Import, check, describe or render data
    #[command(subcommand)]
    Data(DataCommand),
    /// Measure how far a reward model can be trusted
    #[command(subcommand)]
    Eval(EvalCommand),
    /// Build a run's report again
    Report(ReportArgs),
    /// Talk to a model
    Chat(ChatArgs),
    /// Convert a GGUF file to a Hugging Face folder
    ImportGguf(ImportGgufArgs),
}

/// Which pairs a ranking gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PairsArg {
    /// Every two of different score
    All,
    /// The best against one drawn from the worse
    BestVsRandom,
    /// Each against the next worse
    Adjacent,
}

/// `rlhf run`
#[derive(Debug, Args)]
pub struct RunArgs {
    /// A shipped recipe's name or a TOML file
    pub recipe: String,
    /// The run's folder [default: runs/RECIPE, or runs/RECIPE-2 … if that exists]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Set a key of the recipe, as in stages.dpo.loss.beta=0.2
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Go on with a run that was interrupted
    #[arg(long)]
    pub resume: bool,
    /// Apply the recipe's smoke overlay: everything runs, briefly
    #[arg(long)]
    pub smoke: bool,
    /// Read all inputs, print the plan, train nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = DeviceArg::Cpu)]
    pub device: DeviceArg,
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
}

/// Where to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceArg {
    /// The processor
    Cpu,
    /// The first NVIDIA GPU
    Cuda,
}

/// `rlhf recipes`
#[derive(Debug, Args)]
pub struct RecipesArgs {
    /// What to do with the recipes
    #[command(subcommand)]
    pub action: Option<RecipesAction>,
    /// Print JSON on stdout
    #[arg(long)]
    pub json: bool,
}

/// `rlhf recipes show`
#[derive(Debug, Subcommand)]
pub enum RecipesAction {
    /// Print the algorithms that a stage's `preset` can name, what each sets, and its source
    Presets,
    /// Print a recipe's TOML
    Show {
        /// Its name
        name: String,
    },
}

/// `rlhf generate`
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["prompt", "prompts"])))]
pub struct GenerateArgs {
    /// A model folder
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// One prompt
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// A prompt file: Parquet or JSON Lines with a `prompt` column
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Give the prompt to the model as it is, without its chat template
    #[arg(long)]
    pub plain: bool,
    /// Completions of each prompt
    #[arg(long, default_value_t = 1)]
    pub n: usize,
    /// How to draw
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Who draws, where that is not the model here
    #[command(flatten)]
    pub server: ServerArgs,
    /// Print JSON Lines on stdout
    #[arg(long)]
    pub json: bool,
}

/// An OpenAI-compatible server that draws; the model's folder gives tokenizer and comparison.
#[derive(Clone, Debug, Args)]
pub struct ServerArgs {
    /// Let this server draw (http://localhost:8000/v1) and compare its log-probabilities with the model's
    #[arg(long, value_name = "URL", requires = "served_model")]
    pub endpoint: Option<String>,
    /// The model's name on the server
    #[arg(long, value_name = "NAME", requires = "endpoint")]
    pub served_model: Option<String>,
    /// The environment variable that holds the server's key
    #[arg(long, value_name = "NAME", requires = "endpoint")]
    pub key_env: Option<String>,
    /// The server's log-probabilities are those it draws by (vLLM: --logprobs-mode processed_logprobs)
    #[arg(long, requires = "endpoint")]
    pub processed_logprobs: bool,
}

/// How tokens are drawn.
#[derive(Clone, Debug, Args)]
pub struct SamplingArgs {
    /// 0 is greedy
    #[arg(long, default_value_t = 0.7)]
    pub temperature: f64,
    /// Keep the k likeliest tokens
    #[arg(long)]
    pub top_k: Option<usize>,
    /// Keep the likeliest tokens of this total probability
    #[arg(long)]
    pub top_p: Option<f64>,
    /// Keep tokens of at least this share of the likeliest's probability
    #[arg(long)]
    pub min_p: Option<f64>,
    /// Divide the logits of tokens that are there already
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR")]
    pub repetition_penalty: f64,
    /// Subtract from the logits of tokens that the completion holds
    #[arg(long, default_value_t = 0.0, value_name = "LOGITS")]
    pub presence_penalty: f64,
    /// End a completion at this text, too; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Longest completion in tokens
    #[arg(long, default_value_t = 128)]
    pub max_new_tokens: usize,
    /// The seed
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Keep the decoding weights in bf16: half the memory to read for a token, rounded probabilities
    #[arg(long)]
    pub bf16: bool,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = DeviceArg::Cpu)]
    pub device: DeviceArg,
}

/// `rlhf logprobs`
#[derive(Debug, Args)]
pub struct LogprobsArgs {
    /// A model folder
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Conversations: `messages`, or `prompt` and `completion`
    #[arg(long = "in", value_name = "FILE")]
    pub input: PathBuf,
    /// The Parquet file to write
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Packed tokens computed at once
    #[arg(long, default_value_t = 8192)]
    pub micro_tokens: usize,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = DeviceArg::Cpu)]
    pub device: DeviceArg,
}

/// What a data file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PurposeArg {
    /// Demonstrations
    Sft,
    /// Chosen and rejected completions
    Preference,
    /// Prompts alone
    Prompts,
}

/// What rows become.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KindArg {
    /// Demonstrations, in TRL's columns
    Sft,
    /// Chosen and rejected completions, in TRL's columns
    Preference,
    /// Prompts with what a verifier needs
    Prompts,
    /// Several completions of a prompt, scored or best first
    Ranked,
    /// A completion with a thumb up or down
    Unpaired,
    /// A solution in steps, each right or wrong
    Stepwise,
    /// A completion with a number for each of several attributes
    Rated,
}

/// `rlhf data`
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Read a file of any known format, refuse what is wrong, write one kind of rows
    Import {
        /// The file, a folder of files, or a glob in quotes
        input: PathBuf,
        /// The file to write: .parquet or .jsonl
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// What the rows become
        #[arg(long, value_enum)]
        purpose: KindArg,
        /// The format, as docs/importers.md names them [default: told by the first row's columns]
        #[arg(long, value_name = "FORMAT")]
        from: Option<String>,
        /// Leave bad rows out and count them, instead of stopping at the first
        #[arg(long)]
        skip_bad: bool,
        /// Which pairs a ranking gives
        #[arg(long, value_enum, default_value_t = PairsArg::All)]
        pairs: PairsArg,
        /// Seed of what is drawn at random
        #[arg(long, default_value_t = 0)]
        seed: u64,
    },
    /// Look for everything that would spoil training; exit 2 if there is an error
    Check {
        /// The file
        input: PathBuf,
        /// What it is for
        #[arg(long, value_enum)]
        purpose: KindArg,
        /// A tokenizer or model folder, to check lengths and trained tokens too
        #[arg(long, value_name = "DIR")]
        tokenizer: Option<PathBuf>,
        /// Longest prompt in tokens
        #[arg(long, default_value_t = 1024)]
        max_prompt: usize,
        /// Longest completion in tokens
        #[arg(long, default_value_t = 1024)]
        max_completion: usize,
        /// Another split, whose prompts must not stand in the file; may be repeated
        #[arg(long, value_name = "FILE")]
        against: Vec<PathBuf>,
        /// An evaluation set, whose text should not stand in the file; may be repeated
        #[arg(long, value_name = "FILE")]
        eval: Vec<PathBuf>,
        /// Words in a row that make a contamination
        #[arg(long, default_value_t = 13)]
        ngram: usize,
        /// Similarity from which rows are near-duplicates; 0 looks for none
        #[arg(long, value_name = "JACCARD", default_value_t = 0.8)]
        near_duplicate: f64,
        /// More characters than this in a column are a finding
        #[arg(long, default_value_t = 1_000_000)]
        max_characters: usize,
        /// Write every finding to a Parquet file too
        #[arg(long, value_name = "FILE")]
        findings: Option<PathBuf>,
        /// Print JSON on stdout
        #[arg(long)]
        json: bool,
    },
    /// Describe a file: lengths, what the preference follows besides quality, agreement, scores
    Stats {
        /// The file
        input: PathBuf,
        /// What it is for
        #[arg(long, value_enum)]
        purpose: KindArg,
        /// A tokenizer or model folder, to count tokens instead of characters
        #[arg(long, value_name = "DIR")]
        tokenizer: Option<PathBuf>,
        /// Write a page with tables and bars too
        #[arg(long, value_name = "FILE")]
        html: Option<PathBuf>,
        /// Print JSON on stdout
        #[arg(long)]
        json: bool,
    },
    /// Print one row as the model sees it: template, ids, trained tokens in colour
    Render {
        /// The file
        input: PathBuf,
        /// What it is for
        #[arg(long, value_enum)]
        purpose: PurposeArg,
        /// A tokenizer or model folder
        #[arg(long, value_name = "DIR")]
        tokenizer: PathBuf,
        /// Which row, from 0
        #[arg(long, default_value_t = 0)]
        row: usize,
        /// Print JSON on stdout
        #[arg(long)]
        json: bool,
    },
}

/// `rlhf eval`
#[derive(Debug, Subcommand)]
pub enum EvalCommand {
    /// A reward model on held-out pairs: accuracy by category, calibration, length, best of n
    Reward(EvalRewardArgs),
}

/// `rlhf eval reward`
#[derive(Debug, Args)]
pub struct EvalRewardArgs {
    /// The reward model's folder
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Pairs: `prompt`, `chosen`, `rejected`, perhaps `subset` (RewardBench) or `category`
    #[arg(long, value_name = "FILE")]
    pub pairs: PathBuf,
    /// Completions with gold scores for best of n: `prompt`, `completions`, `scores`
    #[arg(long, value_name = "FILE")]
    pub best_of: Option<PathBuf>,
    /// A folder for reward_eval.json and reward_eval.html
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Take plain text as it is, also where the tokenizer has a chat template
    #[arg(long)]
    pub plain: bool,
    /// Longest prompt in tokens; pairs with longer ones are left out and counted
    #[arg(long, default_value_t = 1024)]
    pub max_prompt: usize,
    /// Longest completion in tokens; longer ones lose their end
    #[arg(long, default_value_t = 1024)]
    pub max_completion: usize,
    /// Use only the first so many pairs
    #[arg(long)]
    pub limit: Option<usize>,
    /// Packed tokens computed at once
    #[arg(long, default_value_t = 8192)]
    pub micro_tokens: usize,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = DeviceArg::Cpu)]
    pub device: DeviceArg,
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
}

/// `rlhf report`
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// The run's folder
    pub run: PathBuf,
}

/// `rlhf chat`
#[derive(Debug, Args)]
pub struct ChatArgs {
    /// A model folder
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// A system prompt
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// How to draw
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// `rlhf import-gguf`
#[derive(Debug, Args)]
pub struct ImportGgufArgs {
    /// The GGUF file
    pub file: PathBuf,
    /// The folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The weights' type
    #[arg(long, value_enum, default_value_t = WeightsArg::Bf16)]
    pub dtype: WeightsArg,
}

/// The type of written weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WeightsArg {
    /// 32-bit floats
    F32,
    /// bfloat16
    Bf16,
    /// 16-bit floats
    F16,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
