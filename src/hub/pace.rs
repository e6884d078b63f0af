//! How fast a download has to be: a server that sends a byte now and then would hold it for ever.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes per second, on average over [`WINDOW`], that are progress.
const FLOOR: u64 = 1000;
const WINDOW: Duration = Duration::from_secs(60);

/// Tells the time since some moment.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> Duration + Send + Sync>);

impl Clock {
    /// A clock of the caller's own.
    pub fn new(now: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    fn now(&self) -> Duration {
        (self.0)()
    }
}

/// The system's.
impl Default for Clock {
    fn default() -> Self {
        let start = Instant::now();
        Self::new(move || start.elapsed())
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

/// The progress of one file, over all of its connections.
#[derive(Debug)]
pub(crate) struct Pace<'c> {
    clock: &'c Clock,
    /// When the window began, and the bytes since.
    window: (Duration, u64),
    /// When the last attempt failed, and the bytes since.
    failure: (Duration, u64),
}

impl<'c> Pace<'c> {
    pub(crate) fn new(clock: &'c Clock) -> Self {
        let now = clock.now();
        Self { clock, window: (now, 0), failure: (now, 0) }
    }

    /// Bytes have come. What is wrong if they come too slowly, asked once a minute.
    pub(crate) fn advance(&mut self, bytes: u64) -> Result<(), String> {
        let now = self.clock.now();
        self.failure.1 += bytes;
        self.window.1 += bytes;
        let (start, count) = self.window;
        let elapsed = now.saturating_sub(start);
        if elapsed < WINDOW {
            return Ok(());
        }
        self.window = (now, 0);
        if is_progress(count, elapsed) {
            return Ok(());
        }
        Err(format!("{count} bytes in {} s, less than {FLOOR} a second", elapsed.as_secs()))
    }

    /// An attempt has failed. True if there was progress since the one before.
    pub(crate) fn failed(&mut self) -> bool {
        let now = self.clock.now();
        let (start, count) = self.failure;
        (self.window, self.failure) = ((now, 0), (now, 0));
        count > 0 && is_progress(count, now.saturating_sub(start))
    }
}

fn is_progress(bytes: u64, elapsed: Duration) -> bool {
    u128::from(bytes) * 1000 >= u128::from(FLOOR) * elapsed.as_millis()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// A clock that stands until it is set, in seconds.
    fn clock() -> (Clock, Arc<AtomicU64>) {
        let seconds = Arc::new(AtomicU64::new(0));
        let read = Arc::clone(&seconds);
        (Clock::new(move || Duration::from_secs(read.load(Ordering::Relaxed))), seconds)
    }

    /// Receives `bytes` every `step` seconds. The second at which it is too slow.
    fn receive(bytes: u64, step: u64) -> Option<u64> {
        let (clock, seconds) = clock();
        let mut pace = Pace::new(&clock);
        (1..=600 / step).map(|i| i * step).find(|now| {
            seconds.store(*now, Ordering::Relaxed);
            pace.advance(bytes).is_err()
        })
    }

    #[test]
    fn a_minute_below_the_floor_is_too_slow() {
        assert_eq!(receive(1, 2), Some(60), "a byte every two seconds");
        assert_eq!(receive(999, 1), Some(60));
        assert_eq!(receive(1000, 1), None);
        assert_eq!(receive(28_000, 29), Some(87), "the window ends with the read that ends behind it");
        assert_eq!(receive(59_000, 59), None);
    }

    #[test]
    fn a_fast_start_does_not_pay_for_a_slow_end() {
        let (clock, seconds) = clock();
        let mut pace = Pace::new(&clock);
        pace.advance(1 << 40).unwrap();
        seconds.store(60, Ordering::Relaxed);
        pace.advance(1).unwrap();
        seconds.store(120, Ordering::Relaxed);
        assert!(pace.advance(1).unwrap_err().contains("1 bytes in 60 s"));
        // What came since the last failure was fast on the whole, once.
        assert!(pace.failed());
        seconds.store(180, Ordering::Relaxed);
        assert!(pace.advance(30).is_err() && !pace.failed());
    }

    #[test]
    fn connections_that_break_after_a_byte_are_no_progress() {
        let (clock, seconds) = clock();
        let mut pace = Pace::new(&clock);
        for second in 1..5 {
            seconds.store(second, Ordering::Relaxed);
            pace.advance(1).unwrap();
            assert!(!pace.failed());
        }
        pace.advance(1).unwrap();
        assert!(pace.failed(), "at once");
        assert!(!pace.failed(), "nothing came");
    }
}
