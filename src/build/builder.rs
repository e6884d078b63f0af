//! The pen that builders write with: it keeps the scope, names values, infers types, and hands out parameters.

use std::collections::HashMap;

use super::op::{Composite, Kind, Model, Parameter};
use crate::error::{Code, Error, Result};
use crate::graph::{Dim, Graph, Node, Source, Type, ValueId};
use crate::spec::{Norm, Rope};

/// Writes a graph of composite operations.
#[derive(Debug, Default)]
pub struct Builder {
    graph: Graph<Model>,
    /// `model`, `layers.0`, `self_attn`, ...
    scope: Vec<String>,
    parameters: HashMap<String, ValueId>,
    /// How often a result name has been given out.
    names: HashMap<String, usize>,
    ropes: Vec<(Rope, (ValueId, ValueId))>,
}

impl Builder {
    /// Adds a graph input.
    pub fn input(&mut self, name: &str, ty: Type<Kind>) -> ValueId {
        self.graph.add_input(name, ty)
    }

    /// Makes a value a graph output under a name.
    pub fn output(&mut self, name: &str, value: ValueId) {
        self.graph.rename(value, name);
        self.graph.outputs.push(value);
    }

    /// Names a value that others look for.
    pub fn name(&mut self, value: ValueId, name: &str) {
        self.graph.rename(value, name);
    }

    /// The finished graph. An error when a parameter is larger than any file.
    pub fn finish(self) -> Result<Graph<Model>> {
        let bytes = |shape: &[Dim]| shape.iter().try_fold(8_i64, |bytes, dim| bytes.checked_mul(dim.value()?));
        let id = self.parameters.values().filter(|id| bytes(self.shape(**id)).is_none()).min();
        match id {
            None => Ok(self.graph),
            Some(id) => Err(Error::new(Code::SpecInvalid, &self.graph.value(*id).name)
                .found(format!("a parameter {}", self.graph.ty(*id)))
                .expected("a size in bytes that fits 63 bits")
                .help("check the sizes in config.json")),
        }
    }

    /// Runs `write` with a module's name added to the scope; an empty name adds nothing.
    pub fn within<T>(&mut self, module: &str, write: impl FnOnce(&mut Self) -> T) -> T {
        if module.is_empty() {
            return write(self);
        }
        self.scope.push(module.to_owned());
        let result = write(self);
        self.scope.pop();
        result
    }

    /// Shape of a value.
    pub fn shape(&self, value: ValueId) -> &[Dim] {
        &self.graph.ty(value).shape
    }

    /// The parameter of this name in the current scope; asked for twice, it is the same value.
    pub fn parameter<const N: usize>(&mut self, name: &str, shape: [usize; N], kind: Kind) -> ValueId {
        let name = [self.scope.join(".").as_str(), name].join(".");
        if let Some(known) = self.parameters.get(&name) {
            return *known;
        }
        let ty = Type::new(kind, shape.map(Dim::from));
        let id = self.graph.add_value(name.clone(), ty, Source::Literal(Parameter));
        self.parameters.insert(name, id);
        id
    }

    /// The last axis of a value, which is fixed for every value that a module reads.
    pub fn width(&self, x: ValueId) -> usize {
        self.shape(x).last().and_then(Dim::value).and_then(|w| usize::try_from(w).ok()).unwrap_or(0)
    }

    /// Weight and bias of a norm over the last axis of `x`, as far as it has them.
    pub fn norm_parameters(&mut self, norm: &Norm, x: ValueId) -> Vec<ValueId> {
        let width = self.width(x);
        let mut parameters = Vec::new();
        if norm.weight {
            parameters.push(self.parameter("weight", [width], Kind::Real));
        }
        if norm.bias {
            parameters.push(self.parameter("bias", [width], Kind::Real));
        }
        parameters
    }

    /// A norm of the current scope.
    pub fn norm(&mut self, norm: &Norm, x: ValueId) -> Result<ValueId> {
        check(norm)?;
        self.within(&norm.name, |b| {
            let mut operands = vec![x];
            operands.extend(b.norm_parameters(norm, x));
            b.emit("Norm", Composite::Norm(norm.into()), &operands)
        })
    }

