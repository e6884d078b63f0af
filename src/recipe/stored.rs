//! Matrices that a checkpoint stores as integers already, in a form that the operators read as it is.

use std::collections::BTreeMap;

use crate::bind::Parameter;
use crate::element::{ElementType, StoredType};
use crate::encoding::{Logical, Role, ZeroKind, affine};
use crate::quantize::{ScaleType, Scheme, ZeroPoints};
use crate::read::Checkpoint;
use crate::weight::{Evaluation, Tensors};

/// What a checkpoint's quantised parameters can be.
#[derive(Debug, Clone, Default)]
pub struct Stored {
    /// The quantisation method, as the checkpoint names it.
    pub(super) method: String,
    /// Parameters whose integers fit, with their scheme.
    pub(super) schemes: BTreeMap<String, Scheme>,
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
            let tensors: Vec<Option<&Logical>> =
                parameter.weight.sources().into_iter().map(|name| logical(checkpoint, name)).collect();
            if tensors.iter().all(Option::is_none) {
                continue;
            }
            match scheme(parameter, &tensors, checkpoint) {
                Ok((scheme, exact)) => {
                    found.schemes.insert(parameter.name.clone(), scheme);
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

fn logical<'c>(checkpoint: &'c Checkpoint, name: &str) -> Option<&'c Logical> {
    checkpoint.logical(checkpoint.get(name)?)
}

/// The scheme of a parameter, and whether the operators compute with exactly the stored scales; or why it has none.
fn scheme(
    parameter: &Parameter,
    tensors: &[Option<&Logical>],
    checkpoint: &Checkpoint,
) -> Result<(Scheme, bool), String> {
    let mut common = None;
    for tensor in tensors {
        let logical = tensor.ok_or("a part of it is not quantised")?;
        let own = of_tensor(logical)?;
        if *common.get_or_insert(own) != own {
            return Err("its parts are quantised in different ways".to_owned());
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

fn of_tensor(logical: &Logical) -> Result<(Scheme, bool), String> {
    let form = affine(logical)?;
    if form.ordered {
        return Err("its columns are permuted (act-order)".to_owned());
    }
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
    Ok((Scheme::stored(form.bits, form.block, zeros, scales)?, form.exact))
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
