//! Operations on whole vectors: slices, products, and the functions that a few models are made of.

use super::{Lowerer, Operator};
use crate::build::Composite;
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::graph::{Dim, ValueId};

impl Lowerer<'_> {
    /// The composite operations that have one form on every target.
    pub(super) fn combination(&mut self, scope: &str, op: &Composite, operands: &[ValueId]) -> Result<Vec<ValueId>> {
        let one = match (op, operands) {
            (Composite::Subtract, [a, b]) => self.e.add(Operator::new("Sub"), &[*a, *b]),
            (Composite::Tanh, [x]) => self.e.add(Operator::new("Tanh"), &[*x]),
            (Composite::Exp, [x]) => self.e.add(Operator::new("Exp"), &[*x]),
            (Composite::MatMul, [a, b]) => self.e.add(Operator::new("MatMul"), &[*a, *b]),
            (Composite::Sum, [x]) => self.reduce("ReduceSum", *x, &[-1], true),
            (Composite::Slice(start, end), [x]) => self.slice(*start, *end, *x),
            (Composite::Transpose(order), [x]) => {
                let order: Vec<i64> = order.iter().map(|axis| integer(*axis)).collect();
                self.e.add(Operator::new("Transpose").ints("perm", &order), &[*x])
            }
            (Composite::SparseRelu(share), [x]) => self.sparse_relu(*share, *x),
            (Composite::MatchMagnitude, [x, reference]) => self.match_magnitude(*x, *reference),
            (Composite::IdsBelow(rows), [ids]) => self.ids_below(*rows, *ids),
            (Composite::EachExpert, [x, weight]) => self.each_expert(*x, *weight),
            (Composite::SumExperts, [x, weight]) => self.sum_experts(*x, *weight),
            (Composite::Choose { top_k }, [logits]) => return self.choose(*top_k, *logits),
            (Composite::Index(op), [query, key, past, weights]) => {
                return self.index(*op, [*query, *key, *past, *weights]);
            }
            (op, operands) => {
                Err(Error::new(Code::SpecInvalid, scope).found(format!("{} operands of {op}", operands.len())))
            }
        };
        Ok(vec![one?])
    }

    fn slice(&mut self, start: usize, end: usize, x: ValueId) -> Result<ValueId> {
        let [start, end, axis] = [integer(start), integer(end), -1].map(|value| self.e.ints(&[value]));
        self.e.add(Operator::new("Slice"), &[x, start, end, axis])
    }

    /// `relu(x − mean − std · Φ⁻¹(share))`, as `Gemma3nTextMLP._gaussian_topk`.
    fn sparse_relu(&mut self, share: f64, x: ValueId) -> Result<ValueId> {
        let mean = self.reduce("ReduceMean", x, &[-1], true)?;
        let centred = self.e.add(Operator::new("Sub"), &[x, mean])?;
        let square = self.e.add(Operator::new("Mul"), &[centred, centred])?;
        let variance = self.reduce("ReduceMean", square, &[-1], true)?;
        let deviation = self.e.add(Operator::new("Sqrt"), &[variance])?;
        let factor = self.e.scalar(self.e.ty(x).element, quantile(share));
        let cut = self.e.add(Operator::new("Mul"), &[deviation, factor])?;
        let rest = self.e.add(Operator::new("Sub"), &[centred, cut])?;
        self.e.add(Operator::new("Relu"), &[rest])
    }

    /// `x · rms(reference) / sqrt(max(mean(x²), 1e-5))`, as `Gemma3nTextModel` keeps its streams alike.
    fn match_magnitude(&mut self, x: ValueId, reference: ValueId) -> Result<ValueId> {
        let element = self.e.ty(x).element;
        let [own, target] = [x, reference].map(|x| self.mean_square(x));
        let (own, target) = (own?, target?);
        let floor = self.e.scalar(ElementType::F32, 1e-5);
        let own = self.e.add(Operator::new("Max"), &[own, floor])?;
        let own = self.e.add(Operator::new("Sqrt"), &[own])?;
        let target = self.e.add(Operator::new("Sqrt"), &[target])?;
        let ratio = self.e.add(Operator::new("Div"), &[target, own])?;
        let ratio = self.e.cast(ratio, element)?;
        self.e.add(Operator::new("Mul"), &[x, ratio])
    }

    fn mean_square(&mut self, x: ValueId) -> Result<ValueId> {
        let x = self.e.cast(x, ElementType::F32)?;
        let square = self.e.add(Operator::new("Mul"), &[x, x])?;
        self.reduce("ReduceMean", square, &[-1], true)
    }

    /// Ids that a smaller table does not have read its first row.
    fn ids_below(&mut self, rows: usize, ids: ValueId) -> Result<ValueId> {
        let (rows, zero) = (self.e.int(integer(rows)), self.e.int(0));
        let inside = self.e.add(Operator::new("Less"), &[ids, rows])?;
        self.e.add(Operator::new("Where"), &[inside, ids, zero])
    }

    /// The best experts' places as one-hot rows `[B, S, k, E]`, and the softmax of their logits `[B, S, k, 1]`.
    fn choose(&mut self, top_k: usize, logits: ValueId) -> Result<Vec<ValueId>> {
        let experts = self.e.shape(logits).last().and_then(Dim::value).unwrap_or(0);
        let element = self.e.ty(logits).element;
        let [best, places] = self.top_k(logits, top_k)?;
        let weights = self.e.add(Operator::new("Softmax").int("axis", -1), &[best])?;
        let all = self.e.ints(&(0..experts).collect::<Vec<_>>());
        let axis = self.e.ints(&[-1]);
        let places = self.e.add(Operator::new("Unsqueeze"), &[places, axis])?;
        let selection = self.e.add(Operator::new("Equal"), &[places, all])?;
        let selection = self.e.cast(selection, element)?;
        let weights = self.e.add(Operator::new("Unsqueeze"), &[weights, axis])?;
        Ok(vec![selection, weights])
    }

    /// x `[B, S, I]`, weight `[E, O, I]` -> `[B, S, E, O]`
    fn each_expert(&mut self, x: ValueId, weight: ValueId) -> Result<ValueId> {
        let (experts, output, input) = self.expert_sizes(weight)?;
        // [E, O, I] -> [E * O, I]
        let stacked = self.e.reshape(weight, &vec![&experts * &output, input])?;
        let all = self.linear(x, stacked, None)?;
        let mut shape = self.e.shape(all).clone();
        shape.pop();
        shape.extend([experts, output]);
        // [B, S, E * O] -> [B, S, E, O]
        self.reshape(all, &shape)
    }

    /// x `[B, S, E, I]`, weight `[E, O, I]` -> `[B, S, O]`
    fn sum_experts(&mut self, x: ValueId, weight: ValueId) -> Result<ValueId> {
        let (experts, output, input) = self.expert_sizes(weight)?;
        let mut shape = self.e.shape(x).clone();
        shape.truncate(2);
        let tokens = shape.iter().fold(Dim::from(1), |tokens, dim| &tokens * dim);
        // [B, S, E, I] -> [T', E, I] -> [E, I, T']
        let rows = self.e.reshape(x, &vec![tokens, experts, input])?;
        let rows = self.e.add(Operator::new("Transpose").ints("perm", &[1, 2, 0]), &[rows])?;
        let y = self.e.add(Operator::new("MatMul"), &[weight, rows])?;
        // [E, O, T'] -> [O, T'] -> [T', O] -> [B, S, O]
        let y = self.reduce("ReduceSum", y, &[0], false)?;
        let y = self.e.add(Operator::new("Transpose").ints("perm", &[1, 0]), &[y])?;
        shape.push(output);
        self.reshape(y, &shape)
    }

    fn expert_sizes(&self, weight: ValueId) -> Result<(Dim, Dim, Dim)> {
        match self.e.shape(weight).as_slice() {
            [experts, output, input] => Ok((experts.clone(), output.clone(), input.clone())),
            other => Err(Error::new(Code::SpecInvalid, "experts").found(other.len()).expected("[E, out, in]")),
        }
    }
}

