//! Result types of the composite operations whose rule is longer than a line.

use super::op::{AttentionOp, Composite, IndexOp, Kind, expect_last, last};
use crate::graph::{Dim, Type};

type Types = Result<Vec<Type<Kind>>, String>;

pub(super) fn infer(op: &Composite, operands: &[&Type<Kind>]) -> Types {
    let operand = |i: usize| operands.get(i).copied().ok_or_else(|| format!("operand {i} is missing"));
    let x = operand(0)?;
    match op {
        Composite::Sum => Ok(vec![with_last(x, 1.into())]),
        Composite::Slice(start, end) => {
            let width = last(x)?.value().and_then(|width| usize::try_from(width).ok()).unwrap_or(0);
            if start > end || *end > width {
                return Err(format!("{x} has no elements from {start} to {end}"));
            }
            Ok(vec![with_last(x, (end - start).into())])
        }
        Composite::Transpose(order) => {
            let axis = |axis: &usize| x.shape.get(*axis).cloned().ok_or_else(|| format!("{x} has no axis {axis}"));
            Ok(vec![Type::new(x.element, order.iter().map(axis).collect::<Result<Vec<_>, _>>()?)])
        }
        Composite::MatMul => matmul(x, operand(1)?),
        Composite::Choose { top_k } => match x.shape.as_slice() {
            [batch, sequence, experts] => {
                let slots = |width: Dim| [batch.clone(), sequence.clone(), Dim::from(*top_k), width];
                Ok(vec![Type::new(x.element, slots(experts.clone())), Type::new(x.element, slots(1.into()))])
            }
            _ => Err(format!("{x} is not [batch, sequence, experts]")),
        },
        Composite::EachExpert => match (x.shape.as_slice(), operand(1)?.shape.as_slice()) {
            ([batch, sequence, width], [experts, output, input]) if width == input => {
                Ok(vec![Type::new(x.element, [batch.clone(), sequence.clone(), experts.clone(), output.clone()])])
            }
            _ => Err(format!("{x} and {} do not fit", operand(1)?)),
        },
        Composite::SumExperts => match (x.shape.as_slice(), operand(1)?.shape.as_slice()) {
            ([batch, sequence, own, width], [experts, output, input]) if width == input && own == experts => {
                Ok(vec![Type::new(x.element, [batch.clone(), sequence.clone(), output.clone()])])
            }
            _ => Err(format!("{x} and {} do not fit", operand(1)?)),
        },
        Composite::Index(op) => index(*op, operands),
        Composite::Rotate { heads, size, .. } => {
            let head = last(x)?.divided_by(&Dim::from(*heads)).and_then(|d| d.value());
            if head.is_none_or(|head| usize::try_from(head).is_ok_and(|head| head < *size)) {
                return Err(format!("{x} has no {heads} heads of at least {size} elements"));
            }
            Ok(vec![x.clone()])
        }
        Composite::EveryToken => Ok(vec![x.clone()]),
        Composite::LastToken => match x.shape.as_slice() {
            [batch, _, hidden] => Ok(vec![Type::new(x.element, [batch.clone(), Dim::from(1), hidden.clone()])]),
            _ => Err(format!("{x} is not [batch, sequence, hidden]")),
        },
        other => Err(format!("the result of {other} is not known")),
    }
}

pub(super) fn attention(op: &AttentionOp, operands: &[&Type<Kind>]) -> Types {
    let more = usize::from(op.sinks) + usize::from(op.bias);
    let expected = if op.shared { 4 } else { 6 } + more;
    if operands.len() != expected {
        return Err(format!("{} operands, expected {expected}", operands.len()));
    }
    let [query, key, value, rest @ ..] = operands else {
        return Err(format!("{} operands", operands.len()));
    };
    expect_last(query, &Dim::from(op.heads * op.key_size))?;
    let output = Type::new(Kind::Real, with_last(query, Dim::from(op.heads * op.value_size)).shape);
    if op.shared {
        expect_last(key, &Dim::from(op.key_size))?;
        expect_last(value, &Dim::from(op.value_size))?;
        return Ok(vec![output]);
    }
    expect_last(key, &Dim::from(op.kv_heads * op.key_size))?;
    expect_last(value, &Dim::from(op.kv_heads * op.value_size))?;
    let [past_key, past_value, mask, ..] = rest else {
        return Err(format!("{} operands", operands.len()));
    };
    let total = last(mask)?;
    let present = |past: &Type<Kind>| {
        let mut shape = past.shape.clone();
        if let Some(length) = shape.get_mut(2) {
            *length = total.clone();
        }
        Type::new(past.element, shape)
    };
    Ok(vec![output, present(past_key), present(past_value)])
}

fn index(op: IndexOp, operands: &[&Type<Kind>]) -> Types {
    let [query, key, past, weights] = operands else {
        return Err(format!("{} operands, expected 4", operands.len()));
    };
    expect_last(query, &Dim::from(op.heads * op.size))?;
    expect_last(key, &Dim::from(op.size))?;
    expect_last(weights, &Dim::from(op.heads))?;
    match (query.shape.as_slice(), past.shape.as_slice()) {
        ([batch, sequence, _], [_, before, size]) => {
            let total = before + sequence;
            let bias = [batch.clone(), 1.into(), sequence.clone(), total.clone()];
            let present = [batch.clone(), total, size.clone()];
            Ok(vec![Type::new(Kind::Real, bias), Type::new(Kind::Real, present)])
        }
        _ => Err(format!("{query} and {past} do not fit")),
    }
}

fn matmul(a: &Type<Kind>, b: &Type<Kind>) -> Types {
    let ([outer @ .., rows, inner], [b_outer @ .., b_inner, columns]) = (a.shape.as_slice(), b.shape.as_slice()) else {
        return Err(format!("{a} and {b} are no matrices"));
    };
    if inner != b_inner || outer != b_outer || a.element != b.element {
        return Err(format!("{a} and {b} do not fit"));
    }
    let mut shape = outer.to_vec();
    shape.extend([rows.clone(), columns.clone()]);
    Ok(vec![Type::new(a.element, shape)])
}

/// The type with another last axis.
fn with_last(ty: &Type<Kind>, width: Dim) -> Type<Kind> {
    let mut shape = ty.shape.clone();
    shape.pop();
    shape.push(width);
    Type::new(ty.element, shape)
}
