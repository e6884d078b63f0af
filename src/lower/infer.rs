//! Result types of ONNX operators, with symbolic shapes.
//!
//! Besides types it follows the contents of small integer tensors (shapes, lengths), so that `Reshape`,
//! `Expand` and `Range` are typed although their shapes are computed in the graph.

use super::onnx_graph::Operator;
use crate::element::ElementType;
use crate::graph::{self, Dim, Shape, Type};

type Ty = Type<ElementType>;

/// An operand: its type, and its elements where they are known.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operand<'a> {
    pub(super) ty: &'a Ty,
    pub(super) contents: Option<&'a Shape>,
}

/// A result: its type, and its elements where they are known.
#[derive(Debug)]
pub(super) struct Inferred {
    pub(super) ty: Ty,
    pub(super) contents: Option<Vec<Dim>>,
}

/// Results of an operator, in order. Results that are not wanted are left to the caller to drop.
pub(super) fn infer(op: &Operator, operands: &[Option<Operand>]) -> Result<Vec<Inferred>, String> {
    let get = |i: usize| operands.get(i).copied().flatten().ok_or_else(|| format!("operand {i} is missing"));
    let typed = |element: ElementType, shape: Shape| vec![Inferred { ty: Type::new(element, shape), contents: None }];
    let x = get(0)?;
    let same = || typed(x.ty.element, x.ty.shape.clone());
    Ok(match op.op_type {
        "Add" | "Sub" | "Mul" | "Div" | "Min" | "Max" | "Mod" => arithmetic(op, x, get(1)?)?,
        "Pow" => typed(x.ty.element, broadcast(&x.ty.shape, &get(1)?.ty.shape)?),
        "And" | "Or" | "Equal" | "Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual" => {
            typed(ElementType::Bool, broadcast(&x.ty.shape, &get(1)?.ty.shape)?)
        }
        "Where" => {
            let (a, b) = (get(1)?, get(2)?);
            let shape = broadcast(&x.ty.shape, &broadcast(&a.ty.shape, &b.ty.shape)?)?;
            typed(a.ty.element, shape)
        }
        "Cast" => {
            let to = op.get_int("to").and_then(element_of).ok_or("Cast without a known type")?;
            vec![Inferred { ty: Type::new(to, x.ty.shape.clone()), contents: x.contents.cloned() }]
        }
        "MatMul" | "FusedMatMul" => typed(x.ty.element, matmul(op, &x.ty.shape, &get(1)?.ty.shape)?),
        "MatMulNBits" => {
            let rows = op.get_int("N").ok_or("MatMulNBits without N")?;
            typed(x.ty.element, with_axis(&x.ty.shape, -1, Dim::constant(rows))?)
        }
        "GatherBlockQuantized" => typed(get(2)?.ty.element, gather_block(op, x.ty, get(1)?.ty, get(2)?.ty)?),
        "DequantizeLinear" => typed(get(1)?.ty.element, x.ty.shape.clone()),
        "Gemm" => typed(x.ty.element, gemm(op, &x.ty.shape, &get(1)?.ty.shape)?),
        "Reshape" => typed(x.ty.element, reshape(&x.ty.shape, get(1)?)?),
        "Expand" => typed(x.ty.element, broadcast(&x.ty.shape, known(get(1)?)?)?),
        "Transpose" => typed(x.ty.element, transpose(op, &x.ty.shape)?),
        "Concat" => concat(op, operands)?,
        "Split" => split(op, x, get(1)?)?,
        "Slice" => slice(x, operands)?,
        "Gather" => gather(op, x, get(1)?)?,
        "GatherND" => typed(x.ty.element, gather_nd(op, &x.ty.shape, &get(1)?.ty.shape)?),
        "GatherElements" => typed(x.ty.element, get(1)?.ty.shape.clone()),
        "Unsqueeze" => unsqueeze(x, get(1)?)?,
        "Shape" => {
            let shape = Shape::from([Dim::from(x.ty.shape.len())]);
            vec![Inferred { ty: Type::new(ElementType::I64, shape), contents: Some(x.ty.shape.clone()) }]
        }
        "Range" => typed(x.ty.element, vec![range(x, get(1)?, get(2)?)?]),
        "ReduceSum" | "ReduceMax" | "ReduceMean" => {
            typed(x.ty.element, reduce(op, x, operands.get(1).copied().flatten())?)
        }
        "TopK" => top_k(op, x, get(1)?)?,
        "SkipSimplifiedLayerNormalization" | "SkipLayerNormalization" => (0..4).flat_map(|_| same()).collect(),
        "Attention" => attention(op, x, operands)?,
        "GroupQueryAttention" => group_query(op, x, &[get(3)?.ty, get(4)?.ty], one(get(6)?)?)?,
        _ if ELEMENTWISE.contains(&op.op_type) => same(),
        other => return Err(format!("the result type of {other} is not known")),
    })
}

