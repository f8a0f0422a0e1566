//! What an operator sees of a coalescer.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::family::{Python3, TaskCall};
use super::streams::Streams;
use crate::family::Family;
use crate::flight::View;
use crate::map::Map;

/// A flight under way, whatever its family.
struct Viewed<'a> {
    key: &'a Py<PyAny>,
    age: u64,
    waiters: usize,
    thread: Option<u64>,
    call: Option<TaskCall>,
    is_stream: bool,
}

impl<'a> Viewed<'a> {
    fn of<F: Family<Key = Py<PyAny>>>(view: &'a View<F>, is_stream: bool) -> Self {
        let thread = Some(view.led_by.thread);
        Self { key: view.flight.key(), age: view.age, waiters: 0, thread, call: None, is_stream }
    }
}

/// The flights under way, of calls and of streams: see `_flights`.
pub(super) fn flights<'py>(
    py: Python<'py>,
    map: &Map<Python3>,
    streams: Option<&Arc<Map<Streams>>>,
) -> PyResult<Vec<Bound<'py, PyTuple>>> {
    let show = |view: Viewed<'_>| {
        let call = view.call.as_ref();
        let (caller, task) = (call.map(|call| call.caller.bind(py)), call.map(|call| call.task.bind(py)));
        let age = std::time::Duration::from_nanos(view.age).as_secs_f64();
        (view.key, age, view.waiters, view.thread, caller, task, view.is_stream).into_pyobject(py)
    };
    let calls = map.flights();
    let calls = calls.iter().map(|view| Viewed {
        call: view.call.as_ref().map(Python3::share_call),
        waiters: view.waiters,
        thread: (!view.offered).then_some(view.led_by.thread),
        ..Viewed::of(view, false)
    });
    let streams = streams.map(|streams| streams.flights()).unwrap_or_default();
    let streams = streams.iter().map(|view| Viewed {
        call: view.call.as_ref().and_then(|stream| stream.leader()),
        waiters: view.call.as_ref().map_or(0, |stream| stream.readers_besides_leader()),
        ..Viewed::of(view, true)
    });
    calls.chain(streams).map(show).collect()
}
