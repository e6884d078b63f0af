//! Calibration: the float build of a model reads a text, and what its matrices are multiplied with is remembered as
//! second moments, by which [`crate::quantize::quantize_with_inputs`] weighs their errors (GPTQ: Frantar et al., 2022,
//! arXiv:2210.17323). Experts and tables have no such inputs and keep the recipe's algorithm.
//!
//! The moments of a large model do not fit in memory, so they are made in the order in which the matrices are written,
//! for as many at a time as fit: the text is read once for each such group, by the layers up to the group's last one.
//!
//! The same reading gives the scales of caches in 8 bits ([`Calibration::cache_scales`]).
//!
//! Sums have one order on any number of threads; the activations are onnxruntime's. So the same text gives the same
//! model on one machine, and another machine may round some weights differently.

mod cache;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::build::{Composite, Logits, Model};
use crate::compile::{self, Compiled, KvCache, Options, Weights, Written, compile};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::graph::{Dim, Graph};
use crate::lower::Padding;
use crate::opset::{Positions, Target};
use crate::quantize::{Inputs, Moments, Scheme};
use crate::read::hash_file;
use crate::recipe::Calibrated;
use crate::session::{self, Probe};
use crate::tokenizer::Tokenizer;
use crate::weight::Weight;
use crate::write::{self, Force};

/// Tokens that are read where nothing else is said.
pub const TOKENS: usize = 16 << 10;
/// Tokens that are read at a time, each time from the start of the model's context.
const WINDOW: usize = 512;
/// Fewer say nothing of a layer's inputs.
const FEWEST: usize = 256;
/// No text has more bytes a token: what lies behind them is not read.
const BYTES_PER_TOKEN: usize = 32;
/// Bytes of second moments that are held at a time.
const BUDGET: usize = 384 << 20;

/// A text for a model to read.
#[derive(Debug, Clone)]
pub struct Text<'p> {
    /// Its file.
    pub path: &'p Path,
    /// Tokens to read at most.
    pub tokens: usize,
}

/// What is known of the inputs of a model's matrices. Dropped, it removes the float build that it runs.
#[derive(Debug)]
pub struct Calibration {
    /// The float build, which is never put in a place of its own.
    model: Written,
    windows: Vec<Vec<i64>>,
    /// Where a matrix stands in the float build, by its expression over tensors.
    sites: BTreeMap<String, Place>,
    caches: Vec<cache::CacheSite>,
    /// Matrices that will be asked for.
    announced: VecDeque<Option<Site>>,
    found: BTreeMap<Site, Arc<Inputs>>,
    budget: usize,
    /// What was read.
    pub record: Calibrated,
}

/// What some matrices are multiplied with.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    /// Values of the float build's graph.
    names: BTreeSet<String>,
    /// Length of an input.
    columns: usize,
    /// Their rows are embeddings too.
    tied: bool,
}

/// The same for matrices with blocks of one size.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Site {
    place: Place,
    /// Columns of a block of those matrices.
    block: usize,
}

impl Calibration {
    /// Makes the float build of what `options` build, beside `output`, for a text. [`crate::runtime::ensure`] has to
    /// come before the first matrix is asked for.
    ///
    /// # Errors
    /// No tokenizer, a text that can not be read or is too short, a model that has no float build, or no disk for it.
    pub fn new(options: &Options, text: &Text, output: &Path) -> Result<Self> {
        let tokenizer = Tokenizer::open(&options.repository)?;
        let plain = Options {
            target: Target::named("ort-cpu")?,
            element: ElementType::F32,
            padding: Padding::Right,
            // Rotated keys are values of the graph, and can be looked at.
            positions: Positions::Ids,
            logits: Logits::All,
            // Takes no room where the checkpoint's files can be linked.
            weights: Weights::Link { hash: false },
            recipe: None,
            cache: KvCache::Float,
            ..options.clone()
        };
        let compiled = compile(&plain)?;
        let window = compiled.description.spec.context_length.clamp(1, WINDOW);
        let (windows, tokens) = windows(&tokenizer, text, window)?;
        let hash = hash_file(text.path, &AtomicBool::new(false))?;
        let sha256 = hash.sha256.unwrap_or_default();
        let (sites, caches) = (sites(&compiled), cache::sites(&compiled.description.spec));
        let model = compile::write(&compiled, &plain, output, Force::Yes, |_| {})?;
        let record = Calibrated { method: "gptq", sha256, tokens, window };
        let (announced, found) = (VecDeque::new(), BTreeMap::new());
        Ok(Self { model, windows, sites, caches, announced, found, budget: BUDGET, record })
    }

    /// The same with other memory for second moments, in bytes; those of one input are held in any case.
    #[must_use]
    pub fn with_budget(self, budget: usize) -> Self {
        Self { budget, ..self }
    }

    /// What a matrix is multiplied with, or all of the matrices that are joined in it.
    fn place(&self, matrix: &Weight) -> Option<&Place> {
        if let Some(known) = self.sites.get(&key(matrix)) {
            return Some(known);
        }
        let Weight::Concat(0, parts) = matrix else { return None };
        let mut places = parts.iter().map(|part| self.sites.get(&key(part)));
        let first = places.next()??;
        places.all(|place| place == Some(first)).then_some(first)
    }

