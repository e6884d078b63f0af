//! `hf2onnx bench`.

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;

use super::{Output, SessionOptions};
use crate::bench::{Alone, Plan, alone, run};
use crate::error::{Code, Error, Result};
use crate::runtime::Library;

/// Measure how fast a built directory runs, and what memory it takes.
///
/// Random tokens, sessions with default options, speeds of all rows together. With --compare two directories are measured in turns.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  hf2onnx bench out/kjv\n  \
    hf2onnx bench out/kjv --compare out/kjv-f16 --past 0,512 --repeat 9")]
pub(super) struct Bench {
    /// A directory that `hf2onnx build` wrote
    dir: PathBuf,
    /// Another one, measured in turns with the first
    #[arg(long, value_name = "DIR")]
    compare: Option<PathBuf>,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 128)]
    prompt_tokens: usize,
    /// Tokens decoded after it
    #[arg(long, value_name = "N", default_value_t = 64)]
    new_tokens: usize,
    /// Rounds
    #[arg(long, value_name = "N", default_value_t = 5)]
    repeat: usize,
    /// Rounds of load time and memory, each in a process of its own
    #[arg(long, value_name = "N", default_value_t = 3)]
    loads: usize,
    /// Tokens in the cache before the prompt, each number measured by itself
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "0")]
    past: Vec<usize>,
    /// Rows that are run together, each of them with such a prompt
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: usize,
    /// Keep past and present apart even where they may be one buffer
    #[arg(long)]
    apart: bool,
    /// Measure load time and memory of this process
    #[arg(long, hide = true)]
    one: bool,
    #[command(flatten)]
    session: SessionOptions,
}

impl Bench {
    /// Runs the command.
    pub(super) fn run(self, output: &mut Output) -> Result<()> {
        let library = self.session.ensure(output)?;
        let plan = Plan {
            prompt_tokens: self.prompt_tokens,
            new_tokens: self.new_tokens,
            repeat: self.repeat,
            loads: self.loads,
            past: self.past.clone(),
            batch: self.batch,
            apart: self.apart,
            session: self.session.session(),
        };
        if self.one {
            return output.value(&alone(&self.dir, &plan)?);
        }
        let dirs: Vec<PathBuf> = [Some(self.dir.clone()), self.compare.clone()].into_iter().flatten().collect();
        let mut measure = |dir: &Path| self.in_own_process(dir, &library);
        let report = run(&dirs, &plan, library.version.clone(), &mut measure)?;
        if output.is_json() {
            return output.value(&report);
        }
        output.piece(&report.to_string());
        Ok(())
    }

    /// Runs this program again for one directory.
    fn in_own_process(&self, dir: &Path, library: &Library) -> Result<Alone> {
        let program = std::env::current_exe().map_err(|e| Error::new(Code::Io, "this program").found(e))?;
        let past = self.past.iter().copied().max().unwrap_or(0);
        let mut command = Command::new(&program);
        command.args(["bench", "--one", "--json"]).arg(dir).args(self.session.arguments(library));
        let counts = [
            ("--prompt-tokens", self.prompt_tokens),
            ("--new-tokens", self.new_tokens),
            ("--past", past),
            ("--batch", self.batch),
        ];
        for (name, count) in counts {
            command.arg(name).arg(count.to_string());
        }
        if self.apart {
            command.arg("--apart");
        }
        let ran = command.output().map_err(|e| Error::io(&program, &e))?;
        serde_json::from_slice(&ran.stdout).ok().filter(|_| ran.status.success()).ok_or_else(|| {
            let words = String::from_utf8_lossy(&ran.stderr);
            Error::new(Code::RuntimeFailed, dir.display())
                .found(format!("in a process of its own it ended with {}: {}", ran.status, words.trim()))
                .help("is there enough memory?")
        })
    }
}
