//! Lowering: composite operations become operators that the target's opset really has.
//!
//! **Invariant:** only this stage and `opsets/` know targets, and nothing here asks which target it is. A target
//! lists, for each composite operation, the forms to try, best first; a form that can not express a case says
//! why and the next one is tried. The reasons are kept for `inspect`.

mod activation;
mod aligned;
mod attention;
mod by_length;
mod cache;
mod combination;
mod emit;
mod indexer;
mod infer;
mod inside;
mod link;
mod masks;
mod moe;
mod norm;
mod onnx_graph;
mod position;
mod quantized;
mod rope;
mod rotary;
mod siblings;

pub use cache::{Cache, CacheScales};
pub use link::Stored;
pub use onnx_graph::{Attribute, Constant, MICROSOFT, Onnx, Operator, Part, Quantized};
pub use quantized::Precision;
pub(crate) use rope::frequency_sets;
pub use rope::{Frequencies, frequencies};

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::build::{Composite, Kind, Model};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::graph::{Branch, Dim, Graph, Node, Shape, Source, Type, ValueId};
use crate::opset::{Positions, Target};
use crate::weight::Weight;
use emit::Emitter;
use inside::Inside;
use siblings::Siblings;

/// Which padding the graph is exact for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Padding {
    /// Left, right and none, in one graph.
    #[default]
    Any,
    /// Right and none: less work in each attention.
    Right,
}

/// What a graph is lowered for.
#[derive(Debug, Clone, Copy)]
pub struct Options<'s> {
    /// The operators that exist.
    pub target: &'static Target,
    /// Float type of weights; and of caches and computation, unless the target has one of its own for those.
    pub element: ElementType,
    /// Padding that must be exact.
    pub padding: Padding,
    /// Where positions come from.
    pub positions: Positions,
    /// How the checkpoint stores parameters, if the graph is to take them from its files as they are.
    pub stored: Option<&'s Stored>,
    /// Which matrices are held as integers.
    pub precision: Option<&'s Precision>,
    /// What caches of keys and values are held in.
    pub cache: Cache<'s>,
}

impl Options<'_> {
    /// The plain graph for a target: in float32, for any padding, by `position_ids`, with weights of its own.
    pub fn plain(target: &'static Target) -> Self {
        Self {
            target,
            element: ElementType::F32,
            padding: Padding::Any,
            positions: Positions::Ids,
            stored: None,
            precision: None,
            cache: Cache::Float,
        }
    }
}

/// An ONNX graph, and why it is not made of better operators.
#[derive(Debug)]
pub struct Lowered {
    /// The graph.
    pub graph: Graph<Onnx>,
    /// Form chosen and reasons against the better ones, by composite operation.
    pub notes: Vec<Note>,
    /// What each matrix of a product is multiplied with: values of the graph, by parameter.
    pub inputs: BTreeMap<String, BTreeSet<ValueId>>,
    /// Why an operator did not take the integers of a parameter, by parameter; another one may have taken them.
    pub refused: BTreeMap<String, String>,
}

/// A composite operation for which the target's best form was not used.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Note {
    /// The composite operation.
    pub composite: String,
    /// The form that was not used.
    pub form: String,
    /// Why.
    pub reason: String,
    /// Where it first occurred.
    pub scope: String,
}

/// The outcome of trying one form.
enum Form<T> {
    Done(T),
    Refused(String),
}

/// Lowers a graph of composite operations.
pub fn lower(model: &Graph<Model>, options: &Options) -> Result<Lowered> {
    let mut lowerer = Lowerer {
        e: Emitter::new(options.target),
        options: *options,
        values: HashMap::new(),
        named: HashSet::new(),
        shared: vec![HashMap::new()],
        notes: BTreeMap::new(),
        refused: BTreeMap::new(),
        order_kept: None,
        inside: Inside::default(),
        siblings: Siblings::default(),
        tables: Lowerer::tables(model),
    };
    lowerer.order_kept = lowerer.keeps_order(model)?;
    lowerer.inside = lowerer.rotations_inside(model)?;
    lowerer.siblings = lowerer.find_siblings(model)?;
    for id in &model.inputs {
        let value = model.value(*id);
        if value.name == POSITIONS && options.positions == Positions::Mask {
            continue;
        }
        let mut ty = lowerer.ty(&value.ty);
        ty.element = lowerer.input_element(&value.name, ty.element);
        let lowered = lowerer.e.graph.add_input(&value.name, ty);
        lowerer.values.insert(*id, lowered);
        lowerer.named.insert(lowered);
    }
    lowerer.align(model)?;
    for node in &model.nodes {
        lowerer.node(model, node)?;
    }
    for id in &model.outputs {
        let lowered = lowerer.value(model, *id)?;
        lowerer.e.graph.rename(lowered, &model.value(*id).name);
        lowerer.e.graph.outputs.push(lowered);
    }
    let inputs = lowerer.inputs(model);
    let Lowerer { e, mut notes, refused, .. } = lowerer;
    if [options.positions, options.target.positions] == [Positions::Ids; 2] {
        // Nobody asked for what it takes.
        notes.retain(|(composite, form, _), _| composite != "rotary" || form != inside::FORM);
    }
    Ok(Lowered { graph: e.graph, notes: notes.into_values().collect(), inputs, refused })
}