    /// Lets the model read the text for the next matrices, as many as fit.
    fn read(&mut self) -> Result<()> {
        self.found.clear();
        let mut group: BTreeMap<Site, Moments> = BTreeMap::new();
        let mut bytes = 0;
        for site in self.announced.iter().flatten().filter(|site| site.place.columns > 0) {
            if group.contains_key(site) {
                continue;
            }
            let columns = site.place.columns;
            bytes += 4 * columns * columns;
            if bytes > self.budget && !group.is_empty() {
                break;
            }
            group.insert(site.clone(), Moments::new(columns));
        }
        let names: BTreeSet<&String> = group.keys().flat_map(|site| &site.place.names).collect();
        let names: Vec<String> = names.into_iter().cloned().collect();
        let mut probe = Probe::open(self.model.path(), &session::Options::default(), &names)?;
        for window in &self.windows {
            probe.run(window, |index, values| {
                let name = names.get(index);
                let meant = |site: &Site| name.is_some_and(|name| site.place.names.contains(name));
                let mut meant = group.iter_mut().filter(|(site, _)| meant(site));
                meant.try_for_each(|(site, moments)| moments.add(values).map_err(|reason| refused(site, &reason)))
            })?;
        }
        drop(probe);
        while let Some((site, moments)) = group.pop_first() {
            let inputs = moments.finish(site.block, site.place.tied).map_err(|reason| refused(&site, &reason))?;
            self.found.insert(site, Arc::new(inputs));
        }
        Ok(())
    }
}

impl write::Calibration for Calibration {
    fn announce(&mut self, matrices: &[(&Weight, Scheme)]) {
        let site = |(matrix, scheme): &(&Weight, Scheme)| {
            Some(Site { place: self.place(matrix)?.clone(), block: scheme.block_size() })
        };
        self.announced = matrices.iter().map(site).collect();
    }

    fn next(&mut self) -> Result<Option<Arc<Inputs>>> {
        let Some(Some(site)) = self.announced.front().cloned() else {
            self.announced.pop_front();
            return Ok(None);
        };
        if !self.found.contains_key(&site) {
            self.read()?;
        }
        self.announced.pop_front();
        Ok(self.found.get(&site).cloned())
    }
}

/// What is written names matrices by what they are made from.
fn key(matrix: &Weight) -> String {
    format!("{matrix:?}")
}

/// What each matrix of a float build is multiplied with.
fn sites(compiled: &Compiled) -> BTreeMap<String, Place> {
    let tables = tables(&compiled.model);
    let graph = &compiled.lowered.graph;
    let mut sites = BTreeMap::new();
    for parameter in &compiled.plan.parameters {
        let Some(values) = compiled.lowered.inputs.get(&parameter.name) else { continue };
        let width = |id| graph.ty(id).shape.last().and_then(Dim::value).and_then(|width| usize::try_from(width).ok());
        let columns = parameter.shape.last().copied().unwrap_or(0);
        if values.iter().all(|id| width(*id) == Some(columns) && graph.ty(*id).element == ElementType::F32) {
            let names = values.iter().map(|id| graph.value(*id).name.clone()).collect();
            let tied = tables.contains(parameter.name.as_str());
            sites.insert(key(&parameter.weight), Place { names, columns, tied });
        }
    }
    sites
}

/// The parameters of which tokens look up rows.
fn tables(model: &Graph<Model>) -> BTreeSet<&str> {
    let lookups = model.nodes.iter().filter(|node| node.op == Composite::Embed);
    let tables = lookups.filter_map(|node| node.inputs.get(1).copied().flatten());
    tables.map(|table| model.value(table).name.as_str()).collect()
}

fn refused(site: &Site, reason: &str) -> Error {
    let names: Vec<&str> = site.place.names.iter().map(String::as_str).collect();
    Error::new(Code::RuntimeFailed, names.join(", "))
        .found(reason)
        .expected("finite numbers while the model reads the calibration text")
        .help("build without --calibrate")
}

/// The start of a text in windows, each with what the tokenizer puts before a prompt; and its tokens.
fn windows(tokenizer: &Tokenizer, text: &Text, window: usize) -> Result<(Vec<Vec<i64>>, usize)> {
    let content = crate::regular::read_text(text.path, crate::regular::TEXT).map_err(|e| Error::io(text.path, &e))?;
    let most = text.tokens.saturating_mul(BYTES_PER_TOKEN);
    let end = (0..=most.min(content.len())).rev().find(|end| content.is_char_boundary(*end));
    let ids = tokenizer.encode(content.get(..end.unwrap_or(0)).unwrap_or(&content), false)?;
    let ids: Vec<i64> = ids.into_iter().take(text.tokens).map(i64::from).collect();
    if ids.len() < FEWEST {
        return Err(Error::new(Code::UsageInvalid, "--calibrate")
            .found(format!("{} tokens of {}", ids.len(), text.path.display()))
            .expected(format!("{FEWEST} tokens at least"))
            .help("give a longer text of the kind that the model will read"));
    }
    // More than one token would be a frame around the prompt, and not its start.
    let start: Vec<i64> = match tokenizer.encode("", true)?.as_slice() {
        [start] => vec![i64::from(*start)],
        _ => Vec::new(),
    };
    let body = window.saturating_sub(start.len()).max(1);
    Ok((ids.chunks(body).map(|ids| [&start, ids].concat()).collect(), ids.len()))
}
