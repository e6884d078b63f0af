//! How a model of the hub is named.

use std::fmt;

/// The hub's limit for `org/name`.
const LONGEST_NAME: usize = 96;

/// `org/name` or `org/name@revision`. Old names without an organisation (`gpt2`) are not taken: a directory that is
/// not there would be looked for on the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Id {
    name: String,
    revision: Option<String>,
}

impl Id {
    /// Reads an id; none if the text can only be a path.
    pub fn parse(text: &str) -> Option<Self> {
        let (name, revision) = match text.split_once('@') {
            Some((name, revision)) => (name, Some(revision)),
            None => (text, None),
        };
        let fits = name.len() <= LONGEST_NAME && name.split('/').count() == 2 && name.split('/').all(is_part);
        let whole = fits && !name.contains("--") && revision.is_none_or(is_revision);
        whole.then(|| Self { name: name.to_owned(), revision: revision.map(str::to_owned) })
    }

    /// `org/name`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The branch, tag or commit; `main` when none was given.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }

    /// The id as `hf download` takes it.
    pub(crate) fn download_arguments(&self) -> String {
        match &self.revision {
            Some(revision) => format!("{} --revision {revision}", self.name),
            None => self.name.clone(),
        }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        self.revision.as_ref().map_or(Ok(()), |revision| write!(f, "@{revision}"))
    }
}

/// Letters, digits, `_`, `-` and `.`, with neither of the last two at an end and no `..`: the hub's rule.
fn is_part(part: &str) -> bool {
    let inner = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    let plain = !part.is_empty() && part.chars().all(inner) && !part.contains("..");
    plain && !part.starts_with(['-', '.']) && !part.ends_with(['-', '.'])
}

/// A revision becomes a path below `refs`, so it is no more than git and a file system both take.
fn is_revision(revision: &str) -> bool {
    let sound = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.ends_with('.');
    let inner = |c: char| c.is_ascii_alphanumeric() || "_-./+@".contains(c);
    revision.chars().all(inner) && revision.split('/').all(sound)
}

/// True for a full commit hash.
pub(crate) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_paths_are_told_apart() {
        let read = |text: &str| Id::parse(text).map(|id| (id.name().to_owned(), id.revision().to_owned()));
        let pair = |name: &str, revision: &str| Some((name.to_owned(), revision.to_owned()));
        assert_eq!(read("org/name"), pair("org/name", "main"));
        assert_eq!(read("Qwen/Qwen2.5-0.5B@v1.0"), pair("Qwen/Qwen2.5-0.5B", "v1.0"));
        assert_eq!(read("a/b@refs/pr/1"), pair("a/b", "refs/pr/1"));
        let paths = [
            "", "gpt2", "repo", ".", "..", "/a/b", "./a", "../a", "a/b/c", "a/", "a\\b", "C:a", "~/a", "a b", "a--b",
            "a/.b", "-a",
        ];
        for path in paths.into_iter().chain(["a@", "a@..", "a@../../x", "a@/x", "a@x/", "a@x\\y", "a@b c", "@main"]) {
            assert_eq!(read(path), None, "{path}");
        }
        assert_eq!(read(&format!("a/{}", "a".repeat(97))), None);
    }
}
