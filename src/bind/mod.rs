//! Binding: every parameter of a graph is made from tensors of the checkpoint, by a plan that is checked and
//! printable before a byte is read.
//!
//! **Invariant:** every parameter is bound exactly once; every tensor is bound, or dropped by a named rule, or
//! an error.

mod plan;

pub(crate) use plan::parameter_shapes;
pub use plan::{Initializer, Linked, Parameter, Plan, parameters, plan, stored, stored_at};
