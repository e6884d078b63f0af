//! Where a command runs its model: onnxruntime's library, and its execution provider.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::Output;
use crate::error::Result;
use crate::runtime::{Library, Provider, Search};
use crate::session;

/// The option of every command that loads onnxruntime.
#[derive(Debug, Clone, Default, Args)]
pub(super) struct RuntimeOption {
    /// onnxruntime's library, or a folder that holds it [default: searched, see `hf2onnx runtime`]
    #[arg(long, value_name = "LIB")]
    pub(super) runtime: Option<PathBuf>,
}

impl RuntimeOption {
    /// Where to look for a library with a provider.
    pub(super) fn search(&self, provider: Provider) -> Search {
        Search { provider, explicit: self.runtime.clone(), ..Search::default() }
    }

    /// Finds and loads onnxruntime, and installs it if there is none.
    pub(super) fn ensure(&self, output: &Output) -> Result<Library> {
        crate::runtime::ensure(&self.search(Provider::Cpu), &mut |line| output.say(line))
    }
}

/// An execution provider on the command line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum ProviderName {
    /// The processor
    #[default]
    Cpu,
    /// An NVIDIA GPU, with the library of onnxruntime-gpu (`hf2onnx runtime install --provider cuda`)
    Cuda,
}

impl From<ProviderName> for Provider {
    fn from(name: ProviderName) -> Self {
        match name {
            ProviderName::Cpu => Self::Cpu,
            ProviderName::Cuda => Self::Cuda,
        }
    }
}

/// The options of every command that runs a finished model.
#[derive(Debug, Clone, Default, Args)]
pub(super) struct SessionOptions {
    /// Where onnxruntime runs the model
    #[arg(long, value_enum, default_value_t)]
    provider: ProviderName,
    /// An option of the provider, by onnxruntime's name: `device_id=1` (repeatable)
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_and_value)]
    provider_option: Vec<(String, String)>,
    /// Threads within an operator [default: as many as cores]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
    #[command(flatten)]
    runtime: RuntimeOption,
}

fn key_and_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("no KEY=VALUE")?;
    if key.is_empty() { Err("no KEY=VALUE".into()) } else { Ok((key.to_owned(), value.to_owned())) }
}

impl SessionOptions {
    /// Finds and loads onnxruntime with the provider.
    pub(super) fn ensure(&self, output: &Output) -> Result<Library> {
        let search = self.runtime.search(self.provider());
        let library = crate::runtime::ensure(&search, &mut |line| output.say(line))?;
        if self.provider() == Provider::Cpu && !self.provider_option.is_empty() {
            output.say("--provider-option is left out: the processor's provider has no options");
        }
        Ok(library)
    }

    /// The provider.
    pub(super) fn provider(&self) -> Provider {
        self.provider.into()
    }

    /// How to open sessions.
    pub(super) fn session(&self) -> session::Options {
        session::Options {
            threads: self.threads,
            provider: self.provider(),
            provider_options: self.provider_option.clone(),
            ..session::Options::default()
        }
    }

    /// The same options for this program in a process of its own, with the library that was found.
    pub(super) fn arguments(&self, library: &Library) -> Vec<std::ffi::OsString> {
        let mut arguments = vec!["--provider".into(), self.provider().as_str().into()];
        for (key, value) in &self.provider_option {
            arguments.extend(["--provider-option".into(), format!("{key}={value}").into()]);
        }
        arguments.extend(["--threads".into(), self.threads.to_string().into()]);
        arguments.extend(["--runtime".into(), library.path.clone().into()]);
        arguments
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        options: SessionOptions,
    }

    #[test]
    fn options_come_out_as_they_went_in() {
        let words = ["x", "--provider", "cuda", "--provider-option", "a=b=c", "--threads", "3"];
        let options = Program::try_parse_from(words).unwrap().options;
        let session = options.session();
        assert_eq!((session.provider, session.threads), (Provider::Cuda, 3));
        assert_eq!(session.provider_options, [("a".to_owned(), "b=c".to_owned())]);
        let library = Library { path: "/lib".into(), version: None, origin: crate::runtime::Origin::Flag };
        let again = [vec!["x".into()], options.arguments(&library)].concat();
        let again = Program::try_parse_from(again).unwrap().options;
        assert_eq!(again.runtime.runtime, Some("/lib".into()));
        assert_eq!(again.arguments(&library), options.arguments(&library));
    }

    #[test]
    fn what_is_no_provider_is_refused() {
        for words in [["x", "--provider", "rocm"], ["x", "--provider-option", "a"], ["x", "--provider-option", "=b"]] {
            assert!(Program::try_parse_from(words).is_err(), "{words:?}");
        }
        assert_eq!(Program::try_parse_from(["x"]).unwrap().options.provider(), Provider::Cpu);
    }
}
