//! `--timings`: how long each stage took. Stages are spans of `tracing`, so nothing in the pipeline knows who listens.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::span::{Attributes, Id};
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::registry::LookupSpan;

use crate::stage;

/// Adds up the time that each stage takes, in the order in which they first began.
#[derive(Debug, Clone)]
pub(super) struct Timings {
    begun: Instant,
    stages: Arc<Mutex<Stages>>,
}

#[derive(Debug, Default)]
struct Stages {
    order: Vec<&'static str>,
    spent: BTreeMap<&'static str, Duration>,
}

impl Timings {
    pub(super) fn start() -> Self {
        Self { begun: Instant::now(), stages: Arc::default() }
    }

    /// Name and seconds of every stage, and of the whole.
    pub(super) fn seconds(&self) -> Vec<(String, f64)> {
        let stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        let one = |name: &&str| ((*name).to_owned(), stages.spent.get(name).map_or(0.0, Duration::as_secs_f64));
        let mut all: Vec<(String, f64)> = stages.order.iter().map(one).collect();
        all.push(("total".to_owned(), self.begun.elapsed().as_secs_f64()));
        all
    }
}

/// True for the spans that stages are.
pub(super) fn is_stage(metadata: &Metadata<'_>) -> bool {
    metadata.is_span() && metadata.target() == stage::TARGET
}

struct Since(Instant);

impl<S: Subscriber + for<'l> LookupSpan<'l>> Layer<S> for Timings {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let name = attributes.metadata().name();
        let mut stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        if !stages.spent.contains_key(name) {
            stages.spent.insert(name, Duration::ZERO);
            stages.order.push(name);
        }
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(Since(Instant::now()));
        }
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let Some(span) = context.span(&id) else { return };
        let spent = span.extensions().get::<Since>().map(|since| since.0.elapsed()).unwrap_or_default();
        let mut stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        *stages.spent.entry(span.name()).or_default() += spent;
    }

    fn on_event(&self, _: &Event<'_>, _: Context<'_, S>) {}
}
