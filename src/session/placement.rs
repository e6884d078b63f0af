//! Where onnxruntime runs each node of a model.
//!
//! A session says it in its profile, an event for each kernel that ran: of the graph as it was optimised, and with the
//! copies between devices that were put into it. The record of the interface (`Session_GetEpGraphAssignmentInfo`) would
//! need no run, but it is made before both, and releases before 1.24 do not have it. What it would say of the branches of
//! an `If` that were not taken, a profile does not.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Decoder, IntMatrix, refused};
use crate::error::{Code, Error, Result};
use crate::runtime::Provider;

/// Most numbers that a shape has: onnxruntime's tensors of language models have fewer dimensions.
const SHAPE: u64 = 8;
/// Rows and columns of the run that is recorded. More than [`SHAPE`]: a value for each row or each token is no shape.
const ROWS: usize = 9;
const COLUMNS: usize = 12;

/// How many nodes run where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Placement {
    /// The provider that was asked for.
    pub provider: Provider,
    /// Nodes that run on it.
    pub nodes: usize,
    /// Nodes that run on another one, most frequent first.
    pub elsewhere: Vec<Operator>,
    /// Arithmetic on shapes, which onnxruntime keeps on the processor by design: nodes on another provider whose inputs
    /// and outputs are integers, no more of them than a shape has dimensions.
    pub shapes: Vec<Operator>,
    /// Copies between devices in each run, part of `nodes`.
    pub copies: Vec<Operator>,
}

/// Nodes of one operator on one provider.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Operator {
    /// The operator.
    pub operator: String,
    /// The provider, by onnxruntime's name.
    pub provider: String,
    /// How many nodes.
    pub count: usize,
}

/// The file that a session writes its profile to, in a folder that goes with it.
#[derive(Debug)]
pub(super) struct Profile {
    folder: tempfile::TempDir,
}

impl Profile {
    pub(super) fn new() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("hf2onnx-profile-").tempdir();
        let folder = folder.map_err(|e| Error::io(&std::env::temp_dir(), &e))?;
        Ok(Self { folder })
    }

    /// What the file's name begins with.
    pub(super) fn prefix(&self) -> PathBuf {
        self.folder.path().join("profile")
    }
}

/// The events that matter here.
#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    cat: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    args: Details,
}

#[derive(Default, Deserialize)]
struct Details {
    op_name: Option<String>,
    provider: Option<String>,
    node_index: Option<String>,
    /// `[{"float": [1, 5, 192]}, ...]`.
    #[serde(default)]
    input_type_shape: Vec<Map<String, Value>>,
    output_type_shape: Option<Vec<Map<String, Value>>>,
}

impl Decoder {
    /// Runs a few rows of a prompt and a token after them, and says where the nodes ran. The decoder has to be opened
    /// with [`super::Options::placement`], and records nothing afterwards.
    ///
    /// # Errors
    /// It was opened without, the model does not run, or its profile can not be read.
    pub fn placement(&mut self, token: i64) -> Result<Placement> {
        let profile = self.profile.take().ok_or_else(|| {
            Error::new(Code::RuntimeFailed, self.file.display())
                .found("a session that does not record where its nodes run")
                .expected("one that was opened for it, and was not asked before")
        })?;
        let matrix = |columns: usize, value: fn(usize) -> i64| IntMatrix {
            rows: ROWS,
            columns,
            data: (0..ROWS).flat_map(|_| (0..columns).map(value)).collect(),
        };
        let ones = |columns| matrix(columns, |_| 1);
        let ids = |columns| IntMatrix { data: vec![token; ROWS * columns], ..ones(columns) };
        let position = |column: usize| i64::try_from(column).unwrap_or(0);
        let mut state = self.empty_state(ROWS)?;
        self.run(&ids(COLUMNS), &ones(COLUMNS), &matrix(COLUMNS, position), &mut state)?;
        let next = IntMatrix { rows: ROWS, columns: 1, data: vec![position(COLUMNS); ROWS] };
        self.run(&ids(1), &ones(COLUMNS + 1), &next, &mut state)?;
        let name = self.session.end_profiling().map_err(|e| refused(&self.file, &e))?;
        let placement = read(Path::new(&name), self.provider);
        drop(profile);
        placement
    }
}

