//! The corpus of the fuzz targets, replayed on every `cargo test`: what was once found stays mended.

#[path = "fuzz/src/targets.rs"]
#[allow(dead_code, unreachable_pub, clippy::panic, clippy::indexing_slicing)]
mod targets;

use std::error::Error;
use std::fs;
use std::path::Path;

fn replay(name: &str, target: fn(&[u8])) -> Result<(), Box<dyn Error>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join("fuzz").join("corpus").join(name);
    let mut paths = fs::read_dir(&folder)?.map(|entry| entry.map(|e| e.path())).collect::<Result<Vec<_>, _>>()?;
    paths.sort();
    assert!(paths.len() > 3, "{} inputs in {}", paths.len(), folder.display());
    for path in paths {
        let bytes = fs::read(&path)?;
        // Says which input it is when the target panics.
        std::panic::catch_unwind(|| target(&bytes)).map_err(|_| format!("{} fails", path.display()))?;
    }
    Ok(())
}

#[test]
fn safetensors() -> Result<(), Box<dyn Error>> {
    replay("safetensors", targets::safetensors)
}

#[test]
fn config() -> Result<(), Box<dyn Error>> {
    replay("config", targets::config)
}

#[test]
fn template() -> Result<(), Box<dyn Error>> {
    replay("template", targets::template)
}

#[test]
fn chat() -> Result<(), Box<dyn Error>> {
    replay("chat", targets::chat)
}

#[test]
fn golden() -> Result<(), Box<dyn Error>> {
    replay("golden", targets::golden)
}

#[test]
fn encoding() -> Result<(), Box<dyn Error>> {
    replay("encoding", targets::encoding)
}
