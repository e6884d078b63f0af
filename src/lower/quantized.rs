//! Matrices as small integers: products, tables and experts that read them, and floats made from them.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::onnx_graph::{Part, Quantized};
use super::{Form, Lowerer, Operator};
use crate::build::{Composite, Model};
use crate::element::ElementType;
use crate::error::Result;
use crate::graph::{Dim, Graph, Node, Type, ValueId};
use crate::quantize::{Algorithm, ScaleType, Scheme};
use crate::weight::Weight;

/// Which matrices a graph holds as integers.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Precision {
    /// By parameter.
    pub schemes: BTreeMap<String, Scheme>,
    /// Of those, matrices whose columns stand in another order: which input each column is for, by parameter.
    pub orders: BTreeMap<String, Arc<[i32]>>,
    /// `accuracy_level` of `MatMulNBits`: 4 quantises activations to 8 bits, 1 computes in float32, 0 leaves it open.
    pub accuracy_level: i64,
    /// The same of `QMoE`, which has the attribute only from release 1.31 on: 0 leaves it out.
    pub experts_accuracy_level: i64,
}

/// The initializers of a quantised matrix `[.., N, K]`.
pub(super) struct Integers {
    pub(super) data: ValueId,
    /// `[.., N, blocks]`
    pub(super) scales: ValueId,
    /// `[.., N, bytes]`
    pub(super) zero_points: Option<ValueId>,
}

/// How the integers of a matrix are laid out.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// `[.., N, blocks, block bytes]`
    Blocks,
    /// `[.., N, blocks * block bytes]`
    Rows,
    /// `[.., N, K]` of signed integers
    Signed,
}