fn integer(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Where the standard normal distribution reaches a share, by halving on its series.
fn quantile(share: f64) -> f64 {
    let density = |x: f64| (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let distribution = |x: f64| {
        // Φ(x) = 1/2 + φ(x) · (x + x³/3 + x⁵/15 + ...)
        let (mut term, mut sum, mut odd) = (x, x, 1.0);
        while term.abs() > 1e-17 && odd < 400.0 {
            odd += 2.0;
            term *= x * x / odd;
            sum += term;
        }
        0.5 + density(x) * sum
    };
    let share = share.clamp(1e-6, 1.0 - 1e-6);
    let (mut low, mut high) = (-6.0_f64, 6.0_f64);
    for _ in 0..80 {
        let middle = f64::midpoint(low, high);
        if distribution(middle) < share {
            low = middle;
        } else {
            high = middle;
        }
    }
    f64::midpoint(low, high)
}

#[cfg(test)]
mod tests {
    use super::quantile;

    #[test]
    fn quantiles_of_the_normal_distribution() {
        approx::assert_relative_eq!(quantile(0.95), 1.644_853_626_951_472, epsilon = 1e-12);
        approx::assert_relative_eq!(quantile(0.5), 0.0, epsilon = 1e-12);
        approx::assert_relative_eq!(quantile(0.1), -1.281_551_565_544_6, epsilon = 1e-12);
    }
}
