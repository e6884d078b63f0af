//! Writing: the output directory, the weights' data file, and the files that consumers expect.
//!
//! Nothing here knows how a graph came to be. All files are written in the same bytes every time.

mod consumers;
mod directory;
mod external;
mod genai;
mod model;
mod tokenizer;
mod weights;

pub use consumers::{ConsumerFiles, Signature, write_consumer_files};
pub use directory::{Force, Staging};
pub use external::{Extent, ExternalWriter};
pub use model::encode;
pub use weights::stream;
