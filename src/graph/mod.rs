//! A graph in static single assignment form, generic over its operations.
//!
//! Builders write one of composite operations (what is meant), lowering turns it into one of ONNX operators
//! (what a target has). Both have the same values, the same symbolic shapes and the same text form.

mod dim;

pub use dim::{Dim, Symbol};

use std::fmt;

/// Dimensions of a tensor.
pub type Shape = Vec<Dim>;

/// The shape of an elementwise operation on two shapes: aligned at the last axis, ones stretch. `None` if they do not fit.
pub fn broadcast(a: &Shape, b: &Shape) -> Option<Shape> {
    let (long, short) = if a.len() >= b.len() { (a, b) } else { (b, a) };
    let (unit, offset) = (Dim::from(1), long.len() - short.len());
    let mut shape = long.clone();
    for (slot, other) in shape.iter_mut().skip(offset).zip(short) {
        if *slot == unit {
            *slot = other.clone();
        } else if *other != unit && other != slot {
            return None;
        }
    }
    Some(shape)
}

/// What distinguishes one level of graph from another.
pub trait Dialect {
    /// An operation of a node; displayed with its attributes.
    type Operation: fmt::Display + fmt::Debug;
    /// Element type of a value.
    type Element: Copy + Eq + fmt::Display + fmt::Debug;
    /// A value that is known when compiling: a parameter or a constant.
    type Literal: fmt::Display + fmt::Debug;
}

/// Index of a value within its graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(u32);

impl ValueId {
    /// Position in [`Graph::values`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Element type and shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Type<E> {
    /// Element type.
    pub element: E,
    /// Shape; empty for a scalar.
    pub shape: Shape,
}

impl<E> Type<E> {
    /// A type from its parts.
    pub fn new(element: E, shape: impl IntoIterator<Item = Dim>) -> Self {
        Self { element, shape: shape.into_iter().collect() }
    }
}

impl<E: fmt::Display> fmt::Display for Type<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> = self.shape.iter().map(ToString::to_string).collect();
        write!(f, "{}[{}]", self.element, dims.join(", "))
    }
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum Source<L> {
    /// Fed when running.
    Input,
    /// Computed by a node.
    Node,
    /// Known when compiling.
    Literal(L),
}

/// A named, typed tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Value<D: Dialect> {
    /// Unique name.
    pub name: String,
    /// Element type and shape.
    pub ty: Type<D::Element>,
    /// Where it comes from.
    pub source: Source<D::Literal>,
}

/// One operation on values.
#[derive(Debug, Clone, PartialEq)]
pub struct Node<O> {
    /// Unique path-like name, or the scope that it stands in.
    pub name: String,
    /// What is done.
    pub op: O,
    /// Operands; `None` for an omitted optional one.
    pub inputs: Vec<Option<ValueId>>,
    /// Results; `None` for one that is not wanted.
    pub outputs: Vec<Option<ValueId>>,
    /// What it may run instead of computing something itself.
    pub branches: Vec<Branch<O>>,
}

/// Nodes within a node, which also use values of the graph around it.
#[derive(Debug, Clone, PartialEq)]
pub struct Branch<O> {
    /// Which one it is.
    pub name: &'static str,
    /// Nodes; each uses only values that stand before it.
    pub nodes: Vec<Node<O>>,
    /// What become the results of the node.
    pub results: Vec<ValueId>,
}

impl<O> Node<O> {
    /// This node and those within it.
    pub fn whole(&self) -> impl Iterator<Item = &Self> {
        let mut stack = vec![self];
        std::iter::from_fn(move || {
            let node = stack.pop()?;
            stack.extend(node.branches.iter().flat_map(|branch| &branch.nodes));
            Some(node)
        })
    }
}

/// Values and the nodes between them, in topological order.
#[derive(Debug)]
pub struct Graph<D: Dialect> {
    values: Vec<Value<D>>,
    /// Nodes; each uses only values that stand before it.
    pub nodes: Vec<Node<D::Operation>>,
    /// Inputs in the order of the signature.
    pub inputs: Vec<ValueId>,
    /// Outputs in the order of the signature.
    pub outputs: Vec<ValueId>,
}

impl<D: Dialect> Default for Graph<D> {
    fn default() -> Self {
        Self { values: Vec::new(), nodes: Vec::new(), inputs: Vec::new(), outputs: Vec::new() }
    }
}

impl<D: Dialect> Graph<D> {
    /// Adds a value and returns its id.
    pub fn add_value(&mut self, name: String, ty: Type<D::Element>, source: Source<D::Literal>) -> ValueId {
        let id = ValueId(u32::try_from(self.values.len()).unwrap_or(u32::MAX));
        self.values.push(Value { name, ty, source });
        id
    }

    /// Adds an input.
    pub fn add_input(&mut self, name: &str, ty: Type<D::Element>) -> ValueId {
        let id = self.add_value(name.to_owned(), ty, Source::Input);
        self.inputs.push(id);
        id
    }

    /// All values, in the order of their ids.
    pub fn values(&self) -> impl Iterator<Item = (ValueId, &Value<D>)> {
        (0..).map(ValueId).zip(&self.values)
    }

    /// A value. Ids come from this graph only, so the lookup can not fail.
    #[expect(clippy::indexing_slicing, reason = "ids are handed out by `add_value` of the same graph")]
    pub fn value(&self, id: ValueId) -> &Value<D> {
        &self.values[id.index()]
    }

    /// Type of a value.
    pub fn ty(&self, id: ValueId) -> &Type<D::Element> {
        &self.value(id).ty
    }

    /// Gives a value another name.
    #[expect(clippy::indexing_slicing, reason = "ids are handed out by `add_value` of the same graph")]
    pub fn rename(&mut self, id: ValueId, name: &str) {
        name.clone_into(&mut self.values[id.index()].name);
    }

    fn name(&self, id: Option<ValueId>) -> &str {
        id.map_or("_", |id| &self.value(id).name)
    }

    fn write_node(&self, f: &mut fmt::Formatter<'_>, node: &Node<D::Operation>, depth: usize) -> fmt::Result {
        let operands: Vec<&str> = node.inputs.iter().map(|id| self.name(*id)).collect();
        let result = |id: &Option<ValueId>| id.map_or("_".to_owned(), |id| self.typed(id));
        let results: Vec<String> = node.outputs.iter().map(result).collect();
        let indent = "  ".repeat(depth);
        writeln!(f, "{indent}{} = {}({})", results.join(", "), node.op, operands.join(", "))?;
        for branch in &node.branches {
            writeln!(f, "{indent}  {}:", branch.name)?;
            branch.nodes.iter().try_for_each(|node| self.write_node(f, node, depth + 2))?;
            let results: Vec<&str> = branch.results.iter().map(|id| self.name(Some(*id))).collect();
            writeln!(f, "{indent}    results {}", results.join(", "))?;
        }
        Ok(())
    }

    fn typed(&self, id: ValueId) -> String {
        format!("{}: {}", self.value(id).name, self.ty(id))
    }
}

impl<D: Dialect> fmt::Display for Graph<D> {
    /// One line per input, literal, node and output, and more for what is within a node; the same graph always gives the
    /// same text.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for id in &self.inputs {
            writeln!(f, "input {}", self.typed(*id))?;
        }
        for value in &self.values {
            if let Source::Literal(literal) = &value.source {
                writeln!(f, "{} {}: {}", literal, value.name, value.ty)?;
            }
        }
        for node in &self.nodes {
            self.write_node(f, node, 0)?;
        }
        for id in &self.outputs {
            writeln!(f, "output {}", self.value(*id).name)?;
        }
        Ok(())
    }
}
