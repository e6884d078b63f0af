//! `hf2onnx runtime`.

use clap::{Args, Subcommand};
use serde_json::json;

use super::{Output, RuntimeOption};
use crate::error::{Code, Error, Result};
use crate::runtime::{Findings, PINNED_VERSION, Place, State, check_installed, environment, install};

/// Show which onnxruntime is used and where it was looked for.
///
/// The order is: --runtime, `ORT_DYLIB_PATH`, hf2onnx's cache, Python's site-packages, the system's library folders.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  hf2onnx runtime\n  hf2onnx runtime install")]
pub(super) struct Runtime {
    #[command(flatten)]
    runtime: RuntimeOption,
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Let pip download the pinned onnxruntime and put its library into hf2onnx's cache
    #[command(after_help = "Example:\n  hf2onnx runtime install")]
    Install,
}

impl Runtime {
    /// Runs the command.
    pub(super) fn run(self, output: &mut Output) -> Result<()> {
        let search = self.runtime.search();
        if let Some(Action::Install) = self.action {
            let library = install(&search.cache, &mut |line| output.say(line))?;
            environment(&library.path)?;
            if output.is_json() {
                return output.value(&library);
            }
            output.line(&format!("onnxruntime {PINNED_VERSION}: {}", library.path.display()));
            return Ok(());
        }
        let found = search.run();
        // A library that was installed is checked against its hash; one that is used is loaded.
        let whole =
            search.cache.join(format!("onnxruntime-{PINNED_VERSION}")).exists().then(|| check_installed(&search.cache));
        let damage = whole.and_then(Result::err);
        let loads = found.library().map(|library| environment(&library.path).map(|_| library));
        if output.is_json() {
            let used = loads.as_ref().and_then(|l| l.as_ref().ok());
            output.value(&json!({ "used": used, "places": found.places, "pinned": PINNED_VERSION }))?;
        } else {
            print(&found, output);
        }
        if let Some(error) = damage {
            return Err(error);
        }
        match loads {
            Some(loads) => loads.map(drop),
            None => Err(Error::new(Code::RuntimeMissing, "onnxruntime")
                .found("no usable library")
                .help("run `hf2onnx runtime install`; commands that need it install it by themselves")),
        }
    }
}

fn print(found: &Findings, output: &mut Output) {
    let used = found.library();
    for place in &found.places {
        let state = match &place.state {
            State::Usable { version } => {
                let version = version.as_deref().unwrap_or("of unknown version");
                let mark = if place.library() == used { ", used" } else { "" };
                format!("{} ({version}{mark})", place.shown())
            }
            State::Skipped { reason } => format!("{}: {reason}", place.shown()),
            State::Absent => absent(place),
        };
        output.line(&format!("{:<24} {state}", place.origin.as_str()));
    }
}

fn absent(place: &Place) -> String {
    place.path.as_ref().map_or_else(|| "nothing".to_owned(), |p| format!("nothing in {}", p.display()))
}
