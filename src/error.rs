//! The one error type. Every failure says where (`subject`), what was found, what was expected, and the next step.

use std::fmt;

/// Result with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something failed; stable strings that scripts can match on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Code {
    /// A file or directory could not be read or written.
    Io,
    /// A file name or link that leads out of the repository.
    PathUnsafe,
    /// The repository has no `config.json`.
    ConfigMissing,
    /// A JSON file does not parse, or is not of the form that it should have.
    ConfigInvalid,
    /// A key of `config.json` that nothing accounts for.
    ConfigUnusedKey,
    /// A key that an expression needs is absent.
    ConfigMissingKey,
    /// A setting that the template says it can not reproduce.
    ConfigUnsupported,
    /// The repository holds no safetensors weights.
    WeightsMissing,
    /// What the weights are depends on who loads them.
    WeightsAmbiguous,
    /// The index names a shard that is not there.
    ShardMissing,
    /// A safetensors file is cut short or its header contradicts the file.
    WeightsCorrupt,
    /// A tensor that a parameter needs is absent.
    TensorMissing,
    /// A tensor that no parameter takes and no rule drops.
    TensorUnexpected,
    /// A tensor whose shape is not the parameter's.
    TensorShape,
    /// A tensor whose values do not survive the type that they are written in.
    TensorRange,
    /// Weights in a form that is not read.
    QuantizationUnsupported,
    /// No template knows this `model_type`.
    ModelTypeUnknown,
    /// A template does not parse or contradicts itself.
    TemplateInvalid,
    /// An expression of a template failed.
    ExpressionFailed,
    /// The specification contradicts itself: the graph can not be built.
    SpecInvalid,
    /// A node does not fit its operator's schema.
    NodeInvalid,
    /// The disk has no room for the output.
    DiskFull,
    /// An ONNX file does not parse, or an initializer's bytes are not where it says.
    ModelInvalid,
    /// The output directory exists.
    OutputExists,
    /// onnxruntime's library was not found or can not be used.
    RuntimeMissing,
    /// onnxruntime refused a model or failed to run it.
    RuntimeFailed,
    /// Nodes run on another provider than the one that was asked for, and that is forbidden.
    NodesElsewhere,
    /// A golden file is missing or unreadable.
    GoldenInvalid,
    /// The model does not compute what the reference computes.
    VerificationFailed,
    /// The tokenizer or its chat template is missing or unreadable.
    TokenizerInvalid,
    /// A command line value that makes no sense.
    UsageInvalid,
    /// The hub has no such model, revision or file, or does not show it.
    HubNotFound,
    /// The hub wants a token, or conditions accepted.
    HubDenied,
    /// The hub can not be reached, or does not answer as it should.
    HubUnreachable,
    /// The network is forbidden, and the cache does not hold the model.
    HubOffline,
    /// A downloaded file does not have the hash that the hub gives.
    DownloadCorrupt,
    /// The user ended it.
    Interrupted,
}

impl Code {
    /// The code as it is printed.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Io => "io",
            Self::PathUnsafe => "path-unsafe",
            Self::ConfigMissing => "config-missing",
            Self::ConfigInvalid => "config-invalid",
            Self::ConfigUnusedKey => "config-unused-key",
            Self::ConfigMissingKey => "config-missing-key",
            Self::ConfigUnsupported => "config-unsupported",
            Self::WeightsMissing => "weights-missing",
            Self::WeightsAmbiguous => "weights-ambiguous",
            Self::ShardMissing => "shard-missing",
            Self::WeightsCorrupt => "weights-corrupt",
            Self::TensorMissing => "tensor-missing",
            Self::TensorUnexpected => "tensor-unexpected",
            Self::TensorShape => "tensor-shape",
            Self::TensorRange => "tensor-range",
            Self::QuantizationUnsupported => "quantization-unsupported",
            Self::ModelTypeUnknown => "model-type-unknown",
            Self::TemplateInvalid => "template-invalid",
            Self::ExpressionFailed => "expression-failed",
            Self::SpecInvalid => "spec-invalid",
            Self::NodeInvalid => "node-invalid",
            Self::DiskFull => "disk-full",
            Self::ModelInvalid => "model-invalid",
            Self::OutputExists => "output-exists",
            Self::RuntimeMissing => "runtime-missing",
            Self::RuntimeFailed => "runtime-failed",
            Self::NodesElsewhere => "nodes-elsewhere",
            Self::GoldenInvalid => "golden-invalid",
            Self::VerificationFailed => "verification-failed",
            Self::TokenizerInvalid => "tokenizer-invalid",
            Self::UsageInvalid => "usage-invalid",
            Self::HubNotFound => "hub-not-found",
            Self::HubDenied => "hub-denied",
            Self::HubUnreachable => "hub-unreachable",
            Self::HubOffline => "hub-offline",
            Self::DownloadCorrupt => "download-corrupt",
            Self::Interrupted => "interrupted",
        }
    }
}

