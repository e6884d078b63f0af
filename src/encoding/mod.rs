//! Quantised checkpoints: what their weights are, and their values to the last bit.
//!
//! [`Catalogue::build`] reads the configuration and the list of tensors once and says which weights they make up, under the
//! names and shapes of the unquantised checkpoint. [`decode_rows`] gives rows of one as the numbers that the format's own
//! library computes; [`affine_rows`] gives its integers, scales and zero points where it has them. Both are pure, read
//! only what they need through [`Parts`], and can be called for different rows at the same time.
//!
//! Weights only: settings that quantise activations or the cache are listed, and the computation stays in float.
//!
//! Every format is described in one form, [`Encoding`]: where codes stand, what they mean, which scale they have, and in
//! which type the product is rounded. A format is a recogniser that writes this form; nothing else knows its name.

mod affine;
mod bnb;
mod catalogue;
mod codes;
mod compressed;
mod decode;
mod form;
mod fp8;
mod gptq;
mod modelopt;
mod parts;
mod scan;
mod settings;
mod slices;
mod values;

pub use affine::{Affine, AffineRows, ZeroKind, affine, affine_rows, order};
pub use catalogue::Catalogue;
pub use decode::decode_rows;
pub use form::{Encoding, Index, Layout, Logical, Product, Scales, Values, Zeros};
pub use parts::{Part, Parts, Role, Stored};
pub use scan::Ignored;
pub use settings::{Configs, Keys};
pub use slices::Shapes;
