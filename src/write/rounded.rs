//! Which tensors lose more than rounding when they are written in a narrower type: an error names those that do not
//! survive it, and the record counts the values that became 0.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::element::ElementType;
use crate::error::{Code, Error, Result};
use crate::weight::Rounding;

/// Values of a tensor that became 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Zeros {
    /// How many became 0.
    pub zeros: u64,
    /// Of so many that were not.
    pub of: u64,
}

/// What was counted so far, by tensor.
#[derive(Default)]
pub(super) struct Ledger(BTreeMap<String, (Rounding, ElementType)>);

impl Ledger {
    /// Adds a part of a tensor.
    ///
    /// # Errors
    /// A finite value became infinite.
    pub(super) fn add(&mut self, tensor: &str, part: &Rounding, element: ElementType) -> Result<()> {
        if part.overflow > 0.0 {
            return Err(error(tensor, element)
                .found(format!("a value of {:e}, which {element} rounds to infinity", part.overflow))
                .expected(format!("values up to {}", if element == ElementType::F16 { "65504" } else { "3.39e38" })));
        }
        if part.zeros > 0 || part.values > 0 {
            let (sum, _) = self.0.entry(tensor.to_owned()).or_insert((Rounding::default(), element));
            sum.add(part);
        }
        Ok(())
    }

    /// The tensors of which values became 0.
    ///
    /// # Errors
    /// One of them is lost by it. A bias is not: it is added to numbers that are not small.
    pub(super) fn settle(self) -> Result<BTreeMap<String, Zeros>> {
        let lost = self.0.iter().filter(|(name, (sum, _))| sum.is_lossy() && !name.ends_with("bias"));
        let worst = lost.max_by(|(_, (a, _)), (_, (b, _))| a.loss().total_cmp(&b.loss()));
        if let Some((name, (sum, element))) = worst {
            return Err(error(name, *element)
                .found(format!(
                    "values too small for {element}: {} of {} become 0, and the tensor is off by {:.1} % of its size",
                    sum.zeros,
                    sum.values,
                    100.0 * sum.loss()
                ))
                .expected("a tensor that keeps its values, off by 3 % of its size at most"));
        }
        let lessened = self.0.into_iter().filter(|(_, (sum, _))| sum.zeros > 0);
        Ok(lessened.map(|(name, (sum, _))| (name, Zeros { zeros: sum.zeros, of: sum.values })).collect())
    }
}

fn error(tensor: &str, element: ElementType) -> Error {
    let other = if element == ElementType::F16 {
        "--dtype bf16 where the target has it, or --dtype f32"
    } else {
        "--dtype f32"
    };
    Error::new(Code::TensorRange, format!("tensor {tensor}")).help(format!("build with {other}"))
}

/// A word on tensors that lost a share of their values, for people; the record has all of them.
pub(super) fn note(zeros: &BTreeMap<String, Zeros>) -> Option<String> {
    // A percent of a matrix is more than the tail of usual values.
    let many: Vec<(&String, &Zeros)> = zeros.iter().filter(|(_, z)| z.zeros.saturating_mul(100) > z.of).collect();
    let (name, worst) = many.iter().max_by_key(|(_, z)| z.zeros.saturating_mul(1000) / z.of.max(1))?;
    Some(format!(
        "{} tensors have small values that became 0: of {name} {} of {}; hf2onnx.json counts them under rounded_to_zero",
        many.len(),
        worst.zeros,
        worst.of
    ))
}
