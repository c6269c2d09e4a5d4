//! The part of `rlhf` that is linked to libtorch; `rlhf` starts it.

fn main() -> std::process::ExitCode {
    rlhf_engine::engine::main()
}
