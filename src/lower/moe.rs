//! Mixture of experts: routing, and the experts in one operator or all of them at once.

use super::{Form, Lowerer, Operator};
use crate::build::{Model, MoeOp};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::graph::{Dim, Graph, ValueId};
use crate::spec::{Activation, Score};
use crate::weight::Weight;

/// Operands of a mixture of experts. Weights stay values of the model's graph until it is known in which form
/// they are wanted.
struct Operands {
    x: ValueId,
    logits: ValueId,
    correction_bias: Option<ValueId>,
    gate: Option<ValueId>,
    up: ValueId,
    down: ValueId,
}

/// What the fused operator is to do itself.
struct FusedRouting {
    logits: ValueId,
    normalize: bool,
    /// Multiplies the result, `[B, S, 1]`.
    scale: Option<ValueId>,
}

impl Lowerer {
    pub(super) fn moe(&mut self, op: &MoeOp, model: &Graph<Model>, ids: &[ValueId]) -> Result<ValueId> {
        let mut rest = ids.iter().copied();
        let mut next = || rest.next().ok_or_else(|| Error::new(Code::SpecInvalid, "Moe").found("too few operands"));
        let (x, logits) = (self.value(model, next()?)?, self.value(model, next()?)?);
        let correction_bias = if op.routing.correction_bias { Some(self.value(model, next()?)?) } else { None };
        let gate = if op.gated { Some(next()?) } else { None };
        let operands = Operands { x, logits, correction_bias, gate, up: next()?, down: next()? };
        self.first_form("moe", |s, form| match form {
            "MoE" => s.fused_moe(op, model, &operands),
            _ => s.every_expert(op, model, &operands).map(Form::Done),
        })
    }

    /// `MoE` of onnxruntime: only the chosen experts run. It takes gate and up rows in turn, and only float32.
    fn fused_moe(&mut self, op: &MoeOp, model: &Graph<Model>, operands: &Operands) -> Result<Form<ValueId>> {
        let activation = match (op.gated, op.activation) {
            (true, Activation::Silu) => "swiglu",
            (false, Activation::Silu) => "silu",
            (false, Activation::Relu) => "relu",
            (_, other) => {
                let kind = if op.gated { "gated" } else { "plain" };
                return Ok(Form::Refused(format!("the operator has no {kind} {other:?} experts")));
            }
        };
        let up_name = model.value(operands.up).name.clone();
        let mut first = Weight::source(&up_name);
        let mut first_type = self.ty(model.ty(operands.up));
        let mut first_name = up_name;
        if let Some(gate) = operands.gate {
            let gate = Weight::source(&model.value(gate).name);
            first = Weight::Interleave(1, vec![gate, first]);
            first_name = first_name.replace("up_proj", "gate_up_proj");
            // [E, I, H] twice -> [E, 2 * I, H]
            if let Some(rows) = first_type.shape.get_mut(1) {
                *rows = Dim::from(2 * op.intermediate_size);
            }
        }
        let first = self.e.weight(&first_name, first_type, first);
        let first = self.e.cast(first, ElementType::F32)?;
        let down = self.value(model, operands.down)?;
        let down = self.e.cast(down, ElementType::F32)?;
        let routing = self.fused_routing(op, operands)?;
        let experts = vec![self.tokens(operands.x), Dim::from(op.experts)];
        // [B, S, E] -> [B * S, E]
        let logits = self.e.reshape(routing.logits, &experts)?;
        let element = self.e.ty(operands.x).element;
        let x = self.e.cast(operands.x, ElementType::F32)?;
        let mut call = Operator::microsoft("MoE")
            .size("k", op.top_k)
            .string("activation_type", activation)
            .int("normalize_routing_weights", routing.normalize.into());
        if op.gated {
            call = call.int("swiglu_fusion", 1).float("activation_alpha", 1.0).float("activation_beta", 0.0);
        }
        let inputs = [Some(x), Some(logits), Some(first), None, Some(down)];
        let [mut y] = self.e.call(call, &inputs, [true])?;
        if let Some(scale) = routing.scale {
            y = self.e.add(Operator::new("Mul"), &[y, scale])?;
        }
        self.e.cast(y, element).map(Form::Done)
    }

