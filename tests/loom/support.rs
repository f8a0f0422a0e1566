//! A family without Python, and what a caller does in its simplest form.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use llm_batch_coalesce::clock::{FOREVER, Nanos};
use llm_batch_coalesce::family::Family;
use llm_batch_coalesce::flight::Flight;
use llm_batch_coalesce::lead::{Lead, Place};
use llm_batch_coalesce::map::{Found, Map, Settings};
use llm_batch_coalesce::seat::Standing;
use llm_batch_coalesce::waiter::{LoopId, NO_LOOP, Origin, Waiter, Wakeup};

pub(crate) const KEY: u64 = 1;
pub(crate) const SECOND: Duration = Duration::from_secs(1);
pub(crate) const LOOP: usize = 1;

pub(crate) struct Plain;

/// A call's task. Its flags are bookkeeping of the test, so loom need not know them.
#[derive(Default)]
pub(crate) struct FakeCall {
    cancelled: AtomicBool,
    lost: AtomicBool,
}

impl FakeCall {
    pub(crate) fn cancelled(&self) -> bool {
        self.cancelled.load(SeqCst)
    }

    pub(crate) fn lose(&self) {
        self.lost.store(true, SeqCst);
    }
}

/// A waiter that no thread parks for.
pub(crate) enum Task {
    Living,
    OfClosedLoop,
}

impl Family for Plain {
    type Key = u64;
    /// Its count tells how many handles there are.
    type Outcome = Arc<u64>;
    type Error = Infallible;
    type Task = Task;
    type Call = Arc<FakeCall>;

    fn wake_fan() -> usize {
        1
    }

    fn same(stored: &u64, wanted: &u64) -> Result<bool, Infallible> {
        Ok(stored == wanted)
    }

    fn wake_tasks(_: Vec<Arc<Waiter<Self>>>) {}

    fn share_call(call: &Arc<FakeCall>) -> Arc<FakeCall> {
        Arc::clone(call)
    }

    fn cancel_call(call: Arc<FakeCall>) {
        assert!(!call.cancelled.swap(true, SeqCst), "a call was cancelled twice");
    }

    fn task_is_lost(task: &Task) -> bool {
        matches!(task, Task::OfClosedLoop)
    }

    fn call_is_lost(call: &Arc<FakeCall>) -> bool {
        call.lost.load(SeqCst)
    }
}

pub(crate) fn new_map() -> Arc<Map<Plain>> {
    Map::with_shards(1, Settings::default())
}

/// What a request has to do next.
pub(crate) enum Turn {
    Hit(u64),
    Join(Arc<Flight<Plain>>),
    Lead(Lead<Plain>),
}

pub(crate) fn turn(map: &Arc<Map<Plain>>) -> Turn {
    turn_on(map, NO_LOOP)
}

fn turn_on(map: &Arc<Map<Plain>>, loop_id: LoopId) -> Turn {
    loop {
        match find(map) {
            Found::Hit(value) => return Turn::Hit(value),
            Found::Pending(flight) => return Turn::Join(flight),
            Found::Nothing => {
                let Ok(lead) = map.claim(KEY, KEY, Origin { loop_id, thread: 0 });
                if let Some(lead) = lead {
                    return Turn::Lead(lead);
                }
            }
        }
    }
}

fn find(map: &Map<Plain>) -> Found<Plain, u64> {
    let Ok(found) = map.find(KEY, &KEY, |outcome, _| **outcome);
    found
}

pub(crate) fn hit(map: &Map<Plain>) -> Option<u64> {
    if let Found::Hit(value) = find(map) { Some(value) } else { None }
}

/// The first turn of a model.
pub(crate) fn lead(map: &Arc<Map<Plain>>) -> Lead<Plain> {
    lead_on(map, NO_LOOP)
}

pub(crate) fn lead_on(map: &Arc<Map<Plain>>, loop_id: LoopId) -> Lead<Plain> {
    match turn_on(map, loop_id) {
        Turn::Lead(lead) => lead,
        _ => panic!("nobody else leads"),
    }
}

/// A place for this very thread. Loom takes it ill when a thread is unparked while it waits for something else.
pub(crate) fn join(map: &Arc<Map<Plain>>, flight: &Arc<Flight<Plain>>) -> Option<Place<Plain>> {
    map.join(flight, NO_LOOP, Wakeup::this_thread())
}

/// A place whose waiter no thread parks for.
pub(crate) fn join_as_task(map: &Arc<Map<Plain>>, flight: &Arc<Flight<Plain>>) -> Option<Place<Plain>> {
    join_as(map, flight, Task::Living)
}

pub(crate) fn join_as(
    map: &Arc<Map<Plain>>,
    flight: &Arc<Flight<Plain>>,
    task: Task,
) -> Option<Place<Plain>> {
    map.join(flight, NO_LOOP, Wakeup::Task(task))
}

/// How a request was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    Led,
    Shared(u64),
    Cancelled,
}

/// Gets an outcome, with `own` and `ttl` if it has to lead.
pub(crate) fn request(map: &Arc<Map<Plain>>, own: u64, ttl: Nanos) -> Served {
    loop {
        match turn(map) {
            Turn::Hit(value) => return Served::Shared(value),
            Turn::Lead(lead) => {
                assert!(lead.complete(Arc::new(own), ttl, false));
                return Served::Led;
            }
            Turn::Join(flight) => {
                if let Some(place) = join(map, &flight) {
                    return sit(&place, own, ttl);
                }
            }
        }
    }
}

/// Waits in a place for the outcome, or for the lead.
pub(crate) fn sit(place: &Place<Plain>, own: u64, ttl: Nanos) -> Served {
    match place.wait(None) {
        Standing::Landed => {
            place.count_joined();
            Served::Shared(**place.outcome().expect("it has landed"))
        }
        Standing::Offered => {
            let Some(lead) = place.take_lead(0) else {
                assert_eq!(place.standing(), Standing::Cancelled, "nobody else was offered it");
                return Served::Cancelled;
            };
            assert!(lead.complete(Arc::new(own), ttl, false));
            Served::Led
        }
        Standing::Cancelled => Served::Cancelled,
        other => panic!("a thread that waits cannot be {other:?}"),
    }
}

pub(crate) fn put(map: &Arc<Map<Plain>>, value: u64) {
    let Ok(()) = map.put(KEY, KEY, Arc::new(value), FOREVER);
}

pub(crate) fn forget(map: &Map<Plain>) -> bool {
    let Ok(there) = map.forget(KEY, &KEY);
    there
}

pub(crate) fn cancel(map: &Arc<Map<Plain>>) -> bool {
    let Ok(in_flight) = map.cancel(KEY, &KEY);
    in_flight
}

/// What the requests have ended in, all told.
pub(crate) fn requests(map: &Map<Plain>) -> u64 {
    let stats = map.stats();
    stats.calls + stats.joined + stats.hits + stats.timeouts + stats.cancelled
}

/// Flights under way, retained outcomes, and keys.
pub(crate) fn load(map: &Map<Plain>) -> (u64, u64, usize) {
    let stats = map.stats();
    (stats.in_flight, stats.retained, map.keys())
}

/// The right to move the clock, which all models share; those that would notice hold it, too.
pub(crate) fn hold_clock() -> MutexGuard<'static, ()> {
    static CLOCK: Mutex<()> = Mutex::new(());
    CLOCK.lock().unwrap_or_else(PoisonError::into_inner)
}
