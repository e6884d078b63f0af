//! The command line: results on stdout, everything else on stderr, and exit codes that scripts can trust
//! (0 done, 1 failed, 2 called wrongly).

mod build;
mod generate;
mod inspect;
mod output;
mod repo;
mod runtime;
mod scaffold;
mod templates;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::error::Result;
use crate::runtime::{Library, Search};

pub use output::Output;

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
    Templates(templates::Templates),
    Scaffold(scaffold::Scaffold),
    Runtime(runtime::Runtime),
}

/// Runs the program with the process's arguments.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // RUST_LOG chooses; without it only warnings are shown.
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let mut output = Output::new(cli.json);
    let result = match cli.command {
        Command::Build(command) => command.run(&mut output),
        Command::Verify(command) => command.run(&mut output),
        Command::Inspect(command) => command.run(&mut output),
        Command::Generate(command) => command.run(&mut output),
        Command::Templates(command) => command.run(&mut output),
        Command::Scaffold(command) => command.run(&mut output),
        Command::Runtime(command) => command.run(&mut output),
    };
    output.finish(result)
}

/// The option of every command that runs a model.
#[derive(Debug, Clone, Default, Args)]
struct RuntimeOption {
    /// onnxruntime's library, or a folder that holds it [default: searched, see `hf2onnx runtime`]
    #[arg(long, value_name = "LIB")]
    runtime: Option<PathBuf>,
}

impl RuntimeOption {
    /// Where to look.
    fn search(&self) -> Search {
        Search { explicit: self.runtime.clone(), ..Search::default() }
    }

    /// Finds and loads onnxruntime, and installs it if there is none.
    fn ensure(&self, output: &Output) -> Result<Library> {
        crate::runtime::ensure(&self.search(), &mut |line| output.say(line))
    }
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
