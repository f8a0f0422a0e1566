//! A family without Python, and what a caller does in its simplest form.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use llm_batch_coalesce::clock::Nanos;
use llm_batch_coalesce::family::Family;
use llm_batch_coalesce::flight::{Flight, Standing};
use llm_batch_coalesce::map::{Found, Lead, Map, Place, Settings};
use llm_batch_coalesce::waiter::{LoopId, NO_LOOP, Origin, Waiter, Wakeup};

pub(crate) const KEY: u64 = 1;
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

impl Family for Plain {
    type Key = u64;
    /// Its count tells how many handles there are.
    type Outcome = Arc<u64>;
    type Error = Infallible;
    type Task = ();
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
        call.cancelled.store(true, SeqCst);
    }

    fn task_is_lost(_: &Self::Task) -> bool {
        false
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
    map.join(flight, NO_LOOP, Wakeup::Task(()))
}

/// How a request was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    Led,
    Shared(u64),
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
    match place.wait() {
        Standing::Landed => Served::Shared(**place.outcome().expect("it has landed")),
        Standing::Offered => {
            let lead = place.take_lead(0).expect("nobody else was offered it");
            assert!(lead.complete(Arc::new(own), ttl, false));
            Served::Led
        }
        other => panic!("a thread that waits cannot be {other:?}"),
    }
}