/// How many numbers there are up to an end, or down to it, one by one.
fn range(start: Operand, end: Operand, step: Operand) -> Result<Dim, String> {
    let (mut start, mut end) = (one(start)?, one(end)?);
    if one(step)?.value() == Some(-1) {
        std::mem::swap(&mut start, &mut end);
    }
    Ok(&end + &(&start * &Dim::constant(-1)))
}

/// Values and their indices.
fn top_k(op: &Operator, x: Operand, count: Operand) -> Result<Vec<Inferred>, String> {
    let shape = with_axis(&x.ty.shape, op.get_int("axis").unwrap_or(-1), one(count)?)?;
    let of = |element| Inferred { ty: Type::new(element, shape.clone()), contents: None };
    Ok(vec![of(x.ty.element), of(ElementType::I64)])
}

/// Operators whose one result has the type of their first operand.
const ELEMENTWISE: [&str; 27] = [
    "Sigmoid",
    "Tanh",
    "Sqrt",
    "Cos",
    "Sin",
    "Exp",
    "Log",
    "Neg",
    "Relu",
    "Erf",
    "Reciprocal",
    "Identity",
    "Softmax",
    "Gelu",
    "Not",
    "SimplifiedLayerNormalization",
    "RMSNormalization",
    "RotaryEmbedding",
    "MoE",
    "QMoE",
    "ScatterElements",
    "Floor",
    "Abs",
    "Clip",
    "Softplus",
    "LayerNormalization",
    "CumSum",
];

fn element_of(onnx: i64) -> Option<ElementType> {
    use ElementType as E;
    [E::F32, E::F16, E::BF16, E::F64, E::I64, E::I32, E::I8, E::U8, E::Bool]
        .into_iter()
        .find(|element| i64::from(element.onnx()) == onnx)
}

fn axis_index(axis: i64, rank: usize) -> Result<usize, String> {
    let rank_signed = i64::try_from(rank).map_err(|e| e.to_string())?;
    let index = if axis < 0 { axis + rank_signed } else { axis };
    usize::try_from(index).ok().filter(|i| *i < rank).ok_or_else(|| format!("axis {axis} of {rank} axes"))
}

fn with_axis(shape: &Shape, axis: i64, size: Dim) -> Result<Shape, String> {
    let index = axis_index(axis, shape.len())?;
    let mut shape = shape.clone();
    if let Some(slot) = shape.get_mut(index) {
        *slot = size;
    }
    Ok(shape)
}

fn known(operand: Operand<'_>) -> Result<&Shape, String> {
    operand.contents.ok_or_else(|| "a shape is not known".to_owned())
}

fn one(operand: Operand) -> Result<Dim, String> {
    match operand.contents.map(Vec::as_slice) {
        Some([dim]) => Ok(dim.clone()),
        _ => Err("a length is not known".to_owned()),
    }
}

/// A list of numbers that are fixed.
fn numbers(operand: Operand) -> Result<Vec<i64>, String> {
    let contents = known(operand)?;
    contents.iter().map(|dim| dim.value().ok_or_else(|| format!("{dim} is not fixed"))).collect()
}

