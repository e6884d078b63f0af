//! A decoder in onnxruntime: opened from a built directory, run step by step with its state kept as onnxruntime's own values.

mod in_place;
mod open;
mod placement;
mod probe;
mod recast;
mod row;
mod value;

use std::path::{Path, PathBuf};

use ort::session::{Session, SessionInputValue};
use ort::value::{DynValue, ValueType};

use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::runtime::Provider;
use open::{Caches, environment, locate, not_opened, open_session};
use placement::Profile;
use value::{element_of, last_positions, tensor, to_floats, zeros};

pub use placement::{Operator, Placement};
pub use probe::Probe;
pub use row::{Mark, Row};

/// How to open a decoder.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Threads within an operator; 0 lets onnxruntime choose.
    pub threads: usize,
    /// Also returns the values named `hidden_states.{i}`.
    pub hidden_states: bool,
    /// Where the model runs.
    pub provider: Provider,
    /// Options of the provider, by onnxruntime's names.
    pub provider_options: Vec<(String, String)>,
    /// Records where each node runs, for [`Decoder::placement`].
    pub placement: bool,
    /// Past and present are one buffer in every run, where they may be. Caches in 8 bits on a GPU are so in any case.
    pub in_place: bool,
}

impl Options {
    /// The number of the device that the provider runs on.
    fn device(&self) -> Result<i32> {
        let Some((_, number)) = self.provider_options.iter().find(|(key, _)| key == "device_id") else { return Ok(0) };
        number.parse().ok().filter(|number| *number >= 0).ok_or_else(|| {
            Error::new(Code::UsageInvalid, "device_id").found(number).expected("a device's number, from 0 up")
        })
    }
}

/// A matrix of integers, row by row: token ids, a mask or positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IntMatrix {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub columns: usize,
    /// The values.
    pub data: Vec<i64>,
}

impl IntMatrix {
    /// A matrix, if there are as many values as it has places.
    pub fn new(rows: usize, columns: usize, data: Vec<i64>) -> Option<Self> {
        (rows.checked_mul(columns)? == data.len()).then_some(Self { rows, columns, data })
    }

    /// One row.
    pub fn from_row(data: Vec<i64>) -> Self {
        Self { rows: 1, columns: data.len(), data }
    }

    /// A row; empty when there is none of that number.
    pub fn row(&self, row: usize) -> &[i64] {
        self.data.get(row * self.columns..(row + 1) * self.columns).unwrap_or_default()
    }

    /// The columns of a range, of every row.
    #[must_use]
    pub fn columns(&self, range: std::ops::Range<usize>) -> Self {
        let data: Vec<i64> =
            (0..self.rows).flat_map(|r| self.row(r).get(range.clone()).unwrap_or_default()).copied().collect();
        Self { rows: self.rows, columns: range.len(), data }
    }

    /// The first rows.
    #[must_use]
    pub fn first_rows(&self, rows: usize) -> Self {
        let rows = rows.min(self.rows);
        Self { rows, columns: self.columns, data: self.data.iter().take(rows * self.columns).copied().collect() }
    }
}

/// A tensor of floats on this side of onnxruntime.
#[derive(Debug, Clone, PartialEq)]
pub struct Floats {
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Values, the last dimension fastest.
    pub data: Vec<f32>,
}

/// What one run returns.
#[derive(Debug)]
pub struct Step {
    /// `[batch, positions, vocabulary]`; positions may be only the last one.
    pub logits: Floats,
    /// The hidden states with their numbers, if the decoder was opened with them.
    pub hidden_states: Vec<(usize, Floats)>,
}

/// The caches and recurrent states of some rows, as onnxruntime holds them.
#[derive(Debug)]
pub struct State {
    values: Vec<DynValue>,
}

/// A state input and the output that carries it on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateSlot {
    /// Input.
    pub past: String,
    /// Output.
    pub present: String,
    /// Element type.
    pub element: ElementType,
    /// Dimensions; `None` is the batch in the first place and a length that starts at 0 elsewhere.
    pub shape: Vec<Dim>,
}

