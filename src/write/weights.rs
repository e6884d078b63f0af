//! Executes a plan: one initializer after the other, from mapped shards to the data file.

use std::borrow::Cow;

use super::external::{Extent, ExternalWriter};
use crate::bind::{Initializer, Plan};
use crate::error::{Code, Error, Result};
use crate::read::Checkpoint;
use crate::weight::{Tensor, evaluate};

/// Writes every initializer of the plan in its order; returns where each one lies.
pub fn stream(plan: &Plan, checkpoint: &Checkpoint, writer: &mut ExternalWriter) -> Result<Vec<Extent>> {
    let mut extents = Vec::with_capacity(plan.initializers.len());
    for initializer in &plan.initializers {
        let tensor = tensor(initializer, checkpoint)?;
        extents.push(writer.append(&tensor.bytes)?);
        for name in initializer.weight.sources() {
            // The pages stay in the page cache, but not in this process.
            if let Some(info) = checkpoint.get(name) {
                checkpoint.release(info);
            }
        }
    }
    Ok(extents)
}

/// The value of one initializer, in the graph's element type.
fn tensor<'c>(initializer: &Initializer, checkpoint: &'c Checkpoint) -> Result<Tensor<'c>> {
    let load = |name: &str| load(name, checkpoint);
    let refused = |reason: String| Error::new(Code::TensorShape, &initializer.name).found(reason);
    let tensor = evaluate::<Failure>(&initializer.weight, &load).map_err(|failure| match failure {
        Failure::Load(error) => error,
        Failure::Transform(reason) => refused(reason),
    })?;
    if tensor.shape != initializer.shape {
        return Err(refused(format!("{:?}", tensor.shape)).expected(format!("{:?}", initializer.shape)));
    }
    tensor.cast(initializer.element).map_err(refused)
}

enum Failure {
    Load(Error),
    Transform(String),
}

impl From<String> for Failure {
    fn from(reason: String) -> Self {
        Self::Transform(reason)
    }
}

fn load<'c>(name: &str, checkpoint: &'c Checkpoint) -> Result<Tensor<'c>, Failure> {
    let info = checkpoint.get(name).ok_or_else(|| Failure::Transform(format!("there is no {name}")))?;
    let element =
        info.dtype.element().ok_or_else(|| Failure::Transform(format!("{name} is {}", info.dtype.as_str())))?;
    let bytes = checkpoint.bytes(info).map_err(Failure::Load)?;
    Ok(Tensor { element, shape: info.shape.clone(), bytes: Cow::Borrowed(bytes) })
}
