//! A caller that joined a flight, and how those that wait in threads are woken.
//!
//! Waking 1,000 threads one after another from the leader makes them fight over the interpreter. So a landed flight
//! wakes [`Family::wake_fan`] of them, and each of those, once it is back, wakes as many more: see [`Chain`].

use crate::family::Family;
use crate::sync::{Arc, AtomicBool, AtomicU8, AtomicUsize, Mutex, OnceLock, Ordering, Thread, current};

/// Identifies an event loop; threads outside of any are [`NO_LOOP`].
pub type LoopId = usize;
pub const NO_LOOP: LoopId = 0;

/// Where a caller runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The event loop of a task; [`NO_LOOP`] for a thread that calls and waits by itself.
    pub loop_id: LoopId,
    /// The thread, by a number of the language above.
    pub thread: u64,
}

pub enum Wakeup<F: Family> {
    Thread(Thread),
    Task(F::Task),
    /// The caller whose call this is; it starts to wait only when its call does not end at once.
    Caller(OnceLock<F::Task>),
}

impl<F: Family> Wakeup<F> {
    pub fn this_thread() -> Self {
        Self::Thread(current())
    }
}

/// What has become of a waiter while its flight goes on (or went on) without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Fate {
    Waiting,
    /// The lead is offered to it.
    Offered,
    /// Its own call ended in a way that concerns nobody else.
    Private,
    /// The call was cancelled for this waiter: with its loop, or with its key.
    Cancelled,
    /// An offer was withdrawn: ask again.
    Withdrawn,
}

pub struct Waiter<F: Family> {
    fate: AtomicU8,
    /// Whether it has something else to do before it waits: it cannot come for the lead, nor pass a baton on.
    busy: AtomicBool,
    pub(crate) loop_id: LoopId,
    pub(crate) wakeup: Wakeup<F>,
    /// Set before the flight is seen to have landed.
    chain: Mutex<Option<Arc<Chain<F>>>>,
}

impl<F: Family> Waiter<F> {
    pub(crate) fn new(loop_id: LoopId, wakeup: Wakeup<F>) -> Arc<Self> {
        let fate = AtomicU8::new(Fate::Waiting as u8);
        Arc::new(Self { fate, busy: AtomicBool::new(false), loop_id, wakeup, chain: Mutex::new(None) })
    }

    pub(crate) fn is_busy(&self) -> bool {
        // Relaxed: the flight's mutex orders it.
        self.busy.load(Ordering::Relaxed)
    }

    /// Only under the flight's mutex.
    pub(crate) fn set_busy(&self, busy: bool) {
        self.busy.store(busy, Ordering::Relaxed);
    }

    pub fn task(&self) -> Option<&F::Task> {
        match &self.wakeup {
            Wakeup::Thread(_) => None,
            Wakeup::Task(task) => Some(task),
            Wakeup::Caller(task) => task.get(),
        }
    }

    pub fn loop_id(&self) -> LoopId {
        self.loop_id
    }

    pub(crate) fn fate(&self) -> Fate {
        // Acquire: pairs with `set_fate`, so what was written for this waiter before is seen.
        match self.fate.load(Ordering::Acquire) {
            0 => Fate::Waiting,
            1 => Fate::Offered,
            2 => Fate::Private,
            3 => Fate::Cancelled,
            _ => Fate::Withdrawn,
        }
    }

    /// Only under the flight's mutex.
    pub(crate) fn set_fate(&self, fate: Fate) {
        self.fate.store(fate as u8, Ordering::Release);
    }

    /// Wakes on the next ones, once, if the flight has landed.
    pub(crate) fn pass_baton(&self) {
        let chain = self.chain.lock().take();
        if let Some(chain) = chain {
            chain.pass();
        }
    }

    pub(crate) fn unpark(&self) {
        if let Wakeup::Thread(thread) = &self.wakeup {
            thread.unpark();
        }
    }
}

/// The threads that wait for one landed flight. Every one of them passes once, whenever it leaves, so that each is
/// reached however the others leave.
pub(crate) struct Chain<F: Family> {
    threads: Vec<Arc<Waiter<F>>>,
    next: AtomicUsize,
}

impl<F: Family> Chain<F> {
    pub(crate) fn link(threads: Vec<Arc<Waiter<F>>>) -> Arc<Self> {
        let chain = Arc::new(Self { threads, next: AtomicUsize::new(0) });
        for waiter in &chain.threads {
            *waiter.chain.lock() = Some(Arc::clone(&chain));
        }
        chain
    }

    pub(crate) fn pass(&self) {
        for _ in 0..F::wake_fan() {
            // Relaxed: only hands out places; what the woken one reads is ordered by the flight's state.
            let place = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(waiter) = self.threads.get(place) else { return };
            waiter.unpark();
        }
    }
}
