//! Names that a user gives on the command line, with `*` and `?` for any letters: keys and tensors that may stay unread.

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use crate::error::{Code, Error, Result};

/// A list of names and patterns.
#[derive(Debug, Clone, Default)]
pub struct Patterns {
    written: Vec<String>,
    globs: GlobSet,
}

impl Patterns {
    /// Reads patterns; `option` names them in errors.
    ///
    /// # Errors
    /// One of them is no pattern.
    pub fn new(option: &str, written: &[String]) -> Result<Self> {
        let invalid = |pattern: &str, found: &dyn std::fmt::Display| {
            Error::new(Code::UsageInvalid, format!("{option} {pattern}"))
                .found(found)
                .expected("a name, or a pattern such as 'model.layers.*.self_attn.q_proj.bias'")
                .help("write ? for a character that a pattern reads otherwise")
        };
        let mut globs = GlobSetBuilder::new();
        for pattern in written {
            // Names have dots and no separators: `*` stands for all of them.
            let glob = GlobBuilder::new(pattern).literal_separator(false).build();
            globs.add(glob.map_err(|error| invalid(pattern, &error))?);
        }
        let globs = globs.build().map_err(|error| invalid(&written.join(" "), &error))?;
        Ok(Self { written: written.to_vec(), globs })
    }

    /// True if a name is one of them.
    pub fn admits(&self, name: &str) -> bool {
        // A name may hold what means something else in a pattern.
        self.written.iter().any(|own| own == name) || self.globs.is_match(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_patterns() {
        let patterns = ["unsloth_*", "model.layers.*.bias", "odd[name", "exact"].map(str::to_owned);
        assert!(Patterns::new("--allow-unused-key", &patterns).is_err(), "a bracket that nothing closes");
        let [first, second, _, exact] = patterns;
        let patterns = Patterns::new("--allow-unused-key", &[first, second, exact]).expect("patterns");
        for name in ["unsloth_fixed", "model.layers.0.self_attn.q_proj.bias", "exact"] {
            assert!(patterns.admits(name), "{name}");
        }
        for name in ["unslot", "model.layers.0.self_attn.q_proj.weight", "exactly", ""] {
            assert!(!patterns.admits(name), "{name}");
        }
        assert!(!Patterns::default().admits("exact"));
    }
}
