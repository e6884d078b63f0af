//! Compiles the templates in: a new file in `graph_templates/` needs no line of Rust.

use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=graph_templates");
    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR").map_err(io::Error::other)?).join("graph_templates");
    let mut files: Vec<_> =
        fs::read_dir(&folder)?.collect::<Result<Vec<_>, _>>()?.iter().map(fs::DirEntry::path).collect();
    files.sort();
    let mut code = String::from("&[\n");
    for file in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "toml")) {
        let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let file = file.to_str().ok_or_else(|| io::Error::other("a path that is not UTF-8"))?;
        writeln!(code, "({stem:?}, include_str!({file:?})),").map_err(io::Error::other)?;
    }
    code += "]";
    let output = env::var("OUT_DIR").map_err(io::Error::other)?;
    fs::write(Path::new(&output).join("templates.rs"), code)
}