    /// `residual + delta`, and the norm of that.
    pub fn add_norm(&mut self, norm: &Norm, residual: ValueId, delta: ValueId) -> Result<(ValueId, ValueId)> {
        check(norm)?;
        self.within(&norm.name, |b| {
            let mut operands = vec![residual, delta];
            operands.extend(b.norm_parameters(norm, residual));
            b.emit_pair(["Add", "Norm"], Composite::AddNorm(norm.into()), &operands)
        })
    }

    /// `x` times a weight `[out, in]` of the current scope, with its bias if it has one.
    pub fn linear(&mut self, module: &str, x: ValueId, out: usize, bias: bool) -> Result<ValueId> {
        let width = self.width(x);
        self.within(module, |b| {
            let kind = b.graph.ty(x).element;
            let mut operands = vec![x, b.parameter("weight", [out, width], kind)];
            if bias {
                operands.push(b.parameter("bias", [out], kind));
            }
            b.emit("Linear", Composite::Linear, &operands)
        })
    }

    /// Adds an operation with one result.
    pub fn emit(&mut self, name: &str, op: Composite, operands: &[ValueId]) -> Result<ValueId> {
        let [only] = self.emit_named([name], op, operands)?;
        Ok(only)
    }

    /// Adds an operation with two results.
    pub fn emit_pair(&mut self, names: [&str; 2], op: Composite, operands: &[ValueId]) -> Result<(ValueId, ValueId)> {
        let [first, second] = self.emit_named(names, op, operands)?;
        Ok((first, second))
    }

    /// Adds an operation; its results are named below the current scope.
    pub fn emit_named<const N: usize>(
        &mut self,
        names: [&str; N],
        op: Composite,
        operands: &[ValueId],
    ) -> Result<[ValueId; N]> {
        let scope = format!("/{}", self.scope.join("/"));
        let types: Vec<&Type<Kind>> = operands.iter().map(|id| self.graph.ty(*id)).collect();
        let error = |found: String| {
            Error::new(Code::SpecInvalid, &scope)
                .found(format!("{found} in {op}"))
                .help("the template's sizes contradict each other; `hf2onnx inspect` prints them")
        };
        let types = op.infer(&types).map_err(&error)?;
        let count = types.len();
        let named: [(&str, Type<Kind>); N] = names
            .into_iter()
            .zip(types)
            .collect::<Vec<_>>()
            .try_into()
            .map_err(|_| error(format!("{count} results for {N} names")))?;
        let results = named.map(|(name, ty)| {
            let name = self.unique(format!("{scope}/{name}"));
            self.graph.add_value(format!("{name}/output"), ty, Source::Node)
        });
        self.graph.nodes.push(Node {
            name: scope,
            op,
            inputs: operands.iter().copied().map(Some).collect(),
            outputs: results.into_iter().map(Some).collect(),
            branches: Vec::new(),
        });
        Ok(results)
    }

    fn unique(&mut self, name: String) -> String {
        let count = self.names.entry(name.clone()).or_insert(0);
        *count += 1;
        if *count == 1 { name } else { format!("{name}_{}", *count - 1) }
    }

    /// Cosine and sine for these positions; layers with the same embedding share them.
    pub fn rope_table(&mut self, rope: &Rope, positions: ValueId) -> Result<(ValueId, ValueId)> {
        if let Some((_, table)) = self.ropes.iter().find(|(known, _)| known == rope) {
            return Ok(*table);
        }
        let index = self.ropes.len();
        let scope = std::mem::take(&mut self.scope);
        let name = if index == 0 { "model/rotary_emb".to_owned() } else { format!("model/rotary_emb_{index}") };
        let op = Composite::RopeTable(rope.clone());
        let table = self.within(&name, |b| b.emit_pair(["Cos", "Sin"], op, &[positions]));
        self.scope = scope;
        let table = table?;
        self.ropes.push((rope.clone(), table));
        Ok(table)
    }
}

/// A weight that is not there is not stored as its difference from one.
fn check(norm: &Norm) -> Result<()> {
    if norm.weight || !norm.offset {
        return Ok(());
    }
    Err(Error::new(Code::SpecInvalid, &norm.name).found("an offset").expected("a weight that it is added to"))
}
