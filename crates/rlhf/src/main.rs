//! `rlhf`: RLHF post-training for language models.

fn main() -> std::process::ExitCode {
    rlhf::front::main()
}