fn broadcast(a: &Shape, b: &Shape) -> Result<Shape, String> {
    let shown = |shape: &Shape| Type::new("", shape.iter().cloned()).to_string();
    graph::broadcast(a, b).ok_or_else(|| format!("{} and {} do not broadcast", shown(a), shown(b)))
}

fn arithmetic(op: &Operator, a: Operand, b: Operand) -> Result<Vec<Inferred>, String> {
    if a.ty.element != b.ty.element {
        return Err(format!("{} and {} differ in element type", a.ty, b.ty));
    }
    let combine = |x: &Dim, y: &Dim| match op.op_type {
        "Add" => Some(x + y),
        "Sub" => Some(x + &(y * &Dim::constant(-1))),
        "Mul" => Some(x * y),
        _ => None,
    };
    let contents = a.contents.zip(b.contents).filter(|(x, y)| x.len() == y.len());
    let contents = contents.and_then(|(x, y)| x.iter().zip(y).map(|(x, y)| combine(x, y)).collect());
    Ok(vec![Inferred { ty: Type::new(a.ty.element, broadcast(&a.ty.shape, &b.ty.shape)?), contents }])
}

fn matmul(op: &Operator, a: &Shape, b: &Shape) -> Result<Shape, String> {
    let ([a_outer @ .., rows, inner], [b_outer @ .., x, y]) = (a.as_slice(), b.as_slice()) else {
        return Err("operands need two axes".to_owned());
    };
    let (expected, columns) = if op.get_int("transB") == Some(1) { (y, x) } else { (x, y) };
    if inner != expected {
        return Err(format!("inner sizes {inner} and {expected} differ"));
    }
    let mut shape = broadcast(&a_outer.to_vec(), &b_outer.to_vec())?;
    shape.extend([rows.clone(), columns.clone()]);
    Ok(shape)
}

fn gemm(op: &Operator, a: &Shape, b: &Shape) -> Result<Shape, String> {
    if a.len() != 2 || b.len() != 2 {
        return Err("Gemm takes matrices".to_owned());
    }
    matmul(op, a, b)
}

fn reshape(shape: &Shape, target: Operand) -> Result<Shape, String> {
    let product = |shape: &[Dim]| shape.iter().fold(Dim::from(1), |product, dim| &product * dim);
    let mut result = Shape::new();
    let mut open = None;
    for (i, dim) in known(target)?.iter().enumerate() {
        match dim.value() {
            Some(0) => result.push(shape.get(i).cloned().ok_or("0 copies an axis that is not there")?),
            Some(-1) => open = Some(i),
            _ => result.push(dim.clone()),
        }
    }
    let (total, rest) = (product(shape), product(&result));
    let quotient = total.divided_by(&rest).ok_or_else(|| format!("{total} elements do not fill {rest}"))?;
    match open {
        Some(i) => result.insert(i, quotient),
        None if quotient == Dim::from(1) => {}
        None => return Err(format!("{total} elements do not fill {rest}")),
    }
    Ok(result)
}

fn transpose(op: &Operator, shape: &Shape) -> Result<Shape, String> {
    let order = op.get_ints("perm").ok_or("Transpose without perm")?;
    let pick = |axis: &i64| axis_index(*axis, shape.len()).and_then(|i| shape.get(i).cloned().ok_or_else(String::new));
    order.iter().map(pick).collect()
}

fn concat(op: &Operator, operands: &[Option<Operand>]) -> Result<Vec<Inferred>, String> {
    let parts: Vec<Operand> = operands.iter().flatten().copied().collect();
    let first = parts.first().ok_or("nothing to join")?;
    let axis = op.get_int("axis").ok_or("Concat without axis")?;
    let index = axis_index(axis, first.ty.shape.len())?;
    let length = parts.iter().filter_map(|p| p.ty.shape.get(index)).fold(Dim::constant(0), |sum, dim| &sum + dim);
    let contents: Option<Vec<&Shape>> = parts.iter().map(|part| part.contents).collect();
    let contents = contents.map(|parts| parts.into_iter().flatten().cloned().collect());
    Ok(vec![Inferred { ty: Type::new(first.ty.element, with_axis(&first.ty.shape, axis, length)?), contents }])
}

