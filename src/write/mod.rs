//! Writing: the output directory, the weights' data file, and the files that consumers expect.
//!
//! Nothing here knows how a graph came to be. All files are written in the same bytes every time.

mod consumers;
mod directory;
mod genai;
mod layout;
mod link;
mod model;
mod rounded;
mod sink;
mod sources;
mod space;
mod tokenizer;
mod weights;

pub use consumers::{ConsumerFiles, Signature, write_consumer_files};
pub use directory::{Force, Staging};
pub use layout::{DataFile, Extent, Layout, data_name};
pub use link::{LinkReport, link};
pub use model::encode;
pub use rounded::Zeros;
pub use space::{check_space, free_space};
pub use weights::{Calibration, Streamed, stream};
