//! What a template may make and do: counted, so that the same template ends in the same way everywhere.

use super::fault::{Fault, Result};

/// Steps and bytes, all together. A template takes a few thousand for one message.
pub(super) const MOST: usize = 1 << 28;
/// What evaluating one node counts.
const STEP: usize = 32;
/// What an item of a list counts: about the bytes that it takes.
pub(super) const ITEM: usize = 48;

#[derive(Debug)]
pub(super) struct Budget {
    left: usize,
}

impl Budget {
    pub(super) fn new() -> Self {
        Self { left: MOST }
    }

    /// Makes or reads so many bytes.
    pub(super) fn make(&mut self, bytes: usize) -> Result<()> {
        match self.left.checked_sub(bytes) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => Err(Fault::refused(format!(
                "more work than a chat template may take: over {} million steps and bytes of text and lists",
                MOST / 1_000_000
            ))),
        }
    }

    pub(super) fn step(&mut self) -> Result<()> {
        self.make(STEP)
    }

    pub(super) fn items(&mut self, count: usize) -> Result<()> {
        self.make(count.saturating_mul(ITEM))
    }

    /// `count` copies of so many bytes.
    pub(super) fn copies(&mut self, bytes: usize, count: usize) -> Result<()> {
        self.make(bytes.saturating_mul(count))
    }
}