fn split(op: &Operator, x: Operand, sizes: Operand) -> Result<Vec<Inferred>, String> {
    let axis = op.get_int("axis").unwrap_or(0);
    let piece = |size: &Dim| {
        let shape = with_axis(&x.ty.shape, axis, size.clone())?;
        Ok(Inferred { ty: Type::new(x.ty.element, shape), contents: None })
    };
    known(sizes)?.iter().map(piece).collect()
}

/// Slices with steps of one along known axes; an end beyond the axis means its end.
fn slice(x: Operand, operands: &[Option<Operand>]) -> Result<Vec<Inferred>, String> {
    let list = |i: usize| operands.get(i).copied().flatten().ok_or("Slice needs starts, ends and axes");
    let (starts, ends, axes) = (known(list(1)?)?, known(list(2)?)?, numbers(list(3)?)?);
    let mut shape = x.ty.shape.clone();
    let mut contents = x.contents.cloned();
    for ((start, end), axis) in starts.iter().zip(ends).zip(&axes) {
        let index = axis_index(*axis, shape.len())?;
        let full = shape.get(index).cloned().ok_or("no such axis")?;
        let place = |at: &Dim| if at.value().is_some_and(|at| at < 0) { &full + at } else { at.clone() };
        let stop = match (full.value(), end.value()) {
            (Some(size), Some(end)) if end > size => full.clone(),
            (None, Some(i64::MAX)) => full.clone(),
            _ => place(end),
        };
        let length = &stop + &(&place(start) * &Dim::constant(-1));
        if let (Some(known), Some(from), Some(to)) = (&contents, place(start).value(), stop.value()) {
            let range = usize::try_from(from).unwrap_or(0)..usize::try_from(to).unwrap_or(0);
            contents = known.get(range).map(<[Dim]>::to_vec);
        }
        shape = with_axis(&shape, *axis, length)?;
    }
    Ok(vec![Inferred { ty: Type::new(x.ty.element, shape), contents }])
}

fn gather(op: &Operator, x: Operand, indices: Operand) -> Result<Vec<Inferred>, String> {
    let axis = axis_index(op.get_int("axis").unwrap_or(0), x.ty.shape.len())?;
    let mut shape: Shape = x.ty.shape.iter().take(axis).cloned().collect();
    shape.extend(indices.ty.shape.iter().cloned());
    shape.extend(x.ty.shape.iter().skip(axis + 1).cloned());
    let contents = x.contents.and_then(|known| {
        let indices = numbers(indices).ok()?;
        indices.iter().map(|i| axis_index(*i, known.len()).ok().and_then(|i| known.get(i).cloned())).collect()
    });
    Ok(vec![Inferred { ty: Type::new(x.ty.element, shape), contents }])
}

/// Rows of a table of packed integers: as many numbers as the scales' blocks hold.
fn gather_block(op: &Operator, data: &Ty, indices: &Ty, scales: &Ty) -> Result<Shape, String> {
    let (bits, block) = (op.get_int("bits").unwrap_or(4), op.get_int("block_size").unwrap_or(128));
    let ([_, bytes], [_, blocks]) = (data.shape.as_slice(), scales.shape.as_slice()) else {
        return Err("a table and its scales have two axes".to_owned());
    };
    let width = &Dim::constant(block) * blocks;
    if width.value().zip(bytes.value()).is_none_or(|(width, bytes)| width * bits != bytes * 8) {
        return Err(format!("{bytes} bytes do not hold {blocks} blocks of {block}"));
    }
    let mut shape = indices.shape.clone();
    shape.push(width);
    Ok(shape)
}

fn gather_nd(op: &Operator, shape: &Shape, indices: &Shape) -> Result<Shape, String> {
    let batch = usize::try_from(op.get_int("batch_dims").unwrap_or(0)).map_err(|e| e.to_string())?;
    let (depth, places) = indices.split_last().ok_or("indices without axes")?;
    let depth = depth.value().and_then(|d| usize::try_from(d).ok()).ok_or("indices of open depth")?;
    Ok(places.iter().chain(shape.iter().skip(batch + depth)).cloned().collect())
}

