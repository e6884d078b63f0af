//! Jinja for templates that come with a repository: it ends, in bounded time and space, or is an error.
//!
//! Instructions are counted by minijinja's fuel. Filters and methods that make much out of little are asked what they
//! would make first. Joining texts by `~` or `+` has no hook, and `x ~ x` again and again doubles a text: there the
//! memory is watched while the template renders. A thread can not be stopped from outside, so a program that goes on
//! after that error has the template's thread beside it until it ends or the system refuses it memory; the command line
//! ends with its error.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use minijinja::value::{Rest, Value, ValueKind};
use minijinja::{Environment, ErrorKind, State};

/// Longest template in bytes; the longest that is known has 30 thousand.
pub(super) const LONGEST: usize = 128 * 1024;
/// Instructions that a template may take; for one message a few thousand are usual.
const FUEL: u64 = 500_000;
/// Most bytes that are written, and most items or bytes that one filter makes.
const MOST: usize = 1 << 24;
/// Largest number in a format, as in `%10d`.
const WIDEST: usize = 1000;
/// Rendering takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);
/// Memory that the process may gain meanwhile. The deepest expression takes a third of it for its stack.
const ROOM: usize = 1 << 30;
/// Between two looks at the memory.
const PAUSE: Duration = Duration::from_millis(5);
/// Room for the deepest expression of the longest template: `1+1+1+...` nests once for every two bytes. Only what is
/// touched of it is taken.
const STACK: usize = 512 << 20;

/// Filters whose result can be larger than their operands, or that walk through a list that is none yet.
const GROWING: [&str; 21] = [
    "batch", "dictsort", "format", "indent", "items", "join", "list", "lower", "max", "min", "pprint", "replace",
    "reverse", "slice", "sort", "split", "string", "sum", "title", "unique", "upper",
];

type Outcome = Result<Value, minijinja::Error>;

/// Sets the bounds.
pub(super) fn bound(environment: &mut Environment<'_>) {
    environment.set_fuel(Some(FUEL));
    for name in GROWING {
        environment.add_filter(name, move |operands: Rest<Value>| filter(name, &operands));
    }
    environment.set_unknown_method_callback(method);
    let written = AtomicUsize::new(0);
    environment.set_formatter(move |out, state, value| {
        let length = value.as_str().map_or_else(|| value.len().unwrap_or(1), str::len);
        if written.fetch_add(length, Ordering::Relaxed).saturating_add(length) > MOST {
            return Err(refused(format!("more than {MOST} bytes of text")));
        }
        minijinja::escape_formatter(out, state, value)
    });
}

fn filter(name: &str, operands: &[Value]) -> Outcome {
    static BUILT_IN: OnceLock<Environment<'static>> = OnceLock::new();
    check(name, operands.iter())?;
    BUILT_IN.get_or_init(Environment::new).empty_state().apply_filter(name, operands)
}

/// Python's methods of strings, lists and dictionaries.
fn method(state: &State<'_, '_>, value: &Value, name: &str, operands: &[Value]) -> Outcome {
    check(name, std::iter::once(value).chain(operands))?;
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, operands)
}

/// No result is larger than the product of its operands.
fn check<'v>(name: &str, mut operands: impl Iterator<Item = &'v Value>) -> Result<(), minijinja::Error> {
    let mut product = 1_usize;
    let fits = operands.all(|operand| {
        let digits = operand.as_str().filter(|_| name == "format").map_or(0, largest_number);
        let size = operand.as_usize().unwrap_or_else(|| length(operand));
        product = product.saturating_mul(size.saturating_add(1));
        product <= MOST && digits <= WIDEST
    });
    if fits { Ok(()) } else { Err(refused(format!("{name} of operands that could come to more than {MOST} bytes"))) }
}

/// Items of a list, counted no further than needed: minijinja 2.24 takes 0 for the length of `[0, 0] * 2**63` in a
/// release build.
fn length(value: &Value) -> usize {
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map => {
            value.try_iter().map_or(0, |items| items.take(MOST + 1).count())
        }
        _ => value.len().unwrap_or(0),
    }
}

/// The largest number that is written in a text.
fn largest_number(text: &str) -> usize {
    let numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    numbers.map(|digits| digits.parse().unwrap_or(usize::MAX)).max().unwrap_or(0)
}

pub(super) fn refused(found: String) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::OutOfFuel, found)
}

/// Runs `render` where there is stack for it, and waits for no more time and memory than it may take.
pub(super) fn patiently<T: Send + 'static>(
    render: impl FnOnce() -> Result<T, minijinja::Error> + Send + 'static,
) -> Result<T, minijinja::Error> {
    let (send, receive) = channel();
    let (started, before) = (Instant::now(), memory());
    let work = move || {
        let failed = || Err(refused("Jinja itself failed on it".to_owned()));
        drop(send.send(crate::guard::guarded(render).unwrap_or_else(failed)));
    };
    let thread = thread::Builder::new().name("chat template".into()).stack_size(STACK).spawn(work);
    thread.map_err(|e| refused(format!("no thread to render in: {e}")))?;
    loop {
        match receive.recv_timeout(PAUSE) {
            Ok(outcome) => return outcome,
            Err(RecvTimeoutError::Disconnected) => return Err(refused("its thread has ended".to_owned())),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if memory().saturating_sub(before) > ROOM {
            return Err(refused(format!("it takes more than {} MiB of memory", ROOM >> 20)));
        }
        if started.elapsed() > PATIENCE {
            return Err(refused(format!("it does not end within {} seconds", PATIENCE.as_secs())));
        }
    }
}

/// Bytes of memory that the process has; 0 where the system does not say.
fn memory() -> usize {
    memory_stats::memory_stats().map_or(0, |memory| memory.physical_mem)
}
