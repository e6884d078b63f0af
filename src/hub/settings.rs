//! Where the cache and the hub are, and who asks: the variables that all of Hugging Face's tools read.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use super::Clock;
use crate::error::{Code, Error, Result};
use crate::regular;

/// What a download is told. [`Settings::from_environment`] reads it as Python's `huggingface_hub` does.
#[derive(Clone)]
pub struct Settings {
    /// The folder that holds `models--org--name`.
    pub cache: PathBuf,
    /// The hub's address, without a slash at its end.
    pub endpoint: String,
    /// The user's token. It is sent to the endpoint only.
    pub token: Option<String>,
    /// Never touch the network.
    pub offline: bool,
    /// How often one file is asked for in a row without a byte of progress.
    pub attempts: u32,
    /// The wait before the second attempt; it doubles with each one.
    pub pause: Duration,
    /// How long a server may say nothing.
    pub silence: Duration,
    /// Files downloaded at once.
    pub at_once: usize,
    /// By what the speed of a download is measured.
    pub clock: Clock,
}

/// Without the token.
impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let token = self.token.as_ref().map(|_| "...");
        f.debug_struct("Settings")
            .field("cache", &self.cache)
            .field("endpoint", &self.endpoint)
            .field("token", &token)
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

impl Settings {
    /// The hub itself, with this cache and without a token.
    pub fn new(cache: PathBuf) -> Self {
        Self {
            cache,
            endpoint: "https://huggingface.co".to_owned(),
            token: None,
            offline: false,
            attempts: 5,
            pause: Duration::from_secs(1),
            silence: Duration::from_secs(30),
            at_once: 4,
            clock: Clock::default(),
        }
    }

    /// Reads the process's environment.
    pub fn from_environment() -> Result<Self> {
        Self::from_variables(|name| std::env::var_os(name))
    }

    /// Reads variables: `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`; `HF_ENDPOINT`; `HF_TOKEN`, `HF_TOKEN_PATH`,
    /// `HF_HUB_DISABLE_IMPLICIT_TOKEN`; `HF_HUB_OFFLINE`. An empty variable is none.
    ///
    /// # Errors
    ///
    /// `usage-invalid` if no variable names the cache and the user has no home.
    pub fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let value = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text =
            |name: &str| value(name).and_then(|value| value.into_string().ok()).map(|text| text.trim().to_owned());
        let set = |name: &str| text(name).is_some_and(|text| is_true(&text));
        let path = |name: &str| value(name).map(|value| under_home(PathBuf::from(value)));
        let home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .or_else(|| dirs::home_dir().map(|home| home.join(".cache").join("huggingface")));
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| home.as_ref().map(|home| home.join("hub")))
            .ok_or_else(|| {
                Error::new(Code::UsageInvalid, "the Hugging Face cache")
                    .found("no home directory")
                    .help("set HF_HOME to the folder that should hold it")
            })?;
        let written = path("HF_TOKEN_PATH").or_else(|| home.map(|home| home.join("token")));
        let token = text("HF_TOKEN")
            .or_else(|| text("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| regular::read_text(&written?, 10_000).ok().map(|token| token.trim().to_owned()))
            .filter(|token| !token.is_empty() && !set("HF_HUB_DISABLE_IMPLICIT_TOKEN"));
        let plain = Self::new(cache);
        let endpoint = text("HF_ENDPOINT").map_or(plain.endpoint, |url| url.trim_end_matches('/').to_owned());
        Ok(Self { endpoint, token, offline: set("HF_HUB_OFFLINE") || set("TRANSFORMERS_OFFLINE"), ..plain })
    }
}

/// What `huggingface_hub` takes for yes.
fn is_true(text: &str) -> bool {
    ["1", "on", "yes", "true"].iter().any(|yes| text.eq_ignore_ascii_case(yes))
}

/// `~/x` in the user's home, for variables that no shell expanded.
fn under_home(path: PathBuf) -> PathBuf {
    match (path.strip_prefix("~"), dirs::home_dir()) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    fn read(variables: &[(&str, &str)]) -> Settings {
        let find = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value));
        Settings::from_variables(find).unwrap()
    }

    #[test]
    fn variables_are_read_as_by_the_other_tools() {
        assert_eq!(read(&[("HF_HOME", "/h")]).cache, Path::new("/h/hub"));
        assert_eq!(read(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")]).cache, Path::new("/c"));
        assert_eq!(read(&[("XDG_CACHE_HOME", "/x")]).cache, Path::new("/x/huggingface/hub"));
        assert!(read(&[("HF_HUB_CACHE", "")]).cache.ends_with(".cache/huggingface/hub"));
        assert_eq!(read(&[("HF_ENDPOINT", "http://mirror/")]).endpoint, "http://mirror");
        for (value, expected) in [("1", true), ("Yes", true), ("TRUE", true), ("0", false), ("", false)] {
            assert_eq!(read(&[("HF_HUB_OFFLINE", value)]).offline, expected, "{value}");
        }
    }

    #[test]
    fn the_token_comes_from_the_variable_before_the_file_and_is_not_printed() {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("token"), "from-file\n").unwrap();
        let home = home.path().to_str().unwrap();
        assert_eq!(read(&[("HF_HOME", home)]).token.as_deref(), Some("from-file"));
        let both = read(&[("HF_HOME", home), ("HF_TOKEN", "from-variable")]);
        assert_eq!(both.token.as_deref(), Some("from-variable"));
        assert!(!format!("{both:?}").contains("from-variable"));
        assert_eq!(read(&[("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).token, None);
    }
}