/// What went wrong. Built with [`Error::new`] and the chained setters; empty fields are not printed.
#[derive(Debug, Clone)]
pub struct Error {
    /// The kind of failure.
    pub code: Code,
    /// The file, key, tensor or node that it is about.
    pub subject: String,
    /// What was there.
    pub found: String,
    /// What should have been there.
    pub expected: String,
    /// What to do next.
    pub help: String,
}

/// Longest part of an error; what a file holds may be of any length.
const LONGEST: usize = 4000;

/// A text that may come from a file, safe to print: of bounded length, and without the control characters by which a
/// file could write to the terminal.
fn readable(text: impl fmt::Display) -> String {
    /// Takes letters until it is full.
    struct Short(String);

    impl fmt::Write for Short {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            for letter in text.chars() {
                if self.0.len() >= LONGEST {
                    self.0.push('…');
                    return Err(fmt::Error);
                }
                match letter {
                    '\n' => self.0.push(letter),
                    _ if letter.is_control() => self.0.extend(letter.escape_default()),
                    _ => self.0.push(letter),
                }
            }
            Ok(())
        }
    }

    let mut short = Short(String::new());
    // The only failure is that it was full.
    let _ = fmt::Write::write_fmt(&mut short, format_args!("{text}"));
    short.0
}

impl Error {
    /// An error about `subject`.
    pub fn new(code: Code, subject: impl fmt::Display) -> Self {
        Self { code, subject: readable(subject), found: String::new(), expected: String::new(), help: String::new() }
    }

    /// An I/O error about a path.
    pub fn io(path: &std::path::Path, error: &std::io::Error) -> Self {
        use std::io::ErrorKind as Kind;
        let (expected, help) = match error.kind() {
            Kind::NotFound => ("a file or directory that exists", "check the path"),
            Kind::PermissionDenied => ("permission to read or write it", "check the permissions"),
            Kind::StorageFull | Kind::QuotaExceeded | Kind::FileTooLarge => {
                ("room for the file", "free some disk space, or lift its limits, and run again")
            }
            Kind::NotSeekable => ("a regular file", "put the file itself in its place, or remove it"),
            _ => ("", ""),
        };
        Self::new(Code::Io, path.display()).found(error).expected(expected).help(help)
    }

    /// Says what was found.
    #[must_use]
    pub fn found(mut self, found: impl fmt::Display) -> Self {
        self.found = readable(found);
        self
    }

    /// Says what was expected.
    #[must_use]
    pub fn expected(mut self, expected: impl fmt::Display) -> Self {
        self.expected = readable(expected);
        self
    }

    /// Says what to do next.
    #[must_use]
    pub fn help(mut self, help: impl fmt::Display) -> Self {
        self.help = readable(help);
        self
    }

    /// The error as `--json` prints it.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({ "error": {
            "code": self.code.as_str(), "subject": self.subject, "found": self.found,
            "expected": self.expected, "help": self.help,
        }})
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error[{}]: {}", self.code.as_str(), self.subject)?;
        for (label, text) in [("found", &self.found), ("expected", &self.expected), ("help", &self.help)] {
            if !text.is_empty() {
                write!(f, "\n  {label}: {text}")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_holds_is_neither_endless_nor_written_to_the_terminal() {
        let error = Error::new(Code::Io, "a\u{1b}[31m").found("x".repeat(10_000_000)).help("one\ntwo\u{9b}");
        assert_eq!((error.subject.as_str(), error.help.as_str()), ("a\\u{1b}[31m", "one\ntwo\\u{9b}"));
        assert!(error.found.len() < 5000 && error.found.ends_with("x…"));
    }
}