fn read(path: &Path, provider: Provider) -> Result<Placement> {
    let text = fs::read(path).map_err(|e| Error::io(path, &e))?;
    let unread = |found: &dyn fmt::Display| {
        Error::new(Code::RuntimeFailed, path.display()).found(found).expected("the profile of a session")
    };
    let events: Vec<Event> = serde_json::from_slice(&text).map_err(|e| unread(&e))?;
    let placement = Placement::of(&events, provider);
    if placement.nodes == 0 && placement.elsewhere.is_empty() && placement.shapes.is_empty() {
        return Err(unread(&"no node in it"));
    }
    Ok(placement)
}

impl Placement {
    fn of(events: &[Event], provider: Provider) -> Self {
        // Each run has an event of its own for a node: one that ever did more than shape arithmetic is none.
        let mut nodes: BTreeMap<(&str, &str), (&str, &str, bool)> = BTreeMap::new();
        for event in events.iter().filter(|event| event.cat == "Node") {
            let (Some(operator), Some(place)) = (&event.args.op_name, &event.args.provider) else { continue };
            let node = (event.name.as_str(), event.args.node_index.as_deref().unwrap_or_default());
            let shape = event.args.is_shape_arithmetic();
            nodes.entry(node).and_modify(|known| known.2 &= shape).or_insert((operator, place, shape));
        }
        let own = provider.onnxruntime_name();
        let here = |place: &str| place == own;
        let counted = |keep: &dyn Fn(&(&str, &str, bool)) -> bool| {
            count(nodes.values().filter(|node| keep(node)).map(|(operator, place, _)| (*operator, *place)))
        };
        Self {
            provider,
            nodes: nodes.values().filter(|(_, place, _)| here(place)).count(),
            elsewhere: counted(&|(_, place, shape)| !here(place) && !shape),
            shapes: counted(&|(_, place, shape)| !here(place) && *shape),
            copies: counted(&|(operator, place, _)| here(place) && operator.starts_with("Memcpy")),
        }
    }

    /// An error that lists the nodes that run elsewhere, if there are any.
    ///
    /// # Errors
    /// [`Code::NodesElsewhere`].
    pub fn check(&self, model: &Path) -> Result<()> {
        if self.elsewhere.is_empty() {
            return Ok(());
        }
        Err(Error::new(Code::NodesElsewhere, model.display())
            .found(format!("nodes elsewhere: {}", listed(&self.elsewhere)))
            .expected(format!("every node on {}, but for arithmetic on shapes", self.provider.onnxruntime_name()))
            .help("build for the target that is made for this provider, or leave --strict-provider out"))
    }
}

/// Counts by operator and provider, most frequent first.
fn count<'n>(nodes: impl Iterator<Item = (&'n str, &'n str)>) -> Vec<Operator> {
    let nodes: Vec<(&str, &str)> = nodes.collect();
    let kinds: BTreeSet<&(&str, &str)> = nodes.iter().collect();
    let mut counted: Vec<Operator> = kinds
        .into_iter()
        .map(|kind| Operator {
            operator: kind.0.to_owned(),
            provider: kind.1.to_owned(),
            count: nodes.iter().filter(|node| *node == kind).count(),
        })
        .collect();
    counted.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.cmp(b)));
    counted
}

impl Details {
    fn is_shape_arithmetic(&self) -> bool {
        let few_integers = |(kind, shape): (&String, &Value)| {
            let sizes = shape.as_array().into_iter().flatten().map(|size| size.as_u64().unwrap_or(u64::MAX));
            let integer = kind.starts_with("int") || kind.starts_with("uint") || kind == "bool";
            integer && sizes.fold(1, u64::saturating_mul) <= SHAPE
        };
        let all = |tensors: &[Map<String, Value>]| tensors.iter().flatten().all(few_integers);
        // These read no values.
        let reads_none = matches!(self.op_name.as_deref(), Some("Shape" | "Size"));
        self.output_type_shape.as_deref().is_some_and(all) && (reads_none || all(&self.input_type_shape))
    }
}

