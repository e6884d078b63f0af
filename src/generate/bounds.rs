//! Jinja for templates that come with a repository: it ends, in bounded time and space, or is an error.
//!
//! Instructions are counted by minijinja's fuel. Filters and methods that make much out of little are asked what they
//! would make first. Joining texts by `~` or `+` over and over has no hook: only the time bounds it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use minijinja::value::{Rest, Value};
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
        let size = operand.as_usize().or_else(|| operand.len()).unwrap_or(0);
        product = product.saturating_mul(size.saturating_add(1));
        product <= MOST && digits <= WIDEST
    });
    if fits { Ok(()) } else { Err(refused(format!("{name} of operands that could come to more than {MOST} bytes"))) }
}

/// The largest number that is written in a text.
fn largest_number(text: &str) -> usize {
    let numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    numbers.map(|digits| digits.parse().unwrap_or(usize::MAX)).max().unwrap_or(0)
}

pub(super) fn refused(found: String) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::OutOfFuel, found)
}

/// Runs `render` where there is stack for it, and waits no longer than it may take.
pub(super) fn patiently<T: Send + 'static>(
    render: impl FnOnce() -> Result<T, minijinja::Error> + Send + 'static,
) -> Result<T, minijinja::Error> {
    let (send, receive) = channel();
    let work = move || drop(send.send(render()));
    let thread = thread::Builder::new().name("chat template".into()).stack_size(STACK).spawn(work);
    thread.map_err(|e| refused(format!("no thread to render in: {e}")))?;
    receive.recv_timeout(PATIENCE).unwrap_or_else(|error| {
        Err(refused(match error {
            RecvTimeoutError::Timeout => format!("it does not end within {} seconds", PATIENCE.as_secs()),
            RecvTimeoutError::Disconnected => "Jinja itself failed on it".to_owned(),
        }))
    })
}