    /// The operator applies softmax to its logits and keeps the top `k`. Any other routing is computed outside
    /// and handed over as the logarithms of the chosen weights, with -1e4 for the rest: softmax gives back each
    /// weight divided by their sum, which multiplies the result.
    fn fused_routing(&mut self, op: &MoeOp, operands: &Operands) -> Result<FusedRouting> {
        let routing = &op.routing;
        #[expect(clippy::float_cmp, reason = "exactly one means that there is nothing to multiply")]
        let plain = routing.score == Score::Softmax
            && !routing.correction_bias
            && routing.groups.is_none()
            && routing.scale == 1.0;
        if plain {
            return Ok(FusedRouting { logits: operands.logits, normalize: routing.normalize, scale: None });
        }
        let (chosen, weights) = self.route(op, operands)?;
        // A weight that underflows must not become minus infinity.
        let tiny = self.e.scalar(ElementType::F32, 1e-30);
        let positive = self.e.add(Operator::new("Max"), &[weights, tiny])?;
        let logarithms = self.e.add(Operator::new("Log"), &[positive])?;
        let never = self.filled_like(operands.logits, -1e4)?;
        let scatter = Operator::new("ScatterElements").int("axis", -1);
        let logits = self.e.add(scatter, &[never, chosen, logarithms])?;
        let scale = self.reduce("ReduceSum", weights, &[-1], true)?;
        Ok(FusedRouting { logits, normalize: true, scale: Some(scale) })
    }

    /// The chosen experts of every token and their weights, `[B, S, k]` each.
    fn route(&mut self, op: &MoeOp, operands: &Operands) -> Result<(ValueId, ValueId)> {
        let routing = &op.routing;
        let scores = match routing.score {
            Score::Softmax => self.e.add(Operator::new("Softmax").int("axis", -1), &[operands.logits])?,
            Score::Sigmoid => self.e.add(Operator::new("Sigmoid"), &[operands.logits])?,
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
        Ok((chosen, weights))
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

    fn top_k(&mut self, x: ValueId, k: usize) -> Result<[ValueId; 2]> {
        let count = self.e.ints(&[i64::try_from(k).unwrap_or(i64::MAX)]);
        let call = Operator::new("TopK").int("axis", -1).int("largest", 1).int("sorted", 1);
        self.e.call(call, &[Some(x), Some(count)], [true; 2])
    }

    /// A float32 tensor of the shape of `x` with one value everywhere.
    fn filled_like(&mut self, x: ValueId, value: f64) -> Result<ValueId> {
        let shape = self.e.add(Operator::new("Shape"), &[x])?;
        let value = self.e.scalar(ElementType::F32, value);
        self.e.add(Operator::new("Expand"), &[value, shape])
    }

    fn tokens(&self, x: ValueId) -> Dim {
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
        let (up, down) = (self.value(model, operands.up)?, self.value(model, operands.down)?);
        let gate = operands.gate.map(|gate| self.value(model, gate)).transpose()?;
        let (chosen, weights) = self.route(op, operands)?;
        let none = self.filled_like(operands.logits, 0.0)?;
        let weights = self.e.add(Operator::new("ScatterElements").int("axis", -1), &[none, chosen, weights])?;
        let element = self.e.ty(operands.x).element;
        let weights = self.e.cast(weights, element)?;
        let weights = self.tokens_last(weights)?;
        let axis = self.e.ints(&[1]);
        // [E, T'] -> [E, 1, T']
        let weights = self.e.add(Operator::new("Unsqueeze"), &[weights, axis])?;

        let x = self.tokens_last(operands.x)?;
        let matmul = || Operator::new("MatMul");
        let mut inner = self.e.add(matmul(), &[up, x])?;
        if let Some(gate) = gate {
            let gate = self.e.add(matmul(), &[gate, x])?;
            let gate = self.activate(op.activation, gate)?;
            inner = self.e.add(Operator::new("Mul"), &[gate, inner])?;
        } else {
            inner = self.activate(op.activation, inner)?;
        }
        let y = self.e.add(matmul(), &[down, inner])?;
        let y = self.e.add(Operator::new("Mul"), &[y, weights])?;
        // [E, H, T'] -> [H, T'] -> [T', H] -> [B, S, H]
        let y = self.reduce("ReduceSum", y, &[0], false)?;
        let y = self.e.add(Operator::new("Transpose").ints("perm", &[1, 0]), &[y])?;
        let shape = self.e.shape(operands.x).clone();
        self.reshape(y, &shape)
    }

    /// `[B, S, N]` -> `[N, B * S]`
    fn tokens_last(&mut self, x: ValueId) -> Result<ValueId> {
        let width = self.e.shape(x).last().cloned().unwrap_or_else(|| Dim::from(1));
        let rows = vec![self.tokens(x), width];
        let x = self.e.reshape(x, &rows)?;
        self.e.add(Operator::new("Transpose").ints("perm", &[1, 0]), &[x])
    }
}