struct Lowerer<'s> {
    e: Emitter,
    options: Options<'s>,
    /// Lowered values of the model's graph.
    values: HashMap<ValueId, ValueId>,
    /// Lowered values that carry the name of one in the model's graph.
    named: HashSet<ValueId>,
    /// Values that many nodes share, such as masks, by what they are; of the graph first, then of each branch that is
    /// being written, whose values nothing outside of it can read.
    shared: Vec<HashMap<String, ValueId>>,
    notes: BTreeMap<(String, String, String), Note>,
    /// Why an operator did not take the integers of a parameter.
    refused: BTreeMap<String, String>,
    /// Why tokens stay in the order in which they are given; nothing if rows are aligned to the left.
    order_kept: Option<String>,
    /// What attention rotates by itself.
    inside: Inside,
    /// Products that are computed as one.
    siblings: Siblings,
    /// Tables of which rows are read, by parameter, and their columns.
    tables: BTreeMap<String, usize>,
}

/// The input that says where new tokens stand.
const POSITIONS: &str = "position_ids";

impl Lowerer<'_> {
    /// Puts the tokens of each row first, if the graph is to be computed so.
    fn align(&mut self, model: &Graph<Model>) -> Result<()> {
        if self.order_kept.is_some() {
            return Ok(());
        }
        self.e.enter("/model/aligned");
        let by_token = |id: &&ValueId| match model.value(**id).name.as_str() {
            "input_ids" => true,
            POSITIONS => self.options.positions == Positions::Ids,
            _ => false,
        };
        let by_token: Vec<&ValueId> = model.inputs.iter().filter(by_token).collect();
        for id in by_token {
            let given = self.value(model, *id)?;
            let rotated = self.rotated(given)?;
            self.values.insert(*id, rotated);
        }
        Ok(())
    }

    fn element(&self, kind: Kind) -> ElementType {
        match kind {
            Kind::Real => self.compute(),
            Kind::Full => ElementType::F32,
            Kind::Integer => ElementType::I64,
        }
    }

    /// Element type of activations and caches.
    fn compute(&self) -> ElementType {
        self.options.target.compute.unwrap_or(self.options.element)
    }

    /// A parameter, or one made from parameters. Matrices are stored in the build's element type and widened to what
    /// is computed in, which the session folds at load; vectors and what is computed in full are stored as computed.
    fn parameter(&mut self, name: &str, ty: Type<ElementType>, kind: Kind, weight: Weight) -> Result<ValueId> {
        let computed = ty.element;
        if let Some(linked) = self.linked(name, &ty, &weight)? {
            return Ok(linked);
        }
        let stored = match kind {
            Kind::Real if ty.shape.len() > 1 => self.options.element,
            _ => computed,
        };
        let value = self.e.weight(name, Type { element: stored, ..ty }, weight);
        if stored == computed {
            return Ok(value);
        }
        self.share(&format!("weights/{name}"), |s| s.e.cast(value, computed))
    }

    fn ty(&self, ty: &Type<Kind>) -> Type<ElementType> {
        Type::new(self.element(ty.element), ty.shape.iter().cloned())
    }

    /// The lowered form of a value; parameters become initializers when they are first used.
    fn value(&mut self, model: &Graph<Model>, id: ValueId) -> Result<ValueId> {
        if let Some(known) = self.values.get(&id) {
            return Ok(*known);
        }
        let value = model.value(id);
        match value.source {
            Source::Literal(_) => {
                let ty = self.ty(&value.ty);
                let lowered = match self.dequantized(model, id)? {
                    Some(floats) => floats,
                    None => self.parameter(&value.name, ty, value.ty.element, Weight::source(&value.name))?,
                };
                self.values.insert(id, lowered);
                self.named.insert(lowered);
                Ok(lowered)
            }
            Source::Input if value.name == POSITIONS => {
                let counted = self.counted_positions()?;
                self.values.insert(id, counted);
                Ok(counted)
            }
            _ => Err(Error::new(Code::SpecInvalid, &value.name).found("a value that no earlier node computes")),
        }
    }

    fn node(&mut self, model: &Graph<Model>, node: &Node<Composite>) -> Result<()> {
        self.e.enter(&node.name);
        // A folded or fused parameter must not leave its plain form behind: operands are lowered on demand.
        let operands: Vec<ValueId> = node.inputs.iter().flatten().copied().collect();
        let results = self.composite(model, node, &operands)?;
        for (id, lowered) in node.outputs.iter().flatten().zip(results) {
            // An operation that changes nothing hands its operand on, which keeps its name.
            if self.named.insert(lowered) {
                self.e.graph.rename(lowered, &model.value(*id).name);
            }
            self.values.insert(*id, lowered);
        }
        Ok(())
    }

    /// What each matrix of a product is multiplied with.
    fn inputs(&self, model: &Graph<Model>) -> BTreeMap<String, BTreeSet<ValueId>> {
        let mut inputs: BTreeMap<String, BTreeSet<ValueId>> = BTreeMap::new();
        for node in model.nodes.iter().filter(|node| node.op == Composite::Linear) {
            let [Some(x), Some(weight), ..] = node.inputs.as_slice() else { continue };
            if let Some(lowered) = self.values.get(x) {
                inputs.entry(model.value(*weight).name.clone()).or_default().insert(*lowered);
            }
        }
        inputs
    }

    /// An operation that looks at what its operands are in the model's graph; none for any other.
    fn on_parameters(
        &mut self,
        model: &Graph<Model>,
        node: &Node<Composite>,
        ids: &[ValueId],
    ) -> Result<Option<Vec<ValueId>>> {
        let one = |value: Option<ValueId>| value.map(|value| vec![value]);
        Ok(match &node.op {
            Composite::Norm(op) => Some(vec![self.norm(*op, model, ids)?]),
            Composite::AddNorm(op) => Some(self.add_norm(*op, model, ids)?.to_vec()),
            Composite::Moe(op) => Some(vec![self.moe(op, model, ids)?]),
            Composite::RopeTable(_) if self.inside.needs_no_table(node) => Some(Vec::new()),
            Composite::Rotate { .. } if self.inside.turns(node) => {
                Some(ids.iter().take(1).map(|x| self.value(model, *x)).collect::<Result<_>>()?)
            }
            Composite::Attention(op) => Some(self.attention(op, model, ids)?),
            Composite::Linear => match self.joined_linear(model, node)? {
                None => one(self.quantized_linear(model, ids)?),
                joined => one(joined),
            },
            Composite::Embed => one(self.quantized_embed(model, ids)?),
            _ => None,
        })
    }

    fn composite(&mut self, model: &Graph<Model>, node: &Node<Composite>, ids: &[ValueId]) -> Result<Vec<ValueId>> {
        if let Some(results) = self.on_parameters(model, node, ids)? {
            return Ok(results);
        }
        let operands: Vec<ValueId> = ids.iter().map(|id| self.value(model, *id)).collect::<Result<_>>()?;
        let result_shape = |i: usize| {
            let id = node.outputs.get(i).copied().flatten();
            id.map(|id| model.ty(id).shape.clone()).unwrap_or_default()
        };
        let one = match (&node.op, operands.as_slice()) {
            (Composite::Embed, [ids, table]) => self.e.add(Operator::new("Gather").int("axis", 0), &[*table, *ids]),
            (Composite::Scale(factor), [x]) => {
                let factor = self.e.scalar(self.e.ty(*x).element, *factor);
                self.e.add(Operator::new("Mul"), &[*x, factor])
            }
            (Composite::Linear, [x, weight, bias @ ..]) => self.linear(*x, *weight, bias.first().copied()),
            (Composite::Add, [a, b]) => self.e.add(Operator::new("Add"), &[*a, *b]),
            (Composite::Multiply, [a, b]) => self.e.add(Operator::new("Mul"), &[*a, *b]),
            (Composite::Sigmoid, [x]) => self.e.add(Operator::new("Sigmoid"), &[*x]),
            (Composite::Activate(activation), [x, slopes @ ..]) => self.activate(*activation, *x, slopes),
            (Composite::ClampedSwiglu { alpha, limit }, [gate, up]) => {
                self.clamped_swiglu((*alpha, *limit), *gate, *up)
            }
            (Composite::Softcap(cap), [x]) => self.softcap(*cap, *x),
            (Composite::Clip(bound), [x]) => self.clip(Some(-bound), Some(*bound), *x),
            (Composite::Shift(offset), [x]) => self.shift(*offset, *x),
            (Composite::Sinusoid { width }, [positions]) => self.sinusoid(*width, *positions),
            (Composite::PositionScale(scale), [positions, mask]) => self.position_scale(scale, *positions, *mask),
            (Composite::Reshape(_), [x]) => self.reshape(*x, &result_shape(0)),
            (Composite::Expand(_), [x]) => self.expand(*x, &result_shape(0)),
            (Composite::Concat, parts) => self.e.add(Operator::new("Concat").int("axis", -1), parts),
            (Composite::Convert(kind), [x]) => self.e.cast(*x, self.element(*kind)),
            (Composite::Split(sizes), [x]) => return self.split(*x, sizes),
            (Composite::RopeTable(rope), [positions]) => return self.rope_table(rope, *positions, *positions),
            (Composite::Rotate { heads, size, layout }, [x, cos, sin]) => {
                let why = self.inside.why_not(node);
                self.rotate((*heads, *size, *layout), *x, (*cos, *sin), &why)
            }
            (Composite::LastToken, [x, mask]) => self.last_token(*x, *mask),
            (Composite::EveryToken, [x, _]) if self.order_kept.is_none() => self.rotated_back(*x),
            (Composite::EveryToken, [x, _]) => Ok(*x),
            (op, operands) => return self.combination(&node.name, op, operands),
        };
        Ok(vec![one?])
    }

    /// Tries the target's forms of a composite operation in order.
    fn first_form<T>(
        &mut self,
        composite: &str,
        mut attempt: impl FnMut(&mut Self, &str) -> Result<Form<T>>,
    ) -> Result<T> {
        let target = self.options.target;
        let mut reasons = Vec::new();
        for form in target.forms(composite)? {
            match attempt(self, form)? {
                Form::Done(result) => return Ok(result),
                Form::Refused(reason) => {
                    reasons.push(format!("{form}: {reason}"));
                    let scope = self.e.enter("");
                    self.e.enter(&scope);
                    let key = (composite.to_owned(), form.clone(), reason.clone());
                    let note = Note { composite: composite.to_owned(), form: form.clone(), reason, scope };
                    self.notes.entry(key).or_insert(note);
                }
            }
        }
        Err(Error::new(Code::SpecInvalid, format!("{composite} on target {}", target.name))
            .found(reasons.join("; "))
            .help("choose another --target"))
    }

    /// `x · weightᵀ + bias` with the weight as the checkpoint stores it, `[out, in]`.
    fn linear(&mut self, x: ValueId, weight: ValueId, bias: Option<ValueId>) -> Result<ValueId> {
        self.first_form("linear", |s, form| match form {
            "FusedMatMul" => {
                let op = Operator::microsoft("FusedMatMul").int("transA", 0).int("transB", 1);
                let product = s.e.add(op, &[x, weight])?;
                match bias {
                    Some(bias) => s.e.add(Operator::new("Add"), &[product, bias]).map(Form::Done),
                    None => Ok(Form::Done(product)),
                }
            }
            "Gemm" => {
                let mut shape = s.e.shape(x).clone();
                let width = shape.last().cloned().unwrap_or_else(|| Dim::from(1));
                let tokens = shape.iter().rev().skip(1).fold(Dim::from(1), |tokens, dim| &tokens * dim);
                // [.., I] -> [tokens, I]
                let rows = s.e.reshape(x, &vec![tokens, width])?;
                let mut operands = vec![rows, weight];
                operands.extend(bias);
                let product = s.e.add(Operator::new("Gemm").int("transB", 1), &operands)?;
                shape.pop();
                shape.extend(s.e.shape(product).last().cloned());
                // [tokens, O] -> [.., O]
                s.reshape(product, &shape).map(Form::Done)
            }
            other => Ok(Form::Refused(format!("there is no form of this name: {other}"))),
        })
    }

    /// Reshapes; where batch and sequence must be told apart again, their sizes come from `input_ids`.
    fn reshape(&mut self, x: ValueId, shape: &Shape) -> Result<ValueId> {
        let source = self.e.shape(x).clone();
        let copied = shape.iter().zip(&source).take_while(|(want, have)| want == have).count();
        let open = shape.iter().skip(copied).filter(|dim| dim.value().is_none()).count();
        if open < 2 {
            return self.e.reshape(x, shape);
        }
        let ids = self.input("input_ids")?;
        let rest: Option<Vec<i64>> = shape.iter().skip(2).map(Dim::value).collect();
        let Some(mut rest) = rest.filter(|_| shape.get(..2) == self.e.shape(ids).get(..2)) else {
            return self.e.reshape(x, shape);
        };
        // The last size follows from the others, so that values of every width share one list of sizes.
        if let Some(last) = rest.last_mut() {
            *last = -1;
        }
        let leading = self.shape_of("input_ids")?;
        let sizes = self.share(&format!("token_shape/{rest:?}"), |s| {
            let rest = s.e.ints(&rest);
            s.e.add(Operator::new("Concat").int("axis", 0), &[leading, rest])
        })?;
        self.e.add(Operator::new("Reshape"), &[x, sizes])
    }

    /// Broadcasts; axes that stay as they are may be open.
    fn expand(&mut self, x: ValueId, shape: &Shape) -> Result<ValueId> {
        let source = self.e.shape(x);
        let sizes = shape.iter().zip(source).map(|(want, have)| if want == have { Some(1) } else { want.value() });
        let sizes: Option<Vec<i64>> = sizes.collect();
        let sizes = sizes.ok_or_else(|| {
            Error::new(Code::SpecInvalid, "Expand").found("a size that is not fixed").expected("fixed sizes")
        })?;
        let sizes = self.e.ints(&sizes);
        self.e.add(Operator::new("Expand"), &[x, sizes])
    }

    fn split(&mut self, x: ValueId, sizes: &[usize]) -> Result<Vec<ValueId>> {
        let lengths: Vec<i64> = sizes.iter().map(|size| i64::try_from(*size).unwrap_or(i64::MAX)).collect();
        let lengths = self.e.ints(&lengths);
        let op = Operator::new("Split").int("axis", -1);
        let operands = [Some(x), Some(lengths)];
        match sizes.len() {
            1 => Ok(vec![x]),
            2 => Ok(self.e.call(op, &operands, [true; 2])?.to_vec()),
            3 => Ok(self.e.call(op, &operands, [true; 3])?.to_vec()),
            4 => Ok(self.e.call(op, &operands, [true; 4])?.to_vec()),
            other => Err(Error::new(Code::SpecInvalid, "Split").found(other).expected("2 to 4 pieces")),
        }
    }

    /// A graph input by name.
    fn input(&self, name: &str) -> Result<ValueId> {
        let found = self.e.graph.inputs.iter().find(|id| self.e.graph.value(**id).name == name);
        found.copied().ok_or_else(|| Error::new(Code::SpecInvalid, name).found("no graph input of this name"))
    }

    /// Nodes that run only if their branch is chosen; their names begin with `scope`. What they share stays among them.
    fn branch(
        &mut self,
        name: &'static str,
        scope: &str,
        write: impl FnOnce(&mut Self) -> Result<Vec<ValueId>>,
    ) -> Result<Branch<Operator>> {
        let outside = self.e.enter("");
        self.e.enter(&format!("{outside}/{scope}"));
        let before = self.e.branch();
        self.shared.push(HashMap::new());
        let results = write(self).and_then(|results| self.made_here(results));
        self.shared.pop();
        let nodes = self.e.leave(before);
        self.e.enter(&outside);
        Ok(Branch { name, nodes, results: results? })
    }

    /// Results of the branch that is being written: what was computed before it is no result of its nodes.
    fn made_here(&mut self, results: Vec<ValueId>) -> Result<Vec<ValueId>> {
        let made: HashSet<ValueId> = self.e.made().collect();
        let own = |s: &mut Self, id| {
            if made.contains(&id) { Ok(id) } else { s.e.add(Operator::new("Identity"), &[id]) }
        };
        results.into_iter().map(|id| own(self, id)).collect()
    }

    /// A value that is computed once, under a scope of its own, whoever asks for it first.
    fn share(&mut self, what: &str, write: impl FnOnce(&mut Self) -> Result<ValueId>) -> Result<ValueId> {
        if let Some(known) = self.known(what) {
            return Ok(known);
        }
        let scope = self.e.enter(&format!("/model/{}", what.split('/').next().unwrap_or(what)));
        let value = write(self);
        self.e.enter(&scope);
        let value = value?;
        Ok(self.keep(what, value))
    }

    /// A shared value that can be read here.
    fn known(&self, what: &str) -> Option<ValueId> {
        self.shared.iter().find_map(|known| known.get(what)).copied()
    }

    /// Shares a value with what follows here.
    fn keep(&mut self, what: &str, value: ValueId) -> ValueId {
        if let Some(innermost) = self.shared.last_mut() {
            innermost.insert(what.to_owned(), value);
        }
        value
    }
}
