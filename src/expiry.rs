//! The sweeper: one thread for the process that drops expired outcomes though nobody calls.
//!
//! It starts with the first outcome that has a deadline, sleeps until the earliest one, and ends when nothing needs
//! it. While flights depend on event loops elsewhere it looks after them once a second.
//!
//! Its thread is started by the [`Host`]: at home in the language above, it may drop what the maps hold, and detaches only
//! to sleep.

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

/// What the language above does for the sweeper. Without a host it has a plain thread.
pub struct Host {
    /// Starts a thread that calls [`run`]. False if it cannot be had.
    pub start: fn() -> bool,
    /// Lets other threads run meanwhile.
    pub detached: fn(&mut dyn FnMut()),
}

// No sweeper in models: they call what it would call.
#[cfg(loom)]
pub(crate) fn wake_for_deadline<M>(_map: &M, _at: Nanos) {}
#[cfg(loom)]
pub(crate) fn wake_for_watch<M>(_map: &M) {}

#[cfg(not(loom))]
pub use thread::{install, run, stop, wake_now};
#[cfg(not(loom))]
pub(crate) use thread::{wake_for_deadline, wake_for_watch};

#[cfg(not(loom))]
mod thread {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
    use std::time::Duration;

    use super::{Arc, FOREVER, Family, Host, Map, Nanos, Sweep, Swept};
    use crate::clock::now;
    use crate::fork;

    const MILLISECOND: Nanos = 1_000_000;
    /// Between two rounds, so that a stream of deadlines does not keep the thread awake.
    const SHORTEST_SLEEP: Nanos = 50 * MILLISECOND;
    const TICK: Nanos = 1_000 * MILLISECOND;
    /// How long a sweeper without work stays: short TTLs would else start a thread for every call.
    const LINGER: Nanos = 1_000 * MILLISECOND;
    /// What one round drops at most, since it holds up a GIL build meanwhile.
    const BATCH: usize = 1_000;

    static HOST: OnceLock<Host> = OnceLock::new();
    static SWEEPER: LazyLock<Sweeper> = LazyLock::new(Sweeper::new);

