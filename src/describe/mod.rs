//! Description: a template, a configuration and the names of the tensors become a [`crate::spec::ModelSpec`].
//!
//! A template is data. Strings that start with `=` are Jinja expressions over the configuration's keys and
//! `layer`; everything else is itself. A template chooses, names and computes scalars; it never wires a graph.

mod accounting;
mod expression;
mod resolve;
mod rope;
mod rules;
mod template;

pub use accounting::{Accounting, account};
pub use resolve::resolve;
pub use rules::{Bound, TensorRules};
pub use template::{Catalogue, Template};
