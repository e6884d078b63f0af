//! What caches of keys and values hold where they are not float.

use std::fmt;

use super::ElementType;

/// What a cache in 8 bits holds: symmetric codes, each times its channel's scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheType {
    /// int8.
    Int8,
    /// float8e4m3fn.
    Fp8,
}

impl CacheType {
    /// Every type.
    pub const ALL: [Self; 2] = [Self::Int8, Self::Fp8];

    /// The name on the command line, in manifests and in targets.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Fp8 => "fp8",
        }
    }

    /// The type of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }

    /// What its codes are.
    pub fn element(self) -> ElementType {
        match self {
            Self::Int8 => ElementType::I8,
            Self::Fp8 => ElementType::F8E4M3,
        }
    }

    /// The largest code that scales are made for. int8 also has -128, which none needs.
    pub fn largest(self) -> f32 {
        match self {
            Self::Int8 => 127.0,
            Self::Fp8 => 448.0,
        }
    }
}

impl fmt::Display for CacheType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
