//! Binding: every parameter of a graph is made from tensors of the checkpoint, by a plan that is checked and
//! printable before a byte is read.
//!
//! **Invariant:** every parameter is bound exactly once; every tensor is bound, or dropped for a reason that was checked,
//! or an error.

mod buffers;
mod head;
mod left_over;
mod plan;
mod values;

pub use head::Head;
pub use left_over::Rest;
pub(crate) use plan::parameter_shapes;
pub use plan::{Initializer, Linked, Parameter, Plan, parameters, plan, stored, stored_at};
pub(crate) use values::{Failure, Values};
