//! Where it ran, and how much memory it took.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde::Serialize;

/// How often memory is looked at where the system keeps no record of its peak.
const INTERVAL: Duration = Duration::from_millis(5);

/// The machine, as far as the system tells.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Name of the processor.
    pub cpu: Option<String>,
    /// Threads that can run at once.
    pub cores: Option<usize>,
    /// Architecture and operating system.
    pub platform: String,
}

impl Machine {
    /// This one.
    pub(crate) fn this() -> Self {
        let listed = fs::read_to_string("/proc/cpuinfo").ok();
        let listed = listed.as_deref().and_then(|text| field(text, "model name")).map(str::to_owned);
        Self {
            // Windows tells it to every process.
            cpu: listed.or_else(|| std::env::var("PROCESSOR_IDENTIFIER").ok()),
            cores: std::thread::available_parallelism().ok().map(std::num::NonZero::get),
            platform: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        }
    }
}

/// The most physical memory of this process: Linux keeps a record of it, elsewhere it is looked at again and again.
pub(super) struct PeakMemory {
    largest: Arc<AtomicUsize>,
    ended: Arc<AtomicBool>,
}

impl PeakMemory {
    pub(super) fn watch() -> Self {
        let watch = Self { largest: Arc::default(), ended: Arc::default() };
        let (largest, ended) = (Arc::clone(&watch.largest), Arc::clone(&watch.ended));
        if recorded().is_none() {
            std::thread::spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    look(&largest);
                    std::thread::sleep(INTERVAL);
                }
            });
        }
        watch
    }

    pub(super) fn peak(&self) -> Option<u64> {
        recorded().or_else(|| {
            look(&self.largest);
            u64::try_from(self.largest.load(Ordering::Relaxed)).ok().filter(|bytes| *bytes > 0)
        })
    }
}

impl Drop for PeakMemory {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

fn look(largest: &AtomicUsize) {
    if let Some(memory) = memory_stats::memory_stats() {
        largest.fetch_max(memory.physical_mem, Ordering::Relaxed);
    }
}

/// The peak that Linux records since the program started.
fn recorded() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let kilobytes: u64 = field(&status, "VmHWM")?.strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

/// The first value of a key in lines of `key: value`.
fn field<'t>(text: &'t str, key: &str) -> Option<&'t str> {
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.map(|(name, value)| (name.trim(), value.trim())).find(|(name, _)| *name == key).map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields() {
        let text = "processor\t: 0\nmodel name\t: A B: C\nVmHWM:\t  1234 kB\n";
        assert_eq!((field(text, "model name"), field(text, "VmHWM")), (Some("A B: C"), Some("1234 kB")));
        assert_eq!(field(text, "flags"), None);
    }

    #[test]
    fn looking_finds_what_is_held() {
        let watch = PeakMemory { largest: Arc::default(), ended: Arc::default() };
        let held = vec![1_u8; 64 << 20];
        look(&watch.largest);
        assert!(watch.largest.load(Ordering::Relaxed) > held.len());
        assert!(watch.peak() >= u64::try_from(held.len()).ok());
    }
}
