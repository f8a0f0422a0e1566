//! The sweeper: one thread for the process that drops expired outcomes though nobody calls.
//!
//! It starts with the first outcome that has a deadline, sleeps until the earliest one, and ends when nothing needs
//! it. While flights depend on event loops elsewhere it looks after them once a second.
//!
//! Maps are upgraded, and whatever they hold is dropped, only inside the function given to [`install`].

use crate::clock::{FOREVER, Nanos};
#[cfg(not(loom))]
use crate::family::Family;
#[cfg(not(loom))]
use crate::map::Map;
use crate::sync::Arc;

/// What one look at a map has found.
#[derive(Debug, Default)]
pub(crate) struct Swept {
    pub(crate) removed: usize,
    /// Removed outcomes that are not dropped yet, because a reader may still see them.
    pub(crate) dying: bool,
    pub(crate) watching: bool,
    pub(crate) next: Option<Nanos>,
}

pub(crate) trait Sweep: Send + Sync {
    fn sweep(self: Arc<Self>, now: Nanos, limit: usize) -> Swept;
}

/// Runs a function where foreign objects may be dropped.
pub type Attached = fn(&mut dyn FnMut());

// No sweeper in models: they call what it would call.
#[cfg(loom)]
pub(crate) fn wake_for_deadline<M>(_map: &M, _at: Nanos) {}
#[cfg(loom)]
pub(crate) fn wake_for_watch<M>(_map: &M) {}

#[cfg(not(loom))]
pub use thread::{install, stop, wake_now};
#[cfg(not(loom))]
pub(crate) use thread::{wake_for_deadline, wake_for_watch};

#[cfg(not(loom))]
mod thread {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
    use std::thread::JoinHandle;
    use std::time::Duration;

    use super::{Arc, Attached, FOREVER, Family, Map, Nanos, Sweep, Swept};
    use crate::clock::now;

    const MILLISECOND: Nanos = 1_000_000;
    /// Between two rounds, so that a stream of deadlines does not keep the thread awake.
    const SHORTEST_SLEEP: Nanos = 50 * MILLISECOND;
    const TICK: Nanos = 1_000 * MILLISECOND;
    /// How long a sweeper without work stays: short TTLs would else start a thread for every call.
    const LINGER: Nanos = 1_000 * MILLISECOND;
    /// What one round drops at most, since it holds up a GIL build meanwhile.
    const BATCH: usize = 1_000;

    /// The sweeper's next waking, so that most completions need not take its mutex.
    static NEXT_WAKE: AtomicU64 = AtomicU64::new(FOREVER);
    static ATTACHED: OnceLock<Attached> = OnceLock::new();
    static SWEEPER: Sweeper = Sweeper {
        state: Mutex::new(State {
            maps: Vec::new(),
            wake_at: FOREVER,
            running: false,
            stopped: false,
            thread: None,
        }),
        woken: Condvar::new(),
    };

    struct Sweeper {
        state: Mutex<State>,
        woken: Condvar,
    }

    struct State {
        maps: Vec<Weak<dyn Sweep>>,
        wake_at: Nanos,
        running: bool,
        stopped: bool,
        thread: Option<JoinHandle<()>>,
    }

    impl State {
        fn wake_by(&mut self, at: Nanos) {
            self.wake_at = self.wake_at.min(at);
            NEXT_WAKE.store(self.wake_at, Ordering::SeqCst);
        }

        fn nothing_due(&mut self) {
            self.wake_at = FOREVER;
            NEXT_WAKE.store(FOREVER, Ordering::SeqCst);
        }
    }

    /// Tells how to drop foreign objects. Without it they are dropped as they are.
    pub fn install(attached: Attached) {
        // A second one is the same function: the module's initialisation sets it.
        let _ = ATTACHED.set(attached);
    }

