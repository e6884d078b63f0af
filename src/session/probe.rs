//! Values from the middle of a decoder: what its layers see.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use ort::session::{Session, SessionInputValue};
use prost::Message as _;

use super::open::{builder, environment, from_bytes, locate, not_opened};
use super::{IDS, IntMatrix, MASK, Options, POSITIONS, StateSlot, refused, slot_of, tensor, zeros};
use crate::error::{Code, Error, Result};
use crate::onnx::{GraphProto, ModelProto, ValueInfoProto};
use crate::regular;

/// A decoder of which only some values are computed, and nothing that comes after them.
#[derive(Debug)]
pub struct Probe {
    session: Session,
    file: PathBuf,
    slots: Vec<StateSlot>,
    names: Vec<String>,
}

impl Probe {
    /// Opens a directory that this program built, for values of its graph. [`crate::runtime::ensure`] has to come first.
    ///
    /// # Errors
    /// There is no onnxruntime, or it can not compute these values.
    pub fn open(path: &Path, options: &Options, names: &[String]) -> Result<Self> {
        let file = locate(path)?;
        let bytes = regular::read(&file, regular::GRAPH).map_err(|e| Error::io(&file, &e))?;
        let mut model = ModelProto::decode(bytes.as_slice())
            .map_err(|e| Error::new(Code::RuntimeFailed, file.display()).found(e).expected("an ONNX model"))?;
        let graph = model.graph.get_or_insert_default();
        let presents: Vec<String> = graph.output.iter().map(|output| output.name.clone()).collect();
        keep_only(graph, names);
        let bytes = model.encode_to_vec();
        let session = builder(environment()?, options, None).and_then(|builder| from_bytes(builder, &file, &bytes));
        let session = session.map_err(|e| not_opened(&file, options, &e))?;
        let mut slots = Vec::new();
        for input in session.inputs().iter().filter(|input| !matches!(input.name(), IDS | MASK | POSITIONS)) {
            let slot = slot_of(input.name(), input.dtype(), &presents);
            slots.push(slot.map_err(|found| Error::new(Code::RuntimeFailed, file.display()).found(found))?);
        }
        Ok(Self { session, file, slots, names: names.to_vec() })
    }

    /// Runs one row of tokens from the start and shows the values, each with its place among the names.
    ///
    /// # Errors
    /// onnxruntime fails, a value is not float32, `show` fails, or the user asked for an end.
    pub fn run(&mut self, ids: &[i64], mut show: impl FnMut(usize, &[f32]) -> Result<()>) -> Result<()> {
        crate::interrupt::check()?;
        let file = self.file.clone();
        let failed = |e: ort::Error| refused(&file, &e);
        let positions = (0_i64..).take(ids.len()).collect();
        let rows = [(IDS, ids.to_vec()), (MASK, vec![1; ids.len()]), (POSITIONS, positions)];
        let mut feed: Vec<(&str, SessionInputValue<'_>)> = Vec::new();
        for (name, row) in rows {
            if self.session.inputs().iter().any(|input| input.name() == name) {
                feed.push((name, tensor(&IntMatrix::from_row(row)).map_err(failed)?.into()));
            }
        }
        for slot in &self.slots {
            let shape = slot.shape.iter().map(|dim| super::row::size(*dim, 1, 0)).collect();
            feed.push((slot.past.as_str(), zeros(slot.element, shape).map_err(failed)?.into()));
        }
        let outputs = self.session.run(feed).map_err(failed)?;
        for (index, name) in self.names.iter().enumerate() {
            let value = outputs.get(name).ok_or_else(|| {
                Error::new(Code::RuntimeFailed, file.display()).found(format!("the run returned no `{name}`"))
            })?;
            let (_, values) = value.try_extract_tensor::<f32>().map_err(failed)?;
            show(index, values)?;
        }
        Ok(())
    }
}

/// Makes these values the outputs of a graph, and takes out what they do not need.
fn keep_only(graph: &mut GraphProto, names: &[String]) {
    let mut needed: HashSet<String> = names.iter().cloned().collect();
    // Nodes stand in topological order.
    let mut nodes = std::mem::take(&mut graph.node);
    nodes.reverse();
    nodes.retain(|node| {
        let kept = node.output.iter().any(|output| needed.contains(output));
        if kept {
            needed.extend(node.uses().into_iter().map(str::to_owned));
        }
        kept
    });
    nodes.reverse();
    graph.node = nodes;
    graph.initializer.retain(|initializer| needed.contains(&initializer.name));
    graph.input.retain(|input| needed.contains(&input.name));
    graph.output = names.iter().map(|name| ValueInfoProto { name: name.clone(), r#type: None }).collect();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::{NodeProto, TensorProto};

    #[test]
    fn what_comes_after_the_values_goes() {
        let node = |inputs: &[&str], output: &str| NodeProto {
            input: inputs.iter().map(|name| (*name).to_owned()).collect(),
            output: vec![output.to_owned()],
            ..NodeProto::default()
        };
        let info = |name: &str| ValueInfoProto { name: name.to_owned(), r#type: None };
        let weight = |name: &str| TensorProto { name: name.to_owned(), ..TensorProto::default() };
        let mut graph = GraphProto {
            node: vec![node(&["x", "w"], "a"), node(&["past"], "b"), node(&["a", "v"], "c"), node(&["c", "b"], "d")],
            initializer: vec![weight("w"), weight("v")],
            input: vec![info("x"), info("past")],
            output: vec![info("d")],
            ..GraphProto::default()
        };
        keep_only(&mut graph, &["a".to_owned()]);
        assert_eq!(graph.node.iter().map(|node| node.output.concat()).collect::<Vec<_>>(), ["a"]);
        assert_eq!(graph.initializer.iter().map(|weight| weight.name.as_str()).collect::<Vec<_>>(), ["w"]);
        assert_eq!(graph.input.iter().map(|input| input.name.as_str()).collect::<Vec<_>>(), ["x"]);
        assert_eq!(graph.output.iter().map(|output| output.name.as_str()).collect::<Vec<_>>(), ["a"]);
    }
}
