//! The command line: results on stdout, everything else on stderr, and exit codes that scripts can trust
//! (0 done, 1 failed, 2 called wrongly, 130 interrupted; `diff` has 1 for different and 2 for trouble, as diff has).

mod bench;
mod build;
mod dev;
mod diff;
mod generate;
mod inspect;
mod output;
mod provider;
mod quant_report;
mod quantization;
mod repo;
mod runtime;
mod scaffold;
mod templates;
mod timings;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub use output::Output;
use provider::{RuntimeOption, SessionOptions};
use timings::Timings;

/// Compiles Hugging Face language models to verified ONNX directories, without Python or torch.
#[derive(Debug, Parser)]
#[command(name = "hf2onnx", version, about, max_term_width = 100)]
pub struct Cli {
    /// Print the result, and errors, as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

/// One variant for each command; each lives in the file of its name.
#[derive(Debug, Subcommand)]
enum Command {
    Build(Box<build::Build>),
    Verify(verify::Verify),
    Inspect(Box<inspect::Inspect>),
    Generate(generate::Generate),
    Diff(diff::Diff),
    Bench(bench::Bench),
    QuantReport(quant_report::QuantReport),
    Templates(templates::Templates),
    Scaffold(scaffold::Scaffold),
    Runtime(runtime::Runtime),
    #[command(hide = true)]
    Dev(dev::Dev),
}

/// Runs the program with the process's arguments.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let timings = match &cli.command {
        Command::Build(build) if build.timings => Some(Timings::start()),
        _ => None,
    };
    listen(timings.clone());
    crate::guard::hush();
    let mut output = Output::new(cli.json);
    let result = match cli.command {
        // Those that build or install leave something behind when they are cut short; the others end at once.
        Command::Build(command) => output.interruptible().and_then(|()| command.run(&mut output)),
        Command::QuantReport(command) => output.interruptible().and_then(|()| command.run(&mut output)),
        Command::Runtime(command) => output.interruptible().and_then(|()| command.run(&mut output)),
        Command::Verify(command) => command.run(&mut output),
        Command::Inspect(command) => command.run(&mut output),
        Command::Generate(command) => command.run(&mut output),
        Command::Diff(command) => command.run(&mut output),
        Command::Bench(command) => command.run(&mut output),
        Command::Templates(command) => command.run(&mut output),
        Command::Scaffold(command) => command.run(&mut output),
        Command::Dev(command) => command.run(&mut output),
    };
    for (stage, seconds) in timings.iter().flat_map(Timings::seconds) {
        output.say(&format!("{stage:<18} {seconds:>9.4} s"));
    }
    output.finish(result)
}

/// Sends what is traced to stderr, and the spans of stages to whoever adds them up.
fn listen(timings: Option<Timings>) {
    use tracing_subscriber::filter::{FilterExt as _, filter_fn};
    use tracing_subscriber::prelude::*;
    // RUST_LOG chooses; without it only warnings are shown.
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    let filter = filter.and(filter_fn(is_discreet));
    let words = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_filter(filter);
    let stages = timings.map(|timings| timings.with_filter(filter_fn(timings::is_stage)));
    tracing_subscriber::registry().with(words).with(stages).init();
}

/// False for what `RUST_LOG` shall not show: below `info`, what speaks with servers prints whole requests, the token
/// among them.
fn is_discreet(metadata: &tracing::Metadata<'_>) -> bool {
    let library = metadata.target().split("::").next().unwrap_or_default();
    let talks = ["ureq", "ureq_proto", "rustls", "http", "httparse"].contains(&library);
    !talks || *metadata.level() <= tracing::Level::INFO
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent_and_each_help_shows_an_example() {
        Cli::command().debug_assert();
        for command in Cli::command().get_subcommands_mut() {
            let help = command.render_long_help().to_string();
            assert!(help.contains("hf2onnx "), "{}: no example in its help", command.get_name());
        }
    }
}