    /// The sweeper of this process.
    fn sweeper() -> &'static Sweeper {
        let mut sweeper = &*SWEEPER;
        while sweeper.birth != fork::birth() {
            // A fork leaves its mutex as it was at that moment, and its thread behind.
            sweeper = sweeper.successor.get_or_init(|| Box::leak(Box::new(Sweeper::new())));
        }
        sweeper
    }

    struct Sweeper {
        birth: u32,
        /// Its next waking, so that most completions need not take the mutex.
        next_wake: AtomicU64,
        state: Mutex<State>,
        woken: Condvar,
        ended: Condvar,
        successor: OnceLock<&'static Sweeper>,
    }

    struct State {
        maps: Vec<Weak<dyn Sweep>>,
        wake_at: Nanos,
        /// Whether there is a thread, or one is being started.
        running: bool,
        stopped: bool,
    }

    /// Installs the host; the first one stays.
    pub fn install(host: Host) {
        // A second one is the same: the module's initialisation brings it.
        let _ = HOST.set(host);
    }

    /// Sweeps, on a thread that was started for it, until there is nothing left to do.
    pub fn run() {
        sweeper().run();
    }

    pub(crate) fn wake_for_deadline<F: Family>(map: &Arc<Map<F>>, at: Nanos) {
        let sweeper = sweeper();
        sweeper.register(map);
        // SeqCst: the deadline was pushed before this look, and the sweeper resets `next_wake` before it looks at the
        // deadlines, so at least one of the two sees the other.
        if at < sweeper.next_wake.load(Ordering::SeqCst) {
            sweeper.nudge(at);
        }
    }

    pub(crate) fn wake_for_watch<F: Family>(map: &Arc<Map<F>>) {
        wake_for_deadline(map, now() + TICK);
    }

    /// Makes the sweeper look at once.
    pub fn wake_now() {
        sweeper().nudge(0);
    }

    /// Ends the sweeper for good and waits for it. The caller must not hold what the sweeper needs to go on.
    pub fn stop() {
        let sweeper = sweeper();
        let mut state = sweeper.lock();
        state.stopped = true;
        sweeper.woken.notify_all();
        while state.running {
            state = sweeper.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    impl Sweeper {
        fn new() -> Self {
            let state = State { maps: Vec::new(), wake_at: FOREVER, running: false, stopped: false };
            Self {
                birth: fork::birth(),
                next_wake: AtomicU64::new(FOREVER),
                state: Mutex::new(state),
                woken: Condvar::new(),
                ended: Condvar::new(),
                successor: OnceLock::new(),
            }
        }

        fn register<F: Family>(&self, map: &Arc<Map<F>>) {
            // Relaxed: the mutex below orders the registration itself.
            if map.registered.load(Ordering::Relaxed) || map.registered.swap(true, Ordering::Relaxed) {
                return;
            }
            let map: Weak<dyn Sweep> = Arc::downgrade(map) as Weak<dyn Sweep>;
            self.lock().maps.push(map);
        }

        fn wake_by(&self, state: &mut State, at: Nanos) {
            state.wake_at = state.wake_at.min(at);
            self.next_wake.store(state.wake_at, Ordering::SeqCst);
        }

        fn lock(&self) -> MutexGuard<'_, State> {
            self.state.lock().unwrap_or_else(PoisonError::into_inner)
        }

        fn nudge(&'static self, at: Nanos) {
            let mut state = self.lock();
            if state.stopped {
                return;
            }
            self.wake_by(&mut state, at);
            if state.running {
                self.woken.notify_all();
                return;
            }
            state.running = true;
            // The host's code must not run under the mutex.
            drop(state);
            let started = match HOST.get() {
                Some(host) => (host.start)(),
                None => std::thread::Builder::new().spawn(run).is_ok(),
            };
            if !started {
                // Outcomes still expire for callers; the next completion tries again to have them dropped.
                let mut state = self.lock();
                state.wake_at = FOREVER;
                self.next_wake.store(FOREVER, Ordering::SeqCst);
                self.end(&mut state);
            }
        }

        fn end(&self, state: &mut State) {
            state.running = false;
            self.ended.notify_all();
        }

        fn run(&self) {
            let mut patience = SHORTEST_SLEEP;
            loop {
                let maps = {
                    let mut state = self.lock();
                    state.wake_at = FOREVER;
                    self.next_wake.store(FOREVER, Ordering::SeqCst);
                    state.maps.retain(|map| map.strong_count() > 0);
                    state.maps.clone()
                };
                let round = one_round(&maps);
                drop(maps);
                // What others hold on to is looked at ever more seldom.
                patience = if round.dying { TICK.min(2 * patience) } else { SHORTEST_SLEEP };
                let mut awake = true;
                let mut pause = || awake = self.sleep(&round, patience);
                match HOST.get() {
                    Some(host) => (host.detached)(&mut pause),
                    None => pause(),
                }
                if !awake {
                    return;
                }
            }
        }

        /// Until the next round is due. False when there is nothing left to do.
        fn sleep(&self, round: &Swept, patience: Nanos) -> bool {
            let mut state = self.lock();
            if round.removed >= BATCH && !state.stopped {
                // There is more. Others have had a chance to run.
                return true;
            }
            let earliest = now() + SHORTEST_SLEEP;
            if let Some(next) = round.next {
                self.wake_by(&mut state, next.max(earliest));
            }
            if round.dying {
                self.wake_by(&mut state, now() + patience);
            }
            if round.watching {
                self.wake_by(&mut state, now() + TICK);
            }
            let linger_until = now() + LINGER;
            loop {
                if state.stopped {
                    self.end(&mut state);
                    return false;
                }
                let time = now();
                if state.wake_at <= time {
                    return true;
                }
                if state.wake_at == FOREVER && time >= linger_until {
                    self.end(&mut state);
                    return false;
                }
                let until = state.wake_at.min(if state.wake_at == FOREVER { linger_until } else { FOREVER });
                let wait = Duration::from_nanos(until - time);
                state = self.woken.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    fn one_round(maps: &[Weak<dyn Sweep>]) -> Swept {
        let mut round = Swept::default();
        let now = now();
        for map in maps.iter().filter_map(Weak::upgrade) {
            let swept = map.sweep(now, BATCH.saturating_sub(round.removed));
            round.removed += swept.removed;
            round.dying |= swept.dying;
            round.watching |= swept.watching;
            round.next = round.next.into_iter().chain(swept.next).min();
        }
        round
    }
}
