//! A decoder in onnxruntime: opened from a built directory, run step by step with its state kept as onnxruntime's own values.

mod probe;
mod row;

use std::fs;
use std::path::{Path, PathBuf};

use ort::session::builder::SessionBuilder;
use ort::session::{Session, SessionInputValue};
use ort::value::{DynValue, Tensor, TensorElementType, ValueType};
use prost::Message as _;

use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::onnx::{GraphProto, ModelProto, ValueInfoProto};

pub use probe::Probe;
pub use row::{Mark, Row};

/// How to open a decoder.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Threads within an operator; 0 lets onnxruntime choose.
    pub threads: usize,
    /// Also returns the values named `hidden_states.{i}`.
    pub hidden_states: bool,
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
    shared: bool,
    vocabulary: Option<u32>,
}

const IDS: &str = "input_ids";
const MASK: &str = "attention_mask";
const POSITIONS: &str = "position_ids";
const HIDDEN: &str = "hidden_states.";

impl Decoder {
    /// Opens a built directory, or an ONNX file. [`crate::runtime::ensure`] has to come first.
    pub fn open(path: &Path, options: &Options) -> Result<Self> {
        let file = locate(path)?;
        let environment = crate::runtime::loaded().ok_or_else(|| {
            Error::new(Code::RuntimeMissing, "onnxruntime").found("no library was loaded").help("run `hf2onnx runtime`")
        })?;
        let session = open_session(environment, &file, options).map_err(|e| refused(&file, &e))?;
        let shared = shares_buffers(path);
        Ok(Self { shared, ..Self::inspect(session, file)? })
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
            if slot.element == ElementType::F16 {
                element = ElementType::F16;
            }
            slots.push(slot);
        }
        let mut hidden: Vec<(usize, String)> =
            outputs.iter().filter_map(|name| Some((name.strip_prefix(HIDDEN)?.parse().ok()?, name.clone()))).collect();
        hidden.sort();
        let vocabulary = logits.dtype().tensor_shape().and_then(|shape| u32::try_from(*shape.last()?).ok());
        let (has_mask, has_positions, logits) = (has(MASK), has(POSITIONS), logits.name().to_owned());
        Ok(Self { session, file, slots, has_mask, has_positions, logits, hidden, element, shared: false, vocabulary })
    }

    /// The ONNX file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The state inputs.
    pub fn slots(&self) -> &[StateSlot] {
        &self.slots
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
        last_position(&logits).map_err(|e| refused(&file, &e))
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

fn open_session(environment: &ort::environment::Environment, file: &Path, options: &Options) -> ort::Result<Session> {
    let mut builder = builder(environment, options)?;
    if !options.hidden_states {
        return builder.commit_from_file(file);
    }
    let bytes = fs::read(file).map_err(|e| ort::Error::new(e.to_string()))?;
    let bytes = with_hidden_states(bytes).map_err(|e| ort::Error::new(e.to_string()))?;
    from_bytes(builder, file, &bytes)
}

fn builder(environment: &ort::environment::Environment, options: &Options) -> ort::Result<SessionBuilder> {
    let builder = Session::builder(environment)?;
    if options.threads > 0 {
        return Ok(builder.with_intra_threads(options.threads)?);
    }
    Ok(builder)
}

/// A session of a model made from a file, whose weights lie beside that file.
fn from_bytes(builder: SessionBuilder, file: &Path, bytes: &[u8]) -> ort::Result<Session> {
    let folder = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = std::path::absolute(folder).map_err(|e| ort::Error::new(e.to_string()))?;
    builder
        .with_config_entry("session.model_external_initializers_file_folder_path", folder.to_string_lossy())?
        .commit_from_memory(bytes)
}

/// Makes the values named `hidden_states.{i}` outputs of a model.
///
/// A protobuf message continues where its bytes end: appending a model whose graph has only outputs adds those
/// outputs and leaves every other byte, known to [`crate::onnx`] or not, as it was.
fn with_hidden_states(mut model: Vec<u8>) -> Result<Vec<u8>, prost::DecodeError> {
    let graph = ModelProto::decode(model.as_slice())?.graph.unwrap_or_default();
    let known: Vec<&str> = graph.output.iter().map(|o| o.name.as_str()).collect();
    let values = graph.node.iter().flat_map(|n| &n.output);
    let output: Vec<ValueInfoProto> = values
        .filter(|name| name.strip_prefix(HIDDEN).is_some_and(|i| i.parse::<usize>().is_ok()))
        .filter(|name| !known.contains(&name.as_str()))
        .map(|name| ValueInfoProto { name: name.clone(), r#type: None })
        .collect();
    let more = ModelProto { graph: Some(GraphProto { output, ..Default::default() }), ..Default::default() };
    model.extend(more.encode_to_vec());
    Ok(model)
}

/// The ONNX file of a directory.
fn locate(path: &Path) -> Result<PathBuf> {
    if path.is_file() {
        return Ok(path.to_path_buf());
    }
    let genai = path.join("genai_config.json");
    if let Ok(text) = fs::read(&genai) {
        let config: serde_json::Value = serde_json::from_slice(&text)
            .map_err(|e| Error::new(Code::ConfigInvalid, genai.display()).found(e).expected("JSON"))?;
        if let Some(name) = config.pointer("/model/decoder/filename").and_then(|v| v.as_str()) {
            return existing(path.join(name));
        }
    }
    let mut found: Vec<PathBuf> = [path.join("onnx"), path.to_path_buf()]
        .iter()
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flat_map(|entries| entries.flatten().map(|e| e.path()))
        .filter(|p| p.extension().is_some_and(|x| x == "onnx"))
        .filter(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("model")))
        .collect();
    // `model.onnx` before `model_fp16.onnx`, and the `onnx` folder before the directory itself.
    found.sort_by_key(|p| (p.components().count() == path.components().count() + 1, p.as_os_str().len(), p.clone()));
    existing(found.into_iter().next().unwrap_or_else(|| path.join("onnx/model.onnx")))
}

/// True if `genai_config.json` says that past and present may be one buffer.
fn shares_buffers(directory: &Path) -> bool {
    let config = fs::read(directory.join("genai_config.json")).ok();
    let config: Option<serde_json::Value> = config.and_then(|text| serde_json::from_slice(&text).ok());
    let share = config.as_ref().and_then(|config| config.pointer("/search/past_present_share_buffer"));
    share.and_then(serde_json::Value::as_bool).unwrap_or(false)
}

fn existing(file: PathBuf) -> Result<PathBuf> {
    if file.is_file() {
        return Ok(file);
    }
    Err(Error::new(Code::Io, file.display())
        .found("no such file")
        .expected("a directory that `hf2onnx build` wrote, or an ONNX file")
        .help("check the path"))
}

fn refused(file: &Path, error: &ort::Error) -> Error {
    Error::new(Code::RuntimeFailed, file.display()).found(error)
}

fn element_of(value: &ValueType) -> Option<ElementType> {
    Some(match value.tensor_type()? {
        TensorElementType::Float32 => ElementType::F32,
        TensorElementType::Float16 => ElementType::F16,
        TensorElementType::Int64 => ElementType::I64,
        TensorElementType::Int32 => ElementType::I32,
        _ => return None,
    })
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

fn tensor(matrix: &IntMatrix) -> ort::Result<Tensor<i64>> {
    Tensor::from_array(([matrix.rows, matrix.columns], matrix.data.clone()))
}

fn zeros(element: ElementType, shape: Vec<usize>) -> ort::Result<DynValue> {
    let count = shape.iter().product();
    Ok(match element {
        ElementType::F16 => Tensor::from_array((shape, vec![half::f16::ZERO; count]))?.into_dyn(),
        ElementType::I64 => Tensor::from_array((shape, vec![0_i64; count]))?.into_dyn(),
        ElementType::I32 => Tensor::from_array((shape, vec![0_i32; count]))?.into_dyn(),
        _ => Tensor::from_array((shape, vec![0_f32; count]))?.into_dyn(),
    })
}

fn to_floats(value: &DynValue) -> ort::Result<Floats> {
    let sizes = |shape: &[i64]| shape.iter().map(|d| usize::try_from(*d).unwrap_or(0)).collect();
    if value.dtype().tensor_type() == Some(TensorElementType::Float16) {
        let (shape, data) = value.try_extract_tensor::<half::f16>()?;
        return Ok(Floats { shape: sizes(shape), data: data.iter().map(|x| x.to_f32()).collect() });
    }
    let (shape, data) = value.try_extract_tensor::<f32>()?;
    Ok(Floats { shape: sizes(shape), data: data.to_vec() })
}

/// The last vocabulary-sized piece of the logits.
fn last_position(value: &DynValue) -> ort::Result<Vec<f32>> {
    let from = |shape: &[i64], len: usize| {
        let vocabulary = shape.last().and_then(|d| usize::try_from(*d).ok()).unwrap_or(0);
        len.saturating_sub(vocabulary)
    };
    if value.dtype().tensor_type() == Some(TensorElementType::Float16) {
        let (shape, data) = value.try_extract_tensor::<half::f16>()?;
        return Ok(data.iter().skip(from(shape, data.len())).map(|x| x.to_f32()).collect());
    }
    let (shape, data) = value.try_extract_tensor::<f32>()?;
    Ok(data.iter().skip(from(shape, data.len())).copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ort::value::{Shape, SymbolicDimensions};

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
    fn hidden_states_are_added_as_outputs_and_other_bytes_stay() {
        let node = crate::onnx::NodeProto { output: vec!["hidden_states.0".into(), "x".into()], ..Default::default() };
        let graph = GraphProto { node: vec![node], name: "main".into(), ..Default::default() };
        let mut bytes = ModelProto { ir_version: 8, graph: Some(graph), ..Default::default() }.encode_to_vec();
        // Field 200, which this crate's messages do not know.
        bytes.extend([0xc2, 0x0c, 0x01, 0x2a]);
        let more = with_hidden_states(bytes.clone()).unwrap();
        assert!(more.starts_with(&bytes));
        let graph = ModelProto::decode(more.as_slice()).unwrap().graph.unwrap();
        assert_eq!((graph.name.as_str(), graph.node.len()), ("main", 1));
        assert_eq!(graph.output.iter().map(|o| o.name.as_str()).collect::<Vec<_>>(), ["hidden_states.0"]);
        assert_eq!(with_hidden_states(more.clone()).unwrap().len() - more.len(), 2);
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