/// A dimension of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dim {
    /// A number.
    Fixed(usize),
    /// The number of rows.
    Batch,
    /// A length, 0 in an empty state.
    Length,
}

/// Whether past and present of a cache are one buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Buffers {
    /// They are two.
    Apart,
    /// They may be one.
    Either,
    /// They are one in every run.
    One,
}

/// A decoder in onnxruntime.
#[derive(Debug)]
pub struct Decoder {
    session: Session,
    file: PathBuf,
    slots: Vec<StateSlot>,
    has_mask: bool,
    has_positions: bool,
    logits: String,
    hidden: Vec<(usize, String)>,
    element: ElementType,
    buffers: Buffers,
    vocabulary: Option<u32>,
    provider: Provider,
    device: i32,
    profile: Option<Profile>,
}

const IDS: &str = "input_ids";
const MASK: &str = "attention_mask";
const POSITIONS: &str = "position_ids";
const HIDDEN: &str = "hidden_states.";

impl Decoder {
    /// Opens a built directory, or an ONNX file. [`crate::runtime::ensure`] has to come first.
    pub fn open(path: &Path, options: &Options) -> Result<Self> {
        let file = locate(path)?;
        let profile = options.placement.then(Profile::new).transpose()?;
        let session = open_session(environment()?, &file, options, profile.as_ref());
        let session = session.map_err(|e| not_opened(&file, options, &e))?;
        let (caches, provider, device) = (Caches::of(path), options.provider, options.device()?);
        let mut decoder = Self { provider, device, profile, ..Self::inspect(session, file)? };
        decoder.slots.iter_mut().for_each(|slot| caches.complete(slot));
        decoder.buffers = if caches.shared { Buffers::Either } else { Buffers::Apart };
        if decoder.shares_buffers() && (options.in_place || decoder.needs_one_buffer()) {
            decoder.buffers = Buffers::One;
        }
        Ok(decoder)
    }

    fn inspect(session: Session, file: PathBuf) -> Result<Self> {
        let outputs: Vec<String> = session.outputs().iter().map(|o| o.name().to_owned()).collect();
        let has = |name: &str| session.inputs().iter().any(|i| i.name() == name);
        let unfit = |found: String, expected: &str| {
            Error::new(Code::RuntimeFailed, file.display()).found(found).expected(expected).help("is this a decoder?")
        };
        if !has(IDS) {
            return Err(unfit("no input `input_ids`".into(), "the inputs of a decoder"));
        }
        let logits = session.outputs().iter().find(|o| o.name() == "logits");
        let logits = logits.ok_or_else(|| unfit(format!("outputs {}", outputs.join(", ")), "an output `logits`"))?;
        let mut element = element_of(logits.dtype()).unwrap_or(ElementType::F32);
        let mut slots = Vec::new();
        for input in session.inputs() {
            if matches!(input.name(), IDS | MASK | POSITIONS) {
                continue;
            }
            let slot = slot_of(input.name(), input.dtype(), &outputs)
                .map_err(|found| unfit(found, "state inputs `past...` with outputs `present...`"))?;
            if matches!(slot.element, ElementType::F16 | ElementType::BF16) {
                element = slot.element;
            }
            slots.push(slot);
        }
        let mut hidden: Vec<(usize, String)> =
            outputs.iter().filter_map(|name| Some((name.strip_prefix(HIDDEN)?.parse().ok()?, name.clone()))).collect();
        hidden.sort();
        let vocabulary = logits.dtype().tensor_shape().and_then(|shape| u32::try_from(*shape.last()?).ok());
        let (has_mask, has_positions, logits) = (has(MASK), has(POSITIONS), logits.name().to_owned());
        let (buffers, provider, device, profile) = (Buffers::Apart, Provider::Cpu, 0, None);
        Ok(Self {
            session,
            file,
            slots,
            has_mask,
            has_positions,
            logits,
            hidden,
            element,
            buffers,
            vocabulary,
            provider,
            device,
            profile,
        })
    }

    /// The ONNX file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The state inputs.
    pub fn slots(&self) -> &[StateSlot] {
        &self.slots
    }