fn listed(operators: &[Operator]) -> String {
    let one = |o: &Operator| {
        let provider = o.provider.strip_suffix("ExecutionProvider").unwrap_or(&o.provider);
        format!("{} {} ({provider})", o.count, o.operator)
    };
    operators.iter().map(one).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Placement {
    /// Some lines, each ended.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.provider.onnxruntime_name();
        writeln!(
            f,
            "{} nodes on {name}, {}",
            self.nodes,
            match self.elsewhere.as_slice() {
                [] => "none elsewhere".to_owned(),
                elsewhere => format!("elsewhere: {}", listed(elsewhere)),
            }
        )?;
        if !self.shapes.is_empty() {
            writeln!(f, "arithmetic on shapes, which stays on the processor: {}", listed(&self.shapes))?;
        }
        if !self.copies.is_empty() {
            writeln!(f, "copies between devices in each run: {}", listed(&self.copies))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Options;
    use super::*;
    use crate::runtime::{Search, ensure};
    use crate::toy::{Fault, write};

    fn event(name: &str, operator: &str, provider: &str, input: &str, output: &str) -> String {
        format!(
            r#"{{"cat": "Node", "dur": 3, "name": "{name}_kernel_time", "args": {{"op_name": "{operator}",
            "provider": "{provider}ExecutionProvider", "node_index": "7", "input_type_shape": [{input}],
            "output_type_shape": [{output}]}}}}"#
        )
    }

    fn placed(events: &[String]) -> Placement {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("profile.json");
        let session = r#"{"cat": "Session", "name": "model_loading_uri", "args": {}}"#.to_owned();
        let all: Vec<String> = [session].into_iter().chain(events.iter().cloned()).collect();
        fs::write(&path, format!("[{}]", all.join(","))).unwrap();
        read(&path, Provider::Cuda).unwrap()
    }

    #[test]
    fn nodes_elsewhere_are_listed_and_shapes_apart() {
        let (tokens, few) = (r#"{"int64": [9, 12]}"#, r#"{"int64": [2]}"#);
        let floats = r#"{"float16": [9, 12, 64]}"#;
        let prefill = vec![
            event("a", "MatMul", "CUDA", floats, floats),
            event("b", "MemcpyToHost", "CUDA", tokens, tokens),
            event("c", "Shape", "CPU", floats, few),
            event("d", "Gather", "CPU", few, few),
            event("e", "CumSum", "CPU", tokens, tokens),
            event("f", "ReduceMax", "CPU", tokens, r#"{"int64": []}"#),
            event("g", "Cast", "CPU", few, r#"{"float": []}"#),
            event("h", "CumSum", "CPU", tokens, tokens),
            // A value of each row: as small as a shape if there were fewer rows.
            event("i", "Sub", "CPU", r#"{"int32": [9]}"#, r#"{"int32": [9]}"#),
        ];
        // Another run of the same nodes counts nothing twice.
        let twice = [prefill.clone(), prefill].concat();
        let found = placed(&twice);
        let words = |operators: &[Operator]| listed(operators);
        assert_eq!(found.nodes, 2);
        assert_eq!(words(&found.elsewhere), "2 CumSum (CPU), 1 Cast (CPU), 1 ReduceMax (CPU), 1 Sub (CPU)");
        assert_eq!(words(&found.shapes), "1 Gather (CPU), 1 Shape (CPU)");
        assert_eq!(words(&found.copies), "1 MemcpyToHost (CUDA)");
        let error = found.check(Path::new("model.onnx")).unwrap_err();
        assert_eq!(error.code, Code::NodesElsewhere);
        assert!(error.found.contains("2 CumSum (CPU)") && !error.found.contains("Shape"), "{error}");
        let text = found.to_string();
        assert!(
            text.contains("2 nodes on CUDAExecutionProvider, elsewhere: 2 CumSum") && text.contains("copies"),
            "{text}"
        );
    }

    #[test]
    fn a_profile_without_nodes_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("profile.json");
        for text in ["[]", "{", r#"[{"cat": "Session"}]"#] {
            fs::write(&path, text).unwrap();
            assert_eq!(read(&path, Provider::Cpu).unwrap_err().code, Code::RuntimeFailed, "{text}");
        }
    }

    #[test]
    fn a_session_on_the_processor_has_every_node_there() {
        ensure(&Search::default(), &mut |_| {}).unwrap();
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), Fault::None);
        let options = Options { threads: 1, placement: true, ..Options::default() };
        let mut decoder = Decoder::open(folder.path(), &options).unwrap();
        let found = decoder.placement(1).unwrap();
        assert!(found.nodes > 5 && found.elsewhere.is_empty() && found.shapes.is_empty(), "{found}");
        found.check(folder.path()).unwrap();
        assert!(decoder.placement(1).is_err(), "the record has ended");
        // The same record, had another provider been asked for.
        let mut decoder = Decoder::open(folder.path(), &options).unwrap();
        decoder.provider = Provider::Cuda;
        let found = decoder.placement(1).unwrap();
        assert_eq!(found.nodes, 0);
        assert!(found.elsewhere.iter().any(|o| o.operator == "CumSum"), "{found}");
        assert!(found.shapes.iter().any(|o| o.operator == "Shape"), "{found}");
    }
}