impl Lowerer<'_> {
    /// The scheme of a parameter, if it is quantised. The operator that reads rows of tables is wrong up to release 1.26
    /// where the zero points of a row end within a byte, so tables have none that do.
    pub(super) fn scheme(&self, name: &str) -> Option<Scheme> {
        let scheme = self.options.precision.and_then(|precision| precision.schemes.get(name)).copied()?;
        Some(self.tables.get(name).map_or(scheme, |columns| with_whole_zero_bytes(scheme, *columns)))
    }

    /// Tables of which rows are read, and their columns.
    pub(super) fn tables(model: &Graph<Model>) -> BTreeMap<String, usize> {
        let table = |node: &Node<Composite>| match (&node.op, node.inputs.as_slice()) {
            (Composite::Embed, [_, Some(table), ..]) => {
                let (name, shape) = named(model, *table);
                Some((name, shape.last().copied().unwrap_or(0)))
            }
            _ => None,
        };
        model.nodes.iter().filter_map(table).collect()
    }

    /// Which input each column of a parameter's integers is for, if that is not its own.
    pub(super) fn order(&self, name: &str) -> Option<Arc<[i32]>> {
        self.options.precision.and_then(|precision| precision.orders.get(name)).cloned()
    }

    /// `[.., K]` in the order of a matrix's columns; matrices of one order share it.
    pub(super) fn in_order(&mut self, name: &str, x: ValueId) -> Result<ValueId> {
        let Some(order) = self.order(name) else { return Ok(x) };
        let indices = self.e.indices(&order);
        let what = format!("in_order/{x:?}/{indices:?}");
        if let Some(known) = self.known(&what) {
            return Ok(known);
        }
        let gathered = self.e.add(Operator::new("Gather").int("axis", -1), &[x, indices])?;
        Ok(self.keep(&what, gathered))
    }

    /// A form that does not take the integers of these parameters, as far as they have any.
    pub(super) fn refuse<T>(&mut self, names: &[&str], reason: String) -> Form<T> {
        let named = names.iter().filter(|name| self.scheme(name).is_some());
        let named: Vec<_> = named.map(|name| ((*name).to_owned(), reason.clone())).collect();
        self.refused.extend(named);
        Form::Refused(reason)
    }

    /// How experts with integers are computed.
    pub(super) fn experts_accuracy_level(&self) -> i64 {
        self.options.precision.map_or(0, |precision| precision.experts_accuracy_level)
    }

    /// How products with integers are computed.
    pub(super) fn accuracy_level(&self) -> i64 {
        self.options.precision.map_or(0, |precision| precision.accuracy_level)
    }

    /// The initializers of a matrix `[.., N, K]` that is made from parameters.
    pub(super) fn integers(
        &mut self,
        name: &str,
        shape: &[usize],
        scheme: &Scheme,
        weight: &Weight,
        layout: Layout,
    ) -> Integers {
        let (columns, rows) = shape.split_last().map_or((1, shape), |(columns, rows)| (*columns, rows));
        let (blocks, row_bytes) = (scheme.blocks(columns), scheme.row_bytes(columns));
        let mut of = |suffix: &str, element, part, last: &[usize]| {
            let ty = Type::new(element, rows.iter().chain(last).copied().map(Dim::from));
            let quantized = Quantized { scheme: *scheme, part, weight: weight.clone() };
            self.e.quantized(&format!("{name}.{suffix}"), ty, quantized)
        };
        let bits = scheme.bits();
        let scale = match scheme.scales() {
            ScaleType::Float32 => ElementType::F32,
            ScaleType::Float16 => ElementType::F16,
            ScaleType::BFloat16 => ElementType::BF16,
        };
        let signed = if bits == 4 { ElementType::I4 } else { ElementType::I8 };
        let data = match layout {
            Layout::Blocks => {
                let block = [blocks, row_bytes / blocks.max(1)];
                of(&format!("int{bits}"), ElementType::U8, Part::Data, &block)
            }
            Layout::Rows => of(&format!("int{bits}.rows"), ElementType::U8, Part::Data, &[row_bytes]),
            Layout::Signed => of(&format!("int{bits}.signed"), signed, Part::SignedData, &[columns]),
        };
        let scales = of("scales", scale, Part::Scales, &[blocks]);
        let zero_points = (!scheme.is_symmetric()).then(|| match layout {
            Layout::Blocks | Layout::Rows if scheme.has_float_zeros() => {
                of("zero_points", scale, Part::ZeroPoints, &[blocks])
            }
            Layout::Blocks | Layout::Rows => {
                of("zero_points", ElementType::U8, Part::ZeroPoints, &[scheme.row_zero_bytes(columns)])
            }
            Layout::Signed => of("zero_points.signed", signed, Part::SignedZeroPoints, &[blocks]),
        });
        Integers { data, scales, zero_points }
    }

    /// `x · weightᵀ + bias` with a quantised weight; none if the weight is not quantised, or not for this target.
    pub(super) fn quantized_linear(&mut self, model: &Graph<Model>, ids: &[ValueId]) -> Result<Option<ValueId>> {
        let [x, weight, bias @ ..] = ids else { return Ok(None) };
        let (name, shape) = named(model, *weight);
        let Some(scheme) = self.scheme(&name) else { return Ok(None) };
        let operands = (*x, bias.first().copied());
        self.first_form("quantized_linear", |s, form| match form {
            "MatMulNBits" => match (unfit(&scheme), shape.as_slice()) {
                (Some(reason), _) => Ok(s.refuse(&[&name], reason)),
                (None, &[rows, columns]) => {
                    let x = s.value(model, *x)?;
                    let x = s.in_order(&name, x)?;
                    let bias = bias.first().map(|bias| s.value(model, *bias)).transpose()?;
                    let product =
                        s.matmul_nbits((x, bias), (&name, &[rows, columns]), &Weight::source(&name), &scheme)?;
                    Ok(Form::Done(Some(product)))
                }
                _ => Ok(Form::Done(None)),
            },
            // Floats are made from the integers, and then it is like any other.
            _ => s.floats_in_order(model, operands, (&name, &shape), &scheme).map(Form::Done),
        })
    }

    /// `x · weightᵀ + bias` with a weight `[N, K]` that is made from parameters.
    pub(super) fn matmul_nbits(
        &mut self,
        (x, bias): (ValueId, Option<ValueId>),
        (name, &[rows, columns]): (&str, &[usize; 2]),
        weight: &Weight,
        scheme: &Scheme,
    ) -> Result<ValueId> {
        let parts = self.integers(name, &[rows, columns], scheme, weight, Layout::Blocks);
        let accuracy = self.accuracy_level();
        let op = Operator::microsoft("MatMulNBits")
            .size("K", columns)
            .size("N", rows)
            .int("bits", scheme.bits().into())
            .size("block_size", scheme.block_size())
            .int("accuracy_level", accuracy);
        let element = self.e.ty(x).element;
        let scales = self.e.cast(parts.scales, element)?;
        let zeros = match parts.zero_points {
            Some(zeros) if scheme.has_float_zeros() => Some(self.e.cast(zeros, element)?),
            zeros => zeros,
        };
        let mut operands = vec![Some(x), Some(parts.data), Some(scales), zeros, None, bias];
        while operands.last() == Some(&None) {
            operands.pop();
        }
        let [y] = self.e.call(op, &operands, [true])?;
        Ok(y)
    }

    /// Rows of a quantised table; none if the table is not quantised, or not for this target.
    pub(super) fn quantized_embed(&mut self, model: &Graph<Model>, ids: &[ValueId]) -> Result<Option<ValueId>> {
        let &[ids, table] = ids else { return Ok(None) };
        let (name, shape) = named(model, table);
        let Some(scheme) = self.scheme(&name) else { return Ok(None) };
        self.first_form("quantized_embed", |s, form| {
            let refusal = match form {
                "GatherBlockQuantized" if !matches!(scheme.bits(), 4 | 8) => {
                    format!("the operator reads 4 and 8 bits, and not {}", scheme.bits())
                }
                "GatherBlockQuantized" if scheme.has_float_zeros() => {
                    "the operator takes no float zero points".to_owned()
                }
                "GatherBlockQuantized" if !has_whole_zero_bytes(&scheme, shape.last().copied().unwrap_or(0)) => {
                    "the zero points of a row end within a byte, which releases up to 1.26 read wrong".to_owned()
                }
                "GatherBlockQuantized" if s.order(&name).is_some() => "its columns are permuted (act-order)".to_owned(),
                "GatherBlockQuantized" => {
                    return s.gather_quantized(model, ids, (&name, &shape), &scheme).map(Form::Done);
                }
                _ => return Ok(Form::Done(None)),
            };
            Ok(s.refuse(&[&name], refusal))
        })
    }

    fn gather_quantized(
        &mut self,
        model: &Graph<Model>,
        ids: ValueId,
        (name, shape): (&str, &[usize]),
        scheme: &Scheme,
    ) -> Result<Option<ValueId>> {
        let &[_, columns] = shape else { return Ok(None) };
        let ids = self.value(model, ids)?;
        let parts = self.integers(name, shape, scheme, &Weight::source(name), Layout::Rows);
        let op = Operator::microsoft("GatherBlockQuantized")
            .int("bits", scheme.bits().into())
            .size("block_size", scheme.block_size())
            .int("gather_axis", 0)
            .int("quantize_axis", 1);
        let compute = self.compute();
        let scales = self.e.cast(parts.scales, compute)?;
        let mut operands = vec![Some(parts.data), Some(ids), Some(scales)];
        operands.extend(parts.zero_points.map(Some));
        let [rows] = self.e.call(op, &operands, [true])?;
        if columns.is_multiple_of(scheme.block_size()) {
            return Ok(Some(rows));
        }
        // [B, S, whole blocks] -> [B, S, K]: the last block is filled up.
        let (start, axis) = (self.e.ints(&[0]), self.e.ints(&[2]));
        let end = self.e.ints(&[i64::try_from(columns).unwrap_or(i64::MAX)]);
        self.e.add(Operator::new("Slice"), &[rows, start, end, axis]).map(Some)
    }

    /// A quantised matrix made floats in the graph; none if it is not quantised, or if the target has no way.
    pub(super) fn dequantized(&mut self, model: &Graph<Model>, id: ValueId) -> Result<Option<ValueId>> {
        let (name, shape) = named(model, id);
        let Some(scheme) = self.scheme(&name) else { return Ok(None) };
        // Whoever reads it does not know of its order.
        if self.order(&name).is_some() { Ok(None) } else { self.floats(&name, &shape, &scheme) }
    }

    /// The product with a matrix made floats in the graph whose columns stand in another order; none for any other.
    fn floats_in_order(
        &mut self,
        model: &Graph<Model>,
        (x, bias): (ValueId, Option<ValueId>),
        (name, shape): (&str, &[usize]),
        scheme: &Scheme,
    ) -> Result<Option<ValueId>> {
        if self.order(name).is_none() {
            return Ok(None);
        }
        let Some(weight) = self.floats(name, shape, scheme)? else { return Ok(None) };
        let x = self.value(model, x)?;
        let x = self.in_order(name, x)?;
        let bias = bias.map(|bias| self.value(model, bias)).transpose()?;
        self.linear(x, weight, bias).map(Some)
    }

    /// Floats made of a matrix's integers, in the order of its columns; none if the target has no way.
    fn floats(&mut self, name: &str, shape: &[usize], scheme: &Scheme) -> Result<Option<ValueId>> {
        self.first_form("dequantize", |s, form| {
            if form != "DequantizeLinear" {
                return Ok(Form::Done(None));
            }
            let columns = shape.last().copied().unwrap_or(0);
            let whole = |s: &Scheme| columns.is_multiple_of(s.block_size());
            let bytes = |s: &Scheme| has_whole_zero_bytes(s, columns);
            let refusal = match scheme.in_blocks_that(|s| whole(s) && bytes(s)) {
                None if !whole(scheme) => {
                    format!("{columns} columns are no whole number of blocks of {}", scheme.block_size())
                }
                _ if scheme.bits() == 2 => "the operator reads no 2 bits in this opset".to_owned(),
                _ if scheme.has_float_zeros() => "the operator takes no float zero points".to_owned(),
                None => "the zero points of a row with an odd number of blocks end within a byte".to_owned(),
                Some(scheme) => return s.dequantize_linear(name, shape, &scheme).map(|value| Form::Done(Some(value))),
            };
            Ok(s.refuse(&[name], refusal))
        })
    }

    fn dequantize_linear(&mut self, name: &str, shape: &[usize], scheme: &Scheme) -> Result<ValueId> {
        let parts = self.integers(name, shape, scheme, &Weight::source(name), Layout::Signed);
        let op = Operator::new("DequantizeLinear")
            .size("axis", shape.len().saturating_sub(1))
            .size("block_size", scheme.block_size());
        let compute = self.compute();
        let scales = self.e.cast(parts.scales, compute)?;
        let mut operands = vec![parts.data, scales];
        operands.extend(parts.zero_points);
        self.e.add(op, &operands)
    }
}

