//! Panics of libraries on what a file says: they become errors.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};

thread_local! {
    static ACTIVE: Cell<bool> = const { Cell::new(false) };
}

/// Runs a library that may panic on a file; `None` where it did.
pub(crate) fn guarded<T>(work: impl FnOnce() -> T) -> Option<T> {
    let outer = ACTIVE.replace(true);
    // What is guarded belongs to one file and is given up with it, so no half-made state is seen again.
    let done = catch_unwind(AssertUnwindSafe(work));
    ACTIVE.set(outer);
    done.ok()
}

/// Keeps the words of guarded panics off stderr, where the error's words follow. Any other panic is shown as before.
pub(crate) fn hush() {
    let shown = take_hook();
    set_hook(Box::new(move |panic| {
        if !ACTIVE.get() {
            shown(panic);
        }
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_nothing_and_the_next_one_is_shown() {
        assert_eq!(guarded(|| 7), Some(7));
        assert_eq!(guarded(|| guarded(|| "x".parse::<u8>().unwrap()).is_none() && ACTIVE.get()), Some(true));
        assert!(!ACTIVE.get());
    }
}
