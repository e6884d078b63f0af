//! Writes ONNX nodes: each is checked against its operator's schema and typed as it is added.

use std::collections::HashMap;

use super::infer::{Inferred, Operand, infer};
use super::onnx_graph::{Attribute, Constant, Onnx, Operator, Quantized};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::graph::{Branch, Dim, Graph, Node, Shape, Source, Type, ValueId};
use crate::opset::{AttributeKind, Target};
use crate::weight::Weight;

/// Writes a graph of ONNX operators for one target.
#[derive(Debug)]
pub(super) struct Emitter {
    pub(super) graph: Graph<Onnx>,
    target: &'static Target,
    scope: String,
    names: HashMap<String, usize>,
    literals: HashMap<String, ValueId>,
    contents: HashMap<ValueId, Shape>,
}

impl Emitter {
    pub(super) fn new(target: &'static Target) -> Self {
        Self {
            graph: Graph::default(),
            target,
            scope: String::new(),
            names: HashMap::new(),
            literals: HashMap::new(),
            contents: HashMap::new(),
        }
    }

    /// Names the nodes that follow: `/model/layers.0/self_attn`.
    pub(super) fn enter(&mut self, scope: &str) -> String {
        std::mem::replace(&mut self.scope, scope.to_owned())
    }

    pub(super) fn ty(&self, value: ValueId) -> &Type<ElementType> {
        self.graph.ty(value)
    }

    pub(super) fn shape(&self, value: ValueId) -> &Shape {
        &self.graph.ty(value).shape
    }

    /// Adds a node with one result.
    pub(super) fn add(&mut self, op: Operator, operands: &[ValueId]) -> Result<ValueId> {
        let operands: Vec<Option<ValueId>> = operands.iter().copied().map(Some).collect();
        let [only] = self.call(op, &operands, [true])?;
        Ok(only)
    }

    /// Adds a node. `wanted` says which of its first results are named; the ids of unwanted ones are unused.
    pub(super) fn call<const N: usize>(
        &mut self,
        op: Operator,
        operands: &[Option<ValueId>],
        wanted: [bool; N],
    ) -> Result<[ValueId; N]> {
        let name = self.unique(op.op_type);
        let refused = |reason: String| {
            Error::new(Code::NodeInvalid, format!("node {name} ({op})"))
                .found(reason)
                .help("this is a defect of a builder or a lowering; please report it with the model's config.json")
        };
        let inferred = {
            let operand = |id: &ValueId| Operand { ty: self.graph.ty(*id), contents: self.contents.get(id) };
            let operands: Vec<Option<Operand>> = operands.iter().map(|id| id.as_ref().map(operand)).collect();
            infer(&op, &operands).map_err(&refused)?
        };
        if let Some(results) = self.widened(&op, operands, &inferred, &wanted)? {
            return Ok(results);
        }
        self.check(&op, operands, &inferred, &wanted).map_err(&refused)?;
        let mut inferred = inferred.into_iter();
        let mut index = 0;
        let ids = wanted.map(|_| {
            let result = inferred.next();
            let id = result.map(|result| self.result(&name, index, result));
            index += 1;
            id
        });
        let mut outputs: Vec<Option<ValueId>> =
            ids.iter().zip(wanted).map(|(id, wanted)| id.filter(|_| wanted)).collect();
        while outputs.last() == Some(&None) {
            outputs.pop();
        }
        let Some(ids) = ids.into_iter().collect::<Option<Vec<ValueId>>>().and_then(|ids| ids.try_into().ok()) else {
            return Err(refused(format!("fewer than {N} results")));
        };
        self.graph.nodes.push(Node { name, op, inputs: operands.to_vec(), outputs, branches: Vec::new() });
        Ok(ids)
    }

    /// The nodes so far, for [`Self::leave`]: those that follow are a branch.
    pub(super) fn branch(&mut self) -> Vec<Node<Operator>> {
        std::mem::take(&mut self.graph.nodes)
    }

    /// The nodes of a branch; what follows stands behind the nodes before it.
    pub(super) fn leave(&mut self, before: Vec<Node<Operator>>) -> Vec<Node<Operator>> {
        std::mem::replace(&mut self.graph.nodes, before)
    }

    /// What the nodes since [`Self::branch`] compute.
    pub(super) fn made(&self) -> impl Iterator<Item = ValueId> {
        self.graph.nodes.iter().flat_map(|node| node.outputs.iter().flatten().copied())
    }

