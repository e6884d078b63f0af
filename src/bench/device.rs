//! The memory of a GPU, as `nvidia-smi` has it: of all processes on it, less what was taken before.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::runtime::{Provider, query_gpus};

/// Between two looks; each takes some 20 ms by itself.
const INTERVAL: Duration = Duration::from_millis(30);

/// Watches the memory of the GPUs from now on.
pub(super) struct DeviceMemory {
    before: u64,
    largest: Arc<AtomicU64>,
    ended: Arc<AtomicBool>,
    watcher: Option<JoinHandle<()>>,
}

impl DeviceMemory {
    /// Nothing on the processor.
    ///
    /// # Errors
    /// In words, why the memory can not be told.
    pub(super) fn watch(provider: Provider) -> Option<Result<Self, String>> {
        if provider == Provider::Cpu {
            return None;
        }
        let Some(before) = look() else { return Some(Err("nvidia-smi does not tell it".to_owned())) };
        let (largest, ended) = (Arc::new(AtomicU64::new(before)), Arc::<AtomicBool>::default());
        let (peak, end) = (Arc::clone(&largest), Arc::clone(&ended));
        let watcher = std::thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                peak.fetch_max(look().unwrap_or(0), Ordering::Relaxed);
                std::thread::sleep(INTERVAL);
            }
        });
        Some(Ok(Self { before, largest, ended, watcher: Some(watcher) }))
    }

    /// The most bytes so far, less those from before.
    pub(super) fn peak(&self) -> u64 {
        self.largest.fetch_max(look().unwrap_or(0), Ordering::Relaxed);
        self.largest.load(Ordering::Relaxed).saturating_sub(self.before)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(watcher) = self.watcher.take() {
            // A look that failed has nothing more to say.
            drop(watcher.join());
        }
    }
}

fn look() -> Option<u64> {
    sum(&query_gpus("memory.used")?)
}

/// Bytes of lines of MiB, one for each GPU; which one is used is not known here.
fn sum(text: &str) -> Option<u64> {
    let each = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(|line| line.parse::<u64>().ok());
    let all = each.collect::<Option<Vec<u64>>>().filter(|all| !all.is_empty())?;
    Some(all.into_iter().fold(0_u64, u64::saturating_add).saturating_mul(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_all_gpus_is_added() {
        assert_eq!(sum("3\n 5\n\n"), Some(8 << 20));
        assert_eq!((sum(""), sum("[N/A]\n")), (None, None));
        assert!(DeviceMemory::watch(Provider::Cpu).is_none());
    }
}
