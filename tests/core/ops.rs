//! What can be done with a key besides asking for it, and what the operator is told.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use llm_batch_coalesce::clock::Nanos;
use llm_batch_coalesce::lead::{Lead, Place};
use llm_batch_coalesce::map::Map;

use crate::support::{Call, Outcome, Plain, Task, hash, lead_on};

pub(crate) fn put(map: &Arc<Map<Plain>>, key: u64, outcome: Outcome, ttl: Nanos) {
    let Ok(()) = map.put(hash(key), key, outcome, ttl);
}

pub(crate) fn forget(map: &Map<Plain>, key: u64) -> bool {
    let Ok(there) = map.forget(hash(key), &key);
    there
}

pub(crate) fn cancel<const FAN: usize>(map: &Arc<Map<Plain<FAN>>>, key: u64) -> bool {
    let Ok(in_flight) = map.cancel(hash(key), &key);
    in_flight
}

pub(crate) fn peek(map: &Map<Plain>, key: u64) -> Option<u64> {
    let Ok(value) = map.peek(hash(key), &key, |outcome| outcome.value);
    value
}

/// How many flights are under way, and how many outcomes are retained.
pub(crate) fn load<const FAN: usize>(map: &Map<Plain<FAN>>) -> (u64, u64) {
    let stats = map.stats();
    (stats.in_flight, stats.retained)
}

/// A call that runs in a task of an event loop, and the caller that waits for it.
pub(crate) struct Led {
    pub(crate) lead: Lead<Plain>,
    pub(crate) caller: Place<Plain>,
    pub(crate) call: Arc<Call>,
}

pub(crate) fn lead_in_task(
    map: &Arc<Map<Plain>>,
    key: u64,
    loop_id: usize,
    task: Task,
    finishes: bool,
) -> Led {
    let lead = lead_on(map, key, loop_id);
    let caller = lead.seat_caller(loop_id, finishes);
    let call = Call::new();
    lead.led_by(Arc::clone(&call));
    assert!(caller.wait_with(task));
    Led { lead, caller, call }
}

/// The name of a map, a key, and the age of its flight.
type Report = (String, u64, Duration);

static REPORTS: Mutex<Vec<Report>> = Mutex::new(Vec::new());

/// Keeps what is reported of maps that have a name.
pub(crate) fn note_report(map: Option<&str>, key: u64, age: Duration) {
    if let Some(map) = map {
        REPORTS.lock().unwrap_or_else(PoisonError::into_inner).push((map.to_owned(), key, age));
    }
}

/// The keys whose flights were reported to be over age, and their ages, in the order of the reports.
pub(crate) fn reports(map: &Map<Plain>) -> Vec<(u64, Duration)> {
    let name = map.settings().name.as_deref().expect("a map with a name of its own");
    let reports = REPORTS.lock().unwrap_or_else(PoisonError::into_inner);
    reports.iter().filter(|report| report.0 == name).map(|&(_, key, age)| (key, age)).collect()
}
