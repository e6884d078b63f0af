//! Stages of a build as spans of `tracing`: `hf2onnx build --timings` adds them up.

/// The target by which these spans are told from others.
pub(crate) const TARGET: &str = "stage";

/// Runs `work` as a stage of this name.
macro_rules! stage {
    ($name:literal, $work:expr) => {
        tracing::info_span!(target: "stage", $name).in_scope(|| $work)
    };
}

pub(crate) use stage;