    /// Adds an `If`, whose results are those of the first branch if the condition, one boolean, is true, else of the
    /// second.
    pub(super) fn choose(&mut self, condition: ValueId, branches: [Branch<Operator>; 2]) -> Result<Vec<ValueId>> {
        let name = self.unique("If");
        let types = |branch: &Branch<Operator>| -> Vec<Type<ElementType>> {
            branch.results.iter().map(|id| self.ty(*id).clone()).collect()
        };
        let [first, second] = branches.each_ref().map(types);
        if first != second || self.ty(condition).element != ElementType::Bool {
            return Err(Error::new(Code::NodeInvalid, format!("node {name}"))
                .found("branches with other types, or a condition that is no boolean")
                .help("this is a defect of a lowering; please report it with the model's config.json"));
        }
        let named = first.into_iter().enumerate();
        let results: Vec<ValueId> =
            named.map(|(index, ty)| self.graph.add_value(format!("{name}/output_{index}"), ty, Source::Node)).collect();
        self.graph.nodes.push(Node {
            name,
            op: Operator::new("If"),
            inputs: vec![Some(condition)],
            outputs: results.iter().copied().map(Some).collect(),
            branches: branches.into(),
        });
        Ok(results)
    }

    /// True if the target's provider computes a node; every target without one does.
    pub(super) fn runs(&self, op: &Operator, inputs: &[Option<ElementType>], outputs: &[Option<ElementType>]) -> bool {
        crate::opset::runs(self.target, op.domain, op.op_type, inputs, outputs)
    }

    /// A node in float32 with casts around it, where the provider has no kernel for half precision.
    fn widened<const N: usize>(
        &mut self,
        op: &Operator,
        operands: &[Option<ValueId>],
        results: &[Inferred],
        wanted: &[bool; N],
    ) -> Result<Option<[ValueId; N]>> {
        let half = |element: ElementType| matches!(element, ElementType::F16 | ElementType::BF16);
        let inputs: Vec<Option<ElementType>> = operands.iter().map(|id| id.map(|id| self.ty(id).element)).collect();
        let outputs = results.iter().zip(wanted).map(|(r, wanted)| wanted.then_some(r.ty.element));
        let outputs: Vec<Option<ElementType>> = outputs.collect();
        if self.runs(op, &inputs, &outputs) || !inputs.iter().flatten().any(|element| half(*element)) {
            return Ok(None);
        }
        let mut wide = operands.to_vec();
        for id in wide.iter_mut().flatten() {
            if half(self.ty(*id).element) {
                *id = self.cast(*id, ElementType::F32)?;
            }
        }
        let mut found = self.call(op.clone(), &wide, *wanted)?;
        for ((id, result), wanted) in found.iter_mut().zip(results).zip(wanted) {
            if *wanted && half(result.ty.element) {
                *id = self.cast(*id, result.ty.element)?;
            }
        }
        Ok(Some(found))
    }

    fn result(&mut self, node: &str, index: usize, result: Inferred) -> ValueId {
        let id = self.graph.add_value(format!("{node}/output_{index}"), result.ty, Source::Node);
        if let Some(contents) = result.contents {
            self.contents.insert(id, contents);
        }
        id
    }

    fn check(
        &self,
        op: &Operator,
        operands: &[Option<ValueId>],
        results: &[Inferred],
        wanted: &[bool],
    ) -> Result<(), String> {
        let inputs: Vec<Option<ElementType>> = operands.iter().map(|id| id.map(|id| self.ty(id).element)).collect();
        let results = results.iter().zip(wanted);
        let outputs: Vec<Option<ElementType>> = results.map(|(r, wanted)| wanted.then_some(r.ty.element)).collect();
        let kind = |value: &Attribute| match value {
            Attribute::Int(_) => AttributeKind::Int,
            Attribute::Float(_) => AttributeKind::Float,
            Attribute::Ints(_) => AttributeKind::Ints,
            Attribute::String(_) => AttributeKind::String,
        };
        let attributes: Vec<(&str, AttributeKind)> = op.attributes.iter().map(|(name, v)| (*name, kind(v))).collect();
        crate::opset::check(self.target, op.domain, op.op_type, &inputs, &outputs, &attributes)
    }

    fn unique(&mut self, op_type: &str) -> String {
        let name = format!("{}/{op_type}", self.scope);
        let count = self.names.entry(name.clone()).or_insert(0);
        *count += 1;
        if *count == 1 { name } else { format!("{name}_{}", *count - 1) }
    }

    /// A constant list of integers, `[n]`; equal ones are one value.
    pub(super) fn ints(&mut self, values: &[i64]) -> ValueId {
        let name = format!("/constants/i64/{values:?}");
        let ty = Type::new(ElementType::I64, [Dim::from(values.len())]);
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let contents = values.iter().map(|value| Dim::constant(*value)).collect();
        self.constant(name, ty, bytes, Some(contents))
    }

    /// A constant list of places along an axis, `[n]`, for `Gather`; in 32 bits, since it is as long as the axis.
    pub(super) fn indices(&mut self, places: &[i32]) -> ValueId {
        let ty = Type::new(ElementType::I32, [Dim::from(places.len())]);
        let bytes = places.iter().flat_map(|place| place.to_le_bytes()).collect();
        self.constant(format!("/constants/{ty}/{places:?}"), ty, bytes, None)
    }