fn unsqueeze(x: Operand, axes: Operand) -> Result<Vec<Inferred>, String> {
    let axes = numbers(axes)?;
    let rank = x.ty.shape.len() + axes.len();
    let mut places: Vec<usize> = axes.iter().map(|axis| axis_index(*axis, rank)).collect::<Result<_, _>>()?;
    places.sort_unstable();
    let mut shape = x.ty.shape.clone();
    for place in places {
        shape.insert(place.min(shape.len()), Dim::from(1));
    }
    Ok(vec![Inferred { ty: Type::new(x.ty.element, shape), contents: x.contents.cloned() }])
}

/// Axes are an attribute or an operand, depending on the operator's version.
fn reduce(op: &Operator, x: Operand, axes: Option<Operand>) -> Result<Shape, String> {
    let axes = match (op.get_ints("axes"), axes) {
        (Some(axes), _) => axes.to_vec(),
        (None, Some(axes)) => numbers(axes)?,
        (None, None) => (0..).take(x.ty.shape.len()).collect(),
    };
    reduce_axes(op, &x.ty.shape, &axes)
}

fn reduce_axes(op: &Operator, shape: &Shape, axes: &[i64]) -> Result<Shape, String> {
    let rank = shape.len();
    let gone: Vec<usize> = axes.iter().map(|axis| axis_index(*axis, rank)).collect::<Result<_, _>>()?;
    let keep = op.get_int("keepdims").unwrap_or(1) == 1;
    let reduced = shape.iter().enumerate().filter_map(|(i, dim)| match gone.contains(&i) {
        false => Some(dim.clone()),
        true if keep => Some(Dim::from(1)),
        true => None,
    });
    Ok(reduced.collect())
}

/// Attention-23 with three-dimensional query, key and value.
fn attention(op: &Operator, query: Operand, operands: &[Option<Operand>]) -> Result<Vec<Inferred>, String> {
    let get = |i: usize| operands.get(i).copied().flatten().ok_or_else(|| format!("operand {i} is missing"));
    if query.ty.shape.len() == 4 {
        // With four axes and no cache: the output has the value's head size.
        let size = get(2)?.ty.shape.last().cloned().ok_or("a value has four axes")?;
        let ty = Type::new(query.ty.element, with_axis(&query.ty.shape, -1, size)?);
        return Ok(vec![Inferred { ty, contents: None }]);
    }
    let heads = op.get_int("q_num_heads").ok_or("Attention without q_num_heads")?;
    let (past_key, past_value) = (get(4)?.ty, get(5)?.ty);
    let value_size = past_value.shape.last().cloned().ok_or("a cache has four axes")?;
    let output = with_axis(&query.ty.shape, -1, &Dim::constant(heads) * &value_size)?;
    let total = get(3)?.ty.shape.last().cloned();
    caches(query.ty, &[past_key, past_value], &output, total)
}

/// `GroupQueryAttention`; queries that come without keys have keys and values behind them.
fn group_query(op: &Operator, query: Operand, past: &[&Ty; 2], total: Dim) -> Result<Vec<Inferred>, String> {
    let heads = op.get_int("num_heads").ok_or("GroupQueryAttention without num_heads")?;
    let size = past[1].shape.last().ok_or("a cache has four axes")?;
    let output = with_axis(&query.ty.shape, -1, &Dim::constant(heads) * size)?;
    caches(query.ty, past, &output, Some(total))
}

/// Output, present key and present value.
fn caches(query: &Ty, past: &[&Ty], output: &Shape, total: Option<Dim>) -> Result<Vec<Inferred>, String> {
    let total = total.ok_or("the total length is not known")?;
    let plain = |ty: Ty| Inferred { ty, contents: None };
    let mut results = vec![plain(Type::new(query.element, output.clone()))];
    for past in past {
        results.push(plain(Type::new(past.element, with_axis(&past.shape, 2, total.clone())?)));
    }
    Ok(results)
}
