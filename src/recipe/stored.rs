//! Matrices that a checkpoint stores as integers already, in a form that the operators read as it is.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::bind::Parameter;
use crate::element::{ElementType, StoredType};
use crate::encoding::{Logical, Role, ZeroKind, affine};
use crate::quantize::{ScaleType, Scheme, ZeroPoints};
use crate::read::{Checkpoint, TensorInfo};
use crate::weight::{Evaluation, Tensors};

/// What a checkpoint's quantised parameters can be.
#[derive(Debug, Clone, Default)]
pub struct Stored {
    /// The quantisation method, as the checkpoint names it.
    pub(super) method: String,
    /// Parameters whose integers fit, with their scheme.
    pub(super) schemes: BTreeMap<String, Scheme>,
    /// Of those, the ones whose columns are kept in the order of their groups: which input each column is for.
    pub(super) orders: BTreeMap<String, Arc<[i32]>>,
    /// Of those, the ones whose scales had to be computed: their last bit may differ from the library's.
    pub(super) folded: Vec<String>,
    /// Parameters that are decoded to floats, and why.
    pub(super) refused: BTreeMap<String, String>,
}

impl Stored {
    /// Looks at every parameter; None if the checkpoint is not quantised.
    pub fn new(parameters: &[Parameter], checkpoint: &Checkpoint) -> Option<Self> {
        let mut found = Self { method: checkpoint.catalogue()?.method.clone(), ..Self::default() };
        for parameter in parameters {
            let tensors: Vec<Option<Tensor<'_>>> =
                parameter.weight.sources().into_iter().map(|name| quantized(checkpoint, name)).collect();
            if tensors.iter().all(Option::is_none) {
                continue;
            }
            match form(parameter, &tensors, checkpoint) {
                Ok(Form { scheme, exact, order }) => {
                    found.schemes.insert(parameter.name.clone(), scheme);
                    found.orders.extend(order.map(|order| (parameter.name.clone(), order)));
                    if !exact {
                        found.folded.push(parameter.name.clone());
                    }
                }
                Err(reason) => drop(found.refused.insert(parameter.name.clone(), reason)),
            }
        }
        Some(found)
    }
}

type Tensor<'c> = (&'c TensorInfo, &'c Logical);

/// How the operators read a parameter.
#[derive(Debug, Clone, PartialEq)]
struct Form {
    scheme: Scheme,
    /// They compute with exactly the stored scales.
    exact: bool,
    /// Which input each column is for, where columns are not in the order of the inputs.
    order: Option<Arc<[i32]>>,
}

fn quantized<'c>(checkpoint: &'c Checkpoint, name: &str) -> Option<Tensor<'c>> {
    let tensor = checkpoint.get(name)?;
    Some((tensor, checkpoint.logical(tensor)?))
}

/// The form of a parameter, or why it has none.
fn form(parameter: &Parameter, tensors: &[Option<Tensor<'_>>], checkpoint: &Checkpoint) -> Result<Form, String> {
    let mut common: Option<Form> = None;
    for tensor in tensors {
        let (tensor, logical) = tensor.ok_or("a part of it is not quantised")?;
        let own = of_tensor(tensor, logical, checkpoint)?;
        if own.order.is_some() && parameter.shape.len() != 2 {
            return Err("its columns are permuted (act-order), which only products of one matrix can follow".to_owned());
        }
        match &common {
            Some(common) if (common.scheme, common.exact) != (own.scheme, own.exact) => {
                return Err("its parts are quantised in different ways".to_owned());
            }
            Some(common) if common.order != own.order => {
                return Err("its parts have different orders of columns (act-order)".to_owned());
            }
            _ => common = Some(own),
        }
        if logical.columns() != parameter.shape.last().copied().unwrap_or(0) {
            return Err("its rows are not those of the stored tensors".to_owned());
        }
    }
    let whole = Evaluation::new(&parameter.weight, &Headers(checkpoint))?.moves_rows();
    if !whole {
        return Err("its rows are not those of the stored tensors".to_owned());
    }
    common.ok_or_else(|| "it is made of nothing".to_owned())
}

fn of_tensor(tensor: &TensorInfo, logical: &Logical, checkpoint: &Checkpoint) -> Result<Form, String> {
    let form = affine(logical)?;
    let order = if form.ordered { order(tensor, checkpoint)? } else { None };
    let zeros = match form.zeros {
        ZeroKind::Middle => ZeroPoints::Implicit,
        ZeroKind::Integers => ZeroPoints::Integers,
        ZeroKind::Floats => ZeroPoints::Floats,
    };
    let dtype = |role| logical.part(role).map(|part| part.dtype);
    // Float zero points are written in the type of the scales, which has to hold both.
    let alike = zeros != ZeroPoints::Floats || dtype(Role::Zeros) == dtype(Role::Scales);
    let scales = match dtype(Role::Scales) {
        Some(StoredType::F16) if form.exact && alike => ScaleType::Float16,
        Some(StoredType::BF16) if form.exact && alike => ScaleType::BFloat16,
        _ => ScaleType::Float32,
    };
    Ok(Form { scheme: Scheme::stored(form.bits, form.block, zeros, scales)?, exact: form.exact, order })
}

/// Which input each column is for, once the columns of a group stand together.
fn order(tensor: &TensorInfo, checkpoint: &Checkpoint) -> Result<Option<Arc<[i32]>>, String> {
    let order = checkpoint.column_order(tensor).map_err(|error| error.found)?;
    let index = |column: usize| i32::try_from(column).map_err(|_| format!("column {column} has no 32-bit index"));
    order.map(|order| order.into_iter().map(index).collect()).transpose()
}

/// What headers say of the tensors; nothing is read.
struct Headers<'c>(&'c Checkpoint);

impl Tensors for Headers<'_> {
    type Error = String;

    fn describe(&self, name: &str) -> Result<(ElementType, Vec<usize>), String> {
        let tensor = self.0.get(name).ok_or_else(|| format!("there is no {name}"))?;
        let element = tensor.dtype.element().ok_or_else(|| format!("{name} is {}", tensor.dtype))?;
        Ok((element, tensor.shape.clone()))
    }

    fn read(&self, name: &str, _: usize, _: &mut [u8]) -> Result<(), String> {
        Err(format!("{name} is not read"))
    }
}
