//! Which paths a repository may lead to.

use std::path::{Component, Path, PathBuf};

use crate::error::{Code, Error, Result};

/// The real path of `name` inside `dir`. Names and links that lead out of the directory are refused,
/// but for the links of a Hugging Face cache (`snapshots/<revision>/x` to `blobs/<hash>`).
pub fn contained(dir: &Path, name: &str) -> Result<PathBuf> {
    if !is_plain(name) {
        return Err(Error::new(Code::PathUnsafe, dir.display())
            .found(format!("the file name `{}`", name.escape_debug()))
            .expected("a path inside the repository, without `..`, drive or leading slash")
            .help("the repository is broken or hostile: download it again from a source you trust"));
    }
    let path = dir.join(name);
    let real = path.canonicalize().map_err(|error| Error::io(&path, &error))?;
    let root = dir.canonicalize().map_err(|error| Error::io(dir, &error))?;
    if real.starts_with(&root) || cache_blobs(&root).is_some_and(|blobs| real.starts_with(blobs)) {
        return Ok(dunce::simplified(&real).to_owned());
    }
    Err(Error::new(Code::PathUnsafe, path.display())
        .found(format!("a link to {}", dunce::simplified(&real).display()))
        .expected("a file inside the repository, or a link into the `blobs` of a Hugging Face cache")
        .help("if you made the link yourself, put the file (or a hard link) in its place"))
}

/// True for relative paths of ordinary components, on every system alike.
fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && !name.contains(['\\', '\0', ':'])
        && !name.ends_with('/')
        && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

/// `models--org--name/blobs`, when the directory is `models--org--name/snapshots/<revision>`.
fn cache_blobs(root: &Path) -> Option<PathBuf> {
    let snapshots = root.parent().filter(|parent| parent.ends_with("snapshots"))?;
    snapshots.parent()?.join("blobs").canonicalize().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names() {
        for name in ["model.safetensors", "onnx/model.safetensors", "a b", "..a"] {
            assert!(is_plain(name), "{name}");
        }
        for name in ["", "/etc/passwd", "../x", "a/../../x", "a/..", "C:x", "..\\x", ".", "a\0", "a/"] {
            assert!(!is_plain(name), "{name}");
        }
    }
}