    /// A constant integer without axes.
    pub(super) fn int(&mut self, value: i64) -> ValueId {
        let ty = Type::new(ElementType::I64, []);
        let contents = vec![Dim::constant(value)];
        self.constant(format!("/constants/i64/{value}"), ty, value.to_le_bytes().to_vec(), Some(contents))
    }

    /// A constant float without axes, rounded to the element type.
    pub(super) fn scalar(&mut self, element: ElementType, value: f64) -> ValueId {
        self.floats_of(element, &[value], Some(Shape::new()))
    }

    /// A constant list of one float, `[n]`.
    pub(super) fn filled(&mut self, element: ElementType, count: usize, value: f64) -> ValueId {
        self.floats_of(element, &vec![value; count], None)
    }

    /// A constant list of float32, `[n]`.
    pub(super) fn floats(&mut self, values: &[f32]) -> ValueId {
        let values: Vec<f64> = values.iter().map(|value| f64::from(*value)).collect();
        self.floats_of(ElementType::F32, &values, None)
    }

    /// A constant list of floats, `[n]`, or of another shape.
    #[expect(clippy::cast_possible_truncation, reason = "rounding to the element type is what is asked for")]
    pub(super) fn floats_of(&mut self, element: ElementType, values: &[f64], shape: Option<Shape>) -> ValueId {
        let bytes: Vec<u8> = match element {
            ElementType::F16 => values.iter().flat_map(|v| half::f16::from_f64(*v).to_le_bytes()).collect(),
            ElementType::BF16 => values.iter().flat_map(|v| half::bf16::from_f64(*v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect(),
        };
        let shape = shape.unwrap_or_else(|| vec![Dim::from(values.len())]);
        let listed: Vec<String> = values.iter().map(|value| format!("{value:e}")).collect();
        let ty = Type::new(element, shape);
        self.constant(format!("/constants/{ty}/{}", listed.join(",")), ty, bytes, None)
    }

    fn constant(&mut self, name: String, ty: Type<ElementType>, bytes: Vec<u8>, contents: Option<Shape>) -> ValueId {
        if let Some(known) = self.literals.get(&name) {
            return *known;
        }
        // Long lists of numbers make names that nobody reads.
        let shown = if name.len() > 80 { format!("/constants/{}", self.literals.len()) } else { name.clone() };
        let id = self.graph.add_value(shown, ty, Source::Literal(Constant::Inline(bytes)));
        if let Some(contents) = contents {
            self.contents.insert(id, contents);
        }
        self.literals.insert(name, id);
        id
    }

    /// An initializer made from parameters; asked for twice, it is the same value.
    pub(super) fn weight(&mut self, name: &str, ty: Type<ElementType>, weight: Weight) -> ValueId {
        self.literal(name, ty, Constant::Weight(weight))
    }

    /// An initializer that is a part of one tensor of the checkpoint.
    pub(super) fn stored(&mut self, name: &str, ty: Type<ElementType>, weight: Weight) -> ValueId {
        self.literal(name, ty, Constant::Stored(weight))
    }

    /// An initializer that is a part of a quantised matrix.
    pub(super) fn quantized(&mut self, name: &str, ty: Type<ElementType>, quantized: Quantized) -> ValueId {
        self.literal(name, ty, Constant::Quantized(quantized))
    }

    fn literal(&mut self, name: &str, ty: Type<ElementType>, constant: Constant) -> ValueId {
        if let Some(known) = self.literals.get(name) {
            return *known;
        }
        let id = self.graph.add_value(name.to_owned(), ty, Source::Literal(constant));
        self.literals.insert(name.to_owned(), id);
        id
    }

    /// Reshapes `x`; open axes must be its leading ones, or one of them may follow from the rest.
    pub(super) fn reshape(&mut self, x: ValueId, shape: &Shape) -> Result<ValueId> {
        let source = self.shape(x).clone();
        if source == *shape {
            return Ok(x);
        }
        let copies = shape.iter().zip(&source).take_while(|(want, have)| want == have).count();
        let mut inferred = false;
        let sizes: Option<Vec<i64>> = shape
            .iter()
            .enumerate()
            .map(|(i, dim)| match dim.value() {
                Some(size) => Some(size),
                None if i < copies => Some(0),
                None if !inferred => {
                    inferred = true;
                    Some(-1)
                }
                None => None,
            })
            .collect();
        let sizes = sizes.ok_or_else(|| {
            Error::new(Code::NodeInvalid, &self.scope)
                .found(format!("a reshape from {} to {}", Type::new("", source), Type::new("", shape.clone())))
                .expected("at most one open size that is not copied")
        })?;
        let sizes = self.ints(&sizes);
        self.add(Operator::new("Reshape"), &[x, sizes])
    }

    /// Casts `x`, if it is of another type.
    pub(super) fn cast(&mut self, x: ValueId, element: ElementType) -> Result<ValueId> {
        if self.ty(x).element == element {
            return Ok(x);
        }
        self.add(Operator::new("Cast").int("to", element.onnx().into()), &[x])
    }
}