    pub(crate) fn wake_for_deadline<F: Family>(map: &Arc<Map<F>>, at: Nanos) {
        register(map);
        // SeqCst: the deadline was pushed before this look, and the sweeper resets NEXT_WAKE before it looks at the
        // deadlines, so at least one of the two sees the other.
        if at < NEXT_WAKE.load(Ordering::SeqCst) {
            SWEEPER.nudge(at);
        }
    }

    pub(crate) fn wake_for_watch<F: Family>(map: &Arc<Map<F>>) {
        register(map);
        SWEEPER.nudge(now() + TICK);
    }

    /// Makes the sweeper look at once.
    pub fn wake_now() {
        SWEEPER.nudge(0);
    }

    /// Ends the sweeper for good and waits for it. The caller must not hold what the sweeper needs to go on.
    pub fn stop() {
        let thread = {
            let mut state = SWEEPER.lock();
            state.stopped = true;
            SWEEPER.woken.notify_all();
            state.thread.take()
        };
        if let Some(thread) = thread {
            // It ends by itself; if it has panicked there is nothing left to stop.
            let _ = thread.join();
        }
    }

    fn register<F: Family>(map: &Arc<Map<F>>) {
        // Relaxed: the mutex below orders the registration itself.
        if map.registered.load(Ordering::Relaxed) || map.registered.swap(true, Ordering::Relaxed) {
            return;
        }
        let map: Weak<dyn Sweep> = Arc::downgrade(map) as Weak<dyn Sweep>;
        SWEEPER.lock().maps.push(map);
    }

    impl Sweeper {
        fn lock(&self) -> MutexGuard<'_, State> {
            self.state.lock().unwrap_or_else(PoisonError::into_inner)
        }

        fn nudge(&'static self, at: Nanos) {
            let mut state = self.lock();
            if state.stopped {
                return;
            }
            state.wake_by(at);
            if state.running {
                self.woken.notify_all();
                return;
            }
            // If no thread can be had, outcomes still expire for callers; they are only dropped later.
            let spawned =
                std::thread::Builder::new().name("llm-batch-coalesce-sweeper".into()).spawn(|| self.run());
            state.running = spawned.is_ok();
            // A former thread has ended: it said so under this mutex.
            state.thread = spawned.ok();
        }

        fn run(&self) {
            loop {
                let maps = {
                    let mut state = self.lock();
                    if state.stopped {
                        return;
                    }
                    state.nothing_due();
                    state.maps.retain(|map| map.strong_count() > 0);
                    state.maps.clone()
                };
                let round = attached_round(&maps);
                if round.removed >= BATCH {
                    continue;
                }
                if !self.sleep(&round) {
                    return;
                }
            }
        }

        /// Until the next round is due. False when there is nothing left to do.
        fn sleep(&self, round: &Swept) -> bool {
            let mut state = self.lock();
            let earliest = now() + SHORTEST_SLEEP;
            if let Some(next) = round.next {
                state.wake_by(next.max(earliest));
            }
            if round.dying {
                state.wake_by(earliest);
            }
            if round.watching {
                state.wake_by(now() + TICK);
            }
            let linger_until = now() + LINGER;
            loop {
                if state.stopped {
                    return false;
                }
                let time = now();
                if state.wake_at <= time {
                    return true;
                }
                if state.wake_at == FOREVER && time >= linger_until {
                    state.running = false;
                    return false;
                }
                let until = state.wake_at.min(if state.wake_at == FOREVER { linger_until } else { FOREVER });
                let wait = Duration::from_nanos(until - time);
                state = self.woken.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    fn attached_round(maps: &[Weak<dyn Sweep>]) -> Swept {
        let mut round = Swept::default();
        let mut sweep = || {
            let now = now();
            for map in maps.iter().filter_map(Weak::upgrade) {
                let swept = map.sweep(now, BATCH.saturating_sub(round.removed));
                round.removed += swept.removed;
                round.dying |= swept.dying;
                round.watching |= swept.watching;
                round.next = round.next.into_iter().chain(swept.next).min();
            }
        };
        match ATTACHED.get() {
            Some(attached) => attached(&mut sweep),
            None => sweep(),
        }
        round
    }
}
