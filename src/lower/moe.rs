//! Mixture of experts: routing, and the experts in one operator or all of them at once.

use super::quantized::{Layout, named};
use super::{Form, Lowerer, Operator};
use crate::build::{Model, MoeOp};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::graph::{Dim, Graph, Type, ValueId};
use crate::quantize::{Algorithm, Scheme};
use crate::spec::{Activation, Score};
use crate::weight::{Split, Weight};

/// One projection of all experts, still as values of the model's graph: it is lowered in the form that is wanted.
#[derive(Clone, Copy)]
struct Projection {
    weight: ValueId,
    bias: Option<ValueId>,
}

/// Operands of a mixture of experts.
struct Operands {
    x: ValueId,
    logits: ValueId,
    correction_bias: Option<ValueId>,
    expert_scale: Option<ValueId>,
    gate: Option<Projection>,
    up: Projection,
    down: Projection,
}

/// What the fused operator is to do itself.
struct FusedRouting {
    logits: ValueId,
    normalize: bool,
    /// Multiplies the result, `[B, S, 1]`.
    scale: Option<ValueId>,
}

impl Lowerer<'_> {
    pub(super) fn moe(&mut self, op: &MoeOp, model: &Graph<Model>, ids: &[ValueId]) -> Result<ValueId> {
        let mut rest = ids.iter().copied();
        let mut next = || rest.next().ok_or_else(|| Error::new(Code::SpecInvalid, "Moe").found("too few operands"));
        let (x, logits) = (self.value(model, next()?)?, self.value(model, next()?)?);
        let correction_bias = if op.routing.correction_bias { Some(self.value(model, next()?)?) } else { None };
        let expert_scale = if op.routing.expert_scale { Some(self.value(model, next()?)?) } else { None };
        let mut projection = || -> Result<Projection> {
            Ok(Projection { weight: next()?, bias: if op.bias { Some(next()?) } else { None } })
        };
        let gate = if op.gated { Some(projection()?) } else { None };
        let (up, down) = (projection()?, projection()?);
        let operands = Operands { x, logits, correction_bias, expert_scale, gate, up, down };
        let y = self.first_form("moe", |s, form| match form {
            "QMoE" => s.quantized_moe(op, model, &operands),
            "MoE" => s.fused_moe(op, model, &operands),
            _ => s.every_expert(op, model, &operands).map(Form::Done),
        })?;
        self.with_identity_experts(op, &operands, y)
    }

    /// Experts that hand their input on: it is added with the weights that chose them.
    fn with_identity_experts(&mut self, op: &MoeOp, operands: &Operands, y: ValueId) -> Result<ValueId> {
        if op.routing.identity_experts == 0 {
            return Ok(y);
        }
        let weights = self.dense_weights(op, operands)?;
        let [_, idle] = self.split_pair(weights, op.experts, op.routing.identity_experts)?;
        let share = self.reduce("ReduceSum", idle, &[-1], true)?;
        let share = self.e.cast(share, self.e.ty(operands.x).element)?;
        let kept = self.e.add(Operator::new("Mul"), &[operands.x, share])?;
        self.e.add(Operator::new("Add"), &[y, kept])
    }

    /// `MoE` of onnxruntime: only the chosen experts run. It takes gate and up rows in turn.
    fn fused_moe(&mut self, op: &MoeOp, model: &Graph<Model>, operands: &Operands) -> Result<Form<ValueId>> {
        let call = match self.expert_call(op, "MoE", (operands.x, op.intermediate_size)) {
            Ok(call) => call,
            Err(reason) => return Ok(Form::Refused(reason)),
        };
        let (first, first_bias) = self.first_projection(op, model, operands)?;
        let (down, down_bias) = self.projection(model, operands.down)?;
        let weights = [Some(first), first_bias, Some(down), down_bias];
        self.call_experts(op, operands, call, &weights).map(Form::Done)
    }

    /// `QMoE`: the same with integers.
    fn quantized_moe(&mut self, op: &MoeOp, model: &Graph<Model>, operands: &Operands) -> Result<Form<ValueId>> {
        let (up, down) = (named(model, operands.up.weight), named(model, operands.down.weight));
        let gate = operands.gate.map(|gate| named(model, gate.weight));
        let names = [Some(&up), Some(&down), gate.as_ref()];
        let names: Vec<&str> = names.into_iter().flatten().map(|(name, _)| name.as_str()).collect();
        let scheme = match self.experts_scheme(&names) {
            Ok(scheme) => scheme,
            Err(reason) => return Ok(self.refuse(&names, reason)),
        };
        let (inputs, least) = (width(&up.1), self.options.target.limits("QMoE").block);
        let whole = |s: &Scheme| inputs.is_multiple_of(s.block_size()) && s.block_size() >= least;
        let Some(scheme) = scheme.in_blocks_that(whole) else {
            let reason = format!("{inputs} columns are no whole number of blocks of {}", scheme.block_size());
            return Ok(self.refuse(&names, reason));
        };
        let block = scheme.block_size();
        // The second projection's last block is filled up with zeros, so that many more rows of the first one, whatever
        // they hold, change nothing.
        let rows = op.intermediate_size.next_multiple_of(block);
        let call = match self.expert_call(op, "QMoE", (operands.x, rows)) {
            Ok(call) => call,
            Err(reason) => return Ok(self.refuse(&names, reason)),
        };
        let first = match &gate {
            None => {
                let (weight, shape) = extended(&up.0, &up.1, rows);
                self.integers(&up.0, &shape, &scheme, &weight, Layout::Rows)
            }
            Some(gate) => {
                let ((gate, _), (up_weight, mut shape)) =
                    (extended(&gate.0, &gate.1, rows), extended(&up.0, &up.1, rows));
                // [E, I, H] twice -> [E, 2 * I, H]
                let weight = Weight::Interleave(1, vec![gate, up_weight]);
                if let Some(rows) = shape.get_mut(1) {
                    *rows *= 2;
                }
                self.integers(&up.0.replace("up_proj", "gate_up_proj"), &shape, &scheme, &weight, Layout::Rows)
            }
        };
        let second = self.integers(&down.0, &down.1, &scheme, &Weight::source(&down.0), Layout::Rows);
        let first_bias = self.extended_bias(model, operands, rows)?;
        let down_bias = operands.down.bias.map(|bias| self.value(model, bias)).transpose()?;
        let mut call = call.int("expert_weight_bits", scheme.bits().into()).size("block_size", scheme.block_size());
        // Releases before 1.31 refuse a file with this attribute: it stands where it says something, and beside zero points
        // of a checkpoint, which they would read wrong.
        if self.experts_accuracy_level() != 0 || !scheme.is_symmetric() {
            call = call.int("accuracy_level", self.experts_accuracy_level());
        }
        if self.options.target.limits("QMoE").packed {
            call = call.int("weights_prepacked", 0);
        }
        let element = self.e.ty(operands.x).element;
        let (scales, scales2) = (self.e.cast(first.scales, element)?, self.e.cast(second.scales, element)?);
        let weights = [Some(first.data), Some(scales), first_bias, Some(second.data), Some(scales2), down_bias];
        let zeros = [None, None, None, first.zero_points, second.zero_points];
        self.call_experts(op, operands, call, &[weights.as_slice(), &zeros].concat()).map(Form::Done)
    }

    /// The scheme of all projections of the experts, or why `QMoE` can not take them.
    fn experts_scheme(&self, names: &[&str]) -> std::result::Result<Scheme, String> {
        let schemes: Vec<Scheme> = names.iter().filter_map(|name| self.scheme(name)).collect();
        let scheme = *schemes.first().ok_or("the experts are not quantised")?;
        if schemes.len() < names.len() {
            return Err("the operator takes integers for all projections, and one is floats".to_owned());
        }
        if schemes.iter().any(|other| *other != scheme) {
            return Err("the operator takes one scheme for all projections".to_owned());
        }
        let least = self.options.target.limits("QMoE").block;
        if scheme.block_size() < least {
            return Err(format!("its kernel takes blocks of {least} and more"));
        }
        if scheme.bits() == 2 || scheme.has_float_zeros() {
            return Err("the operator has no kernel for 2 bits, nor for float zero points".to_owned());
        }
        // Releases before 1.31 read zero points wrong without a word.
        let scheme = if scheme.algorithm() == Algorithm::Stored { scheme } else { scheme.symmetric() };
        if scheme.bits() == 8 && (1..4).contains(&self.experts_accuracy_level()) {
            return Err("with 8 bits its kernel rounds activations to 8 bits, whatever is asked".to_owned());
        }
        Ok(scheme)
    }

    /// The bias of the first projection of so many rows, those of gate and up in turn.
    fn extended_bias(&mut self, model: &Graph<Model>, operands: &Operands, rows: usize) -> Result<Option<ValueId>> {
        let Some(up) = operands.up.bias else { return Ok(None) };
        let (name, shape) = named(model, up);
        let (mut weight, mut shape) = extended(&name, &shape, rows);
        if let Some(gate) = operands.gate.and_then(|gate| gate.bias) {
            let (gate, gate_shape) = named(model, gate);
            weight = Weight::Interleave(1, vec![extended(&gate, &gate_shape, rows).0, weight]);
            if let Some(rows) = shape.get_mut(1) {
                *rows *= 2;
            }
        }
        let ty = Type::new(self.element(model.ty(up).element), shape.into_iter().map(Dim::from));
        let name = name.replace("up_proj", "gate_up_proj");
        self.parameter(&format!("{name}.whole_blocks"), ty, model.ty(up).element, weight).map(Some)
    }

    /// Calls an operator that routes by itself: input, logits, and what follows.
    fn call_experts(
        &mut self,
        op: &MoeOp,
        operands: &Operands,
        call: Operator,
        weights: &[Option<ValueId>],
    ) -> Result<ValueId> {
        let routing = self.fused_routing(op, operands)?;
        let experts = vec![self.tokens(operands.x), Dim::from(op.experts)];
        // [B, S, E] -> [B * S, E]
        let logits = self.e.reshape(routing.logits, &experts)?;
        let element = self.e.ty(operands.x).element;
        let logits = self.e.cast(logits, element)?;
        let call = call.int("normalize_routing_weights", routing.normalize.into());
        let mut inputs = vec![Some(operands.x), Some(logits)];
        inputs.extend(weights);
        while inputs.last() == Some(&None) {
            inputs.pop();
        }
        let [mut y] = self.e.call(call, &inputs, [true])?;
        if let Some(scale) = routing.scale {
            y = self.e.cast(y, ElementType::F32)?;
            y = self.e.add(Operator::new("Mul"), &[y, scale])?;
        }
        self.e.cast(y, element)
    }

    /// Weight and bias of a projection as they are stored.
    fn projection(&mut self, model: &Graph<Model>, projection: Projection) -> Result<(ValueId, Option<ValueId>)> {
        let weight = self.value(model, projection.weight)?;
        Ok((weight, projection.bias.map(|bias| self.value(model, bias)).transpose()?))
    }

    /// The projection into experts, the rows of gate and up in turn where there is a gate.
    fn first_projection(
        &mut self,
        op: &MoeOp,
        model: &Graph<Model>,
        operands: &Operands,
    ) -> Result<(ValueId, Option<ValueId>)> {
        match operands.gate {
            None => self.projection(model, operands.up),
            Some(gate) => {
                let weight = self.interleaved(op, model, gate.weight, operands.up.weight)?;
                let biases = gate.bias.zip(operands.up.bias);
                Ok((weight, biases.map(|(gate, up)| self.interleaved(op, model, gate, up)).transpose()?))
            }
        }
    }

    /// `[E, I, ..]` twice -> `[E, 2 * I, ..]`
    fn interleaved(&mut self, op: &MoeOp, model: &Graph<Model>, gate: ValueId, up: ValueId) -> Result<ValueId> {
        let source = |id: ValueId| Weight::source(&model.value(id).name);
        let mut ty = self.ty(model.ty(up));
        if let Some(rows) = ty.shape.get_mut(1) {
            *rows = Dim::from(2 * op.intermediate_size);
        }
        let name = model.value(up).name.replace("up_proj", "gate_up_proj");
        let weight = Weight::Interleave(1, vec![source(gate), source(up)]);
        self.parameter(&name, ty, model.ty(up).element, weight)
    }

    /// The operator applies softmax to its logits and keeps the top `k`. Any other routing is computed outside
    /// and handed over as the logarithms of the chosen weights, with those of almost nothing for the rest: softmax
    /// gives back each weight divided by their sum, which multiplies the result.
    fn fused_routing(&mut self, op: &MoeOp, operands: &Operands) -> Result<FusedRouting> {
        let routing = &op.routing;
        #[expect(clippy::float_cmp, reason = "exactly one means that there is nothing to multiply")]
        let plain = routing.score == Score::Softmax
            && !routing.correction_bias
            && !routing.expert_scale
            && routing.groups.is_none()
            && routing.identity_experts == 0
            && routing.scale == 1.0;
        if plain {
            return Ok(FusedRouting { logits: operands.logits, normalize: routing.normalize, scale: None });
        }
        let mut weights = self.dense_weights(op, operands)?;
        if routing.identity_experts > 0 {
            [weights, _] = self.split_pair(weights, op.experts, routing.identity_experts)?;
        }
        let tiny = self.e.scalar(ElementType::F32, 1e-30);
        let positive = self.e.add(Operator::new("Max"), &[weights, tiny])?;
        let logits = self.e.add(Operator::new("Log"), &[positive])?;
        let scale = self.reduce("ReduceSum", weights, &[-1], true)?;
        Ok(FusedRouting { logits, normalize: true, scale: Some(scale) })
    }

    /// The weights of all experts, 0 for those that were not chosen, `[B, S, E]`.
    fn dense_weights(&mut self, op: &MoeOp, operands: &Operands) -> Result<ValueId> {
        let name = self.e.graph.value(operands.logits).name.clone();
        if let Some(known) = self.known(&name) {
            return Ok(known);
        }
        let (chosen, weights) = self.route(op, operands)?;
        let none = self.filled_like(operands.logits, 0.0)?;
        let weights = self.e.add(Operator::new("ScatterElements").int("axis", -1), &[none, chosen, weights])?;
        Ok(self.keep(&name, weights))
    }

    fn split_pair(&mut self, x: ValueId, first: usize, second: usize) -> Result<[ValueId; 2]> {
        match self.split(x, &[first, second])?.as_slice() {
            [first, second] => Ok([*first, *second]),
            other => Err(Error::new(Code::SpecInvalid, "Split").found(other.len()).expected("2 pieces")),
        }
    }

    /// The chosen experts of every token and their weights, `[B, S, k]` each.
    fn route(&mut self, op: &MoeOp, operands: &Operands) -> Result<(ValueId, ValueId)> {
        let routing = &op.routing;
        let scores = match routing.score {
            Score::Softmax => self.e.add(Operator::new("Softmax").int("axis", -1), &[operands.logits])?,
            Score::Sigmoid => self.e.add(Operator::new("Sigmoid"), &[operands.logits])?,
            Score::Sparsemixer { jitter } => return self.sparsemixer(operands.logits, jitter),
        };
        let mut choice = scores;
        if let Some(bias) = operands.correction_bias {
            choice = self.e.add(Operator::new("Add"), &[choice, bias])?;
        }
        if routing.groups.is_some() {
            choice = self.within_best_groups(op, choice)?;
        }
        let [_, chosen] = self.top_k(choice, op.top_k)?;
        let mut weights = self.e.add(Operator::new("GatherElements").int("axis", -1), &[scores, chosen])?;
        if routing.normalize {
            let sum = self.reduce("ReduceSum", weights, &[-1], true)?;
            weights = self.e.add(Operator::new("Div"), &[weights, sum])?;
        }
        #[expect(clippy::float_cmp, reason = "exactly one means that there is nothing to multiply")]
        if routing.scale != 1.0 {
            let scale = self.e.scalar(ElementType::F32, routing.scale);
            weights = self.e.add(Operator::new("Mul"), &[weights, scale])?;
        }
        if let Some(scale) = operands.expert_scale {
            let scale = self.e.add(Operator::new("Gather").int("axis", 0), &[scale, chosen])?;
            weights = self.e.add(Operator::new("Mul"), &[weights, scale])?;
        }
        Ok((chosen, weights))
    }

    /// `sparsemixer` of Phi-3.5-MoE: the best expert, and the best of the rest, each with its softmax among those
    /// whose score is within `2 · jitter` of the best by `(best - s) / max(|s|, best)`.
    fn sparsemixer(&mut self, logits: ValueId, jitter: f64) -> Result<(ValueId, ValueId)> {
        let lowest = self.e.scalar(ElementType::F32, f64::from(f32::MIN));
        let mut candidates = logits;
        let (mut chosen, mut weights) = (Vec::new(), Vec::new());
        for round in 0..2 {
            let [best, place] = self.top_k(candidates, 1)?;
            let size = self.e.add(Operator::new("Abs"), &[logits])?;
            let size = self.e.add(Operator::new("Max"), &[size, best])?;
            let gap = self.e.add(Operator::new("Sub"), &[best, logits])?;
            let gap = self.e.add(Operator::new("Div"), &[gap, size])?;
            let limit = self.e.scalar(ElementType::F32, 2.0 * jitter);
            let far = self.e.add(Operator::new("Greater"), &[gap, limit])?;
            let close = self.e.add(Operator::new("Where"), &[far, lowest, candidates])?;
            let shares = self.e.add(Operator::new("Softmax").int("axis", -1), &[close])?;
            let gather = Operator::new("GatherElements").int("axis", -1);
            weights.push(self.e.add(gather, &[shares, place])?);
            chosen.push(place);
            if round == 0 {
                let gone = self.filled_like(place, f64::from(f32::MIN))?;
                let scatter = Operator::new("ScatterElements").int("axis", -1);
                candidates = self.e.add(scatter, &[logits, place, gone])?;
            }
        }
        let join = || Operator::new("Concat").int("axis", -1);
        Ok((self.e.add(join(), &chosen)?, self.e.add(join(), &weights)?))
    }

    /// The scores with those of experts outside the best groups out of the choice (`DeepseekV3TopkRouter`).
    fn within_best_groups(&mut self, op: &MoeOp, choice: ValueId) -> Result<ValueId> {
        let Some(groups) = op.routing.groups else { return Ok(choice) };
        let flat = self.e.shape(choice).clone();
        let members = op.experts / groups.count.max(1);
        let mut grouped = flat.clone();
        grouped.pop();
        grouped.extend([Dim::from(groups.count), Dim::from(members)]);
        // [B, S, E] -> [B, S, G, E / G]
        let by_group = self.e.reshape(choice, &grouped)?;
        let [best, _] = self.top_k(by_group, groups.score_top.min(members))?;
        let group_scores = self.reduce("ReduceSum", best, &[-1], false)?;
        let [_, kept] = self.top_k(group_scores, groups.top)?;
        let never = self.filled_like(group_scores, 0.0)?;
        let one = self.e.scalar(ElementType::F32, 1.0);
        // 1 for every kept group: 0 * index + 1
        let index = self.e.cast(kept, ElementType::F32)?;
        let zero = self.e.scalar(ElementType::F32, 0.0);
        let ones = self.e.add(Operator::new("Mul"), &[index, zero])?;
        let ones = self.e.add(Operator::new("Add"), &[ones, one])?;
        let mask = self.e.add(Operator::new("ScatterElements").int("axis", -1), &[never, kept, ones])?;
        let mask = self.e.cast(mask, ElementType::Bool)?;
        let axis = self.e.ints(&[-1]);
        let mask = self.e.add(Operator::new("Unsqueeze"), &[mask, axis])?;
        let lowest = self.e.scalar(ElementType::F32, f64::from(f32::MIN));
        let limited = self.e.add(Operator::new("Where"), &[mask, by_group, lowest])?;
        // [B, S, G, E / G] -> [B, S, E]
        self.e.reshape(limited, &flat)
    }

    pub(super) fn top_k(&mut self, x: ValueId, k: usize) -> Result<[ValueId; 2]> {
        let count = self.e.ints(&[i64::try_from(k).unwrap_or(i64::MAX)]);
        let call = Operator::new("TopK").int("axis", -1).int("largest", 1).int("sorted", 1);
        self.e.call(call, &[Some(x), Some(count)], [true; 2])
    }

    /// A float32 tensor of the shape of `x` with one value everywhere.
    pub(super) fn filled_like(&mut self, x: ValueId, value: f64) -> Result<ValueId> {
        let shape = self.e.add(Operator::new("Shape"), &[x])?;
        let value = self.e.scalar(ElementType::F32, value);
        self.e.add(Operator::new("Expand"), &[value, shape])
    }

    pub(super) fn tokens(&self, x: ValueId) -> Dim {
        let shape = self.e.shape(x);
        shape.iter().take(shape.len().saturating_sub(1)).fold(Dim::from(1), |tokens, dim| &tokens * dim)
    }

    /// Every expert on every token, weighted by zero where it was not chosen: three matrix products whatever
    /// the number of experts, with the weights as they are stored.
    ///
    /// ```text
    /// x [B, S, H] ─ [H, T'] ─ up [E, I, H] · x = [E, I, T'] ─ act ─ down [E, H, I] · = [E, H, T'] ┐
    /// weights [B, S, E] ─ [T', E] ─ [E, 1, T'] ─────────────────────────────────────── multiply ──┴ sum ─ [H, T']
    /// ```
    fn every_expert(&mut self, op: &MoeOp, model: &Graph<Model>, operands: &Operands) -> Result<ValueId> {
        let element = self.e.ty(operands.x).element;
        let mut weights = self.dense_weights(op, operands)?;
        if op.routing.identity_experts > 0 {
            [weights, _] = self.split_pair(weights, op.experts, op.routing.identity_experts)?;
        }
        let weights = self.e.cast(weights, element)?;
        let weights = self.tokens_last(weights)?;
        let axis = self.e.ints(&[1]);
        // [E, T'] -> [E, 1, T']
        let weights = self.e.add(Operator::new("Unsqueeze"), &[weights, axis])?;

        let mut x = self.tokens_last(operands.x)?;
        if op.weigh_input {
            // [H, T'] times [E, 1, T'] -> [E, H, T']
            x = self.e.add(Operator::new("Mul"), &[x, weights])?;
        }
        let up = self.project(model, operands.up, x)?;
        let inner = match operands.gate {
            None => self.activate(op.activation, up, &[])?,
            Some(gate) => {
                let gate = self.project(model, gate, x)?;
                if let Activation::ClampedSwiglu { alpha, limit } = op.activation {
                    self.clamped_swiglu((alpha, limit), gate, up)?
                } else {
                    let gate = self.activate(op.activation, gate, &[])?;
                    self.e.add(Operator::new("Mul"), &[gate, up])?
                }
            }
        };
        let mut y = self.project(model, operands.down, inner)?;
        if !op.weigh_input {
            y = self.e.add(Operator::new("Mul"), &[y, weights])?;
        }
        // [E, H, T'] -> [H, T'] -> [T', H] -> [B, S, H]
        let y = self.reduce("ReduceSum", y, &[0], false)?;
        let y = self.e.add(Operator::new("Transpose").ints("perm", &[1, 0]), &[y])?;
        let shape = self.e.shape(operands.x).clone();
        self.reshape(y, &shape)
    }

    /// `weight · x + bias`, `[E, O, I] · [I, T']` or `[E, I, T']` -> `[E, O, T']`
    fn project(&mut self, model: &Graph<Model>, projection: Projection, x: ValueId) -> Result<ValueId> {
        let (weight, bias) = self.projection(model, projection)?;
        let y = self.e.add(Operator::new("MatMul"), &[weight, x])?;
        let Some(bias) = bias else { return Ok(y) };
        let axis = self.e.ints(&[2]);
        // [E, O] -> [E, O, 1]
        let bias = self.e.add(Operator::new("Unsqueeze"), &[bias, axis])?;
        self.e.add(Operator::new("Add"), &[y, bias])
    }

    /// A call of an operator that runs the chosen experts, `rows` wide inside, or why it can not express these.
    fn expert_call(
        &self,
        op: &MoeOp,
        op_type: &'static str,
        (x, rows): (ValueId, usize),
    ) -> std::result::Result<Operator, String> {
        if op.weigh_input {
            return Err("the operator weighs outputs, not inputs".to_owned());
        }
        if op.top_k > op.experts {
            return Err(format!("{} experts of {} with weights", op.top_k, op.experts));
        }
        let call = Operator::microsoft(op_type).size("k", op.top_k);
        let element = self.e.ty(x).element;
        if !self.e.runs(&call, &[Some(element); 2], &[Some(element)]) {
            return Err(format!("the provider has no kernel of the operator for {element}"));
        }
        let (hidden, widths) =
            (self.e.shape(x).last().and_then(Dim::value), self.options.target.limits(op_type).widths);
        let hidden = hidden.and_then(|size| usize::try_from(size).ok()).unwrap_or(0);
        if let Some(odd) = [hidden, rows].into_iter().find(|size| !size.is_multiple_of(widths)) {
            return Err(format!("its kernel takes widths that are multiples of {widths}, and not {odd}"));
        }
        Ok(match (op.gated, op.activation) {
            (true, Activation::Silu) => swiglu(call, 1.0, 0.0),
            (true, Activation::ClampedSwiglu { alpha, limit }) => swiglu(call, alpha, 1.0).float("swiglu_limit", limit),
            (false, Activation::Silu) => call.string("activation_type", "silu"),
            (false, Activation::Relu) => call.string("activation_type", "relu"),
            (gated, other) => {
                let kind = if gated { "gated" } else { "plain" };
                return Err(format!("the operator has no {kind} {other:?} experts"));
            }
        })
    }

    /// `[B, S, N]` -> `[N, B * S]`
    fn tokens_last(&mut self, x: ValueId) -> Result<ValueId> {
        let width = self.e.shape(x).last().cloned().unwrap_or_else(|| Dim::from(1));
        let rows = vec![self.tokens(x), width];
        let x = self.e.reshape(x, &rows)?;
        self.e.add(Operator::new("Transpose").ints("perm", &[1, 0]), &[x])
    }
}

fn width(shape: &[usize]) -> usize {
    shape.last().copied().unwrap_or(0)
}

/// `[E, I, ..]` -> `[E, rows, ..]`: its rows again and again.
fn extended(name: &str, shape: &[usize], rows: usize) -> (Weight, Vec<usize>) {
    let weight = Weight::source(name);
    let have = shape.get(1).copied().unwrap_or(1).max(1);
    let mut longer = shape.to_vec();
    if let Some(axis) = longer.get_mut(1) {
        *axis = rows;
    }
    if rows <= have {
        return (weight, longer);
    }
    let mut parts = vec![weight.clone(); rows / have];
    let rest = rows % have;
    if rest > 0 {
        let split = Split { axis: 1, groups: 1, sizes: vec![rest, have - rest], index: 0 };
        parts.push(Weight::Split(split, Box::new(weight)));
    }
    (Weight::Concat(1, parts), longer)
}

/// The attributes of a gated expert whose gate and up rows come in turn.
fn swiglu(call: Operator, alpha: f64, beta: f64) -> Operator {
    call.string("activation_type", "swiglu")
        .int("swiglu_fusion", 1)
        .float("activation_alpha", alpha)
        .float("activation_beta", beta)
}
