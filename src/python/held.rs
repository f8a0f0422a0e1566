//! What the maps of a coalescer hold, for the garbage collector.

use std::sync::Arc;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;

use super::family::{Outcome, Python3};
use super::ffi::Held;
use super::streams::Streams;
use crate::flight::Flight;
use crate::map::Map;

/// Shows the tasks that wait for calls, and, if anything of it can be part of a cycle, all that the maps hold.
pub(super) fn show(
    map: &Map<Python3>,
    streams: Option<&Arc<Map<Streams>>>,
    may_refer: bool,
    visit: &PyVisit<'_>,
) -> Result<(), PyTraverseError> {
    let mut result = Ok(());
    map.for_each_task(|task| {
        if result.is_ok() {
            result = visit.call(&task.event_loop).and_then(|()| visit.call(&task.future));
        }
    });
    if may_refer {
        map.for_each(|flight| {
            if result.is_ok() {
                result = visit_flight(flight, visit);
            }
        });
        if let Some(streams) = streams {
            streams.for_each(|flight| {
                if result.is_ok() {
                    result = visit_stream(flight, visit);
                }
            });
        }
    }
    result
}

/// The key and the items of a stream, its upstream, and the tasks that wait for it. Whoever else holds a stream, a reader
/// or its source, holds the coalescer, too: so what is reached through them is reached here.
fn visit_stream(flight: &Flight<Streams>, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
    visit.call(flight.key())?;
    let Some(stream) = flight.retained_at_all().cloned().or_else(|| flight.call()) else { return Ok(()) };
    let mut result = Ok(());
    let mut look = |object: &Py<PyAny>| {
        if result.is_ok() {
            result = visit.call(object);
        }
    };
    for slot in [&stream.upstream, &stream.iterated] {
        slot.try_lock().iter().filter_map(|held| held.as_ref().map(Held::object)).for_each(&mut look);
    }
    stream.log.for_each(|outcome| {
        let (Outcome::Value(object) | Outcome::Error(object)) = outcome;
        look(object.object());
    });
    stream.log.for_each_task(|task| {
        look(&task.event_loop);
        look(&task.future);
    });
    result
}

/// Keys and retained outcomes.
fn visit_flight(flight: &Flight<Python3>, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
    visit.call(flight.key())?;
    match flight.retained_at_all() {
        Some(Outcome::Value(object) | Outcome::Error(object)) => visit.call(object.object()),
        None => Ok(()),
    }
}