    /// Where it runs.
    pub fn provider(&self) -> Provider {
        self.provider
    }

    /// The narrowest float type among logits and caches: what the results can be as exact as.
    pub fn element(&self) -> ElementType {
        self.element
    }

    /// The number of tokens that the logits are for, where the graph says it.
    pub fn vocabulary(&self) -> Option<u32> {
        self.vocabulary
    }

    /// An empty state for some rows: no cached tokens, recurrent states zero.
    pub fn empty_state(&self, rows: usize) -> Result<State> {
        let values = self.slots.iter().map(|slot| {
            let dim = |d: &Dim| match d {
                Dim::Fixed(n) => *n,
                Dim::Batch => rows,
                Dim::Length => 0,
            };
            zeros(slot.element, slot.shape.iter().map(dim).collect())
        });
        let values = values.collect::<ort::Result<Vec<_>>>().map_err(|e| refused(&self.file, &e))?;
        Ok(State { values })
    }

    /// Runs new tokens on a state and moves the state on. The mask covers the cached tokens as well.
    pub fn run(&mut self, ids: &IntMatrix, mask: &IntMatrix, positions: &IntMatrix, state: &mut State) -> Result<Step> {
        let hidden = self.hidden.clone();
        let file = self.file.clone();
        let (logits, values) = self.step(ids, mask, positions, state, true)?;
        let logits = to_floats(&logits).map_err(|e| refused(&file, &e))?;
        let hidden_states = hidden.iter().zip(&values).map(|((i, _), v)| Ok((*i, to_floats(v)?)));
        let hidden_states = hidden_states.collect::<ort::Result<_>>().map_err(|e| refused(&file, &e))?;
        Ok(Step { logits, hidden_states })
    }

    /// As [`Self::run`] for one row, and copies only the last position's logits.
    pub fn run_last(
        &mut self,
        ids: &IntMatrix,
        mask: &IntMatrix,
        positions: &IntMatrix,
        state: &mut State,
    ) -> Result<Vec<f32>> {
        let file = self.file.clone();
        let (logits, _) = self.step(ids, mask, positions, state, false)?;
        last_positions(&logits).map_err(|e| refused(&file, &e))
    }

