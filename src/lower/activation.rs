//! Non-linearities and other functions of one element.

use super::{Form, Lowerer, Operator};
use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::graph::ValueId;
use crate::spec::Activation;

impl Lowerer<'_> {
    pub(super) fn activate(&mut self, activation: Activation, x: ValueId, slopes: &[ValueId]) -> Result<ValueId> {
        match (activation, slopes) {
            (Activation::Silu, _) => self.swish(x, 1.0),
            (Activation::QuickGelu, _) => self.swish(x, 1.702),
            (Activation::Relu, _) => self.e.add(Operator::new("Relu"), &[x]),
            (Activation::Relu2, _) => {
                let positive = self.e.add(Operator::new("Relu"), &[x])?;
                self.e.add(Operator::new("Mul"), &[positive, positive])
            }
            (Activation::Gelu | Activation::GeluPytorchTanh, _) => self.first_form("gelu", |s, form| match form {
                "Gelu" => {
                    let approximate = if activation == Activation::Gelu { "none" } else { "tanh" };
                    s.e.add(Operator::new("Gelu").string("approximate", approximate), &[x]).map(Form::Done)
                }
                _ => s.gelu_spelled_out(activation, x).map(Form::Done),
            }),
            (Activation::Xielu, &[positive, negative, beta, eps]) => self.xielu(x, [positive, negative, beta, eps]),
            (other, _) => Err(Error::new(Code::SpecInvalid, "activation")
                .found(format!("{other:?} with {} slopes", slopes.len()))
                .expected("a function of one value")),
        }
    }

    /// `x · sigmoid(factor · x)`
    fn swish(&mut self, x: ValueId, factor: f64) -> Result<ValueId> {
        let mut inner = x;
        #[expect(clippy::float_cmp, reason = "exactly one means that there is nothing to multiply")]
        if factor != 1.0 {
            let factor = self.e.scalar(self.e.ty(x).element, factor);
            inner = self.e.add(Operator::new("Mul"), &[x, factor])?;
        }
        let gate = self.e.add(Operator::new("Sigmoid"), &[inner])?;
        self.e.add(Operator::new("Mul"), &[x, gate])
    }

    /// `x/2 · (1 + erf(x/√2))`, or `x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))`.
    fn gelu_spelled_out(&mut self, activation: Activation, x: ValueId) -> Result<ValueId> {
        let element = self.e.ty(x).element;
        let e = &mut self.e;
        let inner = if activation == Activation::Gelu {
            let root = e.scalar(element, std::f64::consts::FRAC_1_SQRT_2);
            let scaled = e.add(Operator::new("Mul"), &[x, root])?;
            e.add(Operator::new("Erf"), &[scaled])?
        } else {
            let square = e.add(Operator::new("Mul"), &[x, x])?;
            let cube = e.add(Operator::new("Mul"), &[square, x])?;
            let factor = e.scalar(element, 0.044_715);
            let cube = e.add(Operator::new("Mul"), &[cube, factor])?;
            let sum = e.add(Operator::new("Add"), &[x, cube])?;
            let root = e.scalar(element, (2.0 / std::f64::consts::PI).sqrt());
            let scaled = e.add(Operator::new("Mul"), &[sum, root])?;
            e.add(Operator::new("Tanh"), &[scaled])?
        };
        let (one, half) = (e.scalar(element, 1.0), e.scalar(element, 0.5));
        let inner = e.add(Operator::new("Add"), &[inner, one])?;
        let halved = e.add(Operator::new("Mul"), &[x, half])?;
        e.add(Operator::new("Mul"), &[halved, inner])
    }

    /// `XIELUActivation` of transformers: `x > 0: softplus(p)·x² + beta·x`, else
    /// `(exp(min(x, eps)) - 1 - x) · (beta + softplus(n)) + beta·x`.
    fn xielu(&mut self, x: ValueId, [positive, negative, beta, eps]: [ValueId; 4]) -> Result<ValueId> {
        let element = self.e.ty(x).element;
        let (one, zero) = (self.e.scalar(element, 1.0), self.e.scalar(element, 0.0));
        let e = &mut self.e;
        let positive = e.add(Operator::new("Softplus"), &[positive])?;
        let negative = e.add(Operator::new("Softplus"), &[negative])?;
        let negative = e.add(Operator::new("Add"), &[negative, beta])?;
        let linear = e.add(Operator::new("Mul"), &[x, beta])?;
        let square = e.add(Operator::new("Mul"), &[x, x])?;
        let square = e.add(Operator::new("Mul"), &[square, positive])?;
        let low = e.add(Operator::new("Min"), &[x, eps])?;
        let decay = e.add(Operator::new("Exp"), &[low])?;
        let decay = e.add(Operator::new("Sub"), &[decay, one])?;
        let decay = e.add(Operator::new("Sub"), &[decay, x])?;
        let decay = e.add(Operator::new("Mul"), &[decay, negative])?;
        let above = e.add(Operator::new("Greater"), &[x, zero])?;
        let curve = e.add(Operator::new("Where"), &[above, square, decay])?;
        e.add(Operator::new("Add"), &[curve, linear])
    }

    /// `(clamp(up, ±limit) + 1) · g · sigmoid(alpha · g)` with `g = min(gate, limit)`, after `GptOssExperts`.
    pub(super) fn clamped_swiglu(&mut self, (alpha, limit): (f64, f64), gate: ValueId, up: ValueId) -> Result<ValueId> {
        let gate = self.clip(None, Some(limit), gate)?;
        let up = self.clip(Some(-limit), Some(limit), up)?;
        let gate = self.swish(gate, alpha)?;
        let one = self.e.scalar(self.e.ty(up).element, 1.0);
        let up = self.e.add(Operator::new("Add"), &[up, one])?;
        self.e.add(Operator::new("Mul"), &[up, gate])
    }

    /// `tanh(x / cap) · cap`
    pub(super) fn softcap(&mut self, cap: f64, x: ValueId) -> Result<ValueId> {
        let cap = self.e.scalar(self.e.ty(x).element, cap);
        let x = self.e.add(Operator::new("Div"), &[x, cap])?;
        let x = self.e.add(Operator::new("Tanh"), &[x])?;
        self.e.add(Operator::new("Mul"), &[x, cap])
    }

    pub(super) fn clip(&mut self, low: Option<f64>, high: Option<f64>, x: ValueId) -> Result<ValueId> {
        let element = self.e.ty(x).element;
        let low = low.map(|low| self.e.scalar(element, low));
        let high = high.map(|high| self.e.scalar(element, high));
        let [clipped] = self.e.call(Operator::new("Clip"), &[Some(x), low, high], [true])?;
        Ok(clipped)
    }

    /// Ones, `[width]`: the weight of a norm that has none, for operators that want one.
    pub(super) fn ones(&mut self, element: ElementType, width: usize) -> ValueId {
        self.e.filled(element, width, 1.0)
    }
}
