//! Flights that wait for each other. A caller that would close a circle is told so instead of waiting for ever.
//!
//! A wait is *nested* if the waiting caller belongs to calls of its own, or blocks an event loop: what it is inside of
//! then depends on the flight that it waits for. Nested waits, and only they, are noted here, and looking for a circle
//! and noting the wait are one step under one mutex. So of the waits of a circle exactly one, the last, finds it.
//!
//! A flight's mutex may be taken while this one is held, never the other way round.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use crate::family::Family;
use crate::flight::Flight;
use crate::fork;
use crate::waiter::{LoopId, NO_LOOP};

/// What can depend on a flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// A call under way: the address of its flight, and the number of its lead.
    Call(usize, u32),
    /// A loop that is blocked, and with it whatever is led there.
    Loop(LoopId),
}

/// The wait would never end.
#[derive(Debug, PartialEq, Eq)]
pub struct Circle;

/// A flight that something waits for, whatever its family.
pub trait Target: Send + Sync {
    /// What would have to go on for it to land.
    fn sources(&self) -> Vec<Source>;
    /// The number of its present lead; `None` when it is over.
    fn epoch(&self) -> Option<u32>;
}

impl<F: Family> Target for Flight<F> {
    fn sources(&self) -> Vec<Source> {
        let Some((epoch, loop_id)) = self.lead() else { return Vec::new() };
        let call = Source::Call(std::ptr::from_ref(self).addr(), epoch);
        if loop_id == NO_LOOP { vec![call] } else { vec![call, Source::Loop(loop_id)] }
    }

    fn epoch(&self) -> Option<u32> {
        Flight::epoch(self)
    }
}

/// The number of a wait, and what it waits for.
type Wait = (u64, Arc<dyn Target>);

#[derive(Default)]
struct Waits {
    birth: u32,
    next: u64,
    targets: HashMap<Source, Vec<Wait>>,
}

static WAITS: LazyLock<Mutex<Waits>> = LazyLock::new(Mutex::default);

fn waits() -> MutexGuard<'static, Waits> {
    let mut waits = WAITS.lock().unwrap_or_else(PoisonError::into_inner);
    if waits.birth != fork::birth() {
        // Waits of the parent's threads. They are not dropped: that may run foreign code.
        let parents = std::mem::replace(&mut *waits, Waits { birth: fork::birth(), ..Waits::default() });
        #[expect(clippy::mem_forget, reason = "see above")]
        std::mem::forget(parents);
    }
    waits
}

/// A nested wait; it lasts until this is dropped.
#[derive(Debug)]
pub struct Nested {
    number: u64,
    inside: Vec<Source>,
    birth: u32,
}

impl Nested {
    /// Notes that all of `inside` will wait for this flight, unless one of them is what it depends on itself.
    pub fn begin<F: Family>(inside: Vec<Source>, flight: &Arc<Flight<F>>) -> Result<Self, Circle> {
        Self::begin_for(inside, &(Arc::clone(flight) as Arc<dyn Target>))
    }

    /// The same for a flight of whatever family.
    pub fn begin_for(inside: Vec<Source>, target: &Arc<dyn Target>) -> Result<Self, Circle> {
        let mut waits = waits();
        // Depth first through all that the flight depends on.
        let mut seen = HashSet::new();
        let mut ahead = target.sources();
        while let Some(source) = ahead.pop() {
            if inside.contains(&source) {
                drop(waits);
                return Err(Circle);
            }
            if seen.insert(source) {
                let targets = waits.targets.get(&source).into_iter().flatten();
                ahead.extend(targets.flat_map(|(_, target)| target.sources()));
            }
        }
        let number = waits.next;
        waits.next += 1;
        for &source in &inside {
            waits.targets.entry(source).or_default().push((number, Arc::clone(target)));
        }
        let birth = waits.birth;
        drop(waits);
        Ok(Self { number, inside, birth })
    }
}

impl Drop for Nested {
    fn drop(&mut self) {
        let mut ended = Vec::new();
        let mut waits = waits();
        if self.birth != waits.birth {
            return;
        }
        for source in &self.inside {
            if let Some(targets) = waits.targets.get_mut(source) {
                ended.extend(targets.extract_if(.., |(number, _)| *number == self.number));
                if targets.is_empty() {
                    waits.targets.remove(source);
                }
            }
        }
        drop(waits);
        // Only now, since the last handle to a flight may be among them.
        drop(ended);
    }
}

/// Loops whose thread is inside a blocking wait.
static BLOCKED: Mutex<Blocked> = Mutex::new(Blocked { birth: 0, loops: Vec::new() });
static BLOCKED_COUNT: AtomicUsize = AtomicUsize::new(0);

struct Blocked {
    birth: u32,
    loops: Vec<LoopId>,
}

fn blocked() -> MutexGuard<'static, Blocked> {
    let mut blocked = BLOCKED.lock().unwrap_or_else(PoisonError::into_inner);
    if blocked.birth != fork::birth() {
        // Those of the parent's threads.
        *blocked = Blocked { birth: fork::birth(), loops: Vec::new() };
        BLOCKED_COUNT.store(0, Ordering::Relaxed);
    }
    blocked
}

/// Whether this loop cannot come for a lead at the moment.
pub(crate) fn is_blocked(loop_id: LoopId) -> bool {
    // Relaxed: a loop that is blocked a moment later loses its offer to the sweeper.
    loop_id != NO_LOOP && BLOCKED_COUNT.load(Ordering::Relaxed) > 0 && blocked().loops.contains(&loop_id)
}

/// A loop that is blocked until this is dropped.
#[derive(Debug)]
pub struct BlockedLoop(LoopId);

impl BlockedLoop {
    pub fn begin(loop_id: LoopId) -> Self {
        let mut blocked = blocked();
        blocked.loops.push(loop_id);
        BLOCKED_COUNT.store(blocked.loops.len(), Ordering::Relaxed);
        Self(loop_id)
    }
}

impl Drop for BlockedLoop {
    fn drop(&mut self) {
        let mut blocked = blocked();
        if let Some(place) = blocked.loops.iter().position(|&loop_id| loop_id == self.0) {
            blocked.loops.swap_remove(place);
            BLOCKED_COUNT.store(blocked.loops.len(), Ordering::Relaxed);
        }
    }
}