    /// One run: the logits, and the hidden states if they are wanted.
    fn step(
        &mut self,
        ids: &IntMatrix,
        mask: &IntMatrix,
        positions: &IntMatrix,
        state: &mut State,
        hidden: bool,
    ) -> Result<(DynValue, Vec<DynValue>)> {
        crate::interrupt::check()?;
        if self.buffers == Buffers::One {
            return self.step_in_place([ids, mask, positions], state, hidden);
        }
        let file = self.file.clone();
        let failed = |e: ort::Error| refused(&file, &e);
        let mut feed: Vec<(&str, SessionInputValue<'_>)> = vec![(IDS, tensor(ids).map_err(failed)?.into())];
        if self.has_mask {
            feed.push((MASK, tensor(mask).map_err(failed)?.into()));
        }
        if self.has_positions {
            feed.push((POSITIONS, tensor(positions).map_err(failed)?.into()));
        }
        // The old state moves into the call and is freed by it; the new one is what comes out.
        let values = std::mem::take(&mut state.values);
        feed.extend(self.slots.iter().zip(values).map(|(slot, value)| (slot.past.as_str(), value.into())));
        let mut outputs = self.session.run(feed).map_err(failed)?;
        let mut take = |name: &str| {
            outputs.remove(name).ok_or_else(|| {
                Error::new(Code::RuntimeFailed, file.display()).found(format!("the run returned no `{name}`"))
            })
        };
        state.values = self.slots.iter().map(|slot| take(&slot.present)).collect::<Result<_>>()?;
        let logits = take(&self.logits)?;
        let wanted = self.hidden.iter().filter(|_| hidden);
        let hidden = wanted.map(|(_, name)| take(name)).collect::<Result<_>>()?;
        Ok((logits, hidden))
    }
}

fn refused(file: &Path, error: impl std::fmt::Display) -> Error {
    Error::new(Code::RuntimeFailed, file.display()).found(error)
}

/// The slot of a state input, or why it is none.
fn slot_of(name: &str, value: &ValueType, outputs: &[String]) -> Result<StateSlot, String> {
    let rest = name.strip_prefix("past").ok_or_else(|| format!("unknown input `{name}`"))?;
    let mut candidates = vec![format!("present{rest}")];
    if let Some(rest) = rest.strip_prefix("_key_values") {
        candidates.insert(0, format!("present{rest}"));
    }
    let present = candidates.into_iter().find(|c| outputs.contains(c));
    let present = present.ok_or_else(|| format!("no output carries on the state input `{name}`"))?;
    let (Some(element), ValueType::Tensor { shape, dimension_symbols, .. }) = (element_of(value), value) else {
        return Err(format!("state input `{name}` is {value}"));
    };
    let dim = |(axis, size): (usize, &i64)| match usize::try_from(*size) {
        Ok(size) => Dim::Fixed(size),
        Err(_) => match dimension_symbols.get(axis).map(String::as_str) {
            Some("batch_size" | "batch") => Dim::Batch,
            Some("") | None if axis == 0 => Dim::Batch,
            _ => Dim::Length,
        },
    };
    let shape = shape.iter().enumerate().map(dim).collect();
    Ok(StateSlot { past: name.to_owned(), present, element, shape })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ort::value::{Shape, SymbolicDimensions, TensorElementType};

    fn state(symbols: [&str; 4], sizes: [i64; 4]) -> ValueType {
        ValueType::Tensor {
            ty: TensorElementType::Float16,
            shape: Shape::new(sizes),
            dimension_symbols: SymbolicDimensions::new(symbols.map(str::to_owned)),
        }
    }

    #[test]
    fn states_are_matched_with_the_outputs_that_carry_them_on() {
        let outputs = ["logits", "present.3.key", "present_conv.0"].map(str::to_owned);
        let cache = state(["batch_size", "", "past_sequence_length", ""], [-1, 2, -1, 32]);
        let slot = slot_of("past_key_values.3.key", &cache, &outputs).unwrap();
        assert_eq!(slot.present, "present.3.key");
        assert_eq!(slot.element, ElementType::F16);
        assert_eq!(slot.shape, [Dim::Batch, Dim::Fixed(2), Dim::Length, Dim::Fixed(32)]);
        assert_eq!(slot_of("past_conv.0", &cache, &outputs).unwrap().present, "present_conv.0");
        assert!(slot_of("past_ssm.0", &cache, &outputs).unwrap_err().contains("past_ssm.0"));
        assert!(slot_of("token_type_ids", &cache, &outputs).unwrap_err().contains("unknown input"));
    }

    #[test]
    fn a_head_whose_size_has_a_name() {
        let cache = state(["batch_size", "", "past_sequence_length", "kv_cache_dim"], [-1, 2, -1, -1]);
        let mut slot = slot_of("past_key_values.3.key", &cache, &["present.3.key".to_owned()]).unwrap();
        Caches { shared: true, head_size: Some(32) }.complete(&mut slot);
        assert_eq!(slot.shape, [Dim::Batch, Dim::Fixed(2), Dim::Length, Dim::Fixed(32)]);
    }

    #[test]
    fn caches_lie_on_the_device_that_runs() {
        let of = |value: &str| {
            let provider_options = vec![("use_tf32".into(), "1".into()), ("device_id".into(), value.into())];
            Options { provider_options, ..Options::default() }.device()
        };
        assert_eq!((of("3").unwrap(), Options::default().device().unwrap()), (3, 0));
        assert!(of("-1").is_err() && of("gpu").is_err());
    }

    #[test]
    fn columns_and_rows_are_cut_out_of_matrices() {
        let m = IntMatrix::new(2, 3, vec![1, 2, 3, 4, 5, 6]).unwrap();
        assert_eq!(m.columns(1..3).data, [2, 3, 5, 6]);
        assert_eq!(m.first_rows(1).data, [1, 2, 3]);
        assert_eq!(m.row(7), &[] as &[i64]);
        assert!(IntMatrix::new(2, 2, vec![1]).is_none());
    }
}