/// True where the zero points of each row fill their bytes, or there are none.
fn has_whole_zero_bytes(scheme: &Scheme, columns: usize) -> bool {
    scheme.is_symmetric() || scheme.bits() != 4 || scheme.blocks(columns).is_multiple_of(2)
}

/// A scheme of which that is true: with smaller blocks, else without zero points. What a checkpoint stores stays.
fn with_whole_zero_bytes(scheme: Scheme, columns: usize) -> Scheme {
    let smaller = scheme.in_blocks_that(|scheme| has_whole_zero_bytes(scheme, columns));
    smaller.unwrap_or_else(|| if scheme.algorithm() == Algorithm::Stored { scheme } else { scheme.symmetric() })
}

/// Why `MatMulNBits` does not read a scheme.
pub(super) fn unfit(scheme: &Scheme) -> Option<String> {
    (scheme.has_float_zeros() && scheme.bits() != 4)
        .then(|| format!("the operator takes float zero points of 4 bits, and not of {}", scheme.bits()))
}

/// Name and fixed shape of a parameter.
pub(super) fn named(model: &Graph<Model>, id: ValueId) -> (String, Vec<usize>) {
    let value = model.value(id);
    let size = |dim: &Dim| dim.value().and_then(|size| usize::try_from(size).ok()).unwrap_or(0);
    (value.name.clone(), value.ty.shape.iter().map(size).collect())
}
